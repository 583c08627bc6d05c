"""How results show themselves: a line in a terminal, a small table in Jupyter.

Plain HTML without scripts, pictures or colours of its own, so that it is shown by notebooks that are not trusted and legible on any background;
whatever comes from outside is escaped.

>>> shown = Shown("TraceEstimate", [("trace", Estimate(5050.3, 12.1), ""), ("products", 20, "")])
>>> shown.line()
'TraceEstimate(trace=5050 ± 12, products=20)'
>>> shown.html().count("<tr>")
3
"""

from __future__ import annotations

import html
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from landscape.statistics import Estimate

Row = tuple[str, object, str]
"""Quantity, value (a number, an `Estimate` or text), unit."""

WIDTH = 60
"""Characters of a sparkline, at most."""
BLOCKS = "▁▂▃▄▅▆▇█"

CELL = "text-align:left;padding:0.15em 0.8em 0.15em 0"
LONGEST_LIST = 5
"""Numbers of a list that are written out."""
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True)
class Shown:
    """What a result shows of itself.

    Attributes:
        title: its name.
        rows: quantity, value, unit.
        notes: sentences below the table, in Jupyter only.
        picture: a sparkline, in Jupyter only.
    """

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    picture: str = ""

    def line(self) -> str:
        """NAME(quantity=value unit, ...)."""
        return f"{self.title}({', '.join(f'{name}={text(value)} {unit}'.rstrip() for name, value, unit in self.rows)})"

    def html(self) -> str:
        """A table with a head, one row a quantity."""
        units = any(unit for _, _, unit in self.rows)
        return grid(
            self.title,
            ("quantity", "value", "unit")[: 3 if units else 2],
            [row if units else row[:2] for row in self.rows],
            notes=self.notes,
            picture=self.picture,
        )

    def __repr__(self) -> str:
        return self.line()

    def _repr_html_(self) -> str:
        return self.html()


class Displayed(ABC):
    """A result that shows itself by what `shown` returns; a dataclass takes repr=False, or it would get its own."""

    @abstractmethod
    def shown(self) -> Shown:
        """What is shown: a line in a terminal, a table in Jupyter."""

    def __repr__(self) -> str:
        return self.shown().line()

    def _repr_html_(self) -> str:
        return self.shown().html()


def grid(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    notes: Sequence[str] = (),
    picture: str = "",
) -> str:
    """An HTML table; cells are written as `text` writes them, and escaped."""
    head = "".join(f'<th scope="col" style="{CELL}">{html.escape(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{CELL}">{html.escape(text(cell))}</td>' for cell in row) + "</tr>" for row in rows
    )
    below = "".join(f'<div style="opacity:0.75">{html.escape(note)}</div>' for note in notes)
    name = html.escape(caption)
    return (
        f'<div><table style="font-variant-numeric:tabular-nums"><caption style="{CELL};font-weight:bold;caption-side:top;color:inherit">{name}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{picture}{below}</div>"
    )


def text(value: object) -> str:
    """A value as it is shown.

    >>> text(Estimate(0.74213, 0.0131)), text(Estimate(0.5, math.nan)), text(np.float64(1234567.0)), text(True), text(math.nan)
    ('0.742 ± 0.013', '0.5 ± ?', '1.235×10⁶', 'yes', '–')
    >>> text([3.0, 2.0, 1.0, 0.5, 0.25, 0.125])
    '3, 2, 1, 0.5, 0.25, …'
    """
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        known = with_error(value.value, value.stderr)
        return f"{known} ± ?" if math.isnan(value.stderr) and math.isfinite(value.value) else known
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return number(float(value), 4)
    if isinstance(value, list | tuple | np.ndarray):
        listed = [text(one) for one in value[:LONGEST_LIST]]
        return ", ".join([*listed, "…"] if len(value) > LONGEST_LIST else listed) or "–"
    return str(value)


