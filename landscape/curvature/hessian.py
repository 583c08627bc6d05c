"""The Hessian of an objective."""

from __future__ import annotations

from torch import Tensor

from landscape.curvature.products import ObjectiveOperator
from landscape.objective import Objective, Weights


class HessianOperator(ObjectiveOperator):
    r"""The Hessian H(w) of an objective over all its data.

    $$H(w) v = \nabla_w \left( \nabla L(w) \cdot v \right)$$

    A product costs one backward pass through the kept graph of the gradient, 1 to 2 full gradients, and one gradient more for
    batches whose graph is not kept (Pearlmutter 1994; the graph once and for all is ours). With ReLU or max-pooling this is the Hessian
    between the kinks; `GradientDifferenceOperator` includes them.

    >>> import torch
    >>> x = torch.eye(2, dtype=torch.float64)
    >>> net = torch.nn.Linear(2, 1, bias=False).double()
    >>> H = HessianOperator(Objective(net, torch.nn.MSELoss(), (x, torch.zeros(2, 1))), dict(net.named_parameters()))
    >>> (H @ torch.eye(2, dtype=torch.float64)).tolist()  # mean over 2 examples of 2 x x^T
    [[1.0, 0.0], [0.0, 1.0]]
    """

    kind = "hessian"

    def _finish(self, total: Tensor, rows: Tensor) -> Tensor:
        return total.div_(self.objective.norm)


def hessian(objective: Objective, params: Weights, *, memory_budget: int | None = None) -> HessianOperator:
    """The Hessian of an objective at weights, as a symmetric linear operator. See `HessianOperator`."""
    return HessianOperator(objective, params, memory_budget=memory_budget)
