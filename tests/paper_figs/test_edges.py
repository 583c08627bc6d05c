"""Edges on grids with known answers; intervals cover what they say; pairing finds differences and no more."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from paper_figs.studies import edges as module
from paper_figs.studies.edges import Edges, difference, edges, median_interval

RATES = np.array([0.1, 0.2, 0.4, 0.8])


def converged(*columns: str) -> np.ndarray:
    """(rates, seeds) from one text a seed: c where it converged."""
    return np.array([[letter == "c" for letter in column] for column in columns]).T


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("column", "low", "high", "below"),
    [
        ("ccss", 0.2, 0.4, 0),
        ("cccc", 0.8, math.inf, 0),
        ("ssss", 0.0, 0.1, 0),
        (
            "scsc",
            0.8,
            math.inf,
            2,
        ),  # not monotone: the edge stays above the largest that converged, the failures are counted
        ("sccs", 0.4, 0.8, 1),  # too slow at the smallest rate
        ("csss", 0.1, 0.2, 0),
    ],
)
def test_brackets_of_one_seed(column: str, low: float, high: float, below: int) -> None:
    found = edges(RATES, converged(column))
    assert (found.low[0], found.high[0], found.num_below[0]) == (low, high, below)
    assert found.median == (low, high)


def test_the_median_is_that_of_the_ends() -> None:
    assert edges(RATES, converged("cccs", "csss", "ccss")).median == (0.2, 0.4)
    assert edges(RATES, converged("cccc", "ssss", "ssss")).median == (0.0, 0.1)
    assert edges(RATES, converged("cccc", "csss")).median == (
        0.1,
        math.inf,
    )  # of an even number, both of the middle two
    assert edges(RATES, converged("cccc", "ssss", "cccc")).last_converged == 0.8


@pytest.mark.parametrize("bad", [np.array([0.2, 0.1, 0.4, 0.8]), np.array([0.0, 0.1, 0.2, 0.4]), RATES[:3]])
def test_grids_that_are_none(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rates"):
        edges(bad, converged("ccss"))


@pytest.mark.parametrize(
    ("count", "coverage"), [(1, 0.0), (2, 0.5), (3, 0.75), (5, 0.9375), (6, 0.96875), (9, 0.9609375)]
)
def test_order_statistics_state_their_coverage(count: int, coverage: float) -> None:
    found = median_interval(np.arange(1.0, count + 1), np.arange(2.0, count + 2))
    assert found.coverage == pytest.approx(coverage)
    assert found.low == (2 if count == 9 else 1)


@pytest.mark.parametrize("count", [3, 6, 9])
def test_intervals_of_bracketed_edges_cover_the_median(count: int) -> None:
    """Over many studies with edges drawn from a continuous law the interval holds its median at least as often as it says."""
    generator = np.random.default_rng(count)
    grid = np.geomspace(0.05, 6.4, 8)
    hits, trials = 0, 4000
    stated = 0.0
    for _ in range(trials):
        true = np.exp(generator.normal(math.log(0.7), 0.6, count))  # median 0.7
        found = edges(grid, grid[:, None] <= true[None, :])
        between = median_interval(found.low, found.high)
        hits += between.low <= 0.7 <= between.high
        stated = between.coverage
    assert hits / trials > stated - 4 * math.sqrt(stated * (1 - stated) / trials)


def test_differences_are_paired() -> None:
    larger = difference(
        edges(RATES, converged("cccs", "ccss", "cccs")), edges(RATES, converged("ccss", "csss", "cccs"))
    )
    assert (larger.num_larger, larger.num_equal, larger.num_smaller) == (2, 1, 0)
    assert larger.p_value == 0.5  # of two seeds that differ, both up
    assert larger.median == pytest.approx((1.0, 4.0))
    assert (larger.interval.low, larger.interval.high, larger.interval.coverage) == pytest.approx((0.5, 4.0, 0.75))
    turned = difference(
        edges(RATES, converged("ccss", "csss", "cccs")), edges(RATES, converged("cccs", "ccss", "cccs"))
    )
    assert (turned.num_larger, turned.num_smaller) == (0, 2)
    assert turned.median == pytest.approx((0.25, 1.0))


@pytest.mark.parametrize("column", ["cccc", "ssss"])
def test_edges_beyond_the_grid_say_nothing_of_their_ratio(column: str) -> None:
    same = edges(RATES, converged(column, column, column))
    found = difference(same, same)
    assert (found.num_larger, found.num_equal, found.num_smaller, found.p_value) == (0, 3, 0, 1.0)
    assert found.median == (0.0, math.inf)
    other = edges(RATES, converged("ccss", "ccss", "ccss"))
    assert difference(edges(RATES, converged("cccc", "cccc", "cccc")), other).median == (2.0, math.inf)
    assert difference(other, edges(RATES, converged("ssss", "ssss", "ssss"))).median == (2.0, math.inf)


def test_the_sign_test_is_exact_and_holds_its_level() -> None:
    first, second = edges(RATES, converged(*["cccs"] * 6)), edges(RATES, converged(*["ccss"] * 6))
    assert difference(first, second).p_value == pytest.approx(2 / 64)
    generator = np.random.default_rng(0)
    grid = np.geomspace(0.05, 6.4, 8)
    rejected = 0
    for _ in range(1000):
        a, b = (edges(grid, grid[:, None] <= np.exp(generator.normal(-0.4, 0.6, 6))[None, :]) for _ in range(2))
        rejected += difference(a, b).p_value < 0.05
    assert rejected / 1000 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 1000)


def test_seeds_must_pair() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(edges(RATES, converged("ccss")), edges(RATES, converged("ccss", "ccss")))
    with pytest.raises(ValueError, match="rates, seeds"):
        edges(RATES, np.zeros((4, 0), dtype=bool))
    assert isinstance(edges(RATES, converged("ccss")), Edges)
