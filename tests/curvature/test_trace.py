import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.curvature.operators import DenseOperator, SymmetricOperator
from landscape.curvature.trace import TraceEstimate, diagonal, frobenius_norm, trace
from landscape.curvature.vectors import probes
from landscape.curvature.xtrace import Sketch

D = 150
BULK = np.linspace(-1, 1, D - 5)
SPECTRA = {
    "spiked": np.concatenate([[100, 50, 25, 12, 6], BULK]),
    "rank 6": np.concatenate([[9, 7, 5, 3, 2, 1], np.zeros(D - 6)]),
    "indefinite": np.linspace(-1, 1.2, D),
    "power law": 1 / np.arange(1, D + 1),
    "exponential": 0.8 ** np.arange(D),
    "identity": np.ones(D),
    "zero": np.zeros(D),
    "tiny": 1e-6 * np.linspace(-1, 3, D),
    "huge": 1e6 * np.linspace(-1, 3, D),
}
METHODS = ["hutchinson", "xtrace"]
EXACT = {trace: np.sum, frobenius_norm: np.linalg.norm}


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64) -> DenseOperator:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return DenseOperator((basis * torch.as_tensor(values, dtype=torch.float64) @ basis.T).to(dtype))


class Broken(SymmetricOperator):
    """An operator of 40 dimensions whose loss is not finite."""

    def __init__(self) -> None:
        self.dimension, self.device, self.dtype = 40, torch.device("cpu"), torch.float64

    def matvec(self, vector: Tensor) -> Tensor:
        return vector * math.nan


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("estimator", EXACT)
def test_the_exact_number_lies_within_four_standard_errors(
    estimator: Callable[..., TraceEstimate], name: str, method: str
) -> None:
    exact = EXACT[estimator](SPECTRA[name])
    found = estimator(with_spectrum(SPECTRA[name]), method=method, num_probes=25)
    assert abs(found.value - exact) <= 4 * found.stderr + 1e-12 * np.abs(SPECTRA[name]).sum()
    assert (found.num_probes, found.method, found.converged) == (25, method, True)
    assert found.num_matvecs <= 25 * (2 if method == "xtrace" else 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["spiked", "rank 6", "indefinite", "identity"])
def test_float32(name: str, method: str) -> None:
    values = SPECTRA[name]
    operator = with_spectrum(values, torch.float32)
    for estimator, exact in ((trace, values.sum()), (frobenius_norm, np.linalg.norm(values))):
        found = estimator(operator, method=method, num_probes=25)
        assert abs(found.value - exact) <= 4 * found.stderr + 1e-5 * np.abs(values).sum()


@pytest.mark.parametrize("name", ["rank 6", "identity", "zero"])
def test_xtrace_is_exact_for_low_rank_and_for_multiples_of_the_identity(name: str) -> None:
    operator = with_spectrum(SPECTRA[name])
    for num_probes in (8, 20, 40):
        for estimator in (trace, frobenius_norm):
            found = estimator(operator, method="xtrace", num_probes=num_probes)
            assert found.value == pytest.approx(EXACT[estimator](SPECTRA[name]), rel=1e-12, abs=1e-12)
            assert found.stderr < 1e-11


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_where_probes_cost_as_much_the_number_is_exact(dimension: int, method: str) -> None:
    matrix = with_spectrum(np.arange(1.0, dimension + 1)).matrix
    for estimator, exact in ((trace, matrix.trace()), (frobenius_norm, matrix.norm())):
        for target in (None, 0.1):
            found = estimator(DenseOperator(matrix), method=method, relative_error=target)
            assert found.value == pytest.approx(float(exact), rel=1e-14)
            assert (found.stderr, found.method, found.num_matvecs, found.converged) == (0, "exact", dimension, True)
    found = diagonal(DenseOperator(matrix))
    torch.testing.assert_close(found.value, matrix.diagonal(), rtol=0, atol=1e-15)
    assert not found.stderr.any()
    assert found.num_matvecs == dimension


@pytest.mark.parametrize("estimator", EXACT)
def test_hutchinson_standard_errors_are_calibrated(estimator: Callable[..., TraceEstimate]) -> None:
    operator = with_spectrum(SPECTRA["indefinite"])
    found = [estimator(operator, num_probes=20, seed=seed) for seed in range(200)]
    z = np.array([(f.value - EXACT[estimator](SPECTRA["indefinite"])) / f.stderr for f in found])
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25
    assert abs(z.mean()) < 4 / math.sqrt(200)


@pytest.mark.parametrize("name", ["indefinite", "power law", "exponential"])
def test_xtrace_standard_errors_are_calibrated(name: str) -> None:
    operator, exact = with_spectrum(SPECTRA[name]), SPECTRA[name].sum()
    found = [trace(operator, method="xtrace", num_probes=12, seed=seed) for seed in range(50)]
    errors, stderrs = np.array([(f.value - exact, f.stderr) for f in found]).T
    assert 0.8 < np.sqrt((errors**2).mean() / (stderrs**2).mean()) < 1.25
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(50)
    assert np.sqrt(((errors / stderrs) ** 2).mean()) < 1.4


