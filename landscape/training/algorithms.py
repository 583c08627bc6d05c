"""What every update rule works with in one step, whatever the backend (theory.md sec. 2). The rules are in `rules/`, one a file.

Every rule is the same five moves: start the exchange, choose the points where gradients are taken, take the
gradients, update locally, finish the exchange. What differs between algorithms and orders is only where the exchange
stands among them:

    SSGD      x_j = w_a               g <- mean g          w_j <- w_a - alpha u(g)
    SSGD*     x_j = w_a + zeta_j      g <- mean g + xi     w_j <- w_a - alpha u(g)
    AWC       x_j = w_j                                    w_j <- (M w)_j - alpha u(g_j)
    ATC       x_j = w_j                                    w   <- M (w - alpha u(g))
    CTA       x_j = v_j = (M w)_j                          w_j <- v_j - alpha u(g_j)

Local SGD is ATC with M = 1 1^T/n at every H-th step, and I between; adjacent-leader is ATC with forces towards the leading neighbours, and
an M that follows them; UBAR is AWC with an M that each learner chooses. None of them takes gradients elsewhere than at w_j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from landscape.functional import Buffers, ParameterLayout
from landscape.training.communicator import Averaging, Communicator, Take
from landscape.training.config import TrainConfig
from landscape.training.state import LearnerState


@dataclass(frozen=True)
class LocalUpdate:
    """The update direction u of torch.optim.SGD; buffers are local to the learner and never mixed."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def direction(
        self, gradients: Tensor, weights: Tensor, buffer: Tensor | None, step: int
    ) -> tuple[Tensor, Tensor | None]:
        """The direction (L, d) to subtract, times the learning rate; and the new momentum buffer.

        Args:
            gradients: (L, d).
            weights: where weight decay is taken: the weights that the update is applied to, before mixing.
            buffer: momentum buffers (L, d), or None without momentum.
            step: steps taken so far; torch fills the buffer with the bare gradient at the first.
        """
        if self.weight_decay:
            gradients = gradients.add(weights, alpha=self.weight_decay)
        if buffer is None:
            return gradients, None
        buffer = gradients.clone() if step == 0 else buffer.mul(self.momentum).add_(gradients, alpha=1 - self.dampening)
        return (gradients.add(buffer, alpha=self.momentum) if self.nesterov else buffer), buffer


@dataclass(frozen=True)
class Evaluation:
    """What gradients at some points tell.

    Attributes:
        losses: (L,) minibatch losses.
        gradients: (L, d), or None where they were given away as they were found.
        buffers: of the network, after its forward passes.
        mean_gradients: (L, d), their average over the learners with what noise was added to it, where the rule took it.
    """

    losses: Tensor
    gradients: Tensor | None
    buffers: Buffers
    mean_gradients: Tensor | None = None


Evaluate = Callable[[Tensor, Take | None], Evaluation]
"""Minibatch losses and gradients at given points (L, d); gradients go to the second argument as they are found, if there is one."""

Losses = Callable[[Tensor, int], Tensor]
"""Losses (P,) of one learner's minibatch at given points (P, d), by the learner's place among those held here."""


@dataclass(frozen=True)
class Step:
    """What a rule has to work with.

    Attributes:
        state: learners before the step; to be left as it is.
        config: what the run was told; a rule's own numbers are fields of it.
        evaluate: takes the gradients.
        losses: takes further losses of a minibatch; UBAR's.
        communicator: the backend.
        update: the local rule.
        layout: names and shapes of the parameters.
        learning_rates: alpha of each learner (L, 1), schedule included.
        mixing: M on the CPU, (n, n) or (R, n, n); None where learners do not gossip.
        noise: zeta (L, d); SSGD*'s.
        gradient_noise: xi (L, d), alike for the learners of a replica; SSGD*'s.
    """

    state: LearnerState
    config: TrainConfig
    evaluate: Evaluate
    losses: Losses
    communicator: Communicator
    update: LocalUpdate
    layout: ParameterLayout
    learning_rates: Tensor
    mixing: Tensor | None = None
    noise: Tensor | None = None
    gradient_noise: Tensor | None = None

    def start_mean(self) -> Averaging:
        """Begin an average of the learners' gradients, which `evaluate` is to feed."""
        return self.communicator.start_mean(self.layout, self.config.accumulation)


def gradient_points(algorithm: str, order: str, weights: Tensor, mixing: Tensor | None) -> Tensor:
    """Where the next step takes its gradients, (L, d): w_j, or (M w)_j under CTA. SSGD*'s noise is drawn by its user."""
    if algorithm == "dpsgd" and order == "cta":
        assert mixing is not None
        return mixing.to(weights) @ weights
    return weights
