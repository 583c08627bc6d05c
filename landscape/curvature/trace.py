"""Traces, Frobenius norms and diagonals from random probes, with standard errors one can stop on.

>>> import torch
>>> from landscape.curvature.operators import DenseOperator
>>> A = DenseOperator(torch.diag(torch.arange(1.0, 101.0)))
>>> found = trace(A, num_probes=2)  # Rademacher probes see a diagonal matrix exactly
>>> found.value, found.stderr, found.num_matvecs
(5050.0, 0.0, 2)
>>> print(trace(A, num_probes=100))  # as many products as dimensions: the sum of the diagonal itself
trace = 5050 (exact, 100 products)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from scipy.linalg import solve_triangular
from torch import Tensor

from landscape.curvature.operators import Backend, SymmetricOperator
from landscape.curvature.vectors import Distribution, inner, multiply_rows, orthogonalise, probes
from landscape.statistics import Estimate, estimate

Method = Literal["hutchinson", "xtrace"]

FIRST_CHECK = 10
"""Probes before a target may stop an estimate: fewer agree by chance too often."""

PAIRED = 50
"""Probes whose pairs give the covariance in the standard error of XTrace; a matter of time alone."""

BLOCK_ENTRIES = 1 << 26
"""Entries of the blocks multiplied at once, by default: 256 MiB of float32."""


@dataclass(frozen=True)
class TraceEstimate:
    """A number estimated from random probes.

    Attributes:
        value: the estimate.
        stderr: its standard error over probes; 0 where exact, nan for one probe.
        converged: whether the target was met; True where none was set.
        num_matvecs: products taken.
        num_probes: probes the value is an average over; 0 where exact.
        seed: of the probes.
        method: "hutchinson", "xtrace" or "exact".
        quantity: "trace" or "frobenius_norm".
        provenance: of the operator.
    """

    value: float
    stderr: float
    converged: bool
    num_matvecs: int
    num_probes: int
    seed: int
    method: str
    quantity: str = "trace"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        how = f"{self.method}, {self.num_probes} probes" if self.num_probes else self.method
        missed = "" if self.converged else ", target missed"
        return f"{self.quantity} = {Estimate(self.value, self.stderr)} ({how}, {self.num_matvecs} products{missed})"

    def to_xarray(self) -> xr.Dataset:
        """The value under its quantity's name, with _stderr beside it."""
        variables = {
            self.quantity: ((), self.value),
            f"{self.quantity}_stderr": ((), self.stderr),
            "converged": ((), self.converged),
        }
        return xr.Dataset(variables, attrs={**_counts(self), "method": self.method})


@dataclass(frozen=True)
class DiagonalEstimate:
    """The diagonal of an operator.

    Attributes:
        value: (d,) estimates, float64, on the operator's device.
        stderr: (d,) their standard errors over probes; 0 where exact, nan for one probe.
        converged: whether the target was met; True where none was set.
        num_matvecs: products taken.
        num_probes: probes averaged; 0 where exact.
        seed: of the probes.
        provenance: of the operator.
    """

    value: Tensor
    stderr: Tensor
    converged: bool
    num_matvecs: int
    num_probes: int
    seed: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_xarray(self) -> xr.Dataset:
        """Values and errors over parameter."""
        variables = {
            "diagonal": ("parameter", self.value.cpu().numpy()),
            "diagonal_stderr": ("parameter", self.stderr.cpu().numpy()),
            "converged": ((), self.converged),
        }
        return xr.Dataset(variables, attrs=_counts(self))


def _counts(result: TraceEstimate | DiagonalEstimate) -> dict[str, Any]:
    plain = {key: value if isinstance(value, int | float) else str(value) for key, value in result.provenance.items()}
    return {**plain, "num_matvecs": result.num_matvecs, "num_probes": result.num_probes, "seed": result.seed}


