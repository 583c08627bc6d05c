from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import networkx as nx
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from landscape.theory.modes import LocalRule, disagreement_modes, growth, second_moment_map
from landscape.training.topology import Topology, from_graph, from_matrix, metropolis, topology

ORDERS = ("awc", "atc", "cta")
RULES = {
    "plain": {},
    "momentum": {"momentum": 0.8},
    "dampening": {"momentum": 0.6, "dampening": 0.3},
    "nesterov": {"momentum": 0.7, "nesterov": True},
}
# doubly stochastic, but M M^T differs from M^T M
NOT_NORMAL = from_matrix(
    np.array([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0, 0.25, 0.5], [0.25, 0, 0.25, 0.5]]), "skewed"
)


def exponential_offsets(n: int) -> list[int]:
    return [2**k for k in range(max(1, math.ceil(math.log2(n))))]


def assert_same_columns(found: np.ndarray, expected: np.ndarray) -> None:
    """(period, n - 1) modes equal up to the order of the modes, the same order in every matrix of the period."""
    assert found.shape == expected.shape
    cost = np.abs(found[:, :, None] - expected[:, None, :]).sum(0)
    rows, columns = linear_sum_assignment(cost)
    assert cost[rows, columns].max() < 1e-8


def fourier_roots(n: int) -> np.ndarray:
    return np.exp(2j * np.pi * np.arange(1, n) / n)


# The step of one mode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_two_by_two_step_is_the_step_of_every_mode(order: str, rule: str, quadratic_step: Callable) -> None:
    """Against the step of n learners on a ring, in the basis of its graph modes."""
    matrix, x = topology("ring", 6).matrices[0], np.array([-0.1, 0.0, 0.4, 1.7])
    mu, vectors = np.linalg.eigh(matrix)
    rng = np.random.default_rng(0)
    weights, buffers, noise = rng.standard_normal((3, 6, 4))
    a, b = LocalRule(order, **RULES[rule]).matrices(mu[:, None], x[None, :])
    if rule == "plain":
        buffers = 0 * buffers
    found = quadratic_step(weights, buffers, matrix, x, noise, order=order, **RULES[rule])
    state = np.stack([vectors.T @ weights, vectors.T @ buffers], -1)
    expected = (a @ state[..., None])[..., 0] + b * (vectors.T @ noise)[..., None]
    np.testing.assert_allclose(vectors.T @ found[0], expected[..., 0], rtol=0, atol=1e-13)
    if rule != "plain":
        np.testing.assert_allclose(vectors.T @ found[1], expected[..., 1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [*ORDERS, "ssgd"])
def test_the_mean_mode_is_the_same_under_every_order(order: str) -> None:
    for rule in RULES.values():
        a, b = LocalRule(order, **rule).matrices(np.array(1.0), np.array(0.3))
        expected = LocalRule("ssgd", **rule).matrices(np.array(1.0), np.array(0.3))
        np.testing.assert_allclose(a, expected[0], rtol=0, atol=1e-15)
        np.testing.assert_allclose(b, expected[1], rtol=0, atol=1e-15)


# Graph modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 34))
def test_modes_of_the_exponential_graphs(n: int) -> None:
    """Circulant, so their modes are the discrete Fourier transform's; the one-peer graph's are joint over its period."""
    offsets, roots = exponential_offsets(n), fourier_roots(n)
    static = (1 + sum(roots**k for k in offsets)) / (1 + len(offsets))
    assert_same_columns(disagreement_modes(topology("exponential", n)), static[None])
    each = np.stack([(1 + roots**k) / 2 for k in offsets])
    assert_same_columns(disagreement_modes(topology("one-peer-exponential", n)), each)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 9, 16])
@pytest.mark.parametrize("name", ["ring", "complete", "torus", "star"])
def test_modes_of_symmetric_graphs_are_their_spectrum_less_the_mean(name: str, n: int) -> None:
    found = topology(name, n)
    modes = disagreement_modes(found)
    assert modes.dtype == np.float64
    spectrum = np.sort(found.spectrum())
    np.testing.assert_allclose(np.sort(modes[0]), spectrum[:-1], rtol=0, atol=1e-12)


def test_a_matrix_that_does_not_connect_everyone_keeps_its_other_ones() -> None:
    half = np.full((2, 2), 0.5)
    split = from_matrix(np.block([[half, np.zeros((2, 2))], [np.zeros((2, 2)), half]]))
    np.testing.assert_allclose(np.sort(disagreement_modes(split)[0]), [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(np.sort(disagreement_modes(from_matrix(np.eye(3)))[0]), [1, 1], atol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 5, 6, 10, 33])
def test_random_pairing_has_one_mode(n: int) -> None:
    mubar = (n - 2) / (2 * (n - 1)) if n % 2 == 0 else 1 - (n - 1) / n * n / (n - 1) / 2  # odd n: one sits out
    modes = disagreement_modes(topology("random-pairing", n))
    assert modes.shape == (1, n - 1)
    np.testing.assert_allclose(modes, mubar, rtol=1e-12)


@pytest.mark.parametrize("name", ["ring", "exponential", "one-peer-exponential", "random-pairing", "complete"])
def test_one_learner_has_no_disagreement(name: str) -> None:
    assert disagreement_modes(topology(name, 1)).shape[1] == 0
    assert growth(topology(name, 1), LocalRule("awc"), np.array([0.1, 5.0])).tolist() == [0, 0]


def test_modes_that_do_not_separate_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="topology skewed: its matrices are not normal and commuting"):
        disagreement_modes(NOT_NORMAL)
    path, ring = from_graph(nx.path_graph(4)).matrices[0], topology("ring", 4).matrices[0]
    with pytest.raises(ValueError, match=r"topology alternating: .* graph modes do not separate"):
        disagreement_modes(Topology("alternating", 4, "periodic", np.stack([path, ring])))


