"""What can be trained: a task is a model, a loss, data, a recipe and a convergence threshold, by name."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from landscape import streams
from landscape.data.dataset import TensorData
from landscape.losses import ExampleLoss, LossFunction
from landscape.models import mlp


@dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        name: as given to --task.
        description: one line.
        build_model: makes the network with its default initialisation, from torch's global random state.
        loss_fn: see `landscape.losses`.
        load_data: (data root or None) -> training and held-out data.
        threshold: a run has converged when the median training loss of w_a over its last 50 steps is below this.
        constant_loss: the training loss of the best constant output; a run that ends near it is stuck.
        needs_data_root: whether the data lie on disk.
    """

    name: str
    description: str
    build_model: Callable[[], nn.Module]
    loss_fn: ExampleLoss | LossFunction
    load_data: Callable[[str | Path | None], tuple[TensorData, TensorData]]
    threshold: float
    constant_loss: float
    needs_data_root: bool = False

    def initial_model(self, seed: int) -> nn.Module:
        """The network with the initial weights of a seed; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(streams.philox("initial weights", seed).random_raw() >> 1))
            return self.build_model()


def _digits(_: str | Path | None) -> tuple[TensorData, TensorData]:
    from landscape.data.digits import digits

    return digits()


def _mnist(root: str | Path | None) -> tuple[TensorData, TensorData]:
    from landscape.data.vision import mnist

    return mnist(root)


def _mlp_task(name: str, activation: str, *, full: bool) -> Task:
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


TASKS: dict[str, Task] = {
    name: _mlp_task(name, activation, full=full)
    for full, stem in ((False, "mnist"), (True, "mnist-full"))
    for activation, name in (("relu", f"{stem}-mlp"), ("gelu", f"{stem}-mlp-gelu"), ("tanh", f"{stem}-mlp-tanh"))
}


def get_task(name: str | Task) -> Task:
    """A task by name, or a user's own by "module:function" (a function that returns a Task)."""
    if isinstance(name, Task):
        return name
    if name in TASKS:
        return TASKS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"no such task: {name}; there are {', '.join(TASKS)}, or your own as module:function")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"task {name} cannot be loaded: {error}") from error
    if not isinstance(made, Task):
        raise ValueError(f"task {name}: the function returned {type(made).__name__}, not a landscape.tasks.Task")
    return replace(made, name=name)  # so that a run can find its task again
