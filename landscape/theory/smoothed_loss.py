"""Loss and gradient of the smoothed landscape L~(w_a) = E_delta L(w_a + delta), and what they say of the rate (theory.md sec. 3, 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape.checkpoints import Learners
from landscape.curvature.third import curved_gradient
from landscape.display import Displayed, Shown
from landscape.noise.rows import Rows
from landscape.objective import Objective
from landscape.statistics import Estimate, estimate
from landscape.theory.smoothing import Kernel, kernel_deviations


@dataclass(frozen=True, repr=False)
class SmoothedLoss(Displayed):
    """L~ and its gradient at w_a under a kernel; errors over antithetic pairs of deviations, 0 for the learners' own kernel, which is exact.

    Attributes:
        kernel: which.
        num_samples: S.
        loss_change: L~(w_a) - L(w_a), the average-direction sharpness (Zhu et al., arXiv 2306.02913, at frozen deviations).
        rate_ratio: g . grad L~(w_a)/|g|^2, the E alpha_e/alpha that the kernel predicts.
        gradient_ratio: |grad L~|^2/|g|^2, without the bias of a sampled mean.
    """

    kernel: str
    num_samples: int
    loss_change: Estimate
    rate_ratio: Estimate
    gradient_ratio: Estimate

    def shown(self) -> Shown:
        """What smoothing does to loss and gradient, with errors."""
        return Shown(
            "SmoothedLoss",
            [
                ("kernel", self.kernel, ""),
                ("deviations", self.num_samples, ""),
                ("L~ - L", self.loss_change, "loss"),
                ("g . grad L~/|g|^2", self.rate_ratio, ""),
                ("|grad L~|^2/|g|^2", self.gradient_ratio, ""),
            ],
        )


def smoothed_loss(
    objective: Objective,
    learners: Learners,
    gradient: Float[Tensor, " d"],
    kernel: Kernel,
    *,
    num_samples: int = 32,
    seed: int = 0,
    sigma: float | int | None = None,
    memory_budget: int | None = None,
) -> SmoothedLoss:
    """Loss and gradient smoothed by a kernel, at common random deviations in antithetic pairs.

    Args:
        objective: L.
        learners: w_a and the deviations.
        gradient: g(w_a).
        kernel: see `landscape.theory.smoothing.KERNELS`.
        num_samples: S, but for the learners' kernel.
        seed: of the deviations.
        sigma: another spread for the isotropic kernel (SSGD*'s sigma_0).
        memory_budget: bytes for the pairs' gradients; beyond it they lie in a scratch file.

    Cost: S gradients and S + 1 values over all data.
    """
    deviations = kernel_deviations(learners, kernel, num_samples, seed, sigma=sigma).to(
        objective.device, objective.dtype
    )
    mean, g = learners.mean.to(deviations), gradient.double()
    exact = kernel == "learners"
    here = objective.value(mean)
    count = len(deviations) if exact else len(deviations) // 2
    pairs = Rows((0 if exact else count, len(mean)), mean, memory_budget)
    changes, along = np.zeros(count), np.zeros(count)
    total = torch.zeros_like(g)
    for i in range(count):
        moves = deviations[i : i + 1] if exact else torch.stack([deviations[i], -deviations[i]])
        changes[i] = float(objective.stacked_values(mean + moves).mean()) - here
        paired = objective.stacked_gradients(mean + moves).double().mean(0)
        along[i] = float(paired @ g / (g @ g))
        if not exact:
            pairs.put(i, paired[None].to(mean))
        total += paired
    squared = float(g @ g)
    if exact:
        size = float(total @ total) / count**2 / squared
        return SmoothedLoss(kernel, count, Estimate(float(changes.mean()), 0.0, count), Estimate(float(along.mean()), 0.0, count), Estimate(size, 0.0, count))  # fmt: skip
    return SmoothedLoss(kernel, 2 * count, estimate(changes), estimate(along), _squared_mean(pairs, total, squared))


def _squared_mean(rows: Rows, total: Tensor, unit: float) -> Estimate:
    """|E p|^2 of independent rows p without bias, by all pairs of different rows, and its jackknife error; in multiples of `unit`."""
    count = len(rows)
    if count < 2:
        return Estimate(math.nan, math.nan, count)
    norms, along = np.zeros(count), np.zeros(count)
    for i in range(count):
        pair = rows.get(slice(i, i + 1))[0].double()
        norms[i], along[i] = float(pair @ pair), float(pair @ total)
    pairs = float(total @ total) - norms.sum()
    value = pairs / (count * (count - 1)) / unit
    if count < 3:
        return Estimate(value, math.nan, count)
    others = (pairs - 2 * (along - norms)) / ((count - 1) * (count - 2)) / unit
    return Estimate(value, math.sqrt((count - 1) / count * float(((others - others.mean()) ** 2).sum())), count)


def second_order_rate_ratio(
    objective: Objective, learners: Learners, gradient: Float[Tensor, " d"], *, step: float | int = 0.25
) -> float:
    """E alpha_e/alpha to second order in the deviations, by finite differences of g: 1 + g . (1/2) grad Tr(H Sigma_w)/|g|^2.

    (1/2) grad Tr(H Sigma_w) is taken as (1/n) sum_j [g(w_a + t delta_j) + g(w_a - t delta_j) - 2 g]/(2 t^2): exact as t -> 0 for a
    smooth network, and with ReLU the finite-scale value at the named step.

    Args:
        objective: L.
        learners: their deviations.
        gradient: g(w_a).
        step: t, as a share of the deviations.
    """
    mean = learners.mean.to(objective.device, objective.dtype)
    g = gradient.double()
    drift = torch.zeros_like(g)
    for deviation in learners.deviations:
        move = step * deviation.to(mean)
        drift += objective.stacked_gradients(torch.stack([mean + move, mean - move])).double().mean(0) - g
    return float(1 + drift @ g / (len(learners) * step**2 * (g @ g)))


def second_order_rate_ratio_autodiff(objective: Objective, learners: Learners, gradient: Float[Tensor, " d"]) -> float:
    """The same by automatic differentiation, which leaves out what sits at the kinks (theory.md sec. 3). Cost: about 6 n gradients."""
    drift = curved_gradient(objective, learners.mean, learners.deviations).double() / 2
    g = gradient.double()
    return float(1 + drift @ g / (g @ g))
