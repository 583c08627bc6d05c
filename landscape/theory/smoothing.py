"""The smoothed landscape L~(w) = E_delta L(w + delta): its gradient, its curvature and its bounds (theory.md sec. 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape import streams
from landscape.checkpoints import Learners
from landscape.curvature.differences import GradientDifferenceOperator
from landscape.curvature.hessian import HessianOperator
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.operators import AveragedOperator
from landscape.display import Displayed, Shown, number
from landscape.objective import Objective
from landscape.statistics import Estimate, estimate

Kernel = Literal["isotropic", "covariance", "learners"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
"""isotropic N(0, sigma_w^2 I), the paper's; covariance N(0, Sigma_w); learners, the n deviations themselves (exact)."""


def kernel_deviations(
    learners: Learners, kernel: Kernel, num_samples: int, seed: int = 0, *, sigma: float | int | None = None
) -> Float[Tensor, "S d"]:
    """Deviations delta of a kernel, float64 arithmetic in the weights' type.

    Args:
        learners: their deviations set the scale, sigma_w^2 = Tr(Sigma_w)/d.
        kernel: see KERNELS.
        num_samples: S, rounded up to even: antithetic pairs, +delta in the first half and -delta in the second. The learners'
            kernel is exact and has S = n.
        seed: of the samples.
        sigma: another spread for the isotropic kernel (SSGD*'s sigma_0).
    """
    deviations = learners.deviations
    if kernel == "learners":
        return deviations
    half = (num_samples + 1) // 2
    generator = streams.torch_generator(f"kernel {kernel}", seed)
    if kernel == "isotropic":
        normal = torch.randn(half, deviations.shape[1], generator=generator, dtype=torch.float32).to(deviations)
        drawn = normal * (math.sqrt(learners.weight_variance) if sigma is None else sigma)
    else:
        mixing = torch.randn(half, len(deviations), generator=generator, dtype=torch.float64).to(deviations)
        drawn = mixing @ deviations / math.sqrt(len(deviations))  # covariance (1/n) sum_j delta_j delta_j^T
    return torch.cat([drawn, -drawn])


@dataclass(frozen=True, repr=False)
class SmoothedCurvature(Displayed):
    """Top curvature of the smoothed landscape at w_a.

    Attributes:
        kernel: which.
        sigma_w: per-parameter spread of the kernel.
        num_samples: S, deviations used.
        lambda_max: largest positive eigenvalue of the derivative of the smoothed gradient, kinks included.
        lambda_max_stderr: standard error of its Rayleigh quotient over (antithetic pairs of) deviations; 0 for the exact kernel.
            With few deviations the maximum is biased upwards, which this does not cover.
        lambda_min: smallest eigenvalue found, likewise.
        residual: |F v - lambda v| of the top Ritz vector.
        lambda_autodiff: largest eigenvalue of the average of autodiff Hessians, which misses the kinks.
        difference_step: e of the central differences, a length in weight space.
        plateau_steps: other steps tried.
        plateau_values: the top Ritz vector's Rayleigh quotient at each: flat where the result does not hang on the step.
        largest_gradient: largest |g| met at the deviations.
        gradient_covariance_top: largest eigenvalue of Cov g(w + delta) over the deviations.
        num_gradients: full gradients spent, a Hessian product counted as one.
    """

    kernel: str
    sigma_w: float
    num_samples: int
    lambda_max: float
    lambda_max_stderr: float
    lambda_min: float
    residual: float
    lambda_autodiff: float
    difference_step: float
    plateau_steps: tuple[float, ...]
    plateau_values: tuple[float, ...]
    largest_gradient: float
    gradient_covariance_top: float
    num_gradients: int

    @property
    def smoothness(self) -> float:
        """Largest |eigenvalue|: what a smoothness bound bounds."""
        return max(self.lambda_max, -self.lambda_min)

    @property
    def kink_part(self) -> float:
        """Curvature that sits at the kinks: lambda_max less the autodiff average's."""
        return self.lambda_max - self.lambda_autodiff

    def shown(self) -> Shown:
        """Top curvature with its error, what autodiff sees of it, and how it hangs on the step of the differences."""
        inverse = "1/weights^2"
        return Shown(
            "SmoothedCurvature",
            [
                ("kernel", self.kernel, ""),
                ("sigma_w", self.sigma_w, "weights"),
                ("deviations", self.num_samples, ""),
                ("lambda_max", Estimate(self.lambda_max, self.lambda_max_stderr), inverse),
                ("lambda_min", self.lambda_min, inverse),
                ("autodiff average", self.lambda_autodiff, inverse),
                ("kink part", self.kink_part, inverse),
                ("gradients", self.num_gradients, ""),
            ],
            [f"along the top vector at other steps: {', '.join(f'{number(v, 4)} at {number(s, 2)}' for s, v in zip(self.plateau_steps, self.plateau_values, strict=True))}"],
        )  # fmt: skip

    def to_xarray(self) -> xr.Dataset:
        """All fields, the plateau over plateau_index."""
        made = xr.Dataset(
            {
                f.name: ((), getattr(self, f.name))
                for f in fields(self)
                if not f.name.startswith("plateau") and f.name != "kernel"
            }
        )
        made["smoothness"], made["kink_part"] = ((), self.smoothness), ((), self.kink_part)
        made["plateau_steps"] = ("plateau_index", np.asarray(self.plateau_steps))
        made["plateau_values"] = ("plateau_index", np.asarray(self.plateau_values))
        return made


