"""Small fully connected networks on MNIST's digits: the tasks of a first look."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from torch import nn

from landscape.data.dataset import Examples
from landscape.models import mlp
from landscape.tasks.task import Scale, Task

ACTIVATIONS = {"mlp": "relu", "mlp-gelu": "gelu", "mlp-tanh": "tanh"}
"""By what follows the name of the data; gelu and tanh are the smooth controls."""


def _digits(_: str | Path | None) -> tuple[Examples, Examples]:
    from landscape.data.digits import digits

    return digits()


def _mnist(root: str | Path | None) -> tuple[Examples, Examples]:
    from landscape.data.vision import mnist

    return mnist(root)


def mlp_task(name: str, scale: Scale) -> Task:
    """784-50-50-10 network on the bundled digits (mnist-...) or all of MNIST (mnist-full-...)."""
    scale.refuse(name, "width", "size")
    full = name.startswith("mnist-full-")
    activation = ACTIVATIONS[name.removeprefix("mnist-full-" if full else "mnist-")]
    data = "60,000 MNIST digits under the data root" if full else "4,000 bundled MNIST digits"
    return Task(
        name=name,
        description=f"784-50-50-10 network, {activation}, cross entropy, {data}",
        build_model=partial(mlp, activation=activation),
        loss_fn=nn.functional.cross_entropy,
        load_data=_mnist if full else _digits,
        threshold=0.7,
        constant_loss=math.log(10),
        needs_data_root=full,
    )
