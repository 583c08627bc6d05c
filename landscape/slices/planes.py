"""Lines and planes in weight space, and what of other weights lies in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape.checkpoints import Learners
from landscape.display import Displayed, Shown, span
from landscape.objective import Objective, Weights
from landscape.slices.directions import CHUNK, Vectors, principal_axes, random_direction

PARALLEL = 1e-6
"""Axes whose angle has a squared sine below this span no plane that float32 weights could tell from a line."""
DISAGREEMENT = "principal axes of the learners' disagreement"
"""Kind of the plane of `disagreement_plane`, whose origin is w_a."""


@dataclass(frozen=True, repr=False)
class Projection(Displayed):
    """Weight vectors as seen in a line or plane.

    Attributes:
        coordinates: (m, k) in units of the axes as they are given.
        lengths: (m, k) along the orthonormal axes: the first along the first given axis, the second along what of the second is orthogonal to
            it; weights.
        left_out: (m,) distance to the line or plane; weights. distance^2 = |lengths|^2 + left_out^2.
        distance: (m,) to the origin; weights.
    """

    coordinates: np.ndarray
    lengths: np.ndarray
    left_out: np.ndarray
    distance: np.ndarray

    def shown(self) -> Shown:
        """How many points, how far they are from the origin and how far beside the line or plane."""
        away = self.distance > 0
        return Shown(
            "Projection",
            [
                ("points", len(self.distance), ""),
                ("axes", self.coordinates.shape[1], ""),
                ("distance to the origin", span(self.distance), "weights"),
                ("left out", span(self.left_out), "weights"),
                ("share left out", span(self.left_out[away] / self.distance[away]), ""),
            ],
        )

    def to_xarray(self) -> xr.Dataset:
        """Over `point` and `axis`."""
        return xr.Dataset(
            {
                "coordinates": (("point", "axis"), self.coordinates, {"long_name": "coordinates along the axes as given", "units": "axis"}),
                "lengths": (("point", "axis"), self.lengths, {"long_name": "coordinates along the orthonormal axes", "units": "weights"}),
                "left_out": ("point", self.left_out, {"long_name": "distance that the projection leaves out", "units": "weights"}),
                "distance": ("point", self.distance, {"long_name": "distance to the origin", "units": "weights"}),
            }
        )  # fmt: skip

    @classmethod
    def from_xarray(cls, found: xr.Dataset) -> Projection:
        """What `to_xarray` made."""
        return cls(*(found[name].values for name in ("coordinates", "lengths", "left_out", "distance")))


@dataclass(frozen=True)
class Line:
    """w(t) = origin + t direction.

    Attributes:
        origin: (d,), w_a as a rule.
        direction: (d,), of any length.
        kind: how the direction was chosen, in words.
        name: of the direction, for axes of figures.
        seed: of a random direction.
    """

    origin: Float[Tensor, " d"]
    direction: Float[Tensor, " d"]
    kind: str = "given"
    name: str = "the line"
    seed: int | None = None

    def __post_init__(self) -> None:
        _triangle(self.axes)

    @property
    def axes(self) -> Float[Tensor, "1 d"]:
        """The direction as a row."""
        return self.direction[None]

    @property
    def length(self) -> float:
        """|direction|: how far t = 1 is from the origin, weights."""
        return float(_triangle(self.axes)[0, 0])

    def project(self, weights: Float[Tensor, "m d"]) -> Projection:
        """Where some weight vectors lie along the line, and how far beside it."""
        return _project(self.origin, self.axes, weights)

    @property
    def attributes(self) -> dict[str, Any]:
        """For the attributes of results."""
        found: dict[str, Any] = {"kind": self.kind, "name": self.name, "length": self.length}
        return found if self.seed is None else {**found, "seed": self.seed}

    @classmethod
    def from_attributes(cls, found: Mapping[str, Any]) -> Line:
        """A stored line, without its weights: the origin is 0 and the direction a number, of the line's length. Enough to draw it."""
        direction = torch.tensor([float(found["length"])], dtype=torch.float64)
        seed = int(found["seed"]) if "seed" in found else None
        return cls(torch.zeros(1, dtype=torch.float64), direction, str(found["kind"]), str(found["name"]), seed)


