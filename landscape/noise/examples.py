"""Examples of an objective, by number or all in order, in pieces of any size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from landscape.data.dataset import BatchList, num_examples, stream
from landscape.functional import chunks
from landscape.objective import Objective
from landscape.objective.peers import ALONE


class Examples:
    """Some examples of an objective, by number, or all of them in order.

    Args:
        objective: L, whose examples must be independent of each other.
        indices: (m,); None for all.
        own: take this rank's share of them alone, so that the ranks together have each once; otherwise every rank takes all m, which a
            rank with a shard of the data cannot.
    """

    def __init__(self, objective: Objective, indices: Tensor | None = None, *, own: bool = False) -> None:
        objective._needs_independent_examples()
        if not objective.model.loss.per_example:
            raise ValueError(
                "gradients of examples need a loss that gives one number per example, not one for the batch"
            )
        if not own or indices is not None:
            objective.needs_all_data()
        self.data, self.device = objective.data, objective.device
        if indices is None and not isinstance(self.data, BatchList):
            indices = torch.arange(len(self.data))
        if indices is not None and isinstance(self.data, BatchList):
            raise ValueError(
                "examples cannot be drawn from a list of batches; take all of them, or give a map-style data set or tensors"
            )
        if indices is not None and (indices.ndim != 1 or not len(indices) or int(indices.min()) < 0 or int(indices.max()) >= len(self.data)):  # fmt: skip
            raise ValueError(
                f"indices must be a vector of numbers from 0 to {len(self.data) - 1}, and hold at least one"
            )
        self.indices = indices
        self.peers = objective.peers if own and objective.peers.shared else ALONE

    def __len__(self) -> int:
        return len(self.data) if self.indices is None else len(self.indices)

    def chunks(self, size: int) -> Iterator[tuple[slice, Any, Any]]:
        """All of them, or this rank's share, at most `size` at once: (which of all, inputs, targets)."""
        if self.indices is not None:
            own = self.peers.share(len(self))
            for part in chunks(len(own), size):
                which = slice(own.start + part.start, own.start + part.stop)
                yield which, *self.data.batch(self.indices[which].to(self.device))
            return
        assert isinstance(self.data, BatchList)
        own = self.peers.share(len(self.data.batches))
        start = sum(self.data.counts[: own.start])
        for batch in stream(self.data, size, own):
            count = num_examples(batch[1])
            for part in chunks(count, size):
                inputs, targets = take(batch, part, count)
                yield slice(start + part.start, start + part.stop), inputs, targets
            start += count

    def few(self, count: int) -> tuple[Any, Any]:
        """Some of all, spread evenly (the first of a list of batches), as (inputs, targets); the same on every rank that has all."""
        if self.indices is None:
            batch = next(stream(self.data, count))
            return take(batch, slice(0, count), num_examples(batch[1]))
        spread = torch.linspace(0, len(self) - 1, min(count, len(self))).long()
        return self.data.batch(self.indices[spread].to(self.device))


def take(batch: Any, part: slice, count: int) -> Any:
    """Some examples of a batch of `count`; tensors that are not one row an example stay whole."""
    return tree_map(lambda t: t[part] if isinstance(t, Tensor) and t.ndim and len(t) == count else t, batch)
