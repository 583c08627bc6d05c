"""One network's tensors from one safetensors file, or from several: shards that an index lists or their names number, or processes' parts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.found import Stored, named_within, read_text
from landscape.checkpoints.importers.safetensors_header import Header, json_table, read_header
from landscape.checkpoints.importers.sharded import Part, assembled

SUFFIX, INDEX = ".safetensors", ".index.json"
SHARD = re.compile(
    r"(?P<stem>(?:model|pytorch_model|diffusion_pytorch_model|consolidated)(?:\.\w{1,20})?)-(?P<index>\d{5,9})-of-(?P<count>\d{5,9})"
    r"(?P<suffix>\.safetensors|\.bin)"
)
"""Files of one network, numbered from 1 (by some writers from 0)."""

PROCESS = re.compile(r"shard-(?P<index>\d{5,9})-model-(?P<file>\d{5,9})-of-(?P<count>\d{5,9})\.safetensors")
"""Files of torch.distributed.checkpoint's HuggingFaceStorageWriter, where each process writes its own."""

PLAIN, SHARDED, TORCH, WRITER = (
    "safetensors", "safetensors, sharded", "torch.save in Hugging Face's layout",
    "torch.distributed.checkpoint's Hugging Face writer (safetensors)",
)  # fmt: skip
ONE = "the file holds one tensor a name, so one network"
Held = TypeVar("Held")


@dataclass(frozen=True)
class Read:
    """The tensors of one network.

    Attributes:
        format: what wrote them.
        files: that hold them or say where they are.
        tensors: name -> tensor.
        reason: how they were found.
        metadata: what a single file notes, strings by name.
        notes: what was left out.
    """

    format: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    reason: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def one(path: Path) -> Read:
    """All tensors of one file; names that save_model dropped as tied are there again."""
    header = read_header(path)
    tensors = _together([header], [path.name])
    for name, kept in header.metadata.items():
        if kept in header.places and name not in header.places:
            tensors[kept] = tensors[name] = replace(tensors[kept], alias=(str(path), kept))
    return Read(PLAIN if header.offsets is None else WRITER, (path,), tensors, ONE, header.metadata)


def of_torch(files: Sequence[Path], reason: str = ONE) -> Read:
    """All tensors of files of torch.save, which have none in common."""
    return Read(TORCH, tuple(files), _joined(files, [_loaded(file) for file in files]), reason)


def indexed(index: Path) -> Read:
    """Of each file that an index lists, the tensors that it lists there."""
    listed = json_table(read_text(index).encode(), index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} is damaged: it has no weight_map that says which tensor is in which file")
    wanted: dict[str, list[str]] = {}
    for name, file in listed.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index} is damaged: it does not say in which file {name[:100]!r} is")
        wanted.setdefault(file, []).append(name)
    files = [_listed(index, file) for file in wanted]
    reason = f"{index.name} says in which of {len(files)} files each tensor is, so they are one network"
    if index.name.endswith(SUFFIX + INDEX):
        headers = [read_header(file) for file in files]
        total = sum(len(header.places) for header in headers)
        kept = [
            replace(h, places=_only(h.places, w, index, h.path)) for h, w in zip(headers, wanted.values(), strict=True)
        ]
        read = _of_headers(kept, reason)
    else:
        held = [_loaded(file) for file in files]
        total = sum(map(len, held))
        chosen = [_only(h, w, index, file) for h, w, file in zip(held, wanted.values(), files, strict=True)]
        read = Read(TORCH, tuple(files), _joined(files, chosen), reason)
    left = total - len(listed)
    notes = (f"{left} tensors that {index.name} does not list in their file were left out",) if left else ()
    return replace(read, files=(index, *read.files), notes=notes)


def unindexed(folder: Path, shards: Sequence[re.Match[str]]) -> Read | None:
    """Shards that no index lists; None where all hold tensors of the same names, and so are learners.

    Args:
        folder: where they are.
        shards: matches of SHARD.
    """
    if len({set_of(shard) for shard in shards}) > 1:
        several = ", ".join(shard.string for shard in shards[:6])
        raise CheckpointError(f"{folder} holds shards of several networks ({several}); put each in a folder of its own")
    _check_all(folder, shards)
    files = [folder / shard.string for shard in shards]
    reason = f"the {len(files)} files are named as shards of one network, and no tensor is in two of them"
    if shards[0]["suffix"] != SUFFIX:
        return of_torch(files, reason)
    headers = [read_header(file) for file in files]
    if len(files) > 1 and all(header.places.keys() == headers[0].places.keys() for header in headers):
        return None
    return _of_headers(headers, reason)