@dataclass(frozen=True)
class Plane:
    """w(a, b) = origin + a first + b second; the axes need be neither orthogonal nor of length 1.

    Attributes:
        origin: (d,), w_a as a rule.
        first: (d,).
        second: (d,).
        kind: how the axes were chosen, in words.
        names: of the axes, for figures.
        seed: of random axes.
        shares: of principal axes, the share of the points' summed squared distance to the origin along each.
    """

    origin: Float[Tensor, " d"]
    first: Float[Tensor, " d"]
    second: Float[Tensor, " d"]
    kind: str = "given"
    names: tuple[str, str] = ("first axis", "second axis")
    seed: int | None = None
    shares: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _triangle(self.axes)

    @property
    def axes(self) -> Float[Tensor, "2 d"]:
        """Both axes as rows."""
        return torch.stack([self.first, self.second])

    @property
    def triangle(self) -> np.ndarray:
        """(2, 2) lower triangular T with axes = T orthonormal axes, so that lengths = coordinates T; weights."""
        return _triangle(self.axes)

    def lengths(self, coordinates: np.ndarray) -> np.ndarray:
        """Coordinates (..., 2) along the axes as given, turned into lengths (..., 2) along the orthonormal ones."""
        return np.asarray(coordinates @ self.triangle)

    def project(self, weights: Float[Tensor, "m d"]) -> Projection:
        """Where the weight vectors' nearest points of the plane are, and how far from it they are."""
        return _project(self.origin, self.axes, weights)

    @property
    def attributes(self) -> dict[str, Any]:
        """For the attributes of results."""
        t = self.triangle
        lengths = np.hypot(t[:, 0], t[:, 1])
        found: dict[str, Any] = {
            "kind": self.kind,
            "first_name": self.names[0],
            "second_name": self.names[1],
            "first_length": float(lengths[0]),
            "second_length": float(lengths[1]),
            "cosine": float(t[1, 0] / lengths[1]),
        }
        if self.seed is not None:
            found["seed"] = self.seed
        if self.shares is not None:
            found["first_share"], found["second_share"] = self.shares
        return found

    @classmethod
    def from_attributes(cls, found: Mapping[str, Any]) -> Plane:
        """A stored plane, without its weights: two dimensions in which the axes have their lengths and angle. Enough to draw it."""
        cosine, length = float(found["cosine"]), float(found["second_length"])
        first = torch.tensor([float(found["first_length"]), 0.0], dtype=torch.float64)
        second = torch.tensor([length * cosine, length * math.sqrt(1 - cosine**2)], dtype=torch.float64)
        names = (str(found["first_name"]), str(found["second_name"]))
        seed = int(found["seed"]) if "seed" in found else None
        shares = (float(found["first_share"]), float(found["second_share"])) if "first_share" in found else None
        return cls(torch.zeros(2, dtype=torch.float64), first, second, str(found["kind"]), names, seed, shares)


# Ways to choose them -------------------------------------------------------------------------------------------------


def random_line(objective: Objective, weights: Weights, *, seed: int = 0, vectors: Vectors = "zero") -> Line:
    """The line through some weights along a random filter-normalised direction; see `landscape.slices.directions.filter_normalised`."""
    origin = objective.flat(weights)
    direction = random_direction(origin, objective.model.layout, seed=seed, vectors=vectors)
    return Line(origin, direction, _random_kind(vectors), "a random direction", seed)


def random_plane(objective: Objective, weights: Weights, *, seed: int = 0, vectors: Vectors = "zero") -> Plane:
    """The plane through some weights along two random filter-normalised directions.

    Args:
        objective: whose network has the filters.
        weights: where the plane begins, at (0, 0).
        seed: of the directions.
        vectors: what biases and BatchNorm's parameters get, see `random_direction`.
    """
    origin = objective.flat(weights)
    first, second = (random_direction(origin, objective.model.layout, seed=seed, index=i, vectors=vectors) for i in (0, 1))  # fmt: skip
    return Plane(origin, first, second, _random_kind(vectors), ("random direction 1", "random direction 2"), seed)


def line_between(first: Float[Tensor, " d"], second: Float[Tensor, " d"]) -> Line:
    """The line from one weight vector, at t = 0, to another, at t = 1: two learners, two checkpoints, two runs."""
    return Line(first, second.to(first) - first, "between two weight vectors", "the line from the first to the second")


