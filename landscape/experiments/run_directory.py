"""When a run directory may be begun, and when it may be continued."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from landscape.checkpoints import Run, open_run
from landscape.checkpoints.format import ASIDE_PREFIX, CHECKPOINTS, RUN_FILE, TEMPORARY_PREFIX, digest
from landscape.ranks import AgreedError, Ranks, launch
from landscape.tasks import Task
from landscape.training.config import TrainConfig
from landscape.training.topology import Topology

NOISE_FILE = "noise.safetensors"
"""The profile of SSGD*'s matched noise, in the directory of the run that uses it."""

FOREIGN = ("importing", "imported", "recorded")
"""What run.json's status says of checkpoints that other programs trained."""

LAUNCH = "launch"
"""Entry of run.json: by which torchrun the run was begun or resumed last."""

VISIBLE_WITHIN = 30.0
"""Seconds in which a network file system shows to all machines what one has written."""


def claim(out: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether to resume what is in `out`; refuses to touch a run unasked."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if not holds_run(out):
        return False
    if not overwrite and resume and open_run(out).status in FOREIGN:
        raise ValueError(
            f"{out} was not trained by landscape, so it cannot be resumed; landscape replay goes on from one of its checkpoints"
        )
    if overwrite:
        open_run(out)  # only ever delete what is a run
        shutil.rmtree(out)
        return False
    if not resume:
        raise ValueError(f"{out} already holds a run; continue it with --resume, or replace it with --overwrite")
    return True


def holds_run(out: Path) -> bool:
    """Whether there is a run in `out`; refuses what is no directory for a run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a directory")
    if (out / RUN_FILE).exists():
        return True
    if out.is_dir() and not _only_begun(out):
        raise ValueError(f"{out} is not empty and holds no run; choose another directory")
    return False


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder beside the run in `out` that takes its place when the block ends; if it fails, the run is as it was."""
    open_run(out)  # only ever delete what is a run
    home = out.resolve()
    beside, aside = (home.with_name(f"{prefix}{home.name}") for prefix in (TEMPORARY_PREFIX, ASIDE_PREFIX))
    for left in (beside, aside):  # of a program that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield beside
        os.rename(home, aside)
        try:
            os.rename(beside, home)
        except BaseException:
            os.rename(aside, home)
            raise
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _only_begun(out: Path) -> bool:
    """Whether a folder holds nothing, or nothing but what a run killed before its first record leaves."""
    begun = {CHECKPOINTS, NOISE_FILE, f"{TEMPORARY_PREFIX}{RUN_FILE}", f"{TEMPORARY_PREFIX}{NOISE_FILE}"}
    return all(p.name in begun for p in out.iterdir()) and not any((out / CHECKPOINTS).glob("*"))


def check_same(run: Run, task: Task, config: TrainConfig, graph: Topology, fingerprint: dict[str, str]) -> None:
    """Refuse to continue a run with another configuration, topology or data, naming what differs."""
    changed = [f"{k}: {old!r} in the run, {new!r} now" for k, (old, new) in run.config.changes(config).items()]
    if run.task != task.name:
        changed.append(f"task: {run.task!r} in the run, {task.name!r} now")
    if not changed and not np.array_equal(np.asarray(run.record["topology"]["matrices"]), graph.matrices):
        changed.append("topology: its mixing matrix is not the run's")
    if run.record["data"]["fingerprint"] != fingerprint:
        changed.append("data: not the examples that the run was trained on (fingerprints differ)")
    if changed:
        raise ValueError(f"{run.path} cannot be resumed with another configuration ({'; '.join(changed)})")


def launch_record(ranks: Ranks) -> dict[str, Any] | None:
    """The torchruns of all machines, and the first process; None without torchrun. Every process must ask."""
    told = ranks.collect((launch(), os.getpid()))
    names = sorted({name for name, _ in told if name is not None})
    return {"torchruns": names, "process": told[0][1]} if names else None


def is_restarted(out: Path, launched: dict[str, Any] | None) -> bool:
    """Whether the run in `out` was begun by the processes that torchrun has started anew, and so is theirs without being asked."""
    if launched is None or not (out / RUN_FILE).exists():
        return False
    before = open_run(out).record.get(LAUNCH) or {"torchruns": (), "process": None}
    return bool(set(before["torchruns"]) & set(launched["torchruns"])) and before["process"] != launched["process"]


def check_alike(ranks: Ranks, **what: Any) -> None:
    """Refuse processes that differ in something: they would wait for each other in vain, or train something else together."""
    every = ranks.collect(what)
    for name in what:
        others = [rank for rank, each in enumerate(every) if each[name] != every[0][name]]
        if others:
            raise AgreedError(
                f"rank {', '.join(map(str, others))} of {ranks.size} has another {name.replace('_', ' ')} than rank 0; "
                "start all processes with the same flags, data and versions"
            )


def check_shared(out: Path, ranks: Ranks) -> None:
    """Refuse a run directory that is not the same folder for all processes, after its record was written."""
    wanted = ranks.collect(digest((out / RUN_FILE).read_bytes()) if ranks.leads else "")[0]
    with ranks.agree():
        end = time.monotonic() + VISIBLE_WITHIN
        while not ((out / RUN_FILE).is_file() and digest((out / RUN_FILE).read_bytes()) == wanted):
            if time.monotonic() > end:
                raise ValueError(f"{out} is not the folder of that name that rank 0 writes to; put the run on a file system that all machines share")  # fmt: skip
            time.sleep(0.1)
