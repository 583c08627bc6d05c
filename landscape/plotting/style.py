"""One look for every figure: colours, lines and markers fixed per algorithm, readable in grey, sized for paper columns.

Nothing here changes global settings: `style` restores matplotlib's own, and figures are made without pyplot unless a plotting
function is called without axes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, LogFormatterSciNotation, MaxNLocator, NullLocator

from landscape.statistics import Z95

WIDTHS = {"one-column": 3.4, "two-column": 7.0, "report": 4.7}
"""Figure widths in inches: a column and a page of a two-column paper, and half a page of the HTML report."""

INDIGO, OCHRE, GREY = "#332288", "#8A5A00", "#777777"
"""For lines on white, where Okabe and Ito's sky blue, orange and light greys have less than the 3:1 contrast that WCAG asks of graphics."""

PALEST = 0.57
"""Lightest grey of a line on white, for the same reason, as matplotlib counts from 0 to 1."""
MARKERS = "osD^vP*Xphd<>"
"""Of series that have no look of their own."""

RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "legend.title_fontsize": 8.0,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # TrueType, embedded: text can be searched and edited, and no journal's check finds Type 3 fonts
    "ps.fonttype": 42,
    "svg.fonttype": "path",  # glyphs as outlines: the same on machines without the font, as in a report that loads nothing
    "svg.hashsalt": "landscape",
}


@dataclass(frozen=True)
class Look:
    """How one line is drawn; any one of the three tells it apart from the others."""

    colour: str
    line: Any
    marker: str

    def line_options(self) -> dict[str, Any]:
        """For Axes.plot."""
        return {"color": self.colour, "linestyle": self.line, "marker": self.marker}


DASHED, DASH_DOT, DOTTED = (0, (4.5, 1.6)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.3))

LOOKS: dict[str, Look] = {
    "ssgd": Look("#D55E00", DASHED, "s"),
    "ssgd-star": Look("#CC79A7", DOTTED, "^"),
    "dpsgd": Look("#0072B2", "-", "o"),
    "dpsgd-atc": Look("#009E73", DASH_DOT, "D"),
    "dpsgd-cta": Look(INDIGO, (0, (3, 1, 1, 1, 1, 1)), "P"),
}
"""Algorithm variants, the same in every figure: Okabe and Ito's colours and Tol's indigo, of different lightness too."""

PREDICTION_LOOKS: dict[str, Look] = {
    "exact": Look("#0072B2", "-", "D"),
    "learners": Look("#0072B2", "-", "D"),
    "isotropic": Look(OCHRE, DASHED, "^"),
    "covariance": Look("#009E73", DASH_DOT, "s"),
    "second-order": Look("#CC79A7", DOTTED, "v"),
    "second-order-autodiff": Look("#882255", (0, (1, 2.5)), "h"),
    "w_a": Look("#000000", "-", "o"),
    "largest learner": Look("#D55E00", DOTTED, "P"),
}
"""Smoothing kernels and predictions; "exact" and "learners" are the same kernel."""

MEASURED = Look("#000000", "-", "o")

SPARE = [Look(OCHRE, (0, (8, 2)), "X"), Look("#000000", (0, (2, 2)), "*"), Look("#999933", (0, (6, 1, 1, 1)), "p"),
         Look("#882255", (0, (1, 2.5)), "h"), Look("#666666", (0, (9, 1.5, 2, 1.5)), "d")]  # fmt: skip
STAR_COLOURS, STAR_MARKERS = ("#CC79A7", "#AA4499", "#882255", "#661100"), ("^", "v", "<", ">")
STAR_LINES = (DOTTED, (0, (1, 2.6)), (0, (2, 1)), (0, (2, 1, 1, 1)))

DISPLAY_NAMES = {
    "ssgd": "SSGD",
    "ssgd-star": "SSGD*",
    "ssgd-star-matched": "SSGD* (matched σ₀)",
    "dpsgd": "DPSGD",
    "dpsgd-atc": "DPSGD (ATC)",
    "dpsgd-cta": "DPSGD (CTA)",
    "local-sgd": "local SGD",
    "adjacent-leader": "adjacent leader",
    "ubar": "UBAR",
}


def display_name(name: str) -> str:
    """A variant's name as readers know it; other labels as they are.

    >>> display_name("dpsgd-atc"), display_name("ssgd-star-0.01"), display_name("my run")
    ('DPSGD (ATC)', 'SSGD* (σ₀ = 0.01)', 'my run')
    >>> display_name("ssgd-star-weights-low-rank"), display_name("dpsgd, second run")
    ('SSGD* (weights, low rank)', 'DPSGD, second run')
    """
    variant, comma, rest = name.partition(", ")  # as `landscape.plotting.view.distinct` tells runs apart
    if comma and variant in DISPLAY_NAMES:
        return f"{DISPLAY_NAMES[variant]}, {rest}"
    if name in DISPLAY_NAMES:
        return DISPLAY_NAMES[name]
    place, _, shape = name.removeprefix("ssgd-star-").partition("-")
    if name.startswith("ssgd-star-") and place in ("weights", "gradient"):
        return f"SSGD* ({place}, {shape.replace('-', ' ')})"
    return f"SSGD* (σ₀ = {name.removeprefix('ssgd-star-')})" if name.startswith("ssgd-star-") else name


