"""What a run writes down as it goes: its metrics, its checkpoints, and a word at its start."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape.checkpoints import open_run
from landscape.checkpoints.writer import RunWriter
from landscape.data.dataset import Examples
from landscape.functional import Buffers
from landscape.ranks import current
from landscape.tasks import CONVERGENCE_WINDOW, Task
from landscape.training.config import GOSSIPING, TrainConfig
from landscape.training.evaluate import evaluate, recalibrated
from landscape.training.loop import Program
from landscape.training.state import LearnerState

SPARSE_WINDOW = 5
"""Where losses are taken on a part of the data, because all would take longer than training: every so many of these steps."""


def is_judged(program: Program, step: int) -> bool:
    """Whether the training loss of w_a after so many steps counts for convergence."""
    left = program.config.num_steps - step
    return left < CONVERGENCE_WINDOW and (program.evaluation_examples is None or left % SPARSE_WINDOW == 0)


def metrics(program: Program, state: LearnerState, test: Examples, *, full: bool) -> dict[str, Any]:
    """Losses of w_a (and of each learner when `full`), consensus distance, per-parameter spread; the same on every process.

    Each process evaluates w_a, with BatchNorm statistics measured there, on its share of the examples, and its own learners on all
    held-out ones; or of these only `Program.part`.

    Args:
        program: what is trained.
        state: of its learners.
        test: the part of the held-out data that is evaluated, on the device.
        full: whether to add held-out losses.
    """
    d, ranks = program.model.layout.num_parameters, current()
    mean, buffers = averaged_for_evaluation(program, state)
    train_loss, train_accuracy = evaluate(program.evaluation_model, mean, buffers, program.evaluated, ranks=ranks)
    distance = float(program.consensus_distances(state)[0])
    entry: dict[str, Any] = {
        "step": state.step,
        "train_loss": float(train_loss[0]),
        "train_accuracy": float(train_accuracy[0]),
        "consensus_distance": distance,
        "sigma_w": distance / math.sqrt(d),
    }
    if full:
        loss, accuracy = evaluate(program.evaluation_model, mean, buffers, test, ranks=ranks)
        own = evaluate(program.evaluation_model, state.params, state.buffers, test)
        each_loss, each_accuracy = program.communicator.rows(torch.stack(own, dim=1)).unbind(1)
        entry |= {
            "test_loss": float(loss[0]),
            "test_accuracy": float(accuracy[0]),
            "learner_test_loss": each_loss.tolist(),
            "learner_test_accuracy": each_accuracy.tolist(),
        }
    return entry


def averaged_for_evaluation(program: Program, state: LearnerState) -> tuple[Tensor, Buffers]:
    """w_a of each replica (R, d), and its buffers with BatchNorm statistics measured at it."""
    mean, buffers = program.averaged(state)
    return mean, recalibrated(program.evaluation_model, mean, buffers, program.evaluated, program.seeds)


def judged_losses(program: Program, path: Path) -> list[float]:
    """Training losses of w_a logged so far on which convergence is judged: of a replay, those since it began."""
    run = open_run(path)
    if run.metrics.empty or "train_loss" not in run.metrics:
        return []
    own = run.metrics[run.metrics["step"] >= run.record.get("replayed", {}).get("step", 0)].dropna(
        subset=["train_loss"]
    )
    return [float(v) for step, v in zip(own["step"], own["train_loss"], strict=True) if is_judged(program, int(step))]


def checkpoint(program: Program, state: LearnerState, writer: RunWriter) -> None:
    """Write a checkpoint of a run, with what a measurement at it needs to know."""
    config = program.config
    facts = {
        "algorithm": config.algorithm,
        "order": config.order,
        "learning_rate": config.learning_rate * program.schedule(state.step),
        "local_batch_size": config.local_batch_size,
        "seed": config.seed,
        **_gradient_point_facts(program, state.step),
    }
    writer.save_checkpoint(
        state, program.model, facts, held=program.communicator.held, num_learners=config.num_learners
    )


def _gradient_point_facts(program: Program, step: int) -> dict[str, Any]:
    """What tells where the step that follows takes its gradients, beside the weights.

    Under CTA "mixing", M of that step (n, n); for SSGD* "sigma0", the standard deviation of independent isotropic noise on the
    weights. Other noise on the weights has no single number and is told by the run's profile.
    """
    config = program.config
    if config.algorithm == "dpsgd" and config.order == "cta":
        return {"mixing": program.topology.damped(config.gamma_at(step)).matrix(config.seed, step).tolist()}
    level = program.noise_level(step) if config.algorithm == "ssgd-star" else None
    return {} if level is None else {"sigma0": level}


def announce(task: Task, config: TrainConfig, record: dict[str, Any], resumed_at: int | None) -> None:
    """Say what is about to be trained, on stderr."""
    graph = record["topology"]
    spectrum = ", ".join(f"{v:.3g}" if isinstance(v, float) else f"{complex(*v):.3g}" for v in graph["spectrum"][:8])
    more = ", ..." if len(graph["spectrum"]) > 8 else ""
    lines = [
        f"{task.name}: {config.algorithm}, {config.num_learners} learners x {config.local_batch_size}, alpha {config.learning_rate:g}"
    ]
    if config.algorithm in GOSSIPING:
        damped = f", gamma {config.gamma:g}" if config.gamma_range != (1, 1) else ""
        varying = f" times {config.gamma_schedule}" if config.gamma_schedule != "constant" else ""
        lines.append(f"M: {graph['name']}, spectrum {spectrum}{more}; gap {graph['spectral_gap']:.3g}{damped}{varying}")
    lines.append(
        "stable while alpha lambda_max < " + ", ".join(f"{v:.3g} ({k})" for k, v in graph["thresholds"].items())
    )
    if resumed_at is not None:
        lines.append(f"resumed at step {resumed_at}")
    print("\n".join(lines), file=sys.stderr)
