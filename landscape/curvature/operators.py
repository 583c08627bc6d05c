"""Symmetric linear operators, and what can be made of them: sums, multiples, shifts, restrictions, projections.

An operator multiplies flat tensors in named_parameters order, one vector (d,) or a block (d, k): `A @ v`. numpy arrays come back
as numpy arrays.

>>> import torch
>>> A = DenseOperator(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
>>> ((2 * A).shift(-1) @ torch.ones(3)).tolist()
[5.0, 3.0, 1.0]
>>> A.restrict(torch.eye(3)[:, :2]).to_dense().tolist()
[[3.0, 0.0], [0.0, 2.0]]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from landscape.objective.peers import ALONE, Peers
from landscape.provenance import code_version

Array = TypeVar("Array", Tensor, np.ndarray)

Backend = Literal["landscape", "pyhessian"]
"""Who answers: this package, or pyhessian (`landscape.curvature.pyhessian`), to check against."""


class SymmetricOperator(ABC):
    """A symmetric d x d operator.

    Attributes:
        dimension: d.
        device: where vectors live.
        dtype: their type.
        peers: the ranks that share a product, which all ask for the same ones; decisions that count products are theirs together.
    """

    dimension: int
    device: torch.device
    dtype: torch.dtype
    peers: Peers = ALONE

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return self.dimension, self.dimension

    @property
    def description(self) -> dict[str, Any]:
        """What this is, for the provenance of results."""
        return {"operator": type(self).__name__, "dimension": self.dimension}

    @property
    def provenance(self) -> dict[str, Any]:
        """The description, with versions, type and device: stamped on every result."""
        where = {"dtype": str(self.dtype), "device": str(self.device)}
        return {**self.description, **where, **code_version(), "torch": str(torch.__version__)}

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector, (d,) -> (d,)."""

    def matmat(self, block: Tensor) -> Tensor:
        """The product with several vectors, (d, k) -> (d, k)."""
        return torch.stack([self.matvec(column) for column in block.T.contiguous()], dim=1)

    def __matmul__(self, other: Array) -> Array:
        """The product with a vector (d,) or a block (d, k), torch or numpy."""
        given = torch.as_tensor(other)
        if given.ndim not in (1, 2) or given.shape[0] != self.dimension:
            raise ValueError(
                f"an operator of shape {self.shape} cannot multiply an array of shape {tuple(given.shape)}"
            )
        given = given.to(self.device, self.dtype)
        product = self.matvec(given) if given.ndim == 1 else self.matmat(given)
        return product if isinstance(other, Tensor) else product.cpu().numpy().astype(np.asarray(other).dtype)

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        return SumOperator([self, other])

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        return SumOperator([self, -1.0 * other])

    def __mul__(self, factor: float | int) -> SymmetricOperator:
        return AffineOperator(self, factor=float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> SymmetricOperator:
        return -1.0 * self

    def shift(self, amount: float | int) -> SymmetricOperator:
        """A + amount I."""
        return AffineOperator(self, amount=float(amount))

    def restrict(self, basis: Tensor) -> SymmetricOperator:
        """Q^T A Q on the span of orthonormal columns Q (d, k): an operator of dimension k."""
        return RestrictedOperator(self, basis)

    def project_out(self, basis: Tensor) -> SymmetricOperator:
        """P A P with P = I - Q Q^T for orthonormal columns Q (d, k)."""
        return ProjectedOperator(self, basis)

    def to_dense(self, *, columns: int = 64) -> Tensor:
        """The matrix (d, d), made of d products, `columns` at a time; for small d."""
        parts = []
        for start in range(0, self.dimension, columns):
            width = min(columns, self.dimension - start)
            block = torch.zeros(self.dimension, width, device=self.device, dtype=self.dtype)
            block[start : start + width].fill_diagonal_(1)
            parts.append(self.matmat(block))
        return torch.cat(parts, dim=1)

    def to_scipy(self) -> Any:
        """As a scipy.sparse.linalg.LinearOperator on float64 numpy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def multiply(block: np.ndarray) -> np.ndarray:
            return self @ np.ascontiguousarray(block, dtype=np.float64)

        return LinearOperator(
            self.shape,
            matvec=lambda v: multiply(v.ravel()),
            rmatvec=lambda v: multiply(v.ravel()),
            matmat=multiply,
            rmatmat=multiply,
            dtype=np.float64,
        )

    def _like(self, other: SymmetricOperator) -> None:
        self.dimension, self.device, self.dtype = other.dimension, other.device, other.dtype
        self.peers = other.peers


def most_peers(operators: Iterable[SymmetricOperator]) -> Peers:
    """The ranks that share the products of those operators whose products are shared."""
    return max((a.peers for a in operators), key=lambda peers: peers.size)


class DenseOperator(SymmetricOperator):
    """A symmetric matrix as an operator, for tests and small problems."""

    def __init__(self, matrix: Tensor) -> None:
        """Args: matrix (d, d), symmetric."""
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a matrix of shape {tuple(matrix.shape)} is not square")
        if not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-5 * float(matrix.abs().max())):
            raise ValueError("the matrix is not symmetric")
        self.matrix = matrix
        self.dimension, self.device, self.dtype = len(matrix), matrix.device, matrix.dtype

    def matvec(self, vector: Tensor) -> Tensor:
        """A v."""
        return self.matrix @ vector

    def matmat(self, block: Tensor) -> Tensor:
        """A V."""
        return self.matrix @ block


class SumOperator(SymmetricOperator):
    """sum_s c_s A_s of operators of one shape; all c_s = 1 by default."""

    def __init__(self, operators: Sequence[SymmetricOperator], coefficients: Sequence[float] | None = None) -> None:
        """Args: operators; coefficients c_s."""
        if not operators:
            raise ValueError("a sum of no operators has no shape")
        shapes = {a.shape for a in operators}
        if len(shapes) != 1:
            raise ValueError(f"operators of shapes {', '.join(map(str, sorted(shapes)))} cannot be added")
        self.operators = list(operators)
        self.coefficients = [1.0] * len(self.operators) if coefficients is None else list(coefficients)
        self._like(self.operators[0])
        self.peers = most_peers(self.operators)

    @property
    def description(self) -> dict[str, Any]:
        """The first summand's, and how many there are."""
        return {
            **self.operators[0].description,
            "operator": f"{type(self).__name__} of {len(self.operators)} {type(self.operators[0]).__name__}",
        }

    def matvec(self, vector: Tensor) -> Tensor:
        """sum_s c_s A_s v."""
        return self._summed(vector)

    def matmat(self, block: Tensor) -> Tensor:
        """sum_s c_s A_s V."""
        return self._summed(block)

    def _summed(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        for operator, coefficient in zip(self.operators, self.coefficients, strict=True):
            total.add_(operator @ vectors, alpha=coefficient)
        return total


class AveragedOperator(SumOperator):
    """(1/S) sum_s A_s, e.g. of Hessians at w + delta_s: the curvature of the smoothed loss, kinks left out (theory.md sec. 5)."""

    def __init__(self, operators: Sequence[SymmetricOperator]) -> None:
        """Args: operators of one shape."""
        super().__init__(operators, [1 / len(operators)] * len(operators) if operators else None)


class AffineOperator(SymmetricOperator):
    """factor A + amount I."""

    def __init__(self, operator: SymmetricOperator, *, factor: float = 1.0, amount: float = 0.0) -> None:
        """Args: operator A; factor; amount."""
        self.operator, self.factor, self.amount = operator, factor, amount
        self._like(operator)

    @property
    def description(self) -> dict[str, Any]:
        """The operator's, with factor and shift."""
        return {**self.operator.description, "factor": self.factor, "shift": self.amount}

    def matvec(self, vector: Tensor) -> Tensor:
        """factor A v + amount v."""
        return self.factor * self.operator.matvec(vector) + self.amount * vector

    def matmat(self, block: Tensor) -> Tensor:
        """factor A V + amount V."""
        return self.factor * self.operator.matmat(block) + self.amount * block


def _orthonormal(basis: Tensor, operator: SymmetricOperator) -> Tensor:
    basis = basis.to(operator.device, operator.dtype)
    if basis.ndim != 2 or basis.shape[0] != operator.dimension:
        raise ValueError(f"a basis of shape {tuple(basis.shape)} for an operator of dimension {operator.dimension}")
    gram = basis.T @ basis
    if not torch.allclose(gram, torch.eye(len(gram)).to(gram), atol=1e-4):
        raise ValueError("the basis is not orthonormal; take torch.linalg.qr(basis).Q")
    return basis


class RestrictedOperator(SymmetricOperator):
    """Q^T A Q on the span of orthonormal columns Q (d, k); dimension k."""

    def __init__(self, operator: SymmetricOperator, basis: Tensor) -> None:
        """Args: operator A; basis Q (d, k)."""
        self.operator, self.basis = operator, _orthonormal(basis, operator)
        self._like(operator)
        self.dimension = basis.shape[1]

    @property
    def description(self) -> dict[str, Any]:
        """The operator's, with the dimension of the subspace."""
        return {**self.operator.description, "restricted_to": self.dimension}

    def matvec(self, vector: Tensor) -> Tensor:
        """Q^T A Q v, v (k,)."""
        return self.basis.T @ self.operator.matvec(self.basis @ vector)

    def matmat(self, block: Tensor) -> Tensor:
        """Q^T A Q V."""
        return self.basis.T @ self.operator.matmat(self.basis @ block)


class ProjectedOperator(SymmetricOperator):
    """P A P with P = I - Q Q^T: A without the span of orthonormal columns Q (d, k); dimension d still."""

    def __init__(self, operator: SymmetricOperator, basis: Tensor) -> None:
        """Args: operator A; basis Q (d, k)."""
        self.operator, self.basis = operator, _orthonormal(basis, operator)
        self._like(operator)

    @property
    def description(self) -> dict[str, Any]:
        """The operator's, with the dimension taken out."""
        return {**self.operator.description, "projected_out": self.basis.shape[1]}

    def matvec(self, vector: Tensor) -> Tensor:
        """P A P v."""
        return self._project(self.operator.matvec(self._project(vector)))

    def matmat(self, block: Tensor) -> Tensor:
        """P A P V."""
        return self._project(self.operator.matmat(self._project(block)))

    def _project(self, vectors: Tensor) -> Tensor:
        return vectors - self.basis @ (self.basis.T @ vectors)