# Growth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("graph", [topology("ring", 5), topology("star", 6), topology("exponential", 6),
                                   topology("one-peer-exponential", 6), NOT_NORMAL], ids=lambda t: t.name)  # fmt: skip
def test_growth_is_the_spectral_radius_of_the_whole_step(
    graph: Topology, order: str, rule: str, step_matrix: Callable
) -> None:
    x = np.array([-0.4, -0.05, 1e-3, 0.3, 1.0, 1.6, 2.5, 6.0])
    expected = []
    for value in x:
        steps = [step_matrix(m, value, order=order, **RULES[rule]) for m in graph.matrices]
        period = np.linalg.multi_dot([*steps[::-1], np.eye(len(steps[0]))])
        expected.append(np.abs(np.linalg.eigvals(period)).max() ** (1 / len(steps)))
    np.testing.assert_allclose(growth(graph, LocalRule(order, **RULES[rule]), x), expected, rtol=1e-7)


def matchings(nodes: list[int]) -> Iterator[list[tuple[int, int]]]:
    """All perfect matchings of an even number of nodes."""
    if not nodes:
        yield []
        return
    for partner in nodes[1:]:
        for rest in matchings([v for v in nodes[1:] if v != partner]):
            yield [(nodes[0], partner), *rest]


def pairing_matrices(n: int) -> np.ndarray:
    """Every matrix that random pairing of n learners draws from, each as likely."""
    drawn = []
    for idle in [None] if n % 2 == 0 else range(n):
        for pairs in matchings([v for v in range(n) if v != idle]):
            matrix = np.eye(n)
            for a, b in pairs:
                matrix[np.ix_((a, b), (a, b))] = 0.5
            drawn.append(matrix)
    return np.stack(drawn)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [2, 4, 5])
def test_growth_under_random_pairing_is_that_of_the_second_moments(
    n: int, order: str, rule: str, step_matrix: Callable
) -> None:
    """Against E[A kron A] over all matchings, on the disagreement of all learners at once."""
    x = np.array([-0.4, 1e-3, 0.3, 1.1, 2.5])
    expected = []
    for value in x:
        steps = [step_matrix(m, value, order=order, **RULES[rule]) for m in pairing_matrices(n)]
        mean = sum(np.kron(a, a) for a in steps) / len(steps)
        expected.append(math.sqrt(np.abs(np.linalg.eigvals(mean)).max()))
    found = growth(topology("random-pairing", n), LocalRule(order, **RULES[rule]), x)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-5)


def test_the_second_moment_map_is_linear_in_the_mean_mode() -> None:
    rule, x = LocalRule("atc", momentum=0.5), np.array([0.2, 0.9])
    ends = [second_moment_map(np.array([m]), x, rule) for m in (0.0, 1.0)]
    np.testing.assert_allclose(second_moment_map(np.array([0.3]), x, rule), 0.7 * ends[0] + 0.3 * ends[1], rtol=1e-14)
    for end, mu in zip(ends, (0.0, 1.0), strict=True):
        a = rule.matrices(np.array(mu), x)[0]
        np.testing.assert_allclose(end, [np.kron(m, m) for m in a], rtol=1e-14, atol=1e-15)


# Controlled disagreement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["ring", "exponential", "one-peer-exponential", "random-pairing"])
def test_damping_pulls_every_mode_towards_one(name: str, gamma: float) -> None:
    graph = topology(name, 6)
    expected = 1 - gamma * (1 - disagreement_modes(graph))
    assert_same_columns(disagreement_modes(graph.damped(gamma)), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "graph", [topology("ring", 5), topology("one-peer-exponential", 6), NOT_NORMAL], ids=lambda t: t.name
)
def test_growth_under_damping_is_that_of_the_whole_step(
    graph: Topology, order: str, rule: str, step_matrix: Callable
) -> None:
    x, gamma = np.array([-0.4, 1e-3, 0.3, 1.6, 6.0]), 0.35
    expected = []
    for value in x:
        steps = [
            step_matrix((1 - gamma) * np.eye(len(m)) + gamma * m, value, order=order, **RULES[rule])
            for m in graph.matrices
        ]
        period = np.linalg.multi_dot([*steps[::-1], np.eye(len(steps[0]))])
        expected.append(np.abs(np.linalg.eigvals(period)).max() ** (1 / len(steps)))
    found = growth(graph.damped(gamma), LocalRule(order, **RULES[rule]), x)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "gamma"), [(4, 0.5), (5, 0.2), (4, 0.0)])
def test_growth_under_damped_pairing_is_that_of_the_second_moments(
    n: int, gamma: float, order: str, rule: str, step_matrix: Callable
) -> None:
    """Against E[A kron A] over all matchings, each damped, on the disagreement of all learners at once."""
    x = np.array([-0.4, 1e-3, 0.3, 1.1, 2.5])
    expected = []
    for value in x:
        damped = [(1 - gamma) * np.eye(n) + gamma * m for m in pairing_matrices(n)]
        steps = [step_matrix(m, value, order=order, **RULES[rule]) for m in damped]
        mean = sum(np.kron(a, a) for a in steps) / len(steps)
        expected.append(math.sqrt(np.abs(np.linalg.eigvals(mean)).max()))
    found = growth(topology("random-pairing", n).damped(gamma), LocalRule(order, **RULES[rule]), x)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-5)


def test_metropolis_modes_lie_inside_the_unit_interval() -> None:
    for graph in itertools.islice(nx.graph_atlas_g(), 60, 120):
        if graph.number_of_nodes() > 1 and nx.is_connected(graph):
            modes = disagreement_modes(from_matrix(metropolis(graph)))
            assert np.abs(modes).max() < 1
