"""How learners exchange weights. A backend supplies one of these and nothing else."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> Tensor:
        """The mixed tensor (L, d)."""


@runtime_checkable
class Communicator(Protocol):
    """Mixing and averaging over the learners of each replica.

    Tensors are (L, d), the learners held here. A mixing matrix is (n, n), or (R, n, n) where replicas differ.
    """

    num_learners: int

    def start_mix(self, tensor: Tensor, mixing: Tensor) -> Handle:
        """Begin sum_k M_jk tensor_k. `tensor` must not change until the handle is waited for."""

    def mean(self, tensor: Tensor) -> Tensor:
        """(1/n) sum_k tensor_k, given to every learner: (L, d), possibly an expanded view."""


class _Done:
    def __init__(self, result: Tensor) -> None:
        self.result = result

    def wait(self) -> Tensor:
        return self.result


class StackedCommunicator:
    """All learners of all replicas on one device: mixing is one small contraction.

    A dense matrix costs 2 n^2 d operations, more than the gradients do for many learners and small batches; so one with
    few neighbours a learner is applied as a weighted sum over neighbours, 2 n k d.
    """

    def __init__(self, num_learners: int) -> None:
        self.num_learners = num_learners
        self._planned: Tensor | None = None
        self._plan: tuple[Tensor, Tensor] | None = None

    def start_mix(self, tensor: Tensor, mixing: Tensor) -> Handle:
        """See `Communicator`; done at once."""
        plan = self._neighbours(mixing, len(tensor))
        if plan is not None:
            return _Done(nn.functional.embedding_bag(plan[0], tensor, mode="sum", per_sample_weights=plan[1]))
        by_replica = tensor.unflatten(0, (-1, self.num_learners))
        return _Done(torch.matmul(mixing, by_replica).flatten(0, 1))

    def mean(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        by_replica = tensor.unflatten(0, (-1, self.num_learners))
        return by_replica.mean(1, keepdim=True).expand_as(by_replica).flatten(0, 1)

    def _neighbours(self, mixing: Tensor, num_held: int) -> tuple[Tensor, Tensor] | None:
        """Neighbours and their weights, (L, k) each, or None where a dense product is cheaper; kept while M stays."""
        if mixing is not self._planned:
            k = int((mixing != 0).sum(-1).max())
            self._planned, self._plan = mixing, None
            if 4 * k <= self.num_learners:
                replicas = num_held // self.num_learners
                stacked = mixing.expand(replicas, -1, -1)
                weights, neighbours = stacked.topk(k, dim=-1)
                offsets = torch.arange(replicas, device=mixing.device)[:, None, None] * self.num_learners
                self._plan = (neighbours + offsets).flatten(0, 1), weights.flatten(0, 1).contiguous()
        return self._plan
