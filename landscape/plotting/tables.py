"""The tables of the report: plain rows of text, so that the template only lays them out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from landscape.display import number as number
from landscape.display import with_error as with_error
from landscape.plotting.maps import edge_of, rates_run
from landscape.plotting.style import display_name
from landscape.plotting.view import RunView
from landscape.statistics import wilson_interval
from landscape.tasks import CONVERGENCE_WINDOW
from landscape.theory.scorecard import run_scorecard, scorecard
from landscape.training.config import GOSSIPING

VERDICTS = {
    "agrees": "the whole 95% interval lies within 20% of the prediction",
    "holds": "the measurement lies below the bound or limit",
    "inconclusive": "the errors are too wide to tell",
    "disagrees": "the whole 95% interval lies outside the 20% band",
    "mixed": "of a run: agrees or holds at some checkpoints, not at others",
    "violated": "the measurement lies above the bound or limit, beyond its errors",
    "not applicable": "there is nothing to compare, or all learners are equal, as at step 0, so that every prediction is 1",
}
"""Every verdict and what it says, as in theory.scorecard."""
SYMBOL = re.compile(r"(?<![\w./-])([wλαΔΣσL])_(max|[aewS0-9D])(?![\w-]|\.\w)")
"""A symbol of theory.md and its index."""
RUN_FACTS = ("algorithm", "order", "topology", "learning_rate", "num_learners", "local_batch_size", "num_steps", "momentum", "weight_decay", "schedule", "seed")  # fmt: skip


Cell = str | tuple[tuple[str, int], ...]
"""Text, or verdicts with how often each was given (0: not counted)."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: what it holds.
        columns: headings.
        rows: cells.
    """

    caption: str
    columns: list[str]
    rows: Sequence[Sequence[Cell]]


def summary(views: Sequence[RunView]) -> Table:
    """One row a run: what it was and how it ended."""
    rows = []
    for view in views:
        config, record = view.run.config, view.run.record
        loss, accuracy = view.series("train_loss"), view.series("test_accuracy")
        ended = record.get("outcome", {})
        outcome = str(ended.get("outcome", view.run.status))
        few = config.num_steps < CONVERGENCE_WINDOW and outcome in ("converged", "slow", "stuck")
        if record.get("diverged_at") is not None:
            outcome += f" (at step {record['diverged_at']})"
        rows.append([
            display_name(view.label), f"{config.learning_rate:g}", f"{config.num_learners} × {config.local_batch_size}",
            Path(config.topology).name if config.algorithm in GOSSIPING else f"all, every {config.local_steps} steps" if config.algorithm == "local-sgd" else "all-reduce",
            str(config.num_steps), str(config.seed), "too short to judge" if few else outcome, number(float(ended.get("median_last_train_loss", math.nan))),
            number(float(loss.iloc[-1])) if len(loss) else "–", f"{100 * float(accuracy.iloc[-1]):.1f}%" if len(accuracy) else "–",
        ])  # fmt: skip
    columns = ["run", "learning rate α", "learners × batch", "mixing", "steps", "seed", "outcome", f"median loss, last {CONVERGENCE_WINDOW} steps or all", "last loss", "held-out accuracy"]  # fmt: skip
    return Table("The runs. Losses are training losses of the average w_a, in nats.", columns, rows)


def convergence_table(result: xr.Dataset) -> Table:
    """Counts of converged seeds with Wilson 95% intervals, and the stability edge, a row for each variant."""
    rates = np.sort(result["learning_rate"].values)
    rows = []
    for name in (str(v) for v in result["variant"].values):
        here, cells = rates_run(result, name), []
        for rate in rates:
            cells.append(_converged(result.sel(variant=name, learning_rate=rate)) if rate in here else "not run")
        rows.append([display_name(name), *cells, _edge(edge_of(result, name))])
    return Table(
        f"Converged seeds of those run [Wilson 95% interval]; and the other outcomes. Converged: median training loss of w_a "
        f"over the last 50 steps below {result.attrs['threshold']:g}.",
        ["variant", *(f"α = {r:g}" for r in rates), "stability edge"],
        rows,
    )


def sensitivity_table(result: xr.Dataset, thresholds: Sequence[float] = (0.3, 0.5, 0.7, 1.0)) -> Table:
    """How many runs converge under other thresholds."""
    rows = []
    for name in (str(v) for v in result["variant"].values):
        finals = result["median_last_loss"].sel(variant=name, learning_rate=rates_run(result, name)).values
        rows.append([display_name(name), *(f"{int((finals < t).sum())} of {finals.size}" for t in thresholds)])
    return Table(
        "Converged runs at all rates together, were the threshold another.",
        ["variant", *(f"below {t:g}" for t in thresholds)],
        rows,
    )


def verdict_table(view: RunView) -> Table:
    """How often each prediction got each verdict over the checkpoints of a run."""
    card = scorecard(view.groups)
    rows: list[list[Cell]] = []
    for row in run_scorecard(card).reset_index().to_dict("records"):
        said = tuple((v, int(row[v])) for v in VERDICTS if row.get(v, 0) > 0)
        part = card[(card["quantity"] == row["quantity"]) & (card["prediction"] == row["prediction"])]
        run: Cell = ((str(row["verdict"]), 0),)
        rows.append([plain(str(row["quantity"])), run, plain(str(row["prediction"])), said, _median_ratio(part)])
    checkpoints = len({int(s) for g in view.groups.values() for s in g["step"].values})
    return Table(
        f"{display_name(view.label)}: verdicts over {checkpoints} checkpoints",
        ["quantity", "the run", "prediction", "checkpoints", "median ratio"],
        rows,
    )


def scorecard_table(view: RunView) -> Table:
    """Every prediction of a run beside its measurement, with errors, ratio and verdict."""
    rows = [_score(row) for row in scorecard(view.groups).itertuples(index=False)]
    return Table(
        f"{display_name(view.label)}: every checkpoint. Errors are standard errors over the draws, at fixed learners.",
        ["step", "quantity", "prediction", "measured", "predicted", "ratio", "z", "verdict"],
        rows,
    )


def run_provenance(view: RunView) -> Table:
    """Where a run's numbers came from; directories by name only."""
    record = view.run.record
    graph = record.get("topology", {})
    facts: dict[str, Any] = {"directory": view.run.path.name, "task": record["task"], "status": record["status"]}
    facts |= record["config"]
    facts |= {f"limit of α λ, {k}": number(v, 4) for k, v in graph.get("thresholds", {}).items()}
    if "spectral_gap" in graph:
        facts["spectral gap of M"] = number(graph["spectral_gap"], 4)
    facts |= {"parameters": record["num_parameters"], "data": record["data"]["name"]}
    facts |= {f"data fingerprint, {k}": v for k, v in record["data"]["fingerprint"].items()}
    facts |= {f"code: {k}": v for k, v in record["provenance"].items()}
    return Table(f"{display_name(view.label)}: the run", ["", "value"], [[k, nameless(v)] for k, v in facts.items()])


