from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import chi2

from landscape.curvature.lanczos import Eigenpairs
from landscape.theory.disagreement import disagreement_spectrum, ratio_interval
from landscape.theory.learner_covariance import disagreement_vectors, learner_covariance
from landscape.theory.modes import LocalRule, disagreement_modes, growth
from landscape.theory.stationary import disagreement_variance, predicted_consensus
from landscape.training.topology import Topology, from_matrix, topology

ALPHA = 0.1
X = np.array([0.6, 0.3, 0.1, *[0.0] * 7])  # alpha lambda; the last seven are the flat rest of the weights
NOISE = np.array([1.0, 2.0, 0.5, *[0.3] * 7])  # alpha^2 c
K = 3
NAMES = ["ring", "complete", "exponential", "one-peer-exponential", "random-pairing", "torus", "star"]


def pairs(k: int = K, dimension: int = len(X)) -> Eigenpairs:
    vectors = torch.eye(dimension, k, dtype=torch.float64)
    return Eigenpairs(X[:k] / ALPHA, vectors, np.zeros(k), np.ones(k, bool), 0, 0, 1.0, {})


def spectrum(deviations: np.ndarray, graph: Topology, rule: LocalRule, k: int = K, **more: Any) -> xr.Dataset:
    given = {"learning_rate": ALPHA, "noise_along": NOISE[:k] / ALPHA**2, "noise_trace": float(NOISE.sum()) / ALPHA**2}
    return disagreement_spectrum(torch.as_tensor(deviations), pairs(k), graph, rule, **{**given, **more})


def centred(*shape: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return drawn - drawn.mean(-2, keepdims=True)


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("name", NAMES)
def test_the_vectors_are_orthonormal_joint_eigenvectors_in_the_order_of_the_modes(name: str, n: int) -> None:
    graph = topology(name, n)
    vectors, modes = disagreement_vectors(graph), disagreement_modes(graph)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(n - 1), atol=1e-12)
    np.testing.assert_allclose(vectors.sum(0), 0, atol=1e-12)
    for matrix, mode in zip(graph.matrices, modes, strict=True):
        np.testing.assert_allclose(matrix @ vectors, vectors * mode, atol=1e-9)
    assert np.isrealobj(vectors) == (graph.is_symmetric and graph.kind != "periodic")


def test_one_learner_has_no_modes_and_matrices_without_common_ones_are_refused() -> None:
    assert disagreement_vectors(topology("ring", 1)).shape == (1, 0)
    skewed = np.array([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0, 0.25, 0.5], [0.25, 0, 0.25, 0.5]])
    with pytest.raises(ValueError, match="do not separate"):
        disagreement_vectors(from_matrix(skewed))


# Energies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_energies_add_up_to_the_consensus_trace(name: str, samples: int) -> None:
    n, graph = 8, topology(name, 8)
    deviations = centred(samples, n, 10)
    found = spectrum(deviations, graph, LocalRule())
    trace = (deviations**2).sum((1, 2)).mean() / n
    assert float(found["consensus_trace"]) == pytest.approx(trace)
    assert float(found["energy"].sum() + found["outside_energy"].sum()) / n == pytest.approx(trace)
    np.testing.assert_allclose(found["mode_energy"], (deviations[..., :K] ** 2).sum(1).mean(0) / n)
    np.testing.assert_allclose(found["consensus_share"] * trace, found["mode_energy"])
    by_hand = np.abs(np.einsum("ja,sjk->sak", disagreement_vectors(graph).conj(), deviations[..., :K])) ** 2
    np.testing.assert_allclose(found["energy"], by_hand.mean(0), atol=1e-12)
    assert found.attrs["num_samples"] == samples
    assert all({"long_name", "units"} <= set(found[key].attrs) for key in found if "verdict" not in str(key))


