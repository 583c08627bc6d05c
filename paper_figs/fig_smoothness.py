"""The smoothness figure: effective learning rate and curvature along training, at a rate where all converge and one where the algorithms differ.

    python -m paper_figs.fig_smoothness [--data DIR] --out DIR

Writes DIR/fig_smoothness_NAME.* for every study under paper_figs/data that was measured along training: (left) E alpha_e/alpha with 95%
intervals over minibatches and what the smoothing predicts (exact for DPSGD); (middle) lambda_max of L at w_a and of the loss as the algorithm smooths it; (right) the noise of a step, orthogonal to the gradient, and
its landscape-dependent part.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator

from landscape.plotting.style import DOTTED, dodge, half_width, log_scale, looks, new_figure, save, style
from paper_figs.shared import label_columns, main_of, say_scale, shared_legend
from paper_figs.studies.declared import VARIANTS
from paper_figs.studies.stored import Stored

ROW_HEIGHT = 1.9
WIDE = 5.0
"""Ratio of effective to nominal rate from which the axis is logarithmic away from 0."""
KINDS = {"both": "all seeds of SSGD and DPSGD converge", "differ": "where SSGD and DPSGD differ most"}


def draw(study: Stored) -> Figure:
    """A row for each of the study's places, the seed measured first.

    Raises:
        ValueError: if nothing was measured along training.
    """
    along = study.along
    if along is None or not along.sizes.get("run"):
        raise ValueError(
            f"study {study.name} holds nothing measured along training; run it with: python -m paper_figs.studies {study.name}"
        )
    kinds = [kind for kind in KINDS if kind in along["kind"].values.astype(str)]
    with style():
        figure = new_figure("two-column", rows=len(kinds), height=ROW_HEIGHT)
        figure.set_size_inches(figure.get_figwidth(), ROW_HEIGHT * len(kinds) + 0.9)
        panels = figure.subplots(len(kinds), 3, squeeze=False)
        for line, kind in zip(panels, kinds, strict=True):
            runs = _runs(along, kind)
            _rate(line[0], runs)
            _curvature(line[1], runs, float(study.declared["momentum"]))
            _noise(line[2], runs)
            first = next(iter(runs.values()))
            label_columns(
                line[0],
                f"$nB={int(first['total_batch'])}$, $\\alpha={float(first['learning_rate']):.3g}$: {KINDS[kind]}",
            )
            for panel in line:
                panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
                panel.set_xlim(left=0)
        for panel in panels[-1]:
            panel.set_xlabel("step")
        extra = [
            Line2D([], [], color="#555555", marker="D", linestyle="none", markerfacecolor="white", markersize=4, label="predicted by the smoothing"),
            Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle=DOTTED, markersize=4, label=r"smoothed $L$; landscape part $\Delta_2$"),
        ]  # fmt: skip
        variants = [v for v in VARIANTS if v in along["variant"].values.astype(str)]
        shared_legend(figure, variants, extra)
        say_scale(figure, [study], f"seed {int(along['seed'].values[0])}; bars: 95% intervals over minibatches or deviations, at fixed learners; {_thoroughness(study)}; "
                  "SSGD smooths nothing: its open markers differ by the curvature at kinks"
                  + ("; BatchNorm's statistics frozen at $w_a$, at the learners' weights too, where training takes each minibatch's own"
                     if along.attrs.get("batch_norm") else ""))  # fmt: skip
    return figure


def _runs(along: xr.Dataset, kind: str) -> dict[str, xr.Dataset]:
    """The first seed's runs at a place, by variant."""
    here = along.isel(run=np.flatnonzero(along["kind"].values.astype(str) == kind))
    seed = int(here["seed"].values[0])
    here = here.isel(run=np.flatnonzero(here["seed"].values == seed))
    found = {str(v): here.isel(run=i) for i, v in enumerate(here["variant"].values)}
    return {v: found[v] for v in VARIANTS if v in found}


def _thoroughness(study: Stored) -> str:
    a = study.declared["along"]
    return f"{a['num_draws']} draws on {a['num_examples'] or 'all'} examples, curvatures on {a['curvature_examples'] or 'all'}"


