"""The whole state of training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from landscape.functional import Buffers


@dataclass
class LearnerState:
    """Everything that training carries from step to step.

    The leading axis L is the learners held here: R replicas of n learners each, replica-major (L = R n). A rank of a
    distributed run holds a slice. Sampled indices, the mixing matrix and SSGD*'s noise are pure functions of
    (seed, learner, step), so there is no random state.

    Attributes:
        params: flat weights (L, d).
        buffers: {name: (L, ...)}, the network's own buffers, per learner.
        momentum: momentum buffers (L, d), or None without momentum.
        step: number of steps taken.
    """

    params: Float[Tensor, "L d"]
    buffers: Buffers
    momentum: Float[Tensor, "L d"] | None
    step: int

    def select(self, learners: slice) -> LearnerState:
        """The state of some of the learners, as views."""
        return replace(
            self,
            params=self.params[learners],
            buffers={n: b[learners] for n, b in self.buffers.items()},
            momentum=None if self.momentum is None else self.momentum[learners],
        )

    @staticmethod
    def replicated(weights: Tensor, buffers: Buffers, num_learners: int, *, momentum: bool) -> LearnerState:
        """A fresh state at step 0: R initial weights (R, d), each shared by the n learners of its replica."""
        params = weights.repeat_interleave(num_learners, dim=0)
        return LearnerState(
            params=params,
            buffers={name: b.repeat_interleave(num_learners, dim=0) for name, b in buffers.items()},
            momentum=torch.zeros_like(params) if momentum else None,
            step=0,
        )