def measurement_provenance(view: RunView) -> Table:
    """Where a run's measurements came from, a row for each measure."""
    rows = []
    for name, group in view.groups.items():
        a = group.attrs
        settings = json.loads(a.get("settings", "{}"))
        told = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "data")
        steps = ", ".join(str(s) for s in group["step"].values)
        if a.get("skipped_steps"):
            steps += f" (not finite: {a['skipped_steps']})"
        versions = f"landscape {a.get('provenance_landscape', '?')}, torch {a.get('provenance_torch', '?')}"
        rows.append(
            [name, steps, told, str(settings.get("data", "?")), versions, str(a.get("provenance_git_commit", "?")), str(a.get("provenance_time", "?"))]
        )  # fmt: skip
    columns = ["measure", "checkpoints", "settings", "data fingerprint", "versions", "git commit", "time"]
    return Table(f"{display_name(view.label)}: its measurements", columns, rows)


def map_provenance(result: xr.Dataset) -> Table:
    """Where a stability map's numbers came from."""
    facts = {k: v for k, v in result.attrs.items() if k != "config"}
    facts |= {f"config: {k}": v for k, v in json.loads(result.attrs.get("config", "{}")).items() if k not in ("algorithm", "order", "learning_rate", "seed", "sigma0")}  # fmt: skip
    facts |= {"seeds": ", ".join(str(s) for s in result["seed"].values)}
    rows = [[k.removeprefix("provenance_"), nameless(v)] for k, v in facts.items()]
    return Table("The stability map; algorithm, order, rate, noise and seed vary within it", ["", "value"], rows)


