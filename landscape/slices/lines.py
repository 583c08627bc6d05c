"""The loss along a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from landscape.display import Displayed, Row, Shown, span, sparkline
from landscape.objective import Objective
from landscape.slices.evaluate import BatchNormSlices, SmoothingKernel, settle_batch_norm
from landscape.slices.moments import point_losses
from landscape.slices.planes import Line
from landscape.statistics import Estimate


@dataclass(frozen=True, repr=False)
class Barrier(Displayed):
    """How far the loss between two weight vectors rises above the straight interpolation of their losses.

    Attributes:
        height: max over t in [0, 1] of L(w(t)) - (1 - t) L(w(0)) - t L(w(1)), at the points that were evaluated: a lower bound of that over all t.
            0 at the ends, so never negative. Its standard error is over the choice of examples, which all three losses share; the choice
            of the maximum among noisy points biases it upwards, which the error does not cover. inf where a loss on the way is not finite.
        position: t of the maximum.
    """

    height: Estimate
    position: float

    def shown(self) -> Shown:
        """How high, and where."""
        return Shown("Barrier", [("height", self.height, "nats"), ("position", self.position, "")])


@dataclass(frozen=True, repr=False)
class LineSlice(Displayed):
    """The loss, or the smoothed loss, along a line.

    Attributes:
        line: where.
        positions: (P,) t, in multiples of the line's direction.
        loss: (P,); inf or nan where it is.
        loss_stderr: (P,) standard error over the choice of examples; 0 where they are all there are.
        smoothing_stderr: (P,) over pairs of deviations; 0 without a kernel or for an exact one.
        covariance: (P, P) of the losses over the choice of examples: all points meet the same, so differences are better known than the losses.
        kernel: that the loss is smoothed by; "none".
        batch_norm: what BatchNorm's statistics were.
        population: of which the examples are a choice; None where they are all there are.
        num_examples: N.
        description: of the objective.
    """

    line: Line
    positions: np.ndarray
    loss: np.ndarray
    loss_stderr: np.ndarray
    smoothing_stderr: np.ndarray
    covariance: np.ndarray
    kernel: str
    batch_norm: str
    population: float | int | None
    num_examples: int
    description: dict[str, Any]

    def shown(self) -> Shown:
        """Where, how high and of what."""
        broken = int((~np.isfinite(self.loss)).sum())
        return Shown(
            "LineSlice",
            [
                ("along", self.line.name, ""),
                ("points", len(self.positions), ""),
                ("t", span(self.positions), ""),
                ("length of t = 1", self.line.length, "weights"),
                ("loss", span(self.loss), "nats"),
                *([("not finite", broken, "points")] if broken else []),
                *about(self),
            ],
            picture=sparkline(self.loss, "loss along the line"),
        )

    def difference(self, index: int, other: int) -> Estimate:
        """Loss at one point less that at another, with its error over the examples that both met."""
        contrast = np.zeros(len(self.positions))
        contrast[index] += 1
        contrast[other] -= 1
        return self._contrast(contrast)

    def barrier(self) -> Barrier:
        """Linear connectivity of the ends t = 0 and t = 1 (Frankle et al., arXiv 1912.05671); see `Barrier`.

        Raises:
            ValueError: 0 and 1 are not both among the positions.
        """
        excess, stderr = self.excess()
        inside = np.flatnonzero((self.positions >= 0) & (self.positions <= 1))
        broken = inside[~np.isfinite(self.loss[inside])]
        if len(broken):
            return Barrier(Estimate(math.inf, math.nan, self.num_examples), float(self.positions[broken[0]]))
        top = int(inside[excess[inside].argmax()])
        return Barrier(Estimate(float(excess[top]), float(stderr[top]), self.num_examples), float(self.positions[top]))

    def excess(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) L(w(t)) - (1 - t) L(w(0)) - t L(w(1)), and its error over the examples that all three losses share; nan where a loss is not finite.

        Raises:
            ValueError: 0 and 1 are not both among the positions.
        """
        if not {0.0, 1.0} <= set(self.positions.tolist()):
            raise ValueError("a barrier is between t = 0 and t = 1: have both among the positions")
        start, end = (int(np.flatnonzero(self.positions == t)[0]) for t in (0.0, 1.0))
        values, errors = np.full(len(self.positions), np.nan), np.full(len(self.positions), np.nan)
        known = np.isfinite(self.loss)
        if not (known[start] and known[end]):
            return values, errors
        for i in np.flatnonzero(known):
            t = self.positions[i]
            contrast = np.zeros(len(self.positions))
            np.add.at(contrast, np.array([i, start, end]), np.array([1.0, t - 1.0, -t]))
            found = self._contrast(contrast)
            values[i], errors[i] = found.value, found.stderr
        return values, errors

    def _contrast(self, weights: np.ndarray) -> Estimate:
        used = np.flatnonzero(weights)
        w = weights[used]
        variance = float(w @ self.covariance[np.ix_(used, used)] @ w)
        return Estimate(float(w @ self.loss[used]), math.sqrt(max(0.0, variance)), self.num_examples)

    def to_xarray(self) -> xr.Dataset:
        """Over `position`, and the covariance over `position` and `other_position`."""
        along = {"long_name": "t of w = origin + t direction", "units": "direction"}
        made = xr.Dataset(
            {
                "loss": ("position", self.loss, {"long_name": "loss", "units": "nats"}),
                "loss_stderr": ("position", self.loss_stderr, {"long_name": "standard error over the choice of examples", "units": "nats"}),
                "smoothing_stderr": ("position", self.smoothing_stderr, {"long_name": "standard error over pairs of deviations", "units": "nats"}),
                "covariance": (("position", "other_position"), self.covariance,
                               {"long_name": "covariance of the losses over the choice of examples, which all points share", "units": "nats^2"}),
            },
            coords={"position": ("position", self.positions, along), "other_position": ("other_position", self.positions, along)},
            attrs={**slice_attributes(self), **self.line.attributes},
        )  # fmt: skip
        return made

    @classmethod
    def from_xarray(cls, found: xr.Dataset) -> LineSlice:
        """What `to_xarray` made, to draw it again; its line is without weights, see `Line.from_attributes`."""
        return cls(
            Line.from_attributes(found.attrs), found["position"].values, found["loss"].values, found["loss_stderr"].values,
            found["smoothing_stderr"].values, found["covariance"].values, **stored_attributes(found.attrs),
        )  # fmt: skip


