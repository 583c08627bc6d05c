"""Checkpoints of several steps: a folder or a pattern with steps in the names, taken apart into one entry a step."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.file_names import Counts, folder_rank, parse

MOST = 1_000_000
"""Files looked at."""

SHOWN = 20
"""Rows of a table in a message."""

WHOLE = re.compile(
    r"\.metadata|latest|run\.json|state\.json|pytorch_model_fsdp_\d+|random_states_\d+\.pkl|__\d+_\d+\.distcp|__\d+\.metadata|"
    r"learner-\d+-of-\d+\.safetensors|shard-\d+-model-\d+-of-\d+\.safetensors|(?:\w+_)?mp_rank_\d+_\w+_states\.pt"
)
"""What is in a folder that is itself one checkpoint: of torch.distributed.checkpoint, DeepSpeed, Accelerate, or landscape."""

WEIGHTS_FOLDER = re.compile(
    r".*\.safetensors\.index\.json|.*\.bin\.index\.json|model\.safetensors|adapter_model\.safetensors|pytorch_model\.bin"
)
"""What is in a Hugging Face folder, beside which there may be folders of earlier steps."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint.

    Attributes:
        step: the number in its name; None where there is none.
        paths: a file, a folder, or the files or folders of several ranks.
        counts: what that number counts: steps, epochs, or something else.
        notes: what was passed over; the same for all entries of one folder.
    """

    step: int | None
    paths: tuple[Path, ...]
    counts: Counts = "step"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Item:
    """A file or folder that may be a checkpoint, or a rank's part of one.

    Attributes:
        path: where it is.
        stem: its name without rank and number.
        rank: the process that it is of.
        size: the processes that there are.
        number: the step or the like.
        counts: what that counts.
        is_folder: whether it is a folder.
        is_special: whether it is called the best, the last or the like.
        is_weights: whether its name is that of a checkpoint, not of an optimizer or a text.
        is_part: whether it is a folder that holds all that one rank saved.
    """

    path: Path
    stem: str
    rank: int | None
    size: int | None
    number: int | None
    counts: Counts | None
    is_folder: bool
    is_special: bool
    is_weights: bool
    is_part: bool = False


def group(path: str | Path) -> list[Entry]:
    """The checkpoints at a path, one a step, in the order of the steps.

    Args:
        path: a file, a folder, or a pattern such as 'runs/ckpt_*'. Of a folder its entries are looked at, and those of folders in it that are
            named by a rank or a step; no file is opened.

    Returns:
        one entry at least; the folder itself where it is one checkpoint, or nothing in it is known to be any.

    Raises:
        CheckpointError: nothing is there, or there are several checkpoints that the names do not tell apart.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _folder(path)
        if os.path.lexists(path):
            return [_alone(path, (path,))]
        if not glob.has_magic(str(path)):
            raise CheckpointError(f"there is nothing at {path}")
        if "**" in path.parts:
            raise CheckpointError(f"{path}: ** goes through any number of folders; give a pattern without it")
        matched = [Path(name) for name in sorted(glob.glob(str(path)))]
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{str(path)[:300]!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not matched:
        raise CheckpointError(f"nothing fits {path}")
    if len(matched) == 1:
        return group(matched[0])
    return _matched(matched, path)


def group_listed(paths: Sequence[Path]) -> list[Entry]:
    """The checkpoints among several files, or folders of ranks, as if a pattern had fitted them all: a shell puts them in a pattern's place.

    Raises:
        CheckpointError: as `group`.
    """
    return _matched(paths, Path(f"{paths[0]} and {len(paths) - 1} more"))


def are_ranks(paths: Sequence[Path]) -> bool:
    """Whether paths are the folders of several ranks."""
    return all(path.is_dir() for path in paths) and bool(_in_rank_folders([_item(path, True) for path in paths]))


def _matched(paths: Sequence[Path], given: Path) -> list[Entry]:
    """The checkpoints among what fits a pattern."""
    items = [_item(path, path.is_dir()) for path in paths]
    entries = _grouped([*_by_their_folders(items), *_in_rank_folders(items)], given)
    if entries[0].paths == (given,):
        raise CheckpointError(
            f"{given} fits no file or folder that is known by its name to be a checkpoint: {_some(items)}; give one of them"
        )
    return entries


def _alone(named: Path, paths: tuple[Path, ...]) -> Entry:
    """The one checkpoint at a path, with the step in its name."""
    name = parse(named.name)
    return Entry(None, paths) if name.sure_number is None else Entry(name.sure_number, paths, name.counts or "step")


def _folder(folder: Path) -> list[Entry]:
    items = _listed(folder)
    whole = _whole(items)
    earlier = [item for item in items if item.is_folder and item.counts is not None]
    if whole and WEIGHTS_FOLDER.fullmatch(whole) and earlier:
        entries = _grouped(earlier, folder)
        note = f"{folder / whole}, whose name tells no step, was passed over; give the file itself to read it"
        return [replace(entry, notes=(*entry.notes, note)) for entry in entries]
    if whole:
        return [_alone(folder, (folder,))]
    return _grouped([*items, *_in_rank_folders(items)], folder)


def _whole(items: Sequence[_Item]) -> str:
    """The name of a file or folder that makes the folder it is in one checkpoint; "" where there is none."""
    names = [item.path.name for item in items if item.path.name != "latest" or _is_pointer(item.path)]
    return next((n for n in names if WHOLE.fullmatch(n)), "") or next(
        (n for n in names if WEIGHTS_FOLDER.fullmatch(n)), ""
    )


def _is_pointer(path: Path) -> bool:
    """Whether a file called latest is DeepSpeed's, which names a folder, and not a link to the latest checkpoint."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= 4096


def _listed(folder: Path) -> list[_Item]:
    items: list[_Item] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") or entry.name == ".metadata":
                    items.append(_item(Path(entry.path), _is_folder(entry)))
                if len(items) > MOST:
                    raise CheckpointError(f"{folder} holds more than {MOST} files; give a pattern that fits fewer")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from None
    return sorted(items, key=lambda item: item.path.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _item(path: Path, is_folder: bool) -> _Item:
    name = parse(path.name)
    weights = name.has_suffix and not name.is_companion
    return _Item(path, name.stem, name.rank, name.size, name.number, name.counts, is_folder, name.is_special, weights)


def _in_rank_folders(items: Sequence[_Item]) -> list[_Item]:
    """What lies in folders that are called by ranks, by a word and a number or by the numbers from 0 alone: files, folders of steps, or all of it."""
    folders = [(rank, item) for item in items if item.is_folder and (rank := folder_rank(item.path.name)) is not None]
    plain = sorted(rank for rank, item in folders if item.path.name.isdigit())
    if len(folders) < 2 or (plain and plain != list(range(len(folders)))):
        return []
    found: list[_Item] = []
    for rank, folder in folders:
        inner = _listed(folder.path)
        if _whole(inner):
            found.append(replace(folder, rank=rank, number=None, counts=None, is_part=True))
            continue
        files = [item for item in inner if not item.is_folder and item.is_weights]
        steps = [item for item in inner if item.is_folder and item.counts is not None and item.is_weights]
        found += [replace(item, rank=rank) for item in files if item.rank is None]
        found += [] if files else [replace(item, rank=rank, is_part=True) for item in steps]
    return found


def _by_their_folders(items: Sequence[_Item]) -> list[_Item]:
    """What lies in several folders, by the names of these where those of the files tell no rank or no step."""
    folders = {item.path.parent: _item(item.path.parent, True) for item in items}
    ranks = {folder: folder_rank(folder.name) for folder in folders}
    if len(folders) < 2:
        return list(items)
    from_0 = sorted(-1 if rank is None else rank for rank in ranks.values()) == list(range(len(folders)))
    worded = None not in ranks.values() and not any(folder.name.isdigit() for folder in folders)
    if (from_0 or worded) and all(item.rank is None for item in items):
        return [replace(item, rank=ranks[item.path.parent]) for item in items]
    if all(item.counts is None for item in items):
        named = [folders[item.path.parent] for item in items]
        return [replace(item, number=f.number, counts=f.counts) for item, f in zip(items, named, strict=True)]
    return list(items)


def _grouped(items: Sequence[_Item], given: Path) -> list[Entry]:
    """Entries of what lies in one folder, or fits one pattern."""
    in_ranks = any(
        item.is_part or (not item.is_folder and item.path.parent != given and item.rank is not None) for item in items
    )
    weights = [
        item
        for item in items
        if item.is_weights and (_is_file_or_part(item) or (item.counts is not None and not in_ranks))
    ]
    counted = [item for item in weights if item.counts is not None and not item.is_special]
    counts: Counts = next(
        (kind for kind in ("step", "epoch", "number") if any(item.counts == kind for item in counted)), "number"
    )
    chosen = [item for item in counted if item.counts == counts]
    taken = set(chosen)
    others = [item for item in weights if item not in taken]
    guessed = (
        counts == "number"
        and len({item.number for item in chosen}) == 1
        and any(not item.is_special for item in others)
    )
    if not chosen or guessed:
        return [_single(weights, given)]
    notes = _passed_over(
        others, [item for item in items if not item.is_weights and not item.is_folder and item.counts is not None]
    )
    by_number: dict[int, list[_Item]] = {}
    for item in chosen:
        assert item.number is not None
        by_number.setdefault(item.number, []).append(item)
    _check_unique(by_number, given, counts)
    return [Entry(number, _paths(by_number[number]), counts, notes) for number in sorted(by_number)]


def _is_file_or_part(item: _Item) -> bool:
    return item.is_part or not item.is_folder


def _paths(items: Sequence[_Item]) -> tuple[Path, ...]:
    """The files of one checkpoint, by rank; those in a folder where it holds files of several ranks, or one file."""
    if len(items) > 1 or not items[0].is_folder:
        return tuple(item.path for item in sorted(items, key=lambda item: item.rank or 0))
    folder = items[0].path
    inner = _listed(folder)
    if _whole(inner):
        return (folder,)
    held = _one_of([item for item in (*inner, *_in_rank_folders(inner)) if item.is_weights and _is_file_or_part(item)])
    return tuple(item.path for item in held) or (folder,)


def _one_of(items: Sequence[_Item]) -> list[_Item]:
    """The files of the one checkpoint among some without numbers; none where there is not exactly one."""
    for special in (False, True):
        of_ranks = [item for item in items if item.rank is not None and item.is_special == special]
        alone = [item for item in items if item.rank is None and item.is_special == special]
        if of_ranks and len({item.stem for item in of_ranks}) == 1:
            return sorted(of_ranks, key=lambda item: item.rank or 0)
        if of_ranks or alone:
            return alone if len(alone) == 1 and not of_ranks else []
    return []


def _single(items: Sequence[_Item], given: Path) -> Entry:
    """The one checkpoint among files whose names tell no step."""
    held = _one_of([item for item in items if _is_file_or_part(item)])
    if len(held) == 1 and (held[0].size or 0) > 1:
        raise CheckpointError(
            f"of {held[0].size} processes' files only {held[0].path.name} is in {given}: the others are missing; give the file itself to read that learner"
        )
    if held:
        others = [item for item in items if item not in held]
        named = given if given.is_dir() else Path()
        return replace(_alone(named, tuple(item.path for item in held)), notes=_passed_over(others, []))
    if len(items) > 1:
        stems = list(dict.fromkeys(item.stem for item in items if item.rank is not None))
        told = (
            f"files of ranks of {len(stems)} kinds"
            if len(stems) > 1
            else f"{len(items)} checkpoints whose names tell no step"
        )
        raise CheckpointError(
            f"{given} holds {told}: {_some(items)}; give one, or those of one kind by a pattern such as 'folder/model_*.pt'"
        )
    return _alone(given, (given,))


def _check_unique(by_number: dict[int, list[_Item]], given: Path, counts: Counts) -> None:
    """Refuse two checkpoints of one step, and steps of different ranks, each with a table."""
    twice = {
        number: items
        for number, items in by_number.items()
        if len({item.stem for item in items}) > 1
        or len({item.rank for item in items}) < len(items)
        or (len(items) > 1 and any(item.rank is None for item in items))
    }
    if twice:
        rows = [f"  {counts} {number}  {_some(items)}" for number, items in sorted(twice.items())]
        raise CheckpointError(
            "\n".join([f"{given} holds several checkpoints of one {counts}:", *_shown(rows)])
            + "\n  give those of one kind by a pattern, such as 'folder/model_*.pt'"
        )
    ranks = {number: {item.rank for item in items if item.rank is not None} for number, items in by_number.items()}
    every = set().union(*ranks.values())
    lacking = {number: sorted(every - there) for number, there in ranks.items() if there != every}
    if lacking:
        rows = [
            f"  {counts} {number}  lacks rank {', '.join(map(str, missing[:SHOWN]))}"
            for number, missing in sorted(lacking.items())
        ]
        raise CheckpointError(
            "\n".join([f"{given}: not every {counts} has the files of all {len(every)} ranks:", *_shown(rows)])
            + "\n  give those that are whole by a pattern"
        )


def _passed_over(others: Sequence[_Item], companions: Sequence[_Item]) -> tuple[str, ...]:
    notes = []
    if others:
        notes.append(f"passed over, as their names do not fit the others': {_some(others)}")
    if companions:
        notes.append(f"passed over, as by their names they are not weights: {_some(companions)}")
    return tuple(notes)


def _some(items: Iterable[_Item]) -> str:
    """Names of some items, with their folders where names are the same."""
    paths = [item.path for item in items]
    several = len({path.name for path in paths}) < len(paths)
    names = [f"{path.parent.name[:100]}/{path.name[:100]}" if several else path.name[:100] for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _shown(rows: Sequence[str]) -> list[str]:
    return [*rows[:SHOWN], *([f"  ... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else [])]