def looks(variants: Sequence[str]) -> list[Look]:
    """A look for each variant of one figure: its own, a relative's for further SSGD* levels, a spare one for repeats."""
    found: list[Look] = []
    stars = spares = 0
    for name in variants:
        if name.startswith("ssgd-star"):
            at = stars % len(STAR_COLOURS)
            look, stars = Look(STAR_COLOURS[at], STAR_LINES[at], STAR_MARKERS[at]), stars + 1
        else:
            look = LOOKS.get(name, SPARE[0])
        while look in found and spares < len(SPARE):
            look, spares = SPARE[spares], spares + 1
        if look in found:  # more lines than any figure should hold
            look = replace(look, marker=f"${len(found)}$")
        found.append(look)
    return found


@contextmanager
def style() -> Iterator[None]:
    """The package's look while inside, as a context or a decorator; matplotlib's settings are restored after."""
    settings: dict[Any, Any] = {**sns.axes_style("ticks"), **sns.plotting_context("paper"), **RC}
    interactive = matplotlib.rcParams["interactive"]
    try:
        with matplotlib.rc_context(settings):
            try:
                yield
            finally:  # a backend that starts with the first figure, as a notebook's does, turns this on: not ours to undo
                interactive = matplotlib.rcParams["interactive"]
    finally:
        matplotlib.rcParams["interactive"] = interactive


def new_figure(width: str = "report", *, rows: int = 1, height: float = 3.1) -> Figure:
    """An empty figure that belongs to no backend.

    Args:
        width: a key of WIDTHS.
        rows: of panels.
        height: inches a row.
    """
    return Figure(figsize=(WIDTHS[width], height * rows), layout="constrained")


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes given, or new ones in a new pyplot figure (shown by notebooks), with the style's tick sizes on them."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(WIDTHS["report"], 3.1), layout="constrained")
    ax.tick_params(axis="x", which="both", labelsize=RC["xtick.labelsize"])
    ax.tick_params(axis="y", which="both", labelsize=RC["ytick.labelsize"])
    return ax


def legend_above(ax: Axes, columns: int = 3, title: str | None = None) -> None:
    """A legend over the axes, outside the data, with the run's name as its title."""
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(
        range(len(handles)), key=lambda i: not isinstance(handles[i], Container)
    )  # measurements before lines
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    if not handles and not title:
        return
    grid = ax.get_subplotspec()
    share = 1 if grid is None else grid.get_gridspec().ncols
    figure = ax.get_figure(root=True)
    assert figure is not None
    room = figure.bbox.width / share
    for count in range(min(columns, max(1, len(handles))), 0, -1):  # as many columns as fit the panel
        legend = ax.legend(
            handles, labels, title=title, alignment="left", loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=count
        )
        if legend.get_window_extent().width < room - 0.7 * figure.dpi:  # less what labels take on the left
            return


def over_steps(ax: Axes, quantity: str) -> None:
    """Label the axes of something over training steps, which are whole numbers."""
    whole_numbers(ax, "x")
    ax.set(xlabel="step", ylabel=quantity)


def log_if_wide(ax: Axes, values: Iterable[float], ratio: float = 30.0) -> None:
    """A logarithmic y axis if positive values range over more than `ratio`; nothing if some are not positive."""
    finite = np.asarray([v for v in values if math.isfinite(v)], dtype=float)
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > ratio:
        log_scale(ax)


def whole_numbers(ax: Axes, axis: str = "y") -> None:
    """Ticks of a count at whole numbers only."""
    (ax.yaxis if axis == "y" else ax.xaxis).set_major_locator(MaxNLocator(nbins="auto", integer=True))


def log_scale(ax: Axes, axis: str = "y") -> None:
    """A logarithmic axis whose labels are plain numbers where those are short, all of them or none."""
    (ax.set_yscale if axis == "y" else ax.set_xscale)("log")
    side = ax.yaxis if axis == "y" else ax.xaxis
    side.set_major_formatter(_PlainLog())
    side.set_minor_formatter(_PlainLog(minor_thresholds=(1, 0.4)))


class _PlainLog(LogFormatterSciNotation):
    def __call__(self, x: float, pos: int | None = None) -> str:
        text = super().__call__(x, pos)
        low, high = sorted(map(float, self.axis.get_view_interval()))  # type: ignore[union-attr]
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        if last > first:  # powers of ten alone are labelled
            low, high = 10.0**first, 10.0**last
        return f"{x:g}" if text and _is_short(low) and _is_short(high) else text


