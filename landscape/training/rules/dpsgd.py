"""Decentralised parallel SGD in its three orders (theory.md sec. 2); with gamma < 1, controlled disagreement."""

from __future__ import annotations

import torch

from landscape.training.algorithms import Evaluation, Step
from landscape.training.state import LearnerState


def dpsgd(step: Step) -> tuple[LearnerState, Evaluation]:
    """AWC w_j <- (M w)_j - alpha u(g_j(w_j)); ATC w <- M (w - alpha u(g(w))); CTA v = M w, w_j <- v_j - alpha u(g_j(v_j)).

    Under AWC the exchange of weights goes on while the gradients are taken.
    """
    state, order, mixing = step.state, step.config.order, step.mixing
    assert mixing is not None
    weights = state.params
    exchange = step.communicator.start_mix(weights, mixing) if order in ("awc", "cta") else None
    start = exchange.wait() if order == "cta" and exchange is not None else weights
    evaluation = step.evaluate(start, None)
    assert evaluation.gradients is not None
    direction, momentum = step.update.direction(evaluation.gradients, start, state.momentum, state.step)
    if order == "awc":
        assert exchange is not None
        start = exchange.wait()
    params = torch.addcmul(start, direction, step.learning_rates, value=-1, out=None if start is weights else start)
    if order == "atc":
        params = step.communicator.start_mix(params, mixing).wait()
    return LearnerState(params, evaluation.buffers, momentum, state.step + 1), evaluation
