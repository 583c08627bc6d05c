"""The noise of a step: minibatch and landscape-dependent parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from landscape.plotting.dynamics import with_looks
from landscape.plotting.style import (
    DASH_DOT,
    DASHED,
    DOTTED,
    GREY,
    Look,
    axes_or_new,
    display_name,
    dodge,
    half_width,
    legend_above,
    log_scale,
    over_steps,
    style,
)
from landscape.plotting.view import RunView

PARTS: dict[str, tuple[str, Look]] = {
    "Delta_S": (r"minibatch $\Delta_S$", Look("#D55E00", DASHED, "s")),
    "Delta_2": (r"landscape $\Delta_2$", Look("#0072B2", "-", "o")),
    "Delta": (r"orthogonal $\Delta$", Look("#000000", DASH_DOT, "D")),
    "cross": (r"|cross|", Look(GREY, DOTTED, "^")),
}
NAMES = {"Delta_S": r"$\Delta_S$", "Delta_2": r"$\Delta_2$", "Delta": r"$\Delta$", "cross": "cross"}


@style()
def noise_split(view: RunView, ax: Axes | None = None) -> Axes:
    """Strength of the noise of one step and its parts, means over fresh minibatches with 95% intervals.

    Delta_S = alpha^2 |xi_S|^2 of the minibatches, Delta_2 = alpha^2 |xi_D|^2 of the landscape, cross = 2 alpha^2 xi_S . xi_D, and
    Delta = |eta|^2, the part of the whole that is orthogonal to g. The cross term has a sign: its size is drawn, open where it is negative. Parts that are exactly zero are named in the legend.
    The predicted minibatch part alpha^2 Tr(C)/(n B) is a thin line.
    """
    ax = axes_or_new(ax)
    at = view.group("noise")
    steps = at["step"].values
    for i, (name, (text, look)) in enumerate(PARTS.items()):
        mean, error = at[f"{name}_mean"].values, half_width(at[f"{name}_stderr"].values)
        x, size = dodge(steps, i, len(PARTS)), np.abs(mean)
        if not (size > 0).any():
            ax.plot([], [], label=f"{NAMES[name]} = 0", **look.line_options())
            continue
        shown = size > 0
        down = np.minimum(error, 0.9 * size)  # a bar that reaches zero would leave a logarithmic axis
        ax.errorbar(x[shown], size[shown], np.stack([down, error])[:, shown], label=text, **look.line_options())
        negative = mean < 0
        if negative.any():
            ax.plot(x[negative], size[negative], linestyle="none", marker=look.marker, color=look.colour, markerfacecolor="white",
                    gid="negative", label="cross < 0", zorder=5)  # fmt: skip
    predicted = at["Delta_S_predicted"].values
    ax.plot(steps, predicted, color="#D55E00", linewidth=0.8, label=r"$\alpha^2\mathrm{Tr}\,C/(nB)$")
    log_scale(ax)
    over_steps(ax, r"noise of one step (weights$^2$)")
    legend_above(ax, 3, display_name(view.label))
    return ax


@style()
def systematic_share(views: Sequence[RunView], ax: Axes | None = None) -> Axes:
    """|E xi_D|^2/E|xi_D|^2: how much of the landscape-dependent noise is the same at every draw; 95% intervals."""
    ax = axes_or_new(ax)
    for i, (view, look) in enumerate(with_looks(views)):
        at = view.group("noise")
        if "systematic_share" in at and np.isfinite(at["systematic_share"]).any():
            ax.errorbar(dodge(at["step"].values, i, len(views)), at["systematic_share"].values, half_width(at["systematic_share_stderr"].values),
                        label=display_name(view.label), **look.line_options())  # fmt: skip
    ax.axhline(1, color="#777777", linewidth=0.8, linestyle=DOTTED, zorder=0)
    over_steps(ax, r"systematic share $|\mathrm{E}\,\xi_D|^2/\mathrm{E}|\xi_D|^2$")
    legend_above(ax, 3)
    return ax
