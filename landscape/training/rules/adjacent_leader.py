"""Adjacent-Leader decentralised SGD: learners follow the best and the best-connected of their neighbours (He, Wang & Choromanska 2024)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from landscape.training.algorithms import Evaluation, Step
from landscape.training.state import LearnerState


def adjacent_leader(step: Step) -> tuple[LearnerState, Evaluation]:
    """AL-DSGD (arXiv 2405.11389): a corrective force towards two leaders, and an average in which they count for more.

    N(j) is the learner of smallest minibatch loss among j and its neighbours, tau(j) the one of most neighbours. With u the local rule's
    direction at w_j,

        v_j = w_j - alpha u(g_j(w_j)) - alpha lambda_N (w_j - w_N(j)) - alpha lambda_tau (w_j - w_tau(j)),
        w_j <- (1 - omega_N - omega_tau) sum_k M_jk v_k + omega_N v_N(j) + omega_tau v_tau(j).

    Without forces and weights this is DPSGD under ATC. Chosen where the paper leaves room, or its authors' program differs from it:
    performance is the loss of the step's own minibatch at w_j, told to all as one number a learner; a learner counts among its own
    neighbours and wins ties, then the lowest number does, as in that program (so on a regular graph tau(j) = j, and only N(j) acts);
    leaders' weights are averaged in after their own update, as in that program, which however pulls after the average and not in
    proportion to alpha. The forces stand outside momentum and weight decay. Neighbours of j are the k with M_jk not zero at this step:
    the paper's dynamic graphs, cycled through from step to step, are any topology that varies with the step. All learners start from
    the same weights, the paper's from different ones.

    Two exchanges a step, the first with the leaders only; no more gradients than DPSGD.
    """
    state, weights, mixing = step.state, step.state.params, step.mixing
    assert mixing is not None
    evaluation = step.evaluate(weights, None)
    assert evaluation.gradients is not None
    losses = step.communicator.rows(evaluation.losses).unflatten(0, (-1, step.communicator.num_learners))
    best, central = leaders(mixing.numpy(), losses.double().cpu().numpy())
    direction, momentum = step.update.direction(evaluation.gradients, weights, state.momentum, state.step)
    pull = step.config.leader_pull + step.config.degree_pull
    if pull:
        pulls = torch.from_numpy(step.config.leader_pull * best + step.config.degree_pull * central).to(mixing)
        ahead = step.communicator.start_mix(weights, pulls).wait()
        direction = direction + weights.mul(pull).sub_(ahead)
    updated = torch.addcmul(weights, direction, step.learning_rates, value=-1)
    params = step.communicator.start_mix(updated, _average(step, mixing, best, central)).wait()
    return LearnerState(params, evaluation.buffers, momentum, state.step + 1), evaluation


def leaders(mixing: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whom each learner follows: one-hot rows (R, n, n) for the best of its neighbours and itself, and for the best-connected.

    Args:
        mixing: M, (n, n) or (R, n, n); neighbours of j are the k with M_jk not zero.
        losses: (R, n).

    >>> best, central = leaders(np.array([[0.7, 0.3, 0.0], [0.3, 0.3, 0.4], [0.0, 0.4, 0.6]]), np.array([[3.0, 2.0, 1.0]]))
    >>> best[0].argmax(1).tolist(), central[0].argmax(1).tolist()
    ([1, 2, 2], [1, 1, 1])
    """
    own = np.eye(mixing.shape[-1], dtype=bool)
    linked = np.broadcast_to((mixing != 0) | own, (len(losses), *own.shape))
    degrees = linked.sum(-1)
    return _lowest(losses, linked), _lowest(-degrees, linked)


def _lowest(values: np.ndarray, linked: np.ndarray) -> np.ndarray:
    """One-hot (R, n, n): the linked learner of the lowest value; oneself at a tie, else the first."""
    heard = np.where(linked, values[:, None, :], np.inf)
    chosen = np.where(values <= heard.min(-1), np.arange(values.shape[-1]), heard.argmin(-1))
    return np.asarray(np.eye(values.shape[-1])[chosen])


def _average(step: Step, mixing: Tensor, best: np.ndarray, central: np.ndarray) -> Tensor:
    """(1 - omega_N - omega_tau) M + omega_N N + omega_tau T, which has M's neighbours."""
    extra = torch.from_numpy(step.config.leader_weight * best + step.config.degree_weight * central).to(mixing)
    return (1 - step.config.leader_weight - step.config.degree_weight) * mixing + extra