def trace(
    operator: SymmetricOperator,
    *,
    method: Method = "hutchinson",
    num_probes: int = 20,
    relative_error: float | None = None,
    max_matvecs: int = 1000,
    seed: int = 0,
    block: int | None = None,
    backend: Backend = "landscape",
) -> TraceEstimate:
    r"""The trace $\mathrm{tr} A = \sum_i A_{ii}$.

    "hutchinson" averages $w^\top A w$ over Rademacher probes (Hutchinson 1990), one product each. The variance of a summand is
    $2 \sum_{i \neq j} A_{ij}^2$, so that the error falls like $1/\sqrt{m}$ whatever the spectrum.

    "xtrace" (Epperly, Tropp & Webber 2024, SIAM J. Matrix Anal. Appl. 45, 1) takes the trace on the range of A times the probes
    exactly and estimates only the rest, each probe in turn left out of the range and used for the rest,

    $$t_i = \mathrm{tr}\, Q_i^\top A Q_i + \frac{d - \mathrm{rank}\, Q_i}{|\mu_i|^2}\, \mu_i^\top A \mu_i, \qquad
      \mu_i = (I - Q_i Q_i^\top) w_i, \qquad t = \frac{1}{m} \sum_i t_i$$

    with $Q_i$ an orthonormal basis of $\{A w_j\}_{j \neq i}$ and Gaussian $w_i$. Two products a probe; m vectors in memory. Exact,
    up to rounding, for rank below m and for multiples of the identity; far better than Hutchinson where few eigenvalues dominate;
    1.4 times worse for the same number of products where none does.

    The standard error. Hutchinson's is that of a mean of independent numbers; (value - trace)/stderr has rms 1.0 to 1.2 for 20 probes
    (400 seeds, ten spectra), 1.4 where one eigenvalue dominates. XTrace's $t_i$ depend on each other, and the paper's
    $s^2/m = \sum_i (t_i - t)^2/(m (m - 1))$ alone is too small where the spectrum decays: the rms error is 1.0 times its root for flat
    spectra, 1.2 to 1.4 times for powers and exponentials, 1.7 times at worst. But given the other probes $t_i$ is unbiased, hence
    $\mathrm{Cov}(t_i, t_j) = E[\delta_{ij} \delta_{ji}]$ with $\delta_{ij}$ the change of $t_i$ when $w_j$ joins the others, and

    $$\mathrm{stderr}^2 = \frac{s^2}{m} + \max\Big(0,\; \frac{1}{m (m - 1)} \sum_{i \neq j} \delta_{ij} \delta_{ji}\Big)$$

    is unbiased but for the cut at 0, and costs no products. With it the rms error is 0.9 to 1.1 times the rms stderr (200 seeds, 10 to
    40 probes), less where a few probes exhaust the spectrum; a single (value - trace)/stderr has rms 1.0 to 1.3 for 20 probes and
    more, up to 2 for 10. Rounding is not in it: an error of about the type's precision times |A| remains where stderr is below.

    A target is held against the standard error, never against a mean that has stopped moving, at few and ever larger numbers of
    probes. The rms error of what stops is 0.6 to 1.2 times the target with Hutchinson, less with XTrace (100 seeds, six spectra).

    Args:
        operator: A, (d, d).
        method: "hutchinson" or "xtrace".
        num_probes: m; with a target, how many before it is first tried, at least 10.
        relative_error: the target: probes are added until stderr <= relative_error |value|.
        max_matvecs: bound on the products that a target may cost.
        seed: of the probes.
        block: probes multiplied at once, a matter of memory alone; at most 10 by default, fewer for large d.
        backend: "pyhessian" asks that package instead: Hutchinson with at most `num_probes` probes, stopped when its running mean moves
            by less than `relative_error` (its 1e-3 by default); `converged` says whether the standard error met that.

    Returns:
        `TraceEstimate`. The exact trace with stderr 0, by d products with unit vectors, where probes would cost as many.

    Raises:
        ValueError: options out of range; a product that is not finite.
    """
    if backend == "pyhessian":
        return _by_pyhessian(operator, num_probes, relative_error or 1e-3, seed)
    sampler = _sampler(method)(operator, "trace", seed, _width(operator, block))
    return _scalar(sampler, method, num_probes, relative_error, max_matvecs)


