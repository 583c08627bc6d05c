"""Spectra and traces of noise covariances: dense truth, closed forms, expectations over samples, and errors that hold what they say."""

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.noise.covariance import (
    column_blocks,
    covariance_spectrum,
    draw_examples,
    gradient_covariance_eigenvectors,
    gradient_covariance_spectrum,
    gradient_covariance_summary,
    leading_eigenvectors,
    replica_covariance,
)
from landscape.noise.spectrum import block_spectrum
from landscape.objective import Objective
from tests.curvature.cases import CASES
from tests.noise.test_gram import DRAWN, labels, loop_of_backwards, random

QUANTITIES = ("trace", "frobenius_squared", "effective_rank")


def dense(rows: np.ndarray, divisor: float) -> np.ndarray:
    return rows.T @ rows / divisor


def truth(covariance: np.ndarray) -> dict[str, float]:
    trace, squared = float(covariance.trace()), float((covariance**2).sum())
    return {"trace": trace, "frobenius_squared": squared, "effective_rank": trace**2 / squared if squared else math.nan}


def network(count: int = 60, dtype: torch.dtype = torch.float64) -> tuple[Objective, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (random(count, 5), labels(count, 3)), dtype=dtype)
    return objective, objective.model.initial_weights()[0]


# All examples: exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_all_examples_give_the_dense_covariance(name: str) -> None:
    """Whatever the network and the weights of its examples; as a whole and by layers; with errors of 0."""
    case = CASES[name]
    objective = case.objective()
    rows = loop_of_backwards(objective, case.weights).numpy()
    centred = rows - rows.mean(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be batched", category=UserWarning)
        found = gradient_covariance_spectrum(objective, case.weights, num_examples=None)
    blocks = column_blocks(objective)
    assert found.blocks == ("all", *blocks)
    assert (found.num_samples, found.population, found.centre) == (13, 13, "exact")
    for i, parts in enumerate([[slice(0, len(case.weights))], *blocks.values()]):
        own = dense(np.concatenate([centred[:, part] for part in parts], axis=1), 13)
        for quantity in QUANTITIES:
            value = getattr(found, quantity)[i]
            np.testing.assert_allclose(value, truth(own)[quantity], rtol=1e-8, atol=1e-14)
            assert getattr(found, f"{quantity}_stderr")[i] == 0
        expected = np.zeros(13)
        expected[: len(own)] = np.linalg.eigvalsh(own)[::-1][:13]
        np.testing.assert_allclose(found.eigenvalues[i], expected, rtol=1e-8, atol=1e-12 * max(1.0, own.trace()))
        assert found.sizes[i] == len(own)


def test_summary_of_every_network_is_dense() -> None:
    for name in DRAWN:
        case = CASES[name]
        objective = case.objective()
        rows = loop_of_backwards(objective, case.weights)
        covariance = torch.cov(rows.T, correction=0)
        directions = torch.linalg.qr(random(len(case.weights), 3)).Q
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cannot be batched", category=UserWarning)
            found = gradient_covariance_summary(objective, case.weights, directions, chunk=3)
            alone = gradient_covariance_summary(objective, case.weights)
        assert found.trace == pytest.approx(float(covariance.trace()), rel=1e-10)
        assert alone.trace == pytest.approx(found.trace, rel=1e-12)
        assert alone.along.shape == (0,)
        np.testing.assert_allclose(found.along, (directions.T @ covariance @ directions).diagonal().numpy(), rtol=1e-8, atol=1e-14)  # fmt: skip
        assert found.gradient_norm_squared == pytest.approx(float(rows.mean(0) @ rows.mean(0)), rel=1e-10)
        assert found.num_examples == 13


def test_summary_and_spectrum_agree() -> None:
    objective, weights = network()
    summary = gradient_covariance_summary(objective, weights)
    whole = gradient_covariance_spectrum(objective, weights, by="whole")
    assert whole.blocks == ("all",)
    assert summary.trace == pytest.approx(float(whole.trace[0]), rel=1e-10)
    assert summary.noise_scale == pytest.approx(summary.trace / summary.gradient_norm_squared)


# Samples of examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", ["mean", "gradient", "given"])
def test_a_sample_is_its_own_dense_covariance(centre: str) -> None:
    objective, weights = network()
    rows = loop_of_backwards(objective, weights)
    gradient = objective.gradient(weights)
    indices = draw_examples(objective, 20, seed=3)
    assert indices is not None
    chosen: Any = gradient if centre == "given" else centre
    found = gradient_covariance_spectrum(objective, weights, num_examples=20, seed=3, centre=chosen, by="parameter")
    taken = rows[indices] - (rows[indices].mean(0) if centre == "mean" else gradient)
    covariance = dense(taken.numpy(), 19 * 60 / 59 if centre == "mean" else 20)
    assert found.centre == ("mean" if centre == "mean" else "exact")
    assert found.trace[0] == pytest.approx(covariance.trace(), rel=1e-10)
    expected = np.linalg.eigvalsh(covariance)[::-1][:20]
    expected[19 if centre == "mean" else 20 :] = 0
    np.testing.assert_allclose(found.eigenvalues[0], expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.eigenvalues.sum(1), found.trace, rtol=1e-10)
    np.testing.assert_allclose(found.trace[1:].sum(), found.trace[0], rtol=1e-10)
    assert (np.count_nonzero(found.eigenvalues, axis=1) <= np.minimum(found.sizes, 20)).all()


@pytest.mark.slow
@pytest.mark.parametrize("centre", ["mean", "gradient"])
def test_samples_without_replacement_are_unbiased_for_the_whole(centre: Any) -> None:
    """Over 300 samples of 25 of 60 examples: traces within 4 standard errors of all the data's, errors of the size that they state."""
    objective, weights = network()
    rows = loop_of_backwards(objective, weights).numpy()
    exact = truth(dense(rows - rows.mean(0), 60))
    found = [
        gradient_covariance_spectrum(objective, weights, num_examples=25, seed=seed, centre=centre, by="whole")
        for seed in range(300)
    ]
    for quantity in ("trace", "frobenius_squared"):
        values = np.array([getattr(f, quantity)[0] for f in found])
        errors = np.array([getattr(f, f"{quantity}_stderr")[0] for f in found])
        assert abs(values.mean() - exact[quantity]) < 4 * values.std(ddof=1) / math.sqrt(300)
        assert 0.8 < math.sqrt(np.mean(((values - exact[quantity]) / errors) ** 2)) < 1.3
        assert 0.8 < values.std() / math.sqrt(np.mean(errors**2)) < 1.25


def test_single_precision_keeps_the_traces() -> None:
    double, single = network(), network(dtype=torch.float32)
    exact, found = (gradient_covariance_spectrum(o, w, num_examples=40) for o, w in (double, single))
    for quantity in QUANTITIES:
        np.testing.assert_allclose(getattr(found, quantity), getattr(exact, quantity), rtol=1e-5)


def test_eigenvectors_in_weight_space() -> None:
    objective, weights = network()
    rows = loop_of_backwards(objective, weights)
    for centre in ("mean", "gradient"):
        values, vectors = gradient_covariance_eigenvectors(
            objective, weights, 3, num_examples=20, seed=1, centre=centre
        )  # type: ignore[arg-type]
        indices = draw_examples(objective, 20, seed=1)
        assert indices is not None
        taken = rows[indices] - (rows[indices].mean(0) if centre == "mean" else rows.mean(0))
        covariance = taken.T @ taken / (19 * 60 / 59 if centre == "mean" else 20)
        torch.testing.assert_close(covariance @ vectors, vectors * torch.from_numpy(values))
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="eigenvalues that are not zero"):
        gradient_covariance_eigenvectors(objective, weights, 20, num_examples=20)


