"""Tensors in several parts, each somewhere in a file, put together when they are read."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.found import Found, OptimizerState, Stored, Weights
from landscape.checkpoints.importers.torch_archive import Place

LARGEST_CUT = 6
"""Axes along which one tensor may be cut."""

LARGEST_STACK = 1024
"""Learners that a stack may have to be taken for one without being told so."""


@dataclass(frozen=True)
class Part:
    """A box of a tensor.

    Attributes:
        offsets: its first index along each axis.
        sizes: its length along each axis.
        writer: the process that wrote it: its rank, or the name of its file where that tells no rank.
        place: finds the numbers; called once they are read.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    writer: int | str
    place: Callable[[], Place]


@dataclass(frozen=True)
class Sharded:
    """Reads a tensor of parts that tile it; its `Stored.read`.

    Attributes:
        shape: of the whole.
        dtype: its type.
        parts: what it consists of, in the order of their offsets.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    def __call__(self) -> Tensor:
        """The whole tensor; beside it at most one part is in memory."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.fill(whole)
        return whole

    def fill(self, into: Tensor) -> None:
        """The same into a tensor of its shape and type, straight from the files."""
        for part in self.parts:
            _placed(part, self.dtype).fill(_box(into, part.offsets, part.sizes))

    def row(self, index: int) -> Tensor:
        """The entry `index` along the first axis; only it is read."""
        row = torch.empty(self.shape[1:], dtype=self.dtype)
        for part in self.parts:
            if part.offsets[0] <= index < part.offsets[0] + part.sizes[0]:
                place = _placed(part, self.dtype).row(index - part.offsets[0])
                place.fill(_box(row, part.offsets[1:], part.sizes[1:]))
        return row


