"""What holds on real digits: runs of every order, some topologies and smooth activations, measured, with their scorecards.

    python -m tests.benchmarks.evidence OUT [--rate 1.2] [--seed 1] [--rescue DIR]

Trains and measures what is missing in OUT (it resumes) and stores results/evidence_digits.json: for each run how it ended, the verdicts of its
scorecard, and the numbers behind the questions of theory.md sec. 3 to 7 at each checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import landscape as ls
from landscape.checkpoints.format import RUN_FILE
from landscape.experiments.rescue import RESCUE_FILE
from landscape.results import load_dataset
from landscape.theory.scorecard import run_scorecard
from tests.benchmarks.timing import store

STEPS = (20, 60, 200, 500)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpsgd": ("mnist-mlp", {"algorithm": "dpsgd"}),
    "dpsgd-atc": ("mnist-mlp", {"algorithm": "dpsgd", "order": "atc"}),
    "dpsgd-cta": ("mnist-mlp", {"algorithm": "dpsgd", "order": "cta"}),
    "dpsgd-complete": ("mnist-mlp", {"algorithm": "dpsgd", "topology": "complete"}),
    "dpsgd-exponential": ("mnist-mlp", {"algorithm": "dpsgd", "topology": "exponential"}),
    "dpsgd-gelu": ("mnist-mlp-gelu", {"algorithm": "dpsgd"}),
    "dpsgd-tanh": ("mnist-mlp-tanh", {"algorithm": "dpsgd"}),
    "ssgd": ("mnist-mlp", {"algorithm": "ssgd"}),
}
MEASURES = ("effective-learning-rate", "noise", "stability", "ledger")
DEAR = ("alignment", "disagreement")
"""Measured of the runs in CLOSELY only."""
CLOSELY = ("dpsgd", "dpsgd-gelu")
SETTINGS = ls.MeasureConfig(num_draws=24, num_smoothing_samples=8, smoothing_matvecs=5, max_matvecs=60, num_probes=6)
NUMBERS: dict[str, tuple[str, dict[str, str]]] = {
    "alpha_e_ratio": ("effective-learning-rate", {"value": "alpha_e_ratio_mean", "stderr": "alpha_e_ratio_stderr"}),
    "rate_predicted": ("effective-learning-rate", {"value": "alpha_e_ratio_predicted", "stderr": "alpha_e_ratio_predicted_stderr"}),
    "systematic_share": ("noise", {"value": "systematic_share", "stderr": "systematic_share_stderr"}),
    "consensus_trace": ("noise", {"value": "consensus_trace", "predicted": "consensus_trace_predicted"}),
    "growth": ("stability", {"value": "coupled_disagreement", "converged": "coupled_converged"}),
    "alpha_lambda_half": ("stability", {"value": "alpha_lambda_half"}),
    "exponent": ("alignment", {"value": "exponent", "low": "exponent_low", "high": "exponent_high", "verdict": "exponent_verdict"}),
    "energy_share": ("alignment", {"value": "energy_share"}),
    "trace_alignment": ("alignment", {"value": "trace_alignment", "stderr": "trace_alignment_stderr"}),
    "energy_ratio": ("disagreement", {"value": "energy_ratio"}),
}  # fmt: skip


def plain(values: xr.DataArray) -> Any:
    """Numbers as JSON holds them, rounded; what is not finite as text."""

    def one(value: Any) -> Any:
        if isinstance(value, float | np.floating):
            return float(f"{value:.4g}") if math.isfinite(value) else str(value)
        return value.item() if isinstance(value, np.generic) else value

    def walk(nested: Any) -> Any:
        return [walk(v) for v in nested] if isinstance(nested, list) else one(nested)

    return walk(values.values.tolist())


def numbers(groups: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """The numbers of NUMBERS that a run has, at each step."""
    found: dict[str, Any] = {}
    for name, (group, fields) in NUMBERS.items():
        at = groups.get(group, xr.Dataset())
        kept = {field: plain(at[variable]) for field, variable in fields.items() if variable in at}
        if kept:
            found[name] = kept
    return found


def counts(result: xr.Dataset) -> dict[str, Any]:
    """What the rescue experiment found: converged runs of each variant with their interval, and its conclusion."""
    rates = result["learning_rate"].values.tolist()
    table = {
        str(variant): {name: plain(result[name].sel(variant=variant)) for name in ("num_converged", "num_seeds", "low", "high", "num_rescued")}
        for variant in result["variant"].values
    }  # fmt: skip
    return {
        "learning_rates": rates,
        "num_failed": plain(result["num_failed"]),
        "noise_every": int(result.attrs["noise_every"]),
        "variants": table,
        "conclusion": result.attrs["conclusion"],
    }


def main() -> None:
    """Train, measure, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rate", type=float, default=1.2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rescue", type=Path, help="what `landscape rescue --out DIR` made, to be stored beside")
    arguments = parser.parse_args()
    rescue = {} if arguments.rescue is None else {"rescue": counts(load_dataset(arguments.rescue / RESCUE_FILE))}
    table: dict[str, Any] = {}
    for label, (task, changes) in RUNS.items():
        config = ls.TrainConfig(
            **{"learning_rate": arguments.rate, "seed": arguments.seed, "checkpoint_every": 20, **changes}
        )
        path = arguments.out / label
        run = ls.train(task, config, path, resume=(path / RUN_FILE).exists(), quiet=True)
        steps = [s for s in STEPS if s in run.steps]
        groups = ls.measure(
            run, (*MEASURES, *DEAR) if label in CLOSELY else MEASURES, steps, settings=SETTINGS, quiet=True
        )
        card = run_scorecard(ls.scorecard(groups)).reset_index()
        table[label] = {
            "task": task, "steps": steps, **changes, "outcome": run.record["outcome"],
            "scorecard": {f"{r['quantity']}: {r['prediction']}": {"verdict": r["verdict"], "median_ratio": None if math.isnan(r["median_ratio"]) else float(f"{r['median_ratio']:.4g}"),
                          **{v: int(r[v]) for v in ("agrees", "disagrees", "inconclusive", "holds", "violated") if r.get(v, 0) > 0}} for r in card.to_dict("records")},
            "predictions": groups["effective-learning-rate"]["prediction"].values.tolist(),
            "numbers": numbers(groups),
        }  # fmt: skip
        print(label, run.record["outcome"], flush=True)
        store("evidence_digits", {"learning_rate": arguments.rate, "seed": arguments.seed, "runs": table, **rescue})


if __name__ == "__main__":
    main()
