"""Random probes of an operator and what they say so far: what trace, Frobenius norm and diagonal are estimated from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from landscape.curvature.operators import SymmetricOperator
from landscape.curvature.vectors import Distribution, inner, multiply_rows, probes
from landscape.statistics import Estimate, estimate


def steps(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    return ((start, min(width, last - start)) for start in range(first, last, width))


def squares_of(rows: Tensor) -> np.ndarray:
    """Squared lengths of rows, float64."""
    return torch.stack([inner(row[None], row[None])[0, 0] for row in rows]).cpu().numpy()


class Sampler(ABC):
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
        for first, count in steps(self.num_probes, total, self.block):
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
        return over(found.stderr, abs(found.value))

    def estimate(self) -> Estimate:
        """The number, its standard error and the probes it rests on."""
        raise NotImplementedError

    def _root(self, found: Estimate) -> Estimate:
        """The estimate itself, or the root of an estimated square."""
        if not self.squared:
            return found
        value = math.sqrt(max(found.value, 0.0))
        return Estimate(value, over(found.stderr, 2 * value), found.count)


def over(error: float, value: float) -> float:
    if error == 0:
        return 0.0
    return error / value if value else error * math.inf


class HutchinsonSampler(Sampler):
    """w^T A w, or w^T A^2 w, of Rademacher probes."""

    def __init__(
        self, operator: SymmetricOperator, purpose: str, seed: int, block: int, *, squared: bool = False
    ) -> None:
        super().__init__(operator, purpose, seed, block, squared=squared)
        self._samples: list[np.ndarray] = []

    def add(self, rows: Tensor, images: Tensor) -> None:
        self._samples.append(squares_of(images) if self.squared else forms(rows, images))

    def estimate(self) -> Estimate:
        return self._root(estimate(np.concatenate(self._samples)))


def forms(rows: Tensor, images: Tensor) -> np.ndarray:
    """Inner products of rows with rows, one by one, float64."""
    pairs = zip(rows, images, strict=True)
    return torch.stack([inner(row[None], image[None])[0, 0] for row, image in pairs]).cpu().numpy()


class DiagonalSampler(Sampler):
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
        return over(float(self.stderr().norm()), float(self.mean.norm()))
