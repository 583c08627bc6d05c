"""One training run, recorded in a run directory; resumes bit-identically on the CPU."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from tqdm import tqdm

from landscape.checkpoints import Run, open_run
from landscape.checkpoints.format import CHECKPOINTS, RUN_FILE, TEMPORARY_PREFIX
from landscape.checkpoints.reader import restore_state
from landscape.checkpoints.writer import RunWriter
from landscape.data.dataset import TensorData
from landscape.experiments.interrupt import Interruptible
from landscape.provenance import provenance
from landscape.tasks import Task, get_task
from landscape.theory.stability import learning_rate_thresholds
from landscape.training.config import TrainConfig
from landscape.training.evaluate import evaluate
from landscape.training.loop import Program, averaged_models, consensus_distances
from landscape.training.state import LearnerState
from landscape.training.topology import Topology
from landscape.training.topology import topology as make_topology

CONVERGENCE_WINDOW = 50
"""Steps at the end of a run on which convergence is judged (theory.md sec. 8)."""


def train(
    task: str | Task,
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    data_root: str | Path | None = None,
    topology: nx.Graph | np.ndarray | Topology | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Train, and record a run directory.

    Args:
        task: a name (`landscape tasks`), "module:function", or a Task.
        config: the configuration.
        out: the run directory; by default runs/TASK-ALGORITHM-aRATE-sSEED.
        data_root: where data sets lie, for tasks that read them from disk.
        topology: a graph or matrix of your own, instead of the config's name.
        resume: continue from the last checkpoint in `out`, with the same configuration; a complete run is returned as it is.
        overwrite: delete a run that is in `out`.
        quiet: no progress bar and no messages.

    Raises:
        ValueError: for anything wrong with the arguments, or a run in `out` and neither `resume` nor `overwrite`.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been written.
    """
    task = get_task(task)
    spec = config.topology if topology is None else topology
    graph = make_topology(spec, config.num_learners)
    out = Path(out or f"runs/{task.name}-{config.algorithm}-a{config.learning_rate:g}-s{config.seed}")
    device = config.torch_device()
    resuming = _claim(out, resume=resume, overwrite=overwrite)
    sigma0 = matched_sigma0(config.sigma0, config.num_steps) if isinstance(config.sigma0, str) else None
    train_data, test_data = task.load_data(data_root)
    program = Program(task, config, graph, train_data, sigma0=sigma0)
    fingerprint = {"train": train_data.fingerprint(), "test": test_data.fingerprint()}

    state = program.initial_state()
    if resuming:
        run = open_run(out)
        _check_same(run, task, config, graph, fingerprint)
        if run.status in ("complete", "diverged"):
            if not quiet:
                print(f"{out} is {run.status} ({run.steps[-1]} steps); nothing to do")
            return run
        if run.steps:
            state = restore_state(run.learners(run.steps[-1]), state)
        writer = RunWriter(out, dict(run.record))
    else:
        facts = learning_rate_thresholds(
            graph, config.algorithm, config.order, config.momentum, config.dampening, nesterov=config.nesterov
        )
        record = {
            "task": task.name,
            "config": config.to_json(),
            "topology": {**graph.summary(), "thresholds": facts, "matrices": graph.matrices.tolist()},
            "data": {
                "name": train_data.name,
                "num_train": len(train_data),
                "num_test": len(test_data),
                "fingerprint": fingerprint,
            },
            "threshold": task.threshold,
            "constant_loss": task.constant_loss,
            "num_parameters": program.model.layout.num_parameters,
            "provenance": provenance(device),
        }
        writer = RunWriter(out, record)
    writer.keep_metrics_until(state.step)
    writer.write_record(status="running")
    if not quiet:
        _announce(task, config, writer.record, resumed_at=state.step if resuming else None)
    try:
        _loop(program, state, test_data.to(device, config.torch_dtype), writer, quiet=quiet)
    finally:
        writer.close()
    return open_run(out)


