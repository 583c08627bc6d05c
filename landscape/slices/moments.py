"""Losses at points with their errors over examples, points at which the same examples are met."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from landscape.objective import Objective
from landscape.slices.evaluate import SmoothingKernel, example_losses


@dataclass(frozen=True)
class PointLosses:
    """Losses at P points.

    Attributes:
        loss: (P,).
        stderr: (P,) standard error of loss over the choice of examples; 0 where they are all there are.
        change: (P,) loss less that at the origin.
        change_stderr: (P,) standard error of change, of the examples' own changes: both ends meet the same examples.
        smoothing_stderr: (P,) standard error of a smoothed loss over pairs of deviations; 0 without a kernel or for an exact one.
        smoothing_change_stderr: (P,) that of change.
        origin_loss: at the origin.
        covariance: (P, P) of the losses over the choice of examples, where it was asked for.
    """

    loss: np.ndarray
    stderr: np.ndarray
    change: np.ndarray
    change_stderr: np.ndarray
    smoothing_stderr: np.ndarray
    smoothing_change_stderr: np.ndarray
    origin_loss: float
    covariance: np.ndarray | None


def check_population(objective: Objective, population: float | int | None) -> None:
    """Refuse errors over examples where there are none.

    Raises:
        ValueError: see the text.
    """
    if population is None:
        return
    count = objective.num_examples
    if not population >= count:
        raise ValueError(f"the objective's {count} examples cannot be a choice from {population}")
    if objective.has_fixed_batches or not objective.model.loss.per_example:
        raise ValueError(
            "errors over the choice of examples need losses of single, independent examples: no ghost batches, no frozen dropout masks, no loss of "
            "one number a batch; leave population out"
        )


def point_losses(
    objective: Objective,
    origin: Tensor,
    axes: Tensor,
    coordinates: np.ndarray,
    *,
    kernel: SmoothingKernel | None = None,
    population: float | int | None = None,
    recalibrate: bool = False,
    covariance: bool = False,
) -> PointLosses:
    r"""Losses at origin + coordinates @ axes, and how well the examples fix them.

    With $r_i = c_i - L m_i$ (contributions c_i, example weights m_i, $L = \sum_i c_i/\sum_i m_i$) the error of L over the choice of N examples from a
    population of M without replacement is

    $$\mathrm{se}^2 = \left(1 - \frac{N}{M}\right) \frac{N}{N - 1} \frac{\sum_i r_i^2}{(\sum_i m_i)^2},$$

    to first order where the weights differ, and exactly s^2/N (1 - N/M) where they do not. Of a difference the $c_i$ are differences.

    Args:
        objective: L.
        origin: (d,).
        axes: (k, d).
        coordinates: (P, k).
        kernel: to smooth with.
        population: M; math.inf for draws from a distribution; None where the objective's examples are all there are.
        recalibrate: see `landscape.slices.evaluate.example_losses`.
        covariance: whether to keep the errors of all pairs of points.

    Cost: P + 1 values of the (smoothed) loss, and a P x P matrix with `covariance`.
    """
    check_population(objective, population)
    count, num_samples = len(coordinates) + 1, 1 if kernel is None else len(kernel.deviations)
    rows = np.concatenate(
        [np.zeros((1, coordinates.shape[1])), coordinates]
    )  # the origin goes first: changes are from there
    mean = objective.model.loss.reduction == "mean"

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=objective.device)

    sums, squares, changed, weighted = zeros(count), zeros(count), zeros(count), zeros(count)
    deviated, norms, together = zeros(count, num_samples), zeros(2), zeros(count, count) if covariance else None
    of_batch: list[Tensor] = []
    for piece in example_losses(objective, origin, axes, rows, kernel, recalibrate=recalibrate):
        at, c = piece.points, piece.contributions
        m = piece.weights if mean else torch.ones_like(piece.weights)
        if at.start == 0:
            first, of_batch = c[0], []
            norms += torch.stack([m.sum(), m.square().sum()])
        sums[at] += c.sum(1)
        deviated[at] += piece.by_deviation
        weighted[at] += c @ m
        squares[at] += c.square().sum(1)
        changed[at] += (c - first).square().sum(1)
        if together is not None:
            of_batch.append(c)
            if at.stop == count:
                whole = torch.cat(of_batch)
                together += whole @ whole.T
    held = [sums, squares, changed, weighted, deviated, norms] + ([] if together is None else [together])
    for total in held:
        objective.sum_over_ranks(total)
    if not torch.isfinite(sums).any():
        with objective.peers.agree():
            objective.name_bad_data()
    s, ss, dd, sm, by_sample = (t.cpu().numpy() for t in held[:5])
    norm, norm2 = norms.tolist()
    scale = _scale(objective.num_examples, population)
    divisor = norm if mean else 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = s / norm
        loss, change = s / divisor, (s - s[0]) / divisor
        stderr = scale * np.sqrt(_residual(ss, sm, norm2, ratio)) / divisor
        change_stderr = scale * np.sqrt(_residual(dd, sm - sm[0], norm2, ratio - ratio[0])) / divisor
        matrix = None
        if together is not None:
            cross = np.outer(ratio, sm)
            matrix = scale**2 * (together.cpu().numpy() - cross - cross.T + norm2 * np.outer(ratio, ratio))[1:, 1:] / divisor**2  # fmt: skip
        smoothing, smoothing_change = over_pairs(by_sample / divisor, kernel)
    return PointLosses(
        loss[1:], _known(stderr, loss)[1:], change[1:], _known(change_stderr, change)[1:], _known(smoothing, loss)[1:],
        _known(smoothing_change, change)[1:], float(loss[0]), matrix,
    )  # fmt: skip


def _residual(squares: np.ndarray, weighted: np.ndarray, norm2: float, ratio: np.ndarray) -> np.ndarray:
    """sum_i (c_i - ratio m_i)^2, without what rounding leaves below zero."""
    return np.asarray(np.maximum(squares - 2 * ratio * weighted + ratio**2 * norm2, 0.0))


def _scale(count: int, population: float | int | None) -> float:
    """sqrt of (1 - N/M) N/(N - 1)."""
    if population is None or population == count:
        return 0.0
    if count < 2:
        return math.nan
    return math.sqrt((1 - count / population) * count / (count - 1))


def _known(error: np.ndarray, value: np.ndarray) -> np.ndarray:
    """An infinite loss has no error."""
    return np.where(np.isfinite(value), error, np.nan)


def over_pairs(by_sample: np.ndarray, kernel: SmoothingKernel | None) -> tuple[np.ndarray, np.ndarray]:
    """Errors (P,) of the mean over deviations, of (P, S) values, and of its difference from the first point, over antithetic pairs."""
    if kernel is None or not kernel.antithetic:
        return np.zeros(len(by_sample)), np.zeros(len(by_sample))
    pairs = by_sample.reshape(len(by_sample), 2, -1).mean(1)
    number = pairs.shape[1]
    if number < 2:
        return np.full(len(by_sample), np.nan), np.full(len(by_sample), np.nan)
    return pairs.std(1, ddof=1) / math.sqrt(number), (pairs - pairs[0]).std(1, ddof=1) / math.sqrt(number)
