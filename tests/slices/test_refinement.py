"""Adaptive refinement: exact where it evaluates, within tolerance elsewhere, and frugal."""

from collections.abc import Callable

import numpy as np
import pytest

from landscape.slices.refinement import refine

Function = Callable[[np.ndarray, np.ndarray], np.ndarray]


def refined(function: Function, first: np.ndarray, second: np.ndarray, **options: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    calls: list[np.ndarray] = []

    def evaluate(at: np.ndarray) -> np.ndarray:
        calls.append(at)
        return function(first[at[:, 0]], second[at[:, 1]])

    values, evaluated = refine(first, second, evaluate, **options)
    asked = np.concatenate(calls)
    assert len(np.unique(asked, axis=0)) == len(asked) == evaluated.sum()  # nothing twice
    return values, evaluated, function(*np.meshgrid(first, second, indexing="ij"))


@pytest.mark.parametrize("shape", [(21, 18), (9, 1), (1, 1), (2, 3), (3, 34)])
@pytest.mark.parametrize("coarse", [1, 3, 100])
def test_evaluated_points_are_exact_and_a_tight_tolerance_evaluates_all(shape: tuple[int, int], coarse: int) -> None:
    first, second = np.linspace(-1, 2, shape[0]), np.geomspace(1, 3, shape[1])
    values, evaluated, truth = refined(lambda a, b: np.exp(a * b), first, second, tolerance=1e-13, coarse=coarse)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[evaluated], truth[evaluated])
    assert evaluated.mean() > 0.99
    np.testing.assert_allclose(values, truth, atol=1e-10)


@pytest.mark.parametrize("name", ["bowl", "saddle", "ridge"])
def test_interpolation_stays_within_the_tolerance_on_quadratics(name: str) -> None:
    """On a quadratic the bilinear error of a quarter is at most a quarter of its cell's, which was below the tolerance."""
    functions: dict[str, Function] = {
        "bowl": lambda a, b: a**2 + 0.5 * b**2,
        "saddle": lambda a, b: a**2 - b**2,  # exact at every centre: the sides must be looked at
        "ridge": lambda a, b: 40 * (a - b) ** 2,
    }
    grid = np.linspace(-1, 1, 65)
    values, evaluated, truth = refined(functions[name], grid, grid, tolerance=0.05)
    assert np.abs(values - truth).max() <= 0.05 / 2
    assert evaluated.mean() < (0.2 if name != "ridge" else 1.01)


def test_only_the_rough_part_is_refined() -> None:
    grid = np.linspace(-1, 1, 65)
    values, evaluated, truth = refined(
        lambda a, b: np.exp(-200 * ((a - 0.5) ** 2 + (b - 0.5) ** 2)), grid, grid, tolerance=0.01
    )
    assert np.abs(values - truth).max() < 0.01
    assert evaluated[40:57, 40:57].mean() > 0.8
    assert evaluated[:28, :28].mean() < 0.1


def test_the_edge_of_what_is_finite_is_found_and_the_rest_left() -> None:
    grid = np.linspace(-1, 1, 65)
    values, evaluated, truth = refined(lambda a, b: np.where(a + 0.3 * b > 0.4, np.inf, a), grid, grid, tolerance=0.01)
    np.testing.assert_array_equal(np.isinf(values), np.isinf(truth))
    np.testing.assert_allclose(values[np.isfinite(truth)], truth[np.isfinite(truth)], atol=1e-12)
    assert evaluated.mean() < 0.5
    everywhere, _, _ = refined(lambda a, b: np.full(a.shape, np.nan), grid, grid, tolerance=0.01)
    assert np.isnan(everywhere).all()


def test_relative_tolerance_spares_what_is_high() -> None:
    grid, other = np.linspace(0, 12, 65), np.linspace(0, 1, 3)
    _, sparse, _ = refined(lambda a, b: np.exp(a + 0 * b), grid, other, tolerance=0.01, relative_tolerance=0.1)
    _, dense, _ = refined(lambda a, b: np.exp(a + 0 * b), grid, other, tolerance=0.01)
    assert sparse.sum() < 0.7 * dense.sum()
    with pytest.raises(ValueError, match="positive tolerance"):
        refine(grid, other, lambda at: at[:, 0] * 1.0, tolerance=0)
