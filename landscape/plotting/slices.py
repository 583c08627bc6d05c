"""Slices of the landscape: contours and surfaces of planes, lines, and what is projected on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LogNorm, Normalize
from matplotlib.patches import Polygon
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from scipy.interpolate import RegularGridInterpolator

from landscape.plotting.smoothing import KERNEL_NAMES
from landscape.plotting.style import (
    DASHED,
    DOTTED,
    MEASURED,
    PREDICTION_LOOKS,
    SPARE,
    Look,
    axes_or_new,
    half_width,
    legend_above,
    log_if_wide,
    style,
)
from landscape.slices import GradientField, LineSlice, PlaneSlice, Projection, QuadraticModel
from landscape.slices.planes import DISAGREEMENT
from landscape.statistics import Z95

COLOURS = "YlGnBu_r"
MODEL, LEARNERS, PATH = "#D55E00", "#E69F00", "#000000"
WIDE = 10.0
"""Ratio of the largest loss to the smallest from which levels and colours are logarithmic."""
EQUAL = 2.5
"""Ratio of a plane's sides up to which both axes have one scale, so that steepest descent crosses contours at right angles."""


@style()
def loss_contours(
    found: PlaneSlice,
    ax: Axes | None = None,
    *,
    learners: Projection | None = None,
    trajectory: Projection | None = None,
    model: QuadraticModel | None = None,
    field: GradientField | None = None,
) -> Axes:
    """Contours of the loss over a plane, in distances along its orthonormal axes.

    Where the loss is not finite the plane is hatched; where it was refined, the points that were evaluated are dots. Learners and trajectory
    are their nearest points of the plane; the legend states the share of their distance to the origin that the plane leaves out (least to most),
    and how many lie outside the picture. Contours of the quadratic model about the origin are dashed, at the same levels. Arrows of the
    gradient field give the direction of steepest descent in the plane, all of one length.
    """
    ax = axes_or_new(ax)
    lengths = _grid(found)
    x, y = lengths[..., 0], lengths[..., 1]
    corners = np.array([lengths[0, 0], lengths[-1, 0], lengths[-1, -1], lengths[0, -1]])
    finite = np.isfinite(found.loss)
    if not finite.all():
        broken = Polygon(
            corners, facecolor="#E4E4E4", edgecolor="#999999", hatch="////", linewidth=0, label="loss not finite"
        )
        ax.add_patch(broken).set_gid("non-finite")
    if finite.any():
        _fill(ax, found, x, y, model)
    if found.tolerance is not None:
        at = found.evaluated
        ax.plot(x[at], y[at], ".", color="#000000", markersize=1.2, alpha=0.5, zorder=2.5, gid="evaluated", label=f"evaluated ({at.mean():.0%} of the grid)")  # fmt: skip
    ax.set_xlim(corners[:, 0].min(), corners[:, 0].max())
    ax.set_ylim(corners[:, 1].min(), corners[:, 1].max())
    width, height = np.ptp(corners, axis=0)
    if 1 / EQUAL < width / max(height, 1e-300) < EQUAL:
        ax.set_aspect("equal")
    if field is not None:
        _arrows(ax, found, field)
    if trajectory is not None:
        _path(ax, trajectory)
    if learners is not None:
        text = f"{_number(learners, 'learner')}, {_left_out(learners, ax)}"
        ax.plot(*learners.lengths.T, "o", color=LEARNERS, markeredgecolor="black", markersize=5, zorder=6, label=text, gid="learners")  # fmt: skip
    halo = [withStroke(linewidth=3, foreground="white")]
    middle = r"$w_a$" if found.plane.kind == DISAGREEMENT else "origin"
    ax.plot(0, 0, "+", color="black", markersize=8, markeredgewidth=1.4, zorder=5.8, label=middle, path_effects=halo)
    ax.set(xlabel=_axis_label(found, 0), ylabel=_axis_label(found, 1))
    legend_above(ax, 2, _title(found))
    return ax


