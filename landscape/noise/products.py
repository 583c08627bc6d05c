"""Products of many long rows with each other, summed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from landscape.functional import chunks
from landscape.noise.capture import Flow, Layer, positions
from landscape.ranks import Ranks

PRODUCT_WIDTH = 2048
"""Columns summed in the rows' own type before the float64 sum: rounding stays near that type's precision, times |x_i| |x_k|."""


def product_type(rows: Tensor) -> torch.dtype:
    """The type in which rows are multiplied: their own, or float64 where torch was told to round products of float32."""
    backend = torch.backends.cuda if rows.device.type == "cuda" else torch.backends.mkldnn
    if rows.dtype == torch.float64 or backend.matmul.fp32_precision not in ("none", "ieee"):
        return torch.float64
    return torch.float32


def add_products(
    total: Float[Tensor, "m m"], rows: Float[Tensor, "m w"], kind: torch.dtype | None = None, band: range | None = None
) -> None:
    """total += rows rows^T on and below the diagonal, in the rows `band` of it; `mirror` does the rest once at the end."""
    kind, band = kind or product_type(rows), range(len(rows)) if band is None else band
    for cols in chunks(rows.shape[1], PRODUCT_WIDTH):
        block = rows[:, cols].to(kind)
        for part in cut(band, max(128, len(rows) // 8)):
            total[part, : part.stop] += block[part] @ block[: part.stop].T


def cut(numbers: range, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover a range."""
    for part in chunks(len(numbers), size):
        yield slice(numbers.start + part.start, numbers.start + part.stop)


def band_of(count: int, ranks: Ranks) -> range:
    """This rank's rows of a triangle (count, count) on and below the diagonal, of which all ranks have about as many numbers.

    >>> [band_of(100, Ranks(r, 4)) for r in range(4)]
    [range(0, 50), range(50, 71), range(71, 87), range(87, 100)]
    """
    first, last = (round(count * math.sqrt(r / ranks.size)) for r in (ranks.rank, ranks.rank + 1))
    return range(first, last)


def mirror(total: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    """The symmetric matrix, in place, of its part on and below the diagonal."""
    for part in chunks(len(total), 1024):
        total[: part.start, part] = total[part, : part.start].T
        corner = total[part, part].tril()
        total[part, part] = corner + corner.tril(-1).T
    return total


def add_pairs(total: Tensor, layer: Layer, flow: Flow, room: int, band: range) -> None:
    """The Gram matrix of a weight's gradients sum_t delta_it a_it^T, over pairs of positions, on and below the diagonal in the rows `band`."""
    kind = product_type(flow.inputs)
    a, delta = positions(layer, flow[:1])
    length, features = a.shape[2], a.shape[3] + delta.shape[3]
    at_once = math.isqrt(max(1, room // (4 * kind.itemsize))) // length
    at_once = max(1, min(at_once, room // (4 * kind.itemsize * length * features)))

    def rows(part: slice) -> tuple[Tensor, Tensor]:
        a, delta = positions(layer, flow[part])
        return a.flatten(0, 2).to(kind), delta.flatten(0, 2).to(kind)

    for part in cut(band, at_once):
        a, delta = rows(part)
        for other in chunks(part.stop, at_once):
            b, epsilon = (a, delta) if other == part else rows(other)
            both = (a @ b.T).mul_(delta @ epsilon.T)
            total[part, other] += both.view(part.stop - part.start, length, -1, length).sum((1, 3), dtype=torch.float64)
