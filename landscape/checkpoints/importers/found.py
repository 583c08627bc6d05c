"""What an importer finds at a path: tensors that are still on disk, and what they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from landscape.checkpoints.format import CheckpointError

Kind = Literal["learners", "one model", "average", "shards of one model", "possibly mixed"]
"""What the weights are.

learners             each its own weights
one model            one network, as one process (or all processes alike) had it
average              one network that is an average of several, or over time
shards of one model  one network, put together from the parts that several processes wrote
possibly mixed       one network in which tensors of processes that had come apart may stand side by side
"""

LARGEST_TEXT = 64 << 20
"""Bytes of an index or configuration file beyond which it is refused."""


@dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Attributes:
        shape: its shape.
        dtype: its type.
        read: reads it; at most this tensor is held in memory. Raises CheckpointError.
        alias: equal for tensors that lie in the same memory of one file (tied weights); None where that is not recorded.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    alias: Hashable | None = None

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.shape.numel() * self.dtype.itemsize

    def read_into(self, into: Tensor) -> None:
        """Read it into a tensor of its shape, straight from the file where the type is the same and the importer can."""
        fill = getattr(self.read, "fill", None)
        if fill is not None and into.dtype == self.dtype:
            fill(into)
        else:
            tensor = self.read()
            if tensor.shape != self.shape:
                raise CheckpointError(f"a tensor has shape {list(tensor.shape)}, not {list(self.shape)} as announced")
            into.copy_(tensor)

    def then(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The same tensor, changed when it is read; shape and type stay."""
        read = self.read
        return replace(self, read=lambda: change(read()), alias=None)


@dataclass(frozen=True)
class OptimizerState:
    """State of an optimizer.

    Attributes:
        slots: torch's name of the state (momentum_buffer, exp_avg, exp_avg_sq) -> the parameter -> its tensor. A parameter is its name in
            the checkpoint, or its index where the optimizer numbers them.
        facts: what its one group of parameters says: learning_rate, momentum, betas, eps, weight_decay, optimizer_step.
        num_parameters: how many parameters it numbers, where it numbers them and says so.
    """

    slots: Mapping[str, Mapping[str | int, Stored]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    num_parameters: int | None = None


@dataclass(frozen=True)
class Weights:
    """The tensors of one network as a checkpoint names them.

    Attributes:
        source: the file or part of it that holds them, for messages.
        tensors: name -> tensor: parameters and buffers, in the order of the file.
        optimizer: None where there is none that can be read.
        ordered: whether the tensors come in the network's own order, so that an optimizer that numbers parameters can be followed without the
            module; safetensors sorts them by name.
    """

    source: str
    tensors: Mapping[str, Stored]
    optimizer: OptimizerState | None = None
    ordered: bool = True


@dataclass(frozen=True)
class Found:
    """A checkpoint of one step.

    Attributes:
        path: what was given.
        format: what wrote it, in words.
        kind: see `Kind`.
        models: one entry a learner for "learners", else exactly one.
        reasons: why `kind`, and what of it cannot be known.
        step: steps taken, where recorded.
        facts: what else is recorded: learning_rate, local_batch_size, algorithm, epoch, num_learners ...
        notes: what was left out, and why.
    """

    path: Path
    format: str
    kind: Kind
    models: tuple[Weights, ...]
    reasons: tuple[str, ...] = ()
    step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def regular_file(path: Path) -> Path:
    """The path, if it is a regular file (or a link to one); a pipe or a device would hang."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file")
    return path


def named_within(folder: Path, name: object, by: Path) -> Path:
    """The file of a folder that another file, `by`, names.

    Raises:
        CheckpointError: the name, or a link of that name, leads out of the folder (the cache of the Hugging Face hub excepted, whose
            snapshots link to the blobs beside them), or there is no regular file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{by} names a file by {name!r}")
    try:
        home, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links that go round in circles, names too long
        raise CheckpointError(f"{by} names {name[:200]!r}, which cannot be read: {error}") from None
    lexical = Path(os.path.normpath(folder / name))
    inside = lexical.is_relative_to(os.path.normpath(folder)) and target.is_relative_to(home)
    hub = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs" and "/" not in name
    if not (inside or hub):
        raise CheckpointError(f"{by} names {name[:200]!r}, which lies outside its folder; nothing outside it is read")
    return regular_file(folder / name)


def read_text(path: Path) -> str:
    """A small text file."""
    size = regular_file(path).stat().st_size
    if size > LARGEST_TEXT:
        raise CheckpointError(f"{path} has {size} bytes, too many for an index or a configuration")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
