"""Blocks of long vectors as rows (m, d): products accumulated in float64, and probes that every rank draws alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from landscape import streams

Distribution = Literal["rademacher", "gaussian"]

CHUNK = 1 << 18
"""Coordinates that are converted to float64 at once: small enough to stay in cache beside a basis of some dozens."""


def inner(rows: Tensor, others: Tensor) -> Tensor:
    """rows @ others.T, float64 (m, p), of rows (m, d) and others (p, d) of any type; d is walked in chunks."""
    if rows.dtype == others.dtype == torch.float64:
        return rows @ others.T
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=others.device)
    for start in range(0, rows.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        total += rows[:, part].to(others.device).double() @ others[:, part].double().T
    return total


def norms(rows: Tensor) -> Tensor:
    """Lengths (m,) of rows, float64."""
    return torch.stack([row.double().norm() for row in rows]) if len(rows) else torch.zeros(0, dtype=torch.float64)


def probes(
    purpose: str, seed: int, first: int, count: int, dimension: int, distribution: Distribution = "rademacher"
) -> Tensor:
    """Probe vectors first, first + 1, ... as rows (count, d), float32 on the CPU, entries of mean 0 and variance 1.

    Probe i is a pure function of (purpose, seed, i): any batching, device or rank draws the same.
    """
    rows = torch.empty(count, dimension)
    for i in range(count):
        generator = streams.torch_generator(purpose, seed, first + i)
        if distribution == "rademacher":
            bits = torch.randint(0, 2, (dimension,), generator=generator, dtype=torch.int8)
            torch.sub(bits.to(torch.float32) * 2, 1, out=rows[i])
        else:
            torch.randn(dimension, generator=generator, out=rows[i])
    return rows


def multiply_rows(matmat: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A applied to every row (m, d) at once, as rows; `matmat` multiplies columns (d, m).

    Raises:
        ValueError: a product holds nan or inf.
    """
    images = matmat(rows.T).T.contiguous()
    if not torch.isfinite(images).all():
        raise ValueError(
            "a product with the operator holds nan or inf: the loss is not finite there, or the type overflows; "
            "check the weights and the data, or compute in float64"
        )
    return images


def orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of a vector (d,) is orthogonal to orthonormal rows (k, d), and its coefficients on them (k,), float64.

    Coefficients are accumulated in float64 and subtracted twice, which is enough for orthogonality to machine precision
    (Giraud et al. 2005). The basis may live on another device; the rest comes back on the vector's.
    """
    total = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for _ in range(2 if len(basis) else 0):
        coefficients = inner(vector[None], basis)[0]
        vector = vector - (coefficients.to(basis.dtype) @ basis).to(vector.device, vector.dtype)
        total += coefficients
    return vector, total
