"""Where each algorithm fails: the edge of every seed on a grid of learning rates, and what a few seeds say about it and about differences.

An edge of one seed is known to lie in a bracket: between the largest rate that converged and the next rate that was tried, (0, first) where
none converged and [last, inf) where all did. Nothing is claimed beyond the bracket. Rates below the largest that converged may have failed, too
(too slow, or by chance): these are counted, and the edge stays above the largest that converged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import binom, binomtest

LEVEL = 0.95


@dataclass(frozen=True)
class Edges:
    """The edges of one algorithm at one batch size.

    Attributes:
        low: (seeds,) largest rate that converged, 0 where none did.
        high: (seeds,) next larger rate tried, inf where there is none.
        num_below: (seeds,) failures at rates below `low`.
    """

    low: np.ndarray
    high: np.ndarray
    num_below: np.ndarray

    @property
    def median(self) -> tuple[float, float]:
        """Bracket of the median over seeds: between the median of the lower ends and that of the upper ones (both of the middle two, if even)."""
        middle = (len(self.low) - 1) // 2, len(self.low) // 2
        return float(np.sort(self.low)[middle[0]]), float(np.sort(self.high)[middle[1]])

    @property
    def last_converged(self) -> float:
        """Median over seeds of the largest rate that converged (the lower of the middle two, if even); 0 if none."""
        return self.median[0]


@dataclass(frozen=True)
class MedianInterval:
    """An interval for the median of the distribution over seeds, from order statistics.

    Attributes:
        low: lower end, counting the bracket's.
        high: upper end.
        coverage: at least this, whatever the distribution; below 95% where the seeds are too few for more (75% with three).
    """

    low: float
    high: float
    coverage: float


@dataclass(frozen=True)
class Difference:
    """An algorithm's edge over another's, seed by seed.

    Attributes:
        num_larger: seeds whose edge is surely larger: their brackets do not overlap.
        num_equal: seeds whose brackets are the same, or overlap.
        num_smaller: surely smaller.
        p_value: of the two-sided sign test over the seeds that differ; 1 where none does. Three seeds cannot go below 0.25.
        median: bracket of the median ratio.
        interval: for the median ratio, from order statistics.
    """

    num_larger: int
    num_equal: int
    num_smaller: int
    p_value: float
    median: tuple[float, float]
    interval: MedianInterval


def edges(rates: np.ndarray, converged: np.ndarray) -> Edges:
    """Brackets of the edge of every seed.

    Args:
        rates: (rates,) rising.
        converged: (rates, seeds) booleans.

    >>> found = edges(np.array([0.1, 0.2, 0.4]), np.array([[1, 1, 0], [1, 1, 0], [0, 1, 0]], dtype=bool))
    >>> found.low.tolist(), found.high.tolist()
    ([0.2, 0.4, 0.0], [0.4, inf, 0.1])
    """
    rates, converged = np.asarray(rates, dtype=float), np.asarray(converged, dtype=bool)
    if converged.ndim != 2 or len(rates) != len(converged) or not converged.shape[1]:
        raise ValueError(
            f"outcomes must be (rates, seeds) with a row for each of {len(rates)} rates, not {converged.shape}"
        )
    if len(rates) == 0 or not all(a < b for a, b in pairwise(rates)) or not rates[0] > 0:
        raise ValueError(f"rates must be positive and rise, not {rates.tolist()}")
    order = np.arange(len(rates))[:, None]
    last = np.where(converged, order, -1).max(0)
    ends = np.concatenate([[0.0], rates, [math.inf]])
    below = ((order < last) & ~converged).sum(0)
    return Edges(ends[last + 1], ends[last + 2], below)


def median_interval(low: np.ndarray, high: np.ndarray, level: float = LEVEL) -> MedianInterval:
    """The shortest symmetric pair of order statistics that covers the median at `level`, or the extremes where no pair does.

    Args:
        low: lower ends of the seeds' brackets.
        high: upper ends.
        level: of coverage.

    >>> median_interval(np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0]))
    MedianInterval(low=1.0, high=8.0, coverage=0.75)
    """
    count = len(low)
    rank = 0
    while _coverage(count, rank + 1) >= level:
        rank += 1
    return MedianInterval(float(np.sort(low)[rank]), float(np.sort(high)[count - 1 - rank]), _coverage(count, rank))


def difference(edge: Edges, other: Edges, level: float = LEVEL) -> Difference:
    """`edge` over `other`, paired by seed: same initial weights, same data order, same rates.

    A ratio's bracket runs from edge.low/other.high to edge.high/other.low; it is open where the grid does not hold an edge. Edges that share a
    bracket count as equal for the sign test, and their ratio's bracket is one step of the grid down to one up.
    """
    if len(edge.low) != len(other.low):
        raise ValueError(f"edges of {len(edge.low)} seeds cannot be paired with those of {len(other.low)}")
    larger, smaller = int((edge.low >= other.high).sum()), int((edge.high <= other.low).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(np.isinf(other.high), 0.0, edge.low / other.high)
        high = np.where(other.low == 0, math.inf, edge.high / other.low)
    decided = larger + smaller
    return Difference(
        larger, len(edge.low) - decided, smaller, float(binomtest(larger, decided).pvalue) if decided else 1.0,
        Edges(low, high, np.zeros(len(low), dtype=int)).median, median_interval(low, high, level),
    )  # fmt: skip


def _coverage(count: int, rank: int) -> float:
    """That of the order statistics `rank` from below and above (0: the extremes)."""
    return float(1 - 2 * binom.cdf(rank, count, 0.5))
