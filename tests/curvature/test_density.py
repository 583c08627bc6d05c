import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.curvature import density
from landscape.curvature.density import SpectralDensity, spectral_density
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.operators import DenseOperator, SymmetricOperator
from landscape.curvature.vectors import probes

D = 120
SPECTRA = {
    "spiked": np.concatenate([[100, 50, 25, 12, 6], np.linspace(-1, 1, D - 5)]),
    "rank 6": np.concatenate([[9, 7, 5, 3, 2, 1], np.zeros(D - 6)]),
    "indefinite": np.concatenate([np.linspace(-2, -1, D // 3), np.linspace(0.5, 1, D - D // 3)]),
    "identity": np.ones(D),
    "zero": np.zeros(D),
    "tiny": 1e-6 * np.linspace(-1, 3, D),
    "huge": 1e6 * np.linspace(-1, 3, D),
}


def with_spectrum(values: np.ndarray, dtype: torch.dtype = torch.float64) -> DenseOperator:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return DenseOperator((basis * torch.as_tensor(values, dtype=torch.float64) @ basis.T).to(dtype))


def unit_probes(count: int, dimension: int, seed: int = 0) -> Tensor:
    rows = probes("spectral density", seed, 0, count, dimension, "gaussian").double()
    return rows / rows.norm(dim=1, keepdim=True)


def mass(found: SpectralDensity) -> float:
    return float(np.trapezoid(found.density, found.coordinate))


class Broken(SymmetricOperator):
    """An operator of 40 dimensions whose loss is not finite."""

    def __init__(self) -> None:
        self.dimension, self.device, self.dtype = 40, torch.device("cpu"), torch.float64

    def matvec(self, vector: Tensor) -> Tensor:
        return vector * math.inf


@pytest.mark.parametrize("axis", ["linear", "symlog"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_mass_is_one_and_moments_lie_within_four_standard_errors(name: str, axis: str) -> None:
    values = SPECTRA[name]
    found = spectral_density(with_spectrum(values), num_probes=6, num_steps=12, axis=axis)
    assert mass(found) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-12)
    scale = np.abs(values).max()
    for power in (0, 1, 2, 3, 4):
        moment = found.moment(power)
        assert abs(moment.value - (values**power).mean()) <= 4 * moment.stderr + 1e-12 * scale**power
        assert moment.count == 6
    assert found.grid[0] < values.min() <= values.max() < found.grid[-1] or scale == 0


def test_each_probe_is_a_gauss_quadrature_of_degree_twice_the_steps_less_one() -> None:
    operator, steps = with_spectrum(SPECTRA["indefinite"]), 5
    found = spectral_density(operator, num_probes=3, num_steps=steps)
    for probe, nodes, weights in zip(unit_probes(3, D), found.nodes, found.weights, strict=True):
        vector, moments = probe, []
        for _ in range(2 * steps + 1):
            moments.append(float(probe @ vector))
            vector = operator @ vector
        quadrature = [float(weights @ nodes**power) for power in range(2 * steps + 1)]
        np.testing.assert_allclose(quadrature[:-1], moments[:-1], rtol=1e-10)
        assert abs(quadrature[-1] / moments[-1] - 1) > 1e-6


@pytest.mark.parametrize(("name", "products"), [("identity", 1), ("zero", 1), ("rank 6", 7)])
def test_a_recurrence_that_ends_early_is_exact(name: str, products: int) -> None:
    operator = with_spectrum(SPECTRA[name])
    found = spectral_density(operator, num_probes=4, num_steps=50)
    assert products * 4 <= found.num_matvecs <= (products + 1) * 4  # rounding may cost one more
    assert found.nodes.shape == found.weights.shape == (4, 50)
    assert not found.weights[:, products + 1 :].any()
    exponential = torch.linalg.matrix_exp(operator.matrix)
    forms = [float(v @ exponential @ v) for v in unit_probes(4, D)]
    np.testing.assert_allclose((found.weights * np.exp(found.nodes)).sum(1), forms, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_tiny_operators_are_exact(dimension: int, dtype: torch.dtype) -> None:
    values = np.arange(1.0, dimension + 1)
    operator = with_spectrum(values, dtype)
    found = spectral_density(operator, num_probes=3)
    np.testing.assert_allclose(found.nodes, np.tile(values, (3, 1)), rtol=1e-5)
    assert found.num_matvecs == 3 * dimension
    assert mass(found) == pytest.approx(1, abs=1e-3)
    everything = spectral_density(operator, eigenpairs=top_eigenpairs(operator, dimension))
    assert everything.num_matvecs == 0
    np.testing.assert_allclose(everything.trace_of(np.log).value, np.log(values).sum(), atol=1e-5)
    assert everything.trace_of(np.log).stderr < 1e-15
    assert mass(everything) == pytest.approx(1, abs=1e-3)


def test_float32() -> None:
    values = SPECTRA["spiked"]
    wide, narrow = (
        spectral_density(with_spectrum(values, dtype), num_steps=30) for dtype in (torch.float64, torch.float32)
    )
    assert narrow.nodes.dtype == np.float64
    for power in (1, 2, 3):
        moment = narrow.moment(power)
        assert abs(moment.value - (values**power).mean()) <= 4 * moment.stderr
        assert moment.value == pytest.approx(wide.moment(power).value, rel=1e-5)
    assert narrow.wasserstein_distance(values) == pytest.approx(wide.wasserstein_distance(values), rel=0.02)


def test_standard_errors_are_calibrated() -> None:
    values = SPECTRA["indefinite"]
    operator = with_spectrum(values)
    found = [
        spectral_density(operator, num_probes=12, num_steps=2, num_points=200, seed=seed).moment(2)
        for seed in range(100)
    ]
    z = np.array([(f.value - (values**2).mean()) / f.stderr for f in found])
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25


def test_the_band_is_calibrated_about_the_exact_density_smoothed_by_the_same_kernel() -> None:
    values = np.concatenate([np.linspace(-2, -1, 10), np.linspace(0.5, 1, 20)])
    operator = with_spectrum(values)
    scores = []
    for seed in range(8):  # as many steps as dimensions: only the probes are random
        found = spectral_density(operator, num_probes=16, num_steps=30, kernel_width=0.05, num_points=100, seed=seed)
        np.testing.assert_allclose(found.nodes, np.tile(values, (16, 1)), atol=1e-10)
        distances = (found.coordinate[:, None] - values) / found.kernel_width
        exact = np.exp(-(distances**2) / 2).mean(1) / (found.kernel_width * math.sqrt(2 * math.pi))
        several = (
            exact > 0.2 * exact.max()
        )  # beyond the edges a single eigenvalue makes the density, with skewed errors
        scores.append(((found.density - exact) / found.stderr)[several])
    z = np.concatenate(scores)
    assert np.abs(z).max() < 4
    assert 0.8 < np.sqrt((z**2).mean()) < 1.25
    assert np.isnan(spectral_density(operator, num_probes=1, num_steps=5).stderr).all()


def test_exact_outliers_reduce_the_error() -> None:
    values = SPECTRA["spiked"]
    operator = with_spectrum(values)
    pairs = top_eigenpairs(operator, 5, tol=1e-8)
    errors: dict[bool, list[float]] = {False: [], True: []}
    distances: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(6):
        for deflated in errors:
            found = spectral_density(
                operator, num_probes=4, num_steps=15, eigenpairs=pairs if deflated else None, seed=seed
            )
            squares = found.trace_of(np.square)
            assert abs(squares.value - (values**2).sum()) <= 4 * squares.stderr
            errors[deflated].append(squares.value - (values**2).sum())
            distances[deflated].append(found.wasserstein_distance(values))
            if deflated:
                np.testing.assert_allclose(found.outliers, values[:5], rtol=1e-8)
                np.testing.assert_allclose(found.weights.sum(1), 1 - 5 / D, rtol=1e-12)
                assert found.nodes.max() < 1 + 1e-6
                assert mass(found) == pytest.approx(1, abs=1e-3)
    assert np.std(errors[True]) < 1e-2 * np.std(errors[False])
    assert np.mean(distances[True]) < 0.3 * np.mean(distances[False])


def test_only_eigenpairs_that_converged_are_taken_out() -> None:
    operator = with_spectrum(SPECTRA["spiked"])
    pairs = top_eigenpairs(operator, 5, tol=1e-8)
    converged = np.array([True, True, False, True, False])
    found = spectral_density(operator, num_steps=40, eigenpairs=dataclasses.replace(pairs, converged=converged))
    np.testing.assert_allclose(found.outliers, [100, 50, 12], rtol=1e-8)
    np.testing.assert_allclose(found.nodes[:, -2:], np.tile([6, 25], (10, 1)), rtol=1e-6)
    none = spectral_density(
        operator, num_steps=10, eigenpairs=dataclasses.replace(pairs, converged=np.zeros(5, dtype=bool))
    )
    assert len(none.outliers) == 0
    assert none.num_matvecs == 100


def test_more_steps_come_closer_to_the_spectrum() -> None:
    operator, values = with_spectrum(SPECTRA["spiked"]), SPECTRA["spiked"]
    found = [spectral_density(operator, num_steps=steps) for steps in (1, 4, 8, 20)]
    distances = [f.wasserstein_distance(values) for f in found]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(distances))
    assert distances[-1] < 0.4  # what ten probes leave
    exact = dataclasses.replace(found[0], nodes=values[None], weights=np.full((1, D), 1 / D))
    assert exact.wasserstein_distance(values) < 1e-12
    assert exact.wasserstein_distance(values + 0.25) == pytest.approx(0.25)


@pytest.mark.parametrize("shift", [0.0, 3])
def test_log_determinant(shift: float | int) -> None:
    operator = with_spectrum(np.linspace(0.1, 10, D) if shift == 0 else SPECTRA["indefinite"])
    expected = torch.linalg.slogdet(operator.matrix + shift * torch.eye(D, dtype=torch.float64)).logabsdet
    found = spectral_density(operator, num_steps=40).log_determinant(shift)
    assert abs(found.value - float(expected)) <= 4 * found.stderr
    assert 0 < found.stderr < 0.1 * D


def test_log_determinant_of_what_is_not_positive_is_refused() -> None:
    found = spectral_density(with_spectrum(SPECTRA["indefinite"]))
    with pytest.raises(ValueError, match="take a shift"):
        found.log_determinant()
    with pytest.raises(ValueError, match="not finite"):
        found.trace_of(np.log)
    with pytest.raises(ValueError, match="take a shift"):
        spectral_density(with_spectrum(SPECTRA["zero"])).log_determinant()


def test_cumulative_counts_eigenvalues() -> None:
    found = spectral_density(with_spectrum(SPECTRA["indefinite"]), num_probes=20, num_steps=30)
    share = found.cumulative(0)  # in the gap, where nodes are few
    assert abs(share.value - 1 / 3) <= 4 * share.stderr
    assert (found.cumulative(-3).value, found.cumulative(3).value) == pytest.approx((0, 1))


def test_symlog_axis() -> None:
    operator = with_spectrum(np.concatenate([[-1e3, 1e3], 1e-3 * np.linspace(-1, 1, D - 2)]))
    found = spectral_density(operator, num_steps=30, axis="symlog", linear_threshold=1e-4)
    np.testing.assert_allclose(np.arcsinh(found.grid / 1e-4), found.coordinate, rtol=1e-12)
    assert mass(found) == pytest.approx(1, abs=1e-3)
    inside = np.abs(found.grid) < 0.1
    assert float(np.trapezoid(found.density[inside], found.coordinate[inside])) > 0.9
    assert spectral_density(operator, axis="symlog").linear_threshold == pytest.approx(1.0)
    assert math.isnan(spectral_density(operator, num_steps=3).linear_threshold)


def test_limits_cut_the_density_and_nothing_else() -> None:
    operator = with_spectrum(SPECTRA["spiked"])
    found, whole = (spectral_density(operator, num_steps=20, limits=limits) for limits in ((-2, 2), None))
    assert (found.grid[0], found.grid[-1], found.kernel_width) == pytest.approx((-2, 2, 0.04))
    bulk = float(np.mean((found.weights * (np.abs(found.nodes) < 1.5)).sum(1)))
    assert mass(found) == pytest.approx(bulk, abs=1e-3)
    np.testing.assert_array_equal(found.nodes, whole.nodes)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_the_operator_scales_the_spectrum(scale: float) -> None:
    values = SPECTRA["indefinite"]
    one, other = (spectral_density(with_spectrum(factor * values), num_steps=10) for factor in (1.0, scale))
    np.testing.assert_allclose(other.nodes, scale * one.nodes, rtol=1e-9)
    np.testing.assert_allclose(other.density * scale, one.density, rtol=1e-6, atol=1e-9)


def test_groups_of_probes_and_the_place_of_the_basis_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = with_spectrum(SPECTRA["indefinite"])
    options = {"num_probes": 5, "num_steps": 8}
    together = spectral_density(operator, **options)
    again, hosted, other = (
        spectral_density(operator, **options, storage=storage, seed=seed)
        for storage, seed in ((None, 0), ("cpu", 0), (None, 1))
    )
    np.testing.assert_array_equal(again.nodes, together.nodes)
    np.testing.assert_array_equal(hosted.density, together.density)
    assert np.abs(other.nodes - together.nodes).max() > 1e-3
    monkeypatch.setattr(density, "free_memory", lambda device: 4 * 2 * 8 * D * 8)
    grouped = spectral_density(operator, **options)
    np.testing.assert_allclose(grouped.nodes, together.nodes, rtol=1e-10)
    np.testing.assert_allclose(grouped.weights, together.weights, rtol=1e-8)
    assert grouped.num_matvecs == together.num_matvecs == 40


def test_nonsense_is_refused() -> None:
    operator = with_spectrum(SPECTRA["indefinite"])
    with pytest.raises(ValueError, match="nan or inf"):
        spectral_density(Broken())
    for options in ({"num_probes": 0}, {"num_steps": 0}, {"num_points": 1}):
        with pytest.raises(ValueError, match="num_points"):
            spectral_density(operator, **options)
    with pytest.raises(ValueError, match="limits"):
        spectral_density(operator, limits=(1, 1))
    with pytest.raises(ValueError, match="linear_threshold"):
        spectral_density(operator, axis="symlog", linear_threshold=0)
    with pytest.raises(ValueError, match="num_points >= "):
        spectral_density(operator, num_steps=2, kernel_width=1e-4)
    with pytest.raises(ValueError, match="kernel_width"):
        spectral_density(operator, num_steps=2, kernel_width=0.0)


def test_to_xarray() -> None:
    operator = with_spectrum(SPECTRA["spiked"])
    found = spectral_density(operator, num_probes=3, num_steps=6, eigenpairs=top_eigenpairs(operator, 2), seed=4)
    dataset = found.to_xarray()
    assert dict(dataset.sizes) == {"point": 1000, "probe": 3, "step": 6, "outlier_index": 2}
    assert {"density", "density_stderr", "node", "weight", "outlier"} == set(dataset)
    assert (dataset.attrs["seed"], dataset.attrs["dimension"], dataset.attrs["num_matvecs"]) == (4, D, 18)
    np.testing.assert_array_equal(dataset.eigenvalue, found.grid)
