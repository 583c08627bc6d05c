"""What the numbers of any runs say, in plain words that the numbers choose: one topic a sentence, all runs beside one another.

`landscape.theory.conclusions` speaks of a whole reproduction, with its map; this of whatever runs a report is asked for: one alone, several,
unfinished, diverged, never measured, or from other programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from scipy.stats import norm

from landscape.plotting.style import display_name
from landscape.plotting.tables import number, plain, with_error
from landscape.plotting.view import RunView
from landscape.tasks import CONVERGENCE_WINDOW
from landscape.theory.scorecard import TOLERANCE, run_scorecard, scorecard

FAMILY_ERROR = 0.05
"""Chance that a run's rate is called lowered at some checkpoint where it is at none: shared among its checkpoints (Bonferroni)."""
MOST_NAMED = 4
"""Predictions that are called by name in one sentence."""


def summarise(views: Sequence[RunView]) -> list[str]:
    """The summary of runs, in sentences.

    Args:
        views: with labels that differ (`landscape.plotting.view.distinct`).

    Returns:
        how each run ended; what that does not show; then of the runs that were measured the effective learning rate, the noise, whether the landscape
        is too steep for the rate, what smoothing does to it, and how the predictions fared; and what was not measured or merely assumed.
    """
    ended = [f"{display_name(v.label)} {_ended(v)}." for v in views]
    said = ended if len(ended) == 1 else ["\n".join(["How the runs ended:", *ended])]
    said += _caution(views)
    said += _topic(
        views,
        "effective-learning-rate",
        "Effective over nominal learning rate (1: full steps along the gradient)",
        _rate,
    )
    said += _topic(views, "noise", "Landscape-dependent share of the noise, Δ₂/(Δ_S + Δ₂)", _noise)
    said += _topic(
        views, "stability", "Is the landscape too steep for the learning rate at the average weights?", _steepness
    )
    said += _topic(views, "stability", "Does disagreement between the learners feed itself?", _growth)
    said += _topic([v for v in views if "smoothing" in v.groups], "stability", "Largest curvature after smoothing with the paper's isotropic kernel, over that without", _smoothing)  # fmt: skip
    fared = [f"{display_name(v.label)}: {words}." for v in views if (words := _verdicts(v))]
    if fared:
        title = f"How the predictions fared over the checkpoints, within {TOLERANCE:.0%}:"
        said.append(f"{title} {fared[0]}" if len(fared) == 1 else "\n".join([title, *fared]))
    bare = [v for v in views if not v.groups]
    if bare:
        names = _join([display_name(v.label) for v in bare])
        said.append(f"{names} {'were' if len(bare) > 1 else 'was'} not measured: nothing is said here of noise, curvature and learning rate. landscape measure RUN measures it.")  # fmt: skip
    for view in views:
        assumed = view.run.record.get("assumed")
        if assumed:
            said.append(f"Of {display_name(view.label)} nobody told {_join([a.replace('_', ' ') for a in assumed])}: the values here are assumed, and so is what hangs on them.")  # fmt: skip
    return said


def _ended(view: RunView) -> str:
    """How training went, of one run."""
    record, status = view.run.record, view.run.status
    ended = record.get("outcome", {})
    steps = view.run.steps
    if status in ("imported", "recorded", "importing"):
        where = "no checkpoints" if not steps else f"checkpoints of steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"a checkpoint of step {steps[0]}"  # fmt: skip
        origin = record.get("imported", {}).get("format")
        text = f"was {'recorded by its own training program' if status == 'recorded' else 'imported from ' + (f'{origin} files' if origin else 'other files')}, with {where}"
        return text + ("" if "train_loss" in view.run.metrics else "; how its training went is not on record")
    if status == "diverged" or ended.get("outcome") == "non-finite":
        died = record.get("diverged_at", ended.get("step"))
        text = "diverged: its loss or a gradient was not finite" + (f" at step {died}" if died is not None else "")
        return text + (f" of {view.run.config.num_steps}" if died is not None else "")
    accuracy = view.series("test_accuracy")
    right = f"; at the end the averaged model is right on {100 * float(accuracy.iloc[-1]):.1f}% of the held-out examples" if len(accuracy) else ""  # fmt: skip
    if status != "complete":
        metrics = view.run.metrics
        reached = int(metrics["step"].iloc[-1]) if "step" in metrics and len(metrics) else 0
        return f"is not finished ({status}, logged up to step {reached} of {view.run.config.num_steps}): what follows is of the part so far"
    median = float(ended.get("median_last_train_loss", math.nan))
    threshold, constant = (number(float(record.get(k, math.nan))) for k in ("threshold", "constant_loss"))
    count = view.run.config.num_steps
    if count < CONVERGENCE_WINDOW:
        loss = f", with a median training loss of {number(median)}" if math.isfinite(median) else ""
        return f"ended after {count} steps, too few to judge it by its last {CONVERGENCE_WINDOW}{loss}{right}"
    last = f"a median training loss of {number(median)} over the last {CONVERGENCE_WINDOW} steps"
    said = {
        "converged": f"converged: {last}, below the threshold of {threshold}",
        "slow": f"did not converge in {count} steps: {last}, above the threshold of {threshold} but below the {constant} of constant output",
        "stuck": f"got stuck: {last} is no better than constant output ({constant})",
    }.get(str(ended.get("outcome")), f"ended: {last}" if math.isfinite(median) else "ended")
    return said + right


