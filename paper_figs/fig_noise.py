"""Noise decomposition: minibatch and landscape-dependent parts of one step's noise along training (theory.md sec. 3)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from landscape.plotting.noise import noise_split, systematic_share
from landscape.plotting.style import new_figure, style
from landscape.statistics import Estimate, ratio
from paper_figs import digits
from paper_figs.claims import Headline, above, at, below, headline, mean_of, near, whether
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = "DPSGD has landscape-dependent noise that exceeds the minibatch noise while the landscape is rough and fades below it later; SSGD has none."
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute


def headlines(data: Recorded) -> dict[str, Headline]:
    """Delta_2/Delta_S of DPSGD at both ends of training, SSGD's largest, and the minibatch part over its prediction; errors over draws."""
    noise = data.group("dpsgd", "noise")
    steps = noise["step"].values
    first, last = (ratio(at(noise, "Delta_2", i), at(noise, "Delta_S", i)) for i in (0, -1))
    none = float(data.group("ssgd", "noise")["Delta_2_mean"].max())
    parts = [view.group("noise") for view in data.views.values()]
    predicted = np.concatenate([p["Delta_S_predicted"].values for p in parts])
    minibatch = mean_of(
        np.concatenate([p["Delta_S_mean"].values for p in parts]) / predicted,
        np.concatenate([p["Delta_S_stderr"].values for p in parts]) / predicted,
    )
    systematic = Estimate(float(noise["systematic_share"][0]), float(noise["systematic_share_stderr"][0]))
    return {
        "dpsgd_first": headline(first, f"DPSGD's Δ₂/Δ_S at step {steps[0]}", above(first, 1)),
        "dpsgd_last": headline(last, f"at step {steps[-1]}", below(last, 1), tolerance=1.0),
        "ssgd": headline(Estimate(none), "SSGD's largest Δ₂", whether(none == 0)),
        "minibatch_over_predicted": headline(
            minibatch, "Δ_S over α²Tr C/(nB), mean of all runs and checkpoints", near(minibatch, Estimate(1.0))
        ),
        "systematic_first": headline(
            systematic, f"share of DPSGD's Δ₂ that is the same at every draw, step {steps[0]}"
        ),
    }


def draw(data: Recorded) -> Figure:
    """The split of three algorithms, and how systematic the landscape-dependent part is."""
    with style():
        figure = new_figure("two-column", rows=2, height=3.1)
        (a, b), (c, d) = figure.subplots(2, 2)
        for view, ax in zip(data.some("ssgd", "ssgd-star", "dpsgd"), (a, b, c), strict=True):
            noise_split(view, ax)
        low = min(ax.get_ylim()[0] for ax in (a, b, c))
        high = max(ax.get_ylim()[1] for ax in (a, b, c))
        for ax in (a, b, c):
            ax.set_ylim(low, high)
        systematic_share(data.some("dpsgd", "dpsgd-atc"), d)
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)
