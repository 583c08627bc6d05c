"""XTrace: exchangeable leave-one-out estimates of a trace, and what their covariance adds to the standard error.

See `landscape.curvature.trace.trace` for the estimator and its source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from landscape.curvature.operators import SymmetricOperator
from landscape.curvature.samplers import Sampler, forms, squares_of, steps
from landscape.curvature.vectors import Distribution, inner, orthogonalise
from landscape.statistics import Estimate, estimate

PAIRED = 50
"""Probes whose pairs give the covariance in the standard error; a matter of time alone."""


class XTraceSampler(Sampler):
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
        overlaps = [inner(self.probes(*step), basis).cpu().numpy() for step in steps(0, total, self.block)]
        self._overlaps = np.concatenate(overlaps).T

    def add(self, rows: Tensor, images: Tensor) -> None:
        self._forms.extend(squares_of(images) if self.squared else forms(rows, images))
        self._lengths.extend(squares_of(rows))
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
