"""What the studies' figures claim, and the numbers of every study that decide it (CIFAR-10, speech, ImageNet subset, digits)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from landscape.statistics import Estimate, newcombe_interval
from paper_figs.claims import Bearing, Headline, below, headline
from paper_figs.studies.edges import difference
from paper_figs.studies.stored import Stored

DECIDED = 0.05
"""Level of the tests below."""


@dataclass(frozen=True)
class StudyClaim:
    """A claim over all studies.

    Attributes:
        claim: a sentence.
        headlines: its numbers from the studies.
    """

    claim: str
    headlines: Callable[[Sequence[Stored]], dict[str, Headline]]


def edge_headlines(studies: Sequence[Stored]) -> dict[str, Headline]:
    """For each study at how many pairs of a batch size and a seed DPSGD's edge is surely larger than another's.

    The bearing is that of a sign test over the pairs that differ; pairs of one seed share initial weights and data order, so it is approximate.
    """
    found = {}
    for study in studies:
        batches = range(study.map.sizes["total_batch"])
        for other, words in (("ssgd", "SSGD's"), ("ssgd-star-matched", "SSGD*'s")):
            each = [difference(study.edges(b, "dpsgd"), study.edges(b, other)) for b in batches]
            larger, smaller = sum(d.num_larger for d in each), sum(d.num_smaller for d in each)
            equal = sum(d.num_equal for d in each)
            text = f"{study.name}: batches and seeds of {larger + smaller + equal} at which DPSGD's edge is above {words}, {smaller} below"
            found[f"{study.name}_{other}"] = Headline(float(larger), math.nan, 1.0, text, _sign(larger, smaller))
    return found


def convergence_headlines(studies: Sequence[Stored]) -> dict[str, Headline]:
    """For each study the share of DPSGD's runs that converge less SSGD's, over its whole grid, with a Newcombe interval."""
    found = {}
    for study in studies:
        counts = {}
        for name in ("dpsgd", "ssgd"):
            ended = [study.converged(b, name) for b in range(study.map.sizes["total_batch"])]
            counts[name] = int(sum(e.sum() for e in ended)), int(sum(e.size for e in ended))
        (good, runs), (bad, others) = counts["dpsgd"], counts["ssgd"]
        low, high = newcombe_interval(good, runs, bad, others)
        bearing: Bearing = "supports" if low > 0 else "contradicts" if high < 0 else "undecided"
        text = f"{study.name}: DPSGD converges in {good} of {runs} runs, SSGD in {bad} of {others}; difference of shares (95% {low:+.2f} to {high:+.2f})"
        found[study.name] = headline(Estimate(good / runs - bad / others), text, bearing, tolerance=0.1)
    return found


def smoothness_headlines(studies: Sequence[Stored]) -> dict[str, Headline]:
    """For each study DPSGD's E alpha_e/alpha at the first checkpoint of its first measured run; errors over draws at fixed weights."""
    found = {}
    for study in studies:
        along = study.along
        if along is None or not along.sizes.get("run"):
            continue
        for kind in dict.fromkeys(along["kind"].values.astype(str)):
            rows = [
                i
                for i, v in enumerate(along["variant"].values.astype(str))
                if v == "dpsgd" and str(along["kind"].values[i]) == kind
            ]
            if not rows:
                continue
            at = along.isel(run=rows[0], point=0)
            ratio = Estimate(float(at["alpha_e_ratio_mean"]), float(at["alpha_e_ratio_stderr"]))
            if math.isfinite(ratio.value):
                where = f"total batch {int(at['total_batch'])}, α = {float(at['learning_rate']):.3g}, step {int(at['step'])}"
                found[f"{study.name}_{kind}"] = headline(
                    ratio, f"{study.name}, {where}: DPSGD's E α_e/α", below(ratio, 1)
                )
    return found


def _sign(larger: int, smaller: int) -> Bearing:
    if larger + smaller == 0 or binomtest(larger, larger + smaller).pvalue > DECIDED:
        return "undecided"
    return "supports" if larger > smaller else "contradicts"


EDGES = StudyClaim("In every study DPSGD converges up to larger learning rates than SSGD and than SSGD* with noise of its spread.", edge_headlines)  # fmt: skip
STUDY_CLAIMS: dict[str, StudyClaim] = {
    "fig_edges": EDGES,
    "fig_convergence": StudyClaim("Over the same grid of batch sizes and learning rates more of DPSGD's runs converge than of SSGD's.", convergence_headlines),
    "fig_smoothness": StudyClaim("DPSGD's effective learning rate is below the nominal one early in training.", smoothness_headlines),
    "table_rates": EDGES,
}  # fmt: skip
"""By the script that draws them."""
