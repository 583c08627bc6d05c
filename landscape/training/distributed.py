"""The torch.distributed backend: every process holds some of the learners of one run.

Weights of learner k go straight from its row of the state to the processes that hold a neighbour, and arrive in a buffer that is kept from
step to step; both are cut into buckets, so that mixing the first overlaps with the transfer of the next. Gradients of SSGD are summed over
the learners held here as the backward pass finds them, and each full bucket is all-reduced while it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from landscape.functional import ParameterLayout, chunks
from landscape.ranks import Ranks
from landscape.training.communicator import (
    Averaging,
    Handle,
    MeanAtOnce,
    Rows,
    Take,
    ordered_mean,
    spread,
)

BUCKET_BYTES = 8 << 20
"""Bytes that travel as one message: large enough for the bandwidth, small enough to overlap."""


@dataclass(frozen=True)
class _Plan:
    """Who sends what where under one mixing matrix; learners by number.

    Attributes:
        sends: (learner, rank) pairs, in the order of their messages.
        receives: (learner, rank) pairs.
        row_of: row of each foreign learner in the receive buffer.
        weights: M_jk of the learners held here.
        uniform: c and the excess of the diagonal where M = excess I + c 1 1^T, else None.
    """

    sends: list[tuple[int, int]]
    receives: list[tuple[int, int]]
    row_of: dict[int, int]
    weights: list[list[float]]
    uniform: tuple[float, list[float]] | None


class DistributedCommunicator:
    """Learners spread over the processes of the default group, consecutive and as evenly as may be.

    Args:
        ranks: the processes.
        num_learners: n, at least as many as there are processes.
        ordered: add in the learners' order, one by one: to the bit what any other number of processes makes in this mode. Gradients are
            then gathered, n d numbers to every process, and not reduced.
        bucket_bytes: see BUCKET_BYTES.
    """

    def __init__(
        self, ranks: Ranks, num_learners: int, *, ordered: bool = False, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        if num_learners < ranks.size:
            raise ValueError(
                f"{ranks.size} processes for {num_learners} learners: every process must hold at least one; start at most {num_learners}"
            )
        self.ranks, self.num_learners, self.ordered, self.bucket_bytes = ranks, num_learners, ordered, bucket_bytes
        self.held = ranks.share(num_learners)
        self.streams_gradients = not ordered
        self._home = [rank for rank, share in enumerate(ranks.shares(num_learners)) for _ in share]
        self._planned: Tensor | None = None
        self._plan = _Plan([], [], {}, [], None)
        self._received = torch.empty(0)
        self._sums = torch.empty(0)

    def start_mix(self, tensor: Tensor, mixing: Tensor) -> Handle:
        """See `Communicator`. Under a uniform M of many learners one all-reduce; else neighbours only."""
        plan = self._planned_for(mixing)
        if plan.uniform is not None and not self.ordered:
            total = tensor.sum(0)
            return _UniformMix(tensor, total, dist.all_reduce(total, async_op=True), plan.uniform)
        return _Mix(self, tensor, self._exchange(tensor, plan), plan)

    def start_gather(self, tensor: Tensor, mixing: Tensor) -> Rows:
        """See `Communicator`."""
        plan = self._planned_for(mixing)
        return _Gather(self, tensor, self._exchange(tensor, plan), plan)

    def start_mean(self, layout: ParameterLayout, contributions: int) -> Averaging:
        """See `Communicator`: bucketed all-reduce during the backward pass, or all at once in the ordered mode. The next one overwrites it."""
        return _BucketedMean(self, layout, contributions) if self.streams_gradients else MeanAtOnce(self)

    def means(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        if self.ordered:
            return ordered_mean(list(self.rows(tensor)))[None]
        return self.sums(tensor).div_(self.num_learners)

    def sums(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        total = tensor.sum(0, keepdim=True)
        dist.all_reduce(total)
        return total

    def rows(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        most = max(len(share) for share in self.ranks.shares(self.num_learners))
        padded = torch.cat([tensor, tensor[:1].expand(most - len(tensor), *tensor.shape[1:])]).contiguous()
        found = [torch.empty_like(padded) for _ in range(self.ranks.size)]
        dist.all_gather(found, padded)
        return torch.cat([part[: len(share)] for part, share in zip(found, self.ranks.shares(self.num_learners), strict=True)])  # fmt: skip

    def row(self, tensor: Tensor, plan: _Plan, learner: int) -> Tensor:
        """The weights of a learner, held here or received."""
        return tensor[learner - self.held.start] if learner in self.held else self._received[plan.row_of[learner]]

    def buckets(self, tensor: Tensor) -> list[slice]:
        """Parts of a weight vector that travel as one message each."""
        return list(chunks(tensor.shape[-1], self.bucket_bytes // tensor.element_size()))

    def space_for_sums(self, like: Tensor, count: int) -> Tensor:
        """Where gradients are summed, (count,)."""
        self._sums = _space(self._sums, like, count)
        return self._sums

    def _exchange(self, tensor: Tensor, plan: _Plan) -> list[list[dist.Work]]:
        """Start all messages, and say for each bucket which must be waited for."""
        if plan.receives:
            self._received = _space(self._received, tensor, len(plan.receives), tensor.shape[1])
        works: list[list[dist.Work]] = []
        for tag, part in enumerate(self.buckets(tensor)):
            messages = [
                dist.P2POp(dist.isend, tensor[k - self.held.start, part], rank, tag=tag * self.num_learners + k)
                for k, rank in plan.sends
            ]
            messages += [
                dist.P2POp(dist.irecv, self._received[plan.row_of[k], part], rank, tag=tag * self.num_learners + k)
                for k, rank in plan.receives
            ]
            works.append(dist.batch_isend_irecv(messages) if messages else [])
        return works

    def _planned_for(self, mixing: Tensor) -> _Plan:
        if mixing is not self._planned:
            self._planned, self._plan = mixing, self._make_plan(mixing.reshape(self.num_learners, self.num_learners))
        return self._plan

    def _make_plan(self, mixing: Tensor) -> _Plan:
        linked = mixing != 0
        mine = linked[self.held.start : self.held.stop].any(0).tolist()
        receives = [(k, home) for k, home in enumerate(self._home) if mine[k] and home != self.ranks.rank]
        sends = []
        for rank, share in enumerate(self.ranks.shares(self.num_learners)):
            wanted = linked[share.start : share.stop].any(0).tolist()
            sends += [(k, rank) for k in self.held if wanted[k] and rank != self.ranks.rank]
        weights = mixing[self.held.start : self.held.stop].tolist()
        return _Plan(sends, receives, {k: i for i, (k, _) in enumerate(receives)}, weights, self._uniform(mixing))

    def _uniform(self, mixing: Tensor) -> tuple[float, list[float]] | None:
        """c and M_jj - c of the learners held, where M has the same c beside its diagonal and an all-reduce moves less than the rows do."""
        others = ~torch.eye(self.num_learners, dtype=torch.bool)
        beside = mixing[others]
        foreign = self.num_learners - len(
            self.ranks.shares(self.num_learners)[0]
        )  # alike on all ranks: so must the decision be
        if foreign <= 2 or not bool((beside == beside[0]).all()) or not bool(beside[0]):
            return None
        c = float(beside[0])
        return c, (mixing.diagonal()[self.held.start : self.held.stop] - c).tolist()


def _space(kept: Tensor, like: Tensor, *shape: int) -> Tensor:
    """The tensor kept from the step before where it fits: to touch fresh memory costs as much as what is done with it."""
    fits = kept.shape == shape and kept.dtype == like.dtype and kept.device == like.device
    return kept if fits else like.new_empty(shape)


class _Mix:
    """Rows under way, to be mixed bucket by bucket as they come."""

    def __init__(self, communicator: DistributedCommunicator, tensor: Tensor, works: list[list[dist.Work]], plan: _Plan) -> None:  # fmt: skip
        self.communicator, self.tensor, self.works, self.plan = communicator, tensor, works, plan

    def wait(self) -> Tensor:
        mixed = torch.empty_like(self.tensor)
        rows: dict[int, Tensor] = {}
        for learner in range(self.communicator.num_learners):
            if learner in self.communicator.held or learner in self.plan.row_of:
                rows[learner] = self.communicator.row(self.tensor, self.plan, learner)
        for part, works in zip(self.communicator.buckets(self.tensor), self.works, strict=True):
            for work in works:
                work.wait()
            for mine, weights in zip(mixed, self.plan.weights, strict=True):
                terms = [(rows[k][part], weight) for k, weight in enumerate(weights) if weight]
                torch.mul(terms[0][0], terms[0][1], out=mine[part])
                for row, weight in terms[1:]:
                    mine[part].add_(row, alpha=weight)
        return mixed


class _UniformMix:
    """sum_k w_k under way; then (M_jj - c) w_j + c sum_k w_k."""

    def __init__(self, tensor: Tensor, total: Tensor, work: dist.Work, uniform: tuple[float, list[float]]) -> None:
        self.tensor, self.total, self.work, self.uniform = tensor, total, work, uniform

    def wait(self) -> Tensor:
        self.work.wait()
        c, excess = self.uniform
        shared = self.total.mul_(c)
        if not any(excess):
            return shared.expand(len(self.tensor), -1).clone()
        return torch.stack([torch.add(shared, row, alpha=e) for row, e in zip(self.tensor, excess, strict=True)])


class _Gather:
    def __init__(self, communicator: DistributedCommunicator, tensor: Tensor, works: list[list[dist.Work]], plan: _Plan) -> None:  # fmt: skip
        self.communicator, self.tensor, self.works, self.plan = communicator, tensor, works, plan

    def wait(self) -> dict[int, Tensor]:
        for work in [w for bucket in self.works for w in bucket]:
            work.wait()
        return {
            k: self.communicator.row(self.tensor, self.plan, k)
            for k in range(self.communicator.num_learners)
            if k in self.communicator.held or k in self.plan.row_of
        }


class _BucketedMean:
    """Sums gradients over the learners held here as they come, and all-reduces every bucket that is full, last parameters first."""

    take: Take | None

    def __init__(self, communicator: DistributedCommunicator, layout: ParameterLayout, contributions: int) -> None:
        self.communicator, self.layout = communicator, layout
        self.count = contributions * len(communicator.held)
        self.divisor = communicator.num_learners
        ends = torch.tensor(layout.sizes).cumsum(0).tolist()
        self.parts = {n: slice(end - size, end) for n, size, end in zip(layout.names, layout.sizes, ends, strict=True)}
        self.sums: Tensor | None = None
        self.left = dict.fromkeys(layout.names, self.count)
        self.buckets: list[list[str]] = []
        self.works: list[dist.Work] = []
        self.take = self._take

    def _take(self, name: str, gradients: Tensor) -> None:
        if self.sums is None:
            self._begin(gradients)
        assert self.sums is not None
        mine = self.sums[self.parts[name]]
        total = gradients[0].reshape(-1) if len(gradients) == 1 else gradients.flatten(1).sum(0)
        if self.left[name] == self.count:
            mine.copy_(total)
        else:
            mine.add_(total)
        self.left[name] -= len(gradients)
        while len(self.works) < len(self.buckets) and all(self.left[n] == 0 for n in self.buckets[len(self.works)]):
            self._launch()

    def _begin(self, like: Tensor) -> None:
        self.sums = self.communicator.space_for_sums(like, self.layout.num_parameters)
        most, filled = self.communicator.bucket_bytes // like.element_size(), 0
        for name, size in reversed(list(zip(self.layout.names, self.layout.sizes, strict=True))):
            if not self.buckets or filled + size > most:
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append(name)
            filled += size

    def _launch(self) -> None:
        """All-reduce the next bucket; always in the same order, so that all processes pair the same ones."""
        assert self.sums is not None
        for name in self.buckets[len(self.works)]:
            if self.left[name] == self.count:
                self.sums[self.parts[name]].zero_()  # no gradient came
        self.works.append(dist.all_reduce(self._bucket(len(self.works)), async_op=True))

    def _bucket(self, number: int) -> Tensor:
        assert self.sums is not None
        names = self.buckets[number]
        return self.sums[self.parts[names[-1]].start : self.parts[names[0]].stop]

    def wait(self, gradients: Tensor | None) -> Tensor:
        """See `Averaging`. A parameter that no gradient came for counts as zero."""
        assert self.sums is not None, "no gradient was taken"
        while len(self.works) < len(self.buckets):
            self._launch()
        for number, work in enumerate(self.works):
            work.wait()
            self._bucket(number).div_(self.divisor)  # while others are under way
        return spread(self.sums[None], len(self.communicator.held))
