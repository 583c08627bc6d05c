from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from landscape.theory.modes import LocalRule, disagreement_modes, growth
from landscape.theory.stability import disagreement_threshold, learning_rate_thresholds, mean_threshold
from landscape.training.topology import Topology, from_matrix, topology

BETA = 0.8
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": BETA},
    "dampening": {"momentum": BETA, "dampening": 0.4},
    "nesterov": {"momentum": BETA, "nesterov": True},
}
ORDERS = ("awc", "atc", "cta")
SYMMETRIC = [topology("ring", 4), topology("ring", 6), topology("hypercube", 4), topology("star", 5), topology("torus", 9),
             from_matrix(0.05 * np.eye(4) + 0.95 / 4, "nearly complete")]  # fmt: skip
DIRECTED = [topology("exponential", n) for n in (4, 6, 7)]
VARYING = [topology("one-peer-exponential", n) for n in (3, 6)]


# Closed forms of theory.md sec. 5 and 6 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("plain", 2), ("momentum", 2 * (1 + BETA)), ("dampening", 2 * (1 + BETA) / (1 - 0.4)),
     ("nesterov", 2 * (1 + BETA) / (1 + 2 * BETA))],
)  # fmt: skip
@pytest.mark.parametrize("order", ["ssgd", *ORDERS])
def test_the_threshold_of_the_mean(order: str, rule: str, expected: float) -> None:
    found = mean_threshold(LocalRule(order, **RULES[rule]))
    assert found == pytest.approx(expected, rel=1e-14)
    edge = [np.abs(np.linalg.eigvals(LocalRule(order, **RULES[rule]).matrices(np.array(1.0), np.array(found * f))[0])).max()
            for f in (1 - 1e-6, 1 + 1e-6)]  # fmt: skip
    assert edge[0] < 1 < edge[1]


def test_dampening_without_momentum_does_nothing() -> None:
    assert mean_threshold(LocalRule("awc", dampening=0.5)) == 2
    ring = topology("ring", 6)
    plain = disagreement_threshold(ring, LocalRule("awc"))
    assert disagreement_threshold(ring, LocalRule("awc", dampening=0.5)) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.5, 0.3), (0.9, 0.0)])
@pytest.mark.parametrize("graph", SYMMETRIC, ids=lambda t: f"{t.name}-{t.num_learners}")
def test_awc_on_symmetric_graphs(graph: Topology, momentum: float, dampening: float) -> None:
    expected = (1 + momentum) * (1 + disagreement_modes(graph).min()) / (1 - dampening)
    found = disagreement_threshold(graph, LocalRule("awc", momentum, dampening))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("order", ["atc", "cta"])
@pytest.mark.parametrize("graph", SYMMETRIC, ids=lambda t: f"{t.name}-{t.num_learners}")
def test_atc_and_cta_on_symmetric_graphs(graph: Topology, order: str, momentum: float) -> None:
    """|phi| < q of theory.md sec. 6: (1 + beta)(1 + mu)/mu for mu > 0, (1 - beta)(1 + |mu|)/|mu| for mu < 0."""
    modes = disagreement_modes(graph)[0]
    limits = [
        (1 + momentum) * (1 + mu) / mu if mu > 0 else (1 - momentum) * (1 - mu) / -mu for mu in modes if abs(mu) > 1e-12
    ]
    assert disagreement_threshold(graph, LocalRule(order, momentum)) == pytest.approx(min(limits), rel=1e-9)


@pytest.mark.parametrize("order", ["atc", "cta"])
def test_complete_mixing_leaves_no_disagreement_to_grow(order: str) -> None:
    for rule in RULES.values():
        assert disagreement_threshold(topology("complete", 5), LocalRule(order, **rule)) == math.inf
    assert disagreement_threshold(topology("complete", 5), LocalRule("awc")) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("graph", DIRECTED, ids=lambda t: f"{t.name}-{t.num_learners}")
def test_directed_graphs(graph: Topology) -> None:
    modes = disagreement_modes(graph)[0]
    awc = min(mu.real + math.sqrt(1 - mu.imag**2) for mu in modes)  # |mu - x| = 1
    assert disagreement_threshold(graph, LocalRule("awc")) == pytest.approx(awc, rel=1e-9)
    for order in ("atc", "cta"):
        assert disagreement_threshold(graph, LocalRule(order)) == pytest.approx(1 + 1 / np.abs(modes).max(), rel=1e-9)