def _loop(program: Program, state: LearnerState, test: TensorData, writer: RunWriter, *, quiet: bool) -> None:
    config = program.config
    alive = torch.ones(1, dtype=torch.bool, device=program.device)
    recent: deque[float] = deque(_recent_losses(writer.path, state.step), maxlen=CONVERGENCE_WINDOW)
    last_loss = math.nan
    started = time.perf_counter()
    _checkpoint(program, state, writer)
    bar = tqdm(
        total=config.num_steps,
        initial=state.step,
        unit="step",
        disable=quiet or None,
        delay=2,
        leave=False,
        desc=config.algorithm,
    )
    with Interruptible() as interrupt, bar:
        while state.step < config.num_steps:
            step = state.step
            logged = step % config.log_every == 0 or step >= config.num_steps - CONVERGENCE_WINDOW
            entry = _metrics(program, state, test, full=step % config.log_every == 0) if logged else None
            new, record = program.step(state, alive)
            last_loss = float(record.losses[0])
            if not bool(record.alive[0]):
                writer.append_metrics({"step": step, "minibatch_loss": last_loss, "finite": False})
                _checkpoint(program, state, writer)
                writer.write_record(
                    status="diverged", diverged_at=step, outcome={"outcome": "non-finite", "step": step}
                )
                if not quiet:
                    tqdm.write(f"step {step}: the loss or a gradient is not finite; the run ends here", file=sys.stderr)
                return
            state = new
            if entry is not None:
                recent.append(entry["train_loss"])
                rate = config.learning_rate * program.schedule(step)
                elapsed = time.perf_counter() - started
                writer.append_metrics({**entry, "minibatch_loss": last_loss, "learning_rate": rate, "elapsed": elapsed})
                bar.set_postfix(loss=f"{entry['train_loss']:.3f}", refresh=False)
            bar.update()
            done = state.step == config.num_steps
            if done or interrupt.requested or (config.checkpoint_every and state.step % config.checkpoint_every == 0):
                _checkpoint(program, state, writer)
            if interrupt.requested and not done:
                writer.write_record(status="interrupted")
                raise KeyboardInterrupt(f"stopped at step {state.step}; continue with --resume")
    entry = _metrics(program, state, test, full=True)
    writer.append_metrics(entry)
    recent.append(entry["train_loss"])
    verdict = outcome(np.asarray(recent)[:, None], program.task.threshold, program.task.constant_loss)[0]
    writer.write_record(
        status="complete", outcome={"outcome": verdict, "median_last_train_loss": statistics.median(recent)}
    )


def outcome(losses: np.ndarray, threshold: float, constant_loss: float, alive: np.ndarray | None = None) -> list[str]:
    """How runs ended (theory.md sec. 8), from their training losses at w_a over the last 50 steps.

    Args:
        losses: (steps, R).
        threshold: the task's.
        constant_loss: loss of the best constant output.
        alive: (R,) whether each stayed finite.

    Returns:
        for each run "converged" (median below the threshold), "non-finite", "stuck" (median within 2% of constant output,
        or above it), or "slow".
    """
    medians = np.median(losses, axis=0)
    finite = np.isfinite(medians) if alive is None else alive & np.isfinite(medians)
    return [
        "non-finite" if not ok else "converged" if m < threshold else "stuck" if m > 0.98 * constant_loss else "slow"
        for m, ok in zip(medians, finite, strict=True)
    ]


def matched_sigma0(run_path: str, num_steps: int) -> np.ndarray:
    """SSGD*'s noise level (T,) matched to the sigma_w(t) that a DPSGD run recorded, interpolated between its logged steps."""
    metrics = open_run(run_path).metrics
    if "sigma_w" not in metrics or metrics["sigma_w"].dropna().empty:
        raise ValueError(f"{run_path} recorded no sigma_w, so SSGD*'s noise cannot be matched to it")
    known = metrics.dropna(subset=["sigma_w"])
    return np.interp(np.arange(num_steps), known["step"], known["sigma_w"])


