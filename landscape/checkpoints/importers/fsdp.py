"""Files of torch.save, one a process, whose tensors are shards: DTensor (FSDP2, tensor parallelism) or ShardedTensor (FSDP1).

torch makes such tensors only in the version, and some only among the processes, that saved them. Here a file's structure is written down
(`recorded`): a DTensor says its global shape, how its mesh of processes is laid out and where in it its own process is, so the place of
each part in the whole is known without a process group, and the parts are read straight into it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.dtensor import NAMES, Local, Meshes, is_sharded, local_of
from landscape.checkpoints.importers.flat_names import Content, apart, counter
from landscape.checkpoints.importers.found import Found, Stored, regular_file
from landscape.checkpoints.importers.notes import Table, plain
from landscape.checkpoints.importers.sharded import Part, Sharded, assembled, is_stack, parts_of, stack_of, unstack
from landscape.checkpoints.importers.torch_archive import Archive, Place, archive, place_of

FORMAT = "files of torch.save, one a process, of sharded tensors (FSDP)"
MARKS = (b"DTensor", b"ShardedTensor", b"flat_param")
FLAT = re.compile(r"(?:.*[./])?_?flat_param(?:eter)?(?:_\d+)?")
LARGEST_DEPTH, LARGEST_COUNT = 6, 1_000_000
"""Bounds on walking through a file's dictionaries."""


@dataclass(frozen=True)
class RankFile:
    """One process's file.

    Attributes:
        path: the file.
        rank: of the process, as the file tells, or else its name.
        archive: where its tensors lie.
        entries: dotted name -> a share of a sharded tensor, a tensor, or what else is noted there.
    """

    path: Path
    rank: int | None
    archive: Archive
    entries: dict[str, Any]

    @property
    def name(self) -> int | str:
        """Its rank, or what it is called."""
        return self.path.name if self.rank is None else self.rank


def find(paths: Sequence[Path]) -> Found | None:
    """The network whose shards the files hold; None if none holds any.

    Args:
        paths: one file a process, in any order, of one step.

    Raises:
        CheckpointError: shards are missing, do not fit together, or are of a kind that cannot be put together; the message says which.
    """
    if not paths or not any(_is_mine(path) for path in paths):
        return None
    files = [_read(path) for path in paths]
    flat = next((name for file in files for name in file.entries if FLAT.fullmatch(name)), None)
    if flat is not None:
        raise CheckpointError(
            f"{files[0].path} holds FSDP1's flat parameters ({flat[:100]}), which do not say where the network's own begin. In the program that "
            "trained it, load them and save with StateDictType.FULL_STATE_DICT, or with torch.distributed.checkpoint and "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )
    files = _ordered(files)
    content, copies, mixed = _assembled(files)
    state = apart(content, str(files[0].path.parent))
    tensors = list(state.weights.tensors.values())
    if not tensors:
        raise CheckpointError(
            f"{files[0].path} and the files beside it hold no weights, only the state of an optimizer"
        )
    found = Found(
        path=files[0].path if len(files) == 1 else files[0].path.parent,
        format=FORMAT,
        kind="possibly mixed" if mixed else "shards of one model",
        models=(state.weights,),
        reasons=_reasons(len(files), state.weights.tensors, copies, mixed),
        step=state.step,
        facts=state.facts,
        notes=state.notes,
    )
    stack = stack_of(tensors)
    return unstack(found, stack[0]) if stack is not None and is_stack(tensors) else found


def _is_mine(path: Path) -> bool:
    """Whether a file's structure speaks of sharded tensors at all."""
    size = regular_file(path).stat().st_size
    try:
        structure = archive(path, 0, size, str(path)).structure
    except CheckpointError:  # whatever it is, another importer says what is wrong with it
        return False
    return any(mark in structure for mark in MARKS)


def _read(path: Path) -> RankFile:
    found = archive(path, 0, regular_file(path).stat().st_size, str(path))
    root = found.content((NAMES | torch_file.allowed_names()).__contains__)
    if not isinstance(root, Table):
        raise CheckpointError(f"{path} holds no table of tensors")
    entries: dict[str, Any] = {}
    meshes: Meshes = {}
    for name, value in _flattened(root, path):
        source = f"{path}: {name[:200]}"
        entries[name] = (
            local_of(value, found, source, meshes) if is_sharded(value) else place_of(value, found, source) or value
        )
    told = {value.rank for value in entries.values() if isinstance(value, Local) and value.rank is not None}
    if len(told) > 1:
        raise CheckpointError(
            f"{path}: its tensors say that they are of ranks {', '.join(map(str, sorted(told)[:10]))}; a file holds one rank's"
        )
    return RankFile(path, told.pop() if told else rank_in(path), found, entries)


