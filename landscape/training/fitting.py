"""Whether data fit a network and its loss, seen before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from landscape.data.dataset import Examples
from landscape.functional import FunctionalModel
from landscape.training.evaluate import IGNORED


def check_fits(task: str, model: FunctionalModel, data: Examples) -> None:
    """Take the first example, and those of the smallest and the largest class, through the network and the loss.

    A target that the loss cannot take ends a program with an error that names no data; on a GPU it ends all of them.

    Args:
        task: its name, for messages.
        model: on the CPU, in eval mode.
        data: on the CPU; elsewhere they are not looked at. Of data without a tensor of `targets` the first example alone is.

    Raises:
        ValueError: the network does not take the inputs, or the loss the targets.
    """
    if data.device.type != "cpu" or not len(data):
        return
    inputs, targets = data.batch(torch.tensor(_telling(getattr(data, "targets", None))))
    weights, buffers = model.initial_weights()
    inputs, targets = (tree_map(lambda t: _in_type(t, weights.dtype), part) for part in (inputs, targets))
    with torch.no_grad():
        try:
            output = model.output(weights, buffers, inputs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"the network of task {task} cannot take the examples of {data.name}, of shape {_shapes(inputs)}: {_first_line(error)}"
            ) from error
        try:
            model.parted(output, targets)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"the loss of task {task} cannot take the targets of {data.name}{_range(targets)}, of shape {_shapes(targets)}, with outputs of "
                f"shape {_shapes(output)}: {_first_line(error)}"
            ) from error


def _in_type(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _telling(targets: Any) -> list[int]:
    """The first example, and those of the smallest and the largest class that counts."""
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return [0]
    flat = targets.reshape(len(targets), -1)
    counted = (flat != IGNORED).flatten().nonzero()[:, 0]
    if not len(counted):
        return [0]
    classes = flat.flatten()[counted]
    places = counted[torch.stack([classes.argmin(), classes.argmax()])] // flat.shape[1]
    return sorted({0, *places.tolist()})


def _range(targets: Any) -> str:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not targets.numel():
        return ""
    return f", {int(targets.min())} to {int(targets.max())}"


def _shapes(batch: Any) -> str:
    return " and ".join(str(list(leaf.shape[1:])) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
