from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import linregress

from landscape.theory.power_law import PowerLaw, power_law

X = np.logspace(-1, 1, 10)


def many(x: np.ndarray, exponent: float, scatter: float, count: int, seed: int = 0) -> list[PowerLaw]:
    rng = np.random.default_rng(seed)
    return [power_law(x, x**exponent * np.exp(scatter * rng.standard_normal(len(x)))) for _ in range(count)]


@pytest.mark.parametrize("exponent", [-2.0, 0.0, 1.0, 1.5, 2.0])
def test_exact_laws(exponent: float) -> None:
    law = power_law(X, 7 * X**exponent)
    assert (law.exponent, law.prefactor) == pytest.approx((exponent, 7), abs=1e-10)
    assert law.high - law.low < 1e-10
    assert (law.num_points, law.decades, law.verdict, law.reason) == (10, pytest.approx(2), "measured", "")
    assert law.r_squared == pytest.approx(1, abs=1e-10) or exponent == 0
    # units of x and y are of no consequence
    other = power_law(1e-12 * X, 1e30 * X**exponent)
    assert other.exponent == pytest.approx(exponent, abs=1e-9)


def test_a_constant_is_a_measured_exponent_of_zero() -> None:
    law = power_law(X, np.full(10, 3.0))
    assert (law.exponent, law.verdict) == (0.0, "measured")
    assert math.isnan(law.r_squared)


def test_against_scipy() -> None:
    law = many(X, 1.3, 0.5, 1)[0]
    y = X**1.3 * np.exp(0.5 * np.random.default_rng(0).standard_normal(10))
    found = linregress(np.log(X), np.log(y))
    assert law.exponent == pytest.approx(found.slope)
    assert law.stderr == pytest.approx(found.stderr)
    assert law.r_squared == pytest.approx(found.rvalue**2)
    assert law.prefactor == pytest.approx(math.exp(found.intercept))


@pytest.mark.parametrize("scatter", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("x", [X, np.logspace(0, 1, 6), 2.0 ** -np.arange(20)], ids=["10", "6", "20"])
def test_the_interval_covers_at_its_level(x: np.ndarray, scatter: float) -> None:
    laws = many(x, 1.5, scatter, 1000)
    covered = np.array([law.low <= 1.5 <= law.high for law in laws])
    assert abs(covered.mean() - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)
    # a wrong claim is rare, however noisy the data
    wrong = np.array([law.verdict == "measured" and not hit for law, hit in zip(laws, covered, strict=True)])
    assert wrong.mean() < 0.05 + 4 * math.sqrt(0.95 * 0.05 / 1000)


def test_the_interval_covers_for_scatter_of_variances_from_few_samples() -> None:
    """u^T Sigma_w u of 8 learners: chi-square with 7 degrees of freedom."""
    rng = np.random.default_rng(0)
    laws = [power_law(X, X**1.5 * rng.chisquare(7, 10) / 7) for _ in range(2000)]
    assert abs(np.mean([law.low <= 1.5 <= law.high for law in laws]) - 0.95) < 0.02


def test_pure_noise_is_inconclusive() -> None:
    for x in (X, np.logspace(0, 1, 20), np.logspace(0, 3, 8)):
        laws = many(x, 0.0, 2 * np.log(x).std(), 200)
        assert np.mean([law.verdict == "inconclusive" for law in laws]) > 0.99
        assert all(
            "scatters" in law.reason or "interval" in law.reason for law in laws if law.verdict == "inconclusive"
        )


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (X[:5], X[:5], "5 points, fewer than 6"),
        (X[:1], X[:1], "1 points"),
        (X[:0], X[:0], "no points"),
        (np.ones(8), np.arange(1.0, 9), "no range"),
        (np.linspace(1, 5, 10), np.linspace(1, 5, 10), "0.70 decades"),
        (np.append(np.linspace(1, 1.2, 9), 50.0), np.append(np.linspace(1, 1.2, 9), 50.0), "rests on one point"),
        (X, np.where(np.arange(10) < 2, 0.0, X), "2 of 10 values are not positive"),
        (X, np.where(np.arange(10) < 1, math.nan, X), "1 of 10 values"),
        (X, -X, "10 of 10 values"),
        (X, X * np.exp(3 * (-1.0) ** np.arange(10)), "more than 0.5"),
    ],
)
def test_reasons_to_be_inconclusive(x: np.ndarray, y: np.ndarray, reason: str) -> None:
    law = power_law(x, y)
    assert law.verdict == "inconclusive"
    assert reason in law.reason


def test_a_further_reason() -> None:
    law = power_law(X, X)
    assert law.with_reason("") is law
    more = law.with_reason("drifts")
    assert (more.verdict, more.reason, more.exponent) == ("inconclusive", "drifts", law.exponent)
    assert (
        power_law(X[:5], X[:5]).with_reason("drifts").reason
        == "5 points, fewer than 6; x ranges over 0.89 decades, less than 1; drifts"
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alike"):
        power_law(X, X[:3])
    for x in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive, finite x"):
            power_law(np.append(X, x), np.append(X, 1.0))


def test_labels() -> None:
    made = power_law(X, X**2).to_xarray()
    assert float(made["exponent"]) == pytest.approx(2)
    assert {"exponent_stderr", "exponent_low", "exponent_high", "exponent_verdict", "exponent_reason"} <= set(made)
    assert all({"long_name", "units"} <= set(v.attrs) for v in made.values())
