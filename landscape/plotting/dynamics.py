"""How training went: loss, accuracy, effective learning rate, spread of the learners, and what each step gained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from landscape.plotting.style import (
    DOTTED,
    MEASURED,
    PREDICTION_LOOKS,
    Look,
    axes_or_new,
    band_at_top,
    display_name,
    dodge,
    half_width,
    legend_above,
    log_if_wide,
    log_scale,
    looks,
    marker_places,
    over_steps,
    style,
    symlog_scale,
)
from landscape.plotting.view import RunView

PREDICTION_NAMES = {
    "exact": "learners' kernel (exact)",
    "isotropic": "isotropic kernel",
    "covariance": "covariance kernel",
    "second-order": "second order",
    "second-order-autodiff": "second order, without kinks",
}
LEDGER_PARTS = {
    "gain": (r"gain $-\alpha_e|g|^2$", "#009E73", ""),
    "along": (r"curvature along $g$", "#E69F00", "///"),
    "across": (r"curvature across $g$", "#D55E00", "\\\\\\"),
    "mixed": (r"mixed", "#BBBBBB", "xxx"),
}

FAR = 30.0
"""Ratio of the largest checkpoint of a ledger to the smallest from which a linear axis would hide the small ones."""


@style()
def training_loss(views: Sequence[RunView], ax: Axes | None = None) -> Axes:
    """Training loss of w_a over the steps, with the convergence threshold and the loss of constant output.

    A run that met a non-finite loss or gradient ends in a cross.
    """
    ax = axes_or_new(ax)
    drawn: list[float] = []
    for view, look in with_looks(views):
        loss = view.series("train_loss")
        finite = loss[np.isfinite(loss)]
        places = marker_places(finite.index.to_numpy())
        ax.plot(finite.index, finite, label=display_name(view.label), markevery=places, **look.line_options())
        drawn += finite.tolist()
        died = view.run.record.get("diverged_at")
        if died is not None:
            height = float(finite.iloc[-1]) if len(finite) else float(view.run.record["constant_loss"])
            ax.plot([died], [height], "x", color=look.colour, markersize=9, markeredgewidth=2, gid="non-finite",
                    label=f"{display_name(view.label)}: non-finite at step {died}")  # fmt: skip
    for level, text, line in _levels(views):
        ax.axhline(level, color="#777777", linewidth=0.8, linestyle=line, label=text, zorder=0)
    log_if_wide(ax, drawn, 20.0)
    over_steps(ax, r"training loss of $w_a$ (nats)")
    legend_above(ax, 3)
    return ax


@style()
def held_out_accuracy(views: Sequence[RunView], ax: Axes | None = None) -> Axes:
    """Held-out accuracy of w_a (line) and the range over the single learners (band)."""
    ax = axes_or_new(ax)
    for view, look in with_looks(views):
        accuracy = view.series("test_accuracy")
        places = marker_places(accuracy.index.to_numpy())
        ax.plot(accuracy.index, accuracy, label=display_name(view.label), markevery=places, **look.line_options())
        each = view.series("learner_test_accuracy")
        if len(each):
            table = np.asarray(each.tolist(), dtype=float)
            ax.fill_between(each.index, table.min(1), table.max(1), color=look.colour, alpha=0.18, linewidth=0)
    over_steps(ax, "held-out accuracy (share correct)")
    ax.set_ylim(0, 1.02)
    legend_above(ax, 3)
    return ax


@style()
def effective_learning_rate(view: RunView, ax: Axes | None = None) -> Axes:
    """E alpha_e/alpha of one run, measured over fresh minibatches, beside every prediction of it; 95% intervals."""
    ax = axes_or_new(ax)
    at = view.group("effective-learning-rate")
    steps = at["step"].values
    known = [
        str(p) for p in at["prediction"].values if np.isfinite(at["alpha_e_ratio_predicted"].sel(prediction=p)).any()
    ]
    count = len(known) + 1
    ax.axhline(1, color="#777777", linewidth=0.8, linestyle=DOTTED, zorder=0)
    ax.errorbar(dodge(steps, 0, count), at["alpha_e_ratio_mean"].values, half_width(at["alpha_e_ratio_stderr"].values),
                color=MEASURED.colour, marker="o", linewidth=1.6, label="measured", zorder=5)  # fmt: skip
    for i, name in enumerate(known, 1):
        part = at.sel(prediction=name)
        look = PREDICTION_LOOKS.get(name, MEASURED)
        ax.errorbar(dodge(steps, i, count), part["alpha_e_ratio_predicted"].values, half_width(part["alpha_e_ratio_predicted_stderr"].values),
                    markerfacecolor="white", label=PREDICTION_NAMES.get(name, name), **look.line_options())  # fmt: skip
    over_steps(ax, r"effective / nominal rate $\mathrm{E}\,\alpha_e/\alpha$")
    legend_above(ax, 2, display_name(view.label))
    return ax


@style()
def weight_variance(views: Sequence[RunView], ax: Axes | None = None) -> Axes:
    """sigma_w^2 = Tr(Sigma_w)/d over training, with what minibatch noise alone would sustain at each checkpoint.

    Where the local quadratic is unstable that prediction is infinite: an arrow in the band at the top.
    """
    ax = axes_or_new(ax)
    unstable: list[tuple[Look, np.ndarray]] = []
    alone = False
    for view, look in with_looks(views):
        name = display_name(view.label)
        variance = view.series("sigma_w") ** 2
        shown = variance[np.isfinite(variance) & (variance > 0)]
        if len(shown):
            ax.plot(shown.index, shown, color=look.colour, linestyle=look.line, label=name, linewidth=1.1)
        elif len(variance):
            ax.plot([], [], color=look.colour, linestyle=look.line, label=f"{name}: exactly 0")
        if "noise" not in view.groups or not len(shown):
            continue
        noise = view.groups["noise"]
        predicted = noise["consensus_trace_predicted"].values / view.num_parameters
        steps = noise["step"].values
        finite = np.isfinite(predicted) & (predicted > 0)
        if finite.any():
            ax.plot(steps[finite], predicted[finite], linestyle="none", marker=look.marker, color=look.colour, markerfacecolor="white",
                    gid="prediction", zorder=4)  # fmt: skip
            alone = True
        if np.isposinf(predicted).any():
            unstable.append((look, steps[np.isposinf(predicted)]))
    if any(np.size(line.get_xdata()) for line in ax.get_lines()):
        log_scale(ax)
    if alone:
        ax.plot([], [], "o", color="#555555", markerfacecolor="white", label="open: minibatch noise alone")
    if unstable:
        _mark_infinite(ax, unstable)
    over_steps(ax, r"$\sigma_w^2=\mathrm{Tr}\,\Sigma_w/d$ (weights$^2$)")
    legend_above(ax, 2)
    return ax


@style()
def one_step_ledger(view: RunView, ax: Axes | None = None) -> Axes:
    """What one plain step changes L(w_a) by: predicted as the sum of its parts (bars), and realised; 95% intervals.

    Where checkpoints differ more than FAR-fold in size the axis is logarithmic in both directions: of stacked bars read the ends, not the lengths.
    """
    ax = axes_or_new(ax)
    at = view.group("ledger")
    place = np.arange(at.sizes["step"])
    ax.use_sticky_edges = False  # of stacked bars, whose ends would lie on the frame
    above, below = np.zeros(len(place)), np.zeros(len(place))
    for name, (text, colour, hatch) in LEDGER_PARTS.items():
        values = at[f"{name}_mean"].values
        base = np.where(values >= 0, above, below)
        ax.bar(place, values, 0.5, base, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=text)
        above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
    for name, shift, face in (("predicted", -0.1, "white"), ("realised", 0.1, "black")):
        ax.errorbar(place + shift, at[f"{name}_mean"].values, half_width(at[f"{name}_stderr"].values), linestyle="none",
                    marker="D" if name == "predicted" else "o", color="black", markerfacecolor=face, label=f"{name} change")  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    sizes = np.maximum(above, -below)
    smallest = float(sizes[sizes > 0].min(initial=np.inf))
    if sizes.max() > FAR * smallest:
        symlog_scale(ax, smallest / 2)
    ax.set_xticks(place[:: max(1, len(place) // 8)], [str(s) for s in at["step"].values[:: max(1, len(place) // 8)]])
    ax.set(xlabel="checkpoint (step)", ylabel=r"change of $L(w_a)$ in one step (nats)")
    legend_above(ax, 3, display_name(view.label))
    return ax


def with_looks(views: Sequence[RunView]) -> list[tuple[RunView, Look]]:
    return list(zip(views, looks([v.variant for v in views]), strict=True))


def _levels(views: Sequence[RunView]) -> list[tuple[float, str, object]]:
    """Horizontal lines that the runs share or have each: thresholds and losses of constant output."""
    records = [v.run.record for v in views]
    thresholds, constants = ({r[k] for r in records if k in r} for k in ("threshold", "constant_loss"))
    return [(v, f"converged below {v:g}", DOTTED) for v in sorted(thresholds)] + [
        (v, f"constant output, {v:.3g}", (0, (1, 4))) for v in sorted(constants)
    ]


def _mark_infinite(ax: Axes, unstable: list[tuple[Look, np.ndarray]]) -> None:
    ax.autoscale_view()
    rows = band_at_top(ax, len(unstable), "unstable: no stationary value (↑)")
    for height, (look, steps) in zip(rows, unstable, strict=True):
        ax.plot(steps, np.full(len(steps), height - 0.02), transform=ax.get_xaxis_transform(), linestyle="none", marker=r"$\uparrow$",
                color=look.colour, markersize=6, gid="infinite-prediction", zorder=4)  # fmt: skip
