"""Symmetric linear operators: curvature of an objective without its matrix.

An operator multiplies a flat tensor (d,) or (d, k) in named_parameters order: `H @ v`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape.data.dataset import stream
from landscape.objective import Objective, Weights


class SymmetricOperator(ABC):
    """A symmetric d x d operator.

    Attributes:
        dimension: d.
        device: where vectors live.
        dtype: their type.
    """

    dimension: int
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return self.dimension, self.dimension

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector, (d,) -> (d,)."""

    def __matmul__(self, other: Tensor) -> Tensor:
        """The product with a vector (d,) or a block (d, k)."""
        other = other.to(self.device, self.dtype)
        if other.shape[0] != self.dimension or other.ndim > 2:
            raise ValueError(
                f"an operator of shape {self.shape} cannot multiply a tensor of shape {tuple(other.shape)}"
            )
        if other.ndim == 1:
            return self.matvec(other)
        return torch.stack([self.matvec(column) for column in other.T], dim=1)

    def to_scipy(self) -> Any:
        """As a scipy.sparse.linalg.LinearOperator on float64 numpy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def multiply(vector: np.ndarray) -> np.ndarray:
            product = self @ torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64))
            return np.asarray(product.double().cpu().numpy())

        return LinearOperator(
            self.shape,
            matvec=lambda v: multiply(v.ravel()),
            matmat=multiply,
            rmatvec=lambda v: multiply(v.ravel()),
            dtype=np.float64,
        )


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


class GradientDifferenceOperator(SymmetricOperator):
    r"""The derivative of the smoothed gradient by central differences of exact gradients, kinks included.

    $$F v = \frac{1}{S} \sum_s \frac{g(w + \delta_s + e \hat v) - g(w + \delta_s - e \hat v)}{2 e} |v|, \qquad \hat v = v/|v|$$

    with the same deltas for both sides (theory.md sec. 5). A product costs 2 S full gradients.
    """

    def __init__(self, objective: Objective, points: Tensor, step: float) -> None:
        """Args: objective; points (S, d), the weights w + delta_s; step: e, a length in weight space."""
        self.objective, self.points, self.step = objective, points.to(objective.device, objective.dtype), step
        self.dimension, self.device, self.dtype = objective.num_parameters, objective.device, objective.dtype

    def matvec(self, vector: Tensor) -> Tensor:
        """F v."""
        return self.samples(vector).mean(0)

    def samples(self, vector: Tensor) -> Tensor:
        """The summands of F v, one a point, (S, d)."""
        length = vector.norm()
        move = vector / length * self.step
        gradients = self.objective.stacked_gradients(torch.cat([self.points + move, self.points - move]))
        forward, backward = gradients.chunk(2)
        return (forward - backward) * (length / (2 * self.step))


class AveragedOperator(SymmetricOperator):
    """(1/S) sum_s A_s of operators of one shape."""

    def __init__(self, operators: Sequence[SymmetricOperator]) -> None:
        self.operators = list(operators)
        first = self.operators[0]
        self.dimension, self.device, self.dtype = first.dimension, first.device, first.dtype

    def matvec(self, vector: Tensor) -> Tensor:
        """The mean of the products."""
        return torch.stack([a.matvec(vector) for a in self.operators]).mean(0)


class CoupledOperator(SymmetricOperator):
    r"""The linearised DPSGD step (AWC) on all learners at once, on the n d space (theory.md sec. 5).

    $$A = M \otimes I - \alpha \, \mathrm{blockdiag}(H(w_1), \ldots, H(w_n))$$

    Symmetric for symmetric M. With `disagreement` it is restricted to what is orthogonal to consensus, P A P with
    P = (I - 11^T/n) x I: there flat directions sit at the graph's mu_2 and not at exactly 1, where consensus has them.
    """

    def __init__(
        self, mixing: Tensor, hessians: Sequence[SymmetricOperator], learning_rate: float, *, disagreement: bool = False
    ) -> None:
        """Args: mixing M (n, n), symmetric; hessians H(w_j); learning_rate alpha; disagreement: restrict to P A P."""
        first = hessians[0]
        self.hessians, self.learning_rate, self.disagreement = list(hessians), learning_rate, disagreement
        self.device, self.dtype = first.device, first.dtype
        self.mixing = mixing.to(self.device, self.dtype)
        if not torch.allclose(self.mixing, self.mixing.T, atol=1e-6):
            raise ValueError("the coupled operator is symmetric only for a symmetric mixing matrix")
        self.dimension = len(self.hessians) * first.dimension

    def matvec(self, vector: Tensor) -> Tensor:
        """A v, v = (v_1 ... v_n) concatenated; n Hessian-vector products."""
        stacked = vector.view(len(self.hessians), -1)
        if self.disagreement:
            stacked = stacked - stacked.mean(0)
        curved = torch.stack([h.matvec(v) for h, v in zip(self.hessians, stacked, strict=True)])
        product = self.mixing @ stacked - self.learning_rate * curved
        if self.disagreement:
            product = product - product.mean(0)
        return product.flatten()


def hessian(objective: Objective, params: Weights) -> HessianOperator:
    """The Hessian of an objective at weights, as a symmetric linear operator. See `HessianOperator`."""
    return HessianOperator(objective, params)
