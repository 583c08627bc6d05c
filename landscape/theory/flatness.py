"""Variance against flatness along a trajectory, and the average-direction sharpness of the learners (theory.md sec. 3, 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape.curvature.low_rank import SampleCovarianceOperator
from landscape.curvature.vectors import inner
from landscape.display import Displayed, Shown, number, sparkline
from landscape.objective import Objective
from landscape.statistics import Estimate
from landscape.theory.power_law import PowerLaw, power_law

MIN_EFFECTIVE_SAMPLES = 10
"""Of a direction whose variance is to count as settled: its standard error is then below a half."""

MIN_SETTLED = 0.5
"""Share of the variance in view that settled directions must hold for the stretch to pass as stationary."""


@dataclass(frozen=True, repr=False)
class VarianceFlatness(Displayed):
    """Variance and flatness along the principal directions of a trajectory.

    Attributes:
        variance: (k,) sigma_i^2 along p_i, falling; weights squared.
        variance_stderr: (k,) sigma_i^2 (2/T_i)^(1/2), T_i effective samples.
        effective_samples: (k,) T_i = T (1 - r^2)/(1 + r^2), r the lag-one correlation along p_i.
        flatness: (k,) F_i, the width of the interval about the mean point within which L <= e L(mean); weights. Where censored, what of
            it lies within reach: a lower bound.
        flatness_error: (k,) half the width of the brackets of its ends.
        censored: (k,) whether L stays at or below e L(mean) as far as `reach` on either side.
        law: of sigma_i^2 on 1/F_i^2, over settled, uncensored directions: sigma^2 ~ (F^-2)^(psi/2).
        directions: (d, k) p_i.
        loss: L at the mean point.
        explained: share of the trajectory's variance along the k directions.
        reach: how far was looked.
        num_values: losses evaluated.
    """

    variance: np.ndarray
    variance_stderr: np.ndarray
    effective_samples: np.ndarray
    flatness: np.ndarray
    flatness_error: np.ndarray
    censored: np.ndarray
    law: PowerLaw
    directions: Tensor
    loss: float
    explained: float
    reach: float
    num_values: int

    @property
    def settled(self) -> np.ndarray:
        """(k,) whether a direction has MIN_EFFECTIVE_SAMPLES."""
        return self.effective_samples >= MIN_EFFECTIVE_SAMPLES

    @property
    def psi(self) -> float:
        """Minus the slope of log sigma_i^2 on log F_i."""
        return 2 * self.law.exponent

    def shown(self) -> Shown:
        """psi with its interval, and whether the directions carry one."""
        law = self.law
        return Shown(
            "VarianceFlatness",
            [
                ("psi", Estimate(self.psi, 2 * law.stderr), ""),
                ("95% interval", f"{number(2 * law.low)} to {number(2 * law.high)}", ""),
                ("directions fitted", law.num_points, ""),
                ("settled", int(self.settled.sum()), ""),
                ("censored", int(self.censored.sum()), ""),
                ("variance explained", self.explained, ""),
                ("verdict", law.verdict, ""),
            ],
            [law.reason] if law.reason else [],
            sparkline(self.variance, "variance along the directions", logarithmic=True),
        )

    def to_xarray(self) -> xr.Dataset:
        """Over `direction`: variance, flatness, effective_samples, censored; and psi with its interval and verdict."""
        law = self.law
        arrays = {
            "variance": (self.variance, "variance along the direction", "weights^2"),
            "variance_stderr": (self.variance_stderr, "standard error of variance, of correlated samples", "weights^2"),
            "effective_samples": (self.effective_samples, "independent samples along the direction", "1"),
            "flatness": (self.flatness, "width where L <= e L at the mean point; a lower bound where censored", "weights"),
            "flatness_error": (self.flatness_error, "half the width of its brackets", "weights"),
            "censored": (self.censored, "whether the interval ends beyond reach", ""),
            "settled": (self.settled, "whether the variance rests on enough independent samples", ""),
        }  # fmt: skip
        numbers = {
            "psi": (self.psi, "minus the slope of log variance on log flatness", "1"),
            "psi_stderr": (2 * law.stderr, "standard error of psi, over directions", "1"),
            "psi_low": (2 * law.low, "lower end of the 95% interval of psi", "1"),
            "psi_high": (2 * law.high, "upper end of the 95% interval of psi", "1"),
            "psi_r_squared": (law.r_squared, "share of the variance of log sigma^2 explained", "1"),
            "psi_num_points": (law.num_points, "directions fitted", "1"),
            "psi_verdict": (law.verdict, "whether the directions carry an exponent", ""),
            "psi_reason": (law.reason, "why it is inconclusive", ""),
            "loss": (self.loss, "L at the mean point", "nats"),
            "explained": (self.explained, "share of the trajectory's variance along the directions", "1"),
        }  # fmt: skip
        made = xr.Dataset(attrs={"reach": self.reach, "num_values": self.num_values})
        for name, (array, text, units) in arrays.items():
            made[name] = ("direction", array, {"long_name": text, "units": units})
        for name, (value, text, units) in numbers.items():
            made[name] = ((), value, {"long_name": text, "units": units})
        return made


def variance_flatness(
    objective: Objective,
    trajectory: Float[Tensor, "T d"],
    *,
    num_directions: int = 20,
    reach: float | int | None = None,
    relative_error: float = 1e-3,
) -> VarianceFlatness:
    r"""The inverse variance-flatness relation sigma_i^2 ~ F_i^(-psi) along a stationary stretch of a trajectory.

    Principal directions p_i and variances sigma_i^2 (over T - 1) come from the T x T Gram matrix. From the mean point both ends of the
    interval where L(w + theta p_i) <= e L(w) are bracketed outwards by doubling, from sigma_i on, then bisected; all ends advance
    together, in one batched evaluation of L a round. A rise and fall of L within one doubling goes unseen; a loss that is not
    finite counts as above the level. On a quadratic about its minimum the width is $2 \sqrt{2 (e - 1) L/\lambda_i}$.

    psi is twice the exponent of sigma^2 on 1/F^2, which is the curvature up to a factor, so that the criteria of `power_law` keep their
    meaning (F ranges over half as many decades as the curvature). SGD at rate alpha on a quadratic with noise C ~ H^gamma has
    sigma^2 ~ lambda^(gamma - 1), hence psi = 2 (gamma - 1), for alpha lambda well below 1.

    A stretch that drifts has principal components that are cosines in time, whose variances fall like i^-2 whatever the landscape (Antognini
    & Sohl-Dickstein 2018). So each direction's effective number of samples is found from its lag-one correlation; the law is fitted to
    directions with MIN_EFFECTIVE_SAMPLES, and is inconclusive if these hold less than MIN_SETTLED of the variance of all directions.
    Censored directions are left out and counted; neither choice looks at the variance that is fitted. Principal directions are chosen by
    variance on the same data: with few samples a direction, the largest variances come out too large and the smallest too small.

    Args:
        objective: L.
        trajectory: (T, d) weights at equal intervals, T >= 3.
        num_directions: k at most; the rank of the trajectory bounds it too.
        reach: largest |theta|; by default the length of the mean point, or a thousand times the largest sigma_i if that is more.
        relative_error: of the ends of the intervals; what is below 1e-15 of the reach counts as 0.

    Returns:
        `VarianceFlatness`.

    Raises:
        ValueError: fewer than three points, a trajectory that does not move, options out of range, or a loss at the mean point that is not
            positive and finite (the level e L is then no level).

    Source: Feng & Tu, PNAS 118 (2021) e2015617118.

    Cost: about 2 k (10 + log2 of the widths over sigma) values of L; 2 k + T vectors in memory.
    """
    if trajectory.ndim != 2 or len(trajectory) < 3:
        raise ValueError(f"a trajectory of shape {tuple(trajectory.shape)}: give (T, d) with at least 3 points")
    if num_directions < 1 or not relative_error >= 1e-9:
        raise ValueError("num_directions must be at least 1, and relative_error at least 1e-9")
    covariance = SampleCovarianceOperator(trajectory.to(objective.device, objective.dtype))
    if covariance.trace == 0:
        raise ValueError("the trajectory does not move: all its points are equal")
    pairs = covariance.eigenpairs(num_directions)
    variance = pairs.values
    effective = _effective_samples(inner(covariance.rows, pairs.vectors.T).cpu().numpy())
    mean = trajectory.mean(0, dtype=torch.float64).to(objective.device, objective.dtype)
    loss = objective.value(mean)
    if not (math.isfinite(loss) and loss > 0):
        raise ValueError(f"the loss at the mean point is {loss}; flatness needs a positive one")
    sigma = np.sqrt(variance)
    reach = max(float(mean.double().norm()), 1000 * float(sigma[0])) if reach is None else float(reach)
    if not reach > 0:
        raise ValueError(f"reach must be positive, not {reach}")
    low, high, used = _ends(objective, mean, pairs.vectors, sigma, math.e * loss, reach, relative_error)
    censored = np.isinf(high).any(0)
    ends = np.where(np.isinf(high), low, (low + high) / 2)
    flatness = ends.sum(0)
    settled = effective >= MIN_EFFECTIVE_SAMPLES
    chosen = settled & ~censored & (flatness > 0)
    law = power_law(flatness[chosen] ** -2, variance[chosen])
    if variance[settled].sum() < MIN_SETTLED * variance.sum():
        share = variance[settled].sum() / variance.sum()
        law = law.with_reason(f"settled directions hold {share:.0%} of the variance: the stretch is not stationary")
    return VarianceFlatness(
        variance=variance,
        variance_stderr=variance * np.sqrt(2 / np.maximum(effective, 1)),
        effective_samples=effective,
        flatness=flatness,
        flatness_error=np.where(np.isinf(high), 0.0, (high - low) / 2).sum(0),
        censored=censored,
        law=law,
        directions=pairs.vectors,
        loss=loss,
        explained=float(variance.sum()) / covariance.trace,
        reach=reach,
        num_values=used + 1,
    )


def average_direction_sharpness(
    objective: Objective, mean: Float[Tensor, " d"], deviations: Float[Tensor, "n d"]
) -> xr.Dataset:
    """(1/n) sum_j L(w_a + delta_j) - L(w_a), what the learners' disagreement adds to the loss (Zhu et al., arXiv 2306.02913).

    To second order Tr(H Sigma_w)/2. For the learners' own deviations this is the smoothed loss less the loss, exactly: there is no
    sampling error, and `sharpness_stderr` is 0. The spread over learners says how much single ones differ.

    Args:
        objective: L.
        mean: w_a.
        deviations: delta_j.

    Returns:
        sharpness, sharpness_stderr = 0, sharpness_spread (standard deviation over learners, n - 1; nan for one), loss = L(w_a); over
        `learner`: learner_excess = L(w_j) - L(w_a).

    Cost: n + 1 values.
    """
    mean = mean.to(objective.device, objective.dtype)
    values = objective.stacked_values(torch.cat([mean[None], mean + deviations.to(mean)]))
    excess = (values[1:] - values[0]).cpu().numpy()
    if len(excess) < 1:
        raise ValueError("no deviations were given")
    spread = float(excess.std(ddof=1)) if len(excess) > 1 else math.nan
    described = {
        "sharpness": (float(excess.mean()), "(1/n) sum_j L(w_a + delta_j) - L(w_a)"),
        "sharpness_stderr": (0.0, "standard error of sharpness: exact for the learners' own deviations"),
        "sharpness_spread": (spread, "standard deviation of L(w_j) - L(w_a) over learners"),
        "loss": (float(values[0]), "L(w_a)"),
    }
    made = xr.Dataset({k: ((), v, {"long_name": text, "units": "nats"}) for k, (v, text) in described.items()})
    made["learner_excess"] = ("learner", excess, {"long_name": "L(w_j) - L(w_a)", "units": "nats"})
    return made


def _effective_samples(series: np.ndarray) -> np.ndarray:
    """T (1 - r^2)/(1 + r^2) of centred columns (T, k): how many independent samples a variance over them is worth, for AR(1)."""
    squares = (series**2).sum(0)
    lag = (series[1:] * series[:-1]).sum(0) / squares
    return np.asarray(len(series) * (1 - lag**2) / (1 + lag**2))


def _ends(
    objective: Objective,
    mean: Tensor,
    directions: Tensor,
    start: np.ndarray,
    level: float,
    reach: float,
    relative_error: float,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Brackets (2, k) of where L first exceeds the level along +p and -p: low, high (inf if not within reach), and values taken."""
    k = directions.shape[1]
    signs = np.repeat([1.0, -1.0], k)
    columns = np.tile(np.arange(k), 2)
    low, high = np.zeros(2 * k), np.full(2 * k, np.inf)
    trial = np.minimum(np.tile(start, 2), reach)
    used = 0
    while True:
        open_ended = np.isinf(high) & (low < reach)
        unsure = np.isfinite(high) & (high - low > np.maximum(relative_error * high, 1e-15 * reach))
        active = np.flatnonzero(open_ended | unsure)
        if len(active) == 0:
            return low.reshape(2, k), high.reshape(2, k), used
        steps = torch.from_numpy((signs * trial)[active]).to(mean)
        points = mean + steps[:, None] * directions.T[columns[active]]
        above = ~(objective.stacked_values(points) <= level).cpu().numpy()
        used += len(active)
        high[active[above]], low[active[~above]] = trial[active[above]], trial[active[~above]]
        trial = np.where(np.isinf(high), np.minimum(2 * np.maximum(low, trial), reach), (low + high) / 2)
