"""Local SGD: every learner on its own, and an average of all weights every H steps (Stich, arXiv 1805.09767)."""

from __future__ import annotations

import torch

from landscape.training.algorithms import Evaluation, Step
from landscape.training.communicator import spread
from landscape.training.state import LearnerState


def local_sgd(step: Step) -> tuple[LearnerState, Evaluation]:
    """w_j <- w_j - alpha u(g_j(w_j)), and after every H-th step w_j <- w_a; momentum buffers stay with their learner."""
    state, weights = step.state, step.state.params
    evaluation = step.evaluate(weights, None)
    assert evaluation.gradients is not None
    direction, momentum = step.update.direction(evaluation.gradients, weights, state.momentum, state.step)
    params = torch.addcmul(weights, direction, step.learning_rates, value=-1)
    if (state.step + 1) % step.config.local_steps == 0:
        params = spread(step.communicator.means(params), len(step.communicator.held)).contiguous()
    return LearnerState(params, evaluation.buffers, momentum, state.step + 1), evaluation
