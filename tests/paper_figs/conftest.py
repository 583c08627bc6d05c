"""Two measured runs, made as for the plotting tests; and studies whose numbers are made up."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import xarray as xr

    from landscape.plotting.view import RunView
    from landscape.tasks import Task
    from paper_figs.studies import Study

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:  # the figures are no part of the installed package
    sys.path.insert(0, ROOT)

_spec = importlib.util.spec_from_file_location(
    "plotting_fixtures", Path(__file__).parents[1] / "plotting" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_plotting = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_plotting)
known_task = _plotting.known_task


@pytest.fixture(scope="session")
def views(known_task: Task, tmp_path_factory: pytest.TempPathFactory) -> list[RunView]:
    """DPSGD and DPSGD (ATC) with what the dynamics figure shows."""
    names = ("dpsgd", "dpsgd-atc")
    return _plotting.make_views(
        known_task, tmp_path_factory.mktemp("runs"), dict.fromkeys(names, _plotting.RATE_AND_NOISE)
    )


LEVELS = {"converged": 0.2, "slow": 1.5, "stuck": 2.31, "non-finite": math.inf}
"""Final losses by outcome, where constant output has log(10)."""
LETTERS = {"c": "converged", "s": "slow", "k": "stuck", "x": "non-finite"}


@pytest.fixture(scope="session")
def made_up() -> Callable[..., tuple[Study, xr.Dataset]]:
    """(outcomes, name=..., stands_for=...) -> a study and its map: outcomes are {variant: [[letters of the seeds at a rate, ...] at a batch, ...]}."""
    import xarray as xr

    from paper_figs.studies import Study
    from paper_figs.studies.declared import VARIANTS

    def make(outcomes: dict[str, list[list[str]]], name: str = "made-up", **more: Any) -> tuple[Study, xr.Dataset]:
        batches, rates, seeds = len(outcomes["ssgd"]), len(outcomes["ssgd"][0]), len(outcomes["ssgd"][0][0])
        study = Study(
            name, "mnist-mlp@examples=480", tuple(4 * 2**b for b in range(batches)), tuple(0.1 * 2**r for r in range(rates)), num_epochs=5,
            converged_share=0.3, num_learners=4, seeds=tuple(range(1, seeds + 1)), **more,
        )  # fmt: skip
        ended = np.asarray(
            [[[[LETTERS[c] for c in cell] for cell in row] for row in outcomes[v]] for v in VARIANTS], dtype=object
        )
        ended = np.moveaxis(ended, 0, 1)  # (batch, variant, rate, seed)
        final = np.vectorize(LEVELS.get)(ended).astype(float)
        num_steps = [study.num_steps(b, 480) for b in range(batches)]
        step = np.full((batches, 6), np.nan)
        for b, steps in enumerate(num_steps):
            count = 6 if b == 0 else 5
            step[b, :count] = np.linspace(0, steps, count)
        fraction = step / np.asarray(num_steps)[:, None]
        end = np.where(np.isfinite(final), final, 4.0)
        loss = np.log(10) + (end[..., None] - np.log(10)) * fraction[:, None, None, None, :]
        dims = ("total_batch", "variant", "rate", "seed")
        seed_number = np.arange(seeds)[None, None, None, :]
        died = np.where(np.isinf(final), (0.5 * np.asarray(num_steps)[:, None, None, None]).astype(int), -1)
        found = xr.Dataset(
            {
                "train_loss": ((*dims, "point"), loss.astype("float32")),
                "sigma_w": ((*dims, "point"), np.zeros_like(loss, dtype="float32")),
                "final_loss": (dims, final),
                "outcome": (dims, ended),
                "diverged_at": (dims, died.astype("int32")),
                "test_accuracy": (dims, np.where(final < 1, 0.9 + 0.01 * seed_number, 0.1).astype("float32")),
                "num_steps": ("total_batch", num_steps),
            },
            coords={
                "total_batch": list(study.total_batches), "variant": list(VARIANTS), "seed": list(study.seeds),
                "base_rate": ("rate", list(study.learning_rates)),
                "learning_rate": (("total_batch", "rate"), [study.rates_at(b) for b in range(batches)]),
                "step": (("total_batch", "point"), step),
            },
            attrs={"threshold": 0.3 * math.log(10), "constant_loss": math.log(10), "num_examples": 480, "data_fingerprint": "0"},
        )  # fmt: skip
        return study, found

    return make


@pytest.fixture(scope="session")
def made_up_along() -> Callable[..., xr.Dataset]:
    """(kinds) -> what `run_along` returns for them, three variants each."""
    import xarray as xr

    from paper_figs.studies.declared import VARIANTS

    def make(kinds: tuple[str, ...]) -> xr.Dataset:
        runs = [(kind, variant) for kind in kinds for variant in ("dpsgd", "ssgd", "ssgd-star-matched")]
        count, points = len(runs), 3
        generator = np.random.default_rng(0)

        def numbers(low: float, high: float) -> tuple[tuple[str, str], np.ndarray]:
            return ("run", "point"), generator.uniform(low, high, (count, points))

        spread = {
            name: numbers(0.5, 1.0)
            for name in ("alpha_e_ratio_mean", "lambda_max", "lambda_max_smoothed", "Delta_mean", "Delta_2_mean")
        }
        errors = {
            name: numbers(0.01, 0.05)
            for name in ("alpha_e_ratio_stderr", "lambda_max_smoothed_stderr", "Delta_stderr", "Delta_2_stderr")
        }
        made = xr.Dataset(
            {
                **spread, **errors,
                "alpha_e_ratio_predicted": (("run", "point", "prediction"), generator.uniform(0.5, 1.0, (count, points, 2))),
            },
            coords={
                "kind": ("run", [k for k, _ in runs]), "variant": ("run", [v for _, v in runs]), "seed": ("run", [1] * count),
                "total_batch": ("run", [32] * count), "learning_rate": ("run", [0.2] * count), "prediction": ["exact", "isotropic"],
                "step": (("run", "point"), np.tile([2.0, 10.0, 30.0], (count, 1))),
            },
        )  # fmt: skip
        made["Delta_2_mean"] = made["Delta_2_mean"].where(made["variant"] != "ssgd", 0.0)
        assert set(made["variant"].values) == set(VARIANTS)
        return made

    return make
