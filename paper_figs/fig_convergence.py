"""The convergence figure: training loss of w_a over the epochs for every algorithm, by total batch size (columns) and task or rate (rows).

    python -m paper_figs.fig_convergence [--data DIR] --out DIR

Writes DIR/fig_convergence.* (a row a task, each panel at the largest rate at which any algorithm converges with most seeds) and
DIR/fig_convergence_NAME.* (a row a learning rate) for every study under paper_figs/data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from landscape.plotting.style import DOTTED, log_scale, looks, new_figure, save, style
from paper_figs.shared import NAMES, label_columns, main_of, say_scale, shared_legend
from paper_figs.studies.stored import Stored

ROW_HEIGHT = 1.45
CEILING = 1.6
"""Times the loss of constant output: losses above are drawn at the top edge, so that one blow-up does not flatten the rest."""


@dataclass(frozen=True)
class Cell:
    """A panel: one study at one batch size and rate."""

    study: Stored
    batch: int
    rate: int


def draw(studies: Sequence[Stored]) -> Figure:
    """A row a task. In every panel the largest learning rate at which at least one algorithm converges with more than half of its seeds (the
    smallest rate where none does): chosen without regard to which algorithm it is.
    """
    rows = [
        [Cell(study, batch, telling_rate(study, batch)) for batch in range(study.map.sizes["total_batch"])]
        for study in studies
    ]
    return _draw(rows, [study.name for study in studies], studies)


def draw_rates(study: Stored) -> Figure:
    """All learning rates of one study, a row each; the columns' rates are scaled with the batch."""
    rows = [
        [Cell(study, batch, rate) for batch in range(study.map.sizes["total_batch"])]
        for rate in range(study.map.sizes["rate"])
    ]
    return _draw(rows, ["" for _ in rows], [study])


def telling_rate(study: Stored, batch: int) -> int:
    """Index of the largest rate at which some algorithm converges with most seeds; 0 if there is none."""
    share = np.stack([study.converged(batch, str(name)).mean(1) for name in study.map["variant"].values])
    good = np.flatnonzero((share > 0.5).any(0))
    return int(good[-1]) if len(good) else 0


def _draw(rows: Sequence[Sequence[Cell]], names: Sequence[str], studies: Sequence[Stored]) -> Figure:
    if not rows:
        raise ValueError("the figure needs at least one study")
    width = max(len(row) for row in rows)
    with style():
        figure = new_figure("two-column", rows=len(rows), height=ROW_HEIGHT)
        figure.set_size_inches(figure.get_figwidth(), ROW_HEIGHT * len(rows) + 0.55 + 0.13 * len(studies))
        panels = figure.subplots(len(rows), width, squeeze=False, sharey="row")
        for line, row, name in zip(panels, rows, names, strict=True):
            for panel in line[len(row) :]:
                panel.set_visible(False)
            top = _top(row)
            for panel, cell in zip(line, row, strict=False):
                _losses(panel, cell, top)
            _scale(line[: len(row)], top)
            line[0].set_ylabel(f"{name}\nloss of $w_a$ (nats)" if name else "loss of $w_a$ (nats)")
        for panel in panels[-1]:
            panel.set_xlabel("epochs")
        variants = [str(v) for v in studies[0].map["variant"].values]
        extra = [
            Line2D([], [], color="#555555", marker="x", linestyle="none", markersize=6, markeredgewidth=1.5, label="diverged (not finite)"),
            Line2D([], [], color="#777777", linestyle=DOTTED, linewidth=0.8, label="converged below"),
            Line2D([], [], color="#777777", linestyle=(0, (1, 4)), linewidth=0.8, label="constant output"),
        ]  # fmt: skip
        shared_legend(figure, variants, extra)
        say_scale(
            figure,
            [*studies],
            "thin: seeds; thick: median over seeds, a diverged seed counted as infinite; losses above the panel drawn at its top",
        )
    return figure


def _top(row: Sequence[Cell]) -> float:
    """Upper end of a row's panels: the largest loss seen, but for what is far above constant output."""
    constant = max(cell.study.constant_loss for cell in row)
    seen = [cell.study.map["train_loss"].isel(total_batch=cell.batch, rate=cell.rate).values.ravel() for cell in row]
    known = np.concatenate(seen)
    known = known[np.isfinite(known)]
    return float(min(CEILING * constant, 1.05 * max(constant, known.max(initial=0.0))))


def _scale(panels: Sequence[Axes], top: float) -> None:
    """The same axis for a row: logarithmic if the losses range widely."""
    drawn = [
        np.asarray(line.get_ydata(), dtype=float)
        for panel in panels
        for line in panel.get_lines()
        if line.get_gid() == "seed"
    ]
    known = np.concatenate([y[np.isfinite(y)] for y in drawn])
    low = float(known.min(initial=top))
    if low > 0 and top / low > 15:
        for panel in panels:
            log_scale(panel)
    panels[0].set_ylim(top=top * 1.02)


def _losses(panel: Axes, cell: Cell, top: float) -> None:
    """Thin lines for seeds, a thick one for their median; a cross where a run stopped being finite."""
    study = cell.study
    at = study.map.isel(total_batch=cell.batch, rate=cell.rate)
    steps = at["step"].values
    known = np.isfinite(steps)
    per_epoch = study.map.attrs["num_examples"] / float(at["total_batch"])
    epochs = steps[known] / per_epoch
    variants = [str(v) for v in at["variant"].values]
    for look, name in zip(looks(variants), variants, strict=True):
        loss = at["train_loss"].sel(variant=name).transpose("seed", "point").values[:, known].astype(float)
        died = at["diverged_at"].sel(variant=name).values
        for row, end in zip(loss, died, strict=True):
            if end >= 0:
                row[steps[known] > end] = np.inf
            panel.plot(epochs, np.where(np.isfinite(row), np.minimum(row, top), np.nan), color=look.colour, linestyle="-", linewidth=0.5, alpha=0.55,
                       gid="seed")  # fmt: skip
            if end >= 0:
                reached = row[np.isfinite(row)]
                panel.plot([end / per_epoch], [min(top, reached[-1] if len(reached) else top)], "x", color=look.colour, markersize=6,
                           markeredgewidth=1.5, gid="diverged", clip_on=False, zorder=6)  # fmt: skip
        with np.errstate(invalid="ignore"):
            middle = np.median(loss, axis=0)
        panel.plot(epochs, np.where(np.isfinite(middle), np.minimum(middle, top), np.nan), color=look.colour, linestyle=look.line, linewidth=1.7,
                   gid="median", label=NAMES.get(name, name), zorder=5)  # fmt: skip
    panel.axhline(study.threshold, color="#777777", linestyle=DOTTED, linewidth=0.8, zorder=0)
    panel.axhline(study.constant_loss, color="#777777", linestyle=(0, (1, 4)), linewidth=0.8, zorder=0)
    panel.set_xlim(left=0)
    label_columns(panel, f"$nB={int(at['total_batch'])}$, $\\alpha={float(at['learning_rate']):.3g}$")


def figures(studies: Sequence[Stored]) -> dict[str, Figure]:
    """All figures of this script by name."""
    return {"fig_convergence": draw(studies), **{f"fig_convergence_{s.name}": draw_rates(s) for s in studies}}


def write(studies: Sequence[Stored], out: Path) -> list[Path]:
    """Draw and save them."""
    return [path for name, figure in figures(studies).items() for path in save(figure, out / name)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's mistake, which is printed."""
    return main_of("fig_convergence", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
