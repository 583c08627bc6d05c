"""Counterfactual replay: continue a run from one of its checkpoints with something changed (theory.md sec. 6, last line)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from landscape.checkpoints import Learners, Run, open_run
from landscape.checkpoints.format import METRICS_FILE
from landscape.experiments.profiles import stored_profile
from landscape.experiments.train import Origin, record_run
from landscape.ranks import refuse_several
from landscape.tasks import Task, get_task
from landscape.training.config import FAULT_FIELDS, GOSSIPING, RULE_FIELDS, Algorithm, Order, TrainConfig
from landscape.training.noise import NoiseDrift, NoisePlace, NoiseShape
from landscape.training.topology import Topology
from landscape.training.topology import topology as make_topology

NOISE_FIELDS = ("sigma0", "noise_place", "noise_shape", "noise_drift", "noise_every", "noise_zero_sum")


def replay(
    run: Run | str | Path,
    step: int,
    out: str | Path,
    *,
    algorithm: Algorithm | None = None,
    order: Order | None = None,
    topology: str | nx.Graph | np.ndarray | Topology | None = None,
    learning_rate: float | int | None = None,
    gamma: float | int | None = None,
    sigma0: float | int | str | None = None,
    noise_place: NoisePlace | None = None,
    noise_shape: NoiseShape | None = None,
    noise_drift: NoiseDrift | None = None,
    noise_every: int | None = None,
    noise_zero_sum: bool | None = None,
    checkpoint_every: int | None = None,
    num_steps: int | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    task: Task | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Continue a run from a checkpoint with something changed, into a run directory of its own.

    The replay takes the steps step, step + 1, ... of the run: the same minibatches and the same M(t), which are pure functions of
    (seed, learner, step), the same momentum buffers, the same schedule. With nothing changed it repeats the run bit for bit (on a
    CPU). From DPSGD to SSGD or SSGD* every learner starts at w_a, with momentum and the network's buffers averaged: one
    discontinuity that is not the algorithm's, recorded as "averaged".

    The directory holds the run's metrics before the step too, so that its curves are whole; its outcome is judged on losses since
    the step alone. run.json tells, under "replayed", the run's name, the step and every change.

    Args:
        run: a run or its directory.
        step: one of its checkpoints.
        out: the replay's directory.
        algorithm: None keeps the run's, here and below.
        order: DPSGD's order.
        topology: a name, file, graph or matrix, for the same number of learners.
        learning_rate: the base rate; the schedule's factor stays.
        gamma: controlled disagreement.
        sigma0: SSGD*'s noise level, a run to match, or a profile.
        noise_place: see `TrainConfig`; so the four below.
        noise_shape: what the matched noise keeps.
        noise_drift: what becomes of the landscape noise's mean.
        noise_every: steps between refreshes.
        noise_zero_sum: whether noises on the weights sum to zero.
        checkpoint_every: steps between checkpoints.
        num_steps: where to end, counted from the run's start; the run's own end by default.
        device: where to compute; the run's own by default.
        data_root: for tasks that read from disk.
        task: the run's task, where it cannot be found by the name in run.json.
        resume: continue a replay that was cut off; the same call.
        overwrite: delete a run that is in `out`.
        quiet: no progress bar and no messages.

    Raises:
        ValueError: for a step without a checkpoint, weights that are not finite, a topology of another size, or nothing left to do.
    """
    refuse_several("a replay")
    run = open_run(run) if isinstance(run, str | Path) else run
    out = Path(out)
    if out.resolve() == run.path.resolve():
        raise ValueError(f"a replay needs a directory of its own, not that of the run it comes from ({out})")
    learners = run.learners(step)
    if not learners.is_finite:
        raise ValueError(
            f"{run.path}: the checkpoint of step {step} holds weights that are not finite; replay an earlier one"
        )
    graph = _graph(run, topology)
    wanted: dict[str, Any] = {
        "algorithm": algorithm, "order": order, "topology": None if topology is None else graph.name, "learning_rate": learning_rate,
        "gamma": gamma, "sigma0": sigma0, "noise_place": noise_place, "noise_shape": noise_shape, "noise_drift": noise_drift,
        "noise_every": noise_every, "noise_zero_sum": noise_zero_sum, "checkpoint_every": checkpoint_every, "num_steps": num_steps, "device": device,
    }  # fmt: skip
    if isinstance(topology, str):
        wanted["topology"] = topology
    told = {name for name, value in wanted.items() if value is not None}
    unknown = {"learning_rate", "local_batch_size"} & set(run.record.get("assumed", ())) - told
    if unknown:
        raise ValueError(f"nobody told the {' and '.join(sorted(unknown))} of {run.path}; give it to landscape import")
    config = _changed(run.config, {name: value for name, value in wanted.items() if value is not None})
    _check_steps(run, step, config)
    if config.algorithm == "ssgd-star" != run.config.algorithm and not config.sigma0:
        raise ValueError("SSGD* needs its noise; give sigma0 (--sigma0): a level, a DPSGD run or a profile")
    synchronous = ("ssgd", "ssgd-star")
    averaged = run.config.algorithm not in synchronous and config.algorithm in synchronous and len(learners) > 1
    changes = {name: list(pair) for name, pair in run.config.changes(config).items()}
    same_noise = config.is_calibrated and not set(changes) & set(NOISE_FIELDS)
    if averaged and not quiet:
        print("every learner starts at w_a, with momentum and buffers averaged", file=sys.stderr)
    origin = Origin(
        learners=_at_mean(learners) if averaged else learners,
        history=_history(run, step),
        facts={"path": run.path.name, "step": step, "changes": changes, "averaged": averaged},
        fingerprint=run.record["data"]["fingerprint"],
        profile=stored_profile(run) if same_noise else None,
    )
    return record_run(
        task or get_task(run.task), config, graph, out, data_root=data_root, resume=resume, overwrite=overwrite, quiet=quiet,
        origin=origin,
    )  # fmt: skip