def frobenius_norm(
    operator: SymmetricOperator,
    *,
    method: Method = "hutchinson",
    num_probes: int = 20,
    relative_error: float | None = None,
    max_matvecs: int = 1000,
    seed: int = 0,
    block: int | None = None,
) -> TraceEstimate:
    r"""The Frobenius norm $|A|_F = (\sum_{ij} A_{ij}^2)^{1/2}$, the root of the sum of squared eigenvalues.

    The trace of $A^2$ is estimated as `trace` does, from $w^\top A^2 w = |A w|^2$ at no more products, and the root taken; the
    standard error is the square's over twice the value (delta method). The root of an unbiased square is low by about
    stderr^2/(2 value). Squares let few eigenvalues dominate, so "xtrace" pays sooner here than for the trace; it holds 2 m
    vectors.

    Args, returns and raises: see `trace`.

    >>> import torch
    >>> from landscape.curvature.operators import DenseOperator
    >>> round(frobenius_norm(DenseOperator(torch.diag(torch.tensor([3.0, 4.0])))).value, 6)
    5.0
    """
    sampler = _sampler(method)(operator, "frobenius norm", seed, _width(operator, block), squared=True)
    return _scalar(sampler, method, num_probes, relative_error, max_matvecs)


def diagonal(
    operator: SymmetricOperator,
    *,
    num_probes: int = 20,
    relative_error: float | None = None,
    max_matvecs: int = 1000,
    seed: int = 0,
    block: int | None = None,
) -> DiagonalEstimate:
    r"""The diagonal $A_{ii}$, as the average of $w_i (A w)_i$ over Rademacher probes (Bekas, Kokiopoulou & Saad 2007).

    One product a probe; the variance of a summand at entry i is $\sum_{j \neq i} A_{ij}^2$, estimated for every entry.

    Args:
        operator: A, (d, d).
        num_probes: m; with a target, how many before it is first tried, at least 10.
        relative_error: the target, in the norm over entries: probes are added until |stderr| <= relative_error |value|.
        max_matvecs: bound on the products that a target may cost.
        seed: of the probes.
        block: probes multiplied at once, a matter of memory alone.

    Returns:
        `DiagonalEstimate`. The exact diagonal with stderr 0, by d products, where probes would cost as many.

    Raises:
        ValueError: options out of range; a product that is not finite.

    >>> import torch
    >>> from landscape.curvature.operators import DenseOperator
    >>> diagonal(DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))).value.tolist()
    [2.0, 3.0]
    """
    sampler = _Diagonal(operator, "diagonal", seed, _width(operator, block))
    converged, exactly = _extend(sampler, num_probes, relative_error, max_matvecs)
    if exactly:
        value, _ = _exact(sampler)
        stderr = torch.zeros_like(value)
    else:
        value, stderr = sampler.mean, sampler.stderr()
    num_probes = 0 if exactly else sampler.num_probes
    return DiagonalEstimate(value, stderr, converged, sampler.num_matvecs, num_probes, seed, operator.provenance)


def _scalar(
    sampler: _Sampler, method: str, num_probes: int, relative_error: float | None, max_matvecs: int
) -> TraceEstimate:
    converged, exactly = _extend(sampler, num_probes, relative_error, max_matvecs)
    if exactly:
        entries, squares = _exact(sampler)
        found = Estimate(math.sqrt(squares) if sampler.squared else float(entries.sum()), 0.0, 0)
    else:
        found = sampler.estimate()
    return TraceEstimate(
        value=found.value,
        stderr=found.stderr,
        converged=converged,
        num_matvecs=sampler.num_matvecs,
        num_probes=found.count,
        seed=sampler.seed,
        method="exact" if exactly else method,
        quantity="frobenius_norm" if sampler.squared else "trace",
        provenance=sampler.operator.provenance,
    )


def _by_pyhessian(operator: SymmetricOperator, num_probes: int, relative_error: float, seed: int) -> TraceEstimate:
    from landscape.curvature.pyhessian import quadratic_forms

    found = estimate(quadratic_forms(operator, num_probes, relative_error, seed))
    met = found.stderr <= relative_error * abs(found.value)
    provenance = {**operator.provenance, "backend": "pyhessian"}
    return TraceEstimate(
        found.value, found.stderr, met, found.count, found.count, seed, "hutchinson", "trace", provenance
    )


def _sampler(method: str) -> type[_Hutchinson] | type[_XTrace]:
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    return _XTrace if method == "xtrace" else _Hutchinson


