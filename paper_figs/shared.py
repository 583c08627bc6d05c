"""What the figures and tables drawn from studies share: names, a legend, the scale in small print, the command line."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from landscape.plotting.style import display_name, looks
from paper_figs.studies.stored import DATA, Stored, read_all

NAMES = {name: display_name(name) for name in ("ssgd", "ssgd-star-matched", "dpsgd")}
SMALL_PRINT = 5.5
CHARACTERS_AN_INCH = 23
"""Of the small print."""


def shared_legend(figure: Figure, variants: Sequence[str], extra: Sequence[Line2D] = ()) -> None:
    """One legend over all panels: the algorithms, then what else is drawn."""
    own = [
        Line2D([], [], color=look.colour, linestyle=look.line, linewidth=1.7, label=NAMES.get(name, name))
        for name, look in zip(variants, looks(variants), strict=True)
    ]
    figure.legend(handles=[*own, *extra], loc="outside upper left", ncols=min(6, len(own) + len(extra)), fontsize=6.5, handlelength=2.2,
                  columnspacing=1.0)  # fmt: skip


def say_scale(figure: Figure, studies: Sequence[Stored], note: str = "") -> None:
    """In small print under the panels: in what the studies are smaller than the paper, and what the marks are."""
    width = int(figure.get_figwidth() * CHARACTERS_AN_INCH)
    lines = [f"{s.name}: {s.scale}" for s in studies] + ([note] if note else [])
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, width))
    figure.supxlabel(text, fontsize=SMALL_PRINT, x=0.01, ha="left", color="#444444")


def label_columns(panel: Axes, text: str) -> None:
    """What a panel shows, over it."""
    panel.set_title(text, fontsize=7, pad=3, loc="left")


def main_of(
    name: str, doc: str | None, write: Callable[[Sequence[Stored], Path], list[Path]], argv: Sequence[str] | None
) -> int:
    """The command line of a script that draws stored studies; 2 for a user's mistake, which is printed."""
    parser = argparse.ArgumentParser(prog=f"python -m paper_figs.{name}", description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="DIR", help="where the studies' files are (default: paper_figs/data)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    given = parser.parse_args(argv)
    try:
        files = write(read_all(given.data), given.out)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in files))
    return 0
