"""Stability maps: who converges at which learning rate, and how that hangs on the definition of convergence."""

from __future__ import annotations

import math

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, NullLocator

from landscape.plotting.style import (
    DOTTED,
    axes_or_new,
    band_at_top,
    display_name,
    legend_above,
    looks,
    style,
    whole_numbers,
)
from landscape.theory.edges import convergence, stability_edge

OUTCOMES: dict[str, tuple[str, str]] = {
    "non-finite": ("#222222", "×"),
    "stuck": ("#F0E442", "–"),
    "slow": ("#56B4E9", "~"),
    "converged": ("#0072B2", "✓"),
}
"""Colour (ordered by lightness but for black) and letter of each way that a run ends."""
SENSITIVITY = np.linspace(0.3, 1.0, 71)


@style()
def convergence_probability(stability_map: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Share of seeds that converge against the learning rate, with Wilson 95% intervals, and each variant's stability edge.

    The edge, a star on the line at one half, is where the share crosses one half (interpolated in log alpha).
    """
    ax = axes_or_new(ax)
    table = convergence(stability_map)
    rates, names = _rates(table), _variants(table)
    gap = _gap(rates)
    for i, (name, look) in enumerate(zip(names, looks(names), strict=True)):
        row = table.sel(learning_rate=rates_run(stability_map, name)).sel(variant=name)
        share, low, high = (row[k].values for k in ("probability", "low", "high"))
        x = row["learning_rate"].values * math.exp(gap * 0.4 * ((i + 0.5) / len(names) - 0.5))
        ax.errorbar(
            x,
            share,
            np.stack([np.maximum(share - low, 0), np.maximum(high - share, 0)]),
            label=display_name(name),
            **look.line_options(),
        )
        edge = edge_of(stability_map, name)[0]
        if math.isfinite(edge):
            ax.plot(
                [edge],
                [0.5],
                marker="*",
                markersize=10,
                color=look.colour,
                markeredgecolor="white",
                gid="edge",
                zorder=6,
            )
    ax.axhline(0.5, color="#777777", linewidth=0.8, linestyle=DOTTED, zorder=0)
    _rate_axis(ax, rates)
    ax.set_ylim(-0.04, 1.04)
    ax.set_ylabel(f"share of {int(table['num_seeds'].max())} seeds that converge")
    legend_above(ax, 3)
    return ax


@style()
def outcome_map(stability_map: xr.Dataset, ax: Axes | None = None) -> Axes:
    """How every single run ended: a row for each variant, a block for each learning rate, a column for each seed in it."""
    ax = axes_or_new(ax)
    table = stability_map.sortby("learning_rate").transpose("variant", "learning_rate", "seed", ...)
    kinds = list(OUTCOMES)
    ended = table["outcome"].values.astype(str)
    codes = np.vectorize(lambda kind: kinds.index(kind) if kind in kinds else -1)(ended).reshape(len(ended), -1)
    few = codes.shape[1] <= 40
    letters = np.vectorize(lambda code: OUTCOMES[kinds[code]][1] if code >= 0 else "")(codes)
    sns.heatmap(codes, ax=ax, mask=codes < 0, cmap=ListedColormap([OUTCOMES[k][0] for k in kinds]), vmin=-0.5, vmax=len(kinds) - 0.5, cbar=False,
                annot=letters if few else None, fmt="", annot_kws={"fontsize": 7}, linewidths=0.5, linecolor="white")  # fmt: skip
    rates, seeds = _rates(table), table.sizes["seed"]
    for edge in range(1, len(rates)):
        ax.axvline(edge * seeds, color="white", linewidth=4)
    ax.set_xticks((np.arange(len(rates)) + 0.5) * seeds, [f"{r:g}" for r in rates], rotation=0)
    ax.set_yticks(np.arange(len(ended)) + 0.5, [display_name(n) for n in _variants(table)], rotation=0)
    ax.tick_params(length=0)
    ax.set(xlabel=f"learning rate α (one column for each of {seeds} seeds)", ylabel="")
    counts = {k: int((ended == k).sum()) for k in kinds}
    patches = [
        Patch(facecolor=OUTCOMES[k][0], label=f"{OUTCOMES[k][1]} {k} ({counts[k]})" if few else f"{k} ({counts[k]})")
        for k in reversed(kinds)
    ]
    columns = 4 if ax.get_figure(root=True).get_figwidth() > 6 else 2  # type: ignore[union-attr]
    ax.legend(handles=patches, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, handlelength=1.2)
    return ax


@style()
def threshold_sensitivity(
    stability_map: xr.Dataset, learning_rate: float | None = None, ax: Axes | None = None
) -> Axes:
    """How many runs count as converged, were the threshold another; the task's own is the vertical line.

    Args:
        stability_map: of `landscape.experiments.sweep.stability_map`.
        learning_rate: one of its rates; all of them together by default.
        ax: where to draw.
    """
    ax = axes_or_new(ax)
    chosen = stability_map if learning_rate is None else stability_map.sel(learning_rate=[learning_rate])
    names = _variants(chosen)
    total = chosen.sizes["seed"] * chosen.sizes["learning_rate"]
    for name, look in zip(names, looks(names), strict=True):
        finals = chosen["median_last_loss"].sel(variant=name, learning_rate=rates_run(chosen, name)).values.ravel()
        counts = (finals[None, :] < SENSITIVITY[:, None]).sum(1)
        note = "" if len(finals) == total else f" (of {len(finals)})"
        ax.plot(SENSITIVITY, counts, drawstyle="steps-post", markevery=(2 * names.index(name), 10), label=display_name(name) + note,
                **look.line_options())  # fmt: skip
    ax.axvline(float(stability_map.attrs["threshold"]), color="#777777", linewidth=0.8, linestyle=DOTTED, zorder=0)
    ax.set_ylim(-0.03 * total, total * 1.03)
    where = "all rates" if learning_rate is None else f"α = {learning_rate:g}"
    ax.set(xlabel="threshold on the median last training loss (nats)", ylabel=f"converged, of {total} runs ({where})")
    whole_numbers(ax)
    legend_above(ax, 3)
    return ax


@style()
def time_to_threshold(stability_map: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Steps until the logged training loss of w_a is first below the threshold: each seed a point, the median a line.

    Runs that never get there stand in the band at the top, counted; the median counts them as infinite.
    """
    ax = axes_or_new(ax)
    table = stability_map.sortby("learning_rate")
    rates, names = _rates(table), _variants(table)
    gap = _gap(rates)
    never: list[tuple[float, int, str, int]] = []
    for i, (name, look) in enumerate(zip(names, looks(names), strict=True)):
        here = rates_run(table, name)
        first = first_below(table.sel(variant=name, learning_rate=here), float(table.attrs["threshold"]))
        x = here * math.exp(gap * 0.6 * ((i + 0.5) / len(names) - 0.5))
        with np.errstate(invalid="ignore"):  # a median between two infinities
            middle = np.median(first, axis=1)
        finite = np.isfinite(middle)
        ax.plot(
            x[finite],
            middle[finite],
            color=look.colour,
            linestyle=look.line,
            label=display_name(name),
            marker=look.marker,
        )
        for place, row in zip(x, first, strict=True):
            reached = row[np.isfinite(row)]
            ax.plot(
                np.full(len(reached), place),
                reached,
                linestyle="none",
                marker=look.marker,
                markersize=2.5,
                color=look.colour,
                alpha=0.6,
            )
            if len(reached) < len(row):
                never.append((float(place), i, look.colour, len(row) - len(reached)))
    _rate_axis(ax, rates)
    whole_numbers(ax)
    ax.set_ylim(0, float(table["step"].max()) * 1.03)
    if never:
        rows = band_at_top(ax, len(names), f"seeds of {table.sizes['seed']} that never get there:")
        ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= float(table["step"].max())])
        for place, i, colour, count in never:
            ax.text(place, rows[i], str(count), transform=ax.get_xaxis_transform(), ha="center", va="top", color=colour, fontsize=6.5,
                    fontweight="bold", gid="never")  # fmt: skip
    ax.set_ylabel(f"steps to training loss below {table.attrs['threshold']:g}")
    legend_above(ax, 3)
    return ax


