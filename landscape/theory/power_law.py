"""Power laws y ~ x^gamma through a few points, with an interval for gamma and whether the points can carry one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import xarray as xr
from scipy.stats import t as student

from landscape.display import Displayed, Shown, number
from landscape.statistics import Estimate

LawVerdict = Literal["measured", "inconclusive"]

MIN_POINTS = 6
"""Fewer leave four degrees of freedom or less for the scatter, on which the interval rests."""

MIN_DECADES = 1.0
"""Over less than a factor of ten in x a power cannot be told from other smooth relations."""

MAX_HALF_WIDTH = 0.5
"""Of the 95% interval: exponents 0, 1 and 2 must be told apart."""

MAX_LEVERAGE = 0.8
"""Of one point: above, the slope is a line from the others' centre to that point."""


@dataclass(frozen=True, repr=False)
class PowerLaw(Displayed):
    """The least-squares line through (log x, log y).

    Attributes:
        exponent: its slope gamma; nan where there is none.
        stderr: its standard error.
        low: lower end of the 95% interval of gamma, by Student's t with num_points - 2 degrees of freedom.
        high: upper end.
        prefactor: y at x = 1 on the line.
        r_squared: share of the variance of log y that the line explains; nan where log y does not vary.
        scatter: standard deviation of log y about the line, in e-folds.
        decades: log10 of the largest over the smallest x.
        num_points: points fitted.
        verdict: "measured" or "inconclusive".
        reason: why it is inconclusive; empty where measured.
    """

    exponent: float
    stderr: float
    low: float
    high: float
    prefactor: float
    r_squared: float
    scatter: float
    decades: float
    num_points: int
    verdict: LawVerdict
    reason: str

    def shown(self) -> Shown:
        """The exponent with its interval, and whether the points carry one."""
        return Shown(
            "PowerLaw",
            [
                ("exponent", Estimate(self.exponent, self.stderr), ""),
                ("95% interval", f"{number(self.low)} to {number(self.high)}", ""),
                ("points", self.num_points, ""),
                ("decades", self.decades, ""),
                ("r squared", self.r_squared, ""),
                ("verdict", self.verdict, ""),
            ],
            [self.reason] if self.reason else [],
        )

    def to_xarray(self) -> xr.Dataset:
        """exponent, exponent_stderr, exponent_low, exponent_high and the quality of the fit."""
        described = {
            "exponent": (self.exponent, "slope of log y on log x", "1"),
            "exponent_stderr": (self.stderr, "standard error of the exponent, over points", "1"),
            "exponent_low": (self.low, "lower end of the 95% interval of the exponent", "1"),
            "exponent_high": (self.high, "upper end of the 95% interval of the exponent", "1"),
            "exponent_prefactor": (self.prefactor, "y at x = 1 on the line", "units of y"),
            "exponent_r_squared": (self.r_squared, "share of the variance of log y explained", "1"),
            "exponent_scatter": (self.scatter, "standard deviation of log y about the line", "nats"),
            "exponent_decades": (self.decades, "range of x", "decades"),
            "exponent_num_points": (self.num_points, "points fitted", "1"),
            "exponent_verdict": (self.verdict, "whether the points carry an exponent", ""),
            "exponent_reason": (self.reason, "why it is inconclusive", ""),
        }
        return xr.Dataset(
            {k: ((), v, {"long_name": text, "units": units}) for k, (v, text, units) in described.items()}
        )

    def with_reason(self, reason: str) -> PowerLaw:
        """The same line, inconclusive for one more reason; itself where there is none."""
        if not reason:
            return self
        return replace(self, verdict="inconclusive", reason="; ".join(filter(None, [self.reason, reason])))


