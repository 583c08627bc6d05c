"""Reading the run format."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from landscape.checkpoints.format import (
    CHECKPOINTS,
    METRICS_FILE,
    RUN_FILE,
    STATE_FILE,
    STEP_PATTERN,
    CheckpointError,
    digest,
    shard_name,
    step_name,
    unseal,
)
from landscape.functional import Buffers, ParameterLayout
from landscape.training.config import TrainConfig
from landscape.training.state import LearnerState


@dataclass(frozen=True)
class Learners:
    """The learners of one checkpoint.

    Attributes:
        step: steps taken.
        weights: flat weights (n, d), parameters in `layout`'s order.
        layout: names and shapes of the parameters.
        buffers: {name: (n, ...)}.
        momentum: momentum buffers (n, d), or None.
        facts: what else the checkpoint recorded (learning_rate, local_batch_size, algorithm ...).
    """

    step: int
    weights: Float[Tensor, "n d"]
    layout: ParameterLayout
    buffers: Buffers = field(default_factory=dict)
    momentum: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def mean(self) -> Float[Tensor, " d"]:
        """w_a = (1/n) sum_j w_j, summed in float64; exactly w_j where all are equal."""
        if bool((self.weights == self.weights[0]).all()):
            return self.weights[0].clone()
        return self.weights.mean(0, dtype=torch.float64).to(self.weights.dtype)

    @cached_property
    def deviations(self) -> Float[Tensor, "n d"]:
        """delta_j = w_j - w_a."""
        return self.weights - self.mean

    @property
    def consensus_distance(self) -> float:
        """sqrt(Tr Sigma_w), Sigma_w = (1/n) sum_j delta_j delta_j^T."""
        return float(self.deviations.double().square().sum(1).mean().sqrt())

    @property
    def weight_variance(self) -> float:
        """sigma_w^2 = Tr(Sigma_w)/d, the variance per parameter."""
        return self.consensus_distance**2 / self.weights.shape[1]

    @property
    def mean_buffers(self) -> Buffers:
        """Buffers of the averaged model: floating-point ones averaged, counters the first learner's."""
        return {n: b.mean(0) if b.is_floating_point() else b[0] for n, b in self.buffers.items()}

    def parameters(self, learner: int | None = None) -> dict[str, Tensor]:
        """Parameters by name of one learner, or of the mean w_a: {name: tensor}."""
        return self.layout.split(self.mean if learner is None else self.weights[learner])

    def select(self, which: range) -> Learners:
        """Some of the learners, as views."""
        part = slice(which.start, which.stop)
        return replace(
            self,
            weights=self.weights[part],
            buffers={n: b[part] for n, b in self.buffers.items()},
            momentum=None if self.momentum is None else self.momentum[part],
        )

    @property
    def is_finite(self) -> bool:
        """Whether every weight is finite."""
        return bool(torch.isfinite(self.weights).all())

    def __repr__(self) -> str:
        n, d = self.weights.shape
        return f"Learners(step={self.step}, num_learners={n}, num_parameters={d}, consensus_distance={self.consensus_distance:.4g})"


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: where it is.
        record: run.json.
    """

    path: Path
    record: dict[str, Any]

    @cached_property
    def config(self) -> TrainConfig:
        """The full configuration."""
        return TrainConfig.from_json(self.record["config"])

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.record["task"])

    @property
    def status(self) -> str:
        """running (or killed), interrupted, complete or diverged."""
        return str(self.record["status"])

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        folder = self.path / CHECKPOINTS
        found = [STEP_PATTERN.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(m.group(1)) for m in found if m)

    def learners(self, step: int, which: range | None = None) -> Learners:
        """The learners at a step: all of them, or some."""
        if step not in self.steps:
            raise ValueError(
                f"{self.path} has no checkpoint of step {step}; there are {', '.join(map(str, self.steps)) or 'none'}"
            )
        return read_checkpoint(self.path / CHECKPOINTS / step_name(step), which)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl as a table, one row a logged step."""
        path = self.path / METRICS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        return pd.DataFrame([json.loads(line) for line in lines if line.endswith("}")])

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Run({str(self.path)!r}, task={self.task!r}, algorithm={c.algorithm!r}, learning_rate={c.learning_rate:g}, "
            f"num_learners={c.num_learners}, status={self.status!r}, checkpoints={len(self.steps)})"
        )

    def _repr_html_(self) -> str:
        keep = (
            "algorithm",
            "order",
            "topology",
            "learning_rate",
            "num_learners",
            "local_batch_size",
            "num_steps",
            "seed",
        )
        rows = {
            "task": self.task,
            "status": self.status,
            **{k: self.record["config"][k] for k in keep},
            "checkpoints": len(self.steps),
        }
        body = "".join(f"<tr><th style='text-align:left'>{k}</th><td>{v}</td></tr>" for k, v in rows.items())
        return f"<table><caption>{self.path}</caption>{body}</table>"


def open_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises:
        ValueError: if there is none, or run.json is damaged or from a newer version.
    """
    path = Path(path)
    if not (path / RUN_FILE).is_file():
        raise ValueError(f"{path} holds no run ({RUN_FILE} is missing)")
    return Run(path, unseal(path / RUN_FILE))


def read_checkpoint(path: str | Path, learners: range | None = None) -> Learners:
    """Read one checkpoint, every file checked against its recorded size and checksum.

    Args:
        path: a folder checkpoints/step-XXXXXXXX of a run.
        learners: which to read; all by default.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint at {path}")
    state = unseal(path / STATE_FILE)
    layout = ParameterLayout(
        tuple(n for n, _ in state["parameters"]), tuple(torch.Size(s) for _, s in state["parameters"])
    )
    count = state["num_learners"]
    chosen = range(count) if learners is None else learners
    tensors = [_read_tensors(path, shard_name("learner", j, count), state["files"]) for j in chosen]
    momentum = None
    if state["momentum"]:
        stored = [_read_tensors(path, shard_name("optimizer", j, count), state["files"]) for j in chosen]
        momentum = torch.stack([layout.join(t) for t in stored])
    known = {"format", "format_version", "step", "num_learners", "parameters", "buffers", "momentum", "files"}
    return Learners(
        step=state["step"],
        weights=torch.stack([layout.join(t) for t in tensors]),
        layout=layout,
        buffers={name: torch.stack([t[name] for t in tensors]) for name in state["buffers"] if name in tensors[0]},
        momentum=momentum,
        facts={k: v for k, v in state.items() if k not in known},
    )


def restore_state(learners: Learners, fresh: LearnerState) -> LearnerState:
    """The training state of a checkpoint, on the device and in the types of a fresh state of the same program."""
    buffers = {n: learners.buffers.get(n, b).to(b) for n, b in fresh.buffers.items()}
    momentum = None if fresh.momentum is None or learners.momentum is None else learners.momentum.to(fresh.params)
    return LearnerState(learners.weights.to(fresh.params), buffers, momentum, learners.step)


def _read_tensors(folder: Path, name: str, files: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    path, expected = folder / name, files.get(name)
    if expected is None:
        raise CheckpointError(f"{folder / STATE_FILE} does not list {name}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    content = path.read_bytes()
    if len(content) != expected["bytes"]:
        raise CheckpointError(
            f"{path} is cut short or overlong: {len(content)} bytes, but {expected['bytes']} were written"
        )
    if digest(content) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its checksum is not the one recorded when it was written")
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
