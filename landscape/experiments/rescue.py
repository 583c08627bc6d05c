"""What of DPSGD's noise rescues training: SSGD with calibrated noise of every shape, beside SSGD and DPSGD, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from landscape.experiments.sweep import stability_map
from landscape.experiments.variants import Variant
from landscape.results import save_dataset, stamp
from landscape.statistics import newcombe_interval, wilson_interval
from landscape.tasks import Task, get_task
from landscape.theory.edges import convergence
from landscape.training.config import TrainConfig
from landscape.training.noise import PLACES, SHAPES, NoiseDrift, NoisePlace, NoiseShape

RESCUE_FILE = "rescue.nc"
KEPT = {
    "isotropic": "isotropic noise of the same strength",
    "layer": "noise matched in every layer",
    "diagonal": "noise matched in every coordinate",
    "low-rank": "covariance-matched noise",
}
DRIFT = {
    "as-noise": "",
    "removed": " without its drift",
    "added": " with the drift added",
}
"""Words for shapes and for what became of the drift."""


def rescue_experiment(
    task: str | Task,
    config: TrainConfig,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    out: str | Path,
    *,
    places: Sequence[NoisePlace] = ("weights", "gradient"),
    shapes: Sequence[NoiseShape] = ("isotropic", "layer", "diagonal", "low-rank"),
    drifts: Sequence[NoiseDrift] = ("as-noise",),
    zero_sum: bool = False,
    noise_every: int = 5,
    data_root: str | Path | None = None,
    quiet: bool = False,
) -> xr.Dataset:
    """Train SSGD, DPSGD, and SSGD* with noise calibrated on DPSGD, at the same rates with the same seeds, and count what converged.

    Every SSGD* replica has the noise of the DPSGD run of its own rate and seed. All shapes at a place have the same total variance at
    every refresh, so what differs between them is what of the covariance they keep. A resumed call runs only what is missing.

    Args:
        task: a task or its name.
        config: everything else; DPSGD takes its order.
        learning_rates: base rates, best chosen on other seeds (`landscape.theory.conclusions.choose_rate`).
        seeds: seeds.
        out: directory; OUT/map holds the parts, OUT/rescue.nc the result.
        places: where noise is added.
        shapes: what it keeps.
        drifts: what becomes of the landscape noise's mean, for noise on the gradient; "alone" adds the drift without noise.
        zero_sum: let the learners' weight noises sum to zero, as DPSGD's deviations do.
        noise_every: steps between refreshes of the noise.
        data_root: for tasks that read from disk.
        quiet: no progress bar.

    Returns:
        (variant, learning_rate): counts of outcomes; probability of convergence with its Wilson interval (low, high); its difference
        from SSGD's and from DPSGD's with Newcombe intervals (difference_ssgd, difference_ssgd_low, ...); num_failed, the seeds at which
        SSGD did not converge, and num_rescued, at how many of these the variant did. The attribute "conclusion" says it in words. The
        intervals of differences take the runs as independent, though a seed gives every variant the same start and minibatches.
    """
    task = get_task(task)
    out = Path(out)
    reference = Variant("dpsgd", config.order)
    variants = [Variant("ssgd"), reference, *_noisy(config, places, shapes, drifts, zero_sum, noise_every)]
    mapped = stability_map(task, config, variants, learning_rates, seeds, out / "map", data_root=data_root, quiet=quiet)
    result = count_rescues(mapped, reference.name)
    result = stamp(result, task=task.name, noise_every=noise_every, data_fingerprint=mapped.attrs["data_fingerprint"])
    save_dataset(result, out / RESCUE_FILE)
    return result


def _noisy(
    config: TrainConfig, places: Sequence[NoisePlace], shapes: Sequence[NoiseShape], drifts: Sequence[NoiseDrift], zero_sum: bool,
    every: int,
) -> list[Variant]:  # fmt: skip
    for given, known, word in ((places, PLACES, "place"), (shapes, SHAPES, "shape")):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise ValueError(f"no such noise {word}: {', '.join(unknown) or '(none)'}; there are {', '.join(known)}")
    made = []
    for place in places:
        for drift in drifts if place == "gradient" else ("as-noise",):
            for shape in shapes if drift != "alone" else ("isotropic",):
                made.append(
                    Variant(
                        "ssgd-star",
                        config.order,
                        "calibrated",
                        place,
                        shape,
                        drift,
                        every,
                        zero_sum and place == "weights",
                    )  # type: ignore[arg-type]
                )
    return made


def count_rescues(mapped: xr.Dataset, reference: str = "dpsgd") -> xr.Dataset:
    """Counts, intervals and words of a map that has SSGD, DPSGD and others; see `rescue_experiment`.

    Args:
        mapped: of `stability_map`.
        reference: DPSGD's name in it.
    """
    result = convergence(mapped)
    hits, trials = result["num_converged"], result["num_seeds"]
    for name, other in (("ssgd", "ssgd"), ("dpsgd", reference)):
        low, high = np.vectorize(lambda *counts: newcombe_interval(*map(int, counts)))(
            hits.values, trials.values, hits.sel(variant=other).values, trials.sel(variant=other).values
        )
        dims = hits.dims
        result[f"difference_{name}"] = result["probability"] - result["probability"].sel(variant=other).drop_vars(
            "variant"
        )
        result[f"difference_{name}_low"], result[f"difference_{name}_high"] = (dims, low), (dims, high)
    converged = mapped["median_last_loss"] < result.attrs["threshold"]
    failed = ~converged.sel(variant="ssgd", drop=True)
    result["num_failed"] = failed.sum("seed")
    result["num_rescued"] = (converged & failed).sum("seed").transpose(*hits.dims)
    result = result.assign_attrs(
        difference_interval="Newcombe 1998, method 10, 95%, pairing by seed not used", reference=reference
    )
    return result.assign_attrs(conclusion="\n".join(rescue_conclusions(result)))


def rescue_conclusions(result: xr.Dataset) -> list[str]:
    """What the counts say, in sentences that they choose, for each learning rate."""
    said = []
    for rate in result["learning_rate"].values:
        at = result.sel(learning_rate=rate)
        failed, seeds = int(at["num_failed"]), int(at["num_seeds"].sel(variant="ssgd"))
        reference = result.attrs["reference"]
        said.append(
            f"At learning rate {rate:g} SSGD converged with {_share(at, 'ssgd')} and DPSGD with {_share(at, reference)} of {seeds} seeds."
        )
        if failed == 0:
            said.append("SSGD did not fail, so there was nothing to rescue.")
            continue
        noisy = [str(v) for v in at["variant"].values if str(v).startswith("ssgd-star-")]
        each = [f"{_words(v)} rescued {_rescued(at, v)} of {failed}" for v in noisy]
        said.append(f"DPSGD rescued {_rescued(at, reference)} of the {failed} that failed; " + "; ".join(each) + ".")
        said += _verdicts(at, noisy)
    return said


def _verdicts(at: xr.Dataset, noisy: list[str]) -> list[str]:
    """Which noises converge more often than SSGD, and which less often than DPSGD, beyond the intervals."""

    def names(chosen: list[str]) -> str:
        return ", ".join(_words(v) for v in chosen)

    better = [v for v in noisy if float(at["difference_ssgd_low"].sel(variant=v)) > 0]
    worse = [v for v in noisy if float(at["difference_ssgd_high"].sel(variant=v)) < 0]
    short = [v for v in noisy if float(at["difference_dpsgd_high"].sel(variant=v)) < 0]
    like = [v for v in better if v not in short]
    open_ = [v for v in noisy if v not in better and v not in worse]
    said = []
    if like:
        said.append(
            f"More often than SSGD, and as often as DPSGD as far as these seeds tell, converged: {names(like)}."
        )
    if [v for v in better if v in short]:
        said.append(
            f"More often than SSGD, but less often than DPSGD, converged: {names([v for v in better if v in short])}."
        )
    if worse:
        said.append(f"Less often than SSGD converged: {names(worse)}.")
    if open_:
        less = [v for v in open_ if v in short]
        said.append(
            f"Not to be told from SSGD at this number of seeds: {names(open_)}"
            + (f"; of these, less often than DPSGD: {names(less)}." if less else ".")
        )
    return said


def _rescued(at: xr.Dataset, variant: str) -> int:
    return int(at["num_rescued"].sel(variant=variant))


def _share(at: xr.Dataset, variant: str) -> str:
    hits, trials = int(at["num_converged"].sel(variant=variant)), int(at["num_seeds"].sel(variant=variant))
    low, high = wilson_interval(hits, trials)
    return f"{hits} (95% interval of the share {low:.2f} to {high:.2f})"


def _words(variant: str) -> str:
    """A calibrated variant in words, from its name."""
    kind = variant.removeprefix("ssgd-star-")
    place, _, rest = kind.partition("-")
    sums = " summing to zero" if rest.endswith("-zero-sum") else ""
    shape = next((s for s in KEPT if rest.startswith(s)), None)
    where = "on the weights" if place == "weights" else "on the gradient"
    if shape is None:
        return f"the drift alone {where}"
    drift = next((d for d in DRIFT if f"drift-{d}" in rest), "as-noise")
    return f"{KEPT[shape]} {where}{DRIFT[drift]}{sums}"