def power_law(x: np.ndarray, y: np.ndarray) -> PowerLaw:
    r"""Fit y = A x^gamma by ordinary least squares in logarithms.

    The interval, gamma +- t s/(sum (log x - mean)^2)^(1/2), is exact for independent log-normal scatter of y; x counts as known. A
    common factor of y, such as the mean of the logarithm of a chi-square, goes into the prefactor alone.

    "measured" means that all of these hold; each failure is a reason for "inconclusive":

    - every y is positive (others are left out of the fit, and a law with such points holds at best for the rest);
    - at least MIN_POINTS points;
    - x ranges over at least MIN_DECADES decades;
    - no point has a leverage above MAX_LEVERAGE, i.e. the range does not rest on one outlier;
    - the half width of the interval is at most MAX_HALF_WIDTH;
    - the scatter of log y about the line is at most the spread of log x: else a law of exponent 1 would have R^2 below one half.

    R^2 itself is not among them: a flat relation, y independent of x up to little scatter, is a measurement of the exponent 0 though
    its R^2 is 0. The interval covers the exponent in 95% of all data; among those that are "measured" although their scatter is
    usually too wide for it, less often (they are those whose scatter looks smaller than it is), but "measured" and
    missed together have a probability of at most 5%.

    Args:
        x: (m,) positive.
        y: (m,).

    Returns:
        `PowerLaw`.

    Raises:
        ValueError: x and y of different lengths, or an x that is not positive.

    >>> law = power_law(np.logspace(0, 2, 8), 3 * np.logspace(0, 2, 8) ** 1.5)
    >>> round(law.exponent, 6), round(law.prefactor, 6), law.verdict
    (1.5, 3.0, 'measured')
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be (m,) alike, not {x.shape} and {y.shape}")
    if not (np.isfinite(x) & (x > 0)).all():
        raise ValueError("a power law needs positive, finite x; leave the others out")
    usable = np.isfinite(y) & (y > 0)
    lost = int((~usable).sum())
    reasons = [f"{lost} of {len(y)} values are not positive"] if lost else []
    log_x, log_y = np.log(x[usable]), np.log(y[usable])
    m = len(log_x)
    decades = float(np.ptp(log_x) / math.log(10)) if m else math.nan
    if m < MIN_POINTS:
        reasons.append(f"{m} points, fewer than {MIN_POINTS}")
    if m < 2 or not decades > 0:
        reasons.append("no range of x" if m else "no points")
        nan = math.nan
        return PowerLaw(nan, nan, nan, nan, nan, nan, nan, decades, m, "inconclusive", "; ".join(reasons))
    centred, about = log_x - log_x.mean(), log_y - log_y.mean()
    spread = float(centred @ centred)
    slope = float(centred @ about) / spread
    rest = about - slope * centred
    total = float(about @ about)
    r_squared = 1 - float(rest @ rest) / total if np.ptp(log_y) > 0 else math.nan
    scatter = math.sqrt(float(rest @ rest) / (m - 2)) if m > 2 else math.nan
    stderr = scatter / math.sqrt(spread)
    half = float(student.ppf(0.975, m - 2)) * stderr if m > 2 else math.nan
    if decades < MIN_DECADES:
        reasons.append(f"x ranges over {decades:.2f} decades, less than {MIN_DECADES:g}")
    leverage = 1 / m + float((centred**2).max()) / spread
    if leverage > MAX_LEVERAGE:
        reasons.append(f"the range rests on one point (leverage {leverage:.2f}, above {MAX_LEVERAGE:g})")
    if not half <= MAX_HALF_WIDTH:
        reasons.append(f"the interval is {half:.2g} to either side, more than {MAX_HALF_WIDTH:g}")
    if not scatter <= math.sqrt(spread / m):
        reasons.append(f"log y scatters by {scatter:.2g} about the line, more than log x spreads")
    return PowerLaw(
        exponent=slope,
        stderr=stderr,
        low=slope - half,
        high=slope + half,
        prefactor=math.exp(float(log_y.mean() - slope * log_x.mean())),
        r_squared=r_squared,
        scatter=scatter,
        decades=decades,
        num_points=m,
        verdict="inconclusive" if reasons else "measured",
        reason="; ".join(reasons),
    )
