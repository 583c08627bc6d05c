"""Where an algorithm's edge of stability lies: convergence over seeds against the learning rate (theory.md sec. 8)."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from landscape.statistics import wilson_interval


def convergence(result: xr.Dataset, threshold: float | None = None) -> xr.Dataset:
    """Probability of convergence over seeds, with its Wilson 95% interval.

    Args:
        result: of `landscape.experiments.sweep.stability_map`.
        threshold: another threshold on the median last loss than the task's.

    Returns:
        (variant, learning_rate): num_converged, num_seeds, probability, low, high (nan where nothing was run); and counts of the
        other outcomes.
    """
    level = result.attrs["threshold"] if threshold is None else threshold
    hits = (result["median_last_loss"] < level).sum("seed")
    trials = result["median_last_loss"].notnull().sum("seed")  # a map may hold variants at some rates only
    low, high = np.vectorize(lambda k, m: wilson_interval(int(k), int(m)))(hits.values, trials.values)
    ran = trials > 0
    made = xr.Dataset(
        {
            "num_converged": hits,
            "num_seeds": trials,
            "probability": (hits / trials).where(ran),
            "low": xr.DataArray(low, coords=hits.coords).where(ran),
            "high": xr.DataArray(high, coords=hits.coords).where(ran),
        },
        attrs={"threshold": level, "interval": "Wilson, 95%"},
    )
    for kind in ("non-finite", "stuck", "slow"):
        made[f"num_{kind}"] = (result["outcome"] == kind).sum("seed")
    return made


def stability_edge(table: xr.Dataset, variant: str) -> tuple[float, float, float]:
    """The learning rate where the probability of convergence crosses one half, and an interval for it.

    Interpolated linearly in the logarithm of the rate between the last rate at or above one half before it stays below. The
    interval is where the Wilson limits cross one half; its ends are nan where they do not cross within the grid.

    Returns:
        (edge, low, high); edge is inf if every rate converges at least half the time, -inf if none does.
    """
    row = table.sel(variant=variant)
    row = row.isel(learning_rate=np.flatnonzero(row["num_seeds"].values > 0))
    rates = row["learning_rate"].values
    edge = _crossing(rates, row["probability"].values)
    low, high = _crossing(rates, row["low"].values), _crossing(rates, row["high"].values)
    return edge, low if math.isfinite(low) else math.nan, high if math.isfinite(high) else math.nan


def _crossing(rates: np.ndarray, probability: np.ndarray) -> float:
    above = np.flatnonzero(probability >= 0.5)
    if len(above) == 0:
        return -math.inf
    last = int(above[-1])
    if last == len(rates) - 1:
        return math.inf
    a, b = probability[last], probability[last + 1]
    share = (a - 0.5) / (a - b)
    return float(np.exp(np.log(rates[last]) + share * (np.log(rates[last + 1]) - np.log(rates[last]))))
