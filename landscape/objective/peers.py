"""The processes that share an objective's passes over its data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from landscape.data.dataset import BatchList, Data
from landscape.ranks import AgreedError, Ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Peers(Ranks):
    """This process among those of a torch.distributed group, and what they tell each other; one process by default.

    Attributes:
        device: where small numbers lie that are summed, one that the group's backend knows.
        shared: whether all the data are on every rank, of which each passes over its share; otherwise each has a shard of them.
    """

    device: torch.device = CPU
    shared: bool = False

    @staticmethod
    def of(group: Any, device: torch.device, shared: bool) -> Peers:
        """The ranks of a group; one process for None."""
        if group is None:
            return Peers()
        return Peers(dist.get_rank(group), dist.get_world_size(group), group, device, shared)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place, the same to the bit on each of them."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def least(self, number: int) -> int:
        """The smallest over ranks, for what hangs on a rank's own memory but must be one number."""
        return min(self.collect(number))

    def joined(self, own: Tensor) -> Tensor:
        """The rows (b, ...) of all ranks in their order, on every rank; a rank may have none."""
        if self.size == 1:
            return own
        counts = self.collect(len(own))
        whole = own.new_zeros(sum(counts), *own.shape[1:])
        first = sum(counts[: self.rank])
        whole[first : first + len(own)] = own
        return self.sum(whole)

    def hand_round(self, tensor: Tensor, owner: int) -> Tensor:
        """The tensor of one rank, in place, on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=owner)
        return tensor

    @contextmanager
    def agree(self) -> Iterator[None]:
        """As `Ranks.agree`, at the cost of one number summed where all is well: for passes over a rank's own examples."""
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.size == 1:
                raise
            failure = error
        if self.size > 1 and self.sum(torch.tensor(float(failure is not None), device=self.device)):
            with super().agree():
                if failure is not None:
                    raise failure


ALONE = Peers()
"""One process."""


def own_part(data: Data, unit: int, peers: Peers) -> tuple[int, range]:
    """This rank's share of the data in consecutive batches of `unit` examples: the number of its first batch, and its examples.

    Of a list of batches it is that of the ready batches, and the second their numbers. Of a shard it is all.

    >>> from landscape.data.dataset import TensorData
    >>> data = TensorData(torch.zeros(10, 1), torch.zeros(10))
    >>> [own_part(data, 4, Peers(r, 2, shared=True)) for r in range(2)]
    [(0, range(0, 8)), (2, range(8, 10))]
    """
    count = _num_batches(data, unit)
    own = peers.share(count) if peers.shared else range(count)
    if isinstance(data, BatchList):
        return own.start, own
    return own.start, range(min(own.start * unit, len(data)), min(own.stop * unit, len(data)))


def counted(data: Data, unit: int, peers: Peers) -> tuple[int, int]:
    """Examples of all ranks, and how many batches of `unit` of them the shards of earlier ranks hold."""
    counts = peers.collect((len(data), _num_batches(data, unit)))
    sizes = [size for size, _ in counts]
    if not peers.shared:
        return sum(sizes), sum(number for _, number in counts[: peers.rank])
    if len(set(sizes)) > 1:
        raise AgreedError(f"the ranks hold {', '.join(map(str, sizes))} examples, but shared=True says that each holds all of them")  # fmt: skip
    return sizes[0], 0


def _num_batches(data: Data, unit: int) -> int:
    return len(data.batches) if isinstance(data, BatchList) else math.ceil(len(data) / unit)
