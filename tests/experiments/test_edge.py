from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.data.dataset import TensorData
from landscape.experiments import sweep
from landscape.experiments.edge import Edge, edge_scorecard, find_edge
from landscape.experiments.sweep import Variant
from landscape.results import load_dataset
from landscape.statistics import Estimate
from landscape.tasks import Task
from landscape.theory.scorecard import COLUMNS
from landscape.theory.stability import learning_rate_thresholds
from landscape.training import TrainConfig, topology

LAMBDA = torch.tensor([0.5, 1.0, 4.0])
"""Eigenvalues of the Hessian, the same for every example: minibatches add noise and nothing else."""
BASE = TrainConfig("dpsgd", 0.1, num_learners=4, local_batch_size=4, num_steps=120, dtype="float64", log_every=120)


class Scaled(nn.Module):
    """The linear model x -> sqrt(lambda) w, whose squared loss has the Hessian diag(lambda)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("scales", LAMBDA.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales * self.weight


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(1)


@pytest.fixture(scope="module")
def quadratic() -> Task:
    noise = 0.01 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = TensorData(torch.ones(40, 3, dtype=torch.float64), noise, "quadratic")
    return Task("quadratic", "additive noise", partial(Scaled), _half_square, lambda root: (data, data), 1.0, 5.0)


CASES: dict[str, tuple[Variant, dict[str, Any], float]] = {
    "ssgd": (Variant("ssgd"), {}, 0.5),
    "heavy ball": (Variant("ssgd"), {"momentum": 0.5}, 0.75),
    "nesterov": (Variant("ssgd"), {"momentum": 0.5, "nesterov": True}, 0.375),
    "awc": (Variant("dpsgd"), {}, (1 - 1 / 3) / 4),
    "awc with momentum": (Variant("dpsgd"), {"momentum": 0.5}, 1.5 * (1 - 1 / 3) / 4),
    "awc damped": (Variant("dpsgd"), {"gamma": 0.5}, (2 - 0.5 * 4 / 3) / 4),
    "atc": (Variant("dpsgd", "atc"), {}, 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_on_a_quadratic_the_edge_is_the_threshold_over_lambda_max(quadratic: Task, tmp_path: Path, name: str) -> None:
    variant, changes, expected = CASES[name]
    config = dataclasses.replace(BASE, **changes)
    found = find_edge(quadratic, config, variant, low=0.8 * expected, high=1.15 * expected, seeds=range(4), out=tmp_path, num_rates=2,
                      num_bisections=2, max_sigma_w=0.015 if variant.algorithm == "dpsgd" else math.inf, quiet=True)  # fmt: skip
    assert found.bracket == (found.low, found.high)
    assert found.high / found.low == pytest.approx((1.15 / 0.8) ** (1 / 4), rel=1e-9)
    assert found.low < expected < found.high
    table = edge_scorecard(found, config, variant, 4.0, tolerance=0.2)
    assert list(table.columns) == COLUMNS
    smallest = table[table["prediction"] == "smallest threshold / lambda_max"].iloc[0]
    assert smallest["predicted"] == pytest.approx(expected)
    assert smallest["verdict"] == "agrees"
    assert smallest["ratio"] == pytest.approx(found.edge / expected)


def test_the_mean_does_not_see_an_unstable_disagreement_on_a_quadratic(quadratic: Task, tmp_path: Path) -> None:
    """At half again the threshold of the disagreement the loss of w_a converges and the learners part."""
    options: dict[str, Any] = {
        "low": 0.1,
        "high": 0.25,
        "seeds": range(4),
        "out": tmp_path,
        "num_rates": 2,
        "num_bisections": 0,
    }
    by_loss = find_edge(quadratic, BASE, Variant("dpsgd"), quiet=True, **options)
    assert (by_loss.edge, by_loss.bracket) == (math.inf, (0.25, math.inf))
    both = find_edge(quadratic, BASE, Variant("dpsgd"), max_sigma_w=0.05, quiet=True, **options)
    assert both.bracket == (0.1, 0.25)


def test_more_bisections_run_only_what_is_missing(
    quadratic: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[float] = []
    original = sweep.run_replicas

    def counted(program: Any, *rest: Any) -> Any:
        ran.extend(program._rates.flatten().tolist()[:: program.config.num_learners])
        return original(program, *rest)

    monkeypatch.setattr(sweep, "run_replicas", counted)
    options: dict[str, Any] = {
        "low": 0.4,
        "high": 0.64,
        "seeds": range(2),
        "out": tmp_path,
        "num_rates": 2,
        "quiet": True,
    }
    first = find_edge(quadratic, BASE, Variant("ssgd"), num_bisections=1, **options)
    assert sorted(set(ran)) == pytest.approx([0.4, math.sqrt(0.4 * 0.64), 0.64])
    ran.clear()
    again = find_edge(quadratic, BASE, Variant("ssgd"), num_bisections=2, **options)
    assert ran == [pytest.approx(math.sqrt(0.4 * math.sqrt(0.4 * 0.64)))] * 2
    assert again.bracket[1] == first.bracket[1]
    stored = load_dataset(tmp_path / "edge-ssgd.nc")
    assert float(stored["edge"]) == again.edge
    assert stored["learning_rate"].values.tolist() == sorted(stored["learning_rate"].values)
    assert stored.attrs["variant"] == "ssgd"
    assert stored.attrs["task"] == "quadratic"
    assert (first.low, first.high) == (0.0, math.inf)  # two seeds tell no rate from one half
    assert edge_scorecard(first, BASE, Variant("ssgd"), 4.0)["verdict"].tolist() == ["inconclusive"] * 2


def test_matched_noise_brings_dpsgd_along(tiny_task: Task, tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, num_learners=2, num_steps=10, log_every=5)
    found = find_edge(tiny_task, config, Variant("ssgd-star", sigma0="matched"), low=0.1, high=0.3, seeds=[0], out=tmp_path, num_rates=2,
                      quiet=True)  # fmt: skip
    assert found.variant == "ssgd-star-matched"
    assert found.edge == -math.inf
    assert found.bracket == (0.0, 0.1)
    assert edge_scorecard(found, config, Variant("ssgd-star"), 4.0)["verdict"].tolist() == ["inconclusive"] * 2


def test_predictions_carry_the_error_of_lambda_max() -> None:
    empty = load_like()
    variant = Variant("dpsgd")
    config = dataclasses.replace(BASE, momentum=0.5, gamma=0.8, gamma_schedule="step:50:0.5")
    table = edge_scorecard(empty, config, variant, Estimate(4.0, 0.4), step=60)
    thresholds = learning_rate_thresholds(topology("ring", 4), "dpsgd", "awc", 0.5, gammas=(0.4, 0.8))
    names = ["mean", "disagreement", "smallest"]
    assert table["prediction"].tolist() == [f"{n} threshold / lambda_max" for n in names]
    np.testing.assert_allclose(table["predicted"][:2], [thresholds["mean"] / 4, thresholds["disagreement"] / 4])
    np.testing.assert_allclose(table["predicted_stderr"], 0.1 * table["predicted"])
    assert table["step"].tolist() == [60] * 3
    # thresholds that do not bind are upper bounds; one that never comes bounds nothing
    complete = dataclasses.replace(BASE, topology="complete")
    atc = edge_scorecard(empty, complete, Variant("dpsgd", "atc"), 4.0)
    assert atc["predicted"].tolist() == [0.5, math.inf, 0.5]
    assert atc["verdict"].tolist()[1] == "not applicable"


def load_like() -> Edge:
    import xarray as xr

    table = xr.Dataset({"num_seeds": ("learning_rate", [4, 4])}, coords={"learning_rate": [0.4, 0.6]})
    return Edge("dpsgd", 0.5, 0.4, 0.6, (0.4, 0.6), table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.5, "high": 0.5}, "low and high must be positive rates with low < high, not 0.5 and 0.5"),
        ({"low": 0.0, "high": 0.5}, "must be positive rates"),
        ({"low": 0.1, "high": math.inf}, "must be positive rates"),
        ({"low": 0.1, "high": 0.5, "num_rates": 1}, "at least 2 rates"),
        ({"low": 0.1, "high": 0.5, "seeds": []}, "1 seed"),
        ({"low": 0.1, "high": 0.5, "num_bisections": -1}, "not negative"),
    ],
)
def test_mistakes_are_explained(quadratic: Task, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_edge(quadratic, BASE, Variant("ssgd"), **{"seeds": [0], "out": tmp_path, "quiet": True, **options})
