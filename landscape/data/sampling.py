"""Minibatch indices, independent with replacement, each a pure function of (seed, learner, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from landscape import streams

BLOCK = 16
"""Steps drawn at once: a stream is opened once a block, not once a step."""


class IndexSampler:
    """Indices for the learners of some replicas.

    Replicas of equal seed draw equal indices, whatever else differs between them; so algorithms and learning rates are
    compared on the same data order.

    Args:
        seeds: one a replica.
        num_learners: n.
        batch_size: B.
        num_examples: N.
        purpose: names the stream; measurements draw from others than training.
        held: the learners to draw for, of the n; all by default.
    """

    def __init__(
        self, seeds: Sequence[int], num_learners: int, batch_size: int, num_examples: int, *, purpose: str = "minibatch",
        held: range | None = None,
    ) -> None:  # fmt: skip
        self.purpose = purpose
        self.seeds = tuple(seeds)
        self.held = range(num_learners) if held is None else held
        self.batch_size = batch_size
        self.num_examples = num_examples
        self._block_number = -1
        self._block = np.empty(0)

    def indices(self, step: int) -> Tensor:
        """Indices (R n, B), of the learners held, int64 on the CPU, of the step that is about to be taken."""
        number, offset = divmod(step, BLOCK)
        if number != self._block_number:
            drawn = {s: [self._draw(s, j, number) for j in self.held] for s in dict.fromkeys(self.seeds)}
            self._block = np.stack([rows for seed in self.seeds for rows in drawn[seed]])
            self._block_number = number
        return torch.from_numpy(self._block[:, offset].astype(np.int64))

    def _draw(self, seed: int, learner: int, block: int) -> np.ndarray:
        bits = streams.philox(self.purpose, seed, learner, counter=block)
        return (streams.uniform(bits, BLOCK, self.batch_size) * self.num_examples).astype(np.int32)
