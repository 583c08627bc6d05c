"""The edge figure: up to which learning rate each algorithm converges, against the total batch size, a panel for each study.

    python -m paper_figs.fig_edges [--data DIR] --out DIR

Writes DIR/fig_edges.*: bars from the largest rate that converged to the next that was tried, at the median over seeds; small marks are the seeds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from landscape.plotting.style import log_scale, looks, new_figure, save, style
from paper_figs.shared import label_columns, main_of, say_scale, shared_legend
from paper_figs.studies.stored import Stored

COLUMNS = 3
ROW_HEIGHT = 1.9


def draw(studies: Sequence[Stored]) -> Figure:
    """A panel a study, its algorithms side by side at every batch size; grey lines join the rates of one base rate, linearly scaled with the batch."""
    if not studies:
        raise ValueError("the figure needs at least one study")
    columns = min(COLUMNS, max(2, len(studies)))
    rows = math.ceil(len(studies) / columns)
    with style():
        figure = new_figure("two-column", rows=rows, height=ROW_HEIGHT)
        figure.set_size_inches(figure.get_figwidth(), ROW_HEIGHT * rows + 0.75 + 0.13 * len(studies))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in panels[len(studies) :]:
            panel.set_visible(False)
        for i, (panel, study) in enumerate(zip(panels, studies, strict=False)):
            _edges(panel, study)
            if i % columns == 0:
                panel.set_ylabel(r"learning rate $\alpha$")
        variants = [str(v) for v in studies[0].map["variant"].values]
        extra = [
            Line2D([], [], color="#BBBBBB", marker=".", markersize=4, linewidth=0.7, label="rates tried, linearly scaled"),
            Line2D([], [], color="#555555", marker=r"$\uparrow$", linestyle="none", label="beyond the grid"),
        ]  # fmt: skip
        shared_legend(figure, variants, extra)
        say_scale(
            figure,
            studies,
            "bars: median over seeds of the bracket between the largest rate that converged and the next tried; small: seeds",
        )
    return figure


def _edges(panel: Axes, study: Stored) -> None:
    totals = np.asarray(study.map["total_batch"].values, dtype=float)
    rates = np.stack([study.rates(b) for b in range(len(totals))])
    panel.plot(totals, rates, color="#BBBBBB", marker=".", markersize=4, linewidth=0.7, zorder=0)
    log_scale(panel, "y")
    panel.set_xscale("log")
    step = math.log(totals[1] / totals[0]) if len(totals) > 1 else math.log(2)
    grid = rates[0, 1] / rates[0, 0] if rates.shape[1] > 1 else 2.0
    variants = [str(v) for v in study.map["variant"].values]
    for i, (name, look) in enumerate(zip(variants, looks(variants), strict=True)):
        shift = 0.16 * step * (i - (len(variants) - 1) / 2)
        for batch, total in enumerate(totals):
            found = study.edges(batch, name)
            x = total * math.exp(shift)

            def inside(low: float, high: float, batch: int = batch) -> tuple[float, float]:
                return low or rates[batch, 0] / grid, high if math.isfinite(high) else rates[batch, -1] * grid

            low, high = inside(*found.median)
            panel.plot(
                [x, x], [low, high], color=look.colour, linewidth=4.5, alpha=0.45, solid_capstyle="butt", gid="median"
            )
            for j, ends in enumerate(zip(found.low, found.high, strict=True)):
                a, b = inside(float(ends[0]), float(ends[1]))
                beside = x * math.exp(0.035 * step * (j - (len(found.low) - 1) / 2))
                panel.plot(
                    [beside],
                    [math.sqrt(a * b)],
                    marker=look.marker,
                    markersize=2,
                    color=look.colour,
                    linestyle="none",
                    gid="seed",
                    zorder=4,
                )
            for open_end, at, mark in (
                (math.isinf(found.median[1]), high, r"$\uparrow$"),
                (found.median[0] == 0, low, r"$\downarrow$"),
            ):
                if open_end:
                    panel.plot([x], [at], marker=mark, color=look.colour, markersize=6, linestyle="none", gid="beyond")
    panel.set_xticks(totals, [f"{t:g}" for t in totals])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("total batch $nB$")
    label_columns(panel, study.name)


def write(studies: Sequence[Stored], out: Path) -> list[Path]:
    """Draw and save it."""
    return save(draw(studies), out / "fig_edges")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's mistake, which is printed."""
    return main_of("fig_edges", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