@pytest.mark.parametrize("n", [4, 6, 16])
def test_random_pairing(n: int) -> None:
    graph, mubar = topology("random-pairing", n), (n - 2) / (2 * (n - 1))
    awc = mubar + math.sqrt(mubar**2 + 1 - mubar)  # 1 - mubar (1 - 2 x) - x^2 = 0
    assert disagreement_threshold(graph, LocalRule("awc")) == pytest.approx(awc, rel=1e-9)
    for order in ("atc", "cta"):
        assert disagreement_threshold(graph, LocalRule(order)) == pytest.approx(1 + 1 / math.sqrt(mubar), rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_negative_curvature_under_awc(momentum: float) -> None:
    """lambda < 0 needs alpha lambda > mu_2 - 1, and (1 - beta)(mu_2 - 1) with momentum."""
    graph = topology("ring", 6)
    edge = (1 - momentum) * (disagreement_modes(graph).max() - 1)
    inside, outside = growth(graph, LocalRule("awc", momentum), np.array([edge * (1 - 1e-6), edge * (1 + 1e-6)]))
    assert inside < 1 < outside


@pytest.mark.parametrize("rule", RULES)
def test_one_learner_never_disagrees(rule: str) -> None:
    for name in ("ring", "random-pairing", "one-peer-exponential"):
        assert disagreement_threshold(topology(name, 1), LocalRule("awc", **RULES[rule])) == math.inf


# Against the step itself ---------------------------------------------------------------------------------------------


def log_growth(steps: list[np.ndarray], count: int = 900) -> float:
    """Log growth per step of a random start, over the later part of `count` steps."""
    state, logs = np.random.default_rng(0).standard_normal(len(steps[0])), []
    for t in range(count):
        state = steps[t % len(steps)] @ state
        norm = np.linalg.norm(state)
        if norm == 0:
            return -math.inf
        logs.append(math.log(norm))
        state /= norm
    return float(np.mean(logs[count // 3 :]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "graph", [SYMMETRIC[1], SYMMETRIC[3], DIRECTED[1], *VARYING], ids=lambda t: f"{t.name}-{t.num_learners}"
)
def test_training_diverges_just_above_the_threshold_and_not_just_below(
    graph: Topology, order: str, rule: str, step_matrix: Callable
) -> None:
    edge = disagreement_threshold(graph, LocalRule(order, **RULES[rule]))
    assert 0 < edge < math.inf
    below, above = (
        log_growth([step_matrix(m, edge * factor, order=order, **RULES[rule]) for m in graph.matrices])
        for factor in (0.99, 1.01)
    )
    assert below < 0 < above
    # and the first of them: nothing below it diverges
    assert (growth(graph, LocalRule(order, **RULES[rule]), np.linspace(1e-3, 0.999 * edge, 200)) < 1).all()


def test_a_directed_matrix_whose_modes_do_not_separate_has_a_threshold_too(step_matrix: Callable) -> None:
    skewed = from_matrix(np.array([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0, 0.25, 0.5], [0.25, 0, 0.25, 0.5]]))
    for order in ORDERS:
        edge = disagreement_threshold(skewed, LocalRule(order, 0.5))
        below, above = (
            log_growth([step_matrix(skewed.matrices[0], edge * f, order=order, momentum=0.5)]) for f in (0.99, 1.01)
        )
        assert below < 0 < above


# What a run is told --------------------------------------------------------------------------------------------------


def test_thresholds_by_algorithm() -> None:
    ring = topology("ring", 6)
    assert learning_rate_thresholds(ring, "ssgd", "awc") == {"mean": 2}
    assert learning_rate_thresholds(ring, "ssgd-star", "awc", 0.5) == {"mean": 3}
    assert learning_rate_thresholds(topology("ring", 1), "dpsgd", "awc") == {"mean": 2}
    assert learning_rate_thresholds(ring, "dpsgd", "awc") == pytest.approx({"mean": 2, "disagreement": 2 / 3})
    assert learning_rate_thresholds(ring, "dpsgd", "atc", 0.5) == pytest.approx({"mean": 3, "disagreement": 2})
    found = learning_rate_thresholds(ring, "dpsgd", "cta", 0.5, nesterov=True)
    assert found["mean"] == 2 * 1.5 / 2
    assert found["disagreement"] == disagreement_threshold(ring, LocalRule("cta", 0.5, nesterov=True))


@pytest.mark.parametrize("order", ORDERS)
def test_thresholds_see_the_damping(order: str) -> None:
    """AWC: 1 + mu_min of the damped matrix; nothing mixed at gamma = 0 leaves each learner's own threshold."""
    ring, gamma = topology("ring", 6), 0.25
    rule = LocalRule(order)
    assert disagreement_threshold(ring.damped(0), rule) == pytest.approx(2, rel=1e-9)
    if order == "awc":
        assert disagreement_threshold(ring.damped(gamma), rule) == pytest.approx(2 - gamma * 4 / 3, rel=1e-9)
    found = learning_rate_thresholds(ring, "dpsgd", order, gammas=(gamma, 1.0))
    ends = [disagreement_threshold(ring.damped(g), rule) for g in (gamma, 1.0)]
    assert found["disagreement"] == min(ends)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_of_a_gamma_that_varies_the_smallest_threshold_is_at_an_end(order: str, rule: str) -> None:
    for graph in (topology("star", 6), topology("exponential", 6), topology("random-pairing", 6)):
        found = [
            disagreement_threshold(graph.damped(g), LocalRule(order, **RULES[rule])) for g in (0.1, 0.35, 0.7, 1.0)
        ]
        for inner in found[1:-1]:
            assert inner >= min(found[0], found[-1]) * (1 - 1e-9)


@pytest.mark.parametrize(
    "name", ["ring", "complete", "torus", "hypercube", "star", "exponential", "one-peer-exponential", "random-pairing"]
)
def test_every_topology_has_thresholds(name: str) -> None:
    for n in (1, 2, 8):
        found = learning_rate_thresholds(topology(name, n), "dpsgd", "awc")
        assert found["mean"] == 2
        assert n == 1 or 0 < found["disagreement"] < 2
