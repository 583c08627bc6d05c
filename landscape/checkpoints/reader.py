"""Reading runs, and checkpoints of any system."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from landscape.checkpoints.assemble import check_selection, readable
from landscape.checkpoints.format import (
    CHECKPOINTS,
    METRICS_FILE,
    RUN_FILE,
    STEP_PATTERN,
    step_name,
    unseal,
)
from landscape.checkpoints.importers import run_format
from landscape.checkpoints.learners import Learners
from landscape.checkpoints.run_record import check_record, config_of, entry
from landscape.display import Displayed, Row, Shown, sparkline, text
from landscape.training.config import GOSSIPING, TrainConfig
from landscape.training.state import LearnerState

SHOWN_FIELDS = (
    "algorithm",
    "order",
    "topology",
    "learning_rate",
    "num_learners",
    "local_batch_size",
    "num_steps",
    "seed",
)
"""Of the configuration, in Jupyter."""


@dataclass(frozen=True, repr=False)
class Run(Displayed):
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
        return config_of(self.record, self.path / RUN_FILE)

    @property
    def task(self) -> str:
        """The task's name."""
        return str(entry(self.record, self.path / RUN_FILE, "task"))

    @property
    def status(self) -> str:
        """running (or killed), interrupted, complete or diverged; of other programs' checkpoints importing (or killed), imported, recorded."""
        return str(entry(self.record, self.path / RUN_FILE, "status"))

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
    def frozen(self) -> dict[str, Tensor]:
        """Parameters that require no gradient, where the checkpoints tell which these are: {name: tensor}, those of the first checkpoint."""
        return self.learners(self.steps[0], range(1)).frozen if self.steps else {}

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

    def shown(self) -> Shown:
        """What was trained and how it went; a path that is not relative is cut to its last part."""
        config = dict(self.record.get("config", {}))
        if "topology" in config:  # one that was given as a graph or matrix has its own name
            config["topology"] = (self.record.get("topology") or {}).get("name", config["topology"])
        if config.get("algorithm") not in GOSSIPING:
            config.pop("topology", None)
        if config.get("algorithm") != "dpsgd":
            config.pop("order", None)
        metrics = self.metrics
        losses = metrics["train_loss"] if "train_loss" in metrics else pd.Series(dtype=float)
        rows: list[Row] = [("task", self.task or None, ""), ("status", self.status, "")]
        rows += [(name.replace("_", " "), config[name], "") for name in SHOWN_FIELDS if name in config]
        rows += [("checkpoints", f"{len(self.steps)} (steps {text(self.steps)})" if self.steps else 0, "")]
        rows += [("last training loss", float(losses.iloc[-1]), "nats")] if len(losses) else []
        assumed = self.record.get("assumed", [])
        notes = [f"assumed, not recorded: {', '.join(assumed)}"] if assumed else []
        picture = sparkline(losses.to_numpy(), f"training loss of w_a, steps {metrics['step'].iloc[0]} to {metrics['step'].iloc[-1]}") if len(losses) else ""  # fmt: skip
        return Shown(f"Run {self.path.name if self.path.is_absolute() else self.path}", rows, notes, picture)


def open_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises:
        ValueError: if there is none, or run.json is damaged or from a newer version.
    """
    path = Path(path)
    if not (path / RUN_FILE).is_file():
        raise ValueError(f"{path} holds no run ({RUN_FILE} is missing)")
    record = unseal(path / RUN_FILE)
    check_record(record, path / RUN_FILE)
    return Run(path, record)


def read_checkpoint(
    path: str | Path | Sequence[str | Path],
    learners: range | None = None,
    *,
    model: nn.Module | None = None,
    rename: Sequence[str] = (),
) -> Learners:
    """Read one checkpoint, of a run of ours or of another system's; nothing in its files is ever run.

    Args:
        path: a folder checkpoints/step-XXXXXXXX of a run; or a file, a folder, a glob or a list of files of torch.save, safetensors,
            torch.distributed.checkpoint, FSDP, Lightning, Accelerate, DeepSpeed, decent-dp or SGP (`landscape inspect` tells what it is).
        learners: which to read, from 0; all by default.
        model: of foreign checkpoints, the module whose weights these are: it tells the order of the parameters, which are trained,
            buffers, tied; it is not changed. Without it, parameters come in the checkpoint's order, and buffers are known by what BatchNorm
            calls them.
        rename: of foreign checkpoints, rules OLD=NEW for names that differ, * standing for anything; "head.*=" leaves out.

    Returns:
        the learners; of another system's checkpoint `origin` tells what they are (learners, one model, an average, possibly a mixture of
        processes) and what was left out.

    Raises:
        ValueError: `learners` is empty, or has some that are not there.
        CheckpointError: damaged, incomplete or dangerous files; names or shapes that do not fit `model`; learners of different networks or
            steps; several checkpoints of which one must be chosen.
    """
    given = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
    own = len(given) == 1 and run_format.is_checkpoint(given[0])
    if len(given) == 1 and not own and (given[0] / RUN_FILE).is_file():
        raise ValueError(f"{given[0]} is a run; read one of its checkpoints with open_run(path).learners(step)")
    if len(given) == 1 and not given[0].exists() and not glob.glob(str(given[0])):
        raise ValueError(f"there is no checkpoint at {given[0]}")
    if own and model is None and not rename:
        return _read_own(given[0], learners)
    from landscape.checkpoints.find import find_one

    return readable(find_one(given), module=model, rename=rename).read(learners)


def _read_own(path: Path, learners: range | None) -> Learners:
    if learners is not None:
        check_selection(learners, run_format.read_state(path)["num_learners"], path)
    found = run_format.find(path, learners)
    assert found is not None
    return replace(readable(found).read(), origin=run_format.read_state(path).get("imported", {}))


def restore_state(learners: Learners, fresh: LearnerState) -> LearnerState:
    """The training state of a checkpoint, on the device and in the types of a fresh state of the same program."""
    buffers = {n: learners.buffers.get(n, b).to(b) for n, b in fresh.buffers.items()}
    momentum = None if fresh.momentum is None or learners.momentum is None else learners.momentum.to(fresh.params)
    return LearnerState(learners.weights.to(fresh.params), buffers, momentum, learners.step)
