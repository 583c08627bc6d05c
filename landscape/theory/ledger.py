"""The one-step ledger: what a step gains and pays, predicted and realised (theory.md sec. 7)."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape.curvature.operators import SymmetricOperator
from landscape.noise.draws import Draws
from landscape.objective import Objective
from landscape.statistics import estimate


def one_step_ledger(
    objective: Objective,
    mean: Float[Tensor, " d"],
    gradient: Float[Tensor, " d"],
    draws: Draws,
    hessian: SymmetricOperator,
    learning_rate: float,
) -> xr.Dataset:
    """Realised L(w_a - alpha g_a) - L(w_a) over draws, against -alpha_e |g|^2 + (1/2) alpha^2 g_a^T H g_a.

    The plain step without momentum or weight decay is taken, whatever the run does.

    Args:
        objective: L over the training data.
        mean: w_a.
        gradient: g(w_a).
        draws: K minibatch gradients g_a.
        hessian: H(w_a).
        learning_rate: alpha.

    Returns:
        over `draw`, with means and standard errors over draws: realised; gain = -alpha_e |g|^2; along, across and mixed, the
        curvature cost split as (1/2) alpha_e^2 g^T H g + (1/2) eta^T H eta - alpha_e g^T H eta; predicted, their sum; and
        remainder = realised - predicted, its error over the paired draws.

    Cost: K + 1 Hessian products and K values.
    """
    g = gradient.double()
    squared, h_g = g @ g, (hessian @ gradient).double()
    here = objective.value(mean)
    found = []
    for at_points, _ in draws:
        g_a = at_points.double()
        alpha_e = learning_rate * (g_a @ g) / squared
        eta = alpha_e * g - learning_rate * g_a
        found.append(
            {
                "realised": objective.value(mean - learning_rate * at_points) - here,
                "gain": float(-alpha_e * squared),
                "along": float(alpha_e**2 * (g @ h_g) / 2),
                "across": float(eta @ (hessian @ eta.to(gradient)).double() / 2),
                "mixed": float(-alpha_e * (eta @ h_g)),
            }
        )
    terms = {name: np.array([f[name] for f in found]) for name in found[0]}
    terms["predicted"] = terms["gain"] + terms["along"] + terms["across"] + terms["mixed"]
    terms["remainder"] = terms["realised"] - terms["predicted"]
    result = xr.Dataset(
        attrs={
            "num_draws": len(draws),
            "learning_rate": learning_rate,
            "errors": "standard errors over draws at fixed learners",
        }
    )
    for name, samples in terms.items():
        number = estimate(samples)
        result[name] = ("draw", samples, {"units": "nats"})
        result[f"{name}_mean"], result[f"{name}_stderr"] = ((), number.value), ((), number.stderr)
    return result
