"""One file a process: names with `rank{r}`, `_r{r}_n{n}`, `worker{i}`, `-{i}-of-{n}` in them, or folders `{rank}/` of one file or checkpoint each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import fsdp, plain, push_sum, series
from landscape.checkpoints.importers.alike import SHOWN, check_alike
from landscape.checkpoints.importers.file_names import Name, folder_rank, parse
from landscape.checkpoints.importers.found import Found

COUNTED_FROM_ONE = ("worker", "learner", "client", "agent", "node", "peer", "replica", "")
"""What may be numbered from 1: ranks are not."""


@dataclass(frozen=True)
class RankFile:
    """A file and the process that it is of.

    Attributes:
        path: the file, or a folder that is a checkpoint.
        rank: the process.
        size: the processes there are, where the name says so.
        name: what else the name tells.
        by_folder: whether the rank is that of the folder.
    """

    path: Path
    rank: int
    size: int | None
    name: Name
    by_folder: bool


def rank_file(path: Path) -> RankFile | None:
    """A file by the rank in its name, or else in its folder's; None where there is none."""
    name = parse(path.name)
    if name.rank is not None:
        return RankFile(path, name.rank, name.size, name, False)
    if path.is_dir() and (rank := folder_rank(path.name)) is not None:
        return RankFile(path, rank, None, name, False)
    rank = folder_rank(path.parent.name)
    return None if rank is None else RankFile(path, rank, None, name, True)


def find(paths: Sequence[Path], find_file: Callable[[Path], Found]) -> Found | None:
    """The learners of which each file holds one; None where fewer than two files are given.

    Args:
        paths: files, or folders of one checkpoint each, of one step and in any order.
        find_file: tells what one of them is.

    Raises:
        CheckpointError: ranks are missing or there twice, or the files differ in step, names, shapes or types; or one of them cannot be read.
    """
    if len(paths) < 2:
        return None
    files = _ordered(paths)
    found = [find_file(file.path) for file in files]
    for file, one in zip(files, found, strict=True):
        whole = file.path.is_dir() or one.kind != "shards of one model"
        if len(one.models) != 1 or one.kind == "possibly mixed" or not whole:
            raise CheckpointError(f"{file.path} holds {_held(one)}, not one learner; give it alone")
    labels = [f"rank {file.rank}" for file in files]
    where = str(files[0].path.parent.parent if files[0].by_folder else files[0].path.parent)
    _check_steps(files, found, where)
    check_alike([one.models[0] for one in found], labels, where)
    facts, notes = _common(found)
    weights = [one.facts.get(push_sum.WEIGHT) for one in found]
    if facts.pop(push_sum.WEIGHT, None) is not None or None not in weights:
        facts[f"{push_sum.WEIGHT}s"] = weights
    told = facts.get("num_learners")
    if told is not None and told != len(files):
        notes.append(f"the files record {told} processes, and there are {len(files)} files")
    return Found(
        path=Path(where),
        format=f"one file a process: {found[0].format}",
        kind="learners",
        models=tuple(one.models[0] for one in found),
        reasons=(
            *_reasons(files),
            *(reason for reason in found[0].reasons if not reason.startswith((plain.BY_NAME, plain.ALONE))),
        ),
        step=found[0].step,
        facts={**facts, "num_learners": len(files)},
        notes=tuple(notes),
    )


def find_in(folder: Path, find_file: Callable[[Path], Found]) -> Found | None:
    """The learners whose files lie in a folder, or the one file that lies there; None where there is neither.

    Raises:
        CheckpointError: it holds several checkpoints, or as `find`.
    """
    entries = series.group(folder)
    if len(entries) > 1:
        listed = ", ".join(str(entry.step) for entry in entries[:8]) + (", ..." if len(entries) > 8 else "")
        raise CheckpointError(f"{folder} holds {len(entries)} checkpoints ({listed}); give one of them")
    paths = entries[0].paths
    if paths == (folder,):
        return None
    return (fsdp.find(paths) or find(paths, find_file)) if len(paths) > 1 else find_file(paths[0])


