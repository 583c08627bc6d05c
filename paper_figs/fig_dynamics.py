"""The dynamics figure: loss, spread of the learners, effective learning rate with its predictions, and the noise split.

    python paper_figs/fig_dynamics.py RUN [RUN ...] --out DIR

The runs must have been measured (landscape measure RUN). Writes DIR/fig_dynamics.pdf, .svg and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.plotting.dynamics import effective_learning_rate, training_loss, weight_variance
from landscape.plotting.noise import noise_split
from landscape.plotting.style import new_figure, save, style
from landscape.plotting.view import RunView, distinct, load_view

NEEDED = ("effective-learning-rate", "noise")


def draw(views: Sequence[RunView]) -> Figure:
    """The figure: loss and weight variance of all runs on top, then a row for each run.

    Raises:
        ValueError: if a run lacks the measurements that the figure shows, saying which.
    """
    if not views:
        raise ValueError("the figure needs at least one run")
    for view in views:
        missing = [name for name in NEEDED if name not in view.groups]
        if missing:
            raise ValueError(f"{view.run.path} has no measurements of {', '.join(missing)}; run: landscape measure {view.run.path}")  # fmt: skip
    named = distinct(views)
    with style():
        figure = new_figure("two-column", rows=1 + len(named), height=2.6)
        panels = figure.subplots(1 + len(named), 2, squeeze=False)
        training_loss(named, panels[0, 0])
        weight_variance(named, panels[0, 1])
        for row, view in zip(panels[1:], named, strict=True):
            effective_learning_rate(view, row[0])
            noise_split(view, row[1])
        for letter, panel in zip("abcdefghijklmnopqrstuvwxyz", panels.ravel(), strict=False):
            _letter(panel, letter)
    return figure


def _letter(panel: Axes, letter: str) -> None:
    panel.set_xlabel(f"({letter})  {panel.get_xlabel()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure of the runs named on the command line; 2 for a user's mistake, which is printed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories that were measured")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    arguments = parser.parse_args(argv)
    try:
        files = save(draw([load_view(path) for path in arguments.runs]), arguments.out / "fig_dynamics")
    except (ValueError, OSError) as error:
        print(f"fig_dynamics: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