@pytest.mark.parametrize("order", ["awc", "atc", "cta"])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_the_stationary_variances(name: str, order: str) -> None:
    graph, rule = topology(name, 8), LocalRule(order, 0.3)
    found = spectrum(centred(8, 10), graph, rule)
    x, c = np.append(X[:K], 0.0), np.append(NOISE[:K], NOISE[K:].sum())
    expected = disagreement_variance(graph, rule, x, c)
    np.testing.assert_allclose(found["energy_predicted"], expected[:, :K], rtol=1e-9, atol=1e-20)
    np.testing.assert_allclose(found["outside_energy_predicted"], expected[:, K], rtol=1e-9, atol=1e-20)
    total = predicted_consensus(graph, rule, ALPHA, X[:K] / ALPHA, NOISE[:K] / ALPHA**2, NOISE.sum() / ALPHA**2)
    assert float(found["consensus_trace_predicted"]) == pytest.approx(total)
    ratio = (
        found["mode_energy"] * 8 / expected[:, :K].sum(0)
        if expected.any() and expected.max() > 1e-20
        else np.full(K, np.nan)
    )
    np.testing.assert_allclose(found["energy_ratio"], ratio)


def test_deviations_need_not_be_centred_nor_float64() -> None:
    deviations, graph = centred(8, 10), topology("ring", 8)
    plain = spectrum(deviations, graph, LocalRule())
    moved = spectrum(deviations + 5.0, graph, LocalRule())
    xr.testing.assert_allclose(
        plain.drop_vars(["verdict", "outside_verdict"]), moved.drop_vars(["verdict", "outside_verdict"]), rtol=1e-8
    )
    short = spectrum(deviations.astype(np.float32), graph, LocalRule())
    np.testing.assert_allclose(short["energy_ratio"], plain["energy_ratio"], rtol=1e-5)


def test_the_whole_space_leaves_nothing_outside() -> None:
    found = spectrum(centred(8, 10), topology("ring", 8), LocalRule(), 10)
    np.testing.assert_allclose(found["outside_energy"], 0, atol=1e-12)
    assert np.isnan(found["outside_ratio"])
    assert str(found["outside_verdict"].values) == "not applicable"


# Intervals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "count"), [(1, 1), (1, 2), (2, 1), (7, 1), (3, 5), (15, 1), (7, 100)])
def test_intervals_of_equal_variances_are_those_of_chi_square(m: int, count: int) -> None:
    low, high = ratio_interval(np.full(m, 1e-9), count)
    degrees = m * count
    assert chi2.cdf(degrees / low, degrees) == pytest.approx(0.975, abs=1e-3)
    assert chi2.cdf(degrees / high, degrees) == pytest.approx(0.025, abs=3e-3)