def test_which_examples() -> None:
    objective, weights = network()
    assert draw_examples(objective, None) is None
    assert draw_examples(objective, 60) is None
    one, other = draw_examples(objective, 30, 0), draw_examples(objective, 30, 1)
    assert one is not None
    assert other is not None
    assert len(set(one.tolist())) == 30
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="num_examples=None"):
        gradient_covariance_spectrum(CASES["mlp"].objective(), CASES["mlp"].weights, num_examples=5)
    with pytest.raises(ValueError, match="at least 1"):
        draw_examples(objective, 0)
    with pytest.raises(ValueError, match="at least two samples"):
        gradient_covariance_spectrum(objective, weights, num_examples=1)


# Traces: expectations and errors ---------------------------------------------------------------------------------


def populations() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "isotropic, d > m": rng.standard_normal((400, 200)),
        "isotropic, d < m": rng.standard_normal((400, 3)),
        "spiked": rng.standard_normal((400, 100)) * np.r_[6, 3, np.ones(98)],
        "low rank, far from 0": rng.standard_normal((400, 4)) @ rng.standard_normal((4, 60)) + 5,
        "badly scaled": rng.standard_normal((400, 50)) * np.geomspace(1, 1e-6, 50),
        "heavy tails": rng.standard_t(6, size=(400, 30)),
    }


POPULATIONS = populations()


