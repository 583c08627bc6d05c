"""How processes that share no more than a folder let a checkpoint appear once all of them have written their part.

    checkpoints/.writing-step-00000010-of-00004/
        rank-00001-WORD/            what rank 1 wrote; WORD is of one process alone
        mark-00001-WORD.json        its mark, written last: sizes and checksums of its files, names and shapes, who it is

Nobody waits. Each process puts its files, syncs them, lets its mark appear by a rename, and looks whose marks are there. The last one to do so
sees them all; of several that do, the one that makes the folder `whole-...` moves the files there, adds state.json, and renames it to
step-00000010. So a checkpoint is visible whole or not at all, whichever process dies and when; if one dies before that, it never appears.

Which marks belong together. A job that is killed while it saves leaves marks, and the job that follows may save the same step. A mark counts
for a process only if both hold:

- it is not known to be of another job: processes with a process group put one word into its store, and another word is another job;
- it is younger than the process. All processes of a job have begun before the first of them saves (they have met to train together), and
  those of the job before had ended when they began. Both times are by the clock that dates files in that folder, and a local disk or an NFS
  server has one clock for all. Where every machine dates its own files, and there is no process group either, the machines' clocks must agree
  better than the time from the end of one job to the start of the next, and everywhere better than that from a job's start to its first save.

No two processes give a file the same name, so one that was thought dead, or an earlier job's, is never written into. What was left in a step's
folder goes when the step appears, and the folders of earlier steps go then too: every process has passed them, so they stay incomplete for ever.

A step that an earlier job completed is replaced by what this job saves there, unless it is the same to the bit: a restarted run goes on from
the weights that it saves, so these belong to the checkpoints that follow. The old one is moved aside for the instant of the rename.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from landscape.checkpoints.format import (
    ASIDE_PREFIX,
    STATE_FILE,
    STEP_PATTERN,
    TEMPORARY_PREFIX,
    CheckpointError,
    seal,
    step_name,
    sync_folder,
    unseal,
    write_atomically,
)
from landscape.checkpoints.process import Process, beginning, warn_once
from landscape.checkpoints.writer import LearnerTensors, publish, write_learner

PENDING_PATTERN = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}step-(\d{{8,}})-of-(\d{{5,}})")
MARK_PATTERN = re.compile(r"mark-\d{5,}-[0-9a-f]{32}\.json")
WHOLE_PREFIX = "whole-"
ALIKE = ("parameters", "types", "buffers", "momentum", "moments", "frozen")
"""What the learners of a checkpoint have in common."""
NOT_KEPT = ("types", "num_learners")
"""What a mark's record holds for comparison only."""


def pending_folder(checkpoints: Path, step: int, count: int) -> Path:
    """Where a step is written until it is whole."""
    return checkpoints / f"{TEMPORARY_PREFIX}{step_name(step)}-of-{count:05d}"


def deliver(
    checkpoints: Path, me: Process, tensors: LearnerTensors, record: Mapping[str, Any], tried: Iterable[int]
) -> dict[str, dict[str, Any]]:
    """Write this process's learner and mark it; complete the checkpoint if all others have.

    Args:
        checkpoints: the folder of all checkpoints.
        me: the process.
        tensors: its learner.
        record: for state.json: step, names and shapes, facts.
        tried: the steps that the process has saved before, or tried to.

    Returns:
        sizes and checksums of the files written.

    Raises:
        ValueError: the learners are not alike or were not saved at the same steps, or another process of the job is this rank too.
        OSError: something could not be written; of this process nothing is left, or if it was the last one, nothing of the step.
    """
    step = record["step"]
    pending, final = pending_folder(checkpoints, step, me.count), checkpoints / step_name(step)
    folder, mark = pending / me.named("rank"), pending / f"{me.named('mark')}.json"
    begun = _enter(mark, folder)
    try:
        _refuse_namesake(final, me, begun)
        files = write_learner(folder, me.rank, me.count, tensors)
        sync_folder(folder)
        said = {"rank": me.rank, "word": me.word, "job": me.job, "host": socket.gethostname(), "process": os.getpid()}
        write_atomically(mark, seal({**said, "record": dict(record), "files": files}))
        passed = _passed(checkpoints, me, step, begun, tried)
        _complete(pending, final, me, begun)
        if not mark.exists():
            _refuse_namesake(final, me, begun)
        if passed is not None:
            raise passed
    except BaseException as error:
        if isinstance(error, OSError) or not mark.exists():  # else it lets the others see who is not alike
            _withdraw(mark, folder)
        if isinstance(error, OSError):  # because a namesake has just completed the step, and cleared up
            _refuse_namesake(final, me, begun)
        raise
    return files


