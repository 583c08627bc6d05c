"""The summary's words hang on the numbers, on either side of where they turn, and any run has some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from landscape.plotting.words import summarise
from tests.plotting.made import made_view, rates, steepness


def said(*views: Any) -> str:
    return "\n".join(summarise(views))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "converged: a median training loss of 0.25 over the last 50 steps, below the threshold of 0.7; at the end the averaged model is right on 50.0%"),
        ({"outcome": {"outcome": "slow", "median_last_train_loss": 1.5}}, "did not converge in 100 steps: a median training loss of 1.5"),
        ({"outcome": {"outcome": "stuck", "median_last_train_loss": 2.31}}, "is no better than constant output (2.3)"),
        ({"num_steps": 20}, "ended after 20 steps, too few to judge it by its last 50, with a median training loss of 0.25; at the end"),
        ({"num_steps": 50}, "converged: a median training loss of 0.25 over the last 50 steps"),
        ({"status": "diverged", "outcome": {"outcome": "non-finite", "step": 17}, "record": {"diverged_at": 17}}, "diverged: its loss or a gradient was not finite at step 17 of 100"),
        ({"status": "running", "outcome": None}, "is not finished (running, logged up to step 100 of 100)"),
        ({"status": "interrupted", "outcome": None, "log": []}, "is not finished (interrupted, logged up to step 0 of 100)"),
        ({"status": "imported", "outcome": None, "log": [], "record": {"imported": {"format": "DeepSpeed", "from": ["/x/y"]}}},
         "was imported from DeepSpeed files, with no checkpoints; how its training went is not on record"),
        ({"status": "recorded", "outcome": None, "log": []}, "was recorded by its own training program"),
    ],
)  # fmt: skip
def test_how_a_run_ended(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    text = said(made_view(tmp_path, **changes))
    assert text.startswith("DPSGD ")
    assert words in text
    assert "DPSGD was not measured" in text


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    text = said(made_view(tmp_path, status="imported", outcome=None, record={"assumed": ["learning_rate", "topology"]}))
    assert "nobody told learning rate and topology" in text


Z = 2.5758  # of 0.05 shared among five checkpoints, both sides


@pytest.mark.parametrize(
    ("means", "stderr", "words"),
    [
        ([0.5, 1, 1, 1, 1], 0.01, "below 1 at 1 of 5 checkpoints, lowest 0.500 ± 0.010 at step 0; back within 20% of 1 at the last"),
        ([0.5, 0.6, 0.7, 0.7, 0.7], 0.01, "below 1 at 5 of 5 checkpoints, lowest 0.500 ± 0.010 at step 0; still more than 20% below 1 at the last"),
        ([0.5, 0.6, 0.7, 0.7, 1.5], 0.01, "; more than 20% above 1 at the last"),
        ([0.5, 0.6, 0.7, 0.7, 0.8], 0.01, "; not to be told whether it is back at the last"),
        ([1, 1, 1, 1, 0.5], 0.01, "lowest at the last, 0.500 ± 0.010 at step 40"),
        ([0.9, 1, 1, 1, 1], 0.01, "never by more than 20% (lowest 0.900 ± 0.010 at step 0)"),
        ([-0.5, 1, 1, 1, 1], 0.01, "a step against the gradient"),
        ([-0.02, 1, 1, 1, 1], 0.01, "lowest −0.020 ± 0.010 at step 0; back"),  # not surely negative
        ([1 - (Z - 0.01) * 0.1, 1, 1, 1, 1], 0.1, "nowhere clearly below 1"),
        ([1 - (Z + 0.01) * 0.1, 1, 1, 1, 1], 0.1, "below 1 at 1 of 5"),
        ([0.5, 1, 1, 1, 1], float("nan"), "nowhere clearly below 1"),  # one draw has no error, so it shows nothing
        ([1.5, 1, 1, 1, 1], 0.01, "nowhere clearly below 1 (lowest 1.000 ± 0.010 at step 10), and above it at 1"),
        ([0.5], 0.01, "0.500 ± 0.010 at step 0, lowered"),
        ([1.0], 0.01, "not to be told from 1"),
    ],
)  # fmt: skip
def test_the_effective_learning_rate(tmp_path: Path, means: list[float], stderr: float, words: str) -> None:
    assert words in said(
        made_view(tmp_path, groups={"effective-learning-rate": rates([float(m) for m in means], stderr)})
    )


def test_a_rate_that_is_not_lowered_is_rarely_called_so() -> None:
    """Of five checkpoints where nothing is lowered, some is called lowered in 1/40 of all runs: 4000 runs, four standard errors."""
    from landscape.plotting.words import _rate

    draws = 1 + 0.1 * np.random.default_rng(0).standard_normal((4000, 5))
    share = np.mean(["below 1" in _rate(rates(list(row), 0.1)).replace("clearly below 1", "") for row in draws])
    expected = 1 - (1 - 0.005) ** 5
    assert abs(share - expected) < 4 * np.sqrt(expected / 4000)


def noise(minibatch: list[float], landscape: list[float]) -> xr.Dataset:
    count = len(minibatch)
    zeros = np.zeros(count)
    names = {"Delta_S_mean": minibatch, "Delta_2_mean": landscape, "Delta_S_stderr": zeros, "Delta_S_predicted": minibatch,
             "consensus_trace": zeros, "consensus_trace_predicted": zeros}  # fmt: skip
    return xr.Dataset({k: ("step", v) for k, v in names.items()}, coords={"step": 10 * np.arange(count)})


def test_the_share_of_landscape_noise(tmp_path: Path) -> None:
    text = said(made_view(tmp_path, groups={"noise": noise([3.0, 1.0], [1.0, 3.0])}))
    assert "Δ₂/(Δ_S + Δ₂): DPSGD: 25% to 75% (most at step 10)." in text
    assert "Δ₂): DPSGD: none." in said(made_view(tmp_path, groups={"noise": noise([3.0, 1.0], [0.0, 0.0])}))


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (steepness([0.5, 1.5], [0.5, 1.5]), "average weights? DPSGD: yes at 1 of 2 checkpoints (αλ/2 is at most 1.5, limit 1)"),
        (steepness([0.5, 0.9], [0.5, 0.9]), "average weights? DPSGD: no (αλ/2 is at most 0.9, limit 1)"),
        (steepness([0.5, 0.9], [0.4, 0.7]), "that without: DPSGD: 0.778 to 0.8, smoother at every checkpoint"),
        (steepness([1.0, 1.0], [1.2, 1.3]), "1.2 to 1.3, sharper at every checkpoint"),
        (steepness([1.0], [1.2]), "1.2, sharper."),
        (steepness([1.0, 1.0], [1.05, 1.3]), "1.05 to 1.3, not the same everywhere"),
        (steepness([1.0, 1.0], [0.95, 0.99]), "0.95 to 0.99, hardly smoother"),
        (steepness([1.0, 1.0], [0.5, 1.5]), "0.5 to 1.5, not the same everywhere"),
        (steepness([1, 1], [1, 1], [0.9, 1.2]), "feed itself? DPSGD: yes at 1 of 2 checkpoints (largest factor 1.2 a step)"),
        (steepness([1, 1], [1, 1], [0.9, 0.8]), "feed itself? DPSGD: not seen at 2 checkpoints (largest factor 0.9 a step)"),
        (steepness([1, 1], [1, 1], [0.9, 1.2], converged=False), "yes at 1 of 2 checkpoints (largest factor 1.2 a step), undecided at 1"),
    ],
)  # fmt: skip
def test_steepness_growth_and_smoothing(tmp_path: Path, at: xr.Dataset, words: str) -> None:
    assert words in said(made_view(tmp_path, groups={"stability": at, "smoothing": xr.Dataset(coords={"step": []})}))


def test_predictions_are_counted_and_those_that_fail_are_named(tmp_path: Path) -> None:
    good = made_view(tmp_path, groups={"effective-learning-rate": rates([1.0, 1.01])})
    assert "within 20%: DPSGD: 1 of 1 prediction holds." in said(good)
    bad = made_view(tmp_path, groups={"effective-learning-rate": rates([2.0, 2.0])})
    assert "0 of 1 prediction hold, 1 fails (E α_e / α by learners' kernel (exact))." in said(bad)
    mixed = made_view(tmp_path, groups={"effective-learning-rate": rates([2.0, 1.0])})
    assert "0 of 1 prediction hold, 1 at some checkpoints only." in said(mixed)
    wide = made_view(tmp_path, groups={"effective-learning-rate": rates([1.0, 1.0], 0.5)})
    assert "1 not to be told for the errors" in said(wide)


def test_several_runs_have_a_line_each_and_a_caution(tmp_path: Path) -> None:
    one = made_view(tmp_path, groups={"effective-learning-rate": rates([0.5, 1.0])})
    other = made_view(
        tmp_path, algorithm="ssgd", outcome={"outcome": "stuck", "median_last_train_loss": 2.4}, learning_rate=1.0
    )
    first, *rest = summarise([one, other])
    assert first.splitlines()[0] == "How the runs ended:"
    assert [line.split()[0] for line in first.splitlines()[1:]] == ["DPSGD", "SSGD"]
    assert any(line.startswith("So few runs do not show") for line in rest)
    assert any("differ in learning rate (0.5, 1)" in line for line in rest)
    assert any(line.startswith("SSGD was not measured") for line in rest)
    alike = made_view(tmp_path, algorithm="ssgd")
    assert not any("So few" in line or "differ in" in line for line in summarise([one, alike]))


def test_a_measure_without_checkpoints_says_nothing(tmp_path: Path) -> None:
    empty = rates([0.5]).isel(step=slice(0, 0))
    assert len(summarise([made_view(tmp_path, groups={"effective-learning-rate": empty})])) == 1