def rank_in(path: Path) -> int | None:
    """The rank in a file's name, or in its folder's.

    >>> from pathlib import Path
    >>> [rank_in(Path(p)) for p in ("model_world_size_8_rank_3.pt", "a-00001-of-00004.pt", "ckpt_r2.pt", "1/model.pt", "model.pt")]
    [3, 1, 2, 1, None]
    """
    for pattern in (r".*rank[_-]?(\d{1,6})(?!\d).*", r".*-(\d{1,6})-of-\d{1,6}\b.*", r".*[_-]r(\d{1,6})(?!\d).*"):
        found = re.fullmatch(pattern, path.name, re.IGNORECASE)
        if found:
            return int(found[1])
    found = re.fullmatch(r"(?:rank[_-]?)?(\d{1,6})", path.parent.name, re.IGNORECASE)
    return int(found[1]) if found else None


def _flattened(root: Table, path: Path) -> Iterator[tuple[str, Any]]:
    """Dotted names and what they stand for; dictionaries are gone into, and lists of dictionaries."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    count = 0
    while waiting:
        before, value = waiting.pop()
        inner: list[tuple[Any, Any]] | None = None
        if isinstance(value, Table):
            inner = value.pairs
        elif isinstance(value, list) and value and all(isinstance(item, Table) for item in value):
            inner = list(enumerate(value))
        if inner is None:
            yield ".".join(before), value
        elif len(before) < LARGEST_DEPTH:
            count += len(inner)
            if count > LARGEST_COUNT:
                raise CheckpointError(f"{path} holds more than {LARGEST_COUNT} entries; it is not read")
            waiting += [
                ((*before, str(key)), item) for key, item in reversed(inner) if isinstance(key, str) or type(key) is int
            ]


def _ordered(files: list[RankFile]) -> list[RankFile]:
    """By rank; every rank once."""
    if len(files) == 1 and files[0].rank is None:
        return files
    unknown = [file.path for file in files if file.rank is None]
    if unknown:
        raise CheckpointError(
            f"which rank wrote {unknown[0]} is told neither in it nor by its name; name the files *rank0.pt, *rank1.pt, ..."
        )
    by_rank: dict[int | None, RankFile] = {}
    for file in files:
        if file.rank in by_rank:
            raise CheckpointError(
                f"{by_rank[file.rank].path} and {file.path} are both of rank {file.rank}; give the files of one step"
            )
        by_rank[file.rank] = file
    return [by_rank[rank] for rank in sorted(by_rank, key=lambda rank: rank or 0)]


def _assembled(files: Sequence[RankFile]) -> tuple[Content, int, bool]:
    """All names, how often the parts of some tensor are there at most, and whether some are of several replicas."""
    content = Content()
    copies, mixed = 1, False
    for name in dict.fromkeys(name for file in files for name in file.entries):
        source = f"{files[0].path.parent}: {name[:200]}"
        held = [(file, file.entries[name]) for file in files if name in file.entries]
        first = held[0][1]
        if any(isinstance(value, Local) for _, value in held):
            whole = _together(held, source, [file.rank for file in files])
            content.tensors[name] = whole.stored
            copies, mixed = max(copies, whole.copies), mixed or whole.mixed
        elif isinstance(first, Place):
            for file, place in held:
                if not isinstance(place, Place) or (place.shape, place.dtype) != (first.shape, first.dtype):
                    raise CheckpointError(
                        f"{source} is of another shape or type in {file.path} than in {held[0][0].path}; give files of one network"
                    )
            content.tensors[name] = _plain(first)
        else:
            _check_same(name, held)
            content.settings[name] = _setting(first)
    needed, room = (
        sum(stored.num_bytes for stored in content.tensors.values()),
        sum(file.archive.length for file in files),
    )
    if needed > 2 * room + (64 << 20):
        raise CheckpointError(
            f"{files[0].path}: its tensors would fill {needed} bytes, far more than the files have; they are not read"
        )
    return content, copies, mixed


def _reasons(num_files: int, tensors: Mapping[str, Stored], copies: int, mixed: bool) -> tuple[str, ...]:
    cut = sum(len(parts_of(stored)) > 1 for stored in tensors.values())
    whole = [
        n for n, s in tensors.items() if len(parts_of(s)) == 1 and s.dtype.is_floating_point and s.shape.numel() > 1
    ]
    reasons = [f"{cut} of {len(tensors)} tensors were put together from the parts in {num_files} processes' files"]
    if mixed:
        reasons.append(
            "the parts are of several replicas (HSDP), none of which is whole in the files given: if the replicas had come apart, this mixes them"
        )
    elif copies > 1:
        reasons.append(
            f"parts are there up to {copies} times, from processes that were replicas (HSDP): the first replica's were taken; the others have the "
            "same shapes, but were not compared"
        )
    if whole and num_files > 1:
        reasons.append(
            f"{len(whole)} tensors were not cut, such as {whole[0][:100]}: the lowest rank's were taken; statistics of BatchNorm differ between "
            "processes"
        )
    return tuple(reasons)


@dataclass(frozen=True)
class Whole:
    """A tensor put together.

    Attributes:
        stored: the tensor.
        copies: how often its parts are there at most.
        mixed: whether its parts are from several replicas, as no replica's are all there.
    """

    stored: Stored
    copies: int
    mixed: bool


def _together(held: Sequence[tuple[RankFile, Any]], source: str, ranks: Sequence[int | None]) -> Whole:
    """A tensor of the parts that the processes of one replica hold, the first of which all are there."""
    whole = [file.path for file, value in held if not isinstance(value, Local)]
    if whole:
        raise CheckpointError(
            f"{source} is sharded in another process's file, but not in {whole[0]}; give files of one network"
        )
    first, shape, dtype = held[0][0], held[0][1].shape, held[0][1].dtype
    boxes: defaultdict[tuple[int, ...], dict[tuple[tuple[int, ...], tuple[int, ...]], Part]] = defaultdict(dict)
    times: defaultdict[tuple[tuple[int, ...], tuple[int, ...]], int] = defaultdict(int)
    for file, local in held:
        if (local.shape, local.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{source} is of shape {list(shape)} in {first.path}, but {list(local.shape)} in {file.path}, or of another type"
            )
        for offsets, place in local.parts:
            box = offsets, place.shape
            boxes[local.replica].setdefault(box, Part(*box, file.name, _known(place)))
            times[box] += math.prod(place.shape) > 0
    complete = [r for r in sorted(boxes) if sum(math.prod(sizes) for _, sizes in boxes[r]) == math.prod(shape)]
    merged = {box: part for replica in sorted(boxes, reverse=True) for box, part in boxes[replica].items()}
    chosen = boxes[complete[0]] if complete else merged
    members = {id(local.members): local.members for _, local in held}.values()
    missing = sorted({rank for ranks_ in members for rank in ranks_} - set(ranks))
    lacking = f"; the file of rank {', '.join(map(str, missing[:10]))} is not among those given" if missing else ""
    stored = assembled(shape, dtype, list(chosen.values()), source, lacking)
    place = held[0][1].parts[0][1] if held[0][1].parts else None
    alias = None if place is None else (str(first.path), place.storage, place.position, place.shape, place.stride)
    return Whole(replace(stored, alias=alias), max(times.values(), default=1), not complete and len(boxes) > 1)


def _known(place: Place) -> Callable[[], Place]:
    return lambda: place


def _plain(place: Place) -> Stored:
    part = Part((0,) * len(place.shape), place.shape, 0, _known(place))
    read = Sharded(place.shape, place.dtype, (part,) if math.prod(place.shape) else ())
    return Stored(
        torch.Size(place.shape), place.dtype, read, (str(place.path), place.storage, place.position, place.stride)
    )


def _setting(value: object) -> Callable[[], Any]:
    return lambda: plain(value)


def _check_same(name: str, held: Sequence[tuple[RankFile, Any]]) -> None:
    """Files of different steps do not belong together."""
    if counter(name) is None:
        return
    said = [plain(value) for _, value in held]
    for (file, _), value in zip(held, said, strict=True):
        if value != said[0]:
            raise CheckpointError(
                f"{name[:100]} is {said[0]!r:.50} in {held[0][0].path}, but {value!r:.50} in {file.path}; give the files of one step"
            )
