"""What the numbers say, in words that the numbers choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from landscape.statistics import Z95, newcombe_interval, wilson_interval
from landscape.theory.edges import convergence, stability_edge
from landscape.theory.scorecard import RATE, scorecard


@dataclass(frozen=True)
class Separation:
    """The learning rate that separates two algorithms best, chosen on some seeds.

    Attributes:
        learning_rate: alpha.
        choice_seeds: seeds it was chosen on.
        claim_seeds: the others, on which anything is claimed.
    """

    learning_rate: float
    choice_seeds: tuple[int, ...]
    claim_seeds: tuple[int, ...]


def choose_rate(result: xr.Dataset, num_choice_seeds: int, better: str = "dpsgd", worse: str = "ssgd") -> Separation:
    """Choose the rate with the largest excess of converged runs of `better` over `worse` on the first seeds.

    Ties go to the largest gap in mean log loss at the end.
    """
    seeds = [int(s) for s in result["seed"].values]
    chosen, claimed = tuple(seeds[:num_choice_seeds]), tuple(seeds[num_choice_seeds:])
    part = result.sel(seed=list(chosen))
    hits = (part["median_last_loss"] < result.attrs["threshold"]).sum("seed")
    excess = (hits.sel(variant=better) - hits.sel(variant=worse)).values.astype(float)
    losses = part["median_last_loss"].clip(max=10.0)
    ratios: xr.DataArray = np.log(losses.sel(variant=worse) / losses.sel(variant=better))  # type: ignore[assignment]
    gap = ratios.mean("seed").values
    best = int(np.lexsort((gap, excess))[-1])
    return Separation(float(result["learning_rate"].values[best]), chosen, claimed)


def conclusions(
    stability_map: xr.Dataset | None,
    separation: Separation | None,
    groups: Mapping[str, Mapping[str, xr.Dataset]],
    outcomes: Mapping[str, tuple[str, float]],
) -> list[str]:
    """Sentences for the report.

    Args:
        stability_map: of `stability_map`, or None.
        separation: of `choose_rate`, or None.
        groups: measurements by run label (ssgd, ssgd-star, dpsgd, dpsgd-atc).
        outcomes: how each recorded run ended, and its median training loss of w_a over the last 50 steps.
    """
    said: list[str] = []
    if stability_map is not None and separation is not None:
        said += _map(stability_map, separation)
    if "dpsgd" in groups:
        said += (
            _rate(groups["dpsgd"])
            + _kernels(groups["dpsgd"])
            + _disagreement(groups["dpsgd"], "DPSGD (AWC)")
            + _smoothness(groups["dpsgd"])
            + _direction(groups["dpsgd"])
        )
    if "dpsgd" in groups and "dpsgd-atc" in groups:
        said += _orders(groups, outcomes)
    if "dpsgd" in groups:
        said += _ledger(groups["dpsgd"])
    return said


def _counts(part: xr.Dataset, variant: str, rate: float, threshold: float) -> tuple[int, int]:
    losses = part["median_last_loss"].sel(variant=variant, learning_rate=rate).values
    losses = losses[~np.isnan(losses)]
    return int((losses < threshold).sum()), len(losses)


def _share(hits: int, trials: int) -> str:
    low, high = wilson_interval(hits, trials)
    return f"{hits} of {trials} seeds (95% interval {low:.2f} to {high:.2f})"


def _map(result: xr.Dataset, separation: Separation) -> list[str]:
    threshold, rate = result.attrs["threshold"], separation.learning_rate
    part = result.sel(seed=list(separation.claim_seeds))
    (good, trials), (bad, _) = (_counts(part, v, rate, threshold) for v in ("dpsgd", "ssgd"))
    low, high = newcombe_interval(good, trials, bad, trials)
    words = (
        "so the paper's finding is reproduced: DPSGD converges more often where SSGD fails"
        if low > 0
        else "so SSGD converges more often than DPSGD here, against the paper's finding"
        if high < 0
        else "so at this number of seeds the two cannot be told apart: inconclusive"
    )
    said = [
        f"At learning rate {rate:g}, chosen on {len(separation.choice_seeds)} other seed{'s' if len(separation.choice_seeds) > 1 else ''}, DPSGD converged "
        f"(median training loss of the averaged model below {threshold:g}) on {_share(good, trials)} and SSGD on {_share(bad, trials)}; "
        f"the difference is {good / trials - bad / trials:+.2f} ({low:+.2f} to {high:+.2f}), {words}."
    ]
    table = convergence(result)
    edges = {v: stability_edge(table, v) for v in ("ssgd", "dpsgd")}
    said.append(
        "The learning rate at which convergence falls to one half: "
        + "; ".join(f"{v.upper()} {_edge(e, result)}" for v, e in edges.items())
        + "."
    )
    others = [str(v) for v in result["variant"].values if str(v) not in ("ssgd", "dpsgd")]
    tried = [(v, *_counts(part, v, rate, threshold)) for v in others]
    tried = [(v, k, m) for v, k, m in tried if m]
    if tried:
        said.append(f"Beside them at {rate:g}: " + "; ".join(f"{_name(v)} {_share(k, m)}" for v, k, m in tried) + ".")
    return said


def _edge(edge: tuple[float, float, float], result: xr.Dataset) -> str:
    value, low, high = edge
    rates = result["learning_rate"].values
    if value == math.inf:
        return f"above {rates.max():g}, the largest rate tried"
    if value == -math.inf:
        return f"below {rates.min():g}, the smallest rate tried"
    ends = (
        f"{low:.2f}" if math.isfinite(low) else f"below {rates.min():g}",
        f"{high:.2f}" if math.isfinite(high) else f"above {rates.max():g}",
    )
    return f"{value:.2f} (interval {ends[0]} to {ends[1]})"


def _name(variant: str) -> str:
    if variant.startswith("ssgd-star-"):
        level = variant.removeprefix("ssgd-star-")
        place, _, shape = level.partition("-")
        if place in ("weights", "gradient"):
            return f"SSGD* with calibrated noise on the {place} ({shape.replace('-', ' ')})"
        return (
            "SSGD* with noise matched to DPSGD's sigma_w(t)" if level == "matched" else f"SSGD* with sigma_0 = {level}"
        )
    return {"dpsgd-atc": "DPSGD under ATC", "dpsgd-cta": "DPSGD under CTA"}.get(variant, variant.upper())


def _rate(groups: Mapping[str, xr.Dataset]) -> list[str]:
    if "effective-learning-rate" not in groups:
        return []
    at = groups["effective-learning-rate"]
    steps, means, errors = at["step"].values, at["alpha_e_ratio_mean"].values, at["alpha_e_ratio_stderr"].values
    below = means + Z95 * errors < 1
    near = np.abs(means - 1) + Z95 * errors < 0.2
    first, last = (f"{means[i]:.2f} ± {errors[i]:.2g} at step {steps[i]}" for i in (int(np.argmin(means)), -1))
    if below.any() and near[-1]:
        words = "it is lowered while the landscape is rough and is back within 20% of the nominal rate at the end, as the paper says"
    elif below.any():
        words = "it is lowered, but has not come back to the nominal rate by the last checkpoint measured"
    else:
        words = "it is not lowered at any checkpoint measured, against the paper"
    return [
        f"DPSGD's effective learning rate over the nominal one, alpha_e/alpha, is lowest with {first}, and {last}; {words} (below 1 at {int(below.sum())} of {len(steps)} checkpoints)."
    ]


def _kernels(groups: Mapping[str, xr.Dataset]) -> list[str]:
    table = scorecard(groups)
    rows = table[(table["quantity"] == RATE) & (table["verdict"] != "not applicable")]
    if rows.empty:
        return []
    counted = [
        f"{name} {int((part['verdict'] == 'agrees').sum())} of {len(part)}"
        + (
            f" ({int((part['verdict'] == 'inconclusive').sum())} inconclusive)"
            if (part["verdict"] == "inconclusive").any()
            else ""
        )
        for name, part in rows.groupby("prediction", sort=False)
    ]
    return [
        "Checkpoints at which alpha_e/alpha agrees within 20% with its prediction: "
        + ", ".join(counted)
        + ". The isotropic kernel is the paper's; the exact prediction uses the learners' own deviations."
    ]


def _disagreement(groups: Mapping[str, xr.Dataset], label: str) -> list[str]:
    said = []
    if "stability" in groups and "coupled_disagreement" in groups["stability"]:
        growth = groups["stability"]["coupled_disagreement"].values
        unstable = int((growth > 1).sum())
        cause = (
            "driven by instability, not by minibatch noise"
            if unstable == len(growth)
            else "driven by instability there"
            if unstable
            else "within the stable range everywhere"
        )
        said.append(
            f"{label}: the linearised step on all learners lets disagreement grow (largest factor {np.nanmax(growth):.2f} a step) at {unstable} of {len(growth)} checkpoints, so the disagreement is {cause}."
        )
    if "noise" in groups:
        at = groups["noise"]
        share = at["consensus_trace"].values / at["consensus_trace_predicted"].values
        finite = np.isfinite(at["consensus_trace_predicted"].values) & (at["consensus_trace_predicted"].values > 0)
        infinite = int(np.isinf(at["consensus_trace_predicted"].values).sum())
        text = f"{label}: minibatch noise on the local quadratic predicts no stationary disagreement at {infinite} of {at.sizes['step']} checkpoints"
        if finite.any():
            text += f"; at the others Tr Sigma_w is {np.min(share[finite]):.2g} to {np.max(share[finite]):.2g} times what noise alone would sustain"
        said.append(text + ".")
    return said


def _smoothness(groups: Mapping[str, xr.Dataset]) -> list[str]:
    if "stability" not in groups or "smoothing" not in groups:
        return []
    at = groups["stability"]["alpha_lambda_half"]
    means = {
        name: float(at.sel(function=name).mean("step"))
        for name in ("w_a", "sharpest-learner", "isotropic")
        if name in at["function"].values
    }
    ratio = means.get("isotropic", math.nan) / means["w_a"] if means["w_a"] > 0 else math.nan
    words = "hardly smooths" if ratio > 0.9 else "smooths"
    bound = groups["smoothing"]["bound"].sel(bound_kind="paper") / groups["smoothing"]["smoothness"].sel(
        kernel="isotropic"
    )
    tightness = bound.values[np.isfinite(bound.values)]
    said = f"Averaged over checkpoints, alpha lambda_max/2 is {means['w_a']:.2f} at w_a and {means['sharpest-learner']:.2f} at the sharpest learner; the paper's isotropic kernel at the measured sigma_w {words} the top curvature (ratio {ratio:.2f})"
    if len(tightness):
        said += f", and the bound 2 G/sigma with the measured G lies {np.min(tightness):.3g} to {np.max(tightness):.3g} times above the measured smoothness: {'vacuous here' if np.min(tightness) > 10 else 'informative'}"
    return [said + "."]


def _direction(groups: Mapping[str, xr.Dataset]) -> list[str]:
    if "alignment" not in groups:
        return []
    at = groups["alignment"].isel(step=-1, subspace_size=-1)
    names = {"gradient": "minibatch noise", "landscape": "landscape noise", "consensus": "the learners' spread"}
    shares = {text: float(at["energy_share"].sel(noise=name)) for name, text in names.items()}
    told = "; ".join(f"{share:.0%} of {text}" for text, share in shares.items() if math.isfinite(share))
    said = [
        f"At step {int(at['step'])} the {int(at['subspace_size'])} sharpest directions of the Hessian, a share {float(at['chance']):.1g} of all, hold {told}."
    ]
    carried = [
        f"{text} {float(at['exponent'].sel(noise=name)):.2f} ({float(at['exponent_low'].sel(noise=name)):.2f} to {float(at['exponent_high'].sel(noise=name)):.2f})"
        for name, text in names.items()
        if str(at["exponent_verdict"].sel(noise=name).values) == "measured"
    ]
    words = "; ".join(carried) if carried else "none that the top eigenpairs carry"
    return [*said, f"Exponents of noise on curvature there: {words}."]


def _orders(groups: Mapping[str, Mapping[str, xr.Dataset]], outcomes: Mapping[str, tuple[str, float]]) -> list[str]:
    parts = []
    for label in ("dpsgd", "dpsgd-atc"):
        if label not in outcomes or "noise" not in groups[label]:
            return []
        spread = groups[label]["noise"]["consensus_trace"].values
        ratios = (
            groups[label]["effective-learning-rate"]["alpha_e_ratio_mean"].values
            if "effective-learning-rate" in groups[label]
            else np.array([np.nan])
        )
        verdict, loss = outcomes[label]
        parts.append(
            f"{'AWC' if label == 'dpsgd' else 'ATC'} ended {verdict} (loss {loss:.3f}), with Tr Sigma_w {spread.min():.2g} to {spread.max():.2g} and lowest alpha_e/alpha {ratios.min():.2f}"
        )
    return [
        "One recorded run of each order at this rate: "
        + "; ".join(parts)
        + ". One run each shows no difference in convergence by itself; the map does."
    ]


def _ledger(groups: Mapping[str, xr.Dataset]) -> list[str]:
    if "ledger" not in groups:
        return []
    table = scorecard(groups)
    rows = table[table["quantity"] == "one-step change of L"]
    counts = {v: int((rows["verdict"] == v).sum()) for v in ("agrees", "disagrees", "inconclusive")}
    return [
        f"The second-order ledger of one step agrees with the realised change of the loss within 20% at {counts['agrees']} of {len(rows)} checkpoints, disagrees at {counts['disagrees']}, and is inconclusive at {counts['inconclusive']}."
    ]
