"""Tensors in an archive of torch.save, found without torch's loader and read one at a time from where they lie in the file.

torch.load of a part of a file copies it twice and makes whatever objects it names, which for tensors of processes (DTensor, ShardedTensor)
needs the processes that wrote them, or their version of torch. Here the structure is only written down (`recorded`), and a tensor is the place of
its numbers: bytes that are read straight into memory that is already there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import recorded, zip_table
from landscape.checkpoints.importers.notes import Made, Named, Table, whole_numbers
from landscape.checkpoints.importers.zip_table import content_begins

DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
        "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
}  # fmt: skip
STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
        "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
        "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }.items()
}  # fmt: skip
UNTYPED = "torch.storage.UntypedStorage"
REBUILD, REBUILD_TYPED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"

TENSOR_NAMES = frozenset(
    {
        *DTYPES,
        *STORAGES,
        UNTYPED,
        REBUILD,
        REBUILD_TYPED,
        *PARAMETERS,
        *recorded.DICTIONARIES,
        "torch.Size",
        "torch.device",
    }
)
"""What the structure of a plain tensor may name."""

LARGEST_STRUCTURE = 32 << 20
"""Bytes of structure, tensors not counted, beyond which an archive is refused."""

TAIL = 1 << 14
"""Bytes at the end of an archive that are read at once: the table of contents, or all of a small one."""


@dataclass(frozen=True)
class Archive:
    """A zip archive of torch.save: a file, or a part of one.

    Attributes:
        path: the file.
        start: where the archive begins in it.
        length: its bytes.
        source: names it in messages.
        structure: the pickle.
        storages: key -> (where its entry begins in the archive, bytes).
        tail: its last bytes, which for a small one are all.
    """

    path: Path
    start: int
    length: int
    source: str
    structure: bytes
    storages: Mapping[str, tuple[int, int]]
    tail: bytes

    def content(self, allowed: Callable[[str], bool]) -> Any:
        """What the structure says, see `recorded.read`."""
        return recorded.read(self.structure, self.source, allowed)

    def place(self, key: str) -> tuple[int, int]:
        """Where a storage's numbers begin in the file, and how many bytes they are."""
        if key not in self.storages:
            raise CheckpointError(f"{self.source} is damaged: it lacks data/{key[:100]}")
        entry, size = self.storages[key]
        begin = entry + content_begins(
            _bytes(self.path, self.start, self.length, self.tail, self.source)(entry, 30), self.source, f"data/{key}"
        )
        if begin + size > self.length:
            raise CheckpointError(f"{self.source} is cut short: data/{key[:100]} ends beyond its end")
        return self.start + begin, size


@dataclass(frozen=True)
class Place:
    """A tensor in a file.

    Attributes:
        path: the file.
        source: names the tensor in messages.
        position: byte of its first number.
        dtype: its type.
        shape: its shape.
        stride: its strides, in numbers.
        storage: equal for tensors in the same storage.
    """

    path: Path
    source: str
    position: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int

    def row(self, index: int) -> Place:
        """One entry along the first axis."""
        position = self.position + index * self.stride[0] * self.dtype.itemsize
        return replace(self, position=position, shape=self.shape[1:], stride=self.stride[1:])

    def fill(self, into: Tensor) -> None:
        """Read it into a tensor of its shape and type.

        Raises:
            CheckpointError: the file ends before.
        """
        if not math.prod(self.shape):
            return
        plain = self._is_contiguous() and into.is_contiguous()
        numbers = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = into.view(-1) if plain else torch.empty(numbers, dtype=self.dtype)
        room = memoryview(flat.view(torch.uint8).numpy()).cast("B")
        done = 0
        with opened(self.path, self.source) as file:
            while done < len(room):
                count = os.preadv(file, [room[done : done + (1 << 30)]], self.position + done)
                if count == 0:
                    raise CheckpointError(f"{self.source} is cut short: {self.path} ends within it")
                done += count
        if not plain:
            into.copy_(flat.as_strided(self.shape, self.stride))

    def _is_contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