@style()
def loss_surface(
    found: PlaneSlice,
    ax: Axes | None = None,
    *,
    learners: Projection | None = None,
    trajectory: Projection | None = None,
) -> Axes:
    """The loss over a plane as a surface, logarithmic where it ranges widely, with holes where it is not finite; its contours on the floor.

    Learners and trajectory lie on the surface, and are drawn over whatever stands before them: their height is the loss at their nearest points of
    the plane, which is not their own.

    Args:
        found: the slice.
        ax: axes of projection "3d".
        learners: their projection.
        trajectory: its projection.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(figsize=(4.7, 4.0), layout="constrained").add_subplot(projection="3d")
    if not isinstance(ax, Axes3D):
        raise ValueError("a surface needs axes in three dimensions: figure.add_subplot(projection='3d')")
    lengths = _grid(found)
    x, y = lengths[..., 0], lengths[..., 1]
    scale, levels = _levels(found.loss)
    logarithmic = isinstance(scale, LogNorm)
    height = np.where(np.isfinite(found.loss), found.loss, np.nan)
    if logarithmic:
        height = np.log10(height)
        levels = np.log10(levels)
    if np.isfinite(height).any():
        low, high = float(np.nanmin(height)), float(np.nanmax(height))
        floor = low - 0.35 * max(high - low, 1e-12)
        colours = colormaps[COLOURS](Normalize(low, high)(height))
        ax.computed_zorder = False  # what lies on the surface is not to be hidden by it
        ax.plot_surface(x, y, height, facecolors=colours, rcount=60, ccount=60, linewidth=0, antialiased=False, shade=False, zorder=2)  # fmt: skip
        if high > low:
            ax.contour(x, y, np.ma.masked_invalid(height), levels=levels, zdir="z", offset=floor, cmap=COLOURS, linewidths=0.8, zorder=1)  # fmt: skip
        if trajectory is not None:
            _raised(ax, found, height, trajectory, "trajectory", marker=".", color=PATH, linewidth=1.2, zorder=3)
        if learners is not None:
            _raised(ax, found, height, learners, _number(learners, "learner"), linestyle="none", marker="o", color=LEARNERS, markeredgecolor="black",
                    markersize=4, zorder=4)  # fmt: skip
        ax.set_zlim(floor, high)
    ax.set_xlabel(_axis_label(found, 0), labelpad=9)  # below the ticks, which two lines would meet
    ax.set_ylabel(_axis_label(found, 1), labelpad=9)
    ax.set_zlabel(r"$\log_{10}$ loss (nats)" if logarithmic else "loss (nats)")
    ax.view_init(elev=40, azim=-55)
    ax.set_box_aspect((4, 4, 3), zoom=0.88)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(title=_title(found), loc="upper left", bbox_to_anchor=(0.0, 1.0), alignment="left")
    elif _title(found):
        ax.set_title(_title(found), loc="left")
    return ax


@style()
def loss_lines(
    found: LineSlice | Sequence[LineSlice],
    ax: Axes | None = None,
    *,
    learners: Projection | None = None,
    model: QuadraticModel | None = None,
) -> Axes:
    """The loss along a line, and beside it the same smoothed by kernels, each with its 95% interval.

    The interval joins the errors over examples and over deviations. All points meet the same examples, so the shape is better known than the
    height that the band shows. Losses that are not finite are crosses at the top. The quadratic model about the origin is dashed,
    and learners are ticks at their nearest points of the line.
    """
    ax = axes_or_new(ax)
    slices = [found] if isinstance(found, LineSlice) else list(found)
    if len({s.line.length for s in slices}) != 1:
        raise ValueError("lines drawn together must be slices of one line")
    spare = iter(SPARE)
    for one in slices:
        look = MEASURED if one.kernel == "none" else PREDICTION_LOOKS.get(one.kernel) or next(spare)
        text = "loss" if one.kernel == "none" else f"smoothed, {KERNEL_NAMES.get(one.kernel, one.kernel)}"
        _line(ax, one, look, text)
    shown = np.concatenate([s.loss[np.isfinite(s.loss)] for s in slices])
    log_if_wide(ax, shown)
    low, high = ax.get_ylim()
    line = slices[0].line
    if model is not None:
        at = np.linspace(slices[0].positions[0], slices[0].positions[-1], 200)
        ax.plot(
            at * line.length, model.at(at[:, None]), color=MODEL, linestyle=DASHED, label="quadratic model", zorder=1.5
        )
        ax.set_ylim(low, high)
    if learners is not None:
        ticks: dict[str, Any] = {"marker": "|", "color": LEARNERS, "linestyle": "none", "markeredgewidth": 1.6}
        ax.plot(learners.lengths[:, 0], np.zeros(len(learners.lengths)), markersize=12, clip_on=False, transform=ax.get_xaxis_transform(), gid="learners", **ticks)  # fmt: skip
        ax.plot([], [], markersize=6, label=f"{_number(learners, 'learner')}, {_left_out(learners)}", **ticks)
    ax.set(xlabel=f"distance along {line.name} (weights)", ylabel="loss (nats)")
    legend_above(ax, 2)
    return ax


@style()
def connectivity(found: LineSlice, ax: Axes | None = None, *, label: str | None = None) -> Axes:
    """The loss on the straight line between two weight vectors, over the interpolation of its ends, with the barrier and its 95% interval.

    The band is the 95% interval of the rise over the interpolation, whose examples are the same all along: what is common to all points is not in it.
    """
    ax = axes_or_new(ax)
    barrier = found.barrier()
    start, end = (float(found.loss[found.positions == t][0]) for t in (0.0, 1.0))
    _, rise_stderr = found.excess()
    _line(ax, found, MEASURED, "loss", stderr=rise_stderr, scaled=False)
    ax.plot([0, 1], [start, end], color="#777777", linestyle=DOTTED, label="interpolation of the ends")
    height, t = barrier.height, barrier.position
    if math.isfinite(height.value):
        base = (1 - t) * start + t * end
        error = "" if height.stderr == 0 else f" ± {Z95 * height.stderr:.2g}"
        text = f"barrier {height.value:.3g}{error} nats" if height.value > 0 else "no barrier"
        ax.plot([t, t], [base, base + height.value], color=MODEL, linewidth=2, label=text, gid="barrier")
    else:
        ax.plot([], [], " ", label="barrier infinite", gid="barrier")
    ax.set(xlabel="t, from the first weights to the second", ylabel="loss (nats)")
    legend_above(ax, 2, label)
    return ax


# Parts ---------------------------------------------------------------------------------------------------------------


def _line(
    ax: Axes, one: LineSlice, look: Look, text: str, *, stderr: np.ndarray | None = None, scaled: bool = True
) -> None:
    x = one.positions * (one.line.length if scaled else 1.0)
    finite = np.isfinite(one.loss)
    shown = np.where(finite, one.loss, np.nan)
    every = max(1, len(x) // 8)
    ax.plot(x, shown, label=text, markevery=(every // 2, every), **look.line_options())
    error = half_width(np.hypot(one.loss_stderr, one.smoothing_stderr) if stderr is None else stderr)
    if error.any():
        ax.fill_between(x, shown - error, shown + error, color=look.colour, alpha=0.18, linewidth=0)
    if not finite.all():
        ax.plot(x[~finite], np.full((~finite).sum(), 0.97), "x", color=look.colour, transform=ax.get_xaxis_transform(), label=f"{text} not finite",
                gid="non-finite", markersize=4)  # fmt: skip


def _grid(found: PlaneSlice) -> np.ndarray:
    if min(found.loss.shape) < 2:
        raise ValueError(
            "a plane is drawn from two coordinates along each axis at least; of a single one make a line_slice"
        )
    return found.lengths


def _fill(ax: Axes, found: PlaneSlice, x: np.ndarray, y: np.ndarray, model: QuadraticModel | None) -> None:
    _, levels = _levels(found.loss)
    losses = np.ma.masked_invalid(found.loss)
    if losses.max() > losses.min():
        bands = BoundaryNorm(levels, 256)
        ax.contourf(x, y, losses, levels=levels, cmap=COLOURS, norm=bands, extend="neither")
        ax.contour(x, y, losses, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        side = ax.inset_axes((1.03, 0, 0.04, 1))  # of the axes' own height, whatever their aspect
        bar = ax.get_figure(root=True).colorbar(ScalarMappable(bands, COLOURS), cax=side)  # type: ignore[union-attr]
        every = max(1, len(levels) // 6)
        bar.set_ticks(list(levels[::every]), labels=[f"{v:.3g}" for v in levels[::every]])
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7)
        bar.set_label("loss (nats)" if found.kernel == "none" else "smoothed loss (nats)")
    if model is not None:
        grid = np.stack(np.meshgrid(found.first, found.second, indexing="ij"), axis=-1)
        ax.contour(x, y, model.at(grid), levels=levels, colors=MODEL, linestyles=[(0, (4, 2))], linewidths=0.9)
        ax.plot([], [], color=MODEL, linestyle=DASHED, label="quadratic model")


def _levels(loss: np.ndarray) -> tuple[Normalize, np.ndarray]:
    """Colours and about a dozen levels over what is finite, logarithmic where that is wide and positive."""
    values = loss[np.isfinite(loss)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low > 0 and high / low > WIDE:
        return LogNorm(low, high), np.geomspace(low, high * (1 + 1e-9), 15)
    levels = MaxNLocator(14).tick_values(low, high if high > low else low + 1)
    return Normalize(low, high), np.asarray(levels)


def _arrows(ax: Axes, found: PlaneSlice, field: GradientField) -> None:
    at = found.plane.lengths(np.stack(np.meshgrid(field.first, field.second, indexing="ij"), axis=-1)).reshape(-1, 2)
    down = -field.lengths_slope.reshape(-1, 2)
    box = np.ptp(at, axis=0)
    if min(len(field.first), len(field.second)) < 2:
        raise ValueError("a gradient field over a line is no field: give it more than one coordinate along each axis")
    seen = down / box  # as the axes show it
    size = np.linalg.norm(seen, axis=1, keepdims=True)
    kept = np.isfinite(size[:, 0]) & (size[:, 0] > 0)
    step = 0.6 / max(len(field.first), len(field.second))
    arrows = (seen[kept] / size[kept]) * step * box
    ax.quiver(*at[kept].T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.003, color="#333333", alpha=0.8, pivot="mid",
              zorder=3, gid="field")  # fmt: skip
    ax.plot(
        [],
        [],
        color="#333333",
        marker=r"$\rightarrow$",
        markersize=9,
        linestyle="none",
        label="steepest descent in the plane",
    )


def _path(ax: Axes, trajectory: Projection) -> None:
    text = f"trajectory, {_left_out(trajectory, ax)}"
    halo = [withStroke(linewidth=2.6, foreground="white")]
    ax.plot(
        *trajectory.lengths.T,
        "-o",
        color=PATH,
        markersize=1.8,
        linewidth=1,
        zorder=5,
        label=text,
        gid="trajectory",
        path_effects=halo,
    )
    ax.plot(
        *trajectory.lengths[:1].T,
        "s",
        color=PATH,
        markerfacecolor="white",
        markersize=4.5,
        zorder=5.5,
        label="its start",
    )


def _raised(ax: Axes3D, found: PlaneSlice, height: np.ndarray, points: Projection, noun: str, **look: Any) -> None:
    """Points on the surface that stands above the grid; those beside it, or over its holes, are counted in the legend."""
    surface = RegularGridInterpolator((found.first, found.second), height, bounds_error=False)
    above = surface(points.coordinates)
    beside = int(np.isnan(above).sum())
    text = f"{noun} on the surface,\n{_left_out(points)}" + (f"; {beside} outside" if beside else "")
    halo = [withStroke(linewidth=2.6, foreground="white")]
    ax.plot(*points.lengths.T, above, label=text, path_effects=halo, gid=noun, **look)


def _number(points: Projection, noun: str) -> str:
    count = len(points.left_out)
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _left_out(points: Projection, ax: Axes | None = None) -> str:
    """What the projection leaves out, as a share of the distance, and how many points the axes do not show."""
    away = points.distance > 0
    share = points.left_out[away] / points.distance[away]
    if len(share) == 0:
        text = "at the origin"
    elif share.max() < 0.005:
        text = "none of the distance left out"
    else:
        low, high = share.min(), share.max()
        text = (
            f"{high:.0%} of the distance left out"
            if high - low < 0.005
            else f"{low:.0%} to {high:.0%} of the distance left out"
        )
    if ax is None:
        return text
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    x, y = points.lengths.T
    outside = int((~((x >= left) & (x <= right) & (y >= bottom) & (y <= top))).sum())
    return f"{text}; {outside} outside" if outside else text


def _axis_label(found: PlaneSlice, axis: int) -> str:
    name = found.plane.names[axis]
    shares = found.plane.shares
    return f"{name} (weights)" if shares is None else f"{name} (weights),\n{shares[axis]:.0%} of the squared distance"


def _title(found: PlaneSlice) -> Any:
    return None if found.kernel == "none" else f"smoothed by {KERNEL_NAMES.get(found.kernel, found.kernel)}"
