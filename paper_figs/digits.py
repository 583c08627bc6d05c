"""The runs that the figures of the digits share: made by `landscape reproduce` and a few measures more, kept as one netCDF."""

from __future__ import annotations

from pathlib import Path

from landscape.experiments.measure import measure
from landscape.experiments.reproduce import PRESETS, RECORDED, reproduce
from landscape.experiments.sweep import MAP_FILE
from landscape.plotting.view import load_view
from landscape.results import load_dataset
from landscape.theory.conclusions import Separation, choose_rate
from paper_figs.recorded import Recorded, read_recorded, write_recorded
from paper_figs.scales import Scale

INPUT = "recorded/digits.nc"
"""Under the data folder; not beside the studies, whose folder is read whole."""


def compute(work: Path, scale: Scale, folder: Path) -> Path:
    """Run what is missing under `work`, and keep what was measured.

    Args:
        work: where runs are kept and found again.
        scale: how large.
        folder: the data folder.

    Returns:
        FOLDER/recorded/digits.nc.
    """
    out = reproduction(work, scale)
    reproduce(out, scale.preset, num_seeds=scale.num_seeds, task=scale.task, device=scale.device)
    settings = PRESETS[scale.preset].settings
    views = {}
    for label in RECORDED:
        run = out / "runs" / label
        steps = load_view(run).run.steps
        further = [step for step in scale.spectrum_steps if step in steps]
        measure(run, ("curvature",), further, settings=settings, device=scale.device)
        if label == "dpsgd":  # whose draws stand for the steps of all algorithms
            measure(run, ("covariance",), further[-1:], settings=settings, device=scale.device)
        views[label] = load_view(run, label)
    path = folder / INPUT
    made_by = f"python -m paper_figs --recompute --scale {scale.name}"
    write_recorded(
        views, load_dataset(out / MAP_FILE), separation(work, scale), path, scale=scale.words, made_by=made_by
    )
    return path


def reproduction(work: Path, scale: Scale) -> Path:
    """Where `landscape reproduce` works."""
    return work / f"reproduce-{scale.name}"


def separation(work: Path, scale: Scale) -> Separation:
    """The rate of the recorded runs, from the map that the reproduction wrote."""
    return choose_rate(load_dataset(reproduction(work, scale) / MAP_FILE), PRESETS[scale.preset].num_choice_seeds)


def read(folder: Path) -> Recorded:
    """The kept runs.

    Raises:
        ValueError: if they are not there.
    """
    return read_recorded(folder / INPUT)