@pytest.mark.parametrize(
    "variances",
    [
        [1.0, 0.5],
        [1.0, 0.02],
        [0.11, 0.11, 0.78],
        [1.0, *[0.01] * 5],
        [10.0, 3.0, *[1.0] * 5],
        [1.0, 0.0, 0.0],
        list(0.5 ** np.arange(15)),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_intervals_of_unequal_variances_cover(variances: list[float], count: int) -> None:
    s = np.array(variances)
    energies = np.random.default_rng(0).chisquare(count, (100_000, len(s))) @ s / count
    low, high = ratio_interval(s, count)
    missed = [np.mean(energies / s.sum() * high < 1), np.mean(energies / s.sum() * low > 1)]
    np.testing.assert_allclose(missed, 0.025, atol=4e-3)


def simulate(
    graph: Topology, rule: LocalRule, step: Callable, replicas: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Deviations (replicas, n, d) of independent runs on the quadratic that began equal and met the same matrices, (T, n, n)."""
    rng, n = np.random.default_rng(3), graph.num_learners
    weights, buffers = np.zeros((2, replicas, n, len(X)))
    fastest = max(float(growth(graph, rule, X).max()), 0.1)
    matrices = [graph.matrix(seed, t) for t in range(math.ceil(math.log(1e-3) / math.log(fastest)) + 2)]
    for matrix in matrices:
        noise = np.sqrt(NOISE) * rng.standard_normal(weights.shape)
        weights, buffers = step(weights, buffers, matrix, X, noise, order=rule.order, momentum=rule.momentum)
    return weights - weights.mean(1, keepdims=True), np.array(matrices)


REPLICAS = 2000
GRAPHS = [
    *[("ring", 2), ("ring", 4), ("ring", 8), ("exponential", 6), ("complete", 4)],
    *[("one-peer-exponential", 8), ("random-pairing", 8), ("random-pairing", 5), ("random-pairing", 2)],
]


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("order", ["awc", "atc", "cta"])
@pytest.mark.parametrize(("name", "n"), GRAPHS)
def test_intervals_cover_on_simulated_training(
    name: str, n: int, order: str, momentum: float, quadratic_step: Callable
) -> None:
    graph, rule = topology(name, n), LocalRule(order, momentum)
    deviations, matrices = simulate(graph, rule, quadratic_step, REPLICAS)
    history = None if graph.is_static else matrices
    one, together = (spectrum(part, graph, rule, history=history) for part in (deviations[0], deviations))
    if order == "atc" and (name == "complete" or n == 2):  # exact averaging: no disagreement, and none predicted
        assert np.isnan(one["energy_ratio"]).all()
        assert (one["verdict"] == "not applicable").all()
        assert np.abs(deviations).max() < 1e-12
        return
    ratios = (deviations[..., :K] ** 2).sum(1) / n / one["mode_energy_predicted"].values
    assert ratios[0] == pytest.approx(one["energy_ratio"].values)
    low, high = (ratios * (one[f"energy_ratio_{end}"] / one["energy_ratio"]).values for end in ("low", "high"))
    covered = np.mean((low <= 1) & (high >= 1), 0)
    assert (np.abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / REPLICAS)).all(), covered
    # the replicas together leave no doubt, whether the noise is as given or not
    np.testing.assert_allclose(together["energy_ratio"], ratios.mean(0), rtol=1e-10)
    assert (together["verdict"] == "agrees").all()
    assert str(together["outside_verdict"].values) == "agrees"
    assert (together["energy_ratio_high"] - together["energy_ratio_low"] < 0.35).all()
    wrong = spectrum(deviations, graph, rule, history=history, noise_along=NOISE[:K] / ALPHA**2 / 2)
    assert (wrong["verdict"] == "disagrees").all()
    graph_mode = together["energy"] / together["energy_predicted"].where(together["energy_predicted"] > 1e-12)
    assert np.abs(graph_mode - 1).max() < 6 * math.sqrt(2 / REPLICAS)


@pytest.mark.parametrize(("name", "n"), [("ring", 3), ("ring", 4), ("ring", 8), ("exponential", 8)])
def test_the_interval_outside_the_eigenspace_covers(name: str, n: int, quadratic_step: Callable) -> None:
    """The rank of the noise is estimated along with it: 7, of so few learners."""
    graph, rule = topology(name, n), LocalRule()
    deviations, _ = simulate(graph, rule, quadratic_step, 300)
    found = [spectrum(one, graph, rule) for one in deviations]
    covered = np.mean([bool(f["outside_ratio_low"] <= 1 <= f["outside_ratio_high"]) for f in found])
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / 300) < covered < 1
    assert float(spectrum(deviations, graph, rule)["outside_rank"]) == pytest.approx(7, rel=0.3)


def test_without_the_matrices_drawn_the_average_over_them_is_predicted(quadratic_step: Callable) -> None:
    graph, rule = topology("random-pairing", 6), LocalRule("awc")
    runs = [simulate(graph, rule, quadratic_step, 20, seed) for seed in range(100)]
    found = spectrum(np.concatenate([deviations for deviations, _ in runs]), graph, rule)
    assert (np.abs(found["energy_ratio"] - 1) < 0.1).all()
    given = [learner_covariance(graph, rule, X[:1], history)[1][0].trace() for _, history in runs]
    average = learner_covariance(graph, rule, X[:1])[1][0].trace()
    assert abs(np.mean(given) - average) < 4 * np.std(given) / 10
    assert np.std(given) / 10 < 0.05 * average


@pytest.mark.parametrize("order", ["awc", "atc", "cta"])
@pytest.mark.parametrize("name", ["ring", "exponential", "one-peer-exponential", "random-pairing"])
def test_a_long_history_of_a_static_graph_is_the_stationary_state(name: str, order: str) -> None:
    graph, rule = topology(name, 6), LocalRule(order, 0.4, 0.2, True)
    x = np.array([0.0, 0.2, 50.0])
    variances, covariances = learner_covariance(graph, rule, x)
    assert np.isinf(variances[:, 2]).any()
    assert np.isnan(covariances[2]).all()
    np.testing.assert_allclose(covariances[:2].sum(2), 0, atol=1e-12)
    history = np.array([graph.matrix(0, t) for t in range(400 * len(graph.matrices))])
    given, drawn = learner_covariance(graph, rule, x, history)
    assert np.array_equal(np.isinf(given), np.isinf(variances))
    if graph.is_static:
        np.testing.assert_allclose(drawn, covariances, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(given[:, :2], variances[:, :2], rtol=1e-9, atol=1e-12)
    if graph.kind == "periodic":  # the mean over the phases of a period
        phases = [learner_covariance(graph, rule, x, history[: len(history) - phase])[1] for phase in range(3)]
        np.testing.assert_allclose(np.mean(phases, 0), covariances, rtol=1e-9, atol=1e-12)


def test_the_variance_at_w_is_meant_under_cta_not_the_one_at_v(quadratic_step: Callable) -> None:
    graph, rule = topology("ring", 4), LocalRule("cta")
    weights, _ = simulate(graph, rule, quadratic_step, 2000)
    assert (spectrum(weights, graph, rule)["verdict"] == "agrees").all()
    assert (spectrum(graph.matrices[0] @ weights, graph, rule)["verdict"] == "disagrees").all()


# Verdicts ------------------------------------------------------------------------------------------------------------


def test_one_checkpoint_of_eight_learners_never_agrees() -> None:
    found = spectrum(centred(8, 10), topology("ring", 8), LocalRule())
    assert not (found["verdict"] == "agrees").any()


def test_an_unstable_mode_is_predicted_infinite_and_never_agrees() -> None:
    graph, rule = topology("ring", 6), LocalRule("awc")  # stable below alpha lambda = 2/3
    steep = Eigenpairs(
        np.array([20.0, 3.0]), torch.eye(10, 2, dtype=torch.float64), np.zeros(2), np.ones(2, bool), 0, 0, 1.0, {}
    )
    given = {"learning_rate": ALPHA, "noise_trace": 10.0}
    found = disagreement_spectrum(
        torch.as_tensor(centred(6, 10)), steep, graph, rule, noise_along=np.array([1.0, 1.0]), **given
    )
    assert np.isinf(found["mode_energy_predicted"][0])
    assert np.isinf(found["consensus_trace_predicted"])
    assert np.isfinite(found["mode_energy_predicted"][1])
    assert found["energy_ratio"].values[0] == found["energy_ratio_high"].values[0] == 0
    assert str(found["verdict"].values[0]) == "disagrees"
    quiet = disagreement_spectrum(
        torch.as_tensor(centred(6, 10)), steep, graph, rule, noise_along=np.array([0.0, 1.0]), **given
    )
    assert float(quiet["mode_energy_predicted"][0]) == 0
    assert str(quiet["verdict"].values[0]) == "not applicable"
    assert np.isfinite(quiet["consensus_trace_predicted"])


def test_learners_that_agree() -> None:
    found = spectrum(np.zeros((8, 10)), topology("ring", 8), LocalRule())
    assert float(found["consensus_trace"]) == 0
    assert np.isnan(found["consensus_share"]).all()
    assert (found["energy_ratio"] == 0).all()
    assert (found["verdict"] == "disagrees").all()  # noise would have driven them apart


def test_refusals() -> None:
    ring = topology("ring", 8)
    with pytest.raises(ValueError, match="one learner"):
        spectrum(np.zeros((1, 10)), topology("ring", 1), LocalRule())
    for shape in ((7, 10), (8, 9), (0, 8, 10), (10,)):
        with pytest.raises(ValueError, match="deviations of shape"):
            spectrum(np.zeros(shape), ring, LocalRule())
    with pytest.raises(ValueError, match="history of shape"):
        spectrum(centred(8, 10), ring, LocalRule(), history=np.ones((3, 7, 7)))
    with pytest.raises(ValueError, match="noise_along"):
        spectrum(centred(8, 10), ring, LocalRule(), noise_along=np.ones(2))
    with pytest.raises(ValueError, match="nan or infinity"):
        spectrum(np.full((8, 10), math.nan), ring, LocalRule())
