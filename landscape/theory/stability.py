"""When a step is stable: thresholds on alpha lambda, and the coupled operator on all learners (theory.md sec. 5 and 6)."""

from __future__ import annotations

import numpy as np

from landscape.theory.modes import LocalRule, growth
from landscape.training.topology import Topology


def mean_threshold(rule: LocalRule) -> float:
    """The largest stable alpha lambda of the mean w_a (all that SSGD has).

    2 (1 + beta) for heavy ball, divided by 1 - dampening; 2 (1 + beta)/(1 + 2 beta) for Nesterov.

    >>> mean_threshold(LocalRule("ssgd", momentum=0.9)), round(mean_threshold(LocalRule("ssgd", momentum=0.9, nesterov=True)), 4)
    (3.8, 1.3571)
    """
    beta = rule.momentum
    if rule.nesterov:
        return 2 * (1 + beta) / (1 + 2 * beta)
    return 2 * (1 + beta) / ((1 - rule.dampening) if beta else 1)


def disagreement_threshold(topology: Topology, rule: LocalRule) -> float:
    """The largest stable alpha lambda of the disagreement between learners, on a quadratic shared by all.

    By bisection on the growth of the fastest mode: every order, momentum and topology alike. theory.md's closed forms, such as
    (1 + beta)(1 + mu_min) for AWC, are held against it in the tests. Infinite for one learner.
    """
    if topology.num_learners == 1:
        return float("inf")
    grid = np.linspace(1e-4, 8 * (1 + rule.momentum) / (1 - rule.dampening), 4001)
    unstable = growth(topology, rule, grid) >= 1
    if unstable[0]:
        return 0.0
    if not unstable.any():
        return float("inf")
    first = int(unstable.argmax())
    low, high = grid[first - 1], grid[first]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if growth(topology, rule, np.array([middle]))[0] >= 1 else (middle, high)
    return float(low)


def learning_rate_thresholds(
    topology: Topology,
    algorithm: str,
    order: str,
    momentum: float = 0.0,
    dampening: float = 0.0,
    *,
    nesterov: bool = False,
) -> dict[str, float]:
    """Thresholds on alpha lambda_max that a run meets, by name: "mean", and "disagreement" for DPSGD."""
    rule = LocalRule(order, momentum, dampening, nesterov)
    thresholds = {"mean": mean_threshold(rule)}
    if algorithm == "dpsgd" and topology.num_learners > 1:
        thresholds["disagreement"] = disagreement_threshold(topology, rule)
    return thresholds
