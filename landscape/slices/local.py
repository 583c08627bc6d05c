"""What derivatives say in a line or plane: the gradient's part in it, and the quadratic model about its origin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape.display import Displayed, Shown, span
from landscape.functional import chunks
from landscape.objective import Objective
from landscape.slices.evaluate import BatchNormSlices, SmoothingKernel, settle_batch_norm
from landscape.slices.lines import rising
from landscape.slices.moments import over_pairs
from landscape.slices.planes import Line, Plane

Product = Callable[[Tensor], Tensor]
"""v (d,) -> H v (d,); a `landscape.curvature` operator's matvec, for instance."""


@dataclass(frozen=True, repr=False)
class QuadraticModel(Displayed):
    """L(origin) + slope . p + p^T curvature p/2 at coordinates p along the axes of a line or plane.

    Attributes:
        loss: at the origin, nats.
        slope: (k,) g . axis, nats per axis.
        curvature: (k, k) axis^T H axis, nats per axis squared.
        lengths_slope: (k,) the same along the orthonormal axes, nats per weight.
        lengths_curvature: (k, k) likewise; its eigenvalues are the curvature met in the plane.
        asymmetry: largest |H_ij - H_ji| over the largest |H_ij|, of the two products: how well they were computed.
    """

    loss: float
    slope: np.ndarray
    curvature: np.ndarray
    lengths_slope: np.ndarray
    lengths_curvature: np.ndarray
    asymmetry: float

    def shown(self) -> Shown:
        """Height, slope along the orthonormal axes, and the curvature met."""
        met = self.lengths_curvature
        known = bool(np.isfinite(met).all())
        return Shown(
            "QuadraticModel",
            [
                ("loss", self.loss, "nats"),
                ("slope", self.lengths_slope, "nats/weights"),
                ("curvature met", np.linalg.eigvalsh(met)[::-1] if known else np.nan, "nats/weights^2"),
                ("asymmetry", self.asymmetry, ""),
            ],
        )

    def at(self, coordinates: np.ndarray) -> np.ndarray:
        """The model at coordinates (..., k) along the axes as given.

        >>> model = QuadraticModel(1.0, np.array([1.0]), np.array([[4.0]]), np.array([1.0]), np.array([[4.0]]), 0.0)
        >>> model.at(np.array([[0.0], [2.0]])).tolist()
        [1.0, 11.0]
        """
        p = np.asarray(coordinates, dtype=np.float64)
        return np.asarray(self.loss + p @ self.slope + ((p @ self.curvature) * p).sum(-1) / 2)

    def to_xarray(self) -> xr.Dataset:
        """Over `axis` and `other_axis`."""
        both = ("axis", "other_axis")
        return xr.Dataset(
            {
                "loss": ((), self.loss, {"long_name": "loss at the origin", "units": "nats"}),
                "slope": ("axis", self.slope, {"long_name": "g . axis", "units": "nats/axis"}),
                "curvature": (both, self.curvature, {"long_name": "axis^T H axis", "units": "nats/axis^2"}),
                "lengths_slope": ("axis", self.lengths_slope, {"long_name": "g along the orthonormal axes", "units": "nats/weights"}),
                "lengths_curvature": (both, self.lengths_curvature, {"long_name": "H along the orthonormal axes", "units": "nats/weights^2"}),
            },
            attrs={"asymmetry": self.asymmetry},
        )  # fmt: skip

    @classmethod
    def from_xarray(cls, found: xr.Dataset) -> QuadraticModel:
        """What `to_xarray` made."""
        return cls(
            float(found["loss"]), found["slope"].values, found["curvature"].values, found["lengths_slope"].values,
            found["lengths_curvature"].values, float(found.attrs["asymmetry"]),
        )  # fmt: skip


def quadratic_model(
    objective: Objective,
    where: Line | Plane,
    *,
    hvp: Product | None = None,
    batch_norm: BatchNormSlices | None = None,
) -> QuadraticModel:
    """The quadratic model of the loss about the origin of a line or plane.

    With ReLU or max-pooling this is the curvature between the kinks, which the loss's own bend may exceed far (theory.md sec. 5).

    Args:
        objective: L.
        where: its origin and axes.
        hvp: v -> H(origin) v; the objective's own by default. It must hold the same BatchNorm statistics as batch_norm says.
        batch_norm: as for the slice; "recalibrated" is refused, for derivatives here are at fixed statistics.

    Cost: a value, a gradient, and one Hessian product an axis.
    """
    settled = _differentiable(objective, where.origin, batch_norm)
    origin = settled.flat(where.origin)
    axes = where.axes.to(origin)
    images = _own_products(settled, origin, axes) if hvp is None else torch.stack([hvp(axis).to(axes) for axis in axes])
    slope = _inner(settled.gradient(origin)[None], axes)[0]
    raw = _inner(axes, images)
    curvature = (raw + raw.T) / 2
    largest = float(np.abs(raw).max())
    gram = _inner(axes, axes)
    back = np.linalg.inv(np.linalg.cholesky(gram))
    return QuadraticModel(
        settled.value(origin), slope, curvature, back @ slope, back @ curvature @ back.T,
        float(np.abs(raw - raw.T).max()) / largest if largest > 0 else 0.0,
    )  # fmt: skip


