"""Runs and measurements made up for the tests: what a run.json and a measurement say, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from landscape.checkpoints import Run
from landscape.plotting.view import RunView
from landscape.training.config import TrainConfig

CONVERGED = {"outcome": "converged", "median_last_train_loss": 0.25}


def made_view(
    folder: Path, label: str = "", *, status: str = "complete", outcome: dict[str, Any] | None = CONVERGED,
    groups: dict[str, xr.Dataset] | None = None, log: list[dict[str, Any]] | None = None, record: dict[str, Any] | None = None, **config: Any,
) -> RunView:  # fmt: skip
    """A run as figures see it: CONFIG on the defaults, with LOG as its metrics.jsonl and RECORD over its run.json."""
    settings = TrainConfig(**{"algorithm": "dpsgd", "learning_rate": 0.5, "num_steps": 100, **config})
    content: dict[str, Any] = {
        "task": "tiny", "config": settings.to_json(), "status": status, "threshold": 0.7, "constant_loss": 2.3, "num_parameters": 53,
        "data": {"name": "made up", "fingerprint": {"train": "0123abcd", "test": "4567ef"}},
        "provenance": {"landscape": "9.9", "git_commit": "c0ffee", "torch": "2.99", "python": "3.12.1", "platform": "a machine", "device": "cpu"},
    }  # fmt: skip
    content |= {} if outcome is None else {"outcome": outcome}
    path = folder / (label or settings.algorithm)
    path.mkdir(parents=True, exist_ok=True)
    if log is None:
        log = [
            {"step": s, "train_loss": 2.3 / (s + 1), "test_accuracy": 0.5, "sigma_w": 0.1} for s in range(0, 101, 10)
        ]
    if log:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    view = RunView("", Run(path, content | (record or {})), groups or {})
    return RunView(label or view.variant, view.run, view.groups)


def rates(
    means: list[float], stderr: float | list[float] = 0.01, prediction: float = 1.0, first: int = 0
) -> xr.Dataset:
    """Effective learning rates at steps FIRST, FIRST + 10, ..., with one prediction, "exact"."""
    errors = np.broadcast_to(np.asarray(stderr, dtype=float), (len(means),))
    predicted = np.full((len(means), 1), prediction)
    return xr.Dataset(
        {"alpha_e_ratio_mean": ("step", means), "alpha_e_ratio_stderr": ("step", errors),
         "alpha_e_ratio_predicted": (("step", "prediction"), predicted), "alpha_e_ratio_predicted_stderr": (("step", "prediction"), 0 * predicted)},
        coords={"step": first + 10 * np.arange(len(means)), "prediction": ["exact"]},
        attrs={"settings": json.dumps({"data": "0123abcd", "num_draws": 24, "num_examples": None, "seed": 0})},
    )  # fmt: skip


def steepness(
    at_average: list[float], isotropic: list[float], growth: list[float] | None = None, *, converged: bool = True
) -> xr.Dataset:
    """alpha lambda_max/2 at w_a and smoothed, limit 1, and the growth of the disagreement."""
    both = np.stack([at_average, isotropic], 1)
    found = xr.Dataset(
        {"alpha_lambda_half": (("step", "function"), both), "alpha_lambda_half_stderr": (("step", "function"), 0 * both),
         "threshold_mean": ("step", np.full(len(both), 2.0))},
        coords={"step": 10 * np.arange(len(both)), "function": ["w_a", "isotropic"]},
        attrs={"settings": json.dumps({"data": "0123abcd", "num_draws": 24, "num_examples": None, "seed": 0})},
    )  # fmt: skip
    if growth is not None:
        found["coupled_disagreement"] = ("step", growth)
        found["coupled_converged"] = ("step", np.full(len(growth), converged))
    return found
