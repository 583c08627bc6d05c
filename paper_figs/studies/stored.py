"""The file of a study: one small netCDF with everything that figures and tables are drawn from.

/       the study as JSON, its scale in words, provenance, data fingerprint
/map    stage 1, see `mapping.joined`: (total_batch, variant, rate, seed, point)
/along  stage 2, see `along.run_along`: (run, point, prediction, logged); absent where it was not run
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from landscape.results import load_groups, save_groups, stamp
from paper_figs.studies.declared import Study
from paper_figs.studies.edges import Edges, edges

DATA = Path(__file__).parents[1] / "data"
"""Where the files lie that are kept with the code."""


@dataclass(frozen=True)
class Stored:
    """A study's results.

    Attributes:
        name: of the study.
        task: with its scale.
        scale: in what it is smaller than the paper, in words.
        declared: the study's fields.
        map: stage 1.
        along: stage 2, if it was run.
    """

    name: str
    task: str
    scale: str
    declared: dict[str, Any]
    map: xr.Dataset
    along: xr.Dataset | None

    @property
    def threshold(self) -> float:
        """A final training loss below this is convergence, in nats."""
        return float(self.map.attrs["threshold"])

    @property
    def constant_loss(self) -> float:
        """Loss of the best constant output, in nats."""
        return float(self.map.attrs["constant_loss"])

    def converged(self, batch: int, variant: str, share: float | None = None) -> np.ndarray:
        """(rate, seed) booleans at the batch of this index; with another share of the constant loss than the study's, if given."""
        at = self.map.isel(total_batch=batch).sel(variant=variant).transpose("rate", "seed", ...)
        level = self.threshold if share is None else share * self.constant_loss
        return np.asarray(at["final_loss"].values < level)

    def rates(self, batch: int) -> np.ndarray:
        """Learning rates at the batch of this index."""
        return np.asarray(self.map["learning_rate"].isel(total_batch=batch).values)

    def edges(self, batch: int, variant: str, share: float | None = None) -> Edges:
        """Where an algorithm fails, by seed."""
        return edges(self.rates(batch), self.converged(batch, variant, share))


def write_study(study: Study, found: xr.Dataset, along: xr.Dataset | None, path: Path) -> None:
    """Write a study's file."""
    scale = study.scale_label(int(found.attrs["num_examples"]))
    root = stamp(xr.Dataset(), study=study.name, task=study.task, scale=scale, declared=json.dumps(study.to_json()))
    save_groups({"/": root, "map": found, **({} if along is None else {"along": along})}, path)


def read_study(path: str | Path) -> Stored:
    """A study's results.

    Raises:
        ValueError: for a file that is missing, unreadable, or none of a study.
    """
    groups = load_groups(path)
    if not groups:
        raise ValueError(f"there is no {path}; make it with: python -m paper_figs.studies {Path(path).stem}")
    root = groups["/"].attrs
    missing = [key for key in ("study", "task", "scale", "declared") if key not in root]
    if missing or "map" not in groups:
        raise ValueError(f"{path} is no file of a study (it has no {', '.join(missing) or 'map'})")
    return Stored(
        root["study"], root["task"], root["scale"], json.loads(root["declared"]), groups["map"], groups.get("along")
    )


def read_all(folder: Path) -> list[Stored]:
    """Every study in a folder, by name.

    Raises:
        ValueError: if there is none.
    """
    paths = sorted(folder.glob("*.nc"))
    if not paths:
        raise ValueError(f"{folder} holds no study; make one with: python -m paper_figs.studies NAME")
    return [read_study(path) for path in paths]