def _caution(views: Sequence[RunView]) -> list[str]:
    """What a comparison of these runs does not show."""
    said = []
    outcomes = {v.run.record.get("outcome", {}).get("outcome") for v in views}
    if len({v.variant for v in views}) > 1 and len(outcomes) > 1:
        said.append("So few runs do not show that one algorithm converges more often than another; landscape sweep and landscape reproduce count over seeds.")  # fmt: skip
    names = {
        "task": "task",
        "learning_rate": "learning rate",
        "num_learners": "number of learners",
        "local_batch_size": "local batch",
    }
    found = {
        k: list(dict.fromkeys(v.run.task if k == "task" else getattr(v.run.config, k) for v in views)) for k in names
    }
    differing = [f"{names[k]} ({', '.join(str(x) if isinstance(x, str) else f'{x:g}' for x in values)})" for k, values in found.items() if len(values) > 1]  # fmt: skip
    if differing:
        said.append(
            f"The runs differ in {_join(differing)}, not in the algorithm alone, so their numbers are not like for like."
        )
    return said


def _topic(views: Sequence[RunView], measure: str, text: str, tell: Callable[[xr.Dataset], str]) -> list[str]:
    """One sentence on a measure, with what `tell` says of each run that has it; of several runs on a line each."""
    told = [(v, tell(v.groups[measure])) for v in views if measure in v.groups and v.groups[measure].sizes["step"]]
    told = [(v, words) for v, words in told if words]
    if not told:
        return []
    end = "" if text.endswith("?") else ":"
    lines = [f"{display_name(v.label)}: {words}." for v, words in told]
    return [f"{text}{end} {lines[0]}" if len(lines) == 1 else "\n".join([f"{text}{end}", *lines])]


def _rate(at: xr.Dataset) -> str:
    steps, means, errors = (at[k].values for k in ("step", "alpha_e_ratio_mean", "alpha_e_ratio_stderr"))
    if not np.isfinite(means).any():
        return ""
    z = float(norm.ppf(1 - FAMILY_ERROR / 2 / len(steps)))
    half = z * np.where(np.isfinite(errors), errors, np.inf)  # of one draw nothing is certain
    lowest = int(np.nanargmin(means))
    lowered, raised = means + half < 1, means - half > 1
    low = f"{with_error(float(means[lowest]), float(errors[lowest]))} at step {steps[lowest]}"
    if len(steps) == 1:
        return f"{low}, {'lowered' if lowered[0] else 'raised' if raised[0] else 'not to be told from 1'}"
    if not lowered.any():
        above = f", and above it at {int(raised.sum())}" if raised.any() else ""
        return f"nowhere clearly below 1 (lowest {low}){above}"
    said = f"below 1 at {int(lowered.sum())} of {len(steps)} checkpoints"
    if means[lowest] - half[lowest] > 1 - TOLERANCE:
        return f"{said}, never by more than {TOLERANCE:.0%} (lowest {low})"
    uphill = ", a step against the gradient" if means[lowest] + half[lowest] < 0 else ""
    if lowest == len(steps) - 1:
        return f"{said}, lowest at the last, {low}{uphill}"
    last = with_error(float(means[-1]), float(errors[-1]))
    return f"{said}, lowest {low}{uphill}; {_back(float(means[-1]), float(half[-1]))} at the last, {last}"


def _back(mean: float, half: float) -> str:
    """Where a rate that was lowered ends.

    >>> _back(1.0, 0.1), _back(0.5, 0.1), _back(1.5, 0.1), _back(0.8, 0.1)
    ('back within 20% of 1', 'still more than 20% below 1', 'more than 20% above 1', 'not to be told whether it is back')
    """
    if abs(mean - 1) + half < TOLERANCE:
        return f"back within {TOLERANCE:.0%} of 1"
    if abs(mean - 1) - half > TOLERANCE:
        return f"still more than {TOLERANCE:.0%} below 1" if mean < 1 else f"more than {TOLERANCE:.0%} above 1"
    return "not to be told whether it is back"


