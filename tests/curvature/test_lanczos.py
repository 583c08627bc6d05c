import math

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.curvature.lanczos import Eigenpairs, top_eigenpairs
from landscape.curvature.operators import DenseOperator, SymmetricOperator


class Diagonal(SymmetricOperator):
    """diag(values): as good as any matrix with this spectrum, since first directions are random."""

    def __init__(self, values: list[float] | np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        self.values = torch.as_tensor(np.asarray(values, dtype=np.float64)).to(dtype)
        self.dimension, self.device, self.dtype = len(self.values), self.values.device, dtype
        self.products = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.values * vector


def with_spectrum(values: list[float] | np.ndarray, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    basis, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    matrix = basis * values @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


BULK = np.linspace(-1, 1, 100)
SPIKES = np.concatenate([[100, 50, 25, 12, 6], BULK])
SPECTRA = {
    "spikes over a bulk": SPIKES,
    "opposite extremes": np.concatenate([[1.0, -1.0], BULK * 0.1]),
    "rank six": np.concatenate([[9, 7, 5, 3, 2, 1], np.zeros(100)]),
    "repeated": np.concatenate([[5, 5, 5, 3, 1], BULK * 0.1]),
    "negative definite": -np.linspace(1, 40, 80),
    "tiny": np.concatenate([[5e-6, 2e-6], 1e-8 * BULK]),
    "huge": np.concatenate([[5e6, 2e6], 1e3 * BULK]),
    "identity": np.ones(30),
    "zero": np.zeros(20),
    "one": np.array([-2.0]),
    "two": np.array([3.0, -4.0]),
    "three": np.array([3.0, 3.0, -4.0]),
}


def exact(values: np.ndarray, k: int, which: str) -> np.ndarray:
    rising = np.sort(values)
    if which == "BE":
        count = min(2 * k, len(rising))
        top = (count + 1) // 2
        return np.concatenate([rising[::-1][:top], rising[: count - top]])
    return {"LA": rising[::-1], "SA": rising, "LM": rising[np.argsort(-np.abs(rising), kind="stable")]}[which][:k]


def check(found: Eigenpairs, matrix: Tensor) -> None:
    """What holds of every answer: true residuals, orthonormal vectors, values that are within their residual of an eigenvalue."""
    tight = 1e-12 if matrix.dtype == torch.float64 else 1e-5
    scale = float(matrix.double().abs().sum(1).max())
    vectors = found.vectors.double()
    true = (matrix.double() @ vectors - vectors * torch.from_numpy(found.values)).norm(dim=0).numpy()
    np.testing.assert_allclose(found.residuals, true, rtol=0, atol=tight * scale)
    np.testing.assert_allclose((vectors.T @ vectors).numpy(), np.eye(len(found.values)), rtol=0, atol=tight)
    distance = np.abs(found.values[:, None] - np.linalg.eigvalsh(matrix.double().numpy())).min(1)
    assert (distance <= true + tight * scale).all()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("which", "block_size"), [("LA", 1), ("SA", 1), ("LM", 1), ("LA", 3), ("BE", 3)])
def test_extreme_eigenvalues_match_the_dense_spectrum(name: str, which: str, block_size: int) -> None:
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    found = top_eigenpairs(DenseOperator(matrix), 2, which, tol=1e-8, max_matvecs=1000, block_size=block_size)  # type: ignore[arg-type]
    check(found, matrix)
    assert found.converged.all()
    assert found.missed <= 0.01
    expected = exact(values, 2, which)
    if which == "LM":  # ties in modulus: either order
        np.testing.assert_allclose(
            np.sort(np.abs(found.values)), np.sort(np.abs(expected)), atol=1e-7 * np.abs(values).max()
        )
    else:
        np.testing.assert_allclose(found.values, expected, atol=1e-7 * np.abs(values).max())


@pytest.mark.parametrize("which", ["LM", "BE"])
def test_opposite_extremes_are_both_found(which: str) -> None:
    values = np.concatenate([[1.0, -1.0], BULK * 0.1])
    found = top_eigenpairs(Diagonal(values), 2 if which == "LM" else 1, which, tol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.sort(found.values), [-1, 1], atol=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_spikes_are_found_without_ghosts_at_any_scale(factor: float) -> None:
    operator = Diagonal(factor * np.concatenate([[100, 50, 25, 12, 6], np.linspace(-1, 1, 1995)]))
    found = top_eigenpairs(operator, 5, tol=1e-6)
    np.testing.assert_allclose(found.values, factor * np.array([100, 50, 25, 12, 6]), rtol=1e-6)
    assert found.converged.all()
    assert found.num_matvecs == operator.products <= 40


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_copy_of_a_repeated_eigenvalue_is_found(block_size: int, seed: int) -> None:
    operator = Diagonal(np.concatenate([[5, 5, 5, 3, 1], np.linspace(-0.5, 0.5, 400)]))
    for k in (1, 2, 3, 5):
        found = top_eigenpairs(operator, k, tol=1e-4, block_size=block_size, seed=seed)
        np.testing.assert_allclose(found.values, [5, 5, 5, 3, 1][:k], rtol=1e-6)
        assert found.missed <= 0.01


def test_without_a_certificate_copies_are_missed() -> None:
    operator = Diagonal(np.concatenate([[5, 5, 3], np.linspace(-0.5, 0.5, 400)]))
    found = top_eigenpairs(operator, 2, tol=1e-4, miss_probability=1.0)
    np.testing.assert_allclose(found.values, [5, 3], rtol=1e-6)
    assert found.missed == 1.0
    np.testing.assert_allclose(top_eigenpairs(operator, 2, tol=1e-4).values, [5, 5], rtol=1e-6)


@pytest.mark.parametrize(("which", "limit"), [("LA", 0.5), ("SA", 0.2)])
def test_no_more_is_missed_than_the_certificate_says(which: str, limit: float) -> None:
    values = np.concatenate([[2, 2, 1.98, -1.5], np.linspace(-1, 1, 200)])  # the search alone finds 2 and 1.98
    bounds = np.ones(50)
    missed = np.zeros(50, dtype=bool)
    for seed in range(50):
        operator = Diagonal(values if which == "LA" else -values)
        found = top_eigenpairs(operator, 2, which, seed=seed, miss_probability=limit)  # type: ignore[arg-type]
        missed[seed], bounds[seed] = abs(found.values[1]) < 1.99, found.missed
    assert bounds.max() <= limit
    assert missed.any()  # a hard case: the bound is nearly attained
    for level in (limit, limit / 2, limit / 4):
        assert (missed & (bounds <= level)).mean() <= level + 3 * math.sqrt(level * (1 - level) / 50)


def test_the_certificate_goes_on_through_restarts() -> None:
    values = np.concatenate([[1.02, 1.02], np.linspace(-1, 1, 798)])
    small, large = (top_eigenpairs(Diagonal(values), 2, max_basis=m, max_matvecs=600) for m in (16, 400))
    np.testing.assert_allclose(small.values, large.values, rtol=1e-5)
    assert small.missed <= 0.01
    assert large.missed <= 0.01


def test_the_certificate_finds_what_the_start_does_not_contain() -> None:
    operator = Diagonal(SPIKES)
    blind = torch.zeros(len(SPIKES), 2, dtype=torch.float64)
    blind[1, 0] = blind[2, 1] = 1.0  # eigenvectors of 50 and 25
    found = top_eigenpairs(operator, 2, start=blind)
    np.testing.assert_allclose(found.values, [100, 50], rtol=1e-6)


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_thick_restarts_give_what_a_large_basis_gives(which: str) -> None:
    values = np.concatenate([[3.0, 2.0, 1.5, -1.5, -2, -3], np.linspace(-1, 1, 394)])
    matrix = with_spectrum(values)
    small, large = (
        top_eigenpairs(DenseOperator(matrix), 3, which, tol=1e-7, max_basis=m, max_matvecs=3000)  # type: ignore[arg-type]
        for m in (14, 400)
    )
    check(small, matrix)
    assert small.num_matvecs > 14
    assert small.converged.all()
    np.testing.assert_allclose(small.values, large.values, rtol=1e-9)
    with pytest.raises(ValueError, match=r"max_basis=5 is too small.*take 6"):
        top_eigenpairs(DenseOperator(matrix), 3, max_basis=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_basis_finds_all_copies(dtype: torch.dtype) -> None:
    operator = Diagonal(np.repeat([2.0, 1, 0, -1, -2], [4, 6, 5, 3, 5]), dtype)
    for which, extreme in (("LA", [2, 2, 2, 2, 1]), ("SA", [-2, -2, -2, -2, -2])):
        found = top_eigenpairs(operator, 5, which, max_basis=8, tol=1e-4, max_matvecs=600)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.values, extreme, atol=1e-5)
        assert found.converged.all()


def test_a_wide_start_serves_every_wanted_pair() -> None:
    operator = Diagonal(np.random.default_rng(0).exponential(size=29) ** 3)
    start = torch.randn(29, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = top_eigenpairs(operator, 4, "BE", start=start, max_basis=15, tol=1e-4, max_matvecs=300)
    np.testing.assert_allclose(found.values[:4], np.sort(operator.values.numpy())[::-1][:4], rtol=1e-8)
    assert found.converged[:4].all()


@pytest.mark.parametrize("block_size", [1, 2])
def test_a_warm_start_takes_fewer_products(block_size: int) -> None:
    values = np.concatenate([np.linspace(1.05, 1.5, 6), np.linspace(-1, 1, 394)])
    before = with_spectrum(values)
    step = torch.randn(400, 400, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 1e-5
    after = before + step + step.T
    k = 6
    options = {"tol": 1e-3, "block_size": block_size, "miss_probability": 1.0, "max_matvecs": 600}
    old = top_eigenpairs(DenseOperator(before), k, **options)  # type: ignore[arg-type]
    cold = top_eigenpairs(DenseOperator(after), k, **options)  # type: ignore[arg-type]
    warm = top_eigenpairs(DenseOperator(after), k, start=old.vectors, **options)  # type: ignore[arg-type]
    assert warm.converged.all()
    np.testing.assert_allclose(warm.values, cold.values, rtol=1e-5)
    assert warm.num_matvecs < 0.6 * cold.num_matvecs


def test_dependent_and_zero_columns_of_a_start_are_dropped() -> None:
    operator = Diagonal(SPIKES)
    one = torch.ones(len(SPIKES), 1, dtype=torch.float64)
    several = torch.cat([one, 2 * one, 0 * one], dim=1)
    first, second = (top_eigenpairs(operator, 2, start=s, tol=1e-8) for s in (one[:, 0], several))
    np.testing.assert_allclose(first.values, second.values, rtol=1e-12)
    assert first.num_matvecs == second.num_matvecs
    np.testing.assert_allclose(top_eigenpairs(operator, 2, start=0 * one).values, [100, 50], rtol=1e-6)


def test_what_cannot_be_multiplied_is_refused() -> None:
    operator = Diagonal(SPIKES)
    with pytest.raises(ValueError, match=r"start has shape \(3,\).*\(105,\)"):
        top_eigenpairs(operator, start=torch.ones(3))
    with pytest.raises(ValueError, match="start is not finite"):
        top_eigenpairs(operator, start=torch.full((105,), math.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="product of the operator is not finite"):
        top_eigenpairs(Diagonal([1.0, math.inf, 2.0]))
    with pytest.raises(ValueError, match="must be positive"):
        top_eigenpairs(operator, 0)


def test_stopped_early_it_says_so_and_stays_within_its_budget() -> None:
    values = np.linspace(0, 1, 200) ** 0.5
    matrix = with_spectrum(values)
    found = top_eigenpairs(DenseOperator(matrix), 3, tol=1e-9, max_matvecs=8)
    check(found, matrix)
    assert not found.converged.all()
    assert found.missed == 1.0
    assert found.num_matvecs == 8 + 3
    assert "not converged" in str(found)
    for budget in range(1, 40, 3):
        operator = Diagonal(SPIKES)
        found = top_eigenpairs(operator, 2, "BE", max_matvecs=budget, block_size=2)
        assert found.num_matvecs == operator.products <= max(budget, 4) + 4


def test_as_many_pairs_as_the_space_has() -> None:
    values = np.array([4.0, 3, 3, -1, -7])
    for k in (5, 9):
        np.testing.assert_allclose(top_eigenpairs(Diagonal(values), k).values, values, atol=1e-12)
        both = top_eigenpairs(Diagonal(values), k, "BE")
        np.testing.assert_allclose(both.values, [4, 3, 3, -7, -1], atol=1e-12)
        assert both.missed == 0.0
    low = top_eigenpairs(Diagonal(SPECTRA["rank six"]), 8)
    np.testing.assert_allclose(low.values, [9, 7, 5, 3, 2, 1, 0, 0], atol=1e-12)
    assert low.num_matvecs < 40
    assert top_eigenpairs(Diagonal(np.ones(300)), 3).num_matvecs < 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tolerance_below_rounding_ends_at_rounding(dtype: torch.dtype) -> None:
    operator = Diagonal(np.concatenate([[100, 50, 25, 12, 6], np.linspace(-1, 1, 995)]), dtype)
    found = top_eigenpairs(operator, 5, tol=0.0)
    assert found.converged.all()
    assert found.num_matvecs < 60
    assert (found.residuals <= 10 * torch.finfo(dtype).eps * 100).all()


def test_products_that_are_too_noisy_for_the_tolerance_are_told() -> None:
    class Noisy(Diagonal):
        def matvec(self, vector: Tensor) -> Tensor:
            return super().matvec(vector) + 1e-4 * torch.sin(1e6 * vector)

    found = top_eigenpairs(Noisy(SPIKES), 3, tol=1e-7, max_matvecs=60)
    assert not found.converged.any()
    np.testing.assert_allclose(found.values, [100, 50, 25], rtol=1e-4)
    assert (np.abs(found.values - [100, 50, 25]) <= found.residuals).all()


@pytest.mark.parametrize("block_size", [1, 3])
def test_float32_keeps_its_basis_orthogonal(block_size: int) -> None:
    matrix = with_spectrum(SPIKES, dtype=torch.float32)
    found = top_eigenpairs(DenseOperator(matrix), 10, tol=1e-4, max_matvecs=600, max_basis=30, block_size=block_size)
    assert found.num_matvecs > 60  # several restarts
    assert found.vectors.dtype == torch.float32
    check(found, matrix)
    np.testing.assert_allclose(found.values[:5], [100, 50, 25, 12, 6], rtol=1e-5)


def test_the_basis_can_be_kept_on_the_host() -> None:
    operator = Diagonal(SPIKES)
    here, there = top_eigenpairs(operator, 3), top_eigenpairs(operator, 3, storage="cpu")
    np.testing.assert_array_equal(here.values, there.values)
    assert torch.equal(here.vectors, there.vectors)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [None, "cpu"])
def test_on_a_gpu(storage: str | None) -> None:
    matrix = with_spectrum(SPIKES, dtype=torch.float32).cuda()
    found = top_eigenpairs(DenseOperator(matrix), 5, tol=1e-4, block_size=2, max_basis=20, storage=storage)
    assert found.vectors.device == matrix.device
    np.testing.assert_allclose(found.values, [100, 50, 25, 12, 6], rtol=1e-5)


def deflated_power_iteration(
    operator: SymmetricOperator, k: int, tol: float = 1e-3, max_iterations: int = 100
) -> list[float]:
    """The k largest in modulus by power iterations that stop when mu_t changes by less than tol: PyHessian's rule."""
    generator = torch.Generator().manual_seed(0)
    values: list[float] = []
    vectors: list[Tensor] = []
    for _ in range(k):
        v = torch.randn(operator.dimension, generator=generator, dtype=torch.float64)
        v /= v.norm()
        last = None
        for _ in range(max_iterations):
            for u in vectors:
                v = v - (u @ v) * u
            v = v / v.norm()
            image = operator @ v
            value = float(image @ v)
            v = image / image.norm()
            if last is not None and abs(last - value) / (abs(last) + 1e-6) < tol:
                break
            last = value
        values.append(value)
        vectors.append(v)
    return values


def test_where_power_iteration_is_seven_per_cent_wrong() -> None:
    operator = Diagonal(np.concatenate([[10.0, 1.08], np.full(500, 1.0), np.linspace(0, 0.5, 500)]))
    power = deflated_power_iteration(operator, 2)
    assert power[0] == pytest.approx(10, rel=1e-3)
    assert power[1] == pytest.approx(1.0, abs=0.01)  # its rule is met, and 1.08 is 7% away
    found = top_eigenpairs(operator, 2)
    np.testing.assert_allclose(found.values, [10, 1.08], rtol=1e-5)
    assert found.residuals[1] <= 1e-3 * 1.08
    vector = found.vectors[:, 1]
    assert float((operator @ vector - found.values[1] * vector).norm()) == pytest.approx(found.residuals[1])


def test_the_seed_decides() -> None:
    operator = Diagonal(BULK)
    first, again, other = (top_eigenpairs(operator, 1, max_matvecs=5, seed=s) for s in (1, 1, 2))
    assert first.values == again.values
    assert torch.equal(first.vectors, again.vectors)
    assert first.values != other.values


def test_the_global_random_state_and_the_start_are_left_alone() -> None:
    state, start = torch.get_rng_state(), torch.ones(100, dtype=torch.float64)
    top_eigenpairs(Diagonal(BULK), 2, start=start)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(start, torch.ones(100, dtype=torch.float64))


def test_to_xarray_carries_the_errors_and_where_they_came_from() -> None:
    found = top_eigenpairs(Diagonal(SPIKES), 3)
    dataset = found.to_xarray()
    assert set(dataset) == {"eigenvalue", "residual", "converged"}
    assert dataset.attrs["num_matvecs"] == found.num_matvecs
    assert dataset.attrs["missed"] <= 0.01
    assert dataset.attrs["operator"] == "Diagonal"
    assert str(found).count("\n") == 4
