"""How much smoothing it would take: the length at which the top curvature of L~ falls to the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr
from torch import Tensor

from landscape.checkpoints import Learners
from landscape.curvature.differences import GradientDifferenceOperator
from landscape.curvature.lanczos import top_eigenpairs
from landscape.display import Displayed, Shown, sparkline
from landscape.objective import Objective
from landscape.statistics import Estimate, estimate
from landscape.theory.smoothing import Kernel, kernel_deviations

Status = Literal["found", "already below", "not reached", "no deviations"]
STEP_SHARE = 0.02
"""Step of the finite differences, as a share of the typical deviation (see `landscape.theory.smoothing`)."""


@dataclass(frozen=True, repr=False)
class SmoothingLength(Displayed):
    """Where lambda_max of L~ crosses a target as the deviations are scaled up, the same deviations at every scale.

    Attributes:
        kernel: which.
        target: the curvature asked for, e.g. 2/alpha.
        status: "found"; "already below" at the smallest scale; "not reached" at the largest; "no deviations".
        scale: multiple of the kernel's own deviations at the first crossing from above; nan if not found.
        scale_stderr: its standard error, from the error of lambda_max over antithetic pairs and the slope there; 0 for the learners' kernel, nan if not found.
        sigma: the per-parameter spread at that scale.
        scales: scales tried, rising.
        lambda_max: top curvature at each.
        lambda_max_stderr: its standard error over antithetic pairs.
        num_gradients: full gradients spent.
    """

    kernel: str
    target: float
    status: Status
    scale: float
    scale_stderr: float
    sigma: float
    scales: tuple[float, ...]
    lambda_max: tuple[float, ...]
    lambda_max_stderr: tuple[float, ...]
    num_gradients: int

    def shown(self) -> Shown:
        """The crossing, and the curve that was walked."""
        return Shown(
            "SmoothingLength",
            [
                ("kernel", self.kernel, ""),
                ("target", self.target, "1/weights^2"),
                ("status", self.status, ""),
                ("scale", Estimate(self.scale, self.scale_stderr), "of the kernel's own"),
                ("sigma", self.sigma, "weights"),
                ("gradients", self.num_gradients, ""),
            ],
            picture=sparkline(self.lambda_max, f"lambda_max at scales {', '.join(f'{s:.3g}' for s in self.scales)}", logarithmic=True),
        )  # fmt: skip

    def to_xarray(self) -> xr.Dataset:
        """The curve over `scale_index` and the crossing."""
        made = xr.Dataset(
            {
                name: ((), getattr(self, name))
                for name in ("target", "status", "scale", "scale_stderr", "sigma", "num_gradients")
            }
        )
        for name in ("scales", "lambda_max", "lambda_max_stderr"):
            made[f"curve_{name}"] = ("scale_index", np.asarray(getattr(self, name)))
        return made


def smoothing_length(
    objective: Objective,
    learners: Learners,
    target: float | int,
    *,
    kernel: Kernel = "isotropic",
    num_samples: int = 8,
    largest_scale: float | int = 64.0,
    smallest_scale: float | int = 0.25,
    num_bisections: int = 4,
    max_matvecs: int = 6,
    tol: float = 0.02,
    seed: int = 0,
    sigma: float | int | None = None,
) -> SmoothingLength:
    """The smallest scale of a kernel's deviations at which the top curvature of L~ has fallen to a target.

    A geometric grid of factor 4 is walked upwards while the curvature is above the target; the bracket of the first crossing is
    halved in the logarithm. Curvature need not fall with smoothing (on real networks it may rise), so the whole curve is reported.

    Args:
        objective: L.
        learners: w_a and the deviations.
        target: e.g. 2/alpha, where a plain step becomes stable.
        kernel: see `landscape.theory.smoothing.KERNELS`.
        num_samples: S, but for the learners' kernel.
        largest_scale: where to give up.
        smallest_scale: where to begin.
        num_bisections: halvings of the bracket; the scale is interpolated in the last.
        max_matvecs: of each eigenvalue problem; one costs 2 S gradients.
        tol: relative residual to stop at.
        seed: of deviations and starting vectors.
        sigma: another spread for the isotropic kernel.

    Cost: about 8 problems of 2 S max_matvecs gradients.
    """
    mean = learners.mean.to(objective.device, objective.dtype)
    deviations = kernel_deviations(learners, kernel, num_samples, seed, sigma=sigma).to(mean)
    distance = float(deviations.double().square().sum(1).mean().sqrt())
    spread = distance / math.sqrt(objective.num_parameters)
    if distance == 0:
        return SmoothingLength(kernel, float(target), "no deviations", math.nan, math.nan, math.nan, (), (), (), 0)
    found: dict[float, tuple[float, float]] = {}
    top_vector: Tensor | None = None
    spent = 0

    def curvature(scale: float) -> float:
        nonlocal top_vector, spent
        points = mean + scale * deviations
        differences = GradientDifferenceOperator(objective, points, STEP_SHARE * scale * distance)
        pairs = top_eigenpairs(
            differences, which="LA", tol=tol, max_matvecs=max_matvecs, start=top_vector, seed=seed, miss_probability=1.0
        )
        top_vector = pairs.vectors[:, 0]
        error = 0.0
        if kernel != "learners":
            quotients = (differences.samples(top_vector).double() @ top_vector.double()).cpu().numpy()
            error = estimate(quotients.reshape(2, -1).mean(0)).stderr
        spent += 2 * len(points) * (pairs.num_matvecs + (kernel != "learners"))
        found[scale] = float(pairs.values[0]), error
        return found[scale][0]

    status, scale, slope_error = _first_crossing(curvature, found, float(target), float(smallest_scale), float(largest_scale), num_bisections)  # fmt: skip
    scales = sorted(found)
    return SmoothingLength(
        kernel=kernel, target=float(target), status=status, scale=scale, scale_stderr=slope_error, sigma=scale * spread,
        scales=tuple(scales), lambda_max=tuple(found[s][0] for s in scales), lambda_max_stderr=tuple(found[s][1] for s in scales),
        num_gradients=spent,
    )  # fmt: skip


def _first_crossing(
    curvature: Callable[[float], float], found: dict[float, tuple[float, float]], target: float, smallest: float, largest: float,
    num_bisections: int,
) -> tuple[Status, float, float]:  # fmt: skip
    low = smallest
    if curvature(smallest) <= target:
        return "already below", math.nan, math.nan
    while low < largest:
        high = min(4 * low, largest)
        if curvature(high) <= target:
            break
        low = high
    else:
        return "not reached", math.nan, math.nan
    for _ in range(num_bisections):
        middle = math.sqrt(low * high)
        if curvature(middle) > target:
            low = middle
        else:
            high = middle
    (above, above_error), (below, below_error) = found[low], found[high]
    slope = (below - above) / math.log(high / low)
    scale = low * math.exp((target - above) / slope)
    return "found", scale, scale * max(above_error, below_error) / abs(slope)