def _noise(at: xr.Dataset) -> str:
    total = at["Delta_S_mean"].values + at["Delta_2_mean"].values
    with np.errstate(divide="ignore", invalid="ignore"):
        share = at["Delta_2_mean"].values / total
    found = np.isfinite(share)
    if not found.any():
        return ""
    if not (share[found] > 0).any():
        return "none"
    steps, most = at["step"].values, int(np.nanargmax(share))
    if found.sum() == 1:
        return f"{_percent(float(share[most]))} at step {steps[most]}"
    return f"{_percent(float(np.nanmin(share)))} to {_percent(float(share[most]))} (most at step {steps[most]})"


def _steepness(at: xr.Dataset) -> str:
    values = at["alpha_lambda_half"].sel(function="w_a").values
    if not np.isfinite(values).any():
        return ""
    limit = float(np.ravel(at["threshold_mean"].values)[0]) / 2 if "threshold_mean" in at else 1.0
    steep, known = int((values > limit).sum()), int(np.isfinite(values).sum())
    where = f"at {steep} of {known} checkpoints" if known > 1 else f"at step {int(at['step'].values[0])}"
    at_most = f"αλ/2 is at most {number(float(np.nanmax(values)))}, limit {number(limit)}"
    return f"yes {where} ({at_most})" if steep else f"no ({at_most})"


def _growth(at: xr.Dataset) -> str:
    if "coupled_disagreement" not in at or not np.isfinite(at["coupled_disagreement"]).any():
        return ""
    growth = at["coupled_disagreement"].values
    # an eigenvalue that did not converge is a lower bound: above 1 it decides, below it does not
    open_ones = (
        int((~at["coupled_converged"].values.astype(bool) & (growth <= 1)).sum()) if "coupled_converged" in at else 0
    )
    grows, known = int((growth > 1).sum()), int(np.isfinite(growth).sum())
    tail = f", undecided at {open_ones}" if open_ones else ""
    factor = f"largest factor {number(float(np.nanmax(growth)))} a step"
    return (
        f"yes at {grows} of {known} checkpoints ({factor}){tail}"
        if grows
        else f"not seen at {known} checkpoints ({factor}){tail}"
    )


def _smoothing(at: xr.Dataset) -> str:
    names = at["function"].values
    if "isotropic" not in names:
        return ""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (
            at["alpha_lambda_half"].sel(function="isotropic").values
            / at["alpha_lambda_half"].sel(function="w_a").values
        )
    ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
    if not len(ratio):
        return ""
    everywhere = " at every checkpoint" if len(ratio) > 1 else ""
    words = (
        f"smoother{everywhere}"
        if ratio.max() < 0.9
        else f"sharper{everywhere}"
        if ratio.min() > 1.1
        else "hardly smoother"
        if ratio.min() > 0.9 and ratio.max() < 1.1
        else "not the same everywhere"
    )
    span = (
        number(float(ratio[0])) if len(ratio) == 1 else f"{number(float(ratio.min()))} to {number(float(ratio.max()))}"
    )
    return f"{span}, {words}"


def _verdicts(view: RunView) -> str:
    """How many predictions of a run held, and which failed."""
    card = scorecard(view.groups)
    table = run_scorecard(card).reset_index() if len(card) else card
    table = table[table["verdict"] != "not applicable"]
    if table.empty:
        return ""
    bounds = table["prediction"].str.startswith(("bound", "stable"))
    parts = []
    for part, what in ((table[~bounds], "prediction"), (table[bounds], "bound or limit")):
        if part.empty:
            continue
        held, failed = part["verdict"].isin(["agrees", "holds"]), part["verdict"].isin(["disagrees", "violated"])
        word = what if len(part) == 1 else {"prediction": "predictions", "bound or limit": "bounds and limits"}[what]
        text = f"{int(held.sum())} of {len(part)} {word} {'hold' if held.sum() != 1 else 'holds'}"
        others = {"at some checkpoints only": part["verdict"] == "mixed", "not to be told for the errors": part["verdict"] == "inconclusive"}  # fmt: skip
        text += "".join(f", {int(which.sum())} {k}" for k, which in others.items() if which.any())
        named = [f"{plain(str(r['quantity']))} by {plain(str(r['prediction']))}" if what == "prediction" else plain(str(r["quantity"])) for r in part[failed].to_dict("records")]  # fmt: skip
        if named:
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            text += f", {len(named)} fail{'s' * (len(named) == 1)} ({', '.join(named[:MOST_NAMED])}{more})"
        parts.append(text)
    return "; ".join(parts)


def _percent(share: float) -> str:
    """A share in few digits.

    >>> _percent(0.123), _percent(0.0004), _percent(0.9996)
    ('12%', '0.04%', '100.0%')
    """
    return f"{100 * share:.1f}%" if share > 0.995 else f"{100 * share:.2g}%"


def _join(parts: Sequence[str]) -> str:
    """Parts as a list in words."""
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"
