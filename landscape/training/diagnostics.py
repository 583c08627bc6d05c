"""What a run can tell about its own noise while it goes on, at the cost of one more minibatch gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape.data.sampling import IndexSampler
from landscape.training.communicator import spread
from landscape.training.loop import Program
from landscape.training.state import LearnerState


class Diagnostics:
    """alpha_e of the steps that a run takes, and the noise scale at w_a, against a large batch of fresh examples.

    Every learner takes one more gradient, on B fresh examples at w_a; their mean over n B examples stands for g(w_a).
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        c = program.config
        self.sampler = IndexSampler(
            program.seeds, c.num_learners, c.local_batch_size, len(program.train), purpose="diagnostics",
            held=program.communicator.held,
        )  # fmt: skip

    def measure(self, state: LearnerState, step_gradient: Float[Tensor, " d"]) -> dict[str, Any]:
        """Numbers for a line of metrics.jsonl; see `diagnose`.

        Args:
            state: before the step.
            step_gradient: g_a, the average of the learners' gradients in that step.
        """
        program = self.program
        mean = spread(program.communicator.means(state.params), program.num_held)
        indices = self.sampler.indices(state.step).to(program.device)
        gradients = program.evaluate(mean.contiguous(), state, indices, masks="diagnostics dropout").gradients
        assert gradients is not None
        average = program.communicator.means(gradients)[0]
        own = torch.stack([gradients @ step_gradient, gradients @ average, gradients.square().sum(1)], dim=1).double()
        products = program.communicator.rows(own).cpu().numpy()
        along_step, along_mean, squares = products.T
        return diagnose(along_step, along_mean, squares, program.config.local_batch_size)


def diagnose(along_step: np.ndarray, along_mean: np.ndarray, squares: np.ndarray, batch_size: int) -> dict[str, Any]:
    """alpha_e/alpha of a step and the noise scale, from n independent minibatch gradients g_j at w_a.

    With G the unbiased estimate of |g|^2 from all pairs j != k, and A = mean_j g_a . g_j,

        alpha_e/alpha = A/G,    noise scale = Tr C/|g|^2 = B S^2/G,    S^2 = sum_j |g_j - mean|^2/(n - 1).

    Errors are the jackknife's over the n gradients: how well the large batch stands for g. g_a is the step's own and has none.

    Args:
        along_step: (n,) g_a . g_j.
        along_mean: (n,) mean_k g_k . g_j.
        squares: (n,) |g_j|^2.
        batch_size: B.

    Returns:
        "alpha_e_ratio", "noise_scale" (examples), "gradient_norm_squared", each with its "_stderr". Ratios are null where G does not
        lie two standard errors above zero: the large batch is too small to see the gradient. Empty for n < 3, which leaves no pairs for
        the errors. Ratios are biased by about the squared relative error of G.
    """
    n = len(squares)
    if n < 3:
        return {}
    total = n * along_mean.sum()  # |sum g|^2 = n sum_j mean . g_j

    def estimates(count: int, sum_squared: np.ndarray, sum_squares: np.ndarray, sum_along: np.ndarray) -> np.ndarray:
        pairs = (sum_squared - sum_squares) / (count * (count - 1))
        spread = (sum_squares - sum_squared / count) / (count - 1)
        return np.stack([sum_along / count / pairs, batch_size * spread / pairs, pairs])

    with np.errstate(divide="ignore", invalid="ignore"):
        whole = estimates(n, np.asarray(total), squares.sum(), along_step.sum())
        without = estimates(n - 1, total - 2 * n * along_mean + squares, squares.sum() - squares, along_step.sum() - along_step)  # fmt: skip
        errors = np.sqrt((n - 1) / n * np.square(without - without.mean(1, keepdims=True)).sum(1))
    found: dict[str, Any] = {}
    for i, name in enumerate(("alpha_e_ratio", "noise_scale", "gradient_norm_squared")):
        known = name == "gradient_norm_squared" or whole[2] > 2 * errors[2]
        found[name] = float(whole[i]) if known else math.nan
        found[f"{name}_stderr"] = float(errors[i]) if known else math.nan
    return found
