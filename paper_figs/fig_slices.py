"""Slices of the landscape through the learners: what DPSGD's disagreement sees of the loss, early and late (theory.md sec. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from landscape.checkpoints import Learners
from landscape.checkpoints.format import RUN_FILE
from landscape.curvature import hessian
from landscape.experiments.checkpoint import MeasureConfig
from landscape.experiments.measure import run_objective
from landscape.experiments.train import train
from landscape.objective import Objective
from landscape.plotting.slices import loss_contours, loss_lines
from landscape.plotting.style import new_figure, style
from landscape.results import load_groups, save_groups, stamp
from landscape.slices import (
    Line,
    LineSlice,
    PlaneSlice,
    Projection,
    QuadraticModel,
    SmoothingKernel,
    disagreement_plane,
    line_between,
    line_slice,
    plane_slice,
    quadratic_model,
)
from landscape.statistics import Estimate
from landscape.tasks import get_task
from landscape.theory.scorecard import TOLERANCE
from landscape.theory.smoothing import KERNELS, kernel_deviations
from paper_figs import digits
from paper_figs.claims import Headline, count, headline, near, whether
from paper_figs.panels import finish
from paper_figs.scales import Scale

CLAIM = (
    "DPSGD's learners stand in one valley of the loss, without a barrier between any two of them. Early its walls rise at their weights by more "
    "than the quadratic model about their average says, late by what it says."
)
INPUTS = ("recorded/slices.nc",)
STEPS = (20, 500)
"""Checkpoints: early, where the learners stand far apart, and the end."""
REACH, SIDE = 1.35, 41
"""The plane reaches so many times as far as the farthest learner's projection, on a grid of so many points a side."""
POINTS, SAMPLES = 61, 16
"""Of the line, and of the random kernels' deviations."""
BARRIER_POINTS = 21
LEAST_BARRIER = 0.01
"""nats; below, a rise between two learners counts as none."""


@dataclass(frozen=True)
class At:
    """A checkpoint as its slices show it.

    Attributes:
        plane: the loss over the plane of the disagreement.
        learners: their projections on it.
        model: the quadratic model of the loss in it.
        lines: the loss along the plane's first axis, plain and smoothed by each kernel.
        along: the learners' projections on that line.
        line_model: the quadratic model along it.
        barriers: (pairs,) highest rise of the loss between two learners over its interpolation, nats.
        rise: mean of the learners' losses less that at w_a, nats.
        model_rise: the same as the quadratic model has it, Tr(H Sigma_w)/2.
    """

    plane: PlaneSlice
    learners: Projection
    model: QuadraticModel
    lines: list[LineSlice]
    along: Projection
    line_model: QuadraticModel
    barriers: np.ndarray
    rise: float
    model_rise: float


@dataclass(frozen=True)
class Slices:
    """What was recorded.

    Attributes:
        scale: in words.
        at: by step.
    """

    scale: str
    at: dict[int, At]


def compute(work: Path, scale: Scale, folder: Path) -> Path:
    """Train DPSGD as the recorded run of the other figures was trained, and slice it at two checkpoints, with all training examples."""
    recorded = digits.read(folder).views["dpsgd"].run
    words = f"{scale.words}, learning rate {recorded.config.learning_rate:g}"
    path = work / f"slices-{scale.name}"
    run = train(get_task(recorded.task), recorded.config, path, resume=(path / RUN_FILE).exists())
    groups = {"/": stamp(xr.Dataset(), scale=words, made_by=f"python -m paper_figs --recompute --scale {scale.name}")}
    objective = run_objective(run, None, None, scale.device, False, MeasureConfig())[0]
    for step in STEPS:
        groups |= {f"step-{step}/{name}": part for name, part in slices(objective, run.learners(step)).items()}
    out = folder / INPUTS[0]
    save_groups(groups, out)
    return out


