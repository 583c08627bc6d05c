"""How heavy the tail of the noise norm is, and the gradient noise scale from norms at two batch sizes; what a sample cannot tell is said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr
from jaxtyping import Float

from landscape.display import Displayed, Shown, number, sparkline
from landscape.statistics import Z95, Estimate

TailVerdict = Literal["heavy", "light", "undecided"]

LEAST = 10
"""Norms in the tail that an estimate takes at least."""


@dataclass(frozen=True, repr=False)
class TailIndex(Displayed):
    """Hill's estimate of the exponent alpha of P(X > x) ~ x^(-alpha), and whether the sample bears it out.

    Attributes:
        index: alpha from the largest `num_top` norms; inf where these are all equal.
        stderr: its standard error if the tail is a power law.
        num_top: k.
        num_samples: m.
        tried: (t,) other k, rising.
        tried_index: (t,) alpha from each; where a power law holds it is flat in k up to its errors.
        tried_stderr: (t,).
        plateau: the least and the largest of the k tried, next to `num_top` and each other, whose estimates agree with it within two standard errors.
        excess_variation: standard deviation over mean of what the k norms exceed the next one by: 1 for an exponential tail, whatever its scale and
            origin, more for a heavier one, less for a lighter.
        excess_z: (excess_variation - 1) sqrt(k), about normal under an exponential tail.
        drift_z: (1/alpha of the top quarter of the k, less 1/alpha), over its standard error under a power law. Negative: lighter further out.
        verdict: "heavy" if the tail is heavier than exponential and alpha does not drift, both at 95%; "light" if it is lighter than exponential; "undecided" otherwise, and
            then `index` is not to be read as an exponent.
    """

    index: float
    stderr: float
    num_top: int
    num_samples: int
    tried: np.ndarray
    tried_index: np.ndarray
    tried_stderr: np.ndarray
    plateau: tuple[int, int]
    excess_variation: float
    excess_z: float
    drift_z: float
    verdict: TailVerdict

    @property
    def estimate(self) -> Estimate:
        """The index with its error."""
        return Estimate(self.index, self.stderr, self.num_top)

    def shown(self) -> Shown:
        """The index with its error, and whether it is one."""
        return Shown(
            "TailIndex",
            [
                ("index", self.estimate, ""),
                ("norms in the tail", f"{self.num_top:,} of {self.num_samples:,}", ""),
                ("variation of the excess (1: exponential)", self.excess_variation, ""),
                ("drift", self.drift_z, "standard errors"),
                ("verdict", self.verdict, ""),
            ],
            [] if self.verdict == "heavy" else ["the index is not to be read as an exponent"],
            sparkline(self.tried_index, f"index from the largest {', '.join(map(str, self.tried))} norms"),
        )

    def to_xarray(self) -> xr.Dataset:
        """The index, and over num_top what else was tried."""
        return xr.Dataset(
            {
                "tail_index": ((), self.index, {"long_name": "Hill estimate of the tail exponent"}),
                "tail_index_stderr": ((), self.stderr, {"long_name": "standard error of tail_index under a power law"}),
                "tried_index": ("num_top", self.tried_index, {"long_name": "Hill estimate from the largest num_top norms"}),
                "tried_index_stderr": ("num_top", self.tried_stderr),
                "excess_variation": ((), self.excess_variation, {"long_name": "variation of the excess; 1 for an exponential tail"}),
                "excess_z": ((), self.excess_z),
                "drift_z": ((), self.drift_z),
            },
            coords={"num_top": self.tried},
            attrs={"chosen_num_top": self.num_top, "num_samples": self.num_samples, "plateau": list(self.plateau), "verdict": self.verdict},
        )  # fmt: skip


def tail_index(norms: Float[np.ndarray, " m"], num_top: int | None = None) -> TailIndex:
    r"""The exponent of the tail of noise norms, by Hill's estimator.

    With the norms descending and $u = X_{(k+1)}$ as the threshold,

    $$\hat\alpha_k = \frac{k - 1}{\sum_{i=1}^{k} \log X_{(i)}/u}$$

    is unbiased for an exact power law above u (Hill 1975, Ann. Stat. 3, 1163, with k - 1 for k), with standard deviation alpha/sqrt(k - 2). Any sample has
    such an estimate: a Gaussian vector's norm has one that grows as k falls, and norms that vary little have a large one.
    So the excess over u is held against an exponential tail by its coefficient of variation, and the estimate against the one of a quarter of the k. A tail that
    is heavier than exponential in the sample's range and no power law beyond (a log-normal) is found out only by large samples, and the approach to a power
    law that holds only far out biases the estimate beyond its error (2.75 for the norm of a Student vector of exponent 3 in ten dimensions).

    Args:
        norms: (m,) of independent noise vectors, positive; at least 40.
        num_top: k; a tenth of m by default, and 10 at least.

    >>> uniform = (np.arange(10000) + 0.5) / 10000
    >>> pareto = tail_index(uniform ** (-1 / 3))  # quantiles of P(X > x) = x^-3
    >>> round(pareto.index, 1), pareto.verdict
    (3.0, 'heavy')
    >>> tail_index(np.sqrt(-np.log(uniform))).verdict  # the norm of a Gaussian vector in the plane
    'light'
    """
    values = np.sort(np.asarray(norms, dtype=np.float64))[::-1]
    count = len(values)
    if count < 4 * LEAST:
        raise ValueError(f"a tail index needs at least {4 * LEAST} norms, not {count}")
    k = max(LEAST, count // 10) if num_top is None else num_top
    if not LEAST <= k <= count // 2:
        raise ValueError(
            f"num_top must be between {LEAST} and half of the {count} norms, not {k}: beyond that it is no tail"
        )
    if not np.isfinite(values).all() or values[max(k, count // 4)] <= 0:
        raise ValueError("norms must be finite, and positive in the tail: draws without noise have no tail")
    tried = np.unique(np.geomspace(LEAST, count // 4, 25).astype(int))
    inverse = np.array([_inverse_index(values, int(j)) for j in tried])
    own = _inverse_index(values, k)
    near = np.abs(inverse - own) <= 2 * own * np.sqrt(np.abs(1 / tried - 1 / k))
    quarter = max(3, k // 4)
    drift = (_inverse_index(values, quarter) - own) / (own * math.sqrt(1 / quarter - 1 / k)) if own > 0 else 0.0
    excess = values[:k] - values[k]
    variation = float(excess.std(ddof=1) / excess.mean()) if excess.mean() > 0 else 0.0
    z = (variation - 1) * math.sqrt(k)
    verdict: TailVerdict = "undecided"
    if z < -Z95:
        verdict = "light"
    elif z > Z95 and abs(drift) < Z95:
        verdict = "heavy"
    index, stderr = _index(own, k)
    others = [_index(x, int(j)) for x, j in zip(inverse, tried, strict=True)]
    return TailIndex(
        index, stderr, k, count, tried, np.array([a for a, _ in others]), np.array([e for _, e in others]),
        _around(tried, near, k), variation, z, float(drift), verdict,
    )  # fmt: skip


def _inverse_index(values: np.ndarray, k: int) -> float:
    """1/alpha, unbiased."""
    return float(np.log(values[:k] / values[k]).mean())


def _index(inverse: float, k: int) -> tuple[float, float]:
    index = (k - 1) / (k * inverse) if inverse > 0 else math.inf
    return index, index / math.sqrt(k - 2) if math.isfinite(index) else math.nan


def _around(tried: np.ndarray, near: np.ndarray, k: int) -> tuple[int, int]:
    low = high = k
    for j, agrees in zip(tried[tried <= k][::-1], near[tried <= k][::-1], strict=True):
        if not agrees:
            break
        low = int(j)
    for j, agrees in zip(tried[tried >= k], near[tried >= k], strict=True):
        if not agrees:
            break
        high = int(j)
    return low, high


# Noise scale -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class NoiseScale(Displayed):
    """B_simple = Tr(C)/|g|^2 with both parts unbiased, and an interval for their ratio.

    Attributes:
        trace: Tr C.
        gradient_norm_squared: |g|^2; unbiased, so it may come out negative.
        value: their ratio, biased by the denominator's error; nan where this is not positive.
        stderr: of the ratio to first order; not to be used where `significant` is False.
        low: lower end of the 95% interval (Fieller 1954), cut at 0.
        high: upper end; inf where |g|^2 is not significantly positive.
        significant: whether |g|^2 exceeds 0 by its 95% interval. Where not, no upper bound of the ratio is known.
        small_batch: of the first norms.
        large_batch: of the second.
    """

    trace: Estimate
    gradient_norm_squared: Estimate
    value: float
    stderr: float
    low: float
    high: float
    significant: bool
    small_batch: int
    large_batch: int

    def shown(self) -> Shown:
        """The ratio with its interval, and both parts."""
        return Shown(
            "NoiseScale",
            [
                ("Tr C", self.trace, "gradient^2"),
                ("|g|^2", self.gradient_norm_squared, "gradient^2"),
                ("noise scale", Estimate(self.value, self.stderr), "examples"),
                ("95% interval", f"{number(self.low)} to {number(self.high)}", "examples"),
            ],
            []
            if self.significant
            else ["|g|^2 is not significantly positive: the noise scale has no known upper bound"],
        )

    def to_xarray(self) -> xr.Dataset:
        """Both parts with errors, the ratio with its interval."""
        return xr.Dataset(
            {
                "trace": ((), self.trace.value, {"long_name": "Tr C", "units": "gradient^2"}),
                "trace_stderr": ((), self.trace.stderr),
                "gradient_norm_squared": ((), self.gradient_norm_squared.value, {"long_name": "|g|^2", "units": "gradient^2"}),
                "gradient_norm_squared_stderr": ((), self.gradient_norm_squared.stderr),
                "noise_scale": ((), self.value, {"long_name": "Tr(C)/|g|^2", "units": "examples"}),
                "noise_scale_stderr": ((), self.stderr, {"long_name": "standard error of noise_scale to first order"}),
                "noise_scale_low": ((), self.low, {"long_name": "lower end of the 95% interval (Fieller)"}),
                "noise_scale_high": ((), self.high, {"long_name": "upper end of the 95% interval (Fieller)"}),
                "significant": ((), self.significant, {"long_name": "whether |g|^2 is significantly positive"}),
            },
            attrs={"small_batch": self.small_batch, "large_batch": self.large_batch, "num_samples": self.trace.count},
        )  # fmt: skip


def noise_scale_from_norms(
    small_squared: Float[np.ndarray, " a"],
    large_squared: Float[np.ndarray, " b"],
    *,
    small_batch: int,
    large_batch: int,
    paired: bool,
    population: int | None = None,
) -> NoiseScale:
    r"""The gradient noise scale from squared gradient norms at two batch sizes (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

    As $E|g_B|^2 = |g|^2 + \phi_B \mathrm{tr}\, C$ with $\phi_B = 1/B$ (or $(1/B)(N - B)/(N - 1)$ for batches without replacement), two sizes give

    $$\mathrm{tr}\, C = \frac{E|g_b|^2 - E|g_B|^2}{\phi_b - \phi_B}, \qquad
      |g|^2 = \frac{\phi_b E|g_B|^2 - \phi_B E|g_b|^2}{\phi_b - \phi_B},$$

    linear in the means and so unbiased. The ratio is taken of the means, never averaged over draws; its interval is that of all ratios theta for which Tr C -
    theta |g|^2 is compatible with 0.

    Args:
        small_squared: (a,) |g_b|^2 of independent draws.
        large_squared: (b,) |g_B|^2.
        small_batch: b.
        large_batch: B.
        paired: whether draw i of both shares data (a learner's gradient, or the mean of all learners' |g_b|^2, beside that of the averaged gradient), so
            that their covariance counts; otherwise both are independent.
        population: N for batches drawn without replacement; None with replacement.

    Raises:
        ValueError: sizes that are not two, fewer than two draws, paired draws of different number.
    """
    small, large = np.asarray(small_squared, dtype=np.float64), np.asarray(large_squared, dtype=np.float64)
    if not 0 < small_batch < large_batch:
        raise ValueError(f"batch sizes {small_batch} and {large_batch}: the first must be smaller, and positive")
    if min(len(small), len(large)) < 2 or (paired and len(small) != len(large)):
        raise ValueError(f"{len(small)} and {len(large)} norms: errors need two draws of each, and paired ones as many of both")  # fmt: skip
    phi, psi = _share(small_batch, population), _share(large_batch, population)
    covariance = np.cov(small, large) / len(small) if paired else np.diag([small.var(ddof=1) / len(small), large.var(ddof=1) / len(large)])  # fmt: skip
    weights = np.array([[1.0, -1.0], [-psi, phi]]) / (phi - psi)
    trace, norm = (float(v) for v in weights @ [small.mean(), large.mean()])
    errors = weights @ covariance @ weights.T
    a, b, both = float(errors[0, 0]), float(errors[1, 1]), float(errors[0, 1])
    count = min(len(small), len(large))
    value, stderr = math.nan, math.nan
    if norm > 0:
        value = trace / norm
        stderr = math.sqrt(max(0.0, a - 2 * value * both + value**2 * b)) / norm
    low, high = _fieller(trace, norm, a, b, both)
    return NoiseScale(
        Estimate(trace, math.sqrt(a), count), Estimate(norm, math.sqrt(b), count), value, stderr, low, high,
        norm > Z95 * math.sqrt(b), small_batch, large_batch,
    )  # fmt: skip


def _share(batch: int, population: int | None) -> float:
    if population is None:
        return 1 / batch
    if batch > population:
        raise ValueError(f"a batch of {batch} cannot be drawn without replacement from {population}")
    return (population - batch) / (population - 1) / batch


def _fieller(top: float, bottom: float, a: float, b: float, both: float) -> tuple[float, float]:
    """The theta >= 0 with (top - theta bottom)^2 <= z^2 (a - 2 theta both + theta^2 b): the least, and the largest, inf where it is unbounded."""
    square = bottom**2 - Z95**2 * b
    half = top * bottom - Z95**2 * both
    rest = top**2 - Z95**2 * a
    root = math.sqrt(max(0.0, half**2 - square * rest))
    if bottom > 0 and square > 0:
        return max(0.0, (half - root) / square), max(0.0, (half + root) / square)
    if rest <= 0 or square >= 0:  # 0 is among them
        return 0.0, math.inf
    return max(0.0, (half - root) / square), math.inf  # the outside of an interval whose lower end is negative
