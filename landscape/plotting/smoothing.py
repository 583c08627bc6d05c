"""The smoothed landscape: curvature at the kinks, bounds on it, and how safe the finite differences are."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from landscape.plotting.style import (
    DASH_DOT,
    DASHED,
    DOTTED,
    INDIGO,
    MARKERS,
    OCHRE,
    PALEST,
    PREDICTION_LOOKS,
    Look,
    axes_or_new,
    band_at_top,
    display_name,
    dodge,
    half_width,
    legend_above,
    log_scale,
    over_steps,
    style,
)
from landscape.plotting.view import RunView

KERNEL_NAMES = {
    "isotropic": "isotropic kernel",
    "covariance": "covariance kernel",
    "learners": "the learners' own kernel",
}
BOUNDS: dict[str, tuple[str, Look]] = {
    "paper": (r"$2G/\sigma$", Look("#D55E00", "-", "s")),
    "duchi": (r"$G/\sigma$", Look(OCHRE, DASHED, "^")),
    "sharp": (r"$\sqrt{2/\pi}\,G/\sigma$", Look("#CC79A7", DASH_DOT, "v")),
    "smooth": (r"$\ell_s\,\mathrm{erf}(G/\sqrt{2}\ell_s\sigma)$", Look("#009E73", DOTTED, "D")),
    "local": (r"$\sqrt{\lambda_{\max}\mathrm{Cov}\,g}/\sigma$", Look(INDIGO, (0, (3, 1, 1, 1)), "P")),
}


@style()
def kink_part(view: RunView, ax: Axes | None = None) -> Axes:
    """Curvature of the smoothed landscape that the average of autodiff Hessians misses, by kernel.

    lambda_max of the derivative of the smoothed gradient less that of the averaged autodiff Hessian; 95% intervals over
    deviations (none for the learners' own kernel, which is exact).
    """
    ax = axes_or_new(ax)
    at = view.group("smoothing")
    kernels = [str(k) for k in at["kernel"].values if np.isfinite(at["kink_part"].sel(kernel=k)).any()]
    for i, kernel in enumerate(kernels):
        part = at.sel(kernel=kernel)
        look = PREDICTION_LOOKS[kernel]
        ax.errorbar(dodge(at["step"].values, i, len(kernels)), part["kink_part"].values, half_width(part["lambda_max_stderr"].values),
                    label=_kernel_name(part, kernel), **look.line_options())  # fmt: skip
    ax.axhline(0, color="#777777", linewidth=0.8)
    over_steps(ax, r"kink part of $\lambda_{\max}$ (nats / weights$^2$)")
    legend_above(ax, 2, display_name(view.label))
    return ax


@style()
def smoothness_bounds(view: RunView, ax: Axes | None = None) -> Axes:
    """Smoothness of the landscape under the isotropic kernel, measured, below its estimated bounds.

    The bounds rest on the largest gradient met, so they are estimates of bounds. The legend gives each one's tightness, the median
    of bound over measured: a large number is a vacuous bound. Infinite bounds (no weight noise) are arrows at the top.
    """
    ax = axes_or_new(ax)
    at = view.group("smoothing")
    steps = at["step"].values
    measured = at.sel(kernel="isotropic")
    text = "measured, isotropic kernel"
    if not np.isfinite(measured["smoothness"]).any():
        measured, text = at.sel(kernel="learners"), "measured, no smoothing"
    value = measured["smoothness"].values
    error = half_width(measured["lambda_max_stderr"].values)
    infinite = []
    for name in (str(k) for k in at["bound_kind"].values):
        label, look = BOUNDS.get(name, (name, Look("#666666", DASHED, "X")))
        bound = at["bound"].sel(bound_kind=name).values
        finite = np.isfinite(bound)
        ratios = (bound / value)[finite & (value > 0)]
        note = f"{label}: ×{_short(float(np.median(ratios)))}" if len(ratios) else f"{label}: infinite"
        ax.plot(steps[finite], bound[finite], label=note, markerfacecolor="white", **look.line_options())
        if not finite.all():
            infinite.append((look, steps[~finite]))
    ax.errorbar(
        steps, value, np.stack([np.minimum(error, 0.9 * value), error]), color="black", marker="o", label=text, zorder=5
    )
    log_scale(ax)
    if infinite:
        ax.autoscale_view()
        rows = band_at_top(ax, len(infinite), "infinite: no weight noise, nothing is smoothed (↑)")
        for height, (look, where) in zip(rows, infinite, strict=True):
            ax.plot(where, np.full(len(where), height - 0.02), transform=ax.get_xaxis_transform(), linestyle="none", marker=r"$\uparrow$",
                    color=look.colour, markersize=6, gid="infinite-bound")  # fmt: skip
    over_steps(ax, r"smoothness of $\tilde L$ (nats / weights$^2$)")
    legend_above(ax, 2, f"{display_name(view.label)}: estimated bounds, × bound / measured")
    return ax


@style()
def difference_plateau(view: RunView, kernel: str | None = None, ax: Axes | None = None) -> Axes:
    """Whether the curvature hangs on the step of the finite differences: a flat line says that it does not.

    Args:
        view: a run.
        kernel: by default the learners' own, or the first that was measured where that was not.
        ax: where to draw.
    """
    ax = axes_or_new(ax)
    at = view.group("smoothing")
    if kernel is None:
        measured = [
            k
            for k in KERNEL_NAMES
            if k in at["kernel"].values and np.isfinite(at["plateau_values"].sel(kernel=k)).any()
        ]
        kernel = measured[-1] if measured else "learners"
    part = at.sel(kernel=kernel)
    shades = np.linspace(PALEST, 0.0, part.sizes["step"])
    for (step, at), shade, marker in zip(part.groupby("step"), shades, cycle(MARKERS)):
        ax.plot(at["plateau_steps"].values.ravel(), at["plateau_values"].values.ravel(), marker=marker, color=str(shade),
                label=f"step {step}")  # fmt: skip
    log_scale(ax, "x")
    ax.set(
        xlabel="difference step e (length in weight space)",
        ylabel=r"curvature along the top vector (nats / weights$^2$)",
    )
    legend_above(ax, 4, f"{display_name(view.label)}, {_kernel_name(part, kernel)}")
    return ax


def is_smoothed(view: RunView) -> bool:
    """Whether the learners of a run differ, so that their kernels smooth at all."""
    return bool((view.group("smoothing")["sigma_w"] > 0).any())


def _kernel_name(part: xr.Dataset, kernel: str) -> str:
    return KERNEL_NAMES[kernel] if (part["sigma_w"] > 0).any() else "no smoothing"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.3g}" if value < 1e4 else f"{value:.1e}"
