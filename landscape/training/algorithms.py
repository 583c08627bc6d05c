"""One step of SSGD, SSGD* and DPSGD (theory.md sec. 2), whatever the backend.

Every algorithm is the same five moves: start the exchange, choose the points where gradients are taken, take the
gradients, update locally, finish the exchange. What differs between algorithms and orders is only where the exchange
stands among them:

    SSGD      x_j = w_a               g <- mean g          w_j <- w_a - alpha u(g)
    SSGD*     x_j = w_a + zeta_j      g <- mean g + xi     w_j <- w_a - alpha u(g)
    AWC       x_j = w_j                                    w_j <- (M w)_j - alpha u(g_j)
    ATC       x_j = w_j                                    w   <- M (w - alpha u(g))
    CTA       x_j = v_j = (M w)_j                          w_j <- v_j - alpha u(g_j)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from landscape.functional import Buffers
from landscape.training.communicator import Communicator
from landscape.training.state import LearnerState

Algorithm = Literal["ssgd", "ssgd-star", "dpsgd"]
Order = Literal["awc", "atc", "cta"]

ALGORITHMS: tuple[str, ...] = ("ssgd", "ssgd-star", "dpsgd")
ORDERS: tuple[str, ...] = ("awc", "atc", "cta")


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
    """Minibatch losses (L,) and gradients (L, d) at the gradient points, and the buffers after them."""

    losses: Tensor
    gradients: Tensor
    buffers: Buffers


Evaluate = Callable[[Tensor], Evaluation]


def take_step(
    algorithm: str,
    order: str,
    state: LearnerState,
    evaluate: Evaluate,
    communicator: Communicator,
    update: LocalUpdate,
    *,
    learning_rates: Tensor,
    mixing: Tensor | None,
    noise: Tensor | None = None,
    gradient_noise: Tensor | None = None,
) -> tuple[LearnerState, Evaluation]:
    """Advance every learner by one step.

    Args:
        algorithm: "ssgd", "ssgd-star" or "dpsgd".
        order: "awc", "atc" or "cta"; DPSGD's only.
        state: learners before the step; left as it is.
        evaluate: minibatch losses and gradients at given points (L, d).
        communicator: the backend.
        update: the local rule.
        learning_rates: alpha of each learner (L, 1), schedule included.
        mixing: M, (n, n) or (R, n, n); None but for DPSGD.
        noise: zeta (L, d); SSGD*'s only.
        gradient_noise: xi (L, d), alike for the learners of a replica; SSGD*'s only.
    """
    weights = state.params
    if algorithm == "dpsgd":
        assert mixing is not None
        exchange = communicator.start_mix(weights, mixing) if order in ("awc", "cta") else None
        start = exchange.wait() if order == "cta" and exchange is not None else weights
        evaluation = evaluate(start)
        direction, momentum = update.direction(evaluation.gradients, start, state.momentum, state.step)
        if order == "awc":
            assert exchange is not None
            start = exchange.wait()
        params = torch.addcmul(start, direction, learning_rates, value=-1, out=None if start is weights else start)
        if order == "atc":
            params = communicator.start_mix(params, mixing).wait()
    else:
        evaluation = evaluate(weights if noise is None else weights + noise)
        mean = communicator.mean(evaluation.gradients)
        if gradient_noise is not None:
            mean = mean + gradient_noise
        direction, momentum = update.direction(mean, weights, state.momentum, state.step)
        params = torch.addcmul(weights, direction, learning_rates, value=-1)
    return LearnerState(params, evaluation.buffers, momentum, state.step + 1), evaluation


def gradient_points(algorithm: str, order: str, weights: Tensor, mixing: Tensor | None) -> Tensor:
    """Where the next step takes its gradients, (L, d): w_j, or (M w)_j under CTA. SSGD*'s noise is drawn by its user."""
    if algorithm == "dpsgd" and order == "cta":
        assert mixing is not None
        return mixing.to(weights) @ weights
    return weights