@dataclass(frozen=True, repr=False)
class GradientField(Displayed):
    """The gradient's part in a plane, at a grid of its points.

    Attributes:
        plane: where.
        first: (p,) coordinates along the plane's first axis.
        second: (q,) along the second.
        slope: (p, q, 2) g . axis along the axes as given: the slopes of the surface in its coordinates; nats per axis.
        lengths_slope: (p, q, 2) g along the orthonormal axes; nats per weight.
        slope_stderr: (p, q, 2) standard error of slope over pairs of deviations; 0 without a kernel or for an exact one.
        norm: (p, q) |g|, all of it; |lengths_slope|/norm is the share that the plane shows. Of a kernel that is sampled it is too large by the
            sample's noise.
        kernel: that the loss is smoothed by; "none".
    """

    plane: Plane
    first: np.ndarray
    second: np.ndarray
    slope: np.ndarray
    lengths_slope: np.ndarray
    slope_stderr: np.ndarray
    norm: np.ndarray
    kernel: str

    def shown(self) -> Shown:
        """Where, how steep, and how much of it the plane shows."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.linalg.norm(self.lengths_slope, axis=-1) / self.norm
        return Shown(
            "GradientField",
            [
                ("axes", ", ".join(self.plane.names), ""),
                ("grid", " × ".join(map(str, self.norm.shape)), ""),
                ("|g|", span(self.norm), "nats/weights"),
                ("share in the plane", span(share), ""),
                ("kernel", self.kernel, ""),
            ],
        )

    def to_xarray(self) -> xr.Dataset:
        """Over `first`, `second` and `axis`."""
        dims = ("first", "second", "axis")
        return xr.Dataset(
            {
                "slope": (dims, self.slope, {"long_name": "g . axis", "units": "nats/axis"}),
                "lengths_slope": (dims, self.lengths_slope, {"long_name": "g along the orthonormal axes", "units": "nats/weights"}),
                "slope_stderr": (dims, self.slope_stderr, {"long_name": "standard error of slope over pairs of deviations", "units": "nats/axis"}),
                "norm": (dims[:2], self.norm, {"long_name": "|g|", "units": "nats/weights"}),
            },
            coords={"first": self.first, "second": self.second},
            attrs={"kernel": self.kernel, **{f"plane_{k}": v for k, v in self.plane.attributes.items()}},
        )  # fmt: skip


def gradient_field(
    objective: Objective,
    plane: Plane,
    first: np.ndarray,
    second: np.ndarray,
    *,
    kernel: SmoothingKernel | None = None,
    batch_norm: BatchNormSlices | None = None,
) -> GradientField:
    """The gradient of the loss, or of the smoothed loss, projected on a plane, at a grid of its points.

    Args:
        objective: L.
        plane: where.
        first: (p,) coordinates along the first axis, rising.
        second: (q,) along the second.
        kernel: smooth the loss with it.
        batch_norm: as for the slice; "recalibrated" is refused.

    Cost: p q full gradients, times the kernel's deviations.
    """
    first, second = rising(first, "first"), rising(second, "second")
    settled = _differentiable(objective, plane.origin, batch_norm)
    axes = plane.axes.to(settled.device, settled.dtype)
    origin = settled.flat(plane.origin)
    deviations = torch.zeros(1, len(origin)).to(axes) if kernel is None else kernel.deviations.to(axes)
    coordinates = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1)
    flat = torch.from_numpy(coordinates.reshape(-1, 2)).to(axes)
    size = max(1, min(8, settled.memory_budget // (4 * len(origin) * axes.dtype.itemsize)))
    slopes, errors, norms = np.zeros((len(flat), 2)), np.zeros((len(flat), 2)), np.zeros(len(flat))
    for i, step in enumerate(flat):
        total = torch.zeros_like(origin, dtype=torch.float64)
        each = np.zeros((len(deviations), 2))
        for part in chunks(len(deviations), size):
            gradients = settled.stacked_gradients(origin + step @ axes + deviations[part])
            total += gradients.sum(0, dtype=torch.float64)
            each[part] = _inner(gradients, axes)
        slopes[i], norms[i] = each.mean(0), float(total.norm()) / len(deviations)
        errors[i] = 0.0 if kernel is None else over_pairs(each.T, kernel)[0]
    slope = slopes.reshape(*coordinates.shape)
    lengths = slope @ np.linalg.inv(plane.triangle).T
    return GradientField(plane, first, second, slope, lengths, errors.reshape(slope.shape), norms.reshape(coordinates.shape[:2]),
                         "none" if kernel is None else kernel.name)  # fmt: skip


def _differentiable(objective: Objective, origin: Tensor, policy: BatchNormSlices | None) -> Objective:
    settled, settled_policy = settle_batch_norm(objective, origin, policy)
    if settled_policy == "recalibrated":
        raise ValueError(
            "with batch_norm='recalibrated' the statistics move with the weights, and the gradient at fixed statistics is not that of the surface; "
            "use 'frozen', 'running' or 'ghost'"
        )
    return settled


def _own_products(objective: Objective, weights: Float[Tensor, " d"], rows: Float[Tensor, "k d"]) -> Tensor:
    """H(w) times some rows, summed over the data."""
    total = torch.zeros_like(rows)
    with objective.peers.agree():
        for index, inputs, targets in objective.batches():
            total += objective.linearise(weights, index, inputs, targets, "hessian")(rows)
    return objective.sum_over_ranks(total) / objective.norm


def _inner(rows: Tensor, others: Tensor) -> np.ndarray:
    return np.asarray((rows.double() @ others.double().T).cpu().numpy())