def plane_through(first: Float[Tensor, " d"], second: Float[Tensor, " d"], third: Float[Tensor, " d"]) -> Plane:
    """The plane of three weight vectors (Garipov et al., arXiv 1802.10026).

    Args:
        first: (d,), at (0, 0).
        second: (d,), at (1, 0).
        third: (d,), at (0, 1).
    """
    kind = "through three weight vectors"
    return Plane(first, second.to(first) - first, third.to(first) - first, kind, ("from first to second", "across, to the third"))  # fmt: skip


def trajectory_plane(trajectory: Float[Tensor, "T d"], origin: Float[Tensor, " d"] | None = None) -> Plane:
    """The plane of a trajectory's two principal axes.

    Deviations are taken from the origin, not from the trajectory's mean. Large shares alone say little: a random walk in many dimensions has
    8/(pi^2 (2 k - 1)^2) of its squared distance to its last point along axis k, 81% and 9% (ours, from the eigenvalues of Brownian motion's
    covariance; about its mean it is 61% and 15%, Antognini & Sohl-Dickstein 2018).

    Args:
        trajectory: (T, d).
        origin: (d,); the last point by default.
    """
    start = trajectory[-1] if origin is None else origin.to(trajectory)
    found = principal_axes(trajectory, start)
    about = "the last point" if origin is None else "a given point"
    return _principal(start, found.axes, found.shares, f"principal axes of a trajectory about {about}")


def disagreement_plane(learners: Learners) -> Plane:
    """The plane of the learners' disagreement: through w_a, along the two principal axes of the w_j - w_a; three learners at least."""
    found = principal_axes(learners.weights.to(learners.mean), learners.mean)
    return _principal(learners.mean, found.axes, found.shares, DISAGREEMENT)


def _principal(origin: Tensor, axes: Tensor, shares: np.ndarray, kind: str) -> Plane:
    names = ("principal axis 1", "principal axis 2")
    return Plane(origin, axes[0], axes[1], kind, names, shares=(float(shares[0]), float(shares[1])))


def _random_kind(vectors: Vectors) -> str:
    rest = "zero on" if vectors == "zero" else "tensor-normalised on"
    return f"random filter-normalised, {rest} biases and BatchNorm parameters"


# Geometry ------------------------------------------------------------------------------------------------------------


def _triangle(axes: Tensor) -> np.ndarray:
    """Lower triangular T with axes = T Q, Q orthonormal, float64."""
    gram = torch.zeros(len(axes), len(axes), dtype=torch.float64, device=axes.device)
    for start in range(0, axes.shape[1], CHUNK):
        part = axes[:, start : start + CHUNK].double()
        gram += part @ part.T
    if not torch.isfinite(gram).all() or not (gram.diagonal() > 0).all():
        raise ValueError("an axis is zero or not finite: a slice needs directions to go along")
    lengths = gram.diagonal().sqrt()
    if len(axes) == 2 and float(1 - (gram[0, 1] / lengths[0] / lengths[1]) ** 2) < PARALLEL:
        raise ValueError("the two axes are parallel: they span a line, not a plane")
    return np.asarray(torch.linalg.cholesky(gram).cpu().numpy())


def _project(origin: Tensor, axes: Tensor, weights: Tensor) -> Projection:
    triangle = _triangle(axes)
    along = np.zeros((len(weights), len(axes)))
    squared = np.zeros(len(weights))
    parts = [slice(start, start + CHUNK) for start in range(0, axes.shape[1], CHUNK)]

    def deviations(part: slice) -> tuple[Tensor, Tensor]:
        rows = axes[:, part].double()
        return weights[:, part].to(rows) - origin[part].to(rows), rows

    for part in parts:
        moved, rows = deviations(part)
        along += (moved @ rows.T).cpu().numpy()
        squared += moved.square().sum(1).cpu().numpy()
    coordinates = np.linalg.solve(triangle @ triangle.T, along.T).T
    left_out = np.zeros(len(weights))
    for (
        part
    ) in parts:  # what is left out is summed on its own: the difference of two large squares would be lost in rounding
        moved, rows = deviations(part)
        left_out += (moved - torch.from_numpy(coordinates).to(rows) @ rows).square().sum(1).cpu().numpy()
    return Projection(coordinates, coordinates @ triangle, np.sqrt(left_out), np.sqrt(squared))
