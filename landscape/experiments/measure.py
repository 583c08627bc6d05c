"""Measure a run: every measure at every checkpoint asked for, into RUN/measurements.nc."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from tqdm import tqdm

from landscape.checkpoints import Run, open_run
from landscape.checkpoints.format import MEASUREMENTS_FILE
from landscape.data.selection import choose
from landscape.experiments.checkpoint import Checkpoint, MeasureConfig
from landscape.experiments.interrupt import Interruptible
from landscape.experiments.measures import DEFAULT_MEASURES, MEASURES
from landscape.objective import Objective
from landscape.ranks import DEFAULT_TIMEOUT, AgreedError, Ranks, current, local_device, started
from landscape.results import load_groups, save_groups, stamp
from landscape.tasks import Task, get_task


def measure(
    run: Run | str | Path,
    measures: Sequence[str] = DEFAULT_MEASURES,
    steps: Sequence[int] | None = None,
    *,
    settings: MeasureConfig | None = None,
    data_root: str | Path | None = None,
    device: str | None = None,
    allow_other_data: bool = False,
    task: Task | None = None,
    quiet: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> dict[str, xr.Dataset]:
    """Measure a run's checkpoints and keep the results in RUN/measurements.nc.

    Under torchrun, or where a process group exists, all processes call this alike and share the work: passes over the data, draws and inner
    products of gradients. Every one returns the same; the first writes. Each reads the run and the data itself.

    Args:
        run: a run or its directory.
        measures: names in MEASURES.
        steps: checkpoints; all of them by default.
        settings: how thoroughly.
        data_root: for tasks that read from disk.
        device: where to compute; the run's own by default.
        allow_other_data: measure on data whose fingerprint is not the run's.
        task: the run's task, where it cannot be found by the name in run.json.
        quiet: no progress bar.
        timeout: seconds that a process waits for the others.

    Returns:
        {measure: data set over `step` and more}. What was measured before with the same settings is not measured again.
        Checkpoints with weights that are not finite are left out, counted (`num_skipped`) and named (`skipped_steps`) in the attributes.
    """
    settings = settings or MeasureConfig()
    with started(_kind_of_device(run, device), timeout) as ranks:
        with ranks.agree():
            run = open_run(run) if isinstance(run, str | Path) else run
            if run.status == "importing":
                raise ValueError(f"{run.path} was not imported to the end; import it again with --overwrite")
            chosen = _chosen(run, measures, steps)
        objective, task, fingerprint = run_objective(run, task, data_root, device, allow_other_data, settings)
        path = run.path / MEASUREMENTS_FILE
        with ranks.agree():
            held = {k: v for k, v in load_groups(path).items() if k != "/"} if ranks.leads else {}
        groups = ranks.collect(held)[0]  # as the first process sees the file
        identity = json.dumps({**asdict(settings), "data": fingerprint}, sort_keys=True)
        for name in measures:
            if name in groups and groups[name].attrs.get("settings") != identity:
                del groups[name]
        todo = {s: [m for m in measures if m not in groups or s not in groups[m]["step"].values] for s in chosen}

        def save() -> None:
            with ranks.agree():
                if ranks.leads:
                    save_groups(groups, path)

        def checkpoint(step: int) -> Checkpoint:
            with ranks.agree():
                return Checkpoint(run, step, task, objective, settings)

        silent = quiet or not ranks.leads
        assumed = run.record.get("assumed", [])
        marks = {
            "settings": identity,
            **_facts(run),
            "num_examples": objective.num_examples,
            **({"assumed": ", ".join(assumed)} if assumed else {}),
        }
        if assumed and not silent:
            print(f"nobody told {', '.join(assumed)}: what hangs on them (thresholds, mixing, predictions) is for assumed values; tell them to landscape import", file=sys.stderr)  # fmt: skip
        skipped = _extend(groups, todo, checkpoint, save, marks, ranks, silent)
        if skipped:
            if not silent:
                print(f"{len(skipped)} of {len(chosen)} checkpoints left out: weights that are not finite", file=sys.stderr)  # fmt: skip
            for name in (m for m in measures if m in groups):
                groups[name].attrs.update(skipped_steps=", ".join(map(str, skipped)), num_skipped=len(skipped))
            save()
    return {m: groups[m] for m in measures if m in groups}


def _extend(
    groups: dict[str, xr.Dataset],
    todo: dict[int, list[str]],
    checkpoint: Callable[[int], Checkpoint],
    save: Callable[[], None],
    marks: dict[str, Any],
    ranks: Ranks,
    silent: bool,
) -> list[int]:
    """Measure what is to do of each step and save after it; returns the steps that were left out, their weights not being finite."""
    skipped: list[int] = []
    total = sum(len(names) for names in todo.values())
    with (
        Interruptible() as interrupt,
        tqdm(total=total, unit="measure", desc="measure", disable=silent or None, delay=2, leave=False) as bar,
    ):
        for step, names in todo.items():
            if not names:
                continue
            at, stopping = checkpoint(step), False
            if not at.learners.is_finite:
                skipped.append(step)
                bar.update(len(names))
                if not silent:
                    tqdm.write(f"step {step}: weights that are not finite; left out", file=sys.stderr)
                continue
            for name in names:
                found = MEASURES[name](at).expand_dims(step=[step])
                if name in groups:
                    found = xr.concat([groups[name], found], "step", join="outer", combine_attrs="drop")
                groups[name] = stamp(found.sortby("step"), measure=name, **marks)
                bar.update()
                stopping = any(ranks.collect(interrupt.requested))
                if stopping:
                    break
            save()
            if stopping:
                raise interrupt.stopped(f"stopped at step {step}; what was measured is kept")
    return skipped


def _chosen(run: Run, measures: Sequence[str], steps: Sequence[int] | None) -> list[int]:
    """The steps asked for, all of them there.

    Raises:
        ValueError: for a measure or a step that there is not.
    """
    unknown = [m for m in measures if m not in MEASURES]
    if unknown:
        raise ValueError(f"no such measure: {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    chosen = list(run.steps if steps is None else steps)
    absent = [s for s in chosen if s not in run.steps]
    if absent or not chosen:
        raise ValueError(
            f"{run.path} has no checkpoint of step {', '.join(map(str, absent)) or '(any)'}; there are {', '.join(map(str, run.steps)) or 'none'}"
        )
    return chosen


def _kind_of_device(run: Run | str | Path, device: str | None) -> str:
    """What the processes compute on, before they have met."""
    if device is not None:
        return device
    try:
        return (open_run(run) if isinstance(run, str | Path) else run).config.device
    except (ValueError, OSError):
        return "cpu"  # the run cannot be read: that is told when they have met


def _facts(run: Run) -> dict[str, str | float | int]:
    c = run.config
    return {
        "task": run.task, "algorithm": c.algorithm, "order": c.order, "topology": c.topology, "num_learners": c.num_learners,
        "local_batch_size": c.local_batch_size, "base_learning_rate": c.learning_rate, "run_seed": c.seed,
    }  # fmt: skip


def run_objective(
    run: Run,
    task: Task | None,
    data_root: str | Path | None,
    device: str | None,
    allow_other_data: bool,
    settings: MeasureConfig,
) -> tuple[Objective, Task, str]:
    """A run's training loss as a function of its weights, its task, and the fingerprint of the data they are measured on.

    Where there are several processes they share its passes over the data, which each of them has (`Objective`, shared=True).

    Raises:
        ValueError: data other than the run's, unless these are allowed.
    """
    ranks = current()
    with ranks.agree():
        if task is None and not run.task:
            raise ValueError(
                f"{run.path} does not say what was trained; write it again with its task: landscape import {run.path} --task TASK --out OTHER"
            )
        task = task or get_task(run.task)
        train, _ = task.load_data(data_root)
        recorded, here = run.record["data"]["fingerprint"]["train"], train.fingerprint()
        if recorded is not None and here != recorded and not allow_other_data:
            raise ValueError(
                f"{run.path} was trained on other data (fingerprint {recorded}, here {here}); allow it with --allow-other-data"
            )
        if settings.num_examples is not None:
            train = choose(train, settings.num_examples)
        config = run.config
        where = torch.device(local_device(device)) if device else config.torch_device()
        model = task.initial_model(config.seed)
        model.load_state_dict(run.frozen, strict=False)
    if len(set(ranks.collect(here))) > 1:
        raise AgreedError("the processes read different data; give all of them the same --data-root")
    budget = None if settings.memory_gb is None else int(settings.memory_gb * 2**30) // 8
    objective = Objective(
        model, task.loss_fn, train, device=where, dtype=config.torch_dtype, memory_budget=budget,
        group=torch.distributed.group.WORLD if ranks.size > 1 else None, shared=ranks.size > 1,
    )  # fmt: skip
    return objective, task, here
