"""The one-step ledger: gain along g against curvature paid along and across it, and the realised change of the loss (theory.md sec. 7)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.plotting.dynamics import one_step_ledger, with_looks
from landscape.plotting.style import display_name, dodge, half_width, legend_above, new_figure, over_steps, style
from landscape.plotting.view import RunView
from landscape.statistics import Estimate
from landscape.theory.scorecard import TOLERANCE, scorecard
from paper_figs import digits
from paper_figs.claims import Bearing, Headline, count, headline
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = "To second order, gain along the gradient and curvature paid along and across it make up the change of the loss in one step, within 20%."
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute
LABELS = ("ssgd", "ssgd-star", "dpsgd", "dpsgd-atc")


def headlines(data: Recorded) -> dict[str, Headline]:
    """For each run at how many checkpoints ledger and realised change agree; for DPSGD the two at the first; errors over draws."""
    found = {}
    for view in data.some(*LABELS):
        card = scorecard(view.groups)
        verdicts = list(card.loc[card["quantity"] == "one-step change of L", "verdict"])
        agree, disagree = verdicts.count("agrees"), verdicts.count("disagrees")
        bearing: Bearing = "supports" if agree > disagree else "contradicts" if disagree > agree else "undecided"
        name = view.label.replace("-", "_")
        found[f"{name}_agrees"] = count(
            agree, len(verdicts), f"checkpoints that agree, {display_name(view.label)}", bearing
        )
    ledger = data.group("dpsgd", "ledger")
    for index, name in ((0, "first"), (-1, "last")):
        realised = Estimate(float(ledger["realised_mean"][index]), float(ledger["realised_stderr"][index]))
        predicted = float(ledger["predicted_mean"][index])
        text = f"DPSGD's change of the loss at step {int(ledger['step'][index])}, predicted {predicted:.3g} (nats)"
        found[f"dpsgd_{name}"] = headline(realised, text, tolerance=4 * realised.stderr + abs(realised.value))
    return found


def draw(data: Recorded) -> Figure:
    """The ledger of every recorded run, and realised over predicted change, which the small checkpoints show too."""
    with style():
        figure = new_figure("two-column", rows=3, height=2.7)
        grid = figure.add_gridspec(3, 2)
        views = data.some(*LABELS)
        for place, view in enumerate(views):
            one_step_ledger(view, figure.add_subplot(grid[place // 2, place % 2]))
        _ratios(views, figure.add_subplot(grid[2, :]))
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)


@style()
def _ratios(views: Sequence[RunView], ax: Axes) -> None:
    """Realised over predicted change, with 95% intervals: draws are paired, so the error is that of their difference."""
    for i, (view, look) in enumerate(with_looks(views)):
        card = scorecard(view.groups)
        rows = card[card["quantity"] == "one-step change of L"]
        steps = rows["step"].to_numpy()
        ax.errorbar(dodge(steps, i, len(views)), rows["ratio"].to_numpy(), half_width(rows["ratio_stderr"].to_numpy()),
                    label=display_name(view.label), **look.line_options())  # fmt: skip
    ax.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="#999999", alpha=0.25, linewidth=0, label=f"within {TOLERANCE:.0%}")
    ax.axhline(0, color="black", linewidth=0.6)
    over_steps(ax, "realised / predicted change")
    legend_above(ax, 5)
