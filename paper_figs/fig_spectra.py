"""Spectra along training: the largest Hessian eigenvalues at w_a under the three algorithms, against 2/alpha (theory.md sec. 5)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.plotting.dynamics import with_looks
from landscape.plotting.style import DOTTED, Look, display_name, legend_above, log_scale, new_figure, over_steps, style
from landscape.plotting.view import RunView
from landscape.statistics import Estimate
from paper_figs import digits
from paper_figs.claims import Headline, count, headline, whether
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = (
    "At the rate of the recorded runs DPSGD is led to flatter places than SSGD and SSGD*: the largest curvature at its average weights "
    "ends lowest and below 2/α, where theirs ends above."
)
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute
ALGORITHMS = ("ssgd", "ssgd-star", "dpsgd")


def headlines(data: Recorded) -> dict[str, Headline]:
    """alpha lambda_max/2 at the last checkpoint, and how many checkpoints are above 1; one run each, without errors over seeds."""
    half = data.separation.learning_rate / 2
    tops = {label: half * data.group(label, "curvature")["lambda_max"].values for label in ALGORITHMS}
    last = {label: float(values[-1]) for label, values in tops.items()}
    step = int(data.group("dpsgd", "curvature")["step"][-1])
    others = min(last["ssgd"], last["ssgd-star"])
    return {
        "dpsgd_last": headline(
            Estimate(last["dpsgd"]), f"αλ_max/2 at step {step}: DPSGD", whether(last["dpsgd"] < min(1.0, others)), tolerance=0.5
        ),
        "ssgd_last": headline(Estimate(last["ssgd"]), "SSGD", whether(last["ssgd"] > 1), tolerance=1.0),
        "ssgd_star_last": headline(Estimate(last["ssgd-star"]), "SSGD*", whether(last["ssgd-star"] > 1), tolerance=1.0),
        **{
            f"{label.replace('-', '_')}_above": count(int((tops[label] > 1).sum()), len(tops[label]), f"checkpoints above 2/α, {display_name(label)}")
            for label in ALGORITHMS
        },
    }  # fmt: skip


def draw(data: Recorded) -> Figure:
    """A panel an algorithm, on one scale."""
    views = data.some(*ALGORITHMS)
    with style():
        figure = new_figure("two-column", rows=1, height=3.4)
        panels = figure.subplots(1, 3, sharey=True)
        for (view, look), ax in zip(with_looks(views), panels, strict=True):
            _spectrum(view, look, ax)
        for ax in panels[1:]:
            ax.set_ylabel("")
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)


@style()
def _spectrum(view: RunView, look: Look, ax: Axes) -> None:
    """The largest eigenvalue thick, those after it ever thinner, the sharpest single learner, and 2/alpha."""
    found = view.group("curvature")
    steps, values = found["step"].values, found["eigenvalue"].values
    values = np.where(values > 0, values, np.nan)
    for k in range(values.shape[1] - 1, 0, -1):
        ax.plot(
            steps,
            values[:, k],
            color=look.colour,
            linewidth=0.7,
            alpha=0.55,
            label=f"the {values.shape[1] - 1} next" if k == 1 else None,
        )
    ax.plot(
        steps,
        values[:, 0],
        color=look.colour,
        marker=look.marker,
        linewidth=1.8,
        label=r"$\lambda_{\max}$ at $w_a$",
        zorder=4,
    )
    if view.run.config.algorithm == "dpsgd":
        ax.plot(
            steps,
            found["learner_lambda_max"].max("learner"),
            "x",
            color="black",
            label="sharpest single learner",
            zorder=3,
        )
    limit = 2 / view.run.config.learning_rate
    ax.axhline(limit, color="#777777", linewidth=1.0, linestyle=DOTTED, label=rf"$2/\alpha$ = {limit:.3g}", zorder=0)
    log_scale(ax)
    over_steps(ax, "eigenvalues of $H(w_a)$ (nats / weights$^2$)")
    legend_above(ax, 1, display_name(view.label))