def _ordered(paths: Sequence[Path]) -> list[RankFile]:
    """By rank, all of them there."""
    files: list[RankFile] = []
    for path in paths:
        file = rank_file(path)
        if file is None:
            raise CheckpointError(
                f"{path} tells no rank by its name, and {len(paths)} files were given as one checkpoint; name them ..._rank0.pt, ..._rank1.pt and so on "
                "(links will do), or give one of them"
            )
        files.append(file)
    files.sort(key=lambda file: file.rank)
    if len({(file.name.stem, file.by_folder) for file in files}) > 1:
        listed = ", ".join(dict.fromkeys(file.path.name for file in files if file.name.stem != files[0].name.stem))
        raise CheckpointError(
            f"{files[0].path.name} and {listed[:300]} are not files of one kind; give those of one kind, such as by a pattern"
        )
    ranks = [file.rank for file in files]
    sizes = {file.size for file in files if file.size is not None}
    from_one = ranks[0] == 1 and files[0].name.rank_word in COUNTED_FROM_ONE and not files[0].by_folder
    first, last = (1, max(sizes, default=ranks[-1])) if from_one else (0, max(sizes, default=ranks[-1] + 1) - 1)
    expected = range(first, last + 1)
    if len(sizes) > 1 or ranks != list(expected):
        raise CheckpointError(_table(files, expected, sizes))
    return files


def _table(files: Sequence[RankFile], expected: range, sizes: set[int]) -> str:
    """One row a rank: its files, or that there is none."""
    by_rank: dict[int, list[str]] = {}
    for file in files:
        by_rank.setdefault(file.rank, []).append(
            str(Path(file.path.parent.name) / file.path.name) if file.by_folder else file.path.name
        )
    rows = [f"the files in {files[0].path.parent} are not one a rank:"]
    if len(sizes) > 1:
        rows[0] = f"the files in {files[0].path.parent} are of runs of {', '.join(map(str, sorted(sizes)))} processes:"
    wrong = [rank for rank in expected[: 10 * SHOWN] if len(by_rank.get(rank, ())) != 1] + [
        rank for rank in by_rank if rank not in expected
    ]
    missing = sum(rank not in by_rank for rank in expected[:1_000_000])
    for rank in list(by_rank)[:SHOWN] if len(sizes) > 1 else wrong[:SHOWN]:
        rows.append(f"  rank {rank}  {', '.join(by_rank.get(rank, ['missing']))[:200]}")
    if len(wrong) > SHOWN:
        rows.append("  ... and more")
    if missing:
        rows.append(
            f"  {missing} of {len(expected)} ranks are missing; a single learner is read by giving its file alone"
        )
    return "\n".join(rows)


def _held(found: Found) -> str:
    return f"{len(found.models)} learners" if len(found.models) > 1 else found.kind


def _check_steps(files: Sequence[RankFile], found: Sequence[Found], where: str) -> None:
    """Refuse learners of different steps or epochs, with a table of one row a learner."""
    said = [(one.step, one.facts.get("epoch")) for one in found]
    if len(set(said)) > 1:
        rows = [
            f"  rank {file.rank}  step {'unknown' if step is None else step}, epoch {'unknown' if epoch is None else epoch}"
            for file, (step, epoch) in zip(files, said, strict=True)
        ]
        more = [f"  ... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        hint = (
            [
                "  if the folders are those of steps, not of processes, call them step_0, step_1 and so on (links will do)"
            ]
            if _are_bare_numbers(files)
            else []
        )
        raise CheckpointError(
            "\n".join([f"{where}: the learners are of different steps:", *rows[:SHOWN], *more, *hint])
        )


def _common(found: Sequence[Found]) -> tuple[dict[str, Any], list[str]]:
    """What all files tell alike, and the notes of any."""
    facts = {k: v for k, v in found[0].facts.items() if all(one.facts.get(k) == v for one in found)}
    return facts, list(dict.fromkeys(note for one in found for note in one.notes))[:SHOWN]


def _reasons(files: Sequence[RankFile]) -> tuple[str, ...]:
    first, last = files[0], files[-1]
    what = "folder" if first.by_folder or first.path.is_dir() else "name"
    ambiguous = (
        "the numbers that its folders are called by are taken for those of processes; if they are those of steps or epochs, call them step_0, step_1 and so "
        "on (links will do)"
    )
    told = (
        f", and there are {first.size} by their names"
        if first.size
        else "; whether there were more processes is not recorded"
    )
    return (
        f"{len(files)} {'folders' if first.path.is_dir() else 'files'}, one a process by its {what}, ranks {first.rank} to {last.rank}{told}; each holds one network with tensors of the same names, "
        "shapes and types",
        "whether they differ is only known once they are read: processes of plain DDP would all save the same weights",
        *([ambiguous] if _are_bare_numbers(files) else []),
    )


def _are_bare_numbers(files: Sequence[RankFile]) -> bool:
    """Whether the ranks are told by nothing but the numbers that folders are called by."""
    return any((file.path.parent if file.by_folder else file.path).name.isdigit() for file in files)
