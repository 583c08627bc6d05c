"""Stability at the checkpoints of runs: alpha lambda_max/2 against its limits, and the coupled growth of the disagreement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from landscape.plotting.style import (
    DASHED,
    DOTTED,
    PREDICTION_LOOKS,
    axes_or_new,
    display_name,
    dodge,
    half_width,
    legend_above,
    log_if_wide,
    looks,
    over_steps,
    style,
)
from landscape.plotting.view import RunView

FUNCTIONS = (
    ("w_a", r"$L$ at $w_a$"),
    ("largest learner", "largest single learner"),
    ("isotropic", "smoothed, isotropic"),
    ("covariance", "smoothed, covariance"),
    ("learners", "smoothed, learners' own"),
)
"""Look and name of each row of alpha_lambda_half, in its order."""


@style()
def stability_margin(view: RunView, ax: Axes | None = None) -> Axes:
    """alpha lambda_max/2 of the landscape at w_a, of the largest single learner and of each smoothed landscape.

    Above the solid line a plain gradient step of the mean is unstable on the local quadratic (1 without momentum); above the
    dashed line the disagreement between learners is. The smoothed curvatures speak of the mean at frozen deviations only.
    """
    ax = axes_or_new(ax)
    at = view.group("stability")
    steps = at["step"].values
    values, errors = at["alpha_lambda_half"].values, at["alpha_lambda_half_stderr"].values
    spread = view.run.config.algorithm == "dpsgd"
    shown = [i for i in range(len(FUNCTIONS)) if np.isfinite(values[:, i]).any() and (spread or i != 1)]
    drawn: list[float] = []
    for place, i in enumerate(shown):
        look_name, text = FUNCTIONS[i]
        if look_name == "learners" and not spread:
            text = "at $w_a$, kinks included"
        ax.errorbar(dodge(steps, place, len(shown)), values[:, i], half_width(errors[:, i]), label=text,
                    markerfacecolor="white" if i else "black", **PREDICTION_LOOKS[look_name].line_options())  # fmt: skip
        drawn += values[:, i].tolist()
    limits = []
    for name, line, text in (("mean", "-", "limit of the mean"), ("disagreement", DASHED, "limit of the disagreement")):
        if f"threshold_{name}" in at:
            limit = float(at[f"threshold_{name}"].values.ravel()[0]) / 2
            ax.axhline(limit, color="#888888", linewidth=1.0, linestyle=line, label=f"{text}: {limit:.3g}", zorder=0)
            limits.append(limit)
    log_if_wide(ax, [*drawn, *limits])
    if ax.get_yscale() == "linear":
        ax.set_ylim(bottom=min(0.0, 1.05 * float(np.nanmin(drawn))))
    over_steps(ax, r"$\alpha\lambda_{\max}/2$ (above 1: too steep for $\alpha$)")
    legend_above(ax, 2, display_name(view.label))
    return ax


@style()
def coupled_growth(views: Sequence[RunView], ax: Axes | None = None) -> Axes:
    """Largest growth per step of the disagreement under the linearised step of all learners at once.

    Above 1 the disagreement grows by itself, without any minibatch noise. Open markers: the eigenvalue did not converge.
    """
    ax = axes_or_new(ax)
    drawn: list[float] = [1.0]
    for i, (view, look) in enumerate(zip(views, looks([v.variant for v in views]), strict=True)):
        at = view.groups.get("stability")
        if at is None or "coupled_disagreement" not in at:
            continue
        growth = at["coupled_disagreement"].values
        x = dodge(at["step"].values, i, len(views), 0.03)
        ax.plot(x, growth, label=display_name(view.label), **look.line_options())
        loose = ~at["coupled_converged"].values.astype(bool)
        if loose.any():
            ax.plot(x[loose], growth[loose], linestyle="none", marker=look.marker, color=look.colour, markerfacecolor="white",
                    gid="not-converged", label=f"{display_name(view.label)}: eigenvalue not converged", zorder=5)  # fmt: skip
        drawn += growth.tolist()
    ax.axhline(1, color="#888888", linewidth=1.0, linestyle=DOTTED, label="limit of stability: 1", zorder=0)
    log_if_wide(ax, drawn, 10.0)
    over_steps(ax, "growth of the disagreement per step")
    legend_above(ax, 2)
    return ax
