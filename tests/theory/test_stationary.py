from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from landscape.theory.modes import LocalRule, disagreement_modes, growth
from landscape.theory.stationary import disagreement_variance, predicted_consensus, stationary_variance
from landscape.training.topology import Topology, controlled_disagreement, from_matrix, topology

ORDERS = ("awc", "atc", "cta")
BETA = 0.6
X = np.array([-0.02, 0.0, 0.1, 0.5, 0.9])
MU = np.array([-0.3, -0.05, 0.0, 0.2, 0.7])
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": BETA},
    "dampening": {"momentum": BETA, "dampening": 0.3},
    "nesterov": {"momentum": BETA, "nesterov": True},
}
RING, DIRECTED = topology("ring", 6), topology("exponential", 6)
ONE_PEER, PAIRING = topology("one-peer-exponential", 6), topology("random-pairing", 6)
PAIRING_4, DAMPED = topology("random-pairing", 4), PAIRING.damped(0.6)


def variance(mu: Any, x: Any, rule: LocalRule, noise: float = 1.0) -> np.ndarray:
    return stationary_variance(np.asarray(mu), np.asarray(x), np.asarray(noise), rule)


def closed_form(mu: np.ndarray, x: np.ndarray, order: str, beta: float) -> np.ndarray:
    """theory.md sec. 6, momentum formula; at beta = 0 it is the table's."""
    phi = mu + beta - x if order == "awc" else mu * (1 - x) + beta
    q = 1 + beta * mu
    value = q / ((1 - beta * mu) * (q**2 - phi**2)) * (mu**2 if order == "atc" else 1)
    return np.where(np.abs(phi) < q, value, np.inf)


# Closed forms --------------------------------------------------------------------------------------------------------


