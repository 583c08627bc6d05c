"""The loss over a plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from landscape.display import Displayed, Shown, span
from landscape.objective import Objective
from landscape.slices.evaluate import BatchNormSlices, SmoothingKernel, settle_batch_norm
from landscape.slices.lines import about, rising, slice_attributes, stored_attributes
from landscape.slices.moments import check_population, point_losses
from landscape.slices.planes import Plane
from landscape.slices.refinement import refine

ERRORS = {
    "loss_stderr": ("stderr", "standard error of loss over the choice of examples"),
    "change": ("change", "loss less that at the origin"),
    "change_stderr": ("change_stderr", "standard error of change: both ends meet the same examples"),
    "smoothing_stderr": ("smoothing_stderr", "standard error of loss over pairs of deviations"),
    "smoothing_change_stderr": ("smoothing_change_stderr", "standard error of change over pairs of deviations"),
}


@dataclass(frozen=True, repr=False)
class PlaneSlice(Displayed):
    """The loss, or the smoothed loss, over a grid of a plane.

    Attributes:
        plane: where.
        first: (p,) coordinates along the plane's first axis, in multiples of it.
        second: (q,) along the second.
        loss: (p, q); inf or nan where it is.
        evaluated: (p, q) whether a loss was evaluated; the others are interpolated, without errors (nan).
        loss_stderr: (p, q) standard error over the choice of examples; 0 where they are all there are.
        change: (p, q) loss less `origin_loss`.
        change_stderr: (p, q) of change, smaller than loss_stderr near the origin: both ends meet the same examples. Errors of neighbours
            are alike for the same reason; the surface's shape is better known than its height.
        smoothing_stderr: (p, q) over pairs of deviations; 0 without a kernel or for an exact one.
        smoothing_change_stderr: (p, q) that of change.
        origin_loss: at the plane's origin, which need not be on the grid; smoothed alike.
        tolerance: of the refinement, absolute and relative; None where all points were evaluated.
        kernel: that the loss is smoothed by; "none".
        batch_norm: what BatchNorm's statistics were.
        population: of which the examples are a choice; None where they are all there are.
        num_examples: N.
        description: of the objective.
    """

    plane: Plane
    first: np.ndarray
    second: np.ndarray
    loss: np.ndarray
    evaluated: np.ndarray
    loss_stderr: np.ndarray
    change: np.ndarray
    change_stderr: np.ndarray
    smoothing_stderr: np.ndarray
    smoothing_change_stderr: np.ndarray
    origin_loss: float
    tolerance: tuple[float, float] | None
    kernel: str
    batch_norm: str
    population: float | int | None
    num_examples: int
    description: dict[str, Any]

    def shown(self) -> Shown:
        """Where, how high and of what."""
        broken = int((~np.isfinite(self.loss)).sum())
        return Shown(
            "PlaneSlice",
            [
                ("axes", ", ".join(self.plane.names), ""),
                ("grid", " × ".join(map(str, self.loss.shape)), ""),
                ("loss", span(self.loss), "nats"),
                ("at the origin", self.origin_loss, "nats"),
                *([("not finite", broken, "points")] if broken else []),
                ("evaluated", f"{self.evaluated.mean():.0%}", ""),
                *about(self),
            ],
        )

    @property
    def lengths(self) -> np.ndarray:
        """(p, q, 2) coordinates along the plane's orthonormal axes, weights."""
        return self.plane.lengths(np.stack(np.meshgrid(self.first, self.second, indexing="ij"), axis=-1))

    def to_xarray(self) -> xr.Dataset:
        """Over `first` and `second`."""
        dims, lengths = ("first", "second"), self.lengths
        made = xr.Dataset(
            {
                "loss": (dims, self.loss, {"long_name": "loss", "units": "nats"}),
                "evaluated": (dims, self.evaluated, {"long_name": "whether the loss was evaluated and not interpolated"}),
                "origin_loss": ((), self.origin_loss, {"long_name": "loss at the plane's origin", "units": "nats"}),
            },
            coords={
                "first": ("first", self.first, {"long_name": self.plane.names[0], "units": "axis"}),
                "second": ("second", self.second, {"long_name": self.plane.names[1], "units": "axis"}),
                "first_length": (dims, lengths[..., 0], {"long_name": "distance along the first orthonormal axis", "units": "weights"}),
                "second_length": (dims, lengths[..., 1], {"long_name": "distance along the second orthonormal axis", "units": "weights"}),
            },
            attrs={**slice_attributes(self), **{f"plane_{k}": v for k, v in self.plane.attributes.items()}},
        )  # fmt: skip
        for name, (_, text) in ERRORS.items():
            made[name] = (dims, getattr(self, name), {"long_name": text, "units": "nats"})
        if self.tolerance is not None:
            made.attrs["tolerance"], made.attrs["relative_tolerance"] = self.tolerance
        return made

    @classmethod
    def from_xarray(cls, found: xr.Dataset) -> PlaneSlice:
        """What `to_xarray` made, to draw it again; its plane is without weights, see `Plane.from_attributes`."""
        a = found.attrs
        plane = Plane.from_attributes({k.removeprefix("plane_"): v for k, v in a.items() if k.startswith("plane_")})
        limits = (float(a["tolerance"]), float(a["relative_tolerance"])) if "tolerance" in a else None
        errors: dict[str, Any] = {name: found[name].values for name in ERRORS}
        return cls(
            plane, found["first"].values, found["second"].values, found["loss"].values, found["evaluated"].values.astype(bool),
            **errors, origin_loss=float(found["origin_loss"]), tolerance=limits,
            **stored_attributes(a),
        )  # fmt: skip


