"""Extreme eigenpairs: thick-restarted block Lanczos, with true residuals and a bound on what may have been missed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from scipy.special import betainc
from torch import Tensor

from landscape.curvature.operators import Backend, SymmetricOperator
from landscape.curvature.ritz import RitzSpace
from landscape.curvature.vectors import norms
from landscape.display import Displayed, Shown, grid, sparkline

Which = Literal["LA", "SA", "LM", "BE"]
LISTED = 12
"""Eigenvalues listed in Jupyter."""


@dataclass(frozen=True, repr=False)
class Eigenpairs(Displayed):
    """Approximate eigenpairs of a symmetric operator.

    Attributes:
        values: (k,) Ritz values, float64: falling for LA, rising for SA, falling in modulus for LM; for BE the largest, falling, then
            the smallest, rising.
        vectors: (d, k) orthonormal Ritz vectors.
        residuals: (k,) true residuals |A u - value u|, of fresh products; each value is within its residual of an exact eigenvalue.
        converged: (k,) whether the residual is at most tol |value|, or at the level of rounding, 10 eps max |Ritz value|.
        num_matvecs: products taken, those for the residuals included.
        seed: of the random directions.
        missed: were there another eigenvalue, beyond the last wanted value by more than its tolerance, a random direction would have
            hidden it so well with at most this probability (as a p-value); 1 where this was not looked into. Where the last wanted
            value is below sqrt(eps) max |Ritz value|, that is the tolerance.
        provenance: of the operator.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    converged: np.ndarray
    num_matvecs: int
    seed: int
    missed: float
    provenance: dict[str, Any]

    def to_xarray(self) -> xr.Dataset:
        """Values and residuals over eigen_index; the vectors are left out."""
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in self.provenance.items()}
        return xr.Dataset(
            {
                "eigenvalue": ("eigen_index", self.values),
                "residual": ("eigen_index", self.residuals),
                "converged": ("eigen_index", self.converged),
            },
            attrs={**plain, "num_matvecs": self.num_matvecs, "seed": self.seed, "missed": self.missed},
        )

    def shown(self) -> Shown:
        """The values, and whether they can be trusted."""
        relative = np.abs(self.residuals) / np.maximum(np.abs(self.values), np.finfo(np.float64).tiny)
        return Shown(
            "Eigenpairs",
            [
                ("eigenvalues", self.values, ""),
                ("largest relative residual", float(relative.max(initial=0.0)), ""),
                ("converged", f"{int(self.converged.sum())} of {len(self.values)}", ""),
                ("missed", f"<= {self.missed:.2g}", ""),
                ("products", self.num_matvecs, ""),
            ],
        )

    def _repr_html_(self) -> str:
        rows = [
            (i + 1, float(value), float(residual), bool(converged))
            for i, (value, residual, converged) in enumerate(
                zip(self.values, self.residuals, self.converged, strict=True)
            )
        ]
        notes = [f"{self.num_matvecs} products; another one was missed with probability at most {self.missed:.2g}"]
        if len(rows) > LISTED:
            notes.insert(0, f"{len(rows) - LISTED} more in .values")
        return grid("Eigenpairs", ("", "eigenvalue", "residual", "converged"), rows[:LISTED], notes=notes,
                    picture=sparkline(self.values, "eigenvalues", from_zero=True))  # fmt: skip

    def __str__(self) -> str:
        """A table, and what it cost."""
        lines = ["   eigenvalue   residual"]
        for value, residual, converged in zip(self.values, self.residuals, self.converged, strict=True):
            lines.append(f"{value:13.6g} {residual:10.2g}{'' if converged else '  not converged'}")
        lines.append(f"{self.num_matvecs} products; another one was missed with probability <= {self.missed:.2g}")
        return "\n".join(lines)


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    which: Which = "LA",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    block_size: int = 1,
    max_basis: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    miss_probability: float = 0.01,
    storage: torch.device | str | None = None,
    backend: Backend = "landscape",
) -> Eigenpairs:
    r"""The k extreme eigenpairs, by Rayleigh-Ritz on a block Krylov space with full reorthogonalisation and thick restarts.

    A Krylov space is blind to further copies of a repeated eigenvalue and to what its start does not contain. So, once the wanted
    pairs have small true residuals, their span is taken out and Lanczos started anew from a random direction z of the complement.
    Were there another eigenvalue lambda >= t, t above all Ritz values of this run, its eigenvector u would obey, with the Lanczos
    polynomials p_j of the run after q products (orthonormal under the spectral measure of z),

    $$(u \cdot z)^2 \le \Big( \sum_{j \le q} p_j(\lambda)^2 \Big)^{-1} \le c^2 = \Big( \sum_{j \le q} p_j(t)^2 \Big)^{-1},$$

    which is improbable: Prob[|u.z| <= c] = I_{c^2}(1/2, (n - 1)/2), the regularised incomplete beta function, in n dimensions. c falls
    like exp(-2 q sqrt(gap/spread)) at least: 4 to 10 products do where the last wanted value stands clear of the rest. `missed` is
    this probability for t = last wanted value + its tolerance (the sum over both ends for LM and BE), up to the residuals. A Ritz
    value beyond t is a pair that had been missed: the search goes on with it, and its outcome is certified anew.

    Args:
        operator: A, symmetric (d, d).
        k: how many; of each end for "BE". At most d.
        which: "LA" largest, "SA" smallest, "LM" largest modulus, "BE" both ends.
        tol: of residual/|value|; a residual of 10 eps max |Ritz value| is rounding and counts as converged.
        max_matvecs: bound on products, by default max(300, 10 k); at least k are taken, and up to as many more
            as there are pairs for the last residuals.
        block_size: directions multiplied at once (A @ block), for operators that are cheaper per column that way.
        max_basis: vectors of length d kept, by default max(2 k + 20 block_size, 40, k + 2 j), in at most half of the host's memory.
        start: (d,) or (d, j) first directions, e.g. eigenvectors of another checkpoint; random from `seed` otherwise.
        seed: of the random directions.
        miss_probability: certify until `missed` is at most this, for at most max(10, products so far) more; 1 turns it off.
        storage: device of the basis: by default the operator's, or the host where that would fill half of its free memory.
        backend: "pyhessian" asks that package instead (LM, its own stopping rule; only k, tol, max_matvecs and seed are heeded), and
            adds true residuals, which are what `converged` goes by.

    Returns:
        `Eigenpairs`; where `converged` is False, `max_matvecs` or the rounding of the operator was met first.

    Cost: num_matvecs products, and about 8 max_basis d flops each for orthogonalisation. Memory: max_basis + 3 k vectors.

    Sources: Wu & Simon (2000), SIAM J. Matrix Anal. Appl. 22, 602, thick restarts; Parlett, The Symmetric Eigenvalue Problem (1998),
    ch. 13; van Dorsselaer, Hochstenbach & van der Vorst (2001), SIAM J. Matrix Anal. Appl. 22, 837, bounds by Lanczos polynomials;
    Kuczynski & Wozniakowski (1992), SIAM J. Matrix Anal. Appl. 13, 1094: 1.648 sqrt(n) exp(-(2 q - 1) sqrt(gap/spread)), for any A.

    >>> from landscape.curvature.operators import DenseOperator
    >>> top_eigenpairs(DenseOperator(torch.diag(torch.tensor([3.0, 3.0, 2.0, 1.0]))), 3).values.round(4).tolist()
    [3.0, 3.0, 2.0]
    """
    d = operator.dimension
    if min(k, block_size) < 1 or which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f"k={k} and block_size={block_size} must be positive, and which={which!r} LA, SA, LM or BE")
    if backend == "pyhessian":
        return _by_pyhessian(operator, min(k, d), which, tol, max_matvecs, seed)
    count = min(2 * k if which == "BE" else k, d)
    first = _first_directions(start, d)
    # All of the start and its products must fit in, and so must what a restart keeps.
    least = count + len(first) + max(3, 2 * block_size, len(first))
    if max_basis is not None and max_basis < min(least, d):
        raise ValueError(f"max_basis={max_basis} is too small for this k, block_size and start: take {least} or more")
    usual = max(2 * count + 20 * block_size, 40, least)
    capacity, device = _place(operator, min(max_basis or usual, d), min(max_basis or least, d), storage)
    budget = max(max(300, 10 * count) if max_matvecs is None else max_matvecs, count)
    space = RitzSpace(operator, capacity, device, seed)
    for row in first:
        space.append(row)
    given = np.arange(min(space.size, budget))
    for begin in range(0, len(given), block_size):
        space.expand(given[begin : begin + block_size])

    eps, strictness, missed = torch.finfo(operator.dtype).eps, 1.0, 1.0
    while True:
        values, small, coupling = space.ritz()
        order = _preference(values, which)
        wanted = order[:count] if which != "BE" else np.concatenate([order[:count:2], order[1:count:2]])
        accuracy = np.maximum(tol * np.abs(values[wanted]), space.rounding)
        unfinished = np.linalg.norm(coupling[:, wanted], axis=0) > strictness * accuracy
        searching = (len(wanted) < count or bool(unfinished.any())) and not space.exhausted
        if searching and space.num_matvecs < budget:
            block = min(block_size, budget - space.num_matvecs)
            room = block if len(coupling) else 2 * block
            if space.size + room > capacity < d:
                space.restart(small[:, order[: min(max(capacity // 2, count), capacity - len(coupling) - room)]])
            else:
                space.expand(space.choose(block, coupling[:, wanted[unfinished]]))
            continue

        vectors = space.combined(small[:, wanted])
        rests = space.multiply(vectors) - vectors * torch.from_numpy(values[wanted]).to(vectors)[:, None]
        residuals = norms(rests).cpu().numpy()
        if space.exhausted:
            missed = 0.0
        if space.exhausted or space.num_matvecs >= budget:
            break
        if strictness > 0.1 and bool((residuals > accuracy).any()):
            strictness /= 4
            continue
        if miss_probability >= 1:
            break
        space.restart(small[:, wanted], keep_frontier=False)
        thresholds = _thresholds(values[wanted], np.maximum(accuracy, residuals), which, space.scale * eps**0.5)
        limit = min(budget - space.num_matvecs, max(10, space.num_matvecs))
        bound = _certify(space, thresholds, which, limit, miss_probability)
        if bound is not None:
            missed = bound
            break
        strictness = 1.0
    return Eigenpairs(
        values[wanted],
        vectors.T,
        residuals,
        residuals <= accuracy,
        space.num_matvecs,
        seed,
        missed,
        operator.provenance,
    )


def _by_pyhessian(
    operator: SymmetricOperator, k: int, which: Which, tol: float, max_matvecs: int | None, seed: int
) -> Eigenpairs:
    from landscape.curvature.pyhessian import power_iteration

    if which != "LM":
        raise ValueError('power iteration finds the largest moduli alone; ask backend="pyhessian" for which="LM"')
    values, vectors, products = power_iteration(operator, k, tol, max_matvecs, seed)
    gaps = (operator @ vectors - vectors * torch.from_numpy(values).to(vectors)).T
    residuals = norms(gaps.contiguous()).cpu().numpy()
    converged = residuals <= tol * np.abs(values)
    provenance = {**operator.provenance, "backend": "pyhessian"}
    return Eigenpairs(values, vectors, residuals, converged, products + k, seed, 1.0, provenance)


def _certify(
    space: RitzSpace, thresholds: list[tuple[int, float]], which: Which, limit: int, probability: float
) -> float | None:
    """Bound on the probability of another eigenvalue beyond the thresholds (side +1 or -1, t), by a new Lanczos run.

    The space holds the wanted vectors, expanded, and nothing else. Let y be the components along the run's rows of an eigenvector u
    of eigenvalue t: (t - T) y_E = C^T y_F, so y is known up to its length, at most 1, and u.z, the component along the first row, with
    it. At a restart u.z is carried over as a multiple of the component along the frontier row, which stays.

    Returns: the bound after at most `limit` products; None as soon as a Ritz value lies beyond a threshold.
    """
    deflated, capacity, dimension = space.size, len(space.rows), space.operator.dimension
    if deflated == dimension:
        return 0.0
    space.append_random()
    anchor, factors = 0, np.ones(len(thresholds))  # |u.z| = factor * |component along run row `anchor`|
    bound = 1.0
    values, small, components = np.empty(0), np.empty((0, 0)), np.empty((0, len(thresholds)))
    for _ in range(limit):
        if space.size == capacity < dimension:
            keep = _preference(values, which)[: (capacity - deflated) // 2]
            transform = np.eye(deflated + len(values), deflated + len(keep))
            transform[deflated:, deflated:] = small[:, keep]
            space.restart(transform)
            anchor, factors = len(keep), factors * np.abs(components[anchor])
        space.expand(space.frontier)
        run, frontier = space.inside[deflated:], space.frontier
        values, small = np.linalg.eigh(space.projected[np.ix_(run, run)])
        if any(side * (values[-1 if side > 0 else 0] - t) >= 0 for side, t in thresholds):
            return None
        if space.exhausted:
            return 0.0
        coupling = space.projected[frontier[0], run] if len(frontier) else space.rounding * (run == run[-1])
        gaps = np.array([t for _, t in thresholds]) - values[:, None]
        components = small @ ((small.T @ coupling)[:, None] / gaps)  # y_E for y_F = 1
        cosines = factors * np.abs(components[anchor]) / np.sqrt(1 + (components**2).sum(0))
        bound = float(min(1.0, betainc(0.5, (dimension - deflated - 1) / 2, np.minimum(cosines, 1) ** 2).sum()))
        if (
            len(frontier) == 0 or bound <= probability
        ):  # no frontier: an invariant subspace, as far as rounding lets see
            break
    return bound


def _thresholds(values: np.ndarray, margins: np.ndarray, which: Which, zero: float) -> list[tuple[int, float]]:
    """Sides (+1 above, -1 below) and what another eigenvalue would have to exceed on them to be one of the wanted."""
    margins = np.maximum(margins, np.where(np.abs(values) < zero, zero, np.finfo(np.float64).tiny))
    above, below, modulus = values + margins, values - margins, np.abs(values) + margins
    return {
        "LA": [(1, above[-1])],
        "SA": [(-1, below[-1])],
        "LM": [(1, modulus[-1]), (-1, -modulus[-1])],
        "BE": [(1, above[len(values) // 2 - 1]), (-1, below[-1])],
    }[which]


def _preference(values: np.ndarray, which: Which) -> np.ndarray:
    """Indices into rising values, the most wanted first; for BE the ends take turns."""
    rising = np.arange(len(values))
    both = np.stack([rising[::-1], rising], axis=1).ravel()[: len(values)]
    return {"LA": rising[::-1], "SA": rising, "LM": np.argsort(-np.abs(values), kind="stable"), "BE": both}[which]


def _first_directions(start: Tensor | None, dimension: int) -> Tensor:
    """Rows (j, d) of a warm start; none without one."""
    if start is None:
        return torch.empty(0, dimension)
    if start.ndim not in (1, 2) or start.shape[0] != dimension:
        raise ValueError(f"start has shape {tuple(start.shape)}; it must be ({dimension},) or ({dimension}, j)")
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start is not finite")
    return start.detach().reshape(dimension, -1).T


def _place(operator: SymmetricOperator, rows: int, least: int, storage: Any) -> tuple[int, torch.device]:
    """How many rows to keep, and on which device."""
    row_bytes = operator.dimension * torch.finfo(operator.dtype).bits // 8
    device = operator.device if storage is None else torch.device(storage)
    if storage is None and device.type == "cuda":
        free = operator.peers.least(torch.cuda.mem_get_info(device)[0])
        device = torch.device("cpu") if rows * row_bytes > free // 2 else device
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        host_bytes = operator.peers.least(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        rows = min(rows, max(least, host_bytes // 2 // row_bytes))
    return rows, device
