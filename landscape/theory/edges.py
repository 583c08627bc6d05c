"""Where an algorithm's edge of stability lies: convergence over seeds against the learning rate (theory.md sec. 8)."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from landscape.statistics import wilson_interval


def convergence(result: xr.Dataset, threshold: float | None = None, max_sigma_w: float | int = math.inf) -> xr.Dataset:
    """Probability of convergence over seeds, with its Wilson 95% interval.

    Args:
        result: of `landscape.experiments.sweep.stability_map`.
        threshold: another threshold on the median last loss than the task's.
        max_sigma_w: count a run only if its weight spread sigma_w = sqrt(Tr Sigma_w/d) ends at or below this, too. On a quadratic the mean
            w_a steps as under SSGD whatever the learners' disagreement does, so its loss does not tell that the disagreement grows.

    Returns:
        (variant, learning_rate): num_converged, num_seeds, probability, low, high (nan where nothing was run); and counts of the
        other outcomes.
    """
    level = result.attrs["threshold"] if threshold is None else threshold
    converged = result["median_last_loss"] < level
    if math.isfinite(max_sigma_w):
        converged &= result["sigma_w"].isel(step=-1) <= max_sigma_w
    hits = converged.sum("seed")
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
        attrs={"threshold": level, "max_sigma_w": max_sigma_w, "interval": "Wilson, 95%"},
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


def edge_bracket(table: xr.Dataset, variant: str) -> tuple[float, float]:
    """The two neighbouring rates tried between which convergence falls below one half for good: 0 or infinity where it does not.

    Args:
        table: of `convergence`.
        variant: its name.
    """
    rates, row = _tried(table, variant)
    above = np.flatnonzero(row["probability"].values >= 0.5)
    last = int(above[-1]) if len(above) else -1
    return (float(rates[last]) if last >= 0 else 0.0), (float(rates[last + 1]) if last + 1 < len(rates) else math.inf)


def edge_interval(table: xr.Dataset, variant: str) -> tuple[float, float]:
    """A conservative 95% interval for the rate where the probability of convergence is one half, from the rates tried alone.

    Its ends are the largest rate up to which every Wilson interval lies above one half, and the smallest from which every one lies
    below; so it holds the bracket, and no rate between is interpolated. Each rate is tested by itself: that the same seeds are run at
    all rates makes the outcomes dependent, which would let a likelihood over all rates (a logistic fit) claim more than the seeds
    hold, but leaves the test at any one rate as it is. Nothing but that the probability falls with the rate is assumed. With fewer
    than 4 seeds no rate can be told from one half, and the interval is (0, infinity).

    Args:
        table: of `convergence`.
        variant: its name.
    """
    rates, row = _tried(table, variant)
    surely, never = row["low"].values > 0.5, row["high"].values < 0.5
    first = int(np.argmin(np.append(surely, False)))  # how many of the smallest rates surely converge
    from_above = int(np.argmin(np.append(never[::-1], False)))
    low = float(rates[first - 1]) if first else 0.0
    return low, float(rates[len(rates) - from_above]) if from_above else math.inf


def _tried(table: xr.Dataset, variant: str) -> tuple[np.ndarray, xr.Dataset]:
    """The rates at which a variant was run, rising, and its row there."""
    row = table.sel(variant=variant).sortby("learning_rate")
    row = row.isel(learning_rate=np.flatnonzero(row["num_seeds"].values > 0))
    return np.asarray(row["learning_rate"].values), row


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
