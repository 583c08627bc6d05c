"""The covariance of per-example gradients, and their uncentred second moment."""

from __future__ import annotations

from torch import Tensor

from landscape.curvature.products import ObjectiveOperator
from landscape.objective import Objective, Weights


class SecondMomentOperator(ObjectiveOperator):
    r"""The uncentred second moment of per-example gradients, the "empirical Fisher".

    $$S(w) = \frac{1}{N} \sum_i g_i g_i^T, \qquad \frac{1}{N} \sum_i g_i = g(w)$$

    g_i is the gradient of example i's contribution, times N/sum m for a mean-reduced loss and N for a sum-reduced one, so that the mean of
    the g_i is the objective's gradient whatever its weights. A product costs about 4/3 gradients with its graph kept; no
    gradient of a single example is formed.
    """

    kind = "second-moment"

    def _finish(self, total: Tensor, rows: Tensor) -> Tensor:
        return total.mul_(self.objective.num_examples / self.objective.norm**2)


class GradientCovarianceOperator(SecondMomentOperator):
    r"""The covariance C of the per-example gradient, centred at the exact g and divided by the count (theory.md sec. 1, 4).

    $$C(w) = \frac{1}{N} \sum_i (g_i - g)(g_i - g)^T = S(w) - g g^T$$

    The noise of a minibatch of B drawn with replacement has covariance C/B.

    >>> import torch
    >>> x = torch.tensor([[1.0], [-1.0]]).double()  # l = (w x - 1)^2 at w = 0: gradients -2 x, of mean 0 and variance 4
    >>> net = torch.nn.Linear(1, 1, bias=False).double()
    >>> C = GradientCovarianceOperator(Objective(net, torch.nn.MSELoss(), (x, torch.ones(2, 1))), torch.zeros(1).double())
    >>> C.to_dense().item()
    4.0
    """

    def __init__(self, objective: Objective, weights: Weights, *, memory_budget: int | None = None) -> None:
        """Args: as for `ObjectiveOperator`."""
        super().__init__(objective, weights, memory_budget=memory_budget)
        self.gradient = objective.gradient(self.weights)

    def _finish(self, total: Tensor, rows: Tensor) -> Tensor:
        along = (rows.double() @ self.gradient.double()).to(self.dtype)
        return super()._finish(total, rows) - along[:, None] * self.gradient


def gradient_covariance(
    objective: Objective, params: Weights, *, memory_budget: int | None = None
) -> GradientCovarianceOperator:
    """The covariance C of per-example gradients at weights. See `GradientCovarianceOperator`."""
    return GradientCovarianceOperator(objective, params, memory_budget=memory_budget)


def second_moment(objective: Objective, params: Weights, *, memory_budget: int | None = None) -> SecondMomentOperator:
    """The uncentred second moment of per-example gradients at weights. See `SecondMomentOperator`."""
    return SecondMomentOperator(objective, params, memory_budget=memory_budget)
