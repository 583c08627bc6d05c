"""The `.metadata` of torch.distributed.checkpoint: which parts of which tensors lie where.

torch reads it with pickle.load, which runs whatever the file says. Here it is only written down (`recorded`), with DCP's own names allowed and
no others, and everything in it is checked against the files that are there.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import recorded
from landscape.checkpoints.importers.found import Stored, named_within, regular_file
from landscape.checkpoints.importers.notes import Made, Named, Table, plain, whole_numbers
from landscape.checkpoints.importers.sharded import Part, assembled
from landscape.checkpoints.importers.torch_archive import (
    DTYPES,
    TENSOR_NAMES,
    Archive,
    Place,
    archive,
    opened,
    place_of,
)

DCP = "torch.distributed.checkpoint"
LARGEST_METADATA = 32 << 20
"""Bytes of `.metadata` beyond which it is refused; a part of a tensor takes about 200."""

_CLASSES = (
    "metadata.Metadata", "metadata.TensorStorageMetadata", "metadata.ChunkStorageMetadata", "metadata.TensorProperties",
    "metadata.BytesStorageMetadata", "metadata.MetadataIndex", "metadata.StorageMeta", "metadata._MEM_FORMAT_ENCODING", "filesystem._StorageInfo",
)  # fmt: skip
_ENCODINGS = (
    f"{DCP}.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
)
NAMES = frozenset(
    {
        *(f"{DCP}.{name}" for name in _CLASSES),
        *(f"torch.distributed._shard.checkpoint.{name}" for name in _CLASSES),  # before torch 2.0
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",  # before torch 2.3
        *_ENCODINGS,
        *(f"{encoding}.TORCH_{layout}" for encoding in _ENCODINGS for layout in ("CONTIGUOUS_FORMAT", "CHANNELS_LAST", "PRESERVE_FORMAT")),
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "PurePosixPath")),
        *(f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
        "torch.Size", "torch.serialization._get_layout", "collections.OrderedDict",
        "builtins.getattr",  # how Python 3.11 writes a member of an enumeration
    }
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A part of a file that one entry was written to."""

    path: Path
    start: int
    length: int
    source: str

    def open(self) -> Archive:
        """Its table of contents and structure."""
        return archive(self.path, self.start, self.length, self.source)

    def tensor(self) -> Place:
        """Where its numbers are.

        Raises:
            CheckpointError: it is damaged, or holds no plain tensor.
        """
        found = self.open()
        place = place_of(found.content(TENSOR_NAMES.__contains__), found, self.source)
        if place is None:
            raise CheckpointError(f"{self.source} holds no plain tensor")
        return place

    def setting(self) -> Any:
        """What it holds if that is a number, a string, or a few of these; None otherwise.

        Raises:
            CheckpointError: it is damaged, or names what would have to be run.
        """
        return plain(self.open().content(TENSOR_NAMES.__contains__))


@dataclass(frozen=True)
class Entries:
    """What a `.metadata` lists.

    Attributes:
        path: the file.
        tensors: name -> tensor.
        settings: name -> where something that is no tensor was written.
        ordered: whether their order is that of the state that was saved; else it is one that the processes' shares of the work left.
        version: DCP's own, where recorded.
    """

    path: Path
    tensors: Mapping[str, Stored]
    settings: Mapping[str, Slice]
    ordered: bool
    version: str | None


def read(path: Path) -> Entries:
    """Everything that a `.metadata` lists, checked.

    Raises:
        CheckpointError: it is damaged, names what DCP does not, or a file that it lists is missing, cut short, outside its folder, or
            not written by torch.save; parts of a tensor overlap or are missing.
    """
    root = _root(path)
    slices = _slices(path, root.get("storage_data"))
    listed = root.get("state_dict_metadata")
    if not isinstance(listed, Table):
        raise CheckpointError(f"{path} lists no tensors")
    tensors: dict[str, Stored] = {}
    settings: dict[str, Slice] = {}
    by_name = listed.by_name()
    order = root.get("planner_data")
    order = order.by_name() if isinstance(order, Table) else {}
    for name, entry in sorted(by_name.items(), key=_position(order)):
        kind = entry.name.rpartition(".")[2] if isinstance(entry, Made) else ""
        if kind == "TensorStorageMetadata":
            tensors[name] = _tensor(path, name, entry, slices)
        elif kind == "BytesStorageMetadata":
            found = slices.get((name, None))
            if found is None:
                raise CheckpointError(f"{path} does not say where {name[:200]} is")
            settings[name] = found
        else:
            raise CheckpointError(f"{path} does not say what {name[:200]} is")
    version = root.get("version")
    return Entries(
        path, tensors, settings, by_name.keys() <= order.keys(), version[:20] if isinstance(version, str) else None
    )


def _position(order: Mapping[str, Any]) -> Callable[[tuple[str, Any]], int]:
    """Where a name stands in the state that was saved, of which the planner keeps a list."""
    places = {name: place for place, name in enumerate(order)}
    return lambda entry: places.get(entry[0], len(places))


def writer_of(name: str) -> int | str:
    """The rank that wrote a file, from its name.

    >>> writer_of("__3_0.distcp"), writer_of("part.bin")
    (3, 'part.bin')
    """
    found = re.fullmatch(r"__(\d{1,9})_\d{1,9}\.distcp", name)
    return int(found[1]) if found else name


