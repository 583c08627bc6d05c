"""What one network in a directory of torch.distributed.checkpoint is, as far as who wrote which part of it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from landscape.checkpoints.importers.found import Kind, Stored
from landscape.checkpoints.importers.sharded import Part, parts_of
from landscape.checkpoints.naming import STATISTICS

KEPT = (
    "torch.distributed.checkpoint keeps one process's copy of what several hold: if their weights were the same (data-parallel training, HSDP), this "
    "is their model; if they had come apart, it mixes them and is no process's, nor their average"
)


def kind_of(tensors: Mapping[str, Stored]) -> tuple[Kind, tuple[str, ...]]:
    """What a network is, and why.

    torch's planner gives each tensor, or part of one, that several processes hold to the one of them that has least to write so far. So of W
    processes that wrote, copies were dropped if tensors are whole but from several processes, if a tensor is in fewer parts than W processes
    could have held, or if its parts are not from the processes that the other tensors' are from.
    """
    parts = {name: parts_of(stored) for name, stored in tensors.items()}
    writers = {part.writer for of_tensor in parts.values() for part in of_tensor}
    cut = {name: of_tensor for name, of_tensor in parts.items() if len(of_tensor) > 1}
    whole = {name: of_tensor[0].writer for name, of_tensor in parts.items() if len(of_tensor) == 1}
    if len(writers) <= 1:
        return _by_one(writers, bool(cut))
    if not cut:
        return "possibly mixed", (
            f"every tensor is whole, but they were written by {len(writers)} processes ({named(writers)})",
            KEPT,
            "the other processes' weights are not in the directory; save each under a name of its own to keep them",
        )
    said = f"{len(cut)} of {len(parts)} tensors were put together from parts that {len(writers)} processes wrote ({named(writers)})"
    statistics = {name for name in whole if name.rpartition(".")[2] in STATISTICS}
    others = [name for name in whole if name not in statistics and tensors[name].dtype.is_floating_point]
    copied = _copied(cut, tensors, len(writers))
    if copied is not None:
        return "possibly mixed", (said, copied, KEPT)
    if len({whole[name] for name in others}) > 1:
        several = f"{len(others)} tensors were not cut, such as {others[0][:100]}, and are from several processes ({named({whole[n] for n in others})})"
        return "possibly mixed", (said, several, KEPT)
    reasons = [
        said,
        "the processes' parts are one each of every tensor; had there been replicas of all of them, these would have been dropped",
    ]
    if statistics:
        reasons.append(
            "statistics of BatchNorm, which differ between processes, were not cut: one process's copy of each is there "
            f"({named({whole[name] for name in statistics})})"
        )
    return "shards of one model", tuple(reasons)


def _by_one(writers: set[int | str], cut: bool) -> tuple[Kind, tuple[str, ...]]:
    only = named(writers or {0})
    if cut:
        return "one model", (f"all parts of all tensors were written by {only}",)
    return "one model", (
        f"every tensor is whole and was written by {only}",
        "whether other processes held the same weights is not recorded: had theirs differed under the same names, they would have been dropped",
    )


def _copied(cut: Mapping[str, Sequence[Part]], tensors: Mapping[str, Stored], count: int) -> str | None:
    """A sentence that says why parts must have been there more than once; None where nothing shows it."""
    along_one: dict[str, tuple[int | str, ...]] = {}
    for name, parts in cut.items():
        shape = tensors[name].shape
        axes = [axis for axis in range(len(shape)) if any(part.sizes[axis] != shape[axis] for part in parts)]
        possible = count
        if len(axes) == 1:
            along_one[name] = tuple(part.writer for part in parts)
            length = -(-shape[axes[0]] // count)  # as torch.chunk cuts
            possible = -(-shape[axes[0]] // length)
        found = len({part.writer for part in parts})
        if found < possible:
            return (
                f"{name[:100]} is in parts of {found} processes, though {count} wrote: parts were replicated (HSDP, or tensors that are parallel along "
                "one axis of the processes and replicated along another)"
            )
    longest = max(along_one.values(), key=len, default=())
    for name, by in along_one.items():
        if by != longest[: len(by)]:
            return f"the parts of {name[:100]} were written by other processes than the same parts of other tensors, so they were replicated (HSDP)"
    return None


def named(writers: set[int | str]) -> str:
    """Processes in words.

    >>> named({0, 3}), named({1})
    ('ranks 0, 3', 'rank 1')
    """
    listed = sorted(map(str, writers), key=lambda text: (len(text), text))
    said = ", ".join(text[:40] for text in listed[:8]) + (" ..." if len(listed) > 8 else "")
    word = "rank" if all(isinstance(writer, int) for writer in writers) else "file"
    return f"{word}{'s' if len(writers) > 1 else ''} {said}"
