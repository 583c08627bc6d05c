"""The stability map: which algorithm converges at which learning rate, over seeds (theory.md sec. 8)."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from landscape.plotting.maps import (
    convergence_probability,
    edge_of,
    outcome_map,
    rates_run,
    threshold_sensitivity,
    time_to_threshold,
)
from landscape.plotting.style import display_name, new_figure, style
from landscape.statistics import Estimate, newcombe_interval
from paper_figs import digits
from paper_figs.claims import Bearing, Headline, headline
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = "At a learning rate chosen on other seeds DPSGD converges where SSGD fails, and where SSGD* with isotropic noise of the same strength fails."
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute


def headlines(data: Recorded) -> dict[str, Headline]:
    """Share of the claim seeds that converge, DPSGD's excess over the others with Newcombe 95% intervals, and the stability edges."""
    rate, seeds = data.separation.learning_rate, list(data.separation.claim_seeds)
    mapped = data.stability_map.sel(seed=seeds, learning_rate=rate)
    hits = (mapped["median_last_loss"] < data.stability_map.attrs["threshold"]).sum("seed")
    counts = {name: int(hits.sel(variant=name)) for name in ("dpsgd", "ssgd", "ssgd-star-matched")}
    text = f"seeds of {len(seeds)} that converge at α = {rate:g}: DPSGD"
    found = {"dpsgd": headline(Estimate(float(counts["dpsgd"])), text, tolerance=1)}
    for name in ("ssgd", "ssgd-star-matched"):
        low, high = newcombe_interval(counts["dpsgd"], len(seeds), counts[name], len(seeds))
        bearing: Bearing = "supports" if low > 0 else "contradicts" if high < 0 else "undecided"
        said = f"{display_name(name)} (95% of the difference of shares {low:+.2f} to {high:+.2f})"
        found[name.replace("-", "_")] = headline(Estimate(float(counts[name])), said, bearing, tolerance=1)
    for name in ("dpsgd", "ssgd"):
        edge = edge_of(data.stability_map, name)[0]
        if math.isfinite(edge):
            found[f"{name}_edge"] = headline(
                Estimate(edge), f"rate at which half of all seeds converge, {display_name(name)}"
            )
        else:
            where = "below" if edge < 0 else "above"
            rates = rates_run(data.stability_map, name)
            end = float(rates[0] if edge < 0 else rates[-1])
            found[f"{name}_edge"] = headline(Estimate(end), f"rate at which half of all seeds converge, {display_name(name)}: {where}", tolerance=0.5 * end)  # fmt: skip
    return found


def draw(data: Recorded) -> Figure:
    """How every run ended, the share that converges, and how both hang on the definition of convergence."""
    with style():
        figure = new_figure("two-column", rows=2, height=3.1)
        (a, b), (c, d) = figure.subplots(2, 2)
        outcome_map(data.stability_map, a)
        convergence_probability(data.stability_map, b)
        threshold_sensitivity(data.stability_map, data.separation.learning_rate, c)
        time_to_threshold(data.stability_map, d)
        return finish(figure, CLAIM, headlines(data), data.map_in_words)
