"""Traces and norms of products of a noise covariance C with the Hessian H: what alignments are made of (theory.md sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from landscape.curvature.low_rank import LowRankOperator, SampleCovarianceOperator, unbiased_square
from landscape.curvature.operators import SymmetricOperator
from landscape.curvature.samplers import forms, steps
from landscape.curvature.trace import BLOCK_ENTRIES
from landscape.curvature.vectors import inner, multiply_rows, orthogonalise, probes

H_SQUARED, TRACE, C_SQUARED, PRODUCT, COMMUTATOR, ALONG = range(6)
"""Columns of `ProductNorms.sums`: |H|_F^2, Tr C, |C|_F^2, Tr(CH), |CH - HC|_F^2, then u_i^T C u_i."""

NORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "hessian_frobenius": lambda s: np.sqrt(s[..., H_SQUARED]),
    "noise_trace": lambda s: s[..., TRACE],
    "noise_frobenius": lambda s: np.sqrt(s[..., C_SQUARED]),
    "trace_product": lambda s: s[..., PRODUCT],
    "trace_alignment": lambda s: s[..., PRODUCT] / np.sqrt(s[..., C_SQUARED] * s[..., H_SQUARED]),
    "commutator_squared": lambda s: s[..., COMMUTATOR] / (2 * s[..., C_SQUARED] * s[..., H_SQUARED]),
    "noise_along": lambda s: s[..., ALONG:],
    "energy_share": lambda s: s[..., ALONG:].cumsum(-1) / s[..., TRACE, None],
}
"""Functions of the sums, by name."""


@dataclass(frozen=True)
class ProductNorms:
    """Sums over an orthonormal basis: what is exact, and what each probe says of the rest.

    Attributes:
        sums: (1 + p, 5 + k) float64, columns as named above: first what was summed over known vectors, then one row a probe, whose mean
            is the rest.
        without_draw: (K, 5 + k) the totals with one draw left out, for a sample covariance; (0, 5 + k) else.
        num_hessian_products: products with H for this C alone.
        num_noise_products: products with C.
    """

    sums: np.ndarray
    without_draw: np.ndarray
    num_hessian_products: int
    num_noise_products: int

    def estimate(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """A function of the totals and its standard error, by the jackknife over probes and over draws (Efron & Stein 1981).

        The bias over draws, which are few and noisy, is taken off by the jackknife too (Quenouille 1956); that over probes is left.
        The error is 0 where everything is exact; nan for a single probe, and where the function is not defined (a norm of
        nothing, the root of a negative estimate of a square).
        """
        fixed, rows = self.sums[0], self.sums[1:]
        p = len(rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = function(fixed + rows.mean(0) if p else fixed)
            variance = np.where(np.isnan(value), math.nan, 0.0)
            if p == 1:
                variance = variance + math.nan
            if p > 1:
                variance = variance + _jackknife(function(fixed + (rows.sum(0) - rows) / (p - 1)))
            if len(self.without_draw):
                left_out = function(self.without_draw)
                variance = variance + _jackknife(left_out)
                better = value + (len(left_out) - 1) * (value - left_out.mean(0))
                value = np.where(np.isnan(better), value, better)
        return np.asarray(value), np.asarray(np.sqrt(variance))


def _jackknife(values: np.ndarray) -> np.ndarray:
    return np.asarray((len(values) - 1) * (values - values[0]).var(0))  # exactly 0 where all are equal


def product_norms(
    hessian: SymmetricOperator,
    vectors: Tensor,
    noise: Mapping[str, SymmetricOperator],
    *,
    num_probes: int,
    more: Sequence[Tensor] = (),
    seed: int = 0,
) -> tuple[dict[str, ProductNorms], int]:
    r"""`ProductNorms` of every noise covariance, over the same products with H.

    With Q an orthonormal basis of all vectors, P = I - Q Q^T and A, B both symmetric, or both antisymmetric as CH - HC is,

    $$\mathrm{Tr}(A^T B) = 2 \langle A Q, B Q \rangle - \langle Q^T A Q, Q^T B Q \rangle + E\, (P A P z) \cdot (P B P z)$$

    for probes z: what touches Q on either side is exact, and no property of Q is used but that it is orthonormal. The closer it
    comes to the leading eigenvectors of both, the less is left to the probes, and the less skewed. It is one inner product for
    all pairs, so the Cauchy-Schwarz inequality holds among the estimates. Where there are as many vectors and probes as
    dimensions, Q = I and the sums are exact.
    For a `LowRankOperator` all but |H|_F^2 follows exactly from X X^T, X H X^T and X H^2 X^T.

    Args:
        hessian: H (d, d).
        vectors: U (d, k), orthonormal, along which u_i^T C u_i is wanted too.
        noise: C by name.
        num_probes: p.
        more: vectors (d, r) to be summed over exactly, leading eigenvectors of the C.
        seed: of the probes.

    Returns:
        norms by name, and the number of products with H that all share.
    """
    d, k = hessian.dimension, vectors.shape[1]
    wide = {name: c for name, c in noise.items() if not isinstance(c, LowRankOperator)}
    basis = _orthonormal_rows(vectors, more)
    exactly = len(basis) + num_probes >= d
    known, p = (d, 0) if exactly else (len(basis), num_probes)
    hessian_squares = np.zeros(1 + p)
    sums = {name: np.zeros((1 + p, ALONG + k)) for name in wide}
    width = max(1, min(10, BLOCK_ENTRIES // d))
    for first, count in [*steps(0, known, width), *steps(known, known + p, width)]:
        if first >= known:
            rows = probes("alignment", seed, first - known, count, d).to(hessian.device, hessian.dtype)
            rows = rows - (rows @ basis.T) @ basis
        elif exactly:
            rows = torch.zeros(count, d, device=hessian.device, dtype=hessian.dtype)
            rows[:, first : first + count].fill_diagonal_(1)
        else:
            rows = basis[first : first + count]
        images = _multiply(hessian, rows)
        product = partial(_inner, basis=basis, factor=0 if exactly else 1 if first >= known else 2)
        found = {name: _row_sums(hessian, c, rows, images, product) for name, c in wide.items()}
        for table, column, entries in [(hessian_squares, ..., product(images, images))] + [
            (sums[name], slice(TRACE, ALONG), f) for name, f in found.items()
        ]:
            if first >= known:
                table[1 + first - known : 1 + first - known + count, column] = entries
            else:
                table[0, column] += entries.sum(0)
    made: dict[str, ProductNorms] = {}
    total = float(hessian_squares[0] + (hessian_squares[1:].mean() if p else 0.0))
    for name, c in noise.items():
        if isinstance(c, LowRankOperator):
            made[name] = _of_low_rank(hessian, vectors, c, hessian_squares, total)
            continue
        sums[name][:, H_SQUARED] = hessian_squares
        along = _multiply(c, vectors.T.contiguous())
        sums[name][0, ALONG:] = forms(vectors.T.to(along), along)
        made[name] = ProductNorms(sums[name], np.zeros((0, ALONG + k)), known + p, 2 * (known + p) + k)
    return made, known + p


def _orthonormal_rows(vectors: Tensor, more: Sequence[Tensor]) -> Tensor:
    """The vectors (d, k) as rows, followed by what others add to them, orthonormal."""
    rows = [*vectors.T]
    for vector in torch.cat([vectors[:, :0], *(m.to(vectors) for m in more)], dim=1).T:
        rest, _ = orthogonalise(vector, torch.stack(rows) if rows else vectors.T)
        length = float(rest.double().norm())
        if length > 0.03:  # shorter ones are in the span already, and would cost a product all the same
            rows.append(rest / length)
    return torch.stack(rows)


def _multiply(operator: SymmetricOperator, rows: Tensor) -> Tensor:
    return multiply_rows(operator.matmat, rows.to(operator.device, operator.dtype))


def _inner(images: Tensor, others: Tensor, *, basis: Tensor, factor: int) -> np.ndarray:
    """Inner products of images of rows: plain (factor 0), outside the basis (1), or of rows of the basis, counted on both sides (2)."""
    if factor == 0:
        return forms(images, others)
    inside = (inner(images, basis) * inner(others, basis)).sum(1).cpu().numpy()
    return factor * forms(images, others) - inside


def _row_sums(
    hessian: SymmetricOperator,
    noise: SymmetricOperator,
    rows: Tensor,
    images: Tensor,
    product: Callable[[Tensor, Tensor], np.ndarray],
) -> np.ndarray:
    """Of rows v with images H v: v^T C v, and what products of C v, H v and C H v - H C v add to the sums, (count, 4)."""
    moved = _multiply(noise, rows).to(images)
    swapped = _multiply(noise, images).to(images) - _multiply(hessian, moved)
    pairs = (moved, moved), (moved, images), (swapped, swapped)
    return np.stack([forms(rows, moved), *(product(a, b) for a, b in pairs)], axis=1)


def _of_low_rank(
    hessian: SymmetricOperator, vectors: Tensor, noise: LowRankOperator, hessian_squares: np.ndarray, total: float
) -> ProductNorms:
    rows = noise.rows.to(hessian.device, hessian.dtype)
    images = torch.cat([_multiply(hessian, rows[i : i + count]) for i, count in steps(0, len(rows), 10)])
    gram, between, squared = (inner(a, b).cpu().numpy() for a, b in ((rows, rows), (rows, images), (images, images)))
    along = inner(rows, vectors.T).cpu().numpy()
    table = np.zeros((len(hessian_squares), ALONG + vectors.shape[1]))
    table[:, H_SQUARED] = hessian_squares
    if not isinstance(noise, SampleCovarianceOperator):
        scale, swapped = noise.scale, 2 * float((gram * squared).sum() - (between**2).sum())
        table[0, TRACE:ALONG] = gram.trace(), scale * (gram**2).sum(), between.trace(), scale * max(0.0, swapped)
        table[0, ALONG:] = (along**2).sum(0)
        table[0, TRACE:] *= scale
        return ProductNorms(table, np.zeros((0, table.shape[1])), len(rows), 0)
    table[0, TRACE:] = _sample_sums(gram, between, squared, along)
    if len(rows) < 3:
        return ProductNorms(table, np.full((2, table.shape[1]), math.nan), len(rows), 0)
    left = []
    for i in range(len(rows)):
        kept = np.arange(len(rows)) != i
        g, b, s = (_centred(m[np.ix_(kept, kept)]) for m in (gram, between, squared))
        left.append([total, *_sample_sums(g, b, s, along[kept] - along[kept].mean(0))])
    return ProductNorms(table, np.array(left), len(rows), 0)


def _centred(products: np.ndarray) -> np.ndarray:
    """Inner products of rows taken from their mean."""
    return products - products.mean(0) - products.mean(1)[:, None] + products.mean()


def _sample_sums(gram: np.ndarray, between: np.ndarray, squared: np.ndarray, along: np.ndarray) -> list[float]:
    """Unbiased Tr C, |C|_F^2, Tr(CH), |CH - HC|_F^2, u_i^T C u_i from X X^T, X H X^T, X H^2 X^T and X U of centred draws."""
    n = len(gram)
    g, b, s = gram.diagonal(), between.diagonal(), squared.diagonal()
    pairs = (gram**2).sum()
    norm = unbiased_square(pairs, (g.sum() ** 2 + pairs) / 2, (g**2).sum(), n)
    # |CH - HC|_F^2 = 2 Tr(C H^2 C) - 2 Tr(CHCH): of two vectors u, v, 2 (u.v)(Hu.Hv) - 2 (u.Hv)^2, made symmetric
    pairs, crossed = (gram * squared).sum(), (between**2).sum()
    swapped = unbiased_square(
        2 * (pairs - crossed),
        g.sum() * s.sum() + pairs - b.sum() ** 2 - crossed,
        2 * float((g * s - b**2).sum()),
        n,
    )
    return [g.sum() / (n - 1), norm, b.sum() / (n - 1), swapped, *((along**2).sum(0) / (n - 1))]
