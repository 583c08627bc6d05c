"""What a figure is drawn from: a run, its measurements and a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import xarray as xr

from landscape.checkpoints import Run, open_run
from landscape.checkpoints.format import MEASUREMENTS_FILE
from landscape.results import load_groups


@dataclass(frozen=True)
class RunView:
    """A run as figures see it.

    Attributes:
        label: its name on figures.
        run: the run directory.
        groups: its measurements by measure; empty if nothing was measured.
    """

    label: str
    run: Run
    groups: dict[str, xr.Dataset]

    @property
    def variant(self) -> str:
        """The algorithm, with DPSGD's order unless it is AWC: what decides colour, line and marker."""
        config = self.run.config
        return f"dpsgd-{config.order}" if config.algorithm == "dpsgd" and config.order != "awc" else config.algorithm

    @property
    def num_parameters(self) -> int:
        """d."""
        return int(self.run.record["num_parameters"])

    def series(self, name: str) -> pd.Series:
        """One column of metrics.jsonl over the steps where it was logged; empty if it never was."""
        metrics = self.run.metrics
        if name not in metrics or "step" not in metrics:
            return pd.Series(dtype=float, name=name)
        return metrics.set_index("step")[name].dropna()

    def group(self, measure: str) -> xr.Dataset:
        """The measurements of one measure.

        Raises:
            ValueError: if it was not measured, saying how to measure it.
        """
        if measure not in self.groups:
            raise ValueError(
                f"{self.run.path} has no measurements of {measure}; make them with: landscape measure {self.run.path}"
            )
        return self.groups[measure]


def load_view(path: str | Path, label: str | None = None) -> RunView:
    """Open a run and its measurements.

    Args:
        path: the run directory; one that was never measured has no groups.
        label: its name on figures; by default the algorithm, with DPSGD's order unless it is AWC.

    Raises:
        ValueError: if there is no run, or its files cannot be read.
    """
    run = open_run(path)
    groups = {k: v for k, v in load_groups(run.path / MEASUREMENTS_FILE).items() if k != "/"}
    view = RunView("", run, groups)
    return replace(view, label=view.variant if label is None else label)


def distinct(views: Sequence[RunView]) -> list[RunView]:
    """The views with labels that differ: the directory's name is added to those that do not."""
    counts = Counter(v.label for v in views)
    named = [replace(v, label=f"{v.label}, {v.run.path.name}") if counts[v.label] > 1 else v for v in views]
    again = Counter(v.label for v in named)
    return [replace(v, label=f"{v.label} ({i})") if again[v.label] > 1 else v for i, v in enumerate(named, 1)]
