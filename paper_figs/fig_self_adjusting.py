"""The self-adjusting learning rate: E alpha_e/alpha of every algorithm along training, beside its predictions (theory.md sec. 3)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.plotting.dynamics import effective_learning_rate, training_loss, weight_variance, with_looks
from landscape.plotting.style import (
    DOTTED,
    display_name,
    dodge,
    half_width,
    legend_above,
    new_figure,
    over_steps,
    style,
)
from landscape.plotting.view import RunView
from landscape.statistics import Estimate
from paper_figs import digits
from paper_figs.claims import Headline, at, below, headline, mean_of, near
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = (
    "DPSGD's effective learning rate is below the nominal one early, where the landscape is rough, and back at it late; that of SSGD and SSGD* "
    "is the nominal one throughout."
)
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute
MEASURE, RATIO = "effective-learning-rate", "alpha_e_ratio"


def headlines(data: Recorded) -> dict[str, Headline]:
    """The ratio at DPSGD's first and last checkpoint, its mean for the other two, and DPSGD's under ATC; errors over draws at fixed weights."""
    one = Estimate(1.0)
    dpsgd = data.group("dpsgd", MEASURE)
    first, last = at(dpsgd, RATIO, 0), at(dpsgd, RATIO, -1)
    steps = dpsgd["step"].values
    uphill = ", negative: a step goes uphill along the gradient" if first.value < 0 else ""
    found = {
        "dpsgd_first": headline(first, f"DPSGD's E α_e/α at step {steps[0]}{uphill}", below(first, 1)),
        "dpsgd_last": headline(last, f"at step {steps[-1]}", near(last, one)),
    }
    for label, name in (("ssgd", "SSGD's mean over checkpoints"), ("ssgd-star", "SSGD*'s")):
        group = data.group(label, MEASURE)
        mean = mean_of(group[f"{RATIO}_mean"].values, group[f"{RATIO}_stderr"].values)
        found[label.replace("-", "_")] = headline(mean, name, near(mean, one))
    atc = at(data.group("dpsgd-atc", MEASURE), RATIO, 0)
    found["atc_first"] = headline(atc, f"DPSGD (ATC) at step {steps[0]}")
    return found


def draw(data: Recorded) -> Figure:
    """Loss, spread of the learners, the ratio of every algorithm, and DPSGD's beside its predictions."""
    views = data.some("ssgd", "ssgd-star", "dpsgd", "dpsgd-atc")
    with style():
        figure = new_figure("two-column", rows=2, height=3.1)
        (loss, spread), (each, predicted) = figure.subplots(2, 2)
        training_loss(views, loss)
        weight_variance(views[2:], spread)
        _ratios(views, each)
        effective_learning_rate(views[2], predicted)
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)


@style()
def _ratios(views: Sequence[RunView], ax: Axes) -> None:
    for i, (view, look) in enumerate(with_looks(views)):
        found = view.group(MEASURE)
        ax.errorbar(dodge(found["step"].values, i, len(views)), found[f"{RATIO}_mean"].values, half_width(found[f"{RATIO}_stderr"].values),
                    label=display_name(view.label), **look.line_options())  # fmt: skip
    ax.axhline(1, color="#777777", linewidth=0.8, linestyle=DOTTED, zorder=0)
    over_steps(ax, r"effective / nominal rate $\mathrm{E}\,\alpha_e/\alpha$")
    legend_above(ax, 2, "measured, every algorithm")