def is_there(checkpoints: Path, me: Process, step: int) -> bool:
    """Whether a step, or this process's part of it, is there."""
    mark = pending_folder(checkpoints, step, me.count) / f"{me.named('mark')}.json"
    return mark.exists() or (checkpoints / step_name(step) / STATE_FILE).exists()


def would_write(checkpoints: Path, me: Process, tensors: LearnerTensors, step: int) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of the files that `deliver` would write, which are written aside and removed."""
    folder = pending_folder(checkpoints, step, me.count) / me.named("again")
    try:
        folder.mkdir(parents=True)
        return write_learner(folder, me.rank, me.count, tensors)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


def restore_replaced(checkpoints: Path) -> None:
    """Put back checkpoints that were moved aside for others which did not take their place, as the job was killed in between."""
    for aside in checkpoints.glob(f"{ASIDE_PREFIX}*"):
        final = checkpoints / aside.name.removeprefix(ASIDE_PREFIX)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif STEP_PATTERN.fullmatch(final.name):
            os.rename(aside, final)


def _enter(mark: Path, folder: Path) -> float:
    """Make this process's folder, and tell when it began, see `beginning`."""
    for _ in range(3):
        with suppress(FileNotFoundError):  # a namesake has just completed the step, and cleared up
            folder.parent.mkdir(parents=True, exist_ok=True)
            _withdraw(mark, folder)  # of a try that failed
            return beginning(folder)
    raise FileNotFoundError(errno.ENOENT, "its folder is taken away again and again", str(folder))


def _withdraw(mark: Path, folder: Path) -> None:
    """Take back what this process has written of a step."""
    with suppress(OSError):
        mark.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _complete(pending: Path, final: Path, me: Process, begun: float) -> None:
    """Let the checkpoint appear if all marks are there; of several processes that see them all, one does."""
    found = _marks(pending, me, begun)
    _check_alike(found)
    if len(found) < me.count:
        return
    words = "".join(found[rank]["word"] for rank in range(me.count))
    whole = pending / f"{WHOLE_PREFIX}{hashlib.sha256(words.encode()).hexdigest()[:16]}"
    try:
        whole.mkdir()
    except (FileExistsError, FileNotFoundError):  # another process does it, or has done it
        return
    if len(_marks(pending, me, begun)) < me.count:  # has just done it: the marks go before the folder gets its name
        for empty in (whole, pending):
            with suppress(OSError):
                empty.rmdir()
        return
    try:
        _refuse_namesake(final, me, begun)
        replaced = _let_appear(pending, whole, final, [found[rank] for rank in range(me.count)], me.job)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    left = [pair for pair in _pending(final.parent) if pair[0] < found[0]["record"]["step"]]
    for earlier, folder in left:
        have = _marks(folder, me, begun)
        shutil.rmtree(folder, ignore_errors=True)
        if me.rank in have:
            lacking = _some(sorted(set(range(me.count)) - set(have)))
            warn_once(f"no checkpoint of step {earlier} appears in {final.parent}: rank {lacking} of {me.count} did not save it", stacklevel=4)  # fmt: skip
    if replaced:
        warn_once(f"{final.parent} holds steps of an earlier job, which are replaced where this one saves other weights", stacklevel=4)  # fmt: skip


def _let_appear(pending: Path, whole: Path, final: Path, marks: Sequence[dict[str, Any]], job: str | None) -> bool:
    """Gather the files and give the checkpoint its name, unless the same is there.

    Returns:
        whether one of an earlier job was there, and another.
    """
    files = {name: entry for mark in marks for name, entry in mark["files"].items()}
    there = _state(final)
    if there is not None and there["files"] == files:
        return False
    for mark in marks:
        for name in mark["files"]:
            os.rename(pending / f"rank-{mark['rank']:05d}-{mark['word']}" / name, whole / name)
    for mark in marks:
        (pending / f"mark-{mark['rank']:05d}-{mark['word']}.json").unlink()
    who = [{k: mark[k] for k in ("word", "host", "process")} for mark in marks]
    record = {k: v for k, v in marks[0]["record"].items() if k not in NOT_KEPT}
    publish(
        whole,
        final,
        {
            **record,
            "num_learners": len(marks),
            **_different(marks),
            "recorded_at": {"time": time.time(), "job": job, "processes": who},
            "files": files,
        },
    )
    return there is not None