def _is_short(value: float) -> bool:
    """Whether a number is short when it is written out."""
    return 0.0009 < abs(value) < 1e4


def symlog_scale(ax: Axes, threshold: float, axis: str = "y") -> None:
    """An asinh axis, linear well below the threshold and logarithmic above, with powers of ten of both signs within the limits as ticks."""
    (ax.set_yscale if axis == "y" else ax.set_xscale)("asinh", linear_width=threshold)
    ax.autoscale_view()  # margins of the new axis, where the limits are free
    side = ax.yaxis if axis == "y" else ax.xaxis
    low, high = sorted(map(float, side.get_view_interval()))
    ticks = symlog_ticks(low, high, threshold)
    plain = all(_is_short(v) for v in ticks if v)
    side.set_major_locator(FixedLocator(ticks))
    side.set_major_formatter(
        FixedFormatter([f"{v:g}".replace("-", "−") if plain or v == 0 else _power(v) for v in ticks])
    )
    side.set_minor_locator(NullLocator())


def symlog_ticks(low: float, high: float, threshold: float, apart: float = 0.1) -> list[float]:
    """Zero and powers of ten within the limits, the largest first, as far as they stand a share `apart` of the axis from one another.

    >>> symlog_ticks(-0.5, 100.0, 0.01)
    [-0.1, 0.0, 0.1, 1.0, 10.0, 100.0]
    """
    powers = [
        10.0**k
        for k in range(math.floor(math.log10(max(abs(low), abs(high)))), math.ceil(math.log10(threshold)) - 1, -1)
    ]
    width = math.asinh(high / threshold) - math.asinh(low / threshold)
    kept: list[float] = []
    for value in (0.0, *(sign * p for p in powers for sign in (1, -1))):
        place = math.asinh(value / threshold)
        if low <= value <= high and all(abs(place - math.asinh(k / threshold)) >= apart * width for k in kept):
            kept.append(value)
    return sorted(kept)


def _power(value: float) -> str:
    """A power of ten as a label.

    >>> _power(-0.001)
    '$-10^{-3}$'
    """
    return rf"${'-' if value < 0 else ''}10^{{{round(math.log10(abs(value)))}}}$"


def band_at_top(ax: Axes, rows: int, text: str) -> list[float]:
    """A grey band above the data, for what has no place on the scale.

    Returns:
        the height of each of its rows, as a share of the axes.
    """
    height = 0.065 if rows < 4 else 0.048
    share = 0.09 + height * rows
    reserve_top(ax, share + 0.02)
    ax.add_patch(Rectangle((0, 1 - share), 1, share, transform=ax.transAxes, color="#EEEEEE", zorder=0, linewidth=0))
    ax.text(0.01, 0.985, text, transform=ax.transAxes, va="top", fontsize=6.5)
    return [0.91 - height * i for i in range(rows)]


def reserve_top(ax: Axes, share: float) -> None:
    """Room at the top of the axes, as a share of their height."""
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        low, high = math.log10(low), math.log10(high)
        ax.set_ylim(10**low, 10 ** (low + (high - low) / (1 - share)))
    else:
        ax.set_ylim(low, low + (high - low) / (1 - share))


def dodge(steps: np.ndarray, index: int, count: int, share: float = 0.07) -> np.ndarray:
    """Positions moved sideways so that error bars of several series stand beside each other, by at most a quarter of the gap in all."""
    share = min(share, 0.25 / max(1, count - 1))
    gap = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    return np.asarray(steps, dtype=float) + gap * share * (index - (count - 1) / 2)


def marker_places(steps: np.ndarray, count: int = 8) -> list[int]:
    """Indices of about `count` markers at even distances, however unevenly the steps were logged."""
    if len(steps) == 0:
        return []
    return sorted({int(np.abs(steps - at).argmin()) for at in np.linspace(steps[0], steps[-1], count)})


def half_width(stderr: np.ndarray) -> np.ndarray:
    """Half the 95% interval of a normal error; 0 where there is no error to show."""
    return Z95 * np.nan_to_num(np.asarray(stderr, dtype=float), nan=0.0, posinf=0.0)


def save(figure: Figure, stem: Path, formats: Sequence[str] = ("pdf", "svg", "png")) -> list[Path]:
    """Write a figure as STEM.FORMAT, fonts embedded, the same bytes for the same data.

    Returns:
        the files written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    made = []
    with style():
        for kind in formats:
            path = stem.with_name(f"{stem.name}.{kind}")
            dates: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
            figure.savefig(path, format=kind, dpi=200, metadata=dates)
            made.append(path)
    return made


def to_svg(figure: Figure) -> bytes:
    """The figure as an SVG document."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
