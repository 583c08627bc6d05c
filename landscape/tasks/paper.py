"""The paper's eighteen tasks (Zhang et al., arXiv 2112.01433), and the same networks on data that fit a small machine.

The full forms need GPUs. A smaller form of any of them is TASK@width=1/4,size=64,examples=5000, see `Scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import nn

from landscape.data.dataset import Examples
from landscape.models import CIFAR10, IMAGENET, blstm, imagenet, narrow
from landscape.tasks.task import Recipe, Scale, Task

CONVERGED_SHARE = 0.3
"""Threshold of convergence as a share of the loss of constant output, as that of the digits."""

CIFAR10_RECIPE = Recipe(128, 0.1, 320, 0.9, 5e-4, (160, 240))
IMAGENET_RECIPE = Recipe(256, 0.1, 90, 0.9, 1e-4, (30, 60, 80))
PLAIN_IMAGENET_RECIPE = Recipe(256, 0.01, 90, 0.9, 5e-4, (30, 60))
"""Of networks without BatchNorm."""
SPEECH_RECIPE = Recipe(256, 0.1, 16, 0.9, 0.0, (10, 11, 12, 13, 14, 15), decay=math.sqrt(0.5))

FEATURES, STATES = 260, 32_000
"""Of the Switchboard networks: 40 fMLLR, 100 i-vector, 120 log-mel with deltas."""
FSDD_FEATURES, FSDD_STATES = 120, 30


def cifar10_task(name: str, scale: Scale) -> Task:
    """cifar10-NETWORK."""
    network = name.removeprefix("cifar10-")
    return _task(
        name, scale, f"{network} in its 32x32 form, CIFAR-10",
        build=CIFAR10[network], load=partial(_cifar10, size=scale.size), num_classes=10, recipe=CIFAR10_RECIPE,
    )  # fmt: skip


def imagenet_task(name: str, scale: Scale) -> Task:
    """imagenet-NETWORK, or imagenette-NETWORK for ten of its classes."""
    folder, _, network = name.partition("-")
    classes = 1000 if folder == "imagenet" else 10
    plain = network in ("alexnet", "vgg11")
    return _task(
        name, scale, f"torchvision's {network}, {'ImageNet-1K' if classes == 1000 else 'ten classes of ImageNet'} under {folder}/",
        build=partial(imagenet, network, num_classes=classes),
        load=partial(_image_folder, folder=folder, size=scale.size or 224, num_classes=classes),
        num_classes=classes, recipe=PLAIN_IMAGENET_RECIPE if plain else IMAGENET_RECIPE,
    )  # fmt: skip


def switchboard_task(name: str, scale: Scale) -> Task:
    """swb300-blstm and swb2000-blstm, the acoustic models of 300 and 2,000 hours of telephone speech."""
    scale.refuse(name, "size")
    folder = name.removesuffix("-blstm")
    return _task(
        name, scale, f"bidirectional LSTM, 6 layers of 512 cells, {STATES:,} states, speech under {folder}/",
        build=partial(blstm, FEATURES, STATES), load=partial(_speech, folder=folder), num_classes=STATES, recipe=SPEECH_RECIPE,
    )  # fmt: skip


def fsdd_task(name: str, scale: Scale) -> Task:
    """fsdd-blstm, the same family of networks on spoken digits."""
    scale.refuse(name, "size")
    return _task(
        name, scale, f"the same LSTM on the Free Spoken Digit Dataset, {FSDD_STATES} states",
        build=partial(blstm, FSDD_FEATURES, FSDD_STATES), load=_fsdd, num_classes=FSDD_STATES, recipe=SPEECH_RECIPE,
    )  # fmt: skip


def _task(
    name: str, scale: Scale, description: str, *, build: Callable[[], nn.Module],
    load: Callable[[str | Path | None], tuple[Examples, Examples]], num_classes: int, recipe: Recipe,
) -> Task:  # fmt: skip
    constant = math.log(num_classes)
    if scale.size is not None:
        _check_size(name, build, scale.size)
    return Task(
        name=name,
        description=description,
        build_model=build if scale.width is None else partial(_narrowed, build, scale.width),
        loss_fn=nn.functional.cross_entropy,
        load_data=load,
        threshold=CONVERGED_SHARE * constant,
        constant_loss=constant,
        needs_data_root=True,
        evaluation_examples=1024,
        recipe=recipe,
    )


def _check_size(name: str, build: Callable[[], nn.Module], size: int) -> None:
    """Raise for images that a network makes smaller than nothing; nothing is computed."""
    try:
        with torch.device("meta"):
            build().eval()(torch.empty(1, 3, size, size))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"images of {size}x{size} are too small for {name} ({reason}); choose a larger size"
        ) from error


def _narrowed(build: Callable[[], nn.Module], width: Fraction) -> nn.Module:
    with torch.device("meta"):  # the whole network has no numbers yet, so costs no time
        whole = build()
    return narrow(whole, width)


def _cifar10(root: str | Path | None, size: int | None) -> tuple[Examples, Examples]:
    from landscape.data.images import resized
    from landscape.data.vision import cifar10

    train, test = cifar10(root)
    return (train, test) if size is None else (resized(train, size), resized(test, size))


def _image_folder(root: str | Path | None, folder: str, size: int, num_classes: int) -> tuple[Examples, Examples]:
    from landscape.data.image_check import LIST_NAME
    from landscape.data.image_folder import image_folder
    from landscape.data.vision import data_root

    where = data_root(root) / folder
    listed = (where / LIST_NAME).exists()  # images that `check_images` could not read
    return image_folder(where, size=size, num_classes=num_classes, corrupt="skip" if listed else "refuse")


def _speech(root: str | Path | None, folder: str) -> tuple[Examples, Examples]:
    from landscape.data.speech import speech
    from landscape.data.vision import data_root

    return speech(data_root(root) / folder, features=FEATURES, states=STATES)


def _fsdd(root: str | Path | None) -> tuple[Examples, Examples]:
    from landscape.data.fsdd import fsdd
    from landscape.data.vision import data_root

    return fsdd(data_root(root))


PAPER: dict[str, Callable[[str, Scale], Task]] = {
    **{f"cifar10-{network}": cifar10_task for network in CIFAR10},
    **{f"imagenet-{network}": imagenet_task for network in IMAGENET},
    "swb300-blstm": switchboard_task,
    "swb2000-blstm": switchboard_task,
}
"""The eighteen, by name."""
SMALL: dict[str, Callable[[str, Scale], Task]] = {
    **{f"imagenette-{network}": imagenet_task for network in IMAGENET},
    "fsdd-blstm": fsdd_task,
}
"""The same networks on data that fit a small machine."""
