"""Recorded runs without weights in one netCDF: their records, metrics and measurements; what the figures of the digits are drawn from.

/                       the scale in words, how it was made, the rate and the seeds it was chosen on, provenance
/map                    the stability map
/runs/LABEL             run.json as text, provenance of the measurements
/runs/LABEL/metrics     a row a logged step
/runs/LABEL/MEASURE     as `landscape measure` wrote it, without single draws and long spectra
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from landscape.checkpoints import Run
from landscape.plotting.view import RunView
from landscape.results import load_groups, save_groups, stamp
from landscape.theory.conclusions import Separation

METRICS = ("train_loss", "test_loss", "test_accuracy", "sigma_w", "consensus_distance")
"""Of the columns of metrics.jsonl, what figures show."""
MEASURES = (
    "effective-learning-rate",
    "noise",
    "curvature",
    "smoothing",
    "stability",
    "ledger",
    "alignment",
    "covariance",
)
"""Of the measures, what figures and the scorecard show."""
LONG = 1000
"""Numbers of a variable that is too long to keep."""
MAP, RUNS, TABLE = "map", "runs", "metrics"


@dataclass(frozen=True)
class KeptRun(Run):
    """A run of which no weights were kept.

    Attributes:
        table: its metrics.
    """

    table: pd.DataFrame

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a logged step."""
        return self.table


@dataclass(frozen=True)
class Recorded:
    """What was recorded.

    Attributes:
        scale: in words.
        views: the runs with their measurements, by label.
        stability_map: who converged.
        separation: the rate of the runs, the seeds that chose it and those that carry claims.
    """

    scale: str
    views: dict[str, RunView]
    stability_map: xr.Dataset
    separation: Separation

    @property
    def runs_in_words(self) -> str:
        """The scale and the rate of the recorded runs."""
        return f"{self.scale}, learning rate {self.separation.learning_rate:g}"

    @property
    def map_in_words(self) -> str:
        """The scale of the stability map."""
        grid, trained = self.stability_map.sizes, self.scale.partition(";")[0]
        return f"{trained}; a run of each algorithm at {grid['learning_rate']} rates and {grid['seed']} seeds"

    def some(self, *labels: str) -> list[RunView]:
        """The runs of these labels.

        Raises:
            ValueError: if one was not recorded.
        """
        missing = [label for label in labels if label not in self.views]
        if missing:
            raise ValueError(f"the recorded runs lack {', '.join(missing)}; there are {', '.join(self.views)}")
        return [self.views[label] for label in labels]

    def group(self, label: str, measure: str) -> xr.Dataset:
        """The measurements of one measure of one run."""
        return self.some(label)[0].group(measure)


def write_recorded(
    views: Mapping[str, RunView], stability_map: xr.Dataset, separation: Separation, path: Path, *, scale: str, made_by: str
) -> None:  # fmt: skip
    """Write runs and their map."""
    seeds = {"choice_seeds": list(separation.choice_seeds), "claim_seeds": list(separation.claim_seeds)}
    root = stamp(xr.Dataset(), scale=scale, made_by=made_by, learning_rate=separation.learning_rate, **seeds)
    groups = {"/": root, MAP: stability_map}
    for label, view in views.items():
        groups[f"{RUNS}/{label}"] = xr.Dataset(
            attrs={**_provenance(view), "record": json.dumps(_nameless(view.run.record))}
        )
        groups[f"{RUNS}/{label}/{TABLE}"] = _metrics(view)
        groups |= {
            f"{RUNS}/{label}/{measure}": _lean(found) for measure, found in view.groups.items() if measure in MEASURES
        }
    save_groups(groups, path)


def read_recorded(path: str | Path) -> Recorded:
    """What `write_recorded` wrote.

    Raises:
        ValueError: for a file that is missing, unreadable, or none of recorded runs.
    """
    path = Path(path)
    groups = load_groups(path)
    if not groups:
        raise ValueError(f"there is no {path}; make it with: python -m paper_figs --recompute")
    told = groups["/"].attrs
    if not {"scale", "learning_rate", "choice_seeds", "claim_seeds"} <= set(told) or MAP not in groups:
        raise ValueError(f"{path} holds no recorded runs")
    views = {}
    for name, found in groups.items():
        if name.startswith(f"{RUNS}/") and name.count("/") == 1:
            label = name.removeprefix(f"{RUNS}/")
            measured = {
                key.removeprefix(f"{name}/"): group for key, group in groups.items() if key.startswith(f"{name}/")
            }
            run = KeptRun(path, json.loads(found.attrs["record"]), _table(measured.pop(TABLE)))
            views[label] = RunView(label, run, measured)
    choice, claim = (tuple(int(s) for s in _listed(told[key])) for key in ("choice_seeds", "claim_seeds"))
    return Recorded(told["scale"], views, groups[MAP], Separation(float(told["learning_rate"]), choice, claim))


def _metrics(view: RunView) -> xr.Dataset:
    table = view.run.metrics
    columns = {name: ("step", table[name].astype(float).to_numpy()) for name in METRICS if name in table}
    return xr.Dataset(columns, coords={"step": table["step"].to_numpy()})


def _provenance(view: RunView) -> dict[str, Any]:
    measured = next(iter(view.groups.values()), xr.Dataset()).attrs
    return {k: v for k, v in measured.items() if str(k).startswith("provenance")}


def _nameless(record: dict[str, Any]) -> dict[str, Any]:
    """The record; of a run that its noise was matched to, the directory's name alone."""
    config = record["config"]
    noise = config["sigma0"]
    return {**record, "config": {**config, "sigma0": Path(noise).name if isinstance(noise, str) else noise}}


def _lean(found: xr.Dataset) -> xr.Dataset:
    """Without single draws, whose means and errors stay, without long spectra, and without the provenance, which is the run's."""
    kept = found.drop_vars([n for n in found.data_vars if "draw" in found[n].dims or found[n].size > LONG])
    kept.attrs = {k: v for k, v in kept.attrs.items() if not k.startswith("provenance")}
    return kept


def _table(found: xr.Dataset) -> pd.DataFrame:
    columns = {str(name): values.values.tolist() for name, values in found.data_vars.items()}
    return pd.DataFrame({"step": found["step"].values, **columns})


def _listed(value: Any) -> list[Any]:
    """A list attribute, which netCDF reads back as a number where it has one entry."""
    return list(value) if hasattr(value, "__iter__") else [value]
