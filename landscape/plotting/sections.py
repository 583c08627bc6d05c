"""What the report shows of runs and maps: for each measure a title, a word on it, figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from landscape.plotting import alignment, dynamics, maps, noise, smoothing, spectra, stability, tables
from landscape.plotting.document import Picture, Section
from landscape.plotting.scorecard import ROW_HEIGHT, rows_of, scorecard_figure
from landscape.plotting.style import display_name, new_figure, to_svg
from landscape.plotting.view import RunView
from landscape.theory.scorecard import scorecard


def _picture(
    draw: Callable[..., Axes], alternative: str, caption: str, *, wide: bool = False, height: float = 3.1
) -> Picture:
    figure = new_figure("two-column" if wide else "report", height=height)
    draw(ax=figure.subplots())
    return Picture(to_svg(figure), alternative, caption, wide)


def map_section(index: int, name: str, result: xr.Dataset) -> Section:
    """A stability map: how runs ended, and how often they converge at which learning rate."""
    table = tables.convergence_table(result)
    said = "; ".join(f"{row[0]}: {', '.join(str(c) for c in row[1:-1])}" for row in table.rows)
    rates, seeds = result.sizes["learning_rate"], result.sizes["seed"]
    pictures = [
        _picture(partial(maps.outcome_map, result), f"How each run ended, by variant, rate and seed. {said}.",
                 "How every run ended. An empty place was not run.", wide=rates * seeds > 24, height=0.7 + 0.45 * max(3, result.sizes["variant"])),
        _picture(partial(maps.convergence_probability, result), f"Share of seeds that converge against the learning rate. {said}.",
                 "Share of seeds that converge, with Wilson 95% intervals; a star marks the edge, where the share crosses one half."),
        _picture(partial(maps.threshold_sensitivity, result), "Number of converged runs against the threshold that defines convergence.",
                 "How the counts hang on the definition of convergence; the dotted line is the task's threshold."),
        _picture(partial(maps.time_to_threshold, result), "Steps until the training loss is below the threshold, against the learning rate.",
                 "Steps to the threshold: small points are seeds, lines their medians, numbers the seeds that never get there.", height=3.6 if result.sizes["variant"] > 3 else 3.1),
    ]  # fmt: skip
    return Section(
        f"map-{index}",
        "Who converges at which learning rate" + (f": {name}" if name else ""),
        "The same network, data and seeds under each algorithm. A run has converged when its median training loss over the last 50 steps is "
        "below the threshold; stuck means near the loss of constant output, and slow is everything between.",
        pictures,
        [table, tables.sensitivity_table(result)],
    )


def training(views: Sequence[RunView]) -> Section:
    """Loss, accuracy and spread of the learners over training; without figures where nothing was logged."""
    views = [v for v in views if len(v.series("train_loss")) or v.run.record.get("diverged_at") is not None]
    if not views:
        return Section("training", "How training went", "")
    last = "; ".join(f"{display_name(v.label)} ends at {_last(v, 'train_loss')}" for v in views)
    right = "; ".join(f"{display_name(v.label)} ends at {_last(v, 'test_accuracy')}" for v in views)
    spread = "; ".join(f"{display_name(v.label)} ends at sigma_w {_last(v, 'sigma_w')}" for v in views)
    pictures = [
        _picture(partial(dynamics.training_loss, views), f"Training loss of the average weights against the step: {last}.",
                 f"Training loss of the average w_a over {_examples(views)}."),
        _picture(partial(dynamics.held_out_accuracy, views), f"Held-out accuracy of the average weights against the step: {right}.",
                 "Held-out accuracy of w_a; the band spans the single learners."),
        _picture(partial(dynamics.weight_variance, views), f"Per-parameter variance of the weights across learners against the step: {spread}. Arrows mark checkpoints where the prediction is infinite.",
                 "How far the learners differ, and what minibatch noise alone would sustain on the local quadratic (open markers). An arrow: that quadratic is unstable, so no such value exists."),
    ]  # fmt: skip
    return Section("training", "How training went", "One run each, with checkpoints.", pictures, notes=_unstable(views))


def _examples(views: Sequence[RunView]) -> str:
    """On which training examples losses were logged, in words."""
    counts = list(dict.fromkeys(v.run.record.get("evaluation_examples") for v in views))
    told = ["all training data" if n is None else f"{n:,} training examples, a fixed random choice" for n in counts]
    return f"{' or '.join(told)}, by the run" if len(told) > 1 else told[0]


def measured(views: Sequence[RunView]) -> list[Section]:
    """A section for each measure that some of the runs have, and empty ones for the others."""
    spread = [v for v in views if v.run.config.algorithm == "dpsgd"]
    noisy = [v for v in views if v.run.config.algorithm != "ssgd"]
    smoothed = [
        v for v in views if "kink_part" in v.groups.get("smoothing", xr.Dataset())
    ]  # calibrated noise is no kernel
    return [
        _per_run("rate", "Effective learning rate", "α_e/α compares the part of the averaged gradient that goes along the exact gradient g with a full step: 1 for SSGD on average. "
                 "Each prediction smooths the landscape with another kernel; the learners' own is exact, so it checks the measurement, and the others are the theory.",
                 views, "effective-learning-rate", dynamics.effective_learning_rate, "Effective over nominal learning rate with its predictions", "Means over fresh minibatches at fixed learners, with 95% intervals.", _each(spread, "effective-learning-rate", alignment.rate_by_layer, "Effective over nominal learning rate of each layer against the step", "The same by layer, each against its own part of g.", variable="alpha_e_ratio_by_layer_mean"), follow="alpha_e_ratio_mean"),
        _per_run("noise", "Noise of a step", "The noise splits into minibatch noise Δ_S, all that SSGD has, and landscape-dependent noise Δ_2, which comes from the learners standing at different places. "
                 "Δ is the part of the whole that is orthogonal to g; the cross term may have either sign.", views, "noise", noise.noise_split, "Strength of the noise and of its parts", "Means with 95% intervals (cut off before zero, which a logarithmic axis does not have).", [*_systematic(noisy), *_each(views, "covariance", alignment.step_noise_spectra, "Eigenvalues of the covariance of a step's noise",
                                          "Spectra of the noise of one step with gradients taken where each algorithm takes them, from the same minibatches.")], follow="Delta_S_mean"),
        _per_run("curvature", "How curved is the landscape?", "The largest eigenvalues of the Hessian of the training loss at the average weights: the sharpest directions that a step can take.",
                 views, "curvature", spectra.top_eigenvalues, "Largest eigenvalues of the Hessian against the step", "Largest eigenvalues of the Hessian at the checkpoints.", follow="lambda_max"),
        _per_run("stability", "Is the landscape too steep for the rate?", "αλ/2 above 1 means that a plain gradient step of the average overshoots on the local quadratic. "
                 "Under AWC the disagreement between learners has a lower limit. The smoothed curvatures speak of the average at frozen deviations only; the growth of the disagreement takes all learners at once.",
                 views, "stability", stability.stability_margin, "Learning rate times largest curvature over two, against its limits", "Errors: 95% intervals over sampled deviations.", _coupled(spread), follow="alpha_lambda_half"),
        _per_run("smoothing", "How smooth is the smoothed landscape?", "Estimated bounds: they rest on the largest gradient met, so they are not proofs. A bound far above the measurement is vacuous, and its ratio says how far.",
                 smoothed, "smoothing", smoothing.smoothness_bounds, "Measured smoothness below its estimated bounds", "The legend gives the median of bound over measurement."),
        _per_run("kinks", "Curvature at the kinks", "A ReLU network has curvature at its kinks that automatic differentiation does not see. It is measured as the derivative of the smoothed gradient less the average Hessian. "
                 "Differences are only as good as their step: the second figure of a run should be flat.", smoothed, "smoothing", smoothing.kink_part, "Part of the largest curvature that sits at the kinks", _kinks, _each(smoothed, "smoothing", smoothing.difference_plateau, "Curvature against the step of the finite differences", "Where the line is flat the result does not hang on the step of the differences.")),
        _per_run("alignment", "Where the noise points", "Whether noise is large where curvature is: the share of each noise along the top eigenvectors of the Hessian. "
                 "Isotropic noise would put the same tiny share, one over the number of weights, on each.", views, "alignment", alignment.noise_law,
                 "Share of each noise along eigenvectors of the Hessian against their eigenvalues", "The last checkpoint measured. A thin line: the points do not carry an exponent.", _each(views, "alignment-by-layer", alignment.layer_exponents, "Exponent of minibatch noise on curvature by layer", "Exponents by layer; open: the layer does not carry one.", height=2.4)),
        _per_run("disagreement", "What keeps the learners apart", "The learners' deviations along the top eigenvectors of the Hessian, against what minibatch noise alone would sustain on the local quadratic.",
                 [v for v in spread if "energy_ratio" in v.groups.get("disagreement", xr.Dataset())], "disagreement", alignment.disagreement_modes,
                 "Energy of the deviations along each eigenvector of the Hessian over its prediction", "The last checkpoint measured, with 95% intervals: one checkpoint is one sample of each mode."),
        _per_run("ledger", "What a step gains and pays", "One plain step from the checkpoint: the gain along g against the cost of curvature along and across g. Where the realised change leaves the predicted one, the landscape is not quadratic at the size of a step.",
                 views, "ledger", dynamics.one_step_ledger, "Predicted and realised change of the loss in one step", "Means over fresh minibatches with 95% intervals.", follow="realised_mean"),
    ]  # fmt: skip


def scores(views: Sequence[RunView]) -> list[Picture]:
    """The scorecard of each run as a figure."""
    found = []
    for view in views:
        card = scorecard(view.groups)
        rows = rows_of(card)
        if rows:
            counts = card[card["verdict"] != "not applicable"]["verdict"].value_counts()
            said = ", ".join(f"{word} {count} times" for word, count in counts.items())
            name = display_name(view.label)
            found.append(_picture(partial(scorecard_figure, view), f"Scorecard of {name}: measured over predicted for {len(rows)} predictions. Verdicts: {said}.",
                                  f"{name}. Every prediction at every checkpoint, first to last from the top of its row, with 95% intervals; an interval within the grey band agrees. "
                                  "Arrows at the edge: off the scale, or an infinite prediction.", wide=True, height=0.75 + ROW_HEIGHT * len(rows)))  # fmt: skip
    return found


def _has(view: RunView, measure: str, variable: str | None = None) -> bool:
    """Whether a run has a measure of at least one checkpoint, with a variable that other versions may not have written."""
    at = view.groups.get(measure)
    return at is not None and at.sizes.get("step", 0) > 0 and (variable is None or variable in at)


def _per_run(
    identifier: str, title: str, text: str, views: Sequence[RunView], measure: str,
    draw: Callable[..., Axes], alternative: str, caption: str | Callable[[RunView], str], more: Sequence[Picture] = (), follow: str | None = None,
) -> Section:  # fmt: skip
    """A section with a figure of each run that has the measure; `follow` is the variable that its alternative text tells."""
    pictures = []
    for view in (v for v in views if _has(v, measure)):
        name, at = display_name(view.label), view.groups[measure]
        steps = [int(s) for s in at["step"].values]
        where = f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        told = _course(at[follow]) if follow is not None and follow in at else ""
        said = caption if isinstance(caption, str) else caption(view)
        pictures.append(_picture(partial(draw, view), f"{alternative}, {name}, {where}.{told}", f"{name}. {said}"))
    return Section(identifier, title, text, [*pictures, *more])


def _kinks(view: RunView) -> str:
    if not smoothing.is_smoothed(view):
        return "All learners are equal, so nothing is smoothed: the curvature is that of the loss itself, by differences of its gradient."
    return "95% intervals over sampled deviations; the learners' own kernel is exact."


def _course(values: xr.DataArray) -> str:
    """First, last and extreme values over the steps, in words; of several functions the first."""
    series = values.values if values.ndim == 1 else values.isel({d: 0 for d in values.dims if d != "step"}).values
    steps = values["step"].values
    if not np.isfinite(series).any():
        return ""
    low, high = int(np.nanargmin(series)), int(np.nanargmax(series))
    if len(series) == 1:
        return f" It is {tables.number(float(series[0]))}."
    return (
        f" It goes from {tables.number(float(series[0]))} to {tables.number(float(series[-1]))}; smallest {tables.number(float(series[low]))} at step {steps[low]}, "
        f"largest {tables.number(float(series[high]))} at step {steps[high]}."
    )


def _systematic(views: Sequence[RunView]) -> list[Picture]:
    """The systematic share of runs whose gradient points are not all w_a."""
    measured = [v for v in views if "noise" in v.groups and np.isfinite(v.groups["noise"].get("systematic_share", xr.DataArray(np.nan))).any()]  # fmt: skip
    if not measured:
        return []
    return [_picture(partial(noise.systematic_share, measured), "Systematic share of the landscape-dependent noise against the step.",
                     "How much of the landscape-dependent noise is a drift, the same at every draw (1), and how much averages away (0).")]  # fmt: skip


def _each(
    views: Sequence[RunView], measure: str, draw: Callable[..., Axes], alternative: str, caption: str, *, height: float = 3.1, variable: str | None = None
) -> list[Picture]:  # fmt: skip
    """A further figure of every run that has the measure, and in it the variable."""
    return [
        _picture(partial(draw, view), f"{alternative}, {display_name(view.label)}.", f"{display_name(view.label)}. {caption}", height=height)
        for view in views
        if _has(view, measure, variable)
    ]  # fmt: skip


def _coupled(views: Sequence[RunView]) -> list[Picture]:
    measured = [v for v in views if "coupled_disagreement" in v.groups.get("stability", xr.Dataset())]
    if not measured:
        return []
    worst = "; ".join(f"{display_name(v.label)}: largest {float(v.groups['stability']['coupled_disagreement'].max()):.3g}" for v in measured)  # fmt: skip
    return [_picture(partial(stability.coupled_growth, measured), f"Growth of the disagreement per step against the step. {worst}.",
                     "Growth of the disagreement per step, all learners at once. Above 1 it feeds itself, whatever the minibatch noise.")]  # fmt: skip


def _unstable(views: Sequence[RunView]) -> list[str]:
    """How often minibatch noise alone has no stationary disagreement."""
    said = []
    for view in views:
        if "noise" in view.groups:
            predicted = view.groups["noise"]["consensus_trace_predicted"].values
            if np.isposinf(predicted).any():
                said.append(
                    f"{display_name(view.label)}: at {int(np.isposinf(predicted).sum())} of {len(predicted)} checkpoints the local quadratic is unstable "
                    "for the disagreement, so the spread measured there cannot come from minibatch noise alone."
                )  # fmt: skip
    return said


def _last(view: RunView, name: str) -> str:
    series = view.series(name)
    return tables.number(float(series.iloc[-1])) if len(series) else "nothing logged"
