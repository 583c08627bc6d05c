"""The variance-flatness law along a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from landscape.checkpoints import Run, open_run
from landscape.experiments.checkpoint import MeasureConfig
from landscape.experiments.measure import run_objective
from landscape.tasks import Task
from landscape.theory.flatness import VarianceFlatness, variance_flatness

MIN_STEPS = 20
"""Checkpoints that a stretch needs: fewer give no variance worth the name."""


def run_flatness(
    run: Run | str | Path,
    steps: Sequence[int] | None = None,
    *,
    learner: int | None = None,
    num_directions: int = 20,
    data_root: str | Path | None = None,
    device: str | None = None,
    allow_other_data: bool = False,
    task: Task | None = None,
) -> VarianceFlatness:
    """Variance of the weights over a run's checkpoints against the flatness of the loss, direction by direction (Feng & Tu, PNAS 2021).

    A stretch where the loss is stationary, with checkpoints close together (`landscape replay` from a late one with --checkpoint-every 1
    makes one), is what the law speaks of.

    Args:
        run: a run or its directory.
        steps: checkpoints of the stretch, at least MIN_STEPS with finite weights; all by default.
        learner: whose weights; w_a by default.
        num_directions: principal directions looked along.
        data_root: for tasks that read from disk.
        device: where to compute; the run's own by default.
        allow_other_data: measure on data whose fingerprint is not the run's.
        task: the run's task, where it cannot be found by the name in run.json.

    Where a process group exists all its processes call this alike, and share the passes over the data.
    """
    run = open_run(run) if isinstance(run, str | Path) else run
    objective, _, _ = run_objective(run, task, data_root, device, allow_other_data, MeasureConfig())
    chosen = (run.learners(step) for step in (run.steps if steps is None else steps))
    points = [at.mean if learner is None else at.weights[learner] for at in chosen if at.is_finite]
    if len(points) < MIN_STEPS:
        raise ValueError(
            f"the variance along {run.path} needs at least {MIN_STEPS} checkpoints with finite weights, not {len(points)}; "
            "make them with: landscape replay RUN --step S --checkpoint-every 1 --out DIR"
        )
    trajectory = torch.stack(points).to(objective.device, objective.dtype)
    return variance_flatness(objective, trajectory, num_directions=num_directions)
