"""Smoothing against its bound: curvature of the smoothed landscape under three kernels, and bounds on its smoothness (theory.md sec. 5)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from landscape.plotting.smoothing import kink_part, smoothness_bounds
from landscape.plotting.stability import stability_margin
from landscape.plotting.style import new_figure, style
from landscape.statistics import Estimate
from landscape.theory.scorecard import scorecard
from paper_figs import digits
from paper_figs.claims import Headline, below, count, headline, mean_of, whether
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = (
    "The learners' spread smooths the landscape: under each kernel the largest curvature is below that at w_a, and the smoothness keeps "
    "to the paper's bound 2G/σ_w, which says how much."
)
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute
KERNELS = {"isotropic": "isotropic kernel", "covariance": "covariance kernel", "learners": "learners' own kernel"}
INFORMATIVE = 10.0
"""A bound that is further above the measurement, in times, is vacuous."""


def headlines(data: Recorded) -> dict[str, Headline]:
    """DPSGD's smoothed over unsmoothed curvature for each kernel, mean over checkpoints, and the bound; errors over deviations."""
    dpsgd = data.some("dpsgd")[0]
    half, error = (dpsgd.group("stability")[name] for name in ("alpha_lambda_half", "alpha_lambda_half_stderr"))
    plain = half.sel(function="w_a").values
    found = {}
    for kernel, words in KERNELS.items():
        ratios = half.sel(function=kernel).values / plain
        errors = np.nan_to_num(error.sel(function=kernel).values) / plain
        known = np.isfinite(ratios)
        if known.any():
            mean = mean_of(ratios[known], errors[known])
            found[f"ratio_{kernel}"] = headline(
                mean, f"smoothed over unsmoothed λ_max, {words}", below(mean, 1), tolerance=0.75
            )
    smoothing = dpsgd.group("smoothing")
    tightness = (smoothing["bound"].sel(bound_kind="paper") / smoothing["smoothness"].sel(kernel="isotropic")).values
    tightness = tightness[np.isfinite(tightness)]
    card = scorecard(dpsgd.groups)
    verdicts = list(card.loc[card["prediction"] == "bound: paper", "verdict"])
    kept = verdicts.count("holds")
    if verdicts:
        median = float(np.median(tightness))
        found["bound_holds"] = count(kept, len(verdicts), "checkpoints within 2G/σ_w", whether(kept == len(verdicts)))
        words = "informative" if median < INFORMATIVE else "vacuous"
        found["bound_tightness"] = headline(Estimate(median), f"median of 2G/σ_w over the measured smoothness ({words})", whether(median < INFORMATIVE), tolerance=0.5 * median)  # fmt: skip
    return found


def draw(data: Recorded) -> Figure:
    """Kernels of DPSGD, bounds of DPSGD and SSGD*, and the part of the curvature that sits at the kinks."""
    dpsgd, star = data.some("dpsgd", "ssgd-star")
    with style():
        figure = new_figure("two-column", rows=2, height=3.3)
        (a, b), (c, d) = figure.subplots(2, 2)
        stability_margin(dpsgd, a)
        kink_part(dpsgd, b)
        smoothness_bounds(dpsgd, c)
        smoothness_bounds(star, d)
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)
