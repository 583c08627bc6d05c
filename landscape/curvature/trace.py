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
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import xarray as xr
from torch import Tensor

from landscape.curvature.operators import Backend, SymmetricOperator
from landscape.curvature.samplers import DiagonalSampler, HutchinsonSampler, Sampler, squares_of, steps
from landscape.curvature.xtrace import XTraceSampler
from landscape.display import Displayed, Row, Shown
from landscape.statistics import Estimate, estimate

Method = Literal["hutchinson", "xtrace"]

FIRST_CHECK = 10
"""Probes before a target may stop an estimate: fewer agree by chance too often."""

BLOCK_ENTRIES = 1 << 26
"""Entries of the blocks multiplied at once, by default: 256 MiB of float32."""


@dataclass(frozen=True, repr=False)
class TraceEstimate(Displayed):
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

    def shown(self) -> Shown:
        """The number with its error, and what it cost."""
        rows: list[Row] = [(self.quantity, Estimate(self.value, self.stderr), ""), ("method", self.method, "")]
        rows += [("probes", self.num_probes, "")] if self.num_probes else []
        rows += [("products", self.num_matvecs, "")]
        return Shown("TraceEstimate", rows, [] if self.converged else ["the error asked for was not reached"])

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


@dataclass(frozen=True, repr=False)
class DiagonalEstimate(Displayed):
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

    def shown(self) -> Shown:
        """Size, extremes and sum, and what it cost."""
        value = self.value.cpu()
        rows: list[Row] = [
            ("entries", len(value), ""),
            ("sum", float(value.sum()), ""),
            ("smallest", float(value.min()), ""),
            ("largest", float(value.max()), ""),
            ("median standard error", float(self.stderr.cpu().median()), ""),
            ("products", self.num_matvecs, ""),
        ]
        return Shown("DiagonalEstimate", rows, [] if self.converged else ["the error asked for was not reached"])

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
    sampler = DiagonalSampler(operator, "diagonal", seed, _width(operator, block))
    converged, exactly = _extend(sampler, num_probes, relative_error, max_matvecs)
    if exactly:
        value, _ = _exact(sampler)
        stderr = torch.zeros_like(value)
    else:
        value, stderr = sampler.mean, sampler.stderr()
    num_probes = 0 if exactly else sampler.num_probes
    return DiagonalEstimate(value, stderr, converged, sampler.num_matvecs, num_probes, seed, operator.provenance)


def _scalar(
    sampler: Sampler, method: str, num_probes: int, relative_error: float | None, max_matvecs: int
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


def _sampler(method: str) -> type[HutchinsonSampler] | type[XTraceSampler]:
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    return XTraceSampler if method == "xtrace" else HutchinsonSampler


def _width(operator: SymmetricOperator, block: int | None) -> int:
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    return block or max(1, min(10, BLOCK_ENTRIES // operator.dimension))


def _extend(sampler: Sampler, num_probes: int, relative_error: float | None, max_matvecs: int) -> tuple[bool, bool]:
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


def _exact(sampler: Sampler) -> tuple[Tensor, float]:
    """The diagonal (d,) and the sum of all squared entries, by d products with unit vectors."""
    operator, d = sampler.operator, sampler.operator.dimension
    entries, squares = torch.zeros(d, dtype=torch.float64, device=operator.device), 0.0
    for start, count in steps(0, d, sampler.block):
        rows = torch.zeros(count, d, device=operator.device, dtype=operator.dtype)
        rows[:, start : start + count].fill_diagonal_(1)
        images = sampler.multiply(rows)
        entries[start : start + count] = images[:, start : start + count].diagonal().double()
        squares += float(squares_of(images).sum())
    return entries, squares
