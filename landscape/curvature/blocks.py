"""Diagonal blocks of a curvature matrix, a layer or a parameter each, and diagonal preconditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from landscape.curvature.hessian import hessian
from landscape.curvature.operators import SymmetricOperator, most_peers
from landscape.functional import ParameterLayout
from landscape.objective import Objective, Weights


def diagonal_blocks(
    objective: Objective,
    params: Weights,
    by: Literal["parameter", "layer"] | int = "layer",
    make: Callable[[Objective, Weights], SymmetricOperator] = hessian,
) -> dict[str, SymmetricOperator]:
    """The diagonal blocks of an operator, by name; each differentiates its own parameters alone.

    Args:
        objective: L.
        params: w.
        by: "parameter", "layer" (the module that owns the parameters), or how many parts of their names a block shares.
        make: `hessian`, `ggn`, `fisher`, `gradient_covariance` or `second_moment`.
    """
    values = objective.model.layout.split(objective.flat(params))
    blocks = {}
    for name, members in objective.blocks(by).items():
        part = objective.subset(members, values)
        blocks[name] = make(part, values)
    return blocks


class BlockDiagonalOperator(SymmetricOperator):
    """The direct sum of diagonal blocks, in the coordinates of the whole."""

    def __init__(self, layout: ParameterLayout, blocks: Mapping[str, SymmetricOperator], members: Mapping[str, list[str]]) -> None:  # fmt: skip
        """Args: layout of the whole; blocks by name; members: the parameters of each block."""
        starts = dict(zip(layout.names, torch.tensor([0, *layout.sizes]).cumsum(0).tolist(), strict=False))
        sizes = dict(zip(layout.names, layout.sizes, strict=True))
        first = next(iter(blocks.values()))
        self.dimension, self.device, self.dtype = layout.num_parameters, first.device, first.dtype
        self.blocks = dict(blocks)
        self.peers = most_peers(self.blocks.values())
        self._places = {
            name: torch.cat([torch.arange(starts[m], starts[m] + sizes[m]) for m in layout.names if m in members[name]]).to(self.device)
            for name in blocks
        }  # fmt: skip

    @staticmethod
    def of(
        objective: Objective,
        params: Weights,
        by: Literal["parameter", "layer"] | int = "layer",
        make: Callable[[Objective, Weights], SymmetricOperator] = hessian,
    ) -> BlockDiagonalOperator:
        """The block diagonal of an operator; arguments as for `diagonal_blocks`."""
        blocks = diagonal_blocks(objective, params, by, make)
        return BlockDiagonalOperator(objective.model.layout, blocks, objective.blocks(by))

    def matvec(self, vector: Tensor) -> Tensor:
        """Each block's product with its part of v (d,)."""
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        """Each block's product with its rows of V (d, k)."""
        product = torch.zeros_like(block)
        for name, operator in self.blocks.items():
            product[self._places[name]] = operator.matmat(block[self._places[name]])
        return product


class PreconditionedOperator(SymmetricOperator):
    r"""$D^{-1/2} A D^{-1/2}$ for a positive diagonal D: the curvature that a diagonally preconditioned step meets.

    For Adam, D = sqrt(v_hat) + epsilon (`adam_diagonal`): the step is stable while alpha lambda_max < 2 (1 + beta1)/(1 - beta1) (Cohen et
    al. 2022, "adaptive gradient methods at the edge of stability").

    >>> from landscape.curvature.operators import DenseOperator
    >>> A = PreconditionedOperator(DenseOperator(torch.diag(torch.tensor([4.0, 9.0]))), torch.tensor([4.0, 9.0]))
    >>> A.to_dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, operator: SymmetricOperator, diagonal: Tensor) -> None:
        """Args: operator A; diagonal of D (d,), positive."""
        if diagonal.shape != (operator.dimension,):
            raise ValueError(f"a diagonal of shape {tuple(diagonal.shape)} for an operator of dimension {operator.dimension}")  # fmt: skip
        if not bool((diagonal > 0).all()):
            raise ValueError("the diagonal of a preconditioner must be positive; add Adam's epsilon")
        self.operator = operator
        self._like(operator)
        self.scale = diagonal.to(operator.device, torch.float64).rsqrt().to(operator.dtype)

    @property
    def description(self) -> dict[str, Any]:
        """The operator's."""
        return {**self.operator.description, "preconditioned": "diagonal"}

    def matvec(self, vector: Tensor) -> Tensor:
        """D^-1/2 A D^-1/2 v."""
        return self.scale * self.operator.matvec(self.scale * vector)

    def matmat(self, block: Tensor) -> Tensor:
        """D^-1/2 A D^-1/2 V."""
        return self.scale[:, None] * self.operator.matmat(self.scale[:, None] * block)


def adam_diagonal(second_moments: Tensor, step: int, *, beta2: float = 0.999, epsilon: float = 1e-8) -> Tensor:
    """sqrt(v/(1 - beta2^step)) + epsilon of Adam's exp_avg_sq v, flat in named_parameters order (Kingma & Ba 2015)."""
    return (second_moments / (1 - beta2**step)).sqrt() + epsilon