@contextmanager
def opened(path: Path, source: str) -> Iterator[int]:
    """A file descriptor; what goes wrong with it within is a CheckpointError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe put in the file's place would hang otherwise
        try:
            yield file
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {path}: {error.strerror or error}") from None


def archive(path: Path, start: int, length: int, source: str) -> Archive:
    """Look at an archive: its table of contents and its structure are read, no tensor.

    Raises:
        CheckpointError: it is damaged, compressed, or written on a big-endian machine.
    """
    with opened(path, source) as file:
        tail = os.pread(file, min(length, TAIL), start + max(0, length - TAIL))
    read = _bytes(path, start, length, tail, source)
    members = zip_table.members(read, length, source)
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{source} is no archive of torch.save: it holds {len(pickles)} data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> bytes:
        entry, size = members[name]
        begin = entry + content_begins(read(entry, 30), source, name)
        if size > LARGEST_STRUCTURE or begin + size > length:
            raise CheckpointError(f"{source} is damaged: {name[:100]!r} has {size} bytes")
        return read(begin, size)

    if f"{prefix}byteorder" in members and content(f"{prefix}byteorder") != b"little":
        raise CheckpointError(f"{source} was written on a big-endian machine, or is damaged; it is not read")
    data = f"{prefix}data/"
    storages = {name.removeprefix(data): place for name, place in members.items() if name.startswith(data)}
    return Archive(path, start, length, source, content(pickles[0]), storages, tail)


def _bytes(path: Path, start: int, length: int, tail: bytes, source: str) -> Callable[[int, int], bytes]:
    """Reads bytes of an archive whose last ones are known."""
    known = length - len(tail)

    def read(at: int, count: int) -> bytes:
        if at >= known:
            return tail[at - known : at - known + count]
        with opened(path, source) as file:
            return os.pread(file, min(count, length - at), start + at)

    return read


def place_of(value: object, within: Archive, source: str) -> Place | None:
    """The place of a plain tensor that a structure notes; None where it is no plain tensor.

    Raises:
        CheckpointError: it is one, but reaches beyond its storage, repeats what is stored, or its type is unknown here.
    """
    value = _unwrapped(value)
    if not isinstance(value, Made) or value.name not in (REBUILD, REBUILD_TYPED):
        return None
    arguments = value.arguments
    typed = value.name == REBUILD_TYPED
    if len(arguments) < (7 if typed else 6):
        raise CheckpointError(f"{source} is damaged: a tensor without its storage, shape or strides")
    key, dtype, count = _storage_of(arguments[0], source)
    if typed:
        given = arguments[6]
        dtype = DTYPES.get(given.name) if isinstance(given, Named) else None
    offset, shape, stride = arguments[1], whole_numbers(arguments[2]), whole_numbers(arguments[3])
    if (
        type(offset) is not int
        or not 0 <= offset < 1 << 48
        or shape is None
        or stride is None
        or len(shape) != len(stride)
    ):
        raise CheckpointError(f"{source} is damaged: its place, shape or strides are no numbers that can be")
    if dtype is None:
        raise CheckpointError(f"{source} is of a type of tensor that is not read (quantised, sub-byte or unknown)")
    marks = arguments[6] if not typed and len(arguments) > 6 else None
    if isinstance(marks, Table) and marks.pairs:
        raise CheckpointError(
            f"{source} is saved as a conjugate or negative view; save tensor.resolve_conj().resolve_neg()"
        )
    position, size = within.place(key)
    numbers = math.prod(shape)
    last = offset + sum((s - 1) * step for s, step in zip(shape, stride, strict=True)) + 1 if numbers else 0
    if count > size or last * dtype.itemsize > size or numbers * dtype.itemsize > size:
        raise CheckpointError(
            f"{source} is damaged: shape {list(shape)} and strides {list(stride)} reach beyond or repeat the {size} bytes that are stored"
        )
    return Place(within.path, source, position + offset * dtype.itemsize, dtype, shape, stride, position)


def _unwrapped(value: object) -> object:
    """The tensor in a parameter, or in a tensor with attributes."""
    for _ in range(4):
        if isinstance(value, Made) and value.name in PARAMETERS and value.arguments:
            value = value.arguments[0]
        elif isinstance(value, Made) and value.name == FROM_TYPE and len(value.arguments) >= 3:
            function, arguments = value.arguments[0], value.arguments[2]
            if (
                not isinstance(function, Named)
                or not isinstance(arguments, tuple)
                or "wrapper_subclass" in function.name
            ):
                break
            value = Made(function.name, arguments)
        else:
            break
    return value


def _storage_of(value: object, source: str) -> tuple[str, torch.dtype | None, int]:
    """Key, type and bytes of a storage that a structure notes as ("storage", type, key, device, numbers)."""
    found = value.arguments[0] if isinstance(value, Made) and value.name == "persistent id" else None
    if isinstance(found, tuple) and len(found) >= 5 and found[0] == "storage":
        kind, key, device, numbers = found[1:5]
        if (
            isinstance(kind, Named)
            and isinstance(key, str)
            and device != "meta"
            and type(numbers) is int
            and 0 <= numbers < 1 << 48
        ):
            if kind.name == UNTYPED:
                return key, None, numbers
            if kind.name in STORAGES:
                return key, STORAGES[kind.name], numbers * STORAGES[kind.name].itemsize
    raise CheckpointError(f"{source} is damaged, or a tensor without numbers: its storage is not said")