def slices(objective: Objective, learners: Learners) -> dict[str, xr.Dataset]:
    """What `At` holds of one checkpoint, labelled."""
    plane = disagreement_plane(learners)
    seen = plane.project(learners.weights)
    first, second = (np.linspace(-reach, reach, SIDE) for reach in REACH * np.abs(seen.coordinates).max(0))
    line = Line(plane.origin, plane.first, plane.kind, plane.names[0])
    along, positions = line.project(learners.weights), np.linspace(first[0], first[-1], POINTS)
    kernels = {
        name: SmoothingKernel(name, kernel_deviations(learners, name, SAMPLES), antithetic=name != "learners")
        for name in KERNELS
    }
    barriers = [
        line_slice(objective, line_between(*learners.weights[list(pair)]), np.linspace(0, 1, BARRIER_POINTS)).barrier()
        for pair in combinations(range(len(learners)), 2)
    ]
    losses = objective.stacked_values(learners.weights)
    products = hessian(objective, learners.mean) @ learners.deviations.T
    numbers = {
        "barrier": ("pair", [b.height.value for b in barriers], {"long_name": "barrier between two learners", "units": "nats"}),
        "rise": ((), float(losses.mean()) - objective.value(learners.mean), {"long_name": "mean loss of the learners less that of w_a", "units": "nats"}),
        "model_rise": ((), float((learners.deviations.T * products).sum()) / (2 * len(learners)), {"long_name": "Tr(H Sigma_w)/2", "units": "nats"}),
    }  # fmt: skip
    return {
        "plane": plane_slice(objective, plane, first, second).to_xarray(),
        "learners": seen.to_xarray(),
        "model": quadratic_model(objective, plane).to_xarray(),
        "line": line_slice(objective, line, positions).to_xarray(),
        **{f"line-{name}": line_slice(objective, line, positions, kernel=k).to_xarray() for name, k in kernels.items()},
        "along": along.to_xarray(),
        "line-model": quadratic_model(objective, line).to_xarray(),
        "numbers": xr.Dataset(numbers),
    }


def read(folder: Path) -> Slices:
    """What `compute` wrote.

    Raises:
        ValueError: if it is not there, or something else.
    """
    path = folder / INPUTS[0]
    groups = load_groups(path)
    if not groups:
        raise ValueError(f"there is no {path}; make it with: python -m paper_figs --recompute --only fig_slices")
    if not {f"step-{step}/numbers" for step in STEPS} <= set(groups):
        raise ValueError(f"{path} holds no slices at steps {', '.join(map(str, STEPS))}")
    return Slices(groups["/"].attrs["scale"], {step: _at(groups, f"step-{step}") for step in STEPS})


def _at(groups: Mapping[str, xr.Dataset], name: str) -> At:
    def part(key: str) -> xr.Dataset:
        return groups[f"{name}/{key}"]

    numbers = part("numbers")
    lines = [LineSlice.from_xarray(part(key)) for key in ("line", *(f"line-{kernel}" for kernel in KERNELS))]
    return At(
        PlaneSlice.from_xarray(part("plane")), Projection.from_xarray(part("learners")), QuadraticModel.from_xarray(part("model")),
        lines, Projection.from_xarray(part("along")), QuadraticModel.from_xarray(part("line-model")),
        numbers["barrier"].values, float(numbers["rise"]), float(numbers["model_rise"]),
    )  # fmt: skip


def headlines(data: Slices) -> dict[str, Headline]:
    """How far the walls rise at the learners, over what the quadratic model says; pairs with a barrier; one run, all training examples."""
    found = {}
    for step, at in data.at.items():
        ratio = Estimate(at.rise / at.model_rise, 0.0)
        bearing = whether(ratio.value > 1 + TOLERANCE) if step == STEPS[0] else near(ratio, Estimate(1.0, 0.0))
        text = f"rise of the loss from w_a to the learners, over the quadratic model's, at step {step}"
        found[f"rise_ratio_{step}"] = headline(ratio, text, bearing, tolerance=0.5 * abs(ratio.value))
    for step, at in data.at.items():
        hits = int((at.barriers > LEAST_BARRIER).sum())
        text = f"pairs of learners with a barrier above {LEAST_BARRIER:g} nats at step {step}"
        found[f"barriers_{step}"] = count(hits, len(at.barriers), text, whether(hits == 0))
        highest = Estimate(float(at.barriers.max()))
        found[f"highest_{step}"] = headline(
            highest, "the highest (nats)", tolerance=max(2 * LEAST_BARRIER, 2 * highest.value)
        )
    return found


def draw(data: Slices) -> Figure:
    """A row a checkpoint: the plane of the disagreement with the learners, and its first axis with the smoothed losses."""
    with style():
        figure = new_figure("two-column", rows=2, height=3.6)
        panels = figure.subplots(2, 2)
        for (step, at), (plane, line) in zip(data.at.items(), panels, strict=True):
            loss_contours(at.plane, plane, learners=at.learners, model=at.model)
            loss_lines(at.lines, line, learners=at.along, model=at.line_model)
            for panel in (plane, line):
                legend = panel.get_legend()
                assert legend is not None
                legend.set_title(f"DPSGD, step {step}")
        return finish(figure, CLAIM, headlines(data), data.scale)
