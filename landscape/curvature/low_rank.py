r"""Covariances of a few long vectors: exact traces, norms and eigenpairs from their small Gram matrix.

>>> X = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
>>> A = LowRankOperator(X, 1.0)
>>> A.trace, round(A.frobenius_norm**2), A.eigenpairs().values.tolist()
(29.0, 641, [25.0, 4.0])
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape.curvature.lanczos import Eigenpairs
from landscape.curvature.operators import SymmetricOperator
from landscape.curvature.vectors import CHUNK, inner, norms, orthogonalise


class LowRankOperator(SymmetricOperator):
    r"""The covariance of m vectors x_i about zero, never formed.

    $$A = s \sum_{i=1}^{m} x_i x_i^T, \qquad G_{ij} = s\, x_i \cdot x_j$$

    The m x m Gram matrix G has the nonzero eigenvalues of A, hence its trace and its Frobenius norm, all exact. With the learners'
    deviations delta_j and s = 1/n this is the consensus covariance Sigma_w (theory.md sec. 1). A product costs 2 m d multiplications,
    accumulated in float64.

    Attributes:
        rows: X (m, d).
        scale: s.
    """

    def __init__(self, rows: Float[Tensor, "m d"], scale: float | int | None = None) -> None:
        """Args: rows (m, d), m >= 1; scale s > 0, by default 1/m."""
        if rows.shape[0] < 1 or rows.shape[1] < 1:
            raise ValueError(f"rows of shape {tuple(rows.shape)} make no operator; give at least one vector")
        scale = 1 / len(rows) if scale is None else float(scale)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive and finite, not {scale}")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("the rows hold nan or infinity")
        self.rows, self.scale = rows.detach(), scale
        self.dimension, self.device, self.dtype = rows.shape[1], rows.device, rows.dtype

    @cached_property
    def gram(self) -> Float[Tensor, "m m"]:
        """G = s X X^T, float64."""
        return self.scale * inner(self.rows, self.rows)

    @property
    def trace(self) -> float:
        """Tr A = s sum_i |x_i|^2."""
        return self.scale * float(norms(self.rows).square().sum())

    @property
    def frobenius_norm(self) -> float:
        """|A|_F = |G|_F."""
        return float(self.gram.norm())

    def matvec(self, vector: Tensor) -> Tensor:
        """s X^T (X v)."""
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, block: Tensor) -> Tensor:
        """s X^T (X V)."""
        return self._combined(self.scale * inner(self.rows, block.T))

    def quadratic_forms(self, vectors: Float[Tensor, "d k"]) -> np.ndarray:
        """u_i^T A u_i = s |X u_i|^2 (k,) of columns u_i, float64: sums of squares, without cancellation."""
        return (self.scale * inner(self.rows, vectors.T.to(self.rows)).square().sum(0)).cpu().numpy()

    def eigenpairs(self, k: int | None = None) -> Eigenpairs:
        """The k largest eigenpairs of A, those of eigenvalue 0 left out.

        From G = S diag(g) S^T: values g, vectors X^T S/sqrt(g/s), orthonormalised. What of g is below 10 m eps g_1 (eps of float64) is
        rounding and counts as 0, so at most rank(X) pairs come back, and none of an operator that is zero. With more rows than columns the matrix
        itself is the smaller one.

        Args:
            k: how many at most; all by default.

        Returns:
            `Eigenpairs` with values (r,) falling, r = min(k, rank), and vectors (d, r); no products were taken but for the residuals.

        Cost: m d min(m, d) multiplications once, and 3 m r d.
        """
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        thin = len(self.rows) <= self.dimension
        values, small = torch.linalg.eigh(self.gram if thin else self.scale * inner(self.rows.T, self.rows.T))
        values, small = values.flip(0), small.flip(1)
        rank = int((values > 10 * len(values) * torch.finfo(torch.float64).eps * values[0].clamp_min(0)).sum())
        r = rank if k is None else min(k, rank)
        if thin:
            columns = self._combined(small[:, :r] * (self.scale / values[:r]).sqrt())
        else:
            columns = small[:, :r].to(self.dtype)
        vectors = columns.T.contiguous()
        for i in range(r):
            rest, _ = orthogonalise(vectors[i], vectors[:i])
            vectors[i] = rest / rest.double().norm()
        columns = vectors.T
        images = (self.matmat(columns) - columns * values[:r].to(columns)).T if r else vectors
        found, residuals = values[:r].cpu().numpy(), norms(images.contiguous()).cpu().numpy()
        return Eigenpairs(found, columns, residuals, residuals <= 1e-3 * found, r, 0, 0.0, self.provenance)

    def _combined(self, coefficients: Tensor) -> Tensor:
        """X^T C (d, k) of coefficients C (m, k), float64 arithmetic in the rows' type."""
        out = torch.empty(self.dimension, coefficients.shape[1], device=self.device, dtype=self.dtype)
        for start in range(0, self.dimension, CHUNK):
            part = slice(start, start + CHUNK)
            out[part] = (self.rows[:, part].double().T @ coefficients).to(self.dtype)
        return out