def smoothed_curvature(
    objective: Objective,
    learners: Learners,
    *,
    kernel: Kernel = "learners",
    num_samples: int = 16,
    step: float | None = None,
    max_matvecs: int = 8,
    tol: float = 0.02,
    seed: int = 0,
    sigma: float | None = None,
) -> SmoothedCurvature:
    """The top curvature of L~ at w_a, as the derivative of the smoothed gradient (theory.md sec. 5).

    The autodiff average is taken first; its top eigenvector starts a Lanczos run on central differences of exact gradients over
    common deviations, so that both see the same landscape.

    Args:
        objective: L.
        learners: w_a and the deviations.
        kernel: see KERNELS.
        num_samples: S, but for the learners' kernel.
        step: e; by default a fiftieth of the typical deviation |delta| (1e-3 of |w_a| where there is none).
        max_matvecs: of each Lanczos run; one costs 2 S full gradients here.
        tol: relative residual to stop at.
        seed: of the deviations and the starting vector.
        sigma: another spread for the isotropic kernel (SSGD*'s sigma_0).
    """
    mean = learners.mean.to(objective.device, objective.dtype)
    deviations = kernel_deviations(learners, kernel, num_samples, seed, sigma=sigma).to(mean)
    distance = learners.consensus_distance if sigma is None else sigma * math.sqrt(objective.num_parameters)
    if distance == 0:
        deviations = deviations[:1]  # nothing is smoothed: one point says it all
    return _curvature_at(objective, mean, mean + deviations, kernel, distance, step, max_matvecs, tol, seed)


def _curvature_at(
    objective: Objective,
    mean: Tensor,
    points: Tensor,
    kernel: str,
    distance: float,
    step: float | None,
    max_matvecs: int,
    tol: float,
    seed: int,
) -> SmoothedCurvature:
    count = len(points)
    step = step or (0.02 * distance if distance > 0 else 1e-3 * max(1.0, float(mean.norm())))
    autodiff = top_eigenpairs(
        AveragedOperator([HessianOperator(objective, p) for p in points]),
        1,
        "LA",
        tol=tol,
        max_matvecs=max_matvecs,
        seed=seed,
        miss_probability=1.0,
    )
    differences = GradientDifferenceOperator(objective, points, step)
    pairs = top_eigenpairs(
        differences,
        which="BE",
        tol=tol,
        max_matvecs=max_matvecs,
        start=autodiff.vectors[:, 0],
        seed=seed,
        miss_probability=1.0,
    )
    top = pairs.vectors[:, 0]

    def quotients(e: float) -> np.ndarray:
        rows = GradientDifferenceOperator(objective, points, e).samples(top)
        return (rows.double() @ top.double()).cpu().numpy()

    here = quotients(step)
    antithetic = kernel != "learners" and count > 1
    error = estimate(here.reshape(2, -1).mean(0)).stderr if antithetic else 0.0
    steps = (step / 3, step, step * 3)
    values = (float(quotients(steps[0]).mean()), float(here.mean()), float(quotients(steps[2]).mean()))
    gradients = objective.stacked_gradients(points).double()
    centred = gradients - gradients.mean(0)
    gram = centred @ centred.T / max(1, count - (kernel != "learners"))
    used = count * (autodiff.num_matvecs + 2 * pairs.num_matvecs + 2 * 3 + 1)
    return SmoothedCurvature(
        kernel=kernel,
        sigma_w=distance / math.sqrt(objective.num_parameters),
        num_samples=count,
        lambda_max=float(pairs.values[0]),
        lambda_max_stderr=error,
        lambda_min=float(pairs.values[-1]),
        residual=float(pairs.residuals[0]),
        lambda_autodiff=float(autodiff.values[0]),
        difference_step=step,
        plateau_steps=steps,
        plateau_values=values,
        largest_gradient=float(gradients.norm(dim=1).max()),
        gradient_covariance_top=float(torch.linalg.eigvalsh(gram)[-1]) if count > 1 else 0.0,
        num_gradients=used,
    )


def smoothness_bounds(largest_gradient: float, sigma: float, largest_curvature: float) -> dict[str, float]:
    """Bounds on the smoothness of L~ under the isotropic kernel, from a Lipschitz constant G.

    With a measured G (the largest gradient norm met) and a measured l_s these are estimates, not bounds.

    Args:
        largest_gradient: G.
        sigma: of the kernel; 0 gives infinite bounds but for the last.
        largest_curvature: l_s, the smoothness of L itself.

    Returns:
        paper: 2 G/sigma (Zhang et al. 2021); duchi: G/sigma (Duchi, Bartlett & Wainwright 2012); sharp: sqrt(2/pi) G/sigma; and
        smooth: l_s erf(G/(sqrt(2) l_s sigma)), sharp where L itself is l_s-smooth.

    >>> {k: round(v, 3) for k, v in smoothness_bounds(1.0, 0.5, 1.0).items()}
    {'paper': 4.0, 'duchi': 2.0, 'sharp': 1.596, 'smooth': 0.954}
    """
    if sigma == 0:
        return {"paper": math.inf, "duchi": math.inf, "sharp": math.inf, "smooth": largest_curvature}
    ratio = largest_gradient / sigma
    smooth = largest_curvature * math.erf(ratio / (math.sqrt(2) * largest_curvature)) if largest_curvature > 0 else 0.0
    return {"paper": 2 * ratio, "duchi": ratio, "sharp": math.sqrt(2 / math.pi) * ratio, "smooth": smooth}
