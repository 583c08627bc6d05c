import math

import numpy as np
import pytest
from scipy import stats

from landscape.statistics import Estimate, agreement, bound_verdict, estimate, newcombe_interval, ratio, wilson_interval


def test_estimate_is_mean_and_standard_error() -> None:
    samples = np.array([1.0, 2.0, 4.0, 7.0])
    found = estimate(samples)
    assert found.value == pytest.approx(3.5)
    assert found.stderr == pytest.approx(stats.sem(samples))
    assert found.count == 4
    assert math.isnan(estimate(np.array([1.0])).stderr)


def test_ratio_error_covers_a_simulation() -> None:
    generator = np.random.default_rng(0)
    numerators, denominators = generator.normal(3.0, 0.1, 200_000), generator.normal(2.0, 0.05, 200_000)
    predicted = ratio(Estimate(3.0, 0.1), Estimate(2.0, 0.05))
    spread = (numerators / denominators).std()
    assert predicted.value == 1.5
    assert predicted.stderr == pytest.approx(spread, rel=0.02)
    assert math.isnan(ratio(Estimate(1.0, 0.1), Estimate(-1.0, 0.1)).value)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 10), (3, 10), (5, 10), (10, 10), (7, 31), (99, 100)])
def test_wilson_interval_is_scipys(successes: int, trials: int) -> None:
    reference = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_interval_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_newcombe_interval_contains_the_difference_and_is_antisymmetric() -> None:
    low, high = newcombe_interval(8, 10, 3, 10)
    assert low < 0.5 < high
    assert newcombe_interval(3, 10, 8, 10) == pytest.approx((-high, -low))
    assert newcombe_interval(56, 70, 48, 80) == pytest.approx(
        (0.0524, 0.3339), abs=1e-4
    )  # Newcombe (1998), table II (a)


@pytest.mark.parametrize(
    ("measured", "predicted", "verdict"),
    [
        (Estimate(1.05, 0.01), Estimate(1.0), "agrees"),
        (Estimate(1.05, 0.2), Estimate(1.0), "inconclusive"),  # wide errors never agree
        (Estimate(1.5, 0.01), Estimate(1.0), "disagrees"),
        (Estimate(1.25, 0.05), Estimate(1.0), "inconclusive"),
        (Estimate(-1.05, 0.01), Estimate(-1.0), "agrees"),
        (Estimate(1.0, 0.01), Estimate(1.0, 0.5), "inconclusive"),  # the prediction's error counts too
        (Estimate(2.0, 0.0), Estimate(math.inf), "disagrees"),
        (Estimate(math.nan, 0.1), Estimate(1.0), "inconclusive"),
        (Estimate(0.0, 0.0), Estimate(0.0), "agrees"),
    ],
)
def test_agreement(measured: Estimate, predicted: Estimate, verdict: str) -> None:
    assert agreement(measured, predicted) == verdict


def test_a_bound_is_violated_only_beyond_the_error() -> None:
    assert bound_verdict(Estimate(1.1, 0.1), 1.0) == "holds"
    assert bound_verdict(Estimate(1.3, 0.1), 1.0) == "violated"
    assert bound_verdict(Estimate(1.3, 0.1), math.inf) == "not applicable"
