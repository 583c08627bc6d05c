"""The stability edge of one algorithm: the learning rate where convergence over seeds falls to one half, found by bisection."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from landscape.display import Displayed, Shown, number
from landscape.experiments.sweep import stability_map
from landscape.experiments.variants import Variant
from landscape.results import save_dataset, stamp
from landscape.statistics import Z95, Estimate, agreement, bound_verdict, ratio
from landscape.tasks import Task, get_task
from landscape.theory.edges import convergence, edge_bracket, edge_interval, stability_edge
from landscape.theory.scorecard import COLUMNS, TOLERANCE, Scorecard
from landscape.theory.stability import learning_rate_thresholds
from landscape.training.config import TrainConfig
from landscape.training.topology import topology as make_topology


@dataclass(frozen=True, repr=False)
class Edge(Displayed):
    """Where a variant stops converging.

    Attributes:
        variant: its name.
        edge: the rate where the probability of convergence crosses one half, interpolated in the logarithm of the rate between the
            two of the bracket; inf if all rates tried converge at least half the time, -inf if none does.
        low: lower end of its 95% interval; see `landscape.theory.edges.edge_interval`.
        high: upper end.
        bracket: the two neighbouring rates tried that hold the edge.
        table: (learning_rate): num_converged, num_seeds, probability with its Wilson interval, and counts of other outcomes.
    """

    variant: str
    edge: float
    low: float
    high: float
    bracket: tuple[float, float]
    table: xr.Dataset

    def shown(self) -> Shown:
        """The edge with its interval."""
        return Shown(
            "Edge",
            [
                ("variant", self.variant, ""),
                ("learning rate where half converge", self.edge, ""),
                ("95% interval", f"{number(self.low)} to {number(self.high)}", ""),
                ("bracket", f"{number(self.bracket[0])} to {number(self.bracket[1])}", ""),
                ("rates tried", int(self.table.sizes["learning_rate"]), ""),
            ],
        )

    def to_xarray(self) -> xr.Dataset:
        """Labelled, over learning_rate."""
        described = {"long_name": "learning rate where half of the seeds converge"}
        return self.table.assign(
            edge=((), self.edge, described), edge_low=((), self.low), edge_high=((), self.high),
            bracket=("end", np.asarray(self.bracket), {"long_name": "neighbouring rates that hold the edge"}),
        ).assign_attrs(variant=self.variant)  # fmt: skip

    @property
    def estimate(self) -> Estimate:
        """The edge with a standard error that makes a normal interval cover the one found; infinite where that is open."""
        half = max(self.edge - self.low, self.high - self.edge) if math.isfinite(self.edge) else math.inf
        return Estimate(self.edge, half / Z95, int(self.table["num_seeds"].max()))


def find_edge(
    task: str | Task,
    config: TrainConfig,
    variant: Variant,
    *,
    low: float | int,
    high: float | int,
    seeds: Sequence[int],
    out: str | Path,
    num_rates: int = 4,
    num_bisections: int = 4,
    max_sigma_w: float | int = math.inf,
    data_root: str | Path | None = None,
    quiet: bool = False,
) -> Edge:
    """Run a coarse geometric grid of rates, then halve, in log rate, the step where convergence falls below one half.

    Every replica is a part of a `stability_map` under OUT/map, so a resumed call, or one with more bisections or seeds, runs only what
    is missing. The interval comes from the seeds alone and does not shrink with more bisections below what they can tell; bisections
    refine the bracket.

    Args:
        task: a task or its name.
        config: everything else; gamma, momentum and topology included.
        variant: algorithm, order and noise.
        low: smallest rate of the grid.
        high: largest.
        seeds: seeds; 4 or more, or the interval is open at both ends.
        out: directory; OUT/edge-VARIANT.nc holds the result.
        num_rates: rates of the grid, its ends included.
        num_bisections: further rates.
        max_sigma_w: count only runs whose weight spread ends at or below this; see `landscape.theory.edges.convergence`.
        data_root: for tasks that read from disk.
        quiet: no progress bar.

    Cost: (num_rates + num_bisections) x seeds runs, the seeds of a rate stacked; matched noise doubles it for DPSGD's runs.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low and high must be positive rates with low < high, not {low} and {high}")
    if num_rates < 2 or num_bisections < 0 or not len(seeds):
        raise ValueError(
            "an edge needs at least 2 rates of the grid, 1 seed, and a number of bisections that is not negative"
        )
    task, out = get_task(task), Path(out)
    variants = [Variant("dpsgd"), variant] if variant.sigma0 == "matched" else [variant]
    rates = [float(r) for r in np.geomspace(low, high, num_rates)]

    def table_of(chosen: Sequence[float]) -> xr.Dataset:
        mapped = stability_map(
            task, config, variants, sorted(chosen), seeds, out / "map", data_root=data_root, quiet=quiet
        )
        return convergence(mapped, max_sigma_w=max_sigma_w)

    table = table_of(rates)
    for _ in range(num_bisections):
        below, above = edge_bracket(table, variant.name)
        if below == 0 or math.isinf(above):
            break
        rates.append(math.sqrt(below * above))
        table = table_of(rates)
    edge, _, _ = stability_edge(table, variant.name)
    found = Edge(
        variant.name, edge, *edge_interval(table, variant.name), edge_bracket(table, variant.name), table.sel(variant=variant.name, drop=True)
    )  # fmt: skip
    labelled = stamp(
        found.to_xarray(), task=task.name, config=json.dumps(config.to_json()), num_bisections=num_bisections
    )
    save_dataset(labelled, out / f"edge-{variant.name}.nc")
    return found


