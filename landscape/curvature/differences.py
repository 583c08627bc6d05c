"""Curvature with its kinks: central differences of exact gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from landscape.curvature.operators import SymmetricOperator
from landscape.objective import Objective


class GradientDifferenceOperator(SymmetricOperator):
    r"""The derivative of the smoothed gradient by central differences of exact gradients, kinks included.

    $$F v = \frac{1}{S} \sum_s \frac{g(w + \delta_s + e \hat v) - g(w + \delta_s - e \hat v)}{2 e} |v|, \qquad \hat v = v/|v|$$

    with the same deltas for both sides (theory.md sec. 5). A product costs 2 S full gradients.
    """

    def __init__(self, objective: Objective, points: Tensor, step: float) -> None:
        """Args: objective; points (S, d), the weights w + delta_s; step: e, a length in weight space."""
        self.objective, self.points, self.step = objective, points.to(objective.device, objective.dtype), step
        self.dimension, self.device, self.dtype = objective.num_parameters, objective.device, objective.dtype
        self.peers = objective.peers

    def matvec(self, vector: Tensor) -> Tensor:
        """F v."""
        return self.samples(vector).mean(0)

    def samples(self, vector: Tensor) -> Tensor:
        """The summands of F v, one a point, (S, d)."""
        length = vector.norm()
        if length == 0:
            return torch.zeros_like(self.points)
        move = vector / length * self.step
        gradients = self.objective.stacked_gradients(torch.cat([self.points + move, self.points - move]))
        forward, backward = gradients.chunk(2)
        return (forward - backward) * (length / (2 * self.step))
