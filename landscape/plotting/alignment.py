"""Noise against curvature, and the disagreement between learners mode by mode."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from landscape.plotting.style import (
    DASH_DOT,
    DASHED,
    DOTTED,
    LOOKS,
    MARKERS,
    PALEST,
    SPARE,
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
    whole_numbers,
)
from landscape.plotting.view import RunView

NOISES: dict[str, tuple[str, Look]] = {
    "gradient": ("minibatch noise", Look("#D55E00", DASHED, "s")),
    "landscape": ("landscape noise", Look("#0072B2", "-", "o")),
    "consensus": (r"learners' spread $\Sigma_w$", Look("#009E73", DASH_DOT, "D")),
}


STEP_NOISES: dict[str, tuple[str, Look]] = {
    "ssgd": ("SSGD", LOOKS["ssgd"]),
    "ssgd-star": ("SSGD*, same spread", LOOKS["ssgd-star"]),
    "dpsgd": ("DPSGD", LOOKS["dpsgd"]),
    "landscape": ("landscape part", SPARE[0]),
}


def _last(view: RunView, measure: str) -> tuple[int, xr.Dataset]:
    at = view.group(measure).isel(step=-1)
    return int(at["step"]), at


@style()
def noise_law(view: RunView, ax: Axes | None = None) -> Axes:
    """Share of each noise along the top eigenvectors of H against their eigenvalues, at the last checkpoint measured.

    u_i^T C u_i/Tr C over lambda_i, with the fitted power law (thin where it is inconclusive) and its exponent with 95% interval in the
    legend. What is not positive is not drawn.
    """
    ax = axes_or_new(ax)
    step, at = _last(view, "alignment")
    values = at["eigenvalue"].values
    for name, (text, look) in NOISES.items():
        part = at.sel(noise=name)
        share = part["noise_along"].values / float(part["noise_trace"])
        shown = (share > 0) & (values > 0)
        if not shown.any():
            continue
        low, high = float(part["exponent_low"]), float(part["exponent_high"])
        measured = str(part["exponent_verdict"].values) == "measured"
        label = f"{text}: " + (rf"$\gamma$ = {float(part['exponent']):.2f} [{low:.2f}, {high:.2f}]" if measured else r"$\gamma$ inconclusive")  # fmt: skip
        ax.plot(values[shown], share[shown], linestyle="none", marker=look.marker, color=look.colour, label=label)
        if np.isfinite(float(part["exponent"])):
            ends = np.array([values[shown].min(), values[shown].max()])
            line = float(part["exponent_prefactor"]) * ends ** float(part["exponent"]) / float(part["noise_trace"])
            ax.plot(ends, line, color=look.colour, linestyle=look.line, linewidth=1.3 if measured else 0.6)
    log_scale(ax)
    log_scale(ax, "x")
    ax.set(xlabel=r"eigenvalue $\lambda_i$ of $H(w_a)$", ylabel=r"share of the noise, $u_i^{T} C u_i/\mathrm{Tr}\,C$")
    legend_above(ax, 1, f"{display_name(view.label)}, step {step}")
    return ax


@style()
def layer_exponents(view: RunView, ax: Axes | None = None) -> Axes:
    """Exponent of minibatch noise on curvature in each layer, with 95% intervals; open where the layer does not carry it."""
    ax = axes_or_new(ax)
    step, at = _last(view, "alignment-by-layer")
    names = [str(v) for v in at["layer"].values]
    for i, name in enumerate(names):
        part = at.sel(layer=name)
        value = float(part["exponent"])
        if not np.isfinite(value):
            continue
        measured = str(part["exponent_verdict"].values) == "measured"
        error = np.array([[value - float(part["exponent_low"])], [float(part["exponent_high"]) - value]])
        ax.errorbar([value], [i], xerr=error, color="#D55E00", marker="s", linestyle="none", markerfacecolor="#D55E00" if measured else "white")  # fmt: skip
    ax.axvspan(1, 2, color="#999999", alpha=0.18, linewidth=0, label="1 to 2 (arXiv 2602.05600)")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlabel=r"exponent $\gamma$ of $u_i^{T} C u_i \sim \lambda_i^{\gamma}$", ylabel="layer")
    legend_above(ax, 1, f"{display_name(view.label)}, step {step}")
    return ax


@style()
def step_noise_spectra(view: RunView, ax: Axes | None = None) -> Axes:
    """Eigenvalues of the covariance of one step's noise at the last checkpoint measured, with gradients taken where each algorithm takes them.

    The legend gives each one's trace and effective rank Tr(C)^2/|C|_F^2. A sample spreads eigenvalues: compare curves of one figure, which
    have the same number of draws, not with those of another.
    """
    ax = axes_or_new(ax)
    step, at = _last(view, "covariance")
    for name, (text, look) in STEP_NOISES.items():
        part = at.sel(step_noise=name)
        values = part["step_eigenvalue"].values
        values = values[values > 1e-9 * np.nanmax(values)] if np.isfinite(values).any() else values[:0]
        if not len(values):
            continue
        rank = float(part["step_effective_rank"])
        label = f"{text}: trace {float(part['step_trace']):.2g}" + (f", rank {rank:.1f}" if np.isfinite(rank) else "")
        ax.plot(
            np.arange(1, len(values) + 1),
            values,
            label=label,
            markevery=max(1, len(values) // 8),
            **look.line_options(),
        )
    log_scale(ax)
    whole_numbers(ax, "x")
    ax.set(xlabel="number of the eigenvalue", ylabel=r"variance of a step (weights$^2$)")
    legend_above(ax, 1, f"{display_name(view.label)}, step {step}")
    return ax


@style()
def disagreement_modes(view: RunView, ax: Axes | None = None) -> Axes:
    """Energy of the learners' deviations along each top eigenvector of H over what minibatch noise alone would sustain.

    The last checkpoint measured, with 95% intervals of one sample; arrows at the top are modes for which the local quadratic is
    unstable and sustains no finite value.
    """
    ax = axes_or_new(ax)
    step, at = _last(view, "disagreement")
    values, ratio = at["eigenvalue"].values, at["energy_ratio"].values
    finite = np.isfinite(at["mode_energy_predicted"].values) & (ratio > 0)
    down = np.maximum(ratio - at["energy_ratio_low"].values, 0)
    up = np.maximum(at["energy_ratio_high"].values - ratio, 0)
    look = Look("#0072B2", "-", "o")
    if finite.any():
        ax.errorbar(values[finite], ratio[finite], np.stack([down, up])[:, finite], linestyle="none", marker=look.marker, color=look.colour)  # fmt: skip
    outside = float(at["outside_ratio"])
    if outside > 0:
        ax.axhline(
            outside,
            color=SPARE[0].colour,
            linestyle=SPARE[0].line,
            label=f"outside the top {len(values)}: {outside:.3g}",
        )
    ax.axhline(1, color="#777777", linewidth=0.8, linestyle=DOTTED, label="minibatch noise alone")
    log_scale(ax)
    log_scale(ax, "x")
    unstable = values[np.isinf(at["mode_energy_predicted"].values)]
    if len(unstable):
        ax.autoscale_view()
        (height,) = band_at_top(ax, 1, "unstable: nothing finite is predicted (↑)")
        ax.plot(unstable, np.full(len(unstable), height - 0.02), transform=ax.get_xaxis_transform(), linestyle="none", marker=r"$\uparrow$",
                color=look.colour, markersize=6, gid="unstable-mode")  # fmt: skip
    ax.set(xlabel=r"eigenvalue $\lambda_i$ of $H(w_a)$", ylabel="energy, measured over predicted")
    legend_above(ax, 2, f"{display_name(view.label)}, step {step}")
    return ax


@style()
def rate_by_layer(view: RunView, ax: Axes | None = None) -> Axes:
    """Effective over nominal learning rate of each layer alone, with 95% intervals over draws."""
    ax = axes_or_new(ax)
    at = view.group("effective-learning-rate")
    steps = at["step"].values
    names = [str(v) for v in at["layer"].values]
    shades = np.linspace(0.0, PALEST, len(names))
    for i, (name, shade) in enumerate(zip(names, shades, strict=True)):
        part = at.sel(layer=name)
        ax.errorbar(dodge(steps, i, len(names)), part["alpha_e_ratio_by_layer_mean"].values, half_width(part["alpha_e_ratio_by_layer_stderr"].values),
                    marker=MARKERS[i % len(MARKERS)], color=(0.0, 0.45 * (1 - shade), 0.7 * (1 - shade)) if len(names) <= 8 else str(shade), label=name)  # fmt: skip
    ax.axhline(1, color="#777777", linewidth=0.8, linestyle=DOTTED, zorder=0)
    over_steps(ax, r"$\alpha_e/\alpha$ of the layer")
    legend_above(ax, 4, f"{display_name(view.label)}, by layer")
    return ax
