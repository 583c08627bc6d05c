"""The covariance of noise vectors that are given as rows: draws of a noise, minibatch gradients, steps; of one run or of many replicas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape.display import Displayed, Shown
from landscape.noise.gram import Grouping
from landscape.noise.products import add_products, mirror
from landscape.noise.spectrum import BlockSpectrum, CovarianceSpectrum, block_spectrum, collect
from landscape.objective import Objective
from landscape.statistics import Estimate

BLOCK_BYTES = 64 << 20
"""Size of a block of columns that is worked on at once, in float64."""


@runtime_checkable
class ColumnBlocks(Protocol):
    """Rows that need not lie in memory at once, and are read by columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""

    def columns(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """All columns in order, at most `width` at a time: (which, (m, width))."""


Rows = Float[Tensor, "m d"] | ColumnBlocks


def column_blocks(objective: Objective, by: Grouping = "layer") -> dict[str, list[slice]]:
    """Where the parameters of each block lie in a flat weight vector.

    >>> column_blocks(Objective(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (torch.zeros(1, 2), torch.zeros(1, 1))), "parameter")
    {'weight': [slice(0, 2, None)], 'bias': [slice(2, 3, None)]}
    """
    layout = objective.model.layout
    ends = np.cumsum([0, *layout.sizes]).tolist()
    where = {name: slice(a, b) for name, a, b in zip(layout.names, ends[:-1], ends[1:], strict=True)}
    groups = {"all": list(layout.names)} if by == "whole" else objective.blocks(by)
    return {group: [where[name] for name in names] for group, names in groups.items()}


def covariance_spectrum(
    rows: Rows,
    *,
    blocks: Mapping[str, Sequence[slice]] | None = None,
    centre: Literal["mean"] | Float[Tensor, " d"] | None = "mean",
    scale: float | int = 1.0,
) -> CovarianceSpectrum:
    """The spectrum and the traces of the covariance of independent noise vectors (theory.md sec. 4).

    Of draws of xi_D at fixed learners; of minibatch gradients, scale sqrt(B), for C; of steps' noise, scale alpha.

    Args:
        rows: (m, d), one vector a row, in memory or read by columns (`landscape.noise.rows.Rows`).
        blocks: columns of each block, e.g. `column_blocks(objective)`; not overlapping.
        centre: "mean" of the rows (divided by m - 1), a known mean (d,) (divided by m), or None for a mean known to be zero.
        scale: what the vectors are multiplied by; C is multiplied by its square.

    Returns:
        `CovarianceSpectrum`: "all" first, then the blocks. Errors are over draws of m independent rows.

    Cost: m^2 d/2 multiplications, and m^3 a block for its eigenvalues. Memory: 128 MiB beside one (m, m) matrix a block that is not yet complete.

    >>> found = covariance_spectrum(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]), centre=None)
    >>> found.eigenvalues[0], float(found.trace[0])  # (1/4) diag(2, 8)
    (array([2. , 0.5, 0. , 0. ]), 2.5)
    """
    count, dimension = _checked(rows)
    if isinstance(centre, str) and centre != "mean":
        raise ValueError(f"centre must be 'mean', the known mean or None, not {centre!r}")
    at_mean = isinstance(centre, str)
    segments = _segments(blocks or {}, dimension)
    left = {name: sum(s.stop - s.start for other, s in segments if other == name) for name, _ in segments}
    sizes, found = dict(left), {}
    open_blocks: dict[str | None, Tensor] = {}
    whole = _zeros(rows, count)
    for columns, block in _centred_columns(rows, centre):
        for name, segment in segments:
            start, stop = max(segment.start, columns.start), min(segment.stop, columns.stop)
            if start >= stop:
                continue
            total = open_blocks.setdefault(name, _zeros(rows, count))
            add_products(total, block[:, start - columns.start : stop - columns.start])
            left[name] -= stop - start
            if left[name] == 0:
                gram = mirror(open_blocks.pop(name)).mul_(float(scale) ** 2)
                whole += gram
                if name is not None:
                    found[name] = block_spectrum(name, sizes[name], gram, at_mean=at_mean)
    everything = block_spectrum("all", dimension, whole, at_mean=at_mean)
    ordered: list[BlockSpectrum] = [everything, *(found[name] for name in blocks or {})]
    return collect(ordered, None, "mean" if at_mean else "exact", {"scale": float(scale)})


def leading_eigenvectors(
    rows: Rows, k: int, *, centre: Literal["mean"] | Float[Tensor, " d"] | None = "mean", scale: float | int = 1.0
) -> tuple[np.ndarray, Float[Tensor, "d k"]]:
    """The k leading eigenpairs of the sample covariance of rows: (k,) and (d, k), orthonormal columns in the rows' type.

    u = X^T v/sqrt(mu) for the eigenpairs (mu, v) of X X^T, X the centred rows; the eigenvalue is mu/(m - 1), or mu/m about a known mean.

    Args: as for `covariance_spectrum`; k: how many, at most the rank.

    Cost: the rows are read twice.

    >>> values, vectors = leading_eigenvectors(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]), 1, centre=None)
    >>> values, vectors.abs().flatten().tolist()
    (array([2.]), [0.0, 1.0])
    """
    count, dimension = _checked(rows)
    gram = _gram(rows, centre)
    values, vectors = torch.linalg.eigh(gram)
    divisor = count - isinstance(centre, str)
    rounding = torch.finfo(getattr(rows, "dtype", torch.float64)).eps * count
    rank = min(divisor, dimension, int((values > rounding * values[-1]).sum()))
    if not 0 < k <= rank:
        raise ValueError(f"the sample covariance has {rank} eigenvalues that are not zero; k={k}")
    chosen = vectors[:, -k:].flip(1) / values[-k:].flip(0).sqrt()
    parts = [(block.double().T @ chosen).to(block.dtype) for _, block in _centred_columns(rows, centre)]
    return values[-k:].flip(0).cpu().numpy() * float(scale) ** 2 / divisor, torch.cat(parts)


# Replicas --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class ReplicaCovariance(Displayed):
    """The covariance of a noise over replicas (seeds, say) and over draws within each: the law of total covariance.

    Attributes:
        within: E_r Tr Cov(x | r), what draws at one replica's state vary by.
        between: Tr Cov_r E(x | r), what the means of replicas differ by, less what finitely many draws feign; unbiased, so it may be negative.
        total: Tr Cov(x), their sum: the unconditional noise.
        eigenvalues: (R K,) of an unbiased estimate of Cov(x), descending; they sum to the total.
        num_replicas: R.
        num_draws: K in each.
    """

    within: Estimate
    between: Estimate
    total: Estimate
    eigenvalues: np.ndarray
    num_replicas: int
    num_draws: int

    def shown(self) -> Shown:
        """The three traces with errors."""
        return Shown(
            "ReplicaCovariance",
            [
                ("trace within replicas", self.within, ""),
                ("trace between replicas", self.between, ""),
                ("total", self.total, ""),
                ("replicas", self.num_replicas, ""),
                ("draws in each", self.num_draws, ""),
            ],
            ["errors: over replicas"],
        )

    def to_xarray(self) -> xr.Dataset:
        """Traces with errors, and eigenvalues over eigen_index."""
        made = xr.Dataset(
            {"eigenvalue": ("eigen_index", self.eigenvalues, {"long_name": "eigenvalues of the total covariance"})},
            attrs={"num_replicas": self.num_replicas, "num_draws": self.num_draws, "errors": "standard errors over replicas"},
        )  # fmt: skip
        for name in ("within", "between", "total"):
            made[f"trace_{name}"] = ((), getattr(self, name).value, {"long_name": f"trace of the {name} covariance"})
            made[f"trace_{name}_stderr"] = ((), getattr(self, name).stderr, {"long_name": f"standard error of trace_{name}"})  # fmt: skip
        return made


def replica_covariance(
    rows: Float[Tensor, "R K d"] | ColumnBlocks, *, num_replicas: int | None = None, scale: float | int = 1.0
) -> ReplicaCovariance:
    r"""The unconditional covariance of a noise from R replicas of K draws each (ours).

    $$\mathrm{Cov}(x) = E_r[\mathrm{Cov}(x|r)] + \mathrm{Cov}_r(E[x|r])$$

    The mean W of the replicas' sample covariances is unbiased for the first term. The covariance S of their means has the expectation of the second plus W/K, so
    S - W/K is unbiased for it and W (1 - 1/K) + S for the sum, which is positive semi-definite and so has a spectrum.

    Args:
        rows: (R, K, d), or R K rows read by columns, those of a replica together.
        num_replicas: R, for rows read by columns.
        scale: what the vectors are multiplied by.

    Returns:
        `ReplicaCovariance`; the errors are the jackknife's over replicas, nan for two.

    Cost: (R K)^2 d/2 multiplications.

    >>> shifted = torch.tensor([[[1.0], [3.0]], [[7.0], [9.0]]])  # W = 2, S = 18
    >>> found = replica_covariance(shifted)
    >>> found.within.value, found.between.value, found.total.value, round(float(found.eigenvalues[0]), 12)
    (2.0, 17.0, 19.0, 19.0)
    """
    if isinstance(rows, Tensor):
        num_replicas = rows.shape[0]
        rows = rows.flatten(0, 1)
    count, _ = _checked(rows)
    if num_replicas is None or num_replicas < 2 or count % num_replicas or count // num_replicas < 2:
        raise ValueError(f"{count} rows of {num_replicas} replicas: give num_replicas, at least two replicas and the same number of draws, two or more, of each")  # fmt: skip
    replicas, draws = num_replicas, count // num_replicas
    gram = _gram(rows, "mean").mul_(float(scale) ** 2)
    blocks = gram.unflatten(0, (replicas, draws)).unflatten(2, (replicas, draws))
    means = blocks.mean((1, 3)).cpu().numpy()
    own = gram.diagonal().unflatten(0, (replicas, draws)).sum(1).cpu().numpy()
    within = (own - draws * np.diagonal(means)) / (draws - 1)

    def traces(kept: np.ndarray) -> np.ndarray:
        inner = float(within[kept].mean())
        outer = means[np.ix_(kept, kept)]
        spread = float((outer.trace() - outer.mean(0).sum()) / (len(kept) - 1)) if len(kept) > 1 else math.nan
        return np.array([inner, spread - inner / draws, spread + inner * (1 - 1 / draws)])

    everyone = np.arange(replicas)
    values = traces(everyone)
    left_out = np.stack([traces(np.delete(everyone, r)) for r in everyone])
    errors = np.sqrt((replicas - 1) / replicas * ((left_out - left_out.mean(0)) ** 2).sum(0))
    found = [Estimate(float(v), float(e), replicas) for v, e in zip(values, errors, strict=True)]

    # y_rk = (x_rk - x_r)/sqrt(R K) + (x_r - x)/sqrt((R - 1) K) have the covariance estimate as their sum of squares
    for _ in range(2):  # rows, then columns
        by_replica = gram.unflatten(0, (replicas, draws)).mean(1, keepdim=True).expand(-1, draws, -1).flatten(0, 1)
        gram = ((gram - by_replica) / math.sqrt(count) + by_replica / math.sqrt((replicas - 1) * draws)).T
    eigenvalues = torch.linalg.eigvalsh((gram + gram.T) / 2).flip(0).clamp_min(0).cpu().numpy()
    return ReplicaCovariance(found[0], found[1], found[2], eigenvalues, replicas, draws)


# -----------------------------------------------------------------------------------------------------------------


def _checked(rows: Rows) -> tuple[int, int]:
    count, dimension = rows.shape
    if count < 2:
        raise ValueError(f"a covariance needs at least two noise vectors, not {count}")
    return int(count), int(dimension)


def _zeros(rows: Rows, count: int) -> Tensor:
    device = getattr(rows, "device", torch.device("cpu"))
    return torch.zeros(count, count, dtype=torch.float64, device=device)


def _gram(rows: Rows, centre: Literal["mean"] | Tensor | None) -> Tensor:
    total = _zeros(rows, rows.shape[0])
    for _, block in _centred_columns(rows, centre):
        add_products(total, block)
    return mirror(total)


def _centred_columns(rows: Rows, centre: Literal["mean"] | Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns less the centre, which is taken off in float64, in the rows' type.

    Raises:
        ValueError: rows that are not finite, or a centre of another length.
    """
    if isinstance(centre, Tensor) and len(centre) != rows.shape[1]:
        raise ValueError(f"a centre of {len(centre)} numbers, for rows of {rows.shape[1]}")
    for part, block in _columns(rows, max(1, BLOCK_BYTES // (8 * rows.shape[0]))):
        fine = block.double()
        if not torch.isfinite(fine).all():
            broken = int((~torch.isfinite(fine)).any(1).nonzero()[0, 0])
            raise ValueError(f"row {broken} holds nan or infinity; leave out what has diverged")
        if centre is not None:
            fine = fine - (fine.mean(0) if isinstance(centre, str) else centre[part].to(fine))
        yield part, fine.to(block.dtype)


def _columns(rows: Rows, width: int) -> Iterator[tuple[slice, Tensor]]:
    if not isinstance(rows, Tensor):
        yield from rows.columns(width)
        return
    for start in range(0, rows.shape[1], width):
        part = slice(start, min(start + width, rows.shape[1]))
        yield part, rows[:, part]


def _segments(blocks: Mapping[str, Sequence[slice]], dimension: int) -> list[tuple[str | None, slice]]:
    """All columns in order, each run of them with its block; None for those of no block."""
    found: list[tuple[str | None, slice]] = []
    at = 0
    for name, part in sorted(((n, p) for n, parts in blocks.items() for p in parts), key=lambda item: item[1].start):
        if part.start < at or part.stop > dimension or part.start >= part.stop:
            raise ValueError(f"block {name} has the columns {part.start} to {part.stop}, which overlap another's or are not among {dimension}")  # fmt: skip
        if part.start > at:
            found.append((None, slice(at, part.start)))
        found.append((name, part))
        at = part.stop
    if at < dimension:
        found.append((None, slice(at, dimension)))
    return found