def _different(marks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts in which the learners differ, {"each_learner": {name: [value of each]}}; the others are the first learner's."""
    names = dict.fromkeys(name for mark in marks for name in mark["record"])
    each = {name: [mark["record"].get(name) for mark in marks] for name in names}
    different = {name: values for name, values in each.items() if any(v != values[0] for v in values)}
    return {"each_learner": different} if different else {}


def _marks(pending: Path, me: Process, begun: float) -> dict[int, dict[str, Any]]:
    """The marks that count, by rank."""
    found: dict[int, dict[str, Any]] = {}
    try:
        names = sorted(os.listdir(pending))
    except FileNotFoundError:  # the step has been completed
        return {}
    for path in (pending / name for name in names if MARK_PATTERN.fullmatch(name)):
        try:
            young, mark = path.stat().st_mtime >= begun, unseal(path)
        except (FileNotFoundError, CheckpointError):  # it is just being completed
            continue
        if not young or _are_different(mark["job"], me.job):
            continue
        if mark["rank"] in found:
            raise _namesakes(mark["rank"], me.count, mark["record"]["step"], [found[mark["rank"]], mark])
        found[mark["rank"]] = mark
    return found


def _are_different(job: str | None, other: str | None) -> bool:
    return job is not None and other is not None and job != other


def _state(final: Path) -> dict[str, Any] | None:
    try:
        return unseal(final / STATE_FILE)
    except (CheckpointError, OSError):
        return None


def _refuse_namesake(final: Path, me: Process, begun: float) -> None:
    """Refuse to replace what another process of the job has completed as the same rank: processes without ranks, who are all rank 0 of 1."""
    state = _state(final)
    who = {} if state is None else state.get("recorded_at", {})
    if not who or (final / STATE_FILE).stat().st_mtime < begun or _are_different(who["job"], me.job):
        return
    if who["processes"][me.rank]["word"] != me.word:
        other = {"host": socket.gethostname(), "process": os.getpid()}
        raise _namesakes(me.rank, me.count, int(final.name.rpartition("-")[2]), [who["processes"][me.rank], other])


def _namesakes(rank: int, count: int, step: int, two: Sequence[Mapping[str, Any]]) -> ValueError:
    places = " and ".join(f"process {each['process']} on {each['host']}" for each in two)
    return ValueError(
        f"{places} both saved step {step} as rank {rank} of {count}: start them with torchrun, set up their process group first, or tell each "
        "its rank= and world_size="
    )


def _check_alike(found: Mapping[int, dict[str, Any]]) -> None:
    """Refuse learners of different networks, naming who differs from whom in what."""
    if not found:
        return
    first = min(found)
    for what in ALIKE:
        mine = found[first]["record"].get(what, [])
        others = {rank: theirs for rank, mark in found.items() if (theirs := mark["record"].get(what, [])) != mine}
        if others:
            theirs = next(iter(others.values()))
            if isinstance(mine, list):
                unlike = [pair for pair in (*mine, *theirs) if pair not in mine or pair not in theirs] or mine
                mine, theirs = ([entry for entry in some if entry in unlike][:3] for some in (mine, theirs))
            raise ValueError(
                f"rank {_some(others)} has other {what} than rank {first} at step {found[first]['record']['step']}: {theirs}, not {mine}; the "
                "learners of a run have the same network and optimizer (parts of one network are saved by torch.distributed.checkpoint)"
            )


def _passed(checkpoints: Path, me: Process, step: int, begun: float, tried: Iterable[int]) -> ValueError | None:
    """What to say if others saved a step that this process went past; warn if some do not save at all."""
    tried, lacking = set(tried), []
    for earlier, folder in _pending(checkpoints):
        if earlier >= step or folder != pending_folder(checkpoints, earlier, me.count):
            continue
        found = {} if any(folder.glob(f"{WHOLE_PREFIX}*")) else _marks(folder, me, begun)
        if found and earlier not in tried:
            return ValueError(
                f"rank {_some(found)} saved step {earlier}, and rank {me.rank}, which is at step {step}, did not; a checkpoint appears only "
                "when all processes have saved it"
            )
        if me.rank in found:
            lacking.append(set(range(me.count)) - set(found))
    never = set.intersection(*lacking) if len(lacking) > 1 else set()
    if never:
        warn_once(
            f"no checkpoint appears in {checkpoints}, as rank {_some(sorted(never))} of {me.count} does not save; where one process alone is "
            "to save, tell it rank=0, world_size=1",
            stacklevel=4,
        )
    return None


def _pending(checkpoints: Path) -> list[tuple[int, Path]]:
    """Steps that are being written or were left unfinished, and their folders."""
    found = [(PENDING_PATTERN.fullmatch(path.name), path) for path in checkpoints.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def _some(ranks: Iterable[int]) -> str:
    listed = list(ranks)
    return ", ".join(map(str, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
