"""Tasks by name."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from landscape.data.dataset import Examples
from landscape.data.selection import choose
from landscape.tasks.digits import ACTIVATIONS, mlp_task
from landscape.tasks.paper import PAPER, SMALL
from landscape.tasks.task import Scale, Task

MAKERS: dict[str, Callable[[str, Scale], Task]] = {
    **{f"{data}-{network}": mlp_task for data in ("mnist", "mnist-full") for network in ACTIVATIONS},
    **PAPER,
    **SMALL,
}
TASKS: dict[str, Task] = {name: make(name, Scale()) for name, make in MAKERS.items()}
"""All in their full forms."""


def get_task(name: str | Task) -> Task:
    """A task by name, in a smaller form by NAME@width=1/4,size=64,examples=5000, or a user's own by "module:function" (which returns a Task)."""
    if isinstance(name, Task):
        return name
    if is_ours(name):
        base, at, scale = name.partition("@")
        return _scaled(base, Scale.parse(scale)) if at else TASKS[base]
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


def is_ours(name: str) -> bool:
    """Whether a name is that of a task of this package, in any form: nothing has to be imported for it."""
    return name.partition("@")[0] in TASKS


def _scaled(base: str, scale: Scale) -> Task:
    made = MAKERS[base](base, scale)
    name = base + "@" + ",".join(f"{f}={v}" for f, v in vars(scale).items() if v is not None)
    made = replace(made, name=name, description=f"{made.description}; scaled: {scale}")
    if scale.examples is None:
        return made
    return replace(made, load_data=partial(_fewer, made.load_data, scale.examples, round(math.exp(made.constant_loss))))


def _fewer(
    load: Callable[[str | Path | None], tuple[Examples, Examples]], count: int, num_classes: int, root: str | Path | None
) -> tuple[Examples, Examples]:  # fmt: skip
    train, test = load(root)
    if count > len(train):
        raise ValueError(f"{count:,} examples were asked for, and {train.name} has {len(train):,}")
    chosen = choose(train, count)
    present = len(torch.unique(chosen.targets_at(torch.arange(len(chosen), device=chosen.device))))
    if present < num_classes:
        warnings.warn(
            f"{chosen.name}: {num_classes - present:,} of {num_classes:,} classes have no example", stacklevel=2
        )
    return chosen, test
