r"""What a sample of m noise vectors says of their covariance C: traces with errors, from the m x m matrix of inner products (theory.md sec. 4).

Traces are unbiased whether the m vectors are independent draws or a sample without replacement from N. With $K_{ik} = c_i \cdot c_k$ of
vectors centred at their known mean,

$$\mathrm{tr}\, C = E\Big[\frac{1}{m} \sum_i K_{ii}\Big], \qquad
  |C|_F^2 = E\Big[\Big(1 - \frac{1}{N}\Big) \frac{\sum_{i \neq k} K_{ik}^2}{m (m - 1)} + \frac{1}{N} \frac{\sum_i K_{ii}^2}{m}\Big],$$

the second term (ours) because without replacement a pair never is one vector twice. Centred at the mean of the sample, with
$p = \sum_{ik} K_{ik}^2$, $q = \sum_i K_{ii}^2$ and $t = \sum_i K_{ii}$ of m vectors, the off-diagonal sum is biased, and the averages over distinct vectors

$$U = \Big\langle \tfrac14 ((x_1 - x_2) \cdot (x_3 - x_4))^2 \Big\rangle = \frac{(m-1)(m-2)\, p - m(m-1)\, q + t^2}{m(m-1)(m-2)(m-3)}, \qquad
  V = \Big\langle \tfrac14 |x_1 - x_2|^2 |x_3 - x_4|^2 \Big\rangle = \frac{(m^2 - 3m + 1)\, t^2 - m(m-1)\, q + 2p}{m(m-1)(m-2)(m-3)}$$

have the expectations $|C|_F^2$ and $(\mathrm{tr}\, C)^2$ under independent draws (U is that of Chen, Zhang & Zhong 2010, J. Am. Stat. Assoc. 105, 810, in the
form of Himeno & Yamada 2014, J. Multivariate Anal. 130, 27). Without replacement they, and $W = \langle |x_1 - x_2|^4 \rangle$, have as
expectations the same averages over all N (as polykays have: Tukey 1950, J. Am. Stat. Assoc. 45, 501), which are solved for p and t^2 of the population (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape.display import Displayed, Row, Shown, sparkline
from landscape.statistics import Estimate


@dataclass(frozen=True, repr=False)
class CovarianceSpectrum(Displayed):
    """The covariance C of noise vectors, as a whole and by blocks of parameters, from a sample.

    Attributes:
        blocks: names, the first of them "all" where there are several.
        sizes: (b,) parameters of each block.
        eigenvalues: (b, m) of the sample covariance, descending, then zeros; they sum to the trace. At most m (m - 1 when centred at the sample's mean) are not
            zero. Unlike the traces they are biased: a sample spreads them, the largest are too large (Marchenko & Pastur 1967).
        trace: (b,) Tr C, unbiased.
        trace_stderr: (b,) its standard error over samples.
        frobenius_squared: (b,) |C|_F^2, unbiased.
        frobenius_squared_stderr: (b,).
        effective_rank: (b,) Tr(C)^2/|C|_F^2, a ratio of unbiased estimates; nan where the denominator is not positive.
        effective_rank_stderr: (b,).
        num_samples: m.
        population: N, of which the m were drawn without replacement; None for independent draws. Where m = N all is exact and the errors are 0.
        centre: "mean" (of the sample; divided by m - 1, and by the population's N/(N - 1)), "exact" (a given vector; divided by m).
        attributes: what else is known of the vectors.
    """

    blocks: tuple[str, ...]
    sizes: np.ndarray
    eigenvalues: np.ndarray
    trace: np.ndarray
    trace_stderr: np.ndarray
    frobenius_squared: np.ndarray
    frobenius_squared_stderr: np.ndarray
    effective_rank: np.ndarray
    effective_rank_stderr: np.ndarray
    num_samples: int
    population: int | None
    centre: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def estimate(self, quantity: str, block: str | None = None) -> Estimate:
        """A quantity ("trace", "frobenius_squared", "effective_rank") of a block, the first by default, with its error."""
        i = 0 if block is None else self.blocks.index(block)
        return Estimate(float(getattr(self, quantity)[i]), float(getattr(self, f"{quantity}_stderr")[i]), self.num_samples)  # fmt: skip

    def shown(self) -> Shown:
        """Traces and effective rank of the first block, with errors."""
        rows: list[Row] = [
            ("block", f"{self.blocks[0]} ({int(self.sizes[0]):,} parameters)", ""),
            ("Tr C", self.estimate("trace"), "gradient^2"),
            ("|C|_F^2", self.estimate("frobenius_squared"), "gradient^4"),
            ("effective rank", self.estimate("effective_rank"), ""),
            ("vectors", self.num_samples, ""),
        ]
        more = [f"{len(self.blocks) - 1} more blocks: {', '.join(self.blocks[1:6])}"] if len(self.blocks) > 1 else []
        picture = sparkline(self.eigenvalues[0], "eigenvalues of the sample covariance", logarithmic=True)
        return Shown("CovarianceSpectrum", rows, more, picture)

    def to_xarray(self) -> xr.Dataset:
        """All of it, over block and eigen_index."""
        described = {
            "trace": ("Tr C, unbiased", "gradient^2"),
            "frobenius_squared": ("|C|_F^2, unbiased", "gradient^4"),
            "effective_rank": ("Tr(C)^2/|C|_F^2", "1"),
        }
        made = xr.Dataset(
            {
                "eigenvalue": (("block", "eigen_index"), self.eigenvalues, {"long_name": "eigenvalues of the sample covariance", "units": "gradient^2"}),
                "num_parameters": ("block", self.sizes),
            },
            coords={"block": list(self.blocks)},
            attrs={**self.attributes, "num_samples": self.num_samples, "population": self.population or "independent draws", "centre": self.centre,
                   "errors": "standard errors over samples, by the jackknife"},
        )  # fmt: skip
        for name, (title, units) in described.items():
            made[name] = ("block", getattr(self, name), {"long_name": title, "units": units})
            made[f"{name}_stderr"] = ("block", getattr(self, f"{name}_stderr"), {"long_name": f"standard error of {name}"})  # fmt: skip
        return made


def centred(
    gram: Float[Tensor, "m m"], along: Float[Tensor, " m"] | None = None, norm_squared: float = 0.0
) -> Float[Tensor, "m m"]:
    """Inner products of vectors less a centre, from those of the vectors.

    Args:
        gram: x_i . x_k.
        along: x_i . g of a centre g; None for the mean of the vectors.
        norm_squared: |g|^2.
    """
    if along is None:
        along = gram.mean(1)
        norm_squared = float(along.mean())
    return gram - along[:, None] - along + norm_squared


@dataclass(frozen=True)
class BlockSpectrum:
    """One block of a `CovarianceSpectrum`."""

    name: str
    size: int
    eigenvalues: np.ndarray
    trace: Estimate
    frobenius_squared: Estimate
    effective_rank: Estimate


def block_spectrum(
    name: str, size: int, gram: Float[Tensor, "m m"], *, population: int | None = None, at_mean: bool = True
) -> BlockSpectrum:
    """Eigenvalues and traces of the sample covariance from the inner products K of centred vectors. Cost: 4/3 m^3 flops for the eigenvalues.

    Standard errors are the jackknife's, all m samples less one from sums over rows, in O(m^2), times 1 - m/N without replacement. For |C|_F^2 and the effective
    rank two corrections: the part of the variance that is of second order in the vectors, which the jackknife counts twice (Efron & Stein
    1981, Ann. Stat. 9, 586) and which rules where the effective rank exceeds m, is estimated from the doubly centred K_ik^2 (U-centring:
    Szekely & Rizzo 2014, Ann. Stat. 42, 2382) and taken off once. (value - truth)/stderr of the trace and of |C|_F^2 has rms 0.9 to 1.2 for m = 200 and 1.0 to
    1.5 for 50 (600 samples, five spectra, both ways of drawing; most where few directions dominate, whose errors are small when the values are), up to 10
    for 8. The effective rank is high by up to a third of its error for m >= 50.

    Args:
        name: of the block.
        size: its parameters.
        gram: K, float64, centred at the sample's mean or at a given vector.
        population: N; None for independent draws.
        at_mean: which of the two.
    """
    count = len(gram)
    if population is not None and count > population:
        raise ValueError(f"{count} samples cannot be drawn without replacement from {population}")
    if at_mean and count < 2:
        raise ValueError("a covariance centred at the sample's mean needs at least two samples")
    found, trace, frobenius, rank = _values(gram, population, at_mean), *_errors(gram, population, at_mean)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).cpu().numpy()
    total = float(gram.diagonal().sum())
    share = found[0] / total if total > 0 else 0.0
    limit = min(size, count - at_mean)  # the rest is rounding
    values[limit:] = 0
    return BlockSpectrum(
        name,
        size,
        values * share,
        Estimate(found[0], trace, count),
        Estimate(found[1], frobenius, count),
        Estimate(_ratio(found), rank, count),
    )


def collect(blocks: list[BlockSpectrum], population: int | None, centre: str, attributes: dict[str, Any]) -> CovarianceSpectrum:  # fmt: skip
    """Blocks of one sample as one result."""

    def column(quantity: str, part: str) -> np.ndarray:
        return np.array([getattr(getattr(b, quantity), part) for b in blocks])

    return CovarianceSpectrum(
        blocks=tuple(b.name for b in blocks),
        sizes=np.array([b.size for b in blocks]),
        eigenvalues=np.stack([b.eigenvalues for b in blocks]),
        trace=column("trace", "value"),
        trace_stderr=column("trace", "stderr"),
        frobenius_squared=column("frobenius_squared", "value"),
        frobenius_squared_stderr=column("frobenius_squared", "stderr"),
        effective_rank=column("effective_rank", "value"),
        effective_rank_stderr=column("effective_rank", "stderr"),
        num_samples=blocks[0].trace.count,
        population=population,
        centre=centre,
        attributes=attributes,
    )


# Estimates -------------------------------------------------------------------------------------------------------

_Triple = tuple[Any, Any, Any]  # of numbers, or arrays of them


def _values(gram: Tensor, population: int | None, at_mean: bool) -> tuple[float, float, float]:
    diagonal = gram.diagonal()
    p, q, t = float(gram.square().sum()), float(diagonal.square().sum()), float(diagonal.sum())
    return _unbiased(p, q, t, len(gram), population, at_mean)


def _unbiased(p: Any, q: Any, t: Any, m: int, population: int | None, at_mean: bool) -> _Triple:
    """Tr C, |C|_F^2 and Tr(C)^2 from the sums p, q, t of m centred vectors; nan for what so few cannot tell."""
    n, nan = population or math.inf, t * math.nan
    if m == n:
        return t / m, p / m**2, t**2 / m**2
    if not at_mean:
        if m < 2:
            return t / m, nan, nan
        pairs = (p - q) / (m * (m - 1))
        spread = (q - t**2 / m) / (m - 1)
        return t / m, (1 - 1 / n) * pairs + q / (n * m), t**2 / m**2 - (1 - m / n) * spread / m
    trace = t / (m - 1) * (1 - 1 / n)
    if m < 4:
        return trace, nan, nan
    averages = _over_distinct(m) @ np.stack([p / m**2, q / m, t**2 / m**2])
    if population is None:
        return trace, averages[0], averages[1]
    solved = np.linalg.solve(_over_distinct(population), averages)
    return trace, solved[0], solved[2]


def _over_distinct(n: int) -> np.ndarray:
    """The matrix of U, V and W over (p/n^2, q/n, t^2/n^2)."""
    falling = (n - 1) * (n - 2) * (n - 3) / n
    return np.array([
        [(n - 1) * (n - 2) / falling, -(n - 1) / falling, 1 / falling],
        [2 / falling, -(n - 1) / falling, (n**2 - 3 * n + 1) / falling],
        [4 * n / (n - 1), 2 * n / (n - 1), 2 * n / (n - 1)],
    ])  # fmt: skip


def _ratio(found: _Triple) -> float:
    return float(found[2] / found[1]) if found[1] > 0 else math.nan


def _errors(gram: Tensor, population: int | None, at_mean: bool) -> tuple[float, float, float]:
    """Standard errors of Tr C, |C|_F^2 and the effective rank."""
    m = len(gram)
    if m == population:
        return 0.0, 0.0, 0.0
    if m < 3:
        return math.nan, math.nan, math.nan
    left = 1 - m / population if population else 1.0
    found = _values(gram, population, at_mean)
    trace, frobenius, squared = _leave_one_out(gram, population, at_mean)
    first = [_jackknife(v) for v in (trace, frobenius, squared / np.where(frobenius > 0, frobenius, math.nan))]
    errors = [math.sqrt(left * first[0])]
    diagonal, products = gram.diagonal(), gram.square()
    kernels = [products, (diagonal[:, None] / found[2]) * diagonal - products / found[1]]
    for variance, kernel, factor in zip(first[1:], kernels, (1.0, _ratio(found)), strict=True):
        second = left**2 * factor**2 * _second_order(kernel)
        errors.append(math.sqrt(max(left * variance - second, second)) if variance >= 0 else math.nan)
    return errors[0], errors[1], errors[2]


def _leave_one_out(gram: Tensor, population: int | None, at_mean: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tr C, |C|_F^2 and Tr(C)^2 of the m samples less one each, (m,): the sums less what belongs to row i, the rest centred anew."""
    m, diagonal = len(gram), gram.diagonal()
    rows = gram.square().sum(1).cpu().numpy()  # c_i^T A c_i, A = sum c c^T
    against = (gram @ diagonal).cpu().numpy()
    own = diagonal.cpu().numpy()
    p, q, t = rows.sum(), (own**2).sum(), own.sum()
    if not at_mean:
        return _unbiased(p - 2 * rows + own**2, q - own**2, t - own, m - 1, population, False)
    n, up = m - 1, m / (m - 1)  # the others move by c_i/n, and A loses (1 + 1/n) c_i c_i^T
    q_left = (
        (q - own**2) + 4 * (against - own**2) / n + 4 * (rows - own**2) / n**2
        + 2 * own * (t - own) / n**2 - 3 * own**2 / n**3
    )  # fmt: skip
    return _unbiased(p - 2 * up * rows + (up * own) ** 2, q_left, t - up * own, n, population, True)


def _jackknife(values: np.ndarray) -> float:
    m = len(values)
    return float((m - 1) / m * ((values - values.mean()) ** 2).sum())


def _second_order(kernel: Tensor) -> float:
    """The variance that a mean over pairs of a kernel has from its doubly centred part: 2/(m (m - 1)) times that part's mean square, unbiased."""
    m = len(kernel)
    if m < 4:
        return 0.0
    rows = (kernel.sum(1) - kernel.diagonal()) / (m - 2)
    part = kernel - rows[:, None] - rows + rows.sum() / (m - 1)
    squares = float(part.square().sum() - part.diagonal().square().sum())
    return 2 / (m * (m - 1)) * squares / (m * (m - 3))