def _box(whole: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(axis, offset, size)
    return whole


def _placed(part: Part, dtype: torch.dtype) -> Place:
    place = part.place()
    if place.shape != part.sizes or place.dtype != dtype:
        raise CheckpointError(
            f"{place.source} is a {place.dtype} tensor of shape {list(place.shape)}, but {dtype} and {list(part.sizes)} are announced"
        )
    return place


def assembled(
    shape: tuple[int, ...], dtype: torch.dtype, parts: Sequence[Part], source: str, lacking: str = ""
) -> Stored:
    """A tensor of parts, once they are seen to tile it: every number in exactly one of them.

    Args:
        shape: of the whole.
        dtype: its type.
        parts: in any order.
        source: names the tensor in messages.
        lacking: said in a message where a part is missing.

    Raises:
        CheckpointError: a part reaches beyond the tensor, two overlap, or one is missing.
    """
    for part in parts:
        if len(part.offsets) != len(shape) or len(part.sizes) != len(shape):
            raise CheckpointError(f"{source} has {len(shape)} axes, but a part of it has {len(part.sizes)}")
        if any(offset + size > whole for offset, size, whole in zip(part.offsets, part.sizes, shape, strict=True)):
            raise CheckpointError(
                f"{source}: the part at {list(part.offsets)} of shape {list(part.sizes)} reaches beyond {list(shape)}"
            )
    if math.prod(max(1, size) for size in shape) >= 1 << 60:
        raise CheckpointError(f"{source} is damaged: no tensor has the shape {list(shape)}")
    used = sorted((part for part in parts if math.prod(part.sizes)), key=lambda part: part.offsets)
    found = _first_fault(shape, used, source)
    if found is not None:
        corner, times = found
        if times > 0:
            raise CheckpointError(
                f"{source}, of shape {list(shape)}, is not whole: the part that begins at {corner} is missing{lacking}"
            )
        raise CheckpointError(f"{source}: parts overlap at {corner}; which of them holds cannot be known")
    return Stored(torch.Size(shape), dtype, Sharded(shape, dtype, tuple(used)))


def _first_fault(shape: tuple[int, ...], parts: Sequence[Part], source: str) -> tuple[list[int], int] | None:
    """The first index that not exactly one part covers, and how many parts are missing there; None if they tile the tensor.

    The difference between the indicator function of the whole and the sum of those of the parts is zero if and only if its mixed difference along
    all axes is. A box's mixed difference is +-1 at its corners and zero elsewhere, so corners are all that has to be summed. The first corner in
    lexicographic order that remains has no other below it, so the difference there is the corner's own. Cost: 2^axes a part.
    """
    cut = [a for a in range(len(shape)) if any(part.sizes[a] != shape[a] for part in parts)]
    if len(cut) > LARGEST_CUT:
        raise CheckpointError(f"{source} is cut along {len(cut)} axes; more than {LARGEST_CUT} are not read")
    remaining: defaultdict[tuple[int, ...], int] = defaultdict(int)
    boxes = [((0,) * len(shape), shape, 1)] if math.prod(shape) else []
    boxes += [(part.offsets, part.sizes, -1) for part in parts]
    for offsets, sizes, sign in boxes:
        ends = [((offsets[a], 1), (offsets[a] + sizes[a], -1)) for a in cut]
        for corner in itertools.product(*ends):
            remaining[tuple(at for at, _ in corner)] += sign * math.prod(s for _, s in corner)
    left = [corner for corner, value in remaining.items() if value]
    if not left:
        return None
    first = min(left)
    where = [0] * len(shape)
    for axis, at in zip(cut, first, strict=True):
        where[axis] = at
    return where, remaining[first]


def parts_of(stored: Stored) -> tuple[Part, ...]:
    """The parts of a tensor; none where it is no tensor of parts."""
    return stored.read.parts if isinstance(stored.read, Sharded) else ()


def stack_of(tensors: Sequence[Stored]) -> tuple[int, int] | None:
    """(n, parts) where every tensor has the leading size n, from 2 to LARGEST_STACK, and all are cut alike along that axis alone or not.

    That is what learners stacked along a leading axis look like, and networks all whose tensors happen to be of one leading size.
    """
    sizes = {stored.shape[0] if stored.shape else 0 for stored in tensors}
    if len(sizes) != 1 or not 2 <= min(sizes) <= LARGEST_STACK:
        return None
    cuts = set()
    for stored in tensors:
        parts = parts_of(stored)
        if any(part.sizes[1:] != tuple(stored.shape[1:]) for part in parts):
            return None
        cuts.add(tuple(part.sizes[0] for part in parts))
    return (sizes.pop(), max(1, len(cuts.pop()))) if len(cuts) == 1 else None


def is_stack(tensors: Sequence[Stored]) -> bool:
    """Whether learners stacked along a leading axis are the only likely reading.

    All of n >= 2 entries are cut into equal parts along it, at least two; and without the leading axis weights are matrices still and
    biases vectors: in a network that is not stacked some floating-point tensor is a vector, unless all are matrices.
    """
    found = stack_of(tensors)
    if found is None:
        return False
    count, cuts = found
    axes = [len(stored.shape) for stored in tensors if stored.dtype.is_floating_point]
    return (
        cuts > 1 and count % cuts == 0 and bool(axes) and min(axes) >= 2 and max(axes) >= 3 and _equal_cuts(tensors[0])
    )


def _equal_cuts(stored: Stored) -> bool:
    return len({part.sizes[0] for part in parts_of(stored)}) == 1


def unstack(found: Found, n: int) -> Found:
    """One network whose tensors are all stacked along a leading axis, as the n learners that it then is.

    Args:
        found: one network of any kind but learners.
        n: the learners there are: the leading size of every tensor.

    Raises:
        CheckpointError: a tensor's leading size is not n.
    """
    if len(found.models) != 1:
        raise CheckpointError(
            f"{found.path} holds {len(found.models)} learners already; there is nothing to take apart"
        )
    (model,) = found.models
    for name, stored in model.tensors.items():
        if not stored.shape or stored.shape[0] != n:
            raise CheckpointError(
                f"{model.source}: {name} has shape {list(stored.shape)}, which does not begin with {n} learners"
            )
    return replace(
        found,
        kind="learners",
        models=tuple(_entry(model, j) for j in range(n)),
        reasons=(*found.reasons, f"every tensor was taken as a stack of {n} learners along its first axis"),
        facts={**found.facts, "num_learners": n},
    )


def _entry(model: Weights, index: int) -> Weights:
    optimizer = model.optimizer
    if optimizer is not None:
        slots = {
            slot: {name: _row(stored, index) for name, stored in held.items() if stored.shape}
            for slot, held in optimizer.slots.items()
        }
        optimizer = OptimizerState(slots, optimizer.facts)
    return Weights(
        f"{model.source}[{index}]", {name: _row(stored, index) for name, stored in model.tensors.items()}, optimizer
    )


def _row(stored: Stored, index: int) -> Stored:
    whole = stored.read
    if isinstance(whole, Sharded):
        return Stored(stored.shape[1:], stored.dtype, lambda: whole.row(index))
    return Stored(stored.shape[1:], stored.dtype, lambda: whole()[index])
