"""What the figures of one claim share: letters, legends that leave room for the data, and the caption in small print."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figs.claims import Headline, caption
from paper_figs.shared import CHARACTERS_AN_INCH, SMALL_PRINT

LEGEND_SIZE, LABEL_SIZE = 6.0, 7.0
SYMBOLS = {
    "α_e/α": r"$\alpha_e/\alpha$",
    "λ_max": r"$\lambda_{\max}$",
    "Δ_S": r"$\Delta_S$",
    "w_a": r"$w_a$",
    "σ_w": r"$\sigma_w$",
    "Σ_w": r"$\Sigma_w$",
    "λ^γ": r"$\lambda^\gamma$",
}
"""Symbols of plain text as they are set in figures."""


def finish(figure: Figure, claim: str, numbers: Mapping[str, Headline], scale: str) -> Figure:
    """Letter the panels, shrink their legends, and write the caption under them."""
    panels = figure.axes
    for letter, panel in zip("abcdefghijklmnopqrstuvwxyz", panels, strict=False):
        if len(panels) > 1:
            panel.set_xlabel(f"({letter})  {panel.get_xlabel()}")
        panel.xaxis.label.set_size(LABEL_SIZE)
        panel.yaxis.label.set_size(LABEL_SIZE)
        _compact(panel)
    width = int(figure.get_figwidth() * CHARACTERS_AN_INCH)
    lines = [part for line in caption(claim, numbers, scale) for part in textwrap.wrap(line, width)]
    figure.supxlabel(
        "\n".join(symbols(line) for line in lines), fontsize=SMALL_PRINT, x=0.01, ha="left", color="#333333"
    )
    return figure


def symbols(text: str) -> str:
    """Text with its symbols set as mathematics.

    >>> symbols("λ_max at w_a")
    '$\\\\lambda_{\\\\max}$ at $w_a$'
    """
    for plain, shown in SYMBOLS.items():
        text = text.replace(plain, shown)
    return text


def _compact(panel: Axes) -> None:
    """The panel's legend again, smaller, in as many columns as its share of the page has room for."""
    legend = panel.get_legend()
    grid = panel.get_subplotspec()
    figure = panel.get_figure(root=True)
    if legend is None or grid is None or figure is None:
        return
    labels = [text.get_text() for text in legend.get_texts()]
    drawn = dict(
        zip(*reversed(panel.get_legend_handles_labels()), strict=True)
    )  # with markers, which a legend's own handles lose
    handles = [drawn.get(label, own) for label, own in zip(labels, legend.legend_handles, strict=True)]
    title = legend.get_title().get_text() or None
    span = len(grid.colspan) / grid.get_gridspec().ncols
    room = figure.bbox.width * span - 0.8 * figure.dpi  # less what the labels take on the left
    for columns in range(min(5, max(1, len(handles))), 0, -1):
        made = panel.legend(
            handles, labels, title=title, alignment="left", loc="lower left", bbox_to_anchor=(0.0, 1.0),
            ncols=columns, fontsize=LEGEND_SIZE, title_fontsize=7, handlelength=2.0, columnspacing=0.9, borderpad=0.2, labelspacing=0.35,
        )  # fmt: skip
        if made.get_window_extent().width < room:
            return
