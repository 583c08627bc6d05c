"""Spectra of the Hessian: the density of all eigenvalues with those known exactly, and the top ones over training."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from landscape.curvature.density import SpectralDensity
from landscape.plotting.dynamics import with_looks
from landscape.plotting.style import (  # fmt: skip
    DOTTED,
    GREY,
    LOOKS,
    Look,
    axes_or_new,
    display_name,
    half_width,
    legend_above,
    log_if_wide,
    over_steps,
    style,
    symlog_scale,
)
from landscape.plotting.view import RunView

DENSITY_LOOK = LOOKS["dpsgd"]
FLOOR = 0.1
"""Where the density's axis ends, as a share of the peak that one single eigenvalue makes: below is the tail of the kernel alone."""


@style()
def spectral_density(
    result: SpectralDensity | xr.Dataset, ax: Axes | None = None, *, label: str = "density", look: Look = DENSITY_LOOK
) -> Axes:
    """The density of eigenvalues on a logarithmic scale, its 95% band over probes, and the exact outliers as ticks at the top.

    The density is that of the axis coordinate, so it integrates to 1 as drawn: of the eigenvalue on a linear axis, of asinh(eigenvalue/threshold)
    on a symlog one. The dotted line is the peak of one eigenvalue alone, 1/(d sigma sqrt(2 pi)). Axes given twice hold two densities.

    Args:
        result: of `landscape.spectral_density`, or its `to_xarray()`.
        ax: where to draw.
        label: what it is the density of, for the legend.
        look: colour and line.
    """
    ax = axes_or_new(ax)
    at = result.to_xarray() if isinstance(result, SpectralDensity) else result
    values, density = at["eigenvalue"].values, at["density"].values
    one = 1 / (int(at.attrs["dimension"]) * float(at.attrs["kernel_width"]) * math.sqrt(2 * math.pi))
    floor = FLOOR * one
    band = half_width(at["density_stderr"].values)
    shown = np.where(density > floor, density, np.nan)
    again = any(line.get_gid() == "one eigenvalue" for line in ax.get_lines())
    ax.plot(values, shown, color=look.colour, linestyle=look.line, label=label)
    if band.any():
        text = f"95% over {at.sizes['probe']} probes" if not again else None
        ax.fill_between(values, np.maximum(density - band, floor), np.maximum(density + band, floor), color=look.colour, alpha=0.22,
                        linewidth=0, label=text, gid="band")  # fmt: skip
    outliers = at["outlier"].values
    if len(outliers):
        height = 0.94 if again else 0.98
        ax.plot(outliers, np.full(len(outliers), height), transform=ax.get_xaxis_transform(), linestyle="none", marker="|", markersize=7,
                markeredgewidth=1.2, color=look.colour, gid="outlier", label=f"{len(outliers)} exact eigenvalue{'s' * (len(outliers) > 1)}")  # fmt: skip
    ax.axhline(one, color=GREY, linewidth=0.8, linestyle=DOTTED, label="peak of one eigenvalue" if not again else None, gid="one eigenvalue", zorder=0)  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylim(floor if not again else min(floor, ax.get_ylim()[0]), None)
    symlog = at.attrs["axis"] == "symlog"
    if symlog:
        symlog_scale(ax, float(at.attrs["linear_threshold"]), "x")
    unit = r"density of asinh($\lambda/\lambda_0$)" if symlog else r"density (1 / eigenvalue)"
    ax.set(xlabel=r"eigenvalue $\lambda$", ylabel=unit)
    legend_above(ax, 2)
    return ax


@style()
def top_eigenvalues(view: RunView, ax: Axes | None = None) -> Axes:
    """The top eigenvalues of H(w_a) over training, the largest of each learner's own Hessian, and the most negative one.

    Open markers: the eigenvalue did not converge within the products allowed, so it is a lower bound in size.
    """
    ax = axes_or_new(ax)
    ((_, look),) = with_looks([view])
    at = view.group("curvature")
    steps, values = at["step"].values, at["eigenvalue"].values
    loose = ~at["converged"].values.astype(bool) & np.isfinite(values)
    count = int(np.isfinite(values).any(0).sum())
    for i in range(count - 1, 0, -1):
        ax.plot(steps, values[:, i], color=look.colour, alpha=0.55, linewidth=0.7, marker=".", markersize=3, zorder=1, label=f"next {count - 1}" if i == 1 else None)  # fmt: skip
    ax.plot(steps, values[:, 0], label=r"largest at $w_a$", zorder=3, **look.line_options())
    rows, columns = np.nonzero(loose)
    if len(rows):
        ax.plot(steps[rows], values[rows, columns], linestyle="none", marker=look.marker, color=look.colour, markerfacecolor="white", markersize=3.5, gid="not-converged",
                label="not converged", zorder=4)  # fmt: skip
    drawn = values[:, 0].tolist()
    if "learner_lambda_max" in at and view.run.config.algorithm == "dpsgd":
        each = at["learner_lambda_max"].values
        ax.plot(steps, each, linestyle="none", marker="x", markersize=4, color="#000000", zorder=2)
        ax.plot([], [], linestyle="none", marker="x", markersize=4, color="#000000", label="largest of each learner")
        drawn += each[np.isfinite(each)].tolist()
    if "lambda_min" in at and (at["lambda_min"] < 0).any():
        ax.plot(steps, at["lambda_min"].values, color="#000000", linestyle=DOTTED, marker="v", label="most negative")
        drawn += at["lambda_min"].values.tolist()
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    if values[np.isfinite(values)].min(initial=math.inf) > 0:
        log_if_wide(ax, [*drawn, *values[np.isfinite(values)].tolist()])
    over_steps(ax, r"eigenvalue of $H$ (nats / weights$^2$)")
    legend_above(ax, 2, display_name(view.label))
    return ax