def plane_slice(
    objective: Objective,
    plane: Plane,
    first: np.ndarray,
    second: np.ndarray,
    *,
    kernel: SmoothingKernel | None = None,
    batch_norm: BatchNormSlices | None = None,
    population: float | int | None = None,
    tolerance: float | int | None = None,
    relative_tolerance: float | int = 0.0,
    coarse: int = 8,
) -> PlaneSlice:
    """The loss over a grid of a plane.

    Args:
        objective: L.
        plane: where.
        first: (p,) coordinates along the first axis, in multiples of it, rising.
        second: (q,) along the second.
        kernel: smooth the loss with it.
        batch_norm: what BatchNorm's statistics are; needed where the network has any. See `landscape.slices.evaluate.BatchNormSlices`.
        population: how many examples the objective's are a random choice from, without replacement (math.inf: draws from a
            distribution); None where they are all there are.
        tolerance: evaluate only where bilinear interpolation misses by more than this, in nats, plus relative_tolerance times the loss; see
            `landscape.slices.refinement.refine`. None evaluates all points.
        relative_tolerance: see tolerance.
        coarse: steps of the grid from which refinement starts.

    Cost: p q + 1 values at most, times the kernel's deviations.
    """
    first, second = rising(first, "first"), rising(second, "second")
    check_population(objective, population)
    settled, policy = settle_batch_norm(objective, plane.origin, batch_norm)
    shape = (len(first), len(second))
    loss, evaluated = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    errors = {name: np.full(shape, np.nan) for name in ERRORS}
    origin_loss = np.nan

    def evaluate(at: np.ndarray) -> np.ndarray:
        nonlocal origin_loss
        coordinates = np.stack([first[at[:, 0]], second[at[:, 1]]], axis=1)
        found = point_losses(settled, plane.origin, plane.axes, coordinates, kernel=kernel, population=population,
                             recalibrate=policy == "recalibrated")  # fmt: skip
        origin_loss = found.origin_loss
        for name, (field, _) in ERRORS.items():
            errors[name][at[:, 0], at[:, 1]] = getattr(found, field)
        return found.loss

    if tolerance is None:
        everywhere = np.stack([i.ravel() for i in np.indices(shape)], axis=1)
        loss, evaluated = evaluate(everywhere).reshape(shape), np.ones(shape, dtype=bool)
    else:
        loss, evaluated = refine(first, second, evaluate, tolerance=tolerance, relative_tolerance=relative_tolerance, coarse=coarse)  # fmt: skip
        errors["change"] = np.where(evaluated, errors["change"], loss - origin_loss)
    limits = None if tolerance is None else (float(tolerance), float(relative_tolerance))
    return PlaneSlice(
        plane, first, second, loss, evaluated, **errors, origin_loss=float(origin_loss), tolerance=limits,
        kernel="none" if kernel is None else kernel.name, batch_norm=policy, population=population,
        num_examples=objective.num_examples, description=objective.description,
    )  # fmt: skip
