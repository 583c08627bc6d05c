"""When a run directory may be begun, and when it may be continued."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from landscape.checkpoints import Run, open_run
from landscape.checkpoints.format import CHECKPOINTS, RUN_FILE, TEMPORARY_PREFIX
from landscape.tasks import Task
from landscape.training.config import TrainConfig
from landscape.training.topology import Topology

NOISE_FILE = "noise.safetensors"
"""The profile of SSGD*'s matched noise, in the directory of the run that uses it."""


def claim(out: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether to resume what is in `out`; refuses to touch a run unasked."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, not a directory")
    if not (out / RUN_FILE).exists():
        if out.is_dir() and not _only_begun(out):
            raise ValueError(f"{out} is not empty and holds no run; choose another directory")
        return False
    if overwrite:
        open_run(out)  # only ever delete what is a run
        shutil.rmtree(out)
        return False
    if not resume:
        raise ValueError(f"{out} already holds a run; continue it with --resume, or replace it with --overwrite")
    return True


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
