"""The scorecard: every prediction of the theory beside its measurement, at every checkpoint of every recorded run (theory.md sec. 8)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from landscape.plotting.style import display_name, new_figure, style
from landscape.theory.scorecard import scorecard
from paper_figs import digits
from paper_figs.claims import Bearing, Headline
from paper_figs.panels import finish, symbols
from paper_figs.recorded import Recorded

CLAIM = "The predictions of the theory hold on these runs: most checkpoints that can tell agree within 20%, or keep to the bound."
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute
RUNS = ("ssgd", "ssgd-star", "dpsgd", "dpsgd-atc")
GOOD, BAD = ("agrees", "holds"), ("disagrees", "violated")
LOOKS = {
    "agrees": ("#0072B2", "=", "white"), "holds": ("#56B4E9", "<", "black"), "inconclusive": ("#DDDDDD", "?", "black"),
    "disagrees": ("#D55E00", "≠", "white"), "violated": ("#E69F00", ">", "black"),
}  # fmt: skip
"""Colour, letter and its colour of each verdict."""
WORDS = {
    "E alpha_e / alpha: exact": "E α_e/α, learners' own kernel (exact)",
    "E alpha_e / alpha: isotropic": "E α_e/α, isotropic kernel",
    "E alpha_e / alpha: covariance": "E α_e/α, covariance kernel",
    "E alpha_e / alpha: second-order": "E α_e/α, second order",
    "E alpha_e / alpha: second-order-autodiff": "E α_e/α, second order without kinks",
    "Delta_S: alpha^2 Tr(C)/(n B)": "Δ_S = α²Tr C/(nB)",
    "Tr Sigma_w: minibatch noise alone": "Tr Σ_w from minibatch noise alone",
    "smoothness of L~: bound: paper": "smoothness below 2G/σ",
    "smoothness of L~: bound: duchi": "smoothness below G/σ",
    "smoothness of L~: bound: sharp": "smoothness below √(2/π)G/σ",
    "smoothness of L~: bound: smooth": "smoothness below ℓ erf(G/(√2ℓσ))",
    "smoothness of L~: bound: local": "smoothness below √λ_max(Cov g)/σ",
    "growth of disagreement: stable: below 1": "disagreement stable",
    "one-step change of L: ledger": "one-step ledger",
    "exponent of minibatch noise on curvature: 1 to 2": "noise exponent γ in 1 to 2",
}
CONDITION = "growth of disagreement: stable: below 1"
"""Not a prediction but the condition of others, so it says nothing of the claim."""


def table(data: Recorded) -> pd.DataFrame:
    """The scorecards of all runs below each other, with the columns run and comparison."""
    parts = [scorecard(view.groups).assign(run=view.label) for view in data.some(*RUNS)]
    joined = pd.concat(parts, ignore_index=True)
    return joined.assign(comparison=joined["quantity"] + ": " + joined["prediction"])


def headlines(data: Recorded) -> dict[str, Headline]:
    """For each prediction at how many checkpoints of all runs it agrees or holds, of those that can tell."""
    found = {}
    for comparison, part in table(data).groupby("comparison", sort=False):
        good = int(part["verdict"].isin(GOOD).sum())
        bad = int(part["verdict"].isin(BAD).sum())
        bearing: Bearing = "supports" if good > bad else "contradicts" if bad > good else "undecided"
        name = str(comparison)
        told = "told" if name == CONDITION else bearing
        tolerance = float(max(1, math.ceil((good + bad) / 4)))
        found[name] = Headline(float(good), math.nan, tolerance, f"{WORDS.get(name, name)}, of {good + bad}", told)
    return found


def draw(data: Recorded) -> Figure:
    """A cell a checkpoint: a row for each prediction, a block of columns for each run."""
    card = table(data)
    with style():
        figure = new_figure("two-column", height=0.24 * card["comparison"].nunique() + 2.4)
        _cells(card, figure.subplots())
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)


@style()
def _cells(card: pd.DataFrame, ax: Axes) -> None:
    rows = list(dict.fromkeys(card["comparison"]))
    rows.sort(key=lambda name: list(WORDS).index(name) if name in WORDS else len(WORDS))
    left, ticks = 0.0, []
    for run, part in card.groupby("run", sort=False):
        steps = sorted(set(part["step"]))
        for score in part.itertuples():
            colour, letter, ink = LOOKS.get(str(score.verdict), ("white", "", "black"))
            x, y = left + steps.index(score.step), rows.index(str(score.comparison))
            ax.add_patch(Rectangle((x + 0.04, y - 0.46), 0.92, 0.92, facecolor=colour, linewidth=0))
            ax.text(x + 0.5, y, letter, ha="center", va="center", fontsize=7, color=ink, gid="verdict")
        ax.text(left + len(steps) / 2, -0.75, display_name(str(run)), ha="center", va="bottom", fontsize=8)
        ticks += [(left + i + 0.5, str(step)) for i, step in enumerate(steps)]
        left += len(steps) + 0.6
    ax.set_xlim(0, left - 0.6)
    ax.set_ylim(len(rows) - 0.4, -1.6)
    ax.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    ax.set_yticks(np.arange(len(rows)), [symbols(WORDS.get(name, name)) for name in rows])
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_xlabel("checkpoint (step) of each run")
    verdicts = card["verdict"].value_counts()
    handles = [Patch(facecolor=LOOKS[v][0], label=f"{LOOKS[v][1]} {v} ({int(verdicts.get(v, 0))})") for v in LOOKS]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, handlelength=1.2)
