"""How learners exchange weights and average gradients. A backend supplies one of these and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from landscape.functional import ParameterLayout

Take = Callable[[str, Tensor], None]
"""Receives gradients (l, *shape) of a parameter, by name, of some of the learners, while the backward pass goes on."""


@runtime_checkable
class Handle(Protocol):
    """An exchange under way."""

    def wait(self) -> Tensor:
        """The mixed tensor (L, d)."""


@runtime_checkable
class Rows(Protocol):
    """An exchange of whole rows under way."""

    def wait(self) -> dict[int, Tensor]:
        """Rows (d,) of the learners held here and of their neighbours, by replica * n + learner."""


@runtime_checkable
class Averaging(Protocol):
    """An average of gradients over learners, under way.

    Attributes:
        take: gives it gradients as the backward pass finds them; None where it wants all of them at once, at the end.
    """

    take: Take | None

    def wait(self, gradients: Tensor | None) -> Tensor:
        """The averages (L, d), possibly an expanded view; `gradients` (L, d) is what it was not given before."""


@runtime_checkable
class Communicator(Protocol):
    """Mixing and averaging over the learners of each replica.

    Tensors are (L, ...), the learners held here, replica-major. A mixing matrix is (n, n) on the CPU, or (R, n, n) where replicas differ;
    every process computes the same one.

    Attributes:
        num_learners: n.
        held: the learners of each replica that are held here.
        streams_gradients: whether averages take gradients while the backward pass goes on.
    """

    num_learners: int
    held: range
    streams_gradients: bool

    def start_mix(self, tensor: Tensor, mixing: Tensor) -> Handle:
        """Begin sum_k M_jk tensor_k. `tensor` must not change until the handle is waited for."""

    def start_gather(self, tensor: Tensor, mixing: Tensor) -> Rows:
        """Begin to fetch the rows k with M_jk not zero of every learner j held here. `tensor` must not change meanwhile."""

    def start_mean(self, layout: ParameterLayout, contributions: int) -> Averaging:
        """Begin (1/n) sum_k g_k, g_k the sum of so many gradients a learner; the average holds until the next one begins."""

    def means(self, tensor: Tensor) -> Tensor:
        """(1/n) sum_k tensor_k of each replica, (R, ...)."""

    def sums(self, tensor: Tensor) -> Tensor:
        """sum_k tensor_k of each replica, (R, ...); for small things."""

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensors of all learners, (R n, ...); for small things."""


class Done:
    """An exchange that was over when it began."""

    def __init__(self, result: Tensor) -> None:
        self.result = result

    def wait(self) -> Tensor:
        """The result."""
        return self.result


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> dict[int, Tensor]:
        return dict(enumerate(self.tensor))


class MeanAtOnce:
    """Averages gradients (L, d) when all are there."""

    take: Take | None = None

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def wait(self, gradients: Tensor | None) -> Tensor:
        """See `Averaging`."""
        assert gradients is not None
        return spread(self.communicator.means(gradients), len(self.communicator.held))


class StackedCommunicator:
    """All learners of all replicas on one device: mixing is one small contraction.

    A dense matrix costs 2 n^2 d operations, more than the gradients do for many learners and small batches; so one with
    few neighbours a learner is applied as a weighted sum over neighbours, 2 n k d.

    Args:
        num_learners: n.
        ordered: add in the learners' order, one by one: to the bit what any other number of processes makes in this mode.
    """

    streams_gradients = False

    def __init__(self, num_learners: int, *, ordered: bool = False) -> None:
        self.num_learners, self.held, self.ordered = num_learners, range(num_learners), ordered
        self._planned: Tensor | None = None
        self._matrix = torch.empty(0)
        self._plan: tuple[Tensor, Tensor] | None = None

    def start_mix(self, tensor: Tensor, mixing: Tensor) -> Handle:
        """See `Communicator`; done at once."""
        if self.ordered:
            mixed = []
            for r, rows in enumerate(tensor.unflatten(0, (-1, self.num_learners))):
                matrix = mixing if mixing.ndim == 2 else mixing[r]
                mixed += [weighted_sum(list(rows), weights) for weights in matrix.tolist()]
            return Done(torch.stack(mixed))
        plan = self._neighbours(mixing, tensor)
        if plan is not None:
            return Done(nn.functional.embedding_bag(plan[0], tensor, mode="sum", per_sample_weights=plan[1]))
        by_replica = tensor.unflatten(0, (-1, self.num_learners))
        return Done(torch.matmul(self._matrix, by_replica).flatten(0, 1))

    def start_gather(self, tensor: Tensor, mixing: Tensor) -> Rows:
        """See `Communicator`; all rows are here."""
        return _Held(tensor)

    def start_mean(self, layout: ParameterLayout, contributions: int) -> Averaging:
        """See `Communicator`."""
        return MeanAtOnce(self)

    def means(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        by_replica = tensor.unflatten(0, (-1, self.num_learners))
        if self.ordered:
            return torch.stack([ordered_mean(list(rows)) for rows in by_replica])
        return by_replica.mean(1)

    def sums(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        return tensor.unflatten(0, (-1, self.num_learners)).sum(1)

    def rows(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        return tensor

    def _neighbours(self, mixing: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        """Neighbours and their weights, (L, k) each, or None where a dense product is cheaper; kept while M stays."""
        if mixing is not self._planned:
            k = int((mixing != 0).sum(-1).max())
            self._planned, self._plan, self._matrix = mixing, None, mixing.to(tensor)
            if 4 * k <= self.num_learners:
                replicas = len(tensor) // self.num_learners
                stacked = self._matrix.expand(replicas, -1, -1)
                weights, neighbours = stacked.topk(k, dim=-1)
                offsets = torch.arange(replicas, device=tensor.device)[:, None, None] * self.num_learners
                self._plan = (neighbours + offsets).flatten(0, 1), weights.flatten(0, 1).contiguous()
        return self._plan


def spread(means: Tensor, num_held: int) -> Tensor:
    """Averages (R, d) given to each of the learners held, (R n_held, d), as a view where there is one replica."""
    return means[:, None].expand(-1, num_held, *means.shape[1:]).flatten(0, 1) if len(means) > 1 else means.expand(num_held, *means.shape[1:])  # fmt: skip


def weighted_sum(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k weights_k rows_k in the order given, terms of weight zero left out.

    >>> weighted_sum([torch.ones(2), torch.full((2,), 4.0)], [0.5, 0.25])
    tensor([1.5000, 1.5000])
    """
    terms = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight]
    total = terms[0][0] * terms[0][1]
    for row, weight in terms[1:]:
        total.add_(row, alpha=weight)
    return total


def ordered_mean(rows: Sequence[Tensor]) -> Tensor:
    """The mean of tensors, added in the order given."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total.div_(len(rows))