def sketch(matrix: np.ndarray, tests: np.ndarray, rank: int) -> Sketch:
    basis = np.linalg.svd(matrix @ tests)[0][:, :rank]
    return Sketch(
        basis.T @ matrix @ basis,
        basis.T @ matrix @ tests,
        basis.T @ matrix @ tests,
        basis.T @ tests,
        (tests * (matrix @ tests)).sum(0),
        (tests**2).sum(0),
        len(matrix),
    )


@pytest.mark.parametrize(("rank", "count"), [(30, 8), (5, 5), (5, 6), (5, 9), (1, 1), (1, 2)])
def test_leaving_one_out_is_what_the_definition_says(rank: int, count: int) -> None:
    random = np.random.default_rng(0)
    half = random.standard_normal((30, rank))
    matrix, tests = half * random.uniform(-1, 1, rank) @ half.T, random.standard_normal((30, count))
    small = sketch(matrix, tests, min(rank, count))
    traces = []
    for i in range(count):
        left, sizes, _ = np.linalg.svd(matrix @ np.delete(tests, i, axis=1), full_matrices=False)
        basis = left[:, sizes > 1e-10]
        rest = tests[:, i] - basis @ (basis.T @ tests[:, i])
        scale = (30 - basis.shape[1]) / (rest @ rest)
        traces.append(np.trace(basis.T @ matrix @ basis) + scale * (rest @ matrix @ rest))
    np.testing.assert_allclose(small.leave_one_out(), traces, atol=1e-10)
    if count > 1:
        others = sketch(matrix, np.delete(tests, 1, axis=1), min(rank, count - 1))
        np.testing.assert_allclose(small.without(1).leave_one_out(), others.leave_one_out(), atol=1e-10)


@pytest.mark.parametrize("name", ["spiked", "power law"])
def test_xtrace_needs_fewer_products_where_few_eigenvalues_dominate(name: str) -> None:
    operator, exact = with_spectrum(SPECTRA[name]), SPECTRA[name].sum()
    rms = {}
    for method, count in (("hutchinson", 40), ("xtrace", 20)):
        found = [trace(operator, method=method, num_probes=count, seed=seed).value for seed in range(15)]
        rms[method] = np.sqrt(np.mean((np.array(found) - exact) ** 2))
    assert rms["xtrace"] < rms["hutchinson"] / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("estimator", "name", "target"),
    [(trace, "power law", 0.06), (trace, "spiked", 0.1), (frobenius_norm, "indefinite", 0.01)],
)
def test_a_target_is_met_by_adding_probes(
    estimator: Callable[..., TraceEstimate], name: str, target: float, method: str
) -> None:
    operator = with_spectrum(SPECTRA[name])
    found = estimator(operator, method=method, relative_error=target, num_probes=10, seed=1)
    assert found.converged
    assert found.stderr <= target * abs(found.value)
    assert abs(found.value - EXACT[estimator](SPECTRA[name])) <= 4 * found.stderr
    if found.method != "exact":  # probes added later change nothing about the earlier ones
        at_once = estimator(operator, method=method, num_probes=found.num_probes, seed=1)
        assert at_once.value == pytest.approx(found.value, rel=1e-12)
        assert at_once.stderr == pytest.approx(found.stderr, rel=1e-6)


def test_a_target_out_of_reach_is_admitted() -> None:
    operator = with_spectrum(np.linspace(-1, 1, 400))  # a trace of 0
    for method in METHODS:
        found = trace(operator, method=method, relative_error=0.01, max_matvecs=60)
        assert not found.converged
        assert found.num_matvecs == 60
        assert abs(found.value) <= 4 * found.stderr
        assert "target missed" in str(found)
    assert not diagonal(operator, relative_error=0.01, max_matvecs=60).converged
    exactly = trace(operator, relative_error=0.01)  # within the bound, products with all unit vectors settle it
    assert exactly.method == "exact"
    assert exactly.num_matvecs <= 800


def stalled_mean(matrix: Tensor, seed: int) -> float:
    """PyHessian's trace: at most 100 probes, until the running mean moves by less than a thousandth of itself."""
    forms: list[float] = []
    mean = 0.0
    for i in range(100):
        (probe,) = probes("stalled", seed, i, 1, len(matrix)).double()
        forms.append(float(probe @ matrix @ probe))
        if abs(np.mean(forms) - mean) / (abs(mean) + 1e-6) < 1e-3:
            break
        mean = float(np.mean(forms))
    return float(np.mean(forms))