def compare(runs: Sequence[Run | str | Path]) -> pd.DataFrame:
    """How runs ended, side by side: one row each.

    Returns:
        run, algorithm, order, topology, learning_rate, gamma, replayed ("NAME at STEP" or ""), step reached, outcome, train_loss of
        w_a at the end, its median over the last 50 steps, and the consensus distance at the end.
    """
    rows = []
    for run in (open_run(r) if isinstance(r, str | Path) else r for r in runs):
        c, ended = run.config, run.record.get("outcome", {})
        came = run.record.get("replayed")
        logged = run.metrics.dropna(subset=["train_loss"]) if "train_loss" in run.metrics else pd.DataFrame()
        last = logged.iloc[-1].to_dict() if len(logged) else {}
        rows.append({
            "run": run.path.name, "algorithm": c.algorithm, "order": c.order if c.algorithm == "dpsgd" else "",
            "topology": run.record["topology"]["name"] if c.algorithm in GOSSIPING else "", "learning_rate": c.learning_rate, "gamma": c.gamma,
            "replayed": f"{came['path']} at {came['step']}" if came else "", "step": run.steps[-1] if run.steps else 0,
            "outcome": ended.get("outcome", run.status), "train_loss": float(last.get("train_loss", np.nan)),
            "median_last_train_loss": float(ended.get("median_last_train_loss", np.nan)),
            "consensus_distance": float(last.get("consensus_distance", np.nan)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _graph(run: Run, topology: str | nx.Graph | np.ndarray | Topology | None) -> Topology:
    """The topology asked for, or the one that the run recorded."""
    record = run.record["topology"]
    if topology is not None:
        return make_topology(topology, record["num_learners"])
    return Topology(record["name"], record["num_learners"], record["kind"], np.asarray(record["matrices"]))


def _changed(config: TrainConfig, wanted: dict[str, Any]) -> TrainConfig:
    """The configuration with changes; noise and numbers that were the old algorithm's are not kept, nor faults that the new one cannot have."""
    algorithm, order = wanted.get("algorithm", config.algorithm), wanted.get("order", config.order)
    foreign = [name for rule, names in RULE_FIELDS.items() if rule != algorithm for name in names]
    if algorithm not in GOSSIPING or (algorithm, order) == ("dpsgd", "cta"):
        foreign += FAULT_FIELDS
    wanted = {**{f.name: f.default for f in fields(TrainConfig) if f.name in foreign}, **wanted}
    defaults = {f.name: f.default for f in fields(TrainConfig) if f.name in NOISE_FIELDS}
    if algorithm != "ssgd-star":
        wanted = {**defaults, **wanted}
    elif "sigma0" in wanted and not isinstance(wanted["sigma0"], str):
        wanted = {**defaults, "noise_zero_sum": config.noise_zero_sum, **wanted}
    return replace(config, **wanted)


def _check_steps(run: Run, step: int, config: TrainConfig) -> None:
    if config.num_steps <= step:
        raise ValueError(
            f"nothing is left to replay after step {step} of {config.num_steps}; give --num-steps beyond it, or an earlier step"
        )
    stretched = [s for s in (config.schedule, config.gamma_schedule) if "cosine" in s]
    if config.num_steps != run.config.num_steps and stretched:
        raise ValueError(
            f"the schedule {stretched[0]} stretches over num_steps, so with {config.num_steps} instead of {run.config.num_steps} the steps "
            "before would have had other rates; keep the run's number of steps"
        )


def _at_mean(learners: Learners) -> Learners:
    """Every learner at w_a, with momentum and floating-point buffers averaged in float64; counters are the first learner's."""

    def everywhere(t: Tensor) -> Tensor:
        mean = t.mean(0, dtype=torch.float64).to(t.dtype) if t.is_floating_point() else t[0]
        return mean.expand_as(t).clone()

    return replace(
        learners, weights=learners.mean.expand_as(learners.weights).clone(), buffers={n: everywhere(b) for n, b in learners.buffers.items()},
        momentum=None if learners.momentum is None else everywhere(learners.momentum),
    )  # fmt: skip


def _history(run: Run, step: int) -> list[str]:
    """Lines of a run's metrics before a step."""
    path = run.path / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