def about(found: Any) -> list[Row]:
    """What every slice shows of itself."""
    return [("kernel", found.kernel, ""), ("batch norm", found.batch_norm, ""), ("examples", found.num_examples, "")]


def slice_attributes(found: Any) -> dict[str, Any]:
    """What every slice says of itself: kernel, BatchNorm, examples, objective."""
    population = "all" if found.population is None else found.population
    return {**found.description, "kernel": found.kernel, "batch_norm": found.batch_norm, "population": population, "num_examples": found.num_examples}  # fmt: skip


def stored_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What `slice_attributes` wrote, as fields; the description is all the attributes that are there."""
    population = attributes["population"]
    return {
        "kernel": str(attributes["kernel"]),
        "batch_norm": str(attributes["batch_norm"]),
        "population": None if population == "all" else float(population),
        "num_examples": int(attributes["num_examples"]),
        "description": dict(attributes),
    }


def line_slice(
    objective: Objective,
    line: Line,
    positions: np.ndarray,
    *,
    kernel: SmoothingKernel | None = None,
    batch_norm: BatchNormSlices | None = None,
    population: float | int | None = None,
) -> LineSlice:
    """The loss along a line.

    Args:
        objective: L.
        line: where.
        positions: (P,) t, rising.
        kernel: smooth the loss with it.
        batch_norm: what BatchNorm's statistics are; needed where the network has any. See `landscape.slices.evaluate.BatchNormSlices`.
        population: how many examples the objective's are a random choice from, without replacement (math.inf: draws from a
            distribution); None where they are all there are.

    Cost: P + 1 values, times the kernel's deviations.
    """
    positions = rising(positions, "positions")
    settled, policy = settle_batch_norm(objective, line.origin, batch_norm)
    found = point_losses(settled, line.origin, line.axes, positions[:, None], kernel=kernel, population=population,
                         recalibrate=policy == "recalibrated", covariance=True)  # fmt: skip
    assert found.covariance is not None
    return LineSlice(line, positions, found.loss, found.stderr, found.smoothing_stderr, found.covariance,
                     "none" if kernel is None else kernel.name, policy, population, objective.num_examples, objective.description)  # fmt: skip


def rising(values: np.ndarray, what: str) -> np.ndarray:
    """Coordinates of a grid, float64.

    Raises:
        ValueError: not one rising row of finite numbers.
    """
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or len(row) == 0 or not np.isfinite(row).all() or not (np.diff(row) > 0).all():
        raise ValueError(f"{what} must be finite numbers in rising order")
    return row