def of_processes(folder: Path, names: Iterable[str]) -> Read | None:
    """What HuggingFaceStorageWriter had each process write, put together; None where there is none of it."""
    shards = [shard for name in names if (shard := PROCESS.fullmatch(name))]
    if not shards:
        return None
    if len({shard["count"] for shard in shards}) > 1:
        raise CheckpointError(f"{folder} holds files of several checkpoints: they say differently how many there are")
    writers, parts = ({int(shard[key]) for shard in shards} for key in ("index", "file"))
    part = next((i for i in range(1, int(shards[0]["count"]) + 1) if i not in parts), None)
    if part is not None:
        lacking = f"shard-*-model-{part:05d}-of-{shards[0]['count']}{SUFFIX}"
        raise CheckpointError(f"{folder} is not whole: {lacking} is missing")
    headers = [read_header(folder / shard.string) for shard in shards]
    bare = next((header for header in headers if header.offsets is None), None)
    if bare is not None:
        raise CheckpointError(f"{bare.path} does not say which parts of the tensors it holds")
    gap = next(i for i in range(1, len(writers) + 2) if i not in writers)
    tensors = _together(
        headers, [int(shard["index"]) - 1 for shard in shards], f"; there is no shard-{gap:05d}-*{SUFFIX}"
    )
    reason = f"there are files of {len(writers)} processes; how many wrote is not recorded, so that a last one lacks would show in shapes only"
    return Read(WRITER, tuple(header.path for header in headers), tensors, reason)


def set_of(shard: re.Match[str] | None) -> tuple[str, ...] | None:
    """What the names of all shards of one network have in common."""
    return shard and shard.group("stem", "count", "suffix")


def _of_headers(headers: Sequence[Header], reason: str) -> Read:
    tensors = _together(headers, [header.path.name for header in headers])
    written = WRITER if any(header.offsets is not None for header in headers) else SHARDED
    return Read(written, tuple(header.path for header in headers), tensors, reason)


def _together(headers: Sequence[Header], writers: Sequence[int | str], lacking: str = "") -> dict[str, Stored]:
    """The tensors of several files, those put together of which they hold parts; `lacking` is said of those that are not whole."""
    parts: dict[str, list[Part]] = {}
    first: dict[str, Header] = {}
    for header, writer in zip(headers, writers, strict=True):
        for name, place in header.places.items():
            before = first.setdefault(name, header)
            other = before.places[name]
            if before is not header and (header.offsets is None or before.offsets is None):
                raise CheckpointError(
                    f"{place.source} is in {other.path.name} too; which of them holds cannot be known"
                )
            if (other.dtype, len(other.shape)) != (place.dtype, len(place.shape)):
                raise CheckpointError(f"{place.source} has another type or number of axes than in {other.path.name}")
            parts.setdefault(name, []).append(header.part(name, writer))
    found = {}
    for name, held in parts.items():
        place = first[name].places[name]
        ends = ([part.offsets[axis] + part.sizes[axis] for part in held] for axis in range(len(place.shape)))
        found[name] = assembled(tuple(map(max, ends)), place.dtype, held, place.source, lacking)
    return found


def _listed(index: Path, name: str) -> Path:
    if "\0" not in name and not os.path.lexists(index.parent / name):
        raise CheckpointError(f"{index.parent / name[:200]}, which {index.name} lists, is missing")
    return named_within(index.parent, name, index)


def _only(held: Mapping[str, Held], wanted: Sequence[str], index: Path, file: Path) -> dict[str, Held]:
    absent = [name for name in wanted if name not in held]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(f"{file} lacks {absent[0][:100]!r}{more}, which {index.name} says is in it")
    return {name: held[name] for name in wanted}


def _loaded(file: Path) -> dict[str, Stored]:
    return torch_file.tensors_of(torch_file.load(file), file)


def _joined(files: Sequence[Path], held: Sequence[Mapping[str, Stored]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file, of_file in zip(files, held, strict=True):
        double = next((name for name in of_file if name in tensors), None)
        if double is not None:
            raise CheckpointError(
                f"{file}: {double[:100]!r} is in another file too; which of them holds cannot be known"
            )
        tensors |= of_file
    return tensors


def _check_all(folder: Path, shards: Sequence[re.Match[str]]) -> None:
    """Shards are numbered from 1, or all from 0, and none is missing."""
    there, shard = {int(shard["index"]) for shard in shards}, shards[0]
    count, width = int(shard["count"]), len(shard["index"])
    first = 0 if 0 in there else 1
    missing = next((i for i in range(first, first + count) if i not in there), None)
    if missing is not None:
        name = f"{shard['stem']}-{missing:0{width}d}-of-{shard['count']}{shard['suffix']}"
        raise CheckpointError(f"{folder} holds {len(there)} of {count} shards of a network: {name} is missing")
    if len(shards) != count:
        raise CheckpointError(f"{folder} holds {len(shards)} shards of a network that has {count}")