class SampleCovarianceOperator(LowRankOperator):
    r"""The sample covariance of K independent draws, centred at their mean, over K - 1 (theory.md sec. 4).

    It is unbiased for the covariance Sigma of a draw, and so is every linear function of it; what is quadratic in it is not:
    $E |A|_F^2 = |\Sigma|_F^2 + (\mathrm{Tr}(\Sigma)^2 + ...)/K$, far off where the effective rank of Sigma exceeds K.
    `frobenius_squared` is unbiased.

    Attributes:
        rows: (K, d) the centred draws.
    """

    def __init__(self, samples: Float[Tensor, "K d"]) -> None:
        """Args: samples (K, d), K >= 2 independent draws of one vector."""
        if len(samples) < 2:
            raise ValueError(f"a covariance needs at least 2 draws, not {len(samples)}")
        super().__init__(samples - samples.mean(0, dtype=torch.float64).to(samples.dtype), 1 / (len(samples) - 1))

    @property
    def frobenius_squared(self) -> float:
        """An unbiased estimate of |Sigma|_F^2, see `unbiased_square`; nan for fewer than 4 draws. It can be negative."""
        products = (self.gram / self.scale).cpu().numpy()
        squares = np.diagonal(products)
        pairs = (products**2).sum()
        return unbiased_square(pairs, (squares.sum() ** 2 + pairs) / 2, (squares**2).sum(), len(products))


def unbiased_square(pairs: float, crossed: float, fourth: float, count: int) -> float:
    r"""An unbiased estimate of a quadratic form T(Sigma, Sigma) of a covariance, from K centred draws x_i.

    For a multilinear T(a, b; c, d), symmetric under a <-> b and c <-> d, with T(Sigma, Sigma) its value where (a, b) and (c, d) are
    contracted with Sigma,

    $$\frac{1}{K(K-2)(K-3)} \Big[ \big(K - 2 - \tfrac{1}{K-1}\big) P + \tfrac{2}{K-1} R - K F \Big]$$

    with P = sum_ij T(x_i, x_i; x_j, x_j), R = sum_ij T(x_i, x_j; x_i, x_j) and F = sum_i T(x_i, x_i; x_i, x_i). This is the average of
    T(y, y; z, z) over all pairs of differences y = (x_i - x_j)/sqrt 2, z = (x_k - x_l)/sqrt 2 of four different draws, hence
    unbiased whatever the distribution. For T = ((a.c)(b.d) + (a.d)(b.c))/2 it is Himeno & Yamada's estimate of Tr Sigma^2
    (J. Multivariate Anal. 130 (2014) 27); that other forms go the same way is ours.

    Args:
        pairs: P.
        crossed: R.
        fourth: F.
        count: K.
    """
    if count < 4:
        return math.nan
    weighted = (count - 2 - 1 / (count - 1)) * pairs + 2 / (count - 1) * crossed - count * fourth
    return float(weighted / (count * (count - 2) * (count - 3)))
