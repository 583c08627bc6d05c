"""The Hessian of an objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landscape.curvature.operators import SymmetricOperator
from landscape.data.dataset import stream
from landscape.objective import Objective, Weights


class HessianOperator(SymmetricOperator):
    r"""The Hessian H(w) of an objective over all its data.

    $$H(w) v = \nabla_w \left( \nabla L(w) \cdot v \right)$$

    The graph of the gradient is built once and kept, so a product costs one backward pass through it (about 1.2 gradients).
    With ReLU or max-pooling this is the Hessian between the kinks; `GradientDifferenceOperator` includes them.

    >>> import torch
    >>> from landscape.objective import Objective
    >>> x = torch.eye(2, dtype=torch.float64)
    >>> net = torch.nn.Linear(2, 1, bias=False).double()
    >>> H = HessianOperator(Objective(net, torch.nn.MSELoss(), (x, torch.zeros(2, 1, dtype=torch.float64))), dict(net.named_parameters()))
    >>> (H @ torch.eye(2, dtype=torch.float64)).tolist()  # mean over 2 examples of 2 x x^T
    [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, objective: Objective, weights: Weights, *, keep_graph: bool = True) -> None:
        """Args: objective; weights (d,) or by name; keep_graph: False rebuilds the graph for every product, for large data."""
        self.objective = objective
        self.weights = objective.flat(weights)
        self.dimension, self.device, self.dtype = objective.num_parameters, objective.device, objective.dtype
        self._graphs = [self._linearise(x, y) for x, y in self._chunks()] if keep_graph else None

    def matvec(self, vector: Tensor) -> Tensor:
        """H v; about 1.2 full gradients with the graph kept, 2.2 without."""
        graphs = self._graphs if self._graphs is not None else (self._linearise(x, y) for x, y in self._chunks())
        total, norm = torch.zeros_like(vector), torch.zeros((), dtype=torch.float64, device=self.device)
        for multiply, example_weights in graphs:
            total += multiply(vector)
            norm += example_weights
        return total / norm.to(total.dtype) if self.objective.model.loss.reduction == "mean" else total

    def _chunks(self) -> Any:
        return stream(self.objective.data, self.objective.chunk)

    def _linearise(self, inputs: Any, targets: Any) -> Any:
        return self.objective.model.linearised_gradient(self.weights, self.objective.buffers, inputs, targets)


def hessian(objective: Objective, params: Weights) -> HessianOperator:
    """The Hessian of an objective at weights, as a symmetric linear operator. See `HessianOperator`."""
    return HessianOperator(objective, params)
