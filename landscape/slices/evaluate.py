"""Per-example losses at many points of a line or plane: weights are made a few at a time, and each batch of data is met once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape.functional import BATCH_NORMS, Buffers, chunks
from landscape.objective import Objective

BatchNormSlices = Literal["running", "frozen", "recalibrated", "ghost"]
"""What BatchNorm's statistics are over a slice. "running": the objective's own everywhere. "frozen": measured over all data at the slice's
origin and held (theory.md sec. 1). "recalibrated": measured anew at each point, for which the surface has no gradient here. "ghost": those
of the objective's fixed batches."""

AT_ONCE = 8
"""Weight vectors that a pass takes together, unless their memory forbids it."""


@dataclass(frozen=True)
class SmoothingKernel:
    """Deviations over which the loss is averaged: L~(w) = mean over s of L(w + delta_s).

    `landscape.theory.smoothing.kernel_deviations` makes those of theory.md sec. 5: antithetic for "isotropic" and "covariance", not for "learners".

    Attributes:
        name: "learners", "isotropic", "covariance" (theory.md sec. 5), or one's own.
        deviations: (S, d), the same at all points, so that differences between points are better known than the points are.
        antithetic: whether they are random, +delta in the first half and -delta in the second; errors are then over the pairs. Otherwise the
            deviations are all there are, and the average is exact.
    """

    name: str
    deviations: Float[Tensor, "S d"]
    antithetic: bool

    def __post_init__(self) -> None:
        count = len(self.deviations)
        if count == 0:
            raise ValueError("a kernel needs deviations to average over")
        half = count // 2
        if self.antithetic and (count % 2 or not torch.equal(self.deviations[:half], -self.deviations[half:])):
            raise ValueError("the second half of antithetic deviations is the first half with its sign changed; these are not")  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Some points' losses on one batch of this rank's data.

    Attributes:
        points: which of the points, l of them.
        contributions: (l, b) of the examples, averaged over the kernel's deviations; float64.
        weights: (b,) of the examples; float64.
        by_deviation: (l, S) summed over the examples; float64.
    """

    points: slice
    contributions: Tensor
    weights: Tensor
    by_deviation: Tensor


def settle_batch_norm(objective: Objective, origin: Tensor, policy: BatchNormSlices | None) -> tuple[Objective, str]:
    """The objective under a policy for BatchNorm's statistics, and the policy in words.

    Raises:
        ValueError: a network with BatchNorm and no policy, or one that the objective does not allow.
    """
    norms = [m for m in objective.model.module.modules() if isinstance(m, BATCH_NORMS)]
    if not norms:
        return objective, "no BatchNorm"
    if policy not in ("running", "frozen", "recalibrated", "ghost"):
        raise ValueError(
            f"batch_norm {policy!r} of a network with BatchNorm; say what its statistics are over the slice: 'frozen' (measured at the origin), "
            "'running' (the objective's own), 'recalibrated' (measured at each point) or 'ghost' (of the objective's fixed batches)"
        )
    if (policy == "ghost") != (objective.batch_norm == "ghost"):
        raise ValueError(
            f"batch_norm {policy!r}, but the objective was made with batch_norm={objective.batch_norm!r}; ghost batches are those of "
            "Objective(..., batch_norm='ghost', batch_size=...), and the other policies need 'running'"
        )
    if policy != "ghost" and any(m.running_mean is None for m in norms):
        raise ValueError(
            "a BatchNorm layer keeps no running statistics; only batch_norm='ghost' describes what it does"
        )
    return (objective.recalibrated(origin) if policy == "frozen" else objective), policy


def example_losses(
    objective: Objective,
    origin: Float[Tensor, " d"],
    axes: Float[Tensor, "k d"],
    coordinates: np.ndarray,
    kernel: SmoothingKernel | None = None,
    *,
    recalibrate: bool = False,
) -> Iterator[Piece]:
    """Losses of all examples of this rank at origin + coordinates @ axes, batch by batch and within it some points after others.

    Args:
        objective: L.
        origin: (d,).
        axes: (k, d).
        coordinates: (P, k).
        kernel: to smooth with.
        recalibrate: whether to measure BatchNorm's statistics anew at each point (of a smoothed loss, at each deviation from it).

    Cost: P S forward passes over the data, each example met once; with `recalibrate` twice that, and 1 + P S times.
    Memory: S d numbers for the deviations, and some weight vectors within the objective's budget.
    """
    origin, axes = (t.to(objective.device, objective.dtype) for t in (origin, axes))
    deviations = None if kernel is None else kernel.deviations.to(objective.device, objective.dtype)
    count = 1 if deviations is None else len(deviations)
    steps = torch.from_numpy(np.ascontiguousarray(coordinates)).to(axes)
    most = max(AT_ONCE, objective.chunk // max(1, objective.num_own_examples))
    most = max(1, min(most, objective.memory_budget // (3 * axes.shape[1] * axes.dtype.itemsize)))

    def weights(points: slice, some: slice) -> Tensor:
        made = torch.addmm(origin, steps[points], axes)
        return made if deviations is None else (made[:, None] + deviations[some]).flatten(0, 1)

    rooms = [(points, some) for points in chunks(len(steps), max(1, most // count)) for some in chunks(count, most)]
    own = [_measured(objective, weights(*room)) for room in rooms] if recalibrate else None
    with objective.peers.agree():
        for index, inputs, targets in objective.batches(most):
            for number, (points, some) in enumerate(rooms):
                stack = weights(points, some)
                held = _expanded(objective.buffers, len(stack)) if own is None else own[number]
                with objective.frozen(index):
                    found, example_weights = objective.model.losses(stack, held, inputs, targets, shared=True)
                found = found.double().unflatten(0, (points.stop - points.start, -1))
                if some.start == 0:
                    total, by_deviation = torch.zeros_like(found[:, 0]), []
                total += found.sum(1)
                by_deviation.append(found.sum(2))
                if some.stop == count:
                    yield Piece(points, total / count, example_weights[0].double(), torch.cat(by_deviation, 1))


def _expanded(buffers: Buffers, count: int) -> Buffers:
    return {name: b.expand(count, *b.shape) for name, b in buffers.items()}


def _measured(objective: Objective, stack: Tensor) -> Buffers:
    """Buffers (l, ...) with BatchNorm's statistics measured at each of some weight vectors."""
    found = [objective.recalibrated(row).buffers for row in stack]
    return {name: torch.stack([buffers[name] for buffers in found]) for name in objective.buffers}