@pytest.mark.slow
@pytest.mark.parametrize("at_mean", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("name", POPULATIONS)
def test_traces_are_unbiased_and_errors_hold(name: str, replaced: bool, at_mean: bool) -> None:
    """600 samples of 100 from 400: means within 4 standard errors, |z| of the size it should have; the rank's small bias within its error."""
    rows = POPULATIONS[name]
    exact = truth(np.cov(rows.T, bias=True))
    rng = np.random.default_rng(5)
    found = []
    for _ in range(600):
        taken = rows[rng.integers(400, size=100) if replaced else rng.permutation(400)[:100]]
        taken = torch.from_numpy(taken - (taken if at_mean else rows).mean(0))
        found.append(block_spectrum("all", rows.shape[1], taken @ taken.T, population=None if replaced else 400, at_mean=at_mean))  # fmt: skip
    for quantity in QUANTITIES:
        values = np.array([getattr(f, quantity).value for f in found])
        errors = np.array([getattr(f, quantity).stderr for f in found])
        spread = values.std(ddof=1)
        if quantity == "effective_rank":
            assert abs(values.mean() - exact[quantity]) < 0.4 * spread
        else:
            assert abs(values.mean() - exact[quantity]) < 4 * spread / math.sqrt(600)
        assert 0.7 < spread / math.sqrt(np.mean(errors**2)) < 1.25
        assert 0.7 < math.sqrt(np.mean(((values - exact[quantity]) / errors) ** 2)) < 1.5


def test_every_sample_of_a_small_population_averages_to_the_truth() -> None:
    """The mean over all samples, with and without replacement, is the population's value to rounding: no tolerance is needed."""
    rows = np.random.default_rng(3).standard_normal((8, 4)) * [5, 1, 1, 0.1] + 2
    few = rows[:3]
    for at_mean in (True, False):
        for size in (4, 5, 7):
            check(rows, itertools.combinations(range(8), size), 8, at_mean)
        for size in (4, 5):
            check(few, itertools.product(range(3), repeat=size), None, at_mean)
    check(rows, itertools.combinations(range(8), 2), 8, False)
    check(few, itertools.product(range(3), repeat=2), None, False)


def check(rows: np.ndarray, samples: Iterator[tuple[int, ...]], population: int | None, at_mean: bool) -> None:
    exact = truth(np.cov(rows.T, bias=True))
    found = []
    for chosen in samples:
        taken = torch.from_numpy(rows[list(chosen)] - (rows[list(chosen)] if at_mean else rows).mean(0))
        one = block_spectrum("all", rows.shape[1], taken @ taken.T, population=population, at_mean=at_mean)
        found.append([one.trace.value, one.frobenius_squared.value])
    np.testing.assert_allclose(np.mean(found, 0), [exact["trace"], exact["frobenius_squared"]], rtol=1e-10)


def test_the_plain_off_diagonal_sum_is_what_the_correction_is_for() -> None:
    """Centred at the sample's mean, sum_{i != k} (c_i . c_k)^2/(m (m - 1)) is biased, by far for few samples of many dimensions."""
    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(400):
        rows = torch.from_numpy(rng.standard_normal((10, 300)))
        rows -= rows.mean(0)
        gram = rows @ rows.T
        plain.append(float(gram.square().sum() - gram.diagonal().square().sum()) / 90)
        corrected.append(block_spectrum("all", 300, gram).frobenius_squared.value)
    assert np.mean(plain) > 3 * 300
    assert abs(np.mean(corrected) - 300) < 4 * np.std(corrected) / 20


def test_degenerate_samples() -> None:
    zero = covariance_spectrum(torch.zeros(6, 4))
    assert zero.trace[0] == zero.frobenius_squared[0] == zero.trace_stderr[0] == 0
    assert math.isnan(zero.effective_rank[0])
    assert not zero.eigenvalues.any()
    two = covariance_spectrum(torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64))
    np.testing.assert_allclose(two.eigenvalues[0], [2, 0], atol=1e-15)
    assert two.trace[0] == 2
    assert math.isnan(two.frobenius_squared[0])  # two vectors about their mean cannot tell it
    assert math.isnan(two.trace_stderr[0])
    known = covariance_spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0]], dtype=torch.float64), centre=None)
    assert known.frobenius_squared[0] == pytest.approx((0 + 9 + 16) / 3)
    equal = covariance_spectrum(torch.full((5, 3), 7.0))
    assert equal.trace[0] == 0


# Rows ------------------------------------------------------------------------------------------------------------