def test_the_table_without_momentum() -> None:
    mu, x = MU[:, None], X[None, :]
    expected = {
        "awc": 1 / (1 - (mu - x) ** 2),
        "atc": mu**2 / (1 - mu**2 * (1 - x) ** 2),
        "cta": 1 / (1 - mu**2 * (1 - x) ** 2),
    }
    for order in ORDERS:
        stable = np.abs(mu - x) < 1 if order == "awc" else np.abs(mu * (1 - x)) < 1
        found = variance(mu, x, LocalRule(order), 2.5)
        np.testing.assert_allclose(found, np.where(stable, 2.5 * expected[order], np.inf), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("order", ORDERS)
def test_the_momentum_formula(order: str, beta: float) -> None:
    mu, x = MU[:, None], np.concatenate([X, [1.5, 2.4, 3.5]])[None, :]
    expected = closed_form(mu, x, order, beta)
    assert np.isinf(expected).any()
    np.testing.assert_allclose(variance(mu, x, LocalRule(order, beta)), expected, rtol=1e-10, atol=1e-14)


def test_the_variance_at_the_gradient_points_of_cta_is_mu_squared_times_that_at_the_weights() -> None:
    """CTA's v = M w: the variance of ATC, whose weights they are."""
    mu, x = MU[:, None], X[None, :]
    for rule in RULES.values():
        at_weights, at_points = variance(mu, x, LocalRule("cta", **rule)), variance(mu, x, LocalRule("atc", **rule))
        np.testing.assert_allclose(at_points, mu**2 * at_weights, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("order", ["ssgd", *ORDERS])
def test_the_mean(order: str) -> None:
    """Noise c/n, stable for alpha lambda in (0, 2)."""
    x, n = np.array([0.1, 0.5, 1.0, 1.9, 2.0, 2.1, 0.0, -0.1]), 6
    expected = np.array([*(1 / n / (1 - (1 - x[:4]) ** 2)), *[np.inf] * 4])
    np.testing.assert_allclose(variance(1.0, x, LocalRule(order), 1 / n), expected, rtol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_directed_modes_count_by_their_moduli(order: str) -> None:
    mu, x = disagreement_modes(DIRECTED)[0][:, None], X[None, :]
    modulus = np.abs(mu - x) ** 2 if order == "awc" else np.abs(mu) ** 2 * (1 - x) ** 2
    expected = (np.abs(mu) ** 2 if order == "atc" else 1) / (1 - modulus)
    assert np.abs(mu.imag).max() > 0.1
    np.testing.assert_allclose(variance(mu, x, LocalRule(order)), np.where(modulus < 1, expected, np.inf), rtol=1e-12)


@pytest.mark.parametrize("n", [4, 6, 10])
@pytest.mark.parametrize("order", ORDERS)
def test_random_pairing(order: str, n: int) -> None:
    mubar, x, noise = (n - 2) / (2 * (n - 1)), np.array([-0.1, 0.0, 0.3, 1.0, 1.2, 3.0]), np.array([1.0, 2, 3, 4, 5, 6])
    denominator = 1 - mubar * (1 - 2 * x) - x**2 if order == "awc" else 1 - mubar * (1 - x) ** 2
    expected = np.where(denominator > 0, noise * (mubar if order == "atc" else 1) / np.abs(denominator), np.inf)
    found = disagreement_variance(topology("random-pairing", n), LocalRule(order), x, noise)
    assert found.shape == (n - 1, 6)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("graph", [RING, DIRECTED, ONE_PEER, PAIRING], ids=lambda t: t.name)
def test_outside_stability_the_prediction_is_infinite_and_never_negative(
    graph: Topology, order: str, rule: str
) -> None:
    x = np.linspace(-3.0137, 12, 301)  # no round number, at which a threshold may lie
    found = disagreement_variance(graph, LocalRule(order, **RULES[rule]), x, np.ones_like(x))
    assert not np.isnan(found).any()
    assert (found >= 0).all()
    stable = growth(graph, LocalRule(order, **RULES[rule]), x) < 1
    assert np.array_equal(np.isfinite(found).all(0), stable)
    assert 0 < stable.sum() < len(x)


def test_negative_curvature_is_stable_under_awc_down_to_mu_2_minus_1() -> None:
    edge = disagreement_modes(RING).max() - 1
    found = disagreement_variance(RING, LocalRule("awc"), np.array([edge + 1e-6, edge - 1e-6]), np.ones(2))
    assert np.isfinite(found[:, 0]).all()
    assert found[:, 0].max() > 1e5
    assert np.isinf(found[:, 1]).any()


@pytest.mark.parametrize("order", ORDERS)
def test_at_the_edge_of_stability_the_prediction_is_infinite(order: str) -> None:
    split = from_matrix(np.kron(np.eye(2), np.full((2, 2), 0.5)))  # two pairs that never meet: a mode of one
    edge = 2 / 3 if order == "awc" else 4.0
    for graph, x in ((RING, edge), (split, 0.0), (split, 2.0), (from_matrix(np.eye(3)), 0.0)):
        assert np.isinf(disagreement_variance(graph, LocalRule(order), np.array([x]), np.ones(1))).any()
    assert np.isinf(variance([1.0, -1.0, 1.0], [0.0, 0.0, 2.0], LocalRule(order))).all()


def test_modes_that_do_not_separate_are_refused() -> None:
    skewed = from_matrix(np.array([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0, 0.25, 0.5], [0.25, 0, 0.25, 0.5]]))
    with pytest.raises(ValueError, match="graph modes do not separate"):
        disagreement_variance(skewed, LocalRule("awc"), X, X)


# The whole covariance, without modes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("graph", [RING, DIRECTED, ONE_PEER], ids=lambda t: t.name)
def test_variances_solve_the_lyapunov_equation_of_all_learners(
    graph: Topology, order: str, rule: str, step_matrix: Callable, quadratic_step: Callable
) -> None:
    """Iterated to its fixed point over a period, then averaged over it; the sum over graph modes is Tr over learners."""
    n = graph.num_learners
    basis = np.linalg.svd(np.ones((1, n)))[2][1:].T
    for x in (0.05, 0.4):
        steps, sources = [], []
        for matrix in graph.matrices:
            steps.append(step_matrix(matrix, x, order=order, **RULES[rule]))
            blank = np.zeros((n, n))  # each learner's noise alone, a column each
            moved = quadratic_step(blank, blank, matrix, np.full(n, x), np.eye(n), order=order, **RULES[rule])
            gain = np.concatenate([basis.T @ moved[0], basis.T @ moved[1]])
            sources.append(gain @ gain.T)
        covariance, traces = np.zeros_like(sources[0]), []
        for t in range(600 * len(steps)):
            a, source = steps[t % len(steps)], sources[t % len(steps)]
            covariance = a @ covariance @ a.T + source
            traces.append(np.trace(covariance[: n - 1, : n - 1]))
        found = disagreement_variance(graph, LocalRule(order, **RULES[rule]), np.array([x]), np.array([1.0]))
        assert found.sum() == pytest.approx(np.mean(traces[-len(steps) :]), rel=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_variances_under_damped_pairing_solve_the_mean_lyapunov_equation(
    order: str, rule: str, step_matrix: Callable, quadratic_step: Callable
) -> None:
    """E over all matchings of four learners of A Sigma A^T + b b^T, iterated to its fixed point."""
    n, gamma = 4, 0.4
    matchings = [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]]
    basis = np.linalg.svd(np.ones((1, n)))[2][1:].T
    for x in (0.05, 0.4):
        maps, source = [], np.zeros((2 * n - 2, 2 * n - 2))
        for pairs in matchings:
            matrix = (1 - gamma) * np.eye(n)
            for a, b in pairs:
                matrix[np.ix_((a, b), (a, b))] += gamma / 2
            maps.append(step_matrix(matrix, x, order=order, **RULES[rule]))
            blank = np.zeros((n, n))
            moved = quadratic_step(blank, blank, matrix, np.full(n, x), np.eye(n), order=order, **RULES[rule])
            gain = np.concatenate([basis.T @ moved[0], basis.T @ moved[1]])
            source += gain @ gain.T / len(matchings)
        covariance = np.zeros_like(source)
        for _ in range(800):
            covariance = sum(a @ covariance @ a.T for a in maps) / len(maps) + source
        found = disagreement_variance(
            PAIRING_4.damped(gamma), LocalRule(order, **RULES[rule]), np.array([x]), np.ones(1)
        )
        assert found.sum() == pytest.approx(np.trace(covariance[: n - 1, : n - 1]), rel=1e-8)


# Simulations ---------------------------------------------------------------------------------------------------------

CURVATURES = np.array([-0.02, 0.0, 0.2, 0.5])
NOISE = np.array([0.5, 2.0, 1.0, 0.3])


def random_pairings(rng: np.random.Generator, replicas: int, n: int) -> np.ndarray:
    """An independent matching for each replica, (replicas, n, n)."""
    order = rng.random((replicas, n)).argsort(1)
    partner = np.empty_like(order)
    rows = np.arange(replicas)[:, None]
    partner[rows, order[:, 0::2]], partner[rows, order[:, 1::2]] = order[:, 1::2], order[:, 0::2]
    matrices = np.zeros((replicas, n, n))
    matrices[rows, np.arange(n), np.arange(n)] = 0.5
    matrices[rows, np.arange(n), partner] += 0.5
    return matrices


def simulate(graph: Topology, rule: LocalRule, step: Callable, replicas: int = 4000) -> np.ndarray:
    """Weights of independent replicas in their stationary state, (times, replicas, n, h), over one period of M."""
    rng, n = np.random.default_rng(7), graph.num_learners
    weights, buffers = np.zeros((2, replicas, n, len(CURVATURES)))
    burn = math.ceil(math.log(1e-5) / math.log(growth(graph, rule, CURVATURES).max()))
    period = len(graph.matrices)
    kept = []
    for t in range((burn // period + 1) * period + period):
        matrix = graph.matrix(0, t)
        if graph.kind == "random-pairing":
            matrix = controlled_disagreement(random_pairings(rng, replicas, n), graph.gamma)
        noise = np.sqrt(NOISE) * rng.standard_normal(weights.shape)
        weights, buffers = step(weights, buffers, matrix, CURVATURES, noise, order=rule.order, momentum=rule.momentum,
                                dampening=rule.dampening, nesterov=rule.nesterov)  # fmt: skip
        kept = [*kept[-(period - 1) :], weights] if period > 1 else [weights]
    return np.stack(kept)


def assert_within_errors(samples: np.ndarray, expected: np.ndarray) -> None:
    """The mean over the leading axis, of independent samples, within four standard errors."""
    stderr = samples.std(0, ddof=1) / math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) < 4 * stderr).all(), (samples.mean(0) - expected) / stderr
    assert (stderr < 0.05 * np.abs(expected)).all(), "the test would see nothing"


@pytest.mark.parametrize("rule", ["plain", "momentum"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("graph", [RING, DIRECTED, ONE_PEER, PAIRING, DAMPED], ids=lambda t: f"{t.name}-{t.gamma:g}")
def test_simulated_training_on_a_quadratic_matches_the_prediction(
    graph: Topology, order: str, rule: str, quadratic_step: Callable
) -> None:
    local = LocalRule(order, **RULES[rule])
    weights = simulate(graph, local, quadratic_step)
    deviations = weights - weights.mean(2, keepdims=True)
    # Tr Sigma_w, in all and along each Hessian mode
    each = (deviations**2).mean(2).mean(0)
    predicted = disagreement_variance(graph, local, CURVATURES, NOISE)
    assert predicted.shape == (graph.num_learners - 1, len(CURVATURES))
    assert_within_errors(each, predicted.sum(0) / graph.num_learners)
    alpha = 0.1
    total = predicted_consensus(
        graph, local, alpha, np.delete(CURVATURES, 1) / alpha, np.delete(NOISE, 1) / alpha**2, NOISE.sum() / alpha**2
    )
    assert_within_errors(each.sum(1), np.array(total))
    # the mean w_a, where it is stable
    if graph is not ONE_PEER:
        mean_variance = variance(1.0, CURVATURES[2:], local, 1.0) * NOISE[2:] / graph.num_learners
        burnt = growth_of_mean(local, CURVATURES[2:]) < 0.95
        assert_within_errors((weights.mean(2) ** 2)[-1][:, 2:][:, burnt], mean_variance[burnt])
    # and each graph mode, where M does not vary
    if graph.is_static:
        n = graph.num_learners
        modes = np.fft.fft(deviations[-1], axis=1, norm="ortho")[:, 1:]  # both graphs are circulant
        mu = np.fft.fft(graph.matrices[0][:, 0])[1:]
        expected = variance(mu[:, None], CURVATURES[None, :], local) * NOISE
        assert expected.shape == (n - 1, len(CURVATURES))
        noisy = np.abs(mu) > 1e-12 if order == "atc" else np.full(n - 1, True)  # ATC averages a mode of mu = 0 away
        assert_within_errors(np.abs(modes[:, noisy]) ** 2, expected[noisy])
        np.testing.assert_allclose(modes[:, ~noisy], 0, atol=1e-12)


def growth_of_mean(rule: LocalRule, x: np.ndarray) -> np.ndarray:
    return np.abs(np.linalg.eigvals(rule.matrices(np.ones_like(x), x)[0])).max(-1)


# Tr Sigma_w ----------------------------------------------------------------------------------------------------------


def test_the_predicted_consensus_sums_over_both_kinds_of_modes() -> None:
    alpha, eigenvalues, along, trace = 0.1, np.array([6.0, 2.0, -0.5]), np.array([3.0, 1.0, 0.5]), 10.0
    found = predicted_consensus(RING, LocalRule("awc"), alpha, eigenvalues, along, trace)
    mu = disagreement_modes(RING)[0]
    by_hand = 0.0
    for x, c in [*zip(alpha * eigenvalues, along, strict=True), (0.0, trace - along.sum())]:
        by_hand += sum(alpha**2 * c / (1 - (m - x) ** 2) for m in mu) / 6
    assert found == pytest.approx(by_hand, rel=1e-12)


def test_the_predicted_consensus_without_eigenvalues_and_beyond_the_trace() -> None:
    mu, none = disagreement_modes(RING)[0], np.array([])
    flat = predicted_consensus(RING, LocalRule("awc"), 0.1, none, none, 4.0)
    assert flat == pytest.approx(0.01 * 4.0 * (1 / (1 - mu**2)).sum() / 6, rel=1e-12)
    # an estimate of the trace below what was found along the eigenvectors leaves nothing outside them, not less than nothing
    beyond = predicted_consensus(RING, LocalRule("awc"), 0.1, np.array([2.0]), np.array([5.0]), 4.0)
    assert beyond == pytest.approx(
        predicted_consensus(RING, LocalRule("awc"), 0.1, np.array([2.0]), np.array([5.0]), 5.0), rel=1e-14
    )


def test_the_predicted_consensus_outside_stability_and_of_one_learner() -> None:
    arguments = (0.1, np.array([100.0, 1.0]), np.array([1.0, 1.0]), 3.0)
    assert predicted_consensus(RING, LocalRule("awc"), *arguments) == math.inf
    assert predicted_consensus(topology("random-pairing", 6), LocalRule("awc"), *arguments) == math.inf
    for name in ("ring", "random-pairing", "one-peer-exponential"):
        assert predicted_consensus(topology(name, 1), LocalRule("awc"), *arguments) == 0
    # an unstable mode without noise of its own adds none
    assert np.isfinite(predicted_consensus(RING, LocalRule("awc"), 0.1, np.array([100.0]), np.array([0.0]), 3.0))


def test_weight_decay_adds_to_every_curvature() -> None:
    ring, rule, eigenvalues, noise = topology("ring", 6), LocalRule("awc"), np.array([1.0, 0.3]), np.array([0.5, 0.2])
    found = predicted_consensus(ring, rule, 0.2, eigenvalues, noise, 1.5, weight_decay=0.1)
    shifted = np.append(eigenvalues, 0.0) + 0.1
    everything = disagreement_variance(ring, rule, 0.2 * shifted, 0.04 * np.array([0.5, 0.2, 0.8])).sum() / 6
    assert found == pytest.approx(everything, rel=1e-12)
    assert found < predicted_consensus(ring, rule, 0.2, eigenvalues, noise, 1.5)
