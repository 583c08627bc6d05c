import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.operators import SymmetricOperator


class Dense(SymmetricOperator):
    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dimension, self.device, self.dtype = len(matrix), matrix.device, matrix.dtype

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


def with_spectrum(values: list[float] | np.ndarray, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    basis, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    return (basis * values @ basis.T).to(dtype)


BULK = np.linspace(-1, 1, 150)
SPECTRA = {
    "spikes over a bulk": np.concatenate([[100, 50, 25, 12, 6], BULK]),
    "opposite extremes": np.concatenate([[1.0, -1.0], BULK * 0.1]),
    "rank six": np.concatenate([[9, 7, 5, 3, 2, 1], np.zeros(100)]),
    "negative definite": -np.linspace(1, 40, 80),
    "tiny": np.concatenate([[5e-6, 2e-6], 1e-8 * BULK]),
    "huge": np.concatenate([[5e6, 2e6], 1e3 * BULK]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_extreme_eigenvalues_match_the_dense_spectrum(name: str, which: str) -> None:
    values = np.sort(SPECTRA[name])
    expected = {"LA": values[::-1][:2], "SA": values[:2], "LM": values[np.argsort(-np.abs(values))][:2]}[which]
    matrix = with_spectrum(values)
    found = top_eigenpairs(Dense(matrix), 2, which, tol=1e-8, max_matvecs=len(values))
    scale = np.abs(values).max()
    assert found.converged.all()
    if name == "opposite extremes" and which == "LM":  # a tie in modulus: either order
        np.testing.assert_allclose(np.sort(found.values), np.sort(expected), atol=1e-7)
    else:
        np.testing.assert_allclose(found.values, expected, atol=1e-7 * scale)
    true = (matrix @ found.vectors - found.vectors * torch.from_numpy(found.values)).norm(dim=0).numpy()
    np.testing.assert_allclose(found.residuals, true, atol=1e-12 * scale)
    np.testing.assert_allclose((found.vectors.T @ found.vectors).numpy(), np.eye(2), atol=1e-10)


def test_no_ghost_copies_of_the_top_eigenvalue() -> None:
    found = top_eigenpairs(Dense(with_spectrum(SPECTRA["spikes over a bulk"])), 5, tol=1e-6, max_matvecs=120)
    np.testing.assert_allclose(found.values, [100, 50, 25, 12, 6], rtol=1e-6)


def test_every_value_is_within_its_residual_of_an_eigenvalue_when_stopped_early() -> None:
    values = np.linspace(0, 1, 200) ** 0.5
    found = top_eigenpairs(Dense(with_spectrum(values)), 3, tol=1e-9, max_matvecs=8)
    assert not found.converged.all()
    distance = np.abs(found.values[:, None] - values[None]).min(1)
    assert (distance <= found.residuals + 1e-12).all()


def test_identity_breaks_down_into_repeated_eigenvalues() -> None:
    found = top_eigenpairs(Dense(torch.eye(30, dtype=torch.float64)), 3)
    np.testing.assert_allclose(found.values, 1.0, atol=1e-12)
    assert found.converged.all()
    assert found.num_matvecs < 15


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_tiny_operators(dimension: int) -> None:
    matrix = with_spectrum(np.arange(1.0, dimension + 1))
    found = top_eigenpairs(Dense(matrix), dimension, tol=1e-10)
    np.testing.assert_allclose(found.values, np.arange(dimension, 0, -1), atol=1e-10)


def test_float32_keeps_its_basis_orthogonal() -> None:
    matrix = with_spectrum(SPECTRA["spikes over a bulk"], dtype=torch.float32)
    found = top_eigenpairs(Dense(matrix), 5, tol=1e-4, max_matvecs=80)
    np.testing.assert_allclose(found.values, [100, 50, 25, 12, 6], rtol=1e-4)


def test_both_ends() -> None:
    found = top_eigenpairs(Dense(with_spectrum(np.linspace(-3, 7, 60))), which="BE", tol=1e-8, max_matvecs=60)
    np.testing.assert_allclose(found.values, [7, -3], atol=1e-7)


def test_the_seed_decides() -> None:
    operator = Dense(with_spectrum(BULK))
    first, again, other = (top_eigenpairs(operator, 1, max_matvecs=5, seed=s) for s in (1, 1, 2))
    assert first.values == again.values
    assert first.values != other.values


def test_to_xarray_carries_the_errors() -> None:
    dataset = top_eigenpairs(Dense(with_spectrum(BULK)), 3).to_xarray()
    assert set(dataset) == {"eigenvalue", "residual", "converged"}
    assert dataset.attrs["num_matvecs"] > 0
