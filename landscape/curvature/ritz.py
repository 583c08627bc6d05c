"""A growing orthonormal basis with the projection of an operator on it: what Lanczos, restarts and certificates are made of."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from landscape import streams
from landscape.curvature.operators import SymmetricOperator
from landscape.curvature.vectors import CHUNK, inner, norms


class RitzSpace:
    """Orthonormal rows V: those already multiplied by A ("expanded", E) and the frontier F of those not yet multiplied.

    projected[:, E] holds V A V_E^T in float64. Up to rounding, A V_E^T = V_E^T T + V_F^T C with T = projected[E, E] and
    C = projected[F, E], so a Ritz pair T s = theta s has the residual |C s|.
    """

    def __init__(self, operator: SymmetricOperator, capacity: int, device: torch.device, seed: int) -> None:
        self.operator = operator
        self.generator = streams.torch_generator("lanczos", seed)
        self.rows = torch.empty(capacity, operator.dimension, device=device, dtype=operator.dtype)
        self.projected = np.zeros((capacity, capacity))
        self.expanded = np.zeros(capacity, dtype=bool)
        self.size = 0
        self.scale = 0.0  # largest |A v| and |Ritz value| seen: a lower bound of |A|
        self.num_matvecs = 0

    @property
    def inside(self) -> np.ndarray:
        """E."""
        return np.flatnonzero(self.expanded[: self.size])

    @property
    def frontier(self) -> np.ndarray:
        """F."""
        return np.flatnonzero(~self.expanded[: self.size])

    @property
    def exhausted(self) -> bool:
        """Whether all of R^d has been multiplied."""
        return len(self.inside) == self.operator.dimension

    @property
    def rounding(self) -> float:
        """A residual below cannot be told from zero."""
        return 10 * torch.finfo(self.rows.dtype).eps * self.scale

    def multiply(self, block: Tensor) -> Tensor:
        """A times the rows of a block (m, d)."""
        self.num_matvecs += len(block)
        block = block.to(self.operator.device)
        images = (self.operator @ block[0])[None] if len(block) == 1 else (self.operator @ block.T).T
        if not bool(torch.isfinite(images).all()):
            raise ValueError("a product of the operator is not finite; look for NaN or infinity in weights and data")
        return images

    def append(self, vector: Tensor, negligible: float | None = None) -> np.ndarray:
        """Adds what of a vector (d,) is orthogonal to the rows to the frontier, unless its length is negligible.

        Returns: coefficients along all rows, the new one included.
        """
        vector, rows = vector.to(self.rows, copy=True), self.rows[: self.size]
        coefficients = np.zeros(len(self.rows))
        length = float(norms(vector[None]))
        negligible = length * torch.finfo(rows.dtype).eps ** 0.5 if negligible is None else negligible
        for _ in range(4):  # twice is enough, but for what nearly vanishes
            before, along = length, inner(rows, vector[None])[:, 0]
            vector -= along.to(rows.dtype) @ rows
            coefficients[: self.size] += along.cpu().numpy()
            length = float(norms(vector[None]))
            if length > 0.7 * before:
                break
        if length > negligible and self.size < self.operator.dimension:
            assert self.size < len(self.rows)
            self.rows[self.size] = vector / length
            self.projected[self.size] = self.projected[:, self.size] = 0
            self.expanded[self.size] = False
            coefficients[self.size] = length
            self.size += 1
        return coefficients

    def append_random(self) -> None:
        """Adds a frontier row uniform on the unit sphere of the rows' complement."""
        wide = torch.float64 if self.rows.dtype == torch.float64 else torch.float32
        self.append(torch.randn(self.operator.dimension, generator=self.generator, dtype=wide), 0.0)

    def choose(self, count: int, rests: np.ndarray) -> np.ndarray:
        """Up to count frontier rows to multiply, rotated so that they hold the most of residuals (F, p); random ones if there are none."""
        if len(self.frontier) == 0:
            for _ in range(count):
                self.append_random()
        frontier = self.frontier
        if rests.size and len(frontier) > count:
            rotation = np.linalg.svd(rests)[0].T
            self._combine(frontier, rotation, self.rows, frontier)
            self.projected[frontier] = rotation @ self.projected[frontier]
        return frontier[:count]

    def expand(self, chosen: np.ndarray) -> None:
        """Multiplies frontier rows by A and adds what is new in the products to the frontier."""
        images = self.multiply(self.rows[chosen])
        self.scale = max(self.scale, float(norms(images).max()))
        for column, image in zip(chosen, images, strict=True):
            self.projected[:, column] = self.append(image, self.rounding)
        self.expanded[chosen] = True
        inside = self.inside
        self.projected[np.ix_(chosen, inside)] = self.projected[np.ix_(inside, chosen)].T

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values (rising), their combinations S (E, E) of expanded rows, and their coupling C S (F, E) to the frontier."""
        values, small = np.linalg.eigh(self.projected[np.ix_(self.inside, self.inside)])
        self.scale = max(self.scale, float(np.abs(values).max(initial=0.0)))
        return values, small, self.projected[np.ix_(self.frontier, self.inside)] @ small

    def combined(self, small: np.ndarray) -> Tensor:
        """Combinations (E, p) of the expanded rows, as rows (p, d) on the operator's device."""
        weights = np.zeros((small.shape[1], self.size))
        weights[:, self.inside] = small.T
        combined = torch.empty(len(weights), self.rows.shape[1], device=self.rows.device, dtype=self.rows.dtype)
        self._combine(np.arange(self.size), weights, combined, np.arange(len(weights)))
        return combined.to(self.operator.device)

    def restart(self, small: np.ndarray, *, keep_frontier: bool = True) -> None:
        """Replaces the expanded rows by orthonormal combinations (E, p) of them; the frontier stays, or goes."""
        inside, frontier = self.inside, self.frontier if keep_frontier else self.frontier[:0]
        p, size = small.shape[1], small.shape[1] + len(frontier)
        weights = np.zeros((size, self.size))
        weights[:p, inside] = small.T
        weights[np.arange(p, size), frontier] = 1
        kept = small.T @ self.projected[np.ix_(inside, inside)] @ small
        coupling = self.projected[np.ix_(frontier, inside)] @ small
        self._combine(np.arange(self.size), weights, self.rows, np.arange(size))
        self.projected[:] = 0
        self.projected[:p, :p], self.projected[p:size, :p] = (kept + kept.T) / 2, coupling
        self.expanded[:] = np.arange(len(self.rows)) < p
        self.size = size

    def _combine(self, source: np.ndarray, weights: np.ndarray, out: Tensor, target: np.ndarray) -> None:
        """out[target] = weights @ rows[source] in float64, some coordinates at a time; out may be the rows themselves."""
        matrix = torch.from_numpy(weights).to(self.rows.device)
        for begin in range(0, self.rows.shape[1], CHUNK):
            part = slice(begin, begin + CHUNK)
            out[target, part] = (matrix @ self.rows[source, part].double()).to(out.dtype)
