"""Error bars: means, ratios, proportions and the verdicts they allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""

Verdict = Literal["agrees", "disagrees", "inconclusive", "holds", "violated", "not applicable"]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and the count it rests on (draws, probes or seeds; 0 stderr means exact)."""

    value: float
    stderr: float = 0.0
    count: int = 1

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return format(self.value, spec) if self.stderr == 0 else f"{self.value:{spec}} ± {self.stderr:.2g}"


def estimate(samples: np.ndarray) -> Estimate:
    """Mean of independent samples and its standard error (nan for fewer than two)."""
    samples = np.asarray(samples, dtype=np.float64)
    count = len(samples)
    error = float(samples.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return Estimate(float(samples.mean()), error, count)


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Ratio of independent estimates, its error to first order; nan for a denominator that is not positive."""
    if not denominator.value > 0:
        return Estimate(math.nan, math.nan, numerator.count)
    value = numerator.value / denominator.value
    error = math.hypot(numerator.stderr, value * denominator.stderr) / denominator.value
    return Estimate(value, error, numerator.count)


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927).

    >>> [round(p, 3) for p in wilson_interval(0, 10)]
    [0.0, 0.278]
    """
    if trials == 0:
        return 0.0, 1.0
    share, zz = successes / trials, z * z
    centre = (share + zz / (2 * trials)) / (1 + zz / trials)
    half = z / (1 + zz / trials) * math.sqrt(share * (1 - share) / trials + zz / (4 * trials**2))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return max(0.0, low), min(1.0, high)


def newcombe_interval(successes: int, trials: int, other_successes: int, other_trials: int) -> tuple[float, float]:
    """95% interval of a difference of two proportions, from their Wilson intervals (Newcombe 1998, method 10).

    >>> [round(p, 3) for p in newcombe_interval(10, 10, 0, 10)]
    [0.608, 1.0]
    """
    p, q = successes / trials, other_successes / other_trials
    (low_p, high_p), (low_q, high_q) = (
        wilson_interval(successes, trials),
        wilson_interval(other_successes, other_trials),
    )
    gap = p - q
    return gap - math.hypot(p - low_p, high_q - q), gap + math.hypot(high_p - p, q - low_q)


def agreement(measured: Estimate, predicted: Estimate, tolerance: float = 0.2) -> Verdict:
    """Whether a prediction held (theory.md sec. 8).

    "agrees" only if the 95% interval of measured - predicted, errors of both combined, lies inside +- tolerance times the
    prediction; "disagrees" if it lies outside that band; else "inconclusive": wide errors never agree.
    """
    numbers = (measured.value, measured.stderr, predicted.value, predicted.stderr)
    if math.isinf(predicted.value) and math.isfinite(measured.value):
        return "disagrees"
    if not all(map(math.isfinite, numbers)):
        return "inconclusive"
    band = tolerance * abs(predicted.value)
    half = Z95 * math.hypot(measured.stderr, predicted.stderr)
    gap = abs(measured.value - predicted.value)
    if gap + half <= band:
        return "agrees"
    return "disagrees" if gap - half > band else "inconclusive"


def bound_verdict(measured: Estimate, bound: float) -> Verdict:
    """Whether an upper bound held; "violated" only beyond the 95% interval of the measurement."""
    if not (math.isfinite(measured.value) and math.isfinite(bound)):
        return "not applicable"
    return "violated" if measured.value - Z95 * measured.stderr > bound else "holds"
