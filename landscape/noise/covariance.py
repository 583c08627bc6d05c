"""The covariance C of per-example gradients, along given directions and in total (theory.md sec. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape.objective import Objective, Weights


@dataclass(frozen=True)
class CovarianceSummary:
    """C over the whole data set, centred at the exact g and divided by the count: no sampling error.

    Attributes:
        trace: Tr C.
        along: (k,) u_i^T C u_i for the directions asked for.
        gradient_norm_squared: |g|^2.
        num_examples: N.
    """

    trace: float
    along: np.ndarray
    gradient_norm_squared: float
    num_examples: int

    @property
    def noise_scale(self) -> float:
        """B_simple = Tr C/|g|^2 (McCandlish et al. 2018), exact here."""
        return self.trace / self.gradient_norm_squared


def gradient_covariance_summary(
    objective: Objective, weights: Weights, directions: Float[Tensor, "d k"] | None = None, *, chunk: int = 256
) -> CovarianceSummary:
    """Trace of C and its quadratic form along directions, streamed over per-example gradients.

    Args:
        objective: a mean-reduced loss with unit example weights.
        weights: w.
        directions: (d, k), orthonormal columns.
        chunk: examples whose gradients are held at once; memory chunk x d.

    Cost: one pass of per-example gradients, N d memory traffic.
    """
    columns = torch.empty(objective.num_parameters, 0) if directions is None else directions
    columns = columns.to(objective.device, objective.dtype)
    total = torch.zeros(objective.num_parameters, dtype=torch.float64, device=objective.device)
    squares, count = 0.0, 0
    projected_sum = torch.zeros(columns.shape[1], dtype=torch.float64, device=objective.device)
    projected_squares = torch.zeros_like(projected_sum)
    for gradients, example_weights in objective.example_gradients(weights, chunk=chunk):
        if not torch.all(example_weights == 1):
            raise ValueError(
                "the gradient covariance needs a loss with unit example weights (no class weights, no ignored targets)"
            )
        total += gradients.sum(0, dtype=torch.float64)
        squares += float(torch.linalg.vector_norm(gradients, dim=1).double().square().sum())
        projection = (gradients @ columns).double()
        projected_sum += projection.sum(0)
        projected_squares += projection.square().sum(0)
        count += len(gradients)
    mean = total / count
    norm = float(mean @ mean)
    along = projected_squares / count - (projected_sum / count) ** 2
    return CovarianceSummary(squares / count - norm, along.cpu().numpy(), norm, count)