def _width(operator: SymmetricOperator, block: int | None) -> int:
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    return block or max(1, min(10, BLOCK_ENTRIES // operator.dimension))


def _extend(sampler: _Sampler, num_probes: int, relative_error: float | None, max_matvecs: int) -> tuple[bool, bool]:
    """Add probes as asked, or until the target is met or the bound is: (whether met, whether to take all d products instead).

    The next check is where the error would meet the target if it fell like 1/sqrt(m), between 1.25 and 2 times the probes so
    far: few looks, so that the luckiest of many does not stop it.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, not {num_probes}")
    d = sampler.operator.dimension
    if relative_error is None:
        if num_probes * sampler.cost >= d:
            return True, True
        sampler.extend(num_probes)
        return True, False
    if not relative_error > 0:
        raise ValueError(f"relative_error must be positive, not {relative_error}")
    limit = max_matvecs // sampler.cost
    if limit < 2 and max_matvecs < d:
        raise ValueError(f"max_matvecs = {max_matvecs} leaves no two probes, and a standard error needs two")
    total = max(num_probes, FIRST_CHECK)
    while True:
        if total * sampler.cost >= d and sampler.num_matvecs + d <= max_matvecs:
            return True, True
        total = min(total, limit)
        sampler.extend(total)
        error = sampler.relative_error()
        if total >= FIRST_CHECK and error <= relative_error:
            return True, False
        if total == limit:
            return False, False
        needed = total * min(error / relative_error, math.sqrt(2)) ** 2
        total = max(math.ceil(1.25 * total), math.ceil(needed))


def _exact(sampler: _Sampler) -> tuple[Tensor, float]:
    """The diagonal (d,) and the sum of all squared entries, by d products with unit vectors."""
    operator, d = sampler.operator, sampler.operator.dimension
    entries, squares = torch.zeros(d, dtype=torch.float64, device=operator.device), 0.0
    for start, count in _steps(0, d, sampler.block):
        rows = torch.zeros(count, d, device=operator.device, dtype=operator.dtype)
        rows[:, start : start + count].fill_diagonal_(1)
        images = sampler.multiply(rows)
        entries[start : start + count] = images[:, start : start + count].diagonal().double()
        squares += float(_squares(images).sum())
    return entries, squares


def _steps(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    return ((start, min(width, last - start)) for start in range(first, last, width))


def _squares(rows: Tensor) -> np.ndarray:
    """Squared lengths of rows, float64."""
    return torch.stack([inner(row[None], row[None])[0, 0] for row in rows]).cpu().numpy()


class _Sampler(ABC):
    """Probes so far of one operator, and what they say."""

    cost = 1
    distribution: Distribution = "rademacher"

    def __init__(
        self, operator: SymmetricOperator, purpose: str, seed: int, block: int, *, squared: bool = False
    ) -> None:
        self.operator, self.purpose, self.seed, self.block, self.squared = operator, purpose, seed, block, squared
        self.num_probes = self.num_matvecs = 0

    def extend(self, total: int) -> None:
        """Add probes until there are `total`."""
        for first, count in _steps(self.num_probes, total, self.block):
            rows = self.probes(first, count)
            self.add(rows, self.multiply(rows))
        self.num_probes = total

    def probes(self, first: int, count: int) -> Tensor:
        rows = probes(self.purpose, self.seed, first, count, self.operator.dimension, self.distribution)
        return rows.to(self.operator.device, self.operator.dtype)

    def multiply(self, rows: Tensor) -> Tensor:
        self.num_matvecs += len(rows)
        return multiply_rows(self.operator.matmat, rows)

    @abstractmethod
    def add(self, rows: Tensor, images: Tensor) -> None:
        """Take in probes (count, d) and the products with them."""

    def relative_error(self) -> float:
        """Standard error over |value|; inf for a value of 0 that is not exact."""
        found = self.estimate()
        return _over(found.stderr, abs(found.value))

    def estimate(self) -> Estimate:
        """The number, its standard error and the probes it rests on."""
        raise NotImplementedError

    def _root(self, found: Estimate) -> Estimate:
        """The estimate itself, or the root of an estimated square."""
        if not self.squared:
            return found
        value = math.sqrt(max(found.value, 0.0))
        return Estimate(value, _over(found.stderr, 2 * value), found.count)


def _over(error: float, value: float) -> float:
    if error == 0:
        return 0.0
    return error / value if value else error * math.inf


class _Hutchinson(_Sampler):
    """w^T A w, or w^T A^2 w, of Rademacher probes."""

    def __init__(
        self, operator: SymmetricOperator, purpose: str, seed: int, block: int, *, squared: bool = False
    ) -> None:
        super().__init__(operator, purpose, seed, block, squared=squared)
        self._samples: list[np.ndarray] = []

    def add(self, rows: Tensor, images: Tensor) -> None:
        self._samples.append(_squares(images) if self.squared else _forms(rows, images))

    def estimate(self) -> Estimate:
        return self._root(estimate(np.concatenate(self._samples)))


def _forms(rows: Tensor, images: Tensor) -> np.ndarray:
    """Inner products of rows with rows, one by one, float64."""
    pairs = zip(rows, images, strict=True)
    return torch.stack([inner(row[None], image[None])[0, 0] for row, image in pairs]).cpu().numpy()


class _Diagonal(_Sampler):
    """Running mean and sum of squared deviations of w * A w, entry by entry (Welford 1962)."""

    def __init__(self, operator: SymmetricOperator, purpose: str, seed: int, block: int) -> None:
        super().__init__(operator, purpose, seed, block)
        self.mean = torch.zeros(operator.dimension, dtype=torch.float64, device=operator.device)
        self._squares = torch.zeros_like(self.mean)
        self._count = 0

    def add(self, rows: Tensor, images: Tensor) -> None:
        for row, image in zip(rows, images, strict=True):
            self._count += 1
            sample = (row * image).double()
            from_old = sample - self.mean
            self.mean += from_old / self._count
            self._squares += from_old * (sample - self.mean)

    def stderr(self) -> Tensor:
        degrees = self._count * (self._count - 1)
        return (self._squares / degrees).sqrt() if degrees else torch.full_like(self.mean, math.nan)

    def relative_error(self) -> float:
        return _over(float(self.stderr().norm()), float(self.mean.norm()))


class _XTrace(_Sampler):
    """The products A W = Q R and what XTrace needs of them, for A or for A^2.

    Columns of Q are added one at a time and never changed, so that probes can be added until a target is met. A product that
    adds nothing to the basis, because of the rank of A, adds no column to Q.
    """

    cost = 2
    distribution: Distribution = "gaussian"

    def __init__(
        self, operator: SymmetricOperator, purpose: str, seed: int, block: int, *, squared: bool = False
    ) -> None:
        super().__init__(operator, purpose, seed, block, squared=squared)
        self._basis = torch.empty(0, operator.dimension, device=operator.device, dtype=operator.dtype)  # Q^T
        self._images = self._basis  # (A Q)^T, kept for A^2 alone
        self._rank = 0  # rows of these two in use
        self._inside = np.zeros((0, 0))  # Q^T A Q
        self._columns: list[np.ndarray] = []  # of R, without their trailing zeros
        self._forms: list[float] = []  # w^T A w, or |A w|^2
        self._lengths: list[float] = []  # |w|^2
        self._overlaps = np.zeros((0, 0))  # Q^T W
        self._largest = 0.0  # |A w|

    def extend(self, total: int) -> None:
        self._basis = _with_room(self._basis, self._rank, total)
        if self.squared:
            self._images = _with_room(self._images, self._rank, total)
        super().extend(total)
        basis = self._basis[: self._rank]
        overlaps = [inner(self.probes(*step), basis).cpu().numpy() for step in _steps(0, total, self.block)]
        self._overlaps = np.concatenate(overlaps).T

    def add(self, rows: Tensor, images: Tensor) -> None:
        self._forms.extend(_squares(images) if self.squared else _forms(rows, images))
        self._lengths.extend(_squares(rows))
        old = self._rank
        for image in images:
            self._largest = max(self._largest, float(image.double().norm()))
            rest, coefficients = orthogonalise(image, self._basis[: self._rank])
            length = float(rest.double().norm())
            column = coefficients.cpu().numpy()
            if length > 10 * torch.finfo(rest.dtype).eps * self._largest:
                self._basis[self._rank] = rest / length
                self._rank += 1
                column = np.append(column, length)
            self._columns.append(column)
        if self._rank == old:
            return
        images = self.multiply(self._basis[old : self._rank])
        inside = inner(images, self._basis[: self._rank]).cpu().numpy()
        inside[:, old:] = (inside[:, old:] + inside[:, old:].T) / 2
        self._inside = np.block([[self._inside, inside[:, :old].T], [inside[:, :old], inside[:, old:]]])
        if self.squared:
            self._images[old : self._rank] = images

    def estimate(self) -> Estimate:
        return self._root(self._sketch().estimate())

    def _sketch(self) -> Sketch:
        triangle = np.stack([np.pad(column, (0, self._rank - len(column))) for column in self._columns], axis=1)
        gram, cross = self._inside, triangle
        if self.squared:
            images = self._images[: self._rank]
            gram, cross = inner(images, images).cpu().numpy(), self._inside @ triangle
        forms, lengths = np.array(self._forms), np.array(self._lengths)
        return Sketch(gram, cross, triangle, self._overlaps, forms, lengths, self.operator.dimension)


def _with_room(rows: Tensor, used: int, total: int) -> Tensor:
    room = torch.empty(total, rows.shape[1], device=rows.device, dtype=rows.dtype)
    room[:used] = rows[:used]
    return room


@dataclass(frozen=True)
class Sketch:
    """What XTrace needs to know of B (A or A^2) and m probes W, with Q an orthonormal basis of the k-dimensional range of A W.

    Attributes:
        gram: (k, k) Q^T B Q.
        cross: (k, m) Q^T B W.
        span: (k, m) R = Q^T A W.
        overlaps: (k, m) Q^T W.
        forms: (m,) w_i^T B w_i.
        lengths: (m,) |w_i|^2.
        dimension: d.
    """

    gram: np.ndarray
    cross: np.ndarray
    span: np.ndarray
    overlaps: np.ndarray
    forms: np.ndarray
    lengths: np.ndarray
    dimension: int

    def leave_one_out(self) -> np.ndarray:
        """The m traces t_i."""
        rank = len(self.span)
        if not rank:
            return self.forms * self.dimension / self.lengths
        lost = self._lost
        along = self.overlaps - lost * (lost * self.overlaps).sum(0)  # Q^T Q_i Q_i^T w_i
        rest = self.forms - 2 * (along * self.cross).sum(0) + (along * (self.gram @ along)).sum(0)  # mu_i^T B mu_i
        outside = self.dimension - rank + lost.any(0)
        length = self.lengths - (along**2).sum(0)  # |mu_i|^2
        scale = np.divide(outside, length, out=np.zeros(len(length)), where=outside > 0)
        return np.trace(self.gram) - (lost * (self.gram @ lost)).sum(0) + scale * rest

    def estimate(self) -> Estimate:
        """Mean of the t_i, and its standard error from what each of a pair of probes does to the other's trace."""
        samples = self.leave_one_out()
        mean = estimate(samples)
        pairs = min(mean.count, PAIRED)
        if pairs < 2:
            return mean
        changes = np.zeros((pairs, pairs))  # of t_i by probe j, at [j, i]
        for j in range(pairs):
            others = np.arange(pairs) != j
            changes[j, others] = samples[:pairs][others] - self.without(j).leave_one_out()[: pairs - 1]
        covariance = float((changes * changes.T).sum()) / (pairs * (pairs - 1))
        return Estimate(mean.value, math.sqrt(mean.stderr**2 + max(covariance, 0.0)), mean.count)

    def without(self, i: int) -> Sketch:
        """The sketch that the other probes give."""
        others = np.arange(len(self.forms)) != i
        basis = _complement(self._lost[:, i]) if len(self.span) else np.eye(0)
        return Sketch(
            basis.T @ self.gram @ basis,
            basis.T @ self.cross[:, others],
            basis.T @ self.span[:, others],
            basis.T @ self.overlaps[:, others],
            self.forms[others],
            self.lengths[others],
            self.dimension,
        )

    @cached_property
    def _lost(self) -> np.ndarray:
        """(k, m) unit vectors: the direction of the range that no product but i's has; 0 where the others span it all."""
        leverages, factor = np.linalg.qr(self.span.T)
        lost = solve_triangular(factor, leverages.T)
        lost /= np.linalg.norm(lost, axis=0)
        lost[:, (leverages**2).sum(1) < 1 - 1e-10] = 0
        return lost


def _complement(direction: np.ndarray) -> np.ndarray:
    """Orthonormal columns orthogonal to a unit vector (k,), by a Householder reflection; all of the space for the zero vector."""
    if not direction.any():
        return np.eye(len(direction))
    mirror = direction.copy()
    mirror[0] += math.copysign(1.0, mirror[0])
    return (np.eye(len(mirror)) - 2 * np.outer(mirror, mirror) / (mirror @ mirror))[:, 1:]