def _root(path: Path) -> dict[str, Any]:
    size = regular_file(path).stat().st_size
    if size > LARGEST_METADATA:
        raise CheckpointError(f"{path} has {size} bytes; more than {LARGEST_METADATA} are not read")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    root = recorded.read(content, str(path), NAMES.__contains__)
    if not isinstance(root, Made) or not root.name.endswith(".Metadata"):
        raise CheckpointError(f"{path} is not torch.distributed.checkpoint's")
    return root.attributes()


def _slices(path: Path, listed: object) -> dict[tuple[str, tuple[int, ...] | None], Slice]:
    """(name, offsets) -> where it was written; all inside real files, no two in the same place."""
    if not isinstance(listed, Table):
        raise CheckpointError(f"{path} does not say where its tensors are")
    found: dict[tuple[str, tuple[int, ...] | None], Slice] = {}
    files: dict[str, tuple[Path, int]] = {}
    taken: dict[Path, list[Slice]] = defaultdict(list)
    for key, value in listed.pairs:
        index = key.attributes() if isinstance(key, Made) else {}
        info = value.attributes() if isinstance(value, Made) else {}
        name, offsets = index.get("fqn"), whole_numbers(index.get("offset"))
        file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(name, str) or (offsets is None and index.get("offset") is not None):
            raise CheckpointError(f"{path} is damaged: it lists a part without a name or a place")
        if (
            type(start) is not int
            or type(length) is not int
            or start < 0
            or length < 0
            or not isinstance(file, str)
            or len(file) > 1000
        ):
            raise CheckpointError(f"{path} is damaged: it does not say where {name[:200]} is")
        if file not in files:
            real = named_within(path.parent, file, path)
            files[file] = real, real.stat().st_size
        real, size = files[file]
        source = f"{real}: {name[:200]}" + (f" at {list(offsets)}" if offsets and any(offsets) else "")
        descriptors = info.get("transform_descriptors")
        if descriptors:
            said = str(descriptors[0])[:100] if isinstance(descriptors, list | tuple) else "unknown"
            raise CheckpointError(
                f"{source} was written through the extension {said!r}; save it without extensions to have it read here"
            )
        if start + length > size:
            raise CheckpointError(f"{source} is cut short: it ends at byte {start + length}, but the file has {size}")
        if (name, offsets) in found:
            raise CheckpointError(f"{path} is damaged: it lists {source} twice")
        found[name, offsets] = Slice(real, start, length, source)
        taken[real].append(found[name, offsets])
    for real, slices in taken.items():
        _check_apart(real, slices)
    return found


def _check_apart(path: Path, slices: list[Slice]) -> None:
    if _is_safetensors(path):
        raise CheckpointError(
            f"{path} was written by FileSystemWriter with SerializationFormat.SAFETENSORS, which torch.distributed.checkpoint itself cannot read "
            "back: the places that .metadata lists are not the tensors'. Save with HuggingFaceStorageWriter, or without the format"
        )
    slices = sorted((found for found in slices if found.length), key=lambda found: found.start)
    for before, after in itertools.pairwise(slices):
        if before.start + before.length > after.start:
            raise CheckpointError(f"{after.source} overlaps another entry of the file; the checkpoint is damaged")


def _is_safetensors(path: Path) -> bool:
    with opened(path, str(path)) as file, open(file, "rb", closefd=False) as content:
        start = content.read(9)
        size = path.stat().st_size
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < size


def _tensor(path: Path, name: str, entry: Made, slices: Mapping[tuple[str, tuple[int, ...] | None], Slice]) -> Stored:
    said = entry.attributes()
    source = f"{path.parent}: {name[:200]}"
    shape, chunks, properties = whole_numbers(said.get("size")), said.get("chunks"), said.get("properties")
    state = properties.state if isinstance(properties, Made) else None
    kind = (
        state[0]
        if isinstance(state, tuple) and state
        else state.by_name().get("dtype")
        if isinstance(state, Table)
        else None
    )
    if shape is None or not isinstance(chunks, list):
        raise CheckpointError(f"{source}: {path.name} does not say its shape or its parts")
    dtype = DTYPES.get(kind.name) if isinstance(kind, Named) else None
    if dtype is None:
        raise CheckpointError(f"{source} is of type {getattr(kind, 'name', 'unknown')[:100]}, which is not read")
    parts, room = [], 0
    for chunk in chunks:
        box = chunk.attributes() if isinstance(chunk, Made) else {}
        offsets, sizes = whole_numbers(box.get("offsets")), whole_numbers(box.get("sizes"))
        if offsets is None or sizes is None:
            raise CheckpointError(f"{source}: {path.name} does not say where a part of it belongs")
        found = slices.get((name, offsets)) or (slices.get((name, None)) if len(chunks) == 1 else None)
        if found is None:
            raise CheckpointError(f"{source}: {path.name} does not say in which file the part at {list(offsets)} is")
        if math.prod(sizes) * dtype.itemsize > found.length:
            raise CheckpointError(
                f"{found.source} cannot hold {list(sizes)} numbers of {dtype} in {found.length} bytes"
            )
        room += found.length
        parts.append(Part(offsets, sizes, writer_of(found.path.name), found.tensor))
    if math.prod(shape) * dtype.itemsize > room:
        raise CheckpointError(f"{source}, of shape {list(shape)}, is not whole: its parts have {room} bytes")
    return assembled(shape, dtype, parts, source)
