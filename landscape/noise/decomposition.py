"""Effective learning rate and the two parts of the noise (theory.md sec. 3; the paper's central quantities)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape.noise.draws import Draws, Points, draw_gradients
from landscape.objective import Objective
from landscape.statistics import Estimate, estimate

if TYPE_CHECKING:
    from landscape.checkpoints import Learners

PER_DRAW = {
    "alpha_e_ratio": ("effective over nominal learning rate, alpha_e/alpha", "1"),
    "Delta": ("strength |eta|^2 of the noise orthogonal to g", "weights^2"),
    "Delta_S": ("minibatch noise alpha^2 |xi_S|^2", "weights^2"),
    "Delta_2": ("landscape-dependent noise alpha^2 |xi_D|^2", "weights^2"),
    "cross": ("2 alpha^2 xi_S . xi_D", "weights^2"),
    "xi_squared": ("whole deviation alpha^2 |g_a - g|^2", "weights^2"),
}


def measure_noise(
    objective: Objective,
    learners: Learners,
    *,
    learning_rate: float,
    local_batch_size: int,
    num_draws: int = 32,
    points: Points | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Effective learning rate and noise decomposition at a checkpoint.

    Args:
        objective: L over the training data.
        learners: {w_j}, held fixed.
        learning_rate: alpha.
        local_batch_size: B.
        num_draws: K fresh minibatch assignments; errors are over these.
        points: where the run takes its gradients, if not at w_j: (n, d), or a function of the draw.
        seed: of the draws.

    Returns:
        over `draw`: alpha_e_ratio, Delta, Delta_S, Delta_2, cross, xi_squared (units of weights squared); the mean and
        standard error of each over draws as NAME_mean, NAME_stderr; alpha_e_ratio_exact = g . mean_j g(x_j)/|g|^2 (for fixed
        points); systematic_share = |E xi_D|^2 / E|xi_D|^2 with its error; |g|^2; and identity_error, the largest
        relative violation of the two identities of theory.md sec. 3 over the draws.

    Cost: 2 n K minibatch gradients and n + 1 full gradients.

    Source: Zhang et al., arXiv 2112.01433; the exact prediction and the systematic share are landscape's own.
    """
    weights = learners.weights.to(objective.device, objective.dtype)
    mean = learners.mean.to(weights)
    if not learners.is_finite:
        raise ValueError(f"the checkpoint of step {learners.step} holds weights that are not finite")
    chosen: Points = weights if points is None else points
    draws = draw_gradients(
        objective,
        mean,
        chosen,
        num_learners=len(weights),
        local_batch_size=local_batch_size,
        num_draws=num_draws,
        seed=seed,
    )
    exact = None if callable(chosen) else smoothed_by_points(objective, chosen.to(weights), mean)
    return decompose(draws, objective.gradient(mean), learning_rate, exact)


def smoothed_by_points(
    objective: Objective, points: Float[Tensor, "n d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, " d"]:
    """(1/n) sum_j g(x_j), the gradient smoothed by the learners' own deviations; one gradient if all are at w_a."""
    if torch.equal(points, mean.expand_as(points)):
        return objective.gradient(mean)
    return objective.stacked_gradients(points).mean(0)


def decompose(
    draws: Draws, gradient: Float[Tensor, " d"], learning_rate: float, smoothed: Float[Tensor, " d"] | None = None
) -> xr.Dataset:
    """The quantities of theory.md sec. 3 from draws, the exact gradient g and, where known, E g_a. See `measure_noise`."""
    g, g_a = gradient.double(), draws.at_points.double()
    squared = g @ g
    if not float(squared) > 0:
        raise ValueError("the full gradient vanishes at w_a, so the effective learning rate is not defined")
    alpha_e = learning_rate * (g_a @ g) / squared
    eta = alpha_e[:, None] * g - learning_rate * g_a
    xi_s = draws.at_mean.double() - g
    xi_d = g_a - draws.at_mean.double()
    a2 = learning_rate**2
    per_draw = {
        "alpha_e_ratio": alpha_e / learning_rate,
        "Delta": eta.square().sum(1),
        "Delta_S": a2 * xi_s.square().sum(1),
        "Delta_2": a2 * xi_d.square().sum(1),
        "cross": 2 * a2 * (xi_s * xi_d).sum(1),
        "xi_squared": a2 * (g_a - g).square().sum(1),
    }
    step = a2 * g_a.square().sum(1)
    broken = torch.stack([
        (step - alpha_e**2 * squared - per_draw["Delta"]).abs() / step,
        (per_draw["Delta_S"] + per_draw["Delta_2"] + per_draw["cross"] - per_draw["xi_squared"]).abs() / per_draw["xi_squared"].clamp_min(1e-300),
        (per_draw["Delta"] + (alpha_e - learning_rate) ** 2 * squared - per_draw["xi_squared"]).abs() / per_draw["xi_squared"].clamp_min(1e-300),
    ])  # fmt: skip
    result = xr.Dataset(attrs={
        "learning_rate": learning_rate, "num_learners": draws.num_learners, "local_batch_size": draws.local_batch_size,
        "num_draws": len(g_a), "draw_seed": draws.seed, "errors": "standard errors over draws of minibatches at fixed learners",
    })  # fmt: skip
    for name, values in per_draw.items():
        described = {"long_name": PER_DRAW[name][0], "units": PER_DRAW[name][1]}
        samples = values.cpu().numpy()
        _put(result, name, estimate(samples), described)
        result[name] = ("draw", samples, described)
    result["gradient_norm_squared"] = ((), float(squared), {"long_name": "|g|^2 at w_a"})
    result["identity_error"] = ((), float(broken.max()), {"long_name": "largest relative violation of the identities"})
    if smoothed is not None:
        drift = smoothed.double() - g
        result["alpha_e_ratio_exact"] = (
            (),
            float(smoothed.double() @ g / squared),
            {"long_name": "E alpha_e/alpha from the full gradients at the learners"},
        )
        _put(result, "systematic_share", _share(float(drift @ drift), xi_d.square().sum(1).cpu().numpy()),
             {"long_name": "|E xi_D|^2 / E|xi_D|^2", "units": "1"}, suffix="")  # fmt: skip
    return result


def _share(systematic: float, squares: np.ndarray) -> Estimate:
    whole = estimate(squares)
    if not whole.value > 0:
        return Estimate(float("nan"), float("nan"), whole.count)
    return Estimate(systematic / whole.value, systematic / whole.value**2 * whole.stderr, whole.count)


def _put(result: xr.Dataset, name: str, number: Estimate, attributes: dict[str, str], suffix: str = "_mean") -> None:
    result[f"{name}{suffix}"] = ((), number.value, attributes)
    result[f"{name}_stderr"] = ((), number.stderr, {"long_name": f"standard error of {name}"})
