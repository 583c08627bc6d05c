"""The scorecard as a figure: every prediction of a run, measured over predicted, at every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from landscape.plotting.style import DOTTED, GREY, Look, axes_or_new, display_name, log_scale, style
from landscape.plotting.tables import SYMBOL, plain
from landscape.plotting.view import RunView
from landscape.statistics import Z95
from landscape.theory.scorecard import TOLERANCE, scorecard

VERDICT_LOOKS: dict[str, Look] = {
    "agrees": Look("#009E73", "-", "o"),
    "holds": Look("#0072B2", "-", "D"),
    "inconclusive": Look(GREY, "-", "s"),
    "disagrees": Look("#D55E00", "-", "X"),
    "violated": Look("#882255", "-", "P"),
}
"""Colour and marker of each verdict; inconclusive ones are open."""
LIMITS = (0.02, 50.0)
"""Of the ratio axis; what lies beyond is an arrow at the edge."""
ROW_HEIGHT = 0.24
"""Inches of a row, for who makes the figure."""


def rows_of(card: pd.DataFrame) -> list[tuple[str, str]]:
    """Quantity and prediction of each row of the figure, from the top; what has nothing to compare is left out."""
    shown = card[card["verdict"] != "not applicable"]
    return list(dict.fromkeys(zip(shown["quantity"], shown["prediction"], strict=True)))


@style()
def scorecard_figure(view: RunView, ax: Axes | None = None, tolerance: float = TOLERANCE) -> Axes:
    """Measured over predicted of every prediction at every checkpoint, with 95% intervals, coloured and marked by verdict.

    "agrees" is an interval within the grey band of 1 +- tolerance, "disagrees" one outside it; for bounds and limits anything to the left of 1
    holds. Steps run downwards within a row. An infinite prediction is a ratio of zero; that, negative ratios and any others beyond the
    axis are arrows at its edges.

    Args:
        view: a run with measurements.
        ax: where to draw; about ROW_HEIGHT inches for each row of `rows_of`.
        tolerance: of "agrees", as in `landscape.theory.scorecard`.

    Raises:
        ValueError: nothing measured has a prediction.
    """
    ax = axes_or_new(ax)
    card = scorecard(view.groups, tolerance)
    rows = rows_of(card)
    if not rows:
        raise ValueError(f"{view.run.path} has no measurements with predictions; make them with: landscape measure {view.run.path}")  # fmt: skip
    ax.axvspan(1 - tolerance, 1 + tolerance, color="#DDDDDD", linewidth=0, zorder=0)
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=DOTTED, zorder=1)
    log_scale(ax, "x")
    ax.set_xlim(*LIMITS)
    told: set[str] = set()
    for place, (quantity, prediction) in enumerate(rows):
        part = card[(card["quantity"] == quantity) & (card["prediction"] == prediction)]
        heights = place + np.linspace(-0.3, 0.3, len(part)) if len(part) > 1 else np.array([float(place)])
        for height, row in zip(heights, part.to_dict("records"), strict=True):
            verdict = str(row["verdict"])
            if verdict not in VERDICT_LOOKS:
                continue
            look = VERDICT_LOOKS[verdict]
            value, half = ratio_with_half_width(row)
            label = None if verdict in told else verdict
            told.add(verdict)
            if not LIMITS[0] < value < LIMITS[1]:
                left = not value >= LIMITS[1]
                ax.plot([LIMITS[0] * 1.15 if left else LIMITS[1] / 1.15], [height], "<" if left else ">", color=look.colour, markersize=4,
                        linestyle="none", gid="off-scale", zorder=4)  # fmt: skip
                if label:
                    _point(ax, [], [], look, verdict, label)
                continue
            if half > 0:
                ax.plot([max(value - half, LIMITS[0]), min(value + half, LIMITS[1])], [height, height], color=look.colour, linewidth=0.9, zorder=2)  # fmt: skip
            _point(ax, [value], [height], look, verdict, label)
    ax.set_yticks(range(len(rows)), [row_label(q, p) for q, p in rows])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    for edge in range(1, len(rows)):
        ax.axhline(edge - 0.5, color="#E5E5E5", linewidth=0.5, zorder=0)
    ax.set_xlabel("measured / predicted (bounds and limits hold left of 1)")
    handles, labels = ax.get_legend_handles_labels()
    order = [labels.index(v) for v in VERDICT_LOOKS if v in labels]
    ax.legend([handles[i] for i in order], [labels[i] for i in order], title=display_name(view.label), alignment="left",
              loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, columnspacing=0.9, handletextpad=0.2)  # fmt: skip
    return ax


def row_label(quantity: str, prediction: str) -> str:
    r"""What a row is called in a figure, where symbols have subscripts and words are few.

    >>> row_label("E alpha_e / alpha", "isotropic"), row_label("smoothness of L~", "bound: duchi")
    ('E $α_{\\mathrm{e}}$ / α: isotropic kernel', 'smoothed L, estimated bound G/σ (Duchi et al.)')
    """
    text = f"{plain(quantity)}: {plain(prediction)}".replace("smoothness of the smoothed L: ", "smoothed L, ")
    return SYMBOL.sub(r"$\1_{\\mathrm{\2}}$", text)


def ratio_with_half_width(row: Mapping[Any, Any]) -> tuple[float, float]:
    """Measured over predicted and half its 95% interval, in which the errors of both count as in the verdict; (0, 0) of an infinite prediction.

    >>> ratio_with_half_width({"measured": 3.0, "predicted": 2.0, "measured_stderr": 0.3, "predicted_stderr": 0.4, "z": 2.0})[0]
    1.5
    """
    measured, predicted = row["measured"], row["predicted"]
    if math.isinf(predicted) or predicted == 0:
        return (0.0, 0.0) if predicted else (math.nan, 0.0)
    error = math.hypot(row["measured_stderr"], row["predicted_stderr"])
    if math.isfinite(row["z"]) and row["z"] != 0:  # of paired draws, the error of the difference
        error = abs((measured - predicted) / row["z"])
    half = Z95 * error / abs(predicted)
    return measured / predicted, half if math.isfinite(half) else 0.0


def _point(ax: Axes, x: list[float], y: list[float], look: Look, verdict: str, label: str | None) -> None:
    ax.plot(x, y, linestyle="none", marker=look.marker, markersize=4.5, color=look.colour, gid=verdict, label=label, zorder=3, markeredgewidth=0.7,
            markerfacecolor="white" if verdict == "inconclusive" else look.colour)  # fmt: skip