def _metrics(program: Program, state: LearnerState, test: TensorData, *, full: bool) -> dict[str, Any]:
    """Losses of w_a (and of each learner when `full`), consensus distance, per-parameter spread."""
    n, d = program.config.num_learners, program.model.layout.num_parameters
    mean, buffers = averaged_models(state, n)
    train_loss, train_accuracy = evaluate(program.evaluation_model, mean, buffers, program.train)
    distance = float(consensus_distances(state.params.double(), n)[0])
    entry: dict[str, Any] = {
        "step": state.step,
        "train_loss": float(train_loss[0]),
        "train_accuracy": float(train_accuracy[0]),
        "consensus_distance": distance,
        "sigma_w": distance / math.sqrt(d),
    }
    if full:
        loss, accuracy = evaluate(program.evaluation_model, mean, buffers, test)
        each_loss, each_accuracy = evaluate(program.evaluation_model, state.params, state.buffers, test)
        entry |= {
            "test_loss": float(loss[0]),
            "test_accuracy": float(accuracy[0]),
            "learner_test_loss": each_loss.tolist(),
            "learner_test_accuracy": each_accuracy.tolist(),
        }
    return entry


def _recent_losses(path: Path, step: int) -> list[float]:
    """Training losses of w_a logged so far on the steps where convergence is judged."""
    run = open_run(path)
    if run.metrics.empty or "train_loss" not in run.metrics:
        return []
    return [float(v) for v in run.metrics["train_loss"].dropna()][-CONVERGENCE_WINDOW:]


def _checkpoint(program: Program, state: LearnerState, writer: RunWriter) -> None:
    config = program.config
    facts = {
        "algorithm": config.algorithm,
        "order": config.order,
        "learning_rate": config.learning_rate * program.schedule(state.step),
        "local_batch_size": config.local_batch_size,
        "seed": config.seed,
    }
    writer.save_checkpoint(state, program.model, facts)


def _claim(out: Path, *, resume: bool, overwrite: bool) -> bool:
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
    begun = {CHECKPOINTS, f"{TEMPORARY_PREFIX}{RUN_FILE}"}
    return all(p.name in begun for p in out.iterdir()) and not any((out / CHECKPOINTS).glob("*"))


def _check_same(run: Run, task: Task, config: TrainConfig, graph: Topology, fingerprint: dict[str, str]) -> None:
    changed = [f"{k}: {old!r} in the run, {new!r} now" for k, (old, new) in run.config.changes(config).items()]
    if run.task != task.name:
        changed.append(f"task: {run.task!r} in the run, {task.name!r} now")
    if not changed and not np.array_equal(np.asarray(run.record["topology"]["matrices"]), graph.matrices):
        changed.append("topology: its mixing matrix is not the run's")
    if run.record["data"]["fingerprint"] != fingerprint:
        changed.append("data: not the examples that the run was trained on (fingerprints differ)")
    if changed:
        raise ValueError(f"{run.path} cannot be resumed with another configuration ({'; '.join(changed)})")


def _announce(task: Task, config: TrainConfig, record: dict[str, Any], resumed_at: int | None) -> None:
    graph = record["topology"]
    spectrum = ", ".join(f"{v:.3g}" if isinstance(v, float) else f"{complex(*v):.3g}" for v in graph["spectrum"][:8])
    more = ", ..." if len(graph["spectrum"]) > 8 else ""
    lines = [
        f"{task.name}: {config.algorithm}, {config.num_learners} learners x {config.local_batch_size}, alpha {config.learning_rate:g}"
    ]
    if config.algorithm == "dpsgd":
        lines.append(f"M: {graph['name']}, spectrum {spectrum}{more}; gap {graph['spectral_gap']:.3g}")
    lines.append(
        "stable while alpha lambda_max < " + ", ".join(f"{v:.3g} ({k})" for k, v in graph["thresholds"].items())
    )
    if resumed_at is not None:
        lines.append(f"resumed at step {resumed_at}")
    print("\n".join(lines), file=sys.stderr)