def edge_scorecard(
    found: Edge,
    config: TrainConfig,
    variant: Variant,
    lambda_max: Estimate | float | int,
    *,
    step: int = 0,
    tolerance: float = TOLERANCE,
) -> Scorecard:
    """A measured edge beside its predictions, thresholds on alpha lambda over lambda_max (theory.md sec. 5 and 6).

    Args:
        found: of `find_edge`.
        config: with the momentum, topology and gamma it was found with.
        variant: as given to `find_edge`.
        lambda_max: the largest eigenvalue of the Hessian that the runs meet, measured along one, with weight decay added.
        step: where it was measured.
        tolerance: of "agrees".

    Returns:
        rows in the format of `landscape.theory.scorecard`: the smallest threshold is the prediction of the edge, the others are upper
        bounds on it. The error of the measured
        edge is that of an interval which bounds it conservatively, so "agrees" needs a narrow bracket and enough seeds.
    """
    graph = make_topology(config.topology, config.num_learners)
    found_on = learning_rate_thresholds(
        graph, variant.algorithm, variant.order, config.momentum, config.dampening, nesterov=config.nesterov, gammas=config.gamma_range
    )  # fmt: skip
    thresholds = {f"{name} threshold / lambda_max": value for name, value in found_on.items()}
    thresholds["smallest threshold / lambda_max"] = min(thresholds.values())
    curvature = lambda_max if isinstance(lambda_max, Estimate) else Estimate(float(lambda_max))
    rows = []
    for name, threshold in thresholds.items():
        predicted = ratio(Estimate(threshold), curvature)
        binding = threshold == min(thresholds.values())
        measured = found.estimate
        compared = ratio(measured, predicted) if math.isfinite(predicted.value) else Estimate(0.0)
        error = math.hypot(measured.stderr, predicted.stderr)
        row = {
            "step": step, "quantity": f"stability edge of {found.variant}", "prediction": name, "measured": measured.value,
            "measured_stderr": measured.stderr, "predicted": predicted.value, "predicted_stderr": predicted.stderr, "ratio": compared.value,
            "ratio_stderr": compared.stderr, "verdict": agreement(measured, predicted, tolerance) if binding else bound_verdict(measured, predicted.value),
            "z": (measured.value - predicted.value) / error if binding and error > 0 else math.nan,
        }  # fmt: skip
        rows.append({column: row[column] for column in COLUMNS})
    return Scorecard(rows, columns=COLUMNS)