def _rate(panel: Axes, runs: dict[str, xr.Dataset]) -> None:
    panel.axhline(1, color="#777777", linewidth=0.8, linestyle=DOTTED, zorder=0)
    for i, ((_, at), look) in enumerate(zip(runs.items(), looks(list(runs)), strict=True)):
        if "alpha_e_ratio_mean" not in at:
            continue
        steps = dodge(at["step"].values, i, len(runs))
        panel.errorbar(
            steps,
            at["alpha_e_ratio_mean"].values,
            half_width(at["alpha_e_ratio_stderr"].values),
            gid="measured",
            **look.line_options(),
        )
        by_kernel = at["alpha_e_ratio_predicted"]
        own = (
            by_kernel.sel(prediction="exact").fillna(by_kernel.sel(prediction="isotropic")).values
        )  # SSGD*'s kernel is isotropic
        if np.isfinite(own).any() and not np.all(own == 1):
            panel.plot(
                steps,
                own,
                linestyle="none",
                marker="D",
                color=look.colour,
                markerfacecolor="white",
                gid="predicted",
                zorder=5,
            )
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in panel.lines])
    if np.abs(drawn[np.isfinite(drawn)]).max() > WIDE:
        panel.set_yscale("symlog", linthresh=2)
        panel.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=2))
        panel.minorticks_off()
    panel.set_ylabel(r"$\mathrm{E}\,\alpha_e/\alpha$")


def _curvature(panel: Axes, runs: dict[str, xr.Dataset], momentum: float) -> None:
    """The grey line is where a step of the mean becomes unstable on a quadratic, at the rate after the warm-up."""
    drawn: list[float] = []
    for i, (at, look) in enumerate(zip(runs.values(), looks(list(runs)), strict=True)):
        if "lambda_max" not in at:
            continue
        steps = dodge(at["step"].values, i, len(runs))
        for name, face, line in (("lambda_max", look.colour, "-"), ("lambda_max_smoothed", "white", DOTTED)):
            value = at[name].values
            error = at["lambda_max_smoothed_stderr"].values if name.endswith("smoothed") else np.zeros_like(value)
            panel.errorbar(
                steps,
                value,
                half_width(error),
                color=look.colour,
                linestyle=line,
                marker=look.marker,
                markerfacecolor=face,
                gid=name,
            )
            drawn += value[np.isfinite(value)].tolist()
    limit = 2 * (1 + momentum) / float(next(iter(runs.values()))["learning_rate"])
    panel.axhline(limit, color="#777777", linewidth=0.8, zorder=0)
    text = r"$2(1+\beta)/\alpha$" if momentum else r"$2/\alpha$"
    panel.text(
        1.01, limit, text, transform=panel.get_yaxis_transform(), ha="left", va="center", fontsize=6.5, color="#555555"
    )
    if drawn and min(drawn) > 0 and max([*drawn, limit]) / min([*drawn, limit]) > 8:
        log_scale(panel)
    panel.set_ylabel(r"$\lambda_{\max}$ (nats / weights$^2$)")


def _noise(panel: Axes, runs: dict[str, xr.Dataset]) -> None:
    found = False
    for i, (at, look) in enumerate(zip(runs.values(), looks(list(runs)), strict=True)):
        for name, face, line in (("Delta", look.colour, "-"), ("Delta_2", "white", DOTTED)):
            if f"{name}_mean" not in at:
                continue
            steps, mean, error = (
                dodge(at["step"].values, i, len(runs)),
                at[f"{name}_mean"].values,
                half_width(at[f"{name}_stderr"].values),
            )
            shown = mean > 0  # SSGD has no landscape noise
            found = found or bool(shown.any())
            bars = np.stack([np.minimum(error, 0.9 * np.abs(mean)), error])[:, shown]
            panel.errorbar(
                steps[shown],
                mean[shown],
                bars,
                color=look.colour,
                linestyle=line,
                marker=look.marker,
                markerfacecolor=face,
                gid=name,
            )
    if found:
        log_scale(panel)
    panel.set_ylabel(r"noise of a step (weights$^2$)")


def figures(studies: Sequence[Stored]) -> dict[str, Figure]:
    """All figures of this script by name; of the studies that were measured along training."""
    return {f"fig_smoothness_{s.name}": draw(s) for s in studies if s.along is not None}


def write(studies: Sequence[Stored], out: Path) -> list[Path]:
    """Draw and save them."""
    return [path for name, figure in figures(studies).items() for path in save(figure, out / name)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's mistake, which is printed."""
    return main_of("fig_smoothness", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