class Counted:
    """Rows read by columns, with a note of how wide."""

    def __init__(self, rows: Tensor, limit: int) -> None:
        self.rows, self.limit, self.widths = rows, limit, []  # type: ignore[var-annotated]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.rows.shape[1]

    def columns(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        step = min(width, self.limit)
        for start in range(0, self.rows.shape[1], step):
            part = slice(start, min(start + step, self.rows.shape[1]))
            self.widths.append(part.stop - part.start)
            yield part, self.rows[:, part]


@pytest.mark.parametrize("count", [12, 60])
@pytest.mark.parametrize("centre", ["mean", None, "vector"])
def test_rows_in_blocks_of_columns(centre: Any, count: int) -> None:
    rows = random(count, 37) * torch.linspace(0.1, 3, 37, dtype=torch.float64) + 2
    mean = torch.linspace(1, 3, 37, dtype=torch.float64)
    blocks = {"b": [slice(20, 30)], "a": [slice(0, 5), slice(30, 37)], "unit": [slice(6, 7)]}
    chosen = mean if centre == "vector" else centre
    streamed = Counted(rows, 4)
    found = covariance_spectrum(streamed, blocks=blocks, centre=chosen, scale=3)
    assert max(streamed.widths) == 4
    whole = covariance_spectrum(rows, blocks=blocks, centre=chosen, scale=3)
    assert found.blocks == ("all", "b", "a", "unit")
    np.testing.assert_array_equal(found.sizes, [37, 10, 12, 1])
    shift = rows.mean(0) if centre == "mean" else torch.zeros(37) if centre is None else mean
    centred = 3 * (rows - shift).numpy()
    divisor = count - 1 if centre == "mean" else count
    for i, parts in enumerate([[slice(0, 37)], *blocks.values()]):
        own = dense(np.concatenate([centred[:, part] for part in parts], axis=1), divisor)
        expected = np.zeros(count)
        expected[: len(own)] = np.linalg.eigvalsh(own)[::-1][:count]
        np.testing.assert_allclose(found.eigenvalues[i], expected, atol=1e-12 * own.trace())
        assert found.trace[i] == pytest.approx(own.trace())
    for quantity in QUANTITIES:
        np.testing.assert_allclose(getattr(found, quantity), getattr(whole, quantity), rtol=1e-12)


def test_rows_of_a_known_covariance() -> None:
    """Minibatch gradients times sqrt(B) have the covariance of the examples', whose traces are known."""
    variances = np.r_[25.0, 4.0, np.full(40, 0.5)]
    rng = np.random.default_rng(0)
    rows = torch.from_numpy((rng.standard_normal((500, 16, 42)) * np.sqrt(variances)).mean(1) + 3)
    found = covariance_spectrum(rows, scale=4.0)
    for quantity, true in truth(np.diag(variances)).items():
        number = found.estimate(quantity)
        assert abs(number.value - true) < 4 * number.stderr
        assert number.stderr < 0.2 * true
    values, vectors = leading_eigenvectors(rows, 2, scale=4.0)
    np.testing.assert_allclose(values, found.eigenvalues[0][:2], rtol=1e-10)
    assert float(vectors[0, 0].abs()) > 0.99
    assert float(vectors[1, 1].abs()) > 0.95


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_leading_eigenvectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = (random(*shape) + 1).to(dtype)
    values, vectors = leading_eigenvectors(Counted(rows, 7), 4)
    covariance = torch.cov(rows.T.double())
    assert vectors.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(covariance @ vectors.double(), vectors.double() * torch.from_numpy(values), **tolerance)
    torch.testing.assert_close(vectors.double().T @ vectors.double(), torch.eye(4, dtype=torch.float64), **tolerance)
    with pytest.raises(ValueError, match=f"has {min(shape[0] - 1, shape[1])} eigenvalues that are not zero; k=7"):
        leading_eigenvectors(rows, 7)


def test_long_single_precision_rows_far_from_their_mean() -> None:
    """The mean is taken off before rows are multiplied: noise a thousandth of it is still seen."""
    noise = torch.randn(20, 100_000, generator=torch.Generator().manual_seed(0))
    found = covariance_spectrum(1000 + noise)
    assert abs(float(found.trace[0]) / 100_000 - 1) < 0.01


def test_rows_input() -> None:
    rows = random(5, 6)
    with pytest.raises(ValueError, match="at least two noise vectors"):
        covariance_spectrum(rows[:1])
    with pytest.raises(ValueError, match="row 3 holds nan"):
        covariance_spectrum(torch.where(torch.arange(5)[:, None] == 3, math.nan, rows))
    with pytest.raises(ValueError, match="overlap"):
        covariance_spectrum(rows, blocks={"a": [slice(0, 3)], "b": [slice(2, 4)]})
    with pytest.raises(ValueError, match="not among 6"):
        covariance_spectrum(rows, blocks={"a": [slice(3, 7)]})
    with pytest.raises(ValueError, match="a centre of 5 numbers"):
        covariance_spectrum(Counted(rows, 3), centre=torch.zeros(5))
    with pytest.raises(ValueError, match="cannot be drawn"):
        block_spectrum("all", 3, torch.eye(4, dtype=torch.float64), population=3)


def test_spectrum_dataset() -> None:
    found = covariance_spectrum(random(10, 6), blocks={"a": [slice(0, 3)]}, scale=2)
    made = found.to_xarray()
    assert list(made["eigenvalue"].dims) == ["block", "eigen_index"]
    assert float(made["trace"].sel(block="a")) == found.estimate("trace", "a").value
    assert float(made["effective_rank_stderr"].sel(block="all")) == found.estimate("effective_rank").stderr
    assert made.attrs["num_samples"] == 10
    assert made.attrs["population"] == "independent draws"
    objective, weights = network()
    made = gradient_covariance_spectrum(objective, weights, num_examples=20).to_xarray()
    assert made.attrs["population"] == 60
    assert made.attrs["seed"] == 0


# Replicas --------------------------------------------------------------------------------------------------------


def replicas(rng: np.random.Generator, number: int, draws: int, between: np.ndarray, within: np.ndarray) -> Tensor:
    """(R, K, d) with means of variance `between` and draws of variance `within`, which differs from replica to replica."""
    means = rng.standard_normal((number, 1, len(between))) * np.sqrt(between)
    strength = rng.gamma(4, 1 / 4, size=(number, 1, 1))
    return torch.from_numpy(means + np.sqrt(strength * within) * rng.standard_normal((number, draws, len(within))) + 9)


@pytest.mark.slow
@pytest.mark.parametrize("between", [np.r_[4.0, np.zeros(9)], np.zeros(10)])
def test_total_covariance_of_replicas(between: np.ndarray) -> None:
    """Over 500 repetitions of 20 replicas of 3 draws: each part unbiased, also where replicas do not differ; errors hold."""
    rng, within = np.random.default_rng(0), np.linspace(0.1, 2, 10)
    found = [replica_covariance(replicas(rng, 20, 3, between, within)) for _ in range(500)]
    true = {"within": within.sum(), "between": between.sum(), "total": within.sum() + between.sum()}
    for name, value in true.items():
        values = np.array([getattr(f, name).value for f in found])
        errors = np.array([getattr(f, name).stderr for f in found])
        assert abs(values.mean() - value) < 4 * values.std(ddof=1) / math.sqrt(500)
        assert 0.85 < values.std() / math.sqrt(np.mean(errors**2)) < 1.2
        assert 0.7 < math.sqrt(np.mean(((values - value) / errors) ** 2)) < 1.3
    if not between.any():
        assert any(f.between.value < 0 for f in found)  # unbiased, not clipped


def test_spectrum_of_the_total_is_the_dense_estimate() -> None:
    rows = replicas(np.random.default_rng(1), 5, 4, np.r_[4.0, np.zeros(9)], np.linspace(0.1, 2, 10))
    inner = sum(torch.cov(r.T) for r in rows) / 5
    outer = torch.cov(rows.mean(1).T)
    total = inner * (1 - 1 / 4) + outer
    for given, options in ((rows, {}), (Counted(rows.flatten(0, 1), 3), {"num_replicas": 5})):
        found = replica_covariance(given, scale=2, **options)
        np.testing.assert_allclose(found.eigenvalues[:10], 4 * np.linalg.eigvalsh(total.numpy())[::-1], rtol=1e-10)
        np.testing.assert_allclose(found.eigenvalues[10:], 0, atol=1e-12)
        assert found.total.value == pytest.approx(found.eigenvalues.sum())
        assert found.within.value == pytest.approx(4 * float(inner.trace()))
        assert found.between.value == pytest.approx(4 * float(outer.trace() - inner.trace() / 4))
        assert found.total.value == pytest.approx(found.within.value + found.between.value)


def test_replicas_input() -> None:
    rows = random(4, 3, 5)
    assert math.isnan(replica_covariance(rows[:2]).total.stderr)
    for wrong in (rows[:1], rows[:, :1]):
        with pytest.raises(ValueError, match="at least two replicas"):
            replica_covariance(wrong)
    with pytest.raises(ValueError, match="give num_replicas"):
        replica_covariance(Counted(rows.flatten(0, 1), 2))
    made = replica_covariance(rows).to_xarray()
    assert made.attrs["num_draws"] == 3
    assert {"trace_within", "trace_between_stderr", "trace_total"} <= set(made.data_vars)