def _converged(cell: xr.Dataset) -> str:
    ended = [str(o) for o in cell["outcome"].values.ravel() if str(o)]
    hits = ended.count("converged")
    low, high = wilson_interval(hits, len(ended))
    others = [f"{ended.count(k)} {k}" for k in ("slow", "stuck", "non-finite") if k in ended]
    return f"{hits}/{len(ended)} [{low:.2f}, {high:.2f}]" + (f"\n{', '.join(others)}" if others else "")


def _edge(edge: tuple[float, float, float]) -> str:
    middle, low, high = edge
    if math.isnan(middle):
        return "– (one rate)"
    if math.isinf(middle):
        return "above every rate" if middle > 0 else "below every rate"
    if not (math.isfinite(low) or math.isfinite(high)):
        return f"{middle:.3g}\ninterval wider than the grid"
    ends = [f"{v:.3g}" if math.isfinite(v) else "beyond the grid" for v in (low, high)]
    return f"{middle:.3g}\n[{ends[0]}, {ends[1]}]"


def _score(row: Any) -> list[Cell]:
    infinite = math.isinf(row.predicted)
    predicted = (
        "∞ (unstable)" if infinite and row.quantity == "Tr Sigma_w" else with_error(row.predicted, row.predicted_stderr)
    )
    z = "" if math.isnan(row.z) else f"{row.z:+.1f}"
    ratio = "" if infinite or pd.isna(row.ratio) else with_error(row.ratio, row.ratio_stderr)
    return [str(row.step), plain(row.quantity), plain(row.prediction), with_error(row.measured, row.measured_stderr), predicted, ratio, z, ((str(row.verdict), 0),)]  # fmt: skip


def _median_ratio(part: pd.DataFrame) -> str:
    """Median ratio over the checkpoints where something finite was predicted, and how often it was not."""
    finite = np.isfinite(part["predicted"].to_numpy(dtype=float))
    ratios = part["ratio"].to_numpy(dtype=float)[finite]
    ratios = ratios[np.isfinite(ratios)]
    text = number(float(np.median(ratios))) if len(ratios) else "–"
    first = part.iloc[0]
    if str(first["prediction"]).startswith("bound"):
        return f"{text} bound / measured"
    if str(first["prediction"]).startswith("stable"):
        return f"{text} limit / measured"
    if not finite.any():
        return f"predicted ∞ at all {len(finite)}"
    if (~finite).any():
        text += f" where finite; predicted ∞ at {int((~finite).sum())} of {len(finite)}"
    return text


PLAIN = {
    "bound: paper": "estimated bound 2G/σ (Zhang et al.)",
    "bound: duchi": "estimated bound G/σ (Duchi et al.)",
    "bound: sharp": "estimated bound √(2/π) G/σ",
    "bound: smooth": "estimated bound ℓ erf(G/(√2 ℓ σ))",
    "bound: local": "estimated bound √λ_max(Cov g)/σ",
    "bound: ": "estimated bound: ",
    "exact": "learners' kernel (exact)",
    "isotropic": "isotropic kernel",
    "covariance": "covariance kernel",
    "second-order-autodiff": "second order, autodiff (no kinks)",
    "second-order": "second order",
    "L~": "the smoothed L", "alpha": "α", "lambda": "λ", "Delta": "Δ", "Sigma": "Σ", "^2": "²",
}  # fmt: skip


def plain(text: str) -> str:
    """The scorecard's names in the report's letters; bounds are estimates, since their constants were measured."""
    for name, shown in PLAIN.items():
        text = text.replace(name, shown)
    return text


def nameless(value: Any) -> str:
    """A value as text; of a path, the last part."""
    text = str(value)
    return (
        Path(text).name
        if text.startswith(("/", "~", "./", "../"))
        or (isinstance(value, str) and "/" in text and not set(text) & set(" =@"))
        else text
    )