def test_a_running_mean_that_stalls_does_not_stop_us() -> None:
    matrix = torch.eye(200, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = 40  # w^T A w is 120 or 280, with probability 1/2 each: two probes often agree
    stalled = np.array([stalled_mean(matrix, seed) for seed in range(30)])
    assert (np.abs(stalled - 200) == 80).mean() > 0.3  # stopped after two equal probes, 40% off
    found = [trace(DenseOperator(matrix), relative_error=0.05, seed=seed) for seed in range(12)]
    assert all(f.converged and f.stderr <= 0.05 * f.value for f in found)
    assert all(abs(f.value - 200) <= 4 * f.stderr for f in found)
    assert np.sqrt(np.mean([(f.value / 200 - 1) ** 2 for f in found])) < 1.25 * 0.05
    few = [trace(DenseOperator(matrix), num_probes=3, seed=seed) for seed in range(3)]
    assert max(f.stderr for f in few) > 20  # and without a target the error is told


def test_diagonal_has_a_standard_error_for_every_entry() -> None:
    operator = with_spectrum(SPECTRA["spiked"])
    exact = operator.matrix.diagonal()
    z = torch.stack(
        [(f.value - exact) / f.stderr for f in (diagonal(operator, num_probes=40, seed=s) for s in range(12))]
    )
    assert z.shape == (12, D)
    assert 0.8 < float(z.square().mean().sqrt()) < 1.25
    assert float((z.abs() < 4).double().mean()) > 0.997
    found = diagonal(operator, relative_error=0.1, num_probes=10)
    assert found.converged
    sparse = torch.diag(torch.linspace(1, 2, 300, dtype=torch.float64))
    sparse[0, 1] = sparse[1, 0] = 0.5
    found = diagonal(DenseOperator(sparse), relative_error=0.05)
    assert found.num_matvecs == 20
    assert 0 < float(found.stderr.norm()) <= 0.05 * float(found.value.norm())
    assert not found.stderr[2:].any()
    torch.testing.assert_close(found.value[2:], sparse.diagonal()[2:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_scaling_the_operator_scales_the_result(method: str, scale: float) -> None:
    for name in ("spiked", "rank 6"):
        for estimator in (trace, frobenius_norm):
            one, other = (estimator(with_spectrum(factor * SPECTRA[name]), method=method) for factor in (1.0, scale))
            assert other.value == pytest.approx(scale * one.value, rel=1e-9)
            assert other.stderr == pytest.approx(scale * one.stderr, rel=1e-6, abs=1e-12 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_are_a_matter_of_memory_alone_and_the_seed_decides(method: str) -> None:
    operator = with_spectrum(SPECTRA["spiked"])
    first, ones, other = (
        trace(operator, method=method, num_probes=13, block=block, seed=seed)
        for block, seed in ((None, 3), (1, 3), (5, 4))
    )
    assert first.value == pytest.approx(ones.value, rel=1e-12)
    assert first.stderr == pytest.approx(ones.stderr, rel=1e-6)
    assert first.value != pytest.approx(other.value, rel=1e-6)
    again = trace(operator, method=method, num_probes=13, seed=3)
    assert (again.value, again.stderr) == (first.value, first.stderr)
    widths = [diagonal(operator, block=block).value for block in (1, 7)]
    torch.testing.assert_close(widths[0], widths[1], rtol=1e-12, atol=1e-12)


def test_one_probe_has_no_standard_error() -> None:
    operator = with_spectrum(SPECTRA["indefinite"])
    for method in METHODS:
        for estimator in (trace, frobenius_norm):
            assert math.isnan(estimator(operator, method=method, num_probes=1).stderr)
    assert bool(diagonal(operator, num_probes=1).stderr.isnan().all())


def test_nonsense_is_refused() -> None:
    operator = with_spectrum(SPECTRA["indefinite"])
    for estimator in (trace, frobenius_norm, diagonal):
        with pytest.raises(ValueError, match="nan or inf"):
            estimator(Broken())
        with pytest.raises(ValueError, match="num_probes"):
            estimator(operator, num_probes=0)
        with pytest.raises(ValueError, match="relative_error"):
            estimator(operator, relative_error=0.0)
        with pytest.raises(ValueError, match="max_matvecs"):
            estimator(operator, relative_error=0.1, max_matvecs=1)
        with pytest.raises(ValueError, match="block"):
            estimator(operator, block=0)


def test_results_print_and_label_themselves() -> None:
    operator = with_spectrum(SPECTRA["spiked"])
    found = frobenius_norm(operator, seed=5)
    assert str(found).startswith("frobenius_norm = ")
    assert "±" in str(found)
    assert "hutchinson, 20 probes, 20 products" in str(found)
    dataset = found.to_xarray()
    assert float(dataset.frobenius_norm) == found.value
    assert float(dataset.frobenius_norm_stderr) == found.stderr
    assert (dataset.attrs["seed"], dataset.attrs["num_matvecs"], dataset.attrs["dimension"]) == (5, 20, D)
    labelled = diagonal(operator).to_xarray()
    assert labelled.diagonal.shape == labelled.diagonal_stderr.shape == (D,)