def number(value: float, digits: int = 3) -> str:
    """A number in few characters.

    >>> number(0.75981), number(1.85e-5), number(float("inf")), number(float("nan")), number(1333.2)
    ('0.76', '1.85×10⁻⁵', '∞', '–', '1.33×10³')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def span(values: np.ndarray) -> str:
    """Smallest and largest of some numbers, as far as they are finite.

    >>> span(np.array([2.0, math.inf, 0.5])), span(np.array([math.nan]))
    ('0.5 to 2', '–')
    """
    known = np.asarray(values)[np.isfinite(values)]
    return f"{number(float(known.min()), 4)} to {number(float(known.max()), 4)}" if known.size else "–"


def with_error(value: float, stderr: float) -> str:
    """A number with its standard error, both to the error's second digit.

    >>> with_error(0.759813, 0.00467), with_error(2.5168e-4, 2.28e-5), with_error(1.0, 0.0)
    ('0.7598 ± 0.0047', '(2.52 ± 0.23)×10⁻⁴', '1')
    """
    if not (math.isfinite(value) and math.isfinite(stderr)) or stderr == 0:
        return number(value, 4 if stderr == 0 and 1e-3 <= abs(value) < 1e3 else 3)
    scale = max(abs(value), stderr)
    power = 0 if 1e-3 <= scale < 1e4 else math.floor(math.log10(scale))
    places = max(0, 1 - math.floor(math.log10(stderr / 10**power)))
    text = f"{value / 10**power:.{min(places, 8)}f} ± {stderr / 10**power:.{min(places, 8)}f}"
    if power:
        text = f"({text})×10{str(power).translate(SUPERSCRIPTS)}"
    return text.replace("-", "−")


def sparkline(
    values: Sequence[float] | np.ndarray, label: str, *, logarithmic: bool = False, from_zero: bool = False
) -> str:
    """A small chart of block characters in eight steps, which every notebook shows (pictures within HTML are taken out of those that are not trusted).

    Args:
        values: in order, evenly spaced; what is not finite (or not positive, on a logarithmic axis) leaves a gap. Of more values than characters the
            largest of each character's is shown.
        label: what it shows, below the chart.
        logarithmic: whether heights are logarithms.
        from_zero: whether the lowest block stands for 0 (or the least value, if that is below) and not for the least value.

    Returns:
        HTML; nothing where fewer than two values are finite.

    >>> "▁▅ █" in sparkline([1.0, 2.0, math.nan, 3.0], "loss")
    True
    """
    heights = np.asarray(values, dtype=np.float64)
    if len(heights) > WIDTH:
        heights = np.array([np.fmax.reduce(part) for part in np.array_split(heights, WIDTH)])
    if logarithmic:
        heights = np.log(np.where(heights > 0, heights, np.nan))
    finite = np.isfinite(heights)
    if finite.sum() < 2:
        return ""
    low, high = float(heights[finite].min()), float(heights[finite].max())
    low = min(low, 0.0) if from_zero else low
    shares = (np.where(finite, heights, low) / 2 - low / 2) / ((high / 2 - low / 2) or 1.0)  # halves: no overflow
    drawn = "".join(BLOCKS[round(share * (len(BLOCKS) - 1))] if known else " " for share, known in zip(shares, finite, strict=True))  # fmt: skip
    name = html.escape(label)
    return (
        f'<div role="img" aria-label="{name}" style="font-family:monospace;line-height:1.2;white-space:pre;margin-top:0.3em">{drawn}</div>'
        f'<div style="opacity:0.75">{name}</div>'
    )


def estimates(dataset: xr.Dataset, title: str = "measured") -> Shown:
    """The single numbers of a labelled result as a table: NAME or NAME_mean, its NAME_stderr, its unit.

    Args:
        dataset: of `landscape.measure_noise`, or one step of a group of `landscape.measure`, taken with .sel(step=...). What is an array is left
            out.
        title: of the table.

    Raises:
        ValueError: there is no single number in it.

    >>> made = xr.Dataset({"rate_mean": ((), 0.74213, {"long_name": "alpha_e/alpha", "units": "1"}), "rate_stderr": 0.0131, "per_draw": ("draw", [1.0])})
    >>> estimates(made)
    measured(alpha_e/alpha=0.742 ± 0.013)
    """
    rows: list[Row] = []
    for name in map(str, dataset.data_vars):
        if dataset[name].ndim or name.endswith("_stderr"):
            continue
        value = dataset[name].item()
        error = name.removesuffix("_mean") + "_stderr"
        known = error in dataset and dataset[error].ndim == 0 and isinstance(value, float | int)
        described = dataset[name].attrs
        unit = str(described.get("units", ""))
        rows.append(
            (
                str(described.get("long_name", name)),
                Estimate(float(value), float(dataset[error])) if known else value,
                "" if unit == "1" else unit,
            )
        )
    if not rows:
        raise ValueError(
            f"this result has no single numbers, only arrays over {', '.join(map(str, dataset.dims))}; choose one, as with .sel(step=...)"
        )
    notes = [str(dataset.attrs["errors"])] if "errors" in dataset.attrs else []
    return Shown(title, rows, notes)
