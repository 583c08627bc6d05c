"""UBAR, the uniform Byzantine-resilient aggregation rule: learners mix with those neighbours that they can trust (Guo et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from landscape.training.algorithms import Evaluation, Step
from landscape.training.communicator import ordered_mean
from landscape.training.state import LearnerState


def ubar(step: Step) -> tuple[LearnerState, Evaluation]:
    """w_j <- a w_j + (1 - a) R_j - alpha u(g_j(w_j)), R_j the mean of the neighbours that pass two tests (arXiv 2002.08569).

    First, of the neighbours k (M_jk not zero) the floor(rho |N_j|) whose w_k lie nearest to w_j, at least one. Second, of these the ones
    with a loss on j's own minibatch of at most j's own; the best of them where there is none. M's values are not used. A learner without
    neighbours takes its local step. rho should be at most the fraction of honest neighbours.

    Chosen where the paper leaves room: the losses are in train mode, with the dropout masks of the step's gradient; ties in distance go to
    the lower number. Weights are exchanged while the gradients are taken. Costs 1 + rho |N_j| forward passes a learner and a step more
    than DPSGD does: the own loss is taken anew, by the same kernels as those that it is compared with.
    """
    state, weights = step.state, step.state.params
    assert step.mixing is not None
    exchange = step.communicator.start_gather(weights, step.mixing)
    evaluation = step.evaluate(weights, None)
    assert evaluation.gradients is not None
    direction, momentum = step.update.direction(evaluation.gradients, weights, state.momentum, state.step)
    rows, params = exchange.wait(), weights.clone()
    for i, numbers in enumerate(_neighbours(step, step.mixing)):
        if numbers:
            kept = _trusted(step, i, [rows[k] for k in numbers])
            params[i].mul_(step.config.own_weight).add_(ordered_mean(kept), alpha=1 - step.config.own_weight)
    params.addcmul_(direction, step.learning_rates, value=-1)
    return LearnerState(params, evaluation.buffers, momentum, state.step + 1), evaluation


def num_nearest(kept_fraction: float | int, num_neighbours: int) -> int:
    """floor(rho |N|), but at least one.

    >>> [num_nearest(0.4, n) for n in (1, 2, 5)], num_nearest(0.7, 10), num_nearest(0.29, 100)
    ([1, 1, 2], 7, 29)
    """
    return max(1, math.floor(kept_fraction * num_neighbours + 1e-9))


def _trusted(step: Step, learner: int, rows: list[Tensor]) -> list[Tensor]:
    """The rows that pass both tests, in the order given."""
    own = step.state.params[learner]
    distances = [float(torch.linalg.vector_norm(row - own, dtype=torch.float64)) for row in rows]
    ranking = sorted(range(len(rows)), key=lambda i: (_or_infinite(distances[i]), i))
    nearest = [rows[i] for i in sorted(ranking[: num_nearest(step.config.kept_fraction, len(rows))])]
    own_loss, *losses = map(_or_infinite, step.losses(torch.stack([own, *nearest]), learner).tolist())
    kept = [row for row, loss in zip(nearest, losses, strict=True) if loss <= own_loss]
    return kept or [nearest[losses.index(min(losses))]]


def _neighbours(step: Step, mixing: Tensor) -> Iterator[list[int]]:
    """Of each learner held here those it listens to, without itself, by replica * n + learner."""
    n, held = step.communicator.num_learners, step.communicator.held
    for replica in range(len(step.state.params) // len(held)):
        linked = (mixing if mixing.ndim == 2 else mixing[replica]) != 0
        for j in held:
            yield [replica * n + k for k in range(n) if k != j and linked[j, k]]


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
