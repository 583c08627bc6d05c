from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape.curvature.low_rank import LowRankOperator, SampleCovarianceOperator, unbiased_square


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROWS = {
    "few": draw(4, 30),
    "many": draw(30, 4),
    "one": draw(1, 7),
    "repeated": draw(3, 9).repeat(2, 1),
    "summing to zero": draw(5, 12) - draw(5, 12).mean(0),
    "opposite": torch.cat([draw(1, 6), -draw(1, 6)]),
    "badly scaled": torch.logspace(0, -6, 5, dtype=torch.float64)[:, None] * draw(5, 40),
    "tiny": 1e-30 * draw(4, 8),
    "zero": torch.zeros(3, 5, dtype=torch.float64),
}


@pytest.mark.parametrize("scale", [None, 0.3, 2])
@pytest.mark.parametrize("name", ROWS)
def test_it_is_the_dense_matrix(name: str, scale: float | int | None) -> None:
    rows = ROWS[name]
    dense = (1 / len(rows) if scale is None else scale) * rows.T @ rows
    operator = LowRankOperator(rows, scale)
    size = float(dense.norm())
    torch.testing.assert_close(operator.to_dense(), dense, rtol=1e-12, atol=1e-14 * size)
    block = draw(rows.shape[1], 3, seed=1)
    torch.testing.assert_close(operator @ block, dense @ block, rtol=1e-12, atol=1e-13 * size)
    torch.testing.assert_close(operator @ block[:, 0], dense @ block[:, 0], rtol=1e-12, atol=1e-13 * size)
    assert operator.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    assert operator.frobenius_norm == pytest.approx(size, rel=1e-12)
    forms = (block * (dense @ block)).sum(0).numpy()
    np.testing.assert_allclose(operator.quadratic_forms(block), forms, rtol=1e-11)


@pytest.mark.parametrize("name", ROWS)
def test_eigenpairs_are_exact_and_orthonormal(name: str) -> None:
    rows = ROWS[name]
    operator = LowRankOperator(rows)
    exact = np.linalg.svd(rows.numpy(), compute_uv=False) ** 2 / len(rows)
    rank = int((exact > 1e-13 * max(exact[0], 1e-300)).sum())
    for k in (None, 1, 2, 100):
        found = operator.eigenpairs(k)
        r = rank if k is None else min(k, rank)
        assert found.values.shape == (r,)
        assert found.vectors.shape == (rows.shape[1], r)
        np.testing.assert_allclose(found.values, exact[:r], rtol=1e-12, atol=1e-14 * exact[0])
        torch.testing.assert_close(
            found.vectors.T @ found.vectors, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12
        )
        assert (found.residuals <= 1e-12 * max(exact[0], 1e-300)).all()
        assert (found.missed, found.num_matvecs) == (0.0, r)
        assert found.to_xarray().sizes["eigen_index"] == r


def test_float32_is_accumulated_in_float64() -> None:
    rows = draw(3, 600_000).float()
    operator = LowRankOperator(rows)
    exact = LowRankOperator(rows.double())
    assert operator.trace == pytest.approx(exact.trace, rel=1e-12)
    found, expected = operator.eigenpairs(), exact.eigenpairs()
    assert found.vectors.dtype == torch.float32
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    torch.testing.assert_close(
        (found.vectors.double() * expected.vectors).sum(0).abs(), torch.ones(3).double(), rtol=0, atol=1e-6
    )
    vector = draw(600_000, seed=2)
    torch.testing.assert_close(
        (operator @ vector.float()).double(), exact @ vector.float().double(), rtol=1e-5, atol=1e-6
    )


def test_it_composes_with_other_operators() -> None:
    operator = LowRankOperator(ROWS["few"])
    torch.testing.assert_close((2 * operator).shift(1).to_dense(), 2 * operator.to_dense() + torch.eye(30).double())
    assert operator.provenance["operator"] == "LowRankOperator"


def test_refusals() -> None:
    for scale in (0.0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale"):
            LowRankOperator(ROWS["few"], scale)
    with pytest.raises(ValueError, match="at least one vector"):
        LowRankOperator(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="nan"):
        LowRankOperator(torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match="at least 1"):
        LowRankOperator(ROWS["few"]).eigenpairs(0)
    with pytest.raises(ValueError, match="at least 2 draws"):
        SampleCovarianceOperator(draw(1, 4))


# Sample covariances --------------------------------------------------------------------------------------------------


def test_the_sample_covariance() -> None:
    samples = draw(6, 9) + 5
    operator = SampleCovarianceOperator(samples)
    torch.testing.assert_close(operator.to_dense(), torch.cov(samples.T))
    assert len(operator.eigenpairs().values) == 5


def over_quadruples(samples: np.ndarray, form: np.ndarray) -> float:
    """The mean of T(y, y; z, z) over pairs of differences of four different draws, from its definition; form (d, d, d, d) of T."""
    values = []
    for i, j, k, l in itertools.permutations(range(len(samples)), 4):
        y, z = (samples[i] - samples[j]) / math.sqrt(2), (samples[k] - samples[l]) / math.sqrt(2)
        values.append(np.einsum("abcd,a,b,c,d", form, y, y, z, z))
    return float(np.mean(values))


@pytest.mark.parametrize("count", [4, 5, 7])
def test_unbiased_squares_are_averages_over_quadruples_of_draws(count: int) -> None:
    samples = draw(count, 3).numpy() ** 3 + 1  # skewed, off the origin
    form = draw(3, 3, 3, 3, seed=1).numpy()
    form = form + form.transpose(1, 0, 2, 3)
    form = form + form.transpose(0, 1, 3, 2)
    x = samples - samples.mean(0)
    pairs = np.einsum("abcd,ia,ib,jc,jd", form, x, x, x, x)
    crossed = np.einsum("abcd,ia,jb,ic,jd", form, x, x, x, x)
    fourth = np.einsum("abcd,ia,ib,ic,id", form, x, x, x, x)
    assert unbiased_square(pairs, crossed, fourth, count) == pytest.approx(over_quadruples(samples, form), rel=1e-10)
    norm = np.einsum("ac,bd->abcd", np.eye(3), np.eye(3))
    found = SampleCovarianceOperator(torch.from_numpy(samples)).frobenius_squared
    assert found == pytest.approx(over_quadruples(samples, norm), rel=1e-10)


def test_the_frobenius_norm_of_the_covariance_of_a_draw_is_estimated_without_bias() -> None:
    """Effective rank 25 and 8 draws: the sample's own is four times too large."""
    scales = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)
    exact = float((scales**4).sum())
    found = [SampleCovarianceOperator(scales * draw(8, 30, seed=s)) for s in range(400)]
    estimates = np.array([c.frobenius_squared for c in found])
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(len(estimates))
    assert estimates.std() / math.sqrt(len(estimates)) < 0.05 * exact
    assert np.mean([c.frobenius_norm**2 for c in found]) > 3 * exact
    assert math.isnan(SampleCovarianceOperator(draw(3, 5)).frobenius_squared)
