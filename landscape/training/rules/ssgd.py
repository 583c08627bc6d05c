"""Synchronous SGD: gradients averaged over all learners; SSGD* takes them at w_a + noise (theory.md sec. 2)."""

from __future__ import annotations

from dataclasses import replace

import torch

from landscape.training.algorithms import Evaluation, Step
from landscape.training.state import LearnerState


def ssgd(step: Step) -> tuple[LearnerState, Evaluation]:
    """w_j <- w_a - alpha u(mean g + xi), g at w_a, or for SSGD* at w_a + zeta_j."""
    state, weights = step.state, step.state.params
    average = step.start_mean()
    evaluation = step.evaluate(weights if step.noise is None else weights + step.noise, average.take)
    mean = average.wait(evaluation.gradients)
    if step.gradient_noise is not None:
        mean = mean + step.gradient_noise
    evaluation = replace(evaluation, mean_gradients=mean)
    direction, momentum = step.update.direction(mean, weights, state.momentum, state.step)
    params = torch.addcmul(weights, direction, step.learning_rates, value=-1)
    return LearnerState(params, evaluation.buffers, momentum, state.step + 1), evaluation