def first_below(result: xr.Dataset, threshold: float) -> np.ndarray:
    """(learning rate, seed): the first logged step with a training loss below the threshold, inf if there is none."""
    loss = result["train_loss"].transpose("learning_rate", "seed", "step").values
    below = loss < threshold
    return np.where(below.any(-1), result["step"].values[below.argmax(-1)], np.inf)


def rates_run(stability_map: xr.Dataset, variant: str) -> np.ndarray:
    """The learning rates, in order, at which a variant was run: a map may hold some variants at a few rates only."""
    ended = stability_map["outcome"].sel(variant=variant).transpose("learning_rate", "seed").values.astype(str)
    return np.sort(stability_map["learning_rate"].values[(ended != "").any(1)])


def edge_of(stability_map: xr.Dataset, variant: str) -> tuple[float, float, float]:
    """The stability edge over the rates at which a variant was run, see `stability_edge`; nan from fewer than two rates."""
    rates = rates_run(stability_map, variant)
    if len(rates) < 2:
        return math.nan, math.nan, math.nan
    return stability_edge(convergence(stability_map).sel(learning_rate=rates), variant)


def _rates(table: xr.Dataset) -> np.ndarray:
    return np.sort(np.asarray(table["learning_rate"].values, dtype=float))


def _variants(table: xr.Dataset) -> list[str]:
    return [str(v) for v in table["variant"].values]


def _rate_axis(ax: Axes, rates: np.ndarray) -> None:
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{r:g}" for r in rates])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(rates[0] * math.exp(-0.45 * _gap(rates)), rates[-1] * math.exp(0.45 * _gap(rates)))
    ax.set_xlabel("learning rate α")


def _gap(rates: np.ndarray) -> float:
    """Smallest distance of the rates' logarithms."""
    return float(np.diff(np.log(rates)).min()) if len(rates) > 1 else 0.5
