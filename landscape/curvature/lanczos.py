"""Extreme eigenpairs by Lanczos with full reorthogonalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from landscape import streams
from landscape.curvature.operators import SymmetricOperator

Which = Literal["LA", "SA", "LM", "BE"]


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs of a symmetric operator.

    Attributes:
        values: (k,) Ritz values, float64: falling for LA and LM (by modulus), rising for SA; for BE the largest, then the smallest.
        vectors: (d, k) orthonormal Ritz vectors.
        residuals: (k,) true residuals |A u - value u|; each value is within its residual of an exact eigenvalue.
        converged: (k,) whether the residual is at most tol times the largest |value| found.
        num_matvecs: products taken.
        seed: of the starting vector.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    converged: np.ndarray
    num_matvecs: int
    seed: int

    def to_xarray(self) -> xr.Dataset:
        """Values and residuals over eigen_index; the vectors are left out."""
        return xr.Dataset(
            {
                "eigenvalue": ("eigen_index", self.values),
                "residual": ("eigen_index", self.residuals),
                "converged": ("eigen_index", self.converged),
            },
            attrs={"num_matvecs": self.num_matvecs, "seed": self.seed},
        )


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    which: Which = "LA",
    *,
    tol: float = 1e-3,
    max_matvecs: int = 100,
    start: Tensor | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The k extreme eigenpairs.

    Args:
        operator: symmetric.
        k: how many; for "BE" one of each end, whatever k.
        which: "LA" largest, "SA" smallest, "LM" largest modulus, "BE" both ends.
        tol: stop when every wanted residual is at most tol times the largest |Ritz value|.
        max_matvecs: bound on the basis; k more products check the residuals.
        start: starting vector (d,); random from `seed` otherwise.
        seed: of the starting vector, and of new directions where the Krylov space is exhausted.

    Returns:
        `Eigenpairs`; those with `converged` False met `max_matvecs` first.

    A single Krylov space holds one vector of each eigenspace, so an exactly repeated eigenvalue is found once, until a breakdown
    restarts the basis with a new direction. Source: Lanczos (1950); Parlett, The Symmetric Eigenvalue Problem (1998), ch. 13.
    """
    d = operator.dimension
    k = 2 if which == "BE" else min(k, d)
    limit = min(max(max_matvecs, k), d)
    generator = streams.torch_generator("lanczos", seed)

    def random_direction() -> Tensor:
        return torch.randn(d, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)

    basis = torch.empty(limit, d, device=operator.device, dtype=operator.dtype)
    projected = np.zeros((limit, limit))
    vector = _orthogonal(random_direction() if start is None else start.to(basis), basis[:0])
    matvecs, restarts = 0, 0
    wanted = np.empty(0, dtype=np.int64)
    values, small = np.empty(0), np.empty((0, 0))
    for m in range(limit):
        assert vector is not None
        basis[m] = vector
        image = operator.matvec(vector)
        matvecs += 1
        coefficients = (basis[: m + 1].double() @ image.double()).cpu().numpy()
        projected[: m + 1, m] = projected[m, : m + 1] = coefficients
        values, small = np.linalg.eigh(projected[: m + 1, : m + 1])
        scale = max(float(np.abs(values).max()), np.finfo(np.float64).tiny)
        rest = image - basis[: m + 1].T @ (basis[: m + 1] @ image)
        beta = float(rest.double().norm())
        wanted = _wanted(values, k, which)
        broken = beta <= 100 * torch.finfo(basis.dtype).eps * scale  # an invariant subspace
        accurate = bool((beta * np.abs(small[-1, wanted]) <= tol * scale).all())
        if m + 1 == limit or (accurate and m + 1 >= min(2 * k, limit, 4) and (not broken or restarts >= k - 1)):
            break
        vector = None if broken else _orthogonal(rest, basis[: m + 1])
        if vector is None:  # go on with a new direction: it finds another copy of every repeated eigenvalue
            restarts += 1
            vector = _orthogonal(random_direction(), basis[: m + 1])
            if vector is None:
                break
    vectors = basis[: len(values)].T @ torch.from_numpy(np.ascontiguousarray(small[:, wanted])).to(basis)
    images = operator @ vectors
    found = torch.from_numpy(values[wanted]).to(basis)
    residuals = (images - vectors * found).double().norm(dim=0).cpu().numpy()
    scale = float(np.abs(values).max())
    return Eigenpairs(
        values[wanted],
        vectors,
        residuals,
        residuals <= tol * max(scale, np.finfo(float).tiny),
        matvecs + len(wanted),
        seed,
    )


def _wanted(values: np.ndarray, k: int, which: Which) -> np.ndarray:
    """Indices into ascending values."""
    count = len(values)
    if which == "BE":
        return np.array([count - 1, 0]) if count > 1 else np.array([0])
    if which == "SA":
        return np.arange(min(k, count))
    order = np.argsort(-np.abs(values), kind="stable") if which == "LM" else np.arange(count)[::-1]
    return order[:k]


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor | None:
    """The vector, orthogonalised twice against the rows of a basis and normalised; None if nothing is left of it."""
    before = vector.double().norm()
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    length = vector.double().norm()
    if not length > 1e-6 * before:
        return None
    return vector / length.to(vector.dtype)
