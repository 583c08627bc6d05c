"""Synthetic noise for SSGD* that is matched to what a DPSGD run had, shape by shape (theory.md sec. 2 and 3).

DPSGD's noise is landscape-dependent: it has a strength, a spread over layers and coordinates, and a covariance. A profile
holds as much of it as its shape says, so that the question what of it a run needs can be put one property at a time:

    isotropic    the total variance, spread evenly over the d coordinates
    layer        the variance of each layer, spread evenly inside it
    diagonal     the variance of each coordinate
    low-rank     the whole covariance F^T F, as Gaussian combinations z F of the K rows F that were measured

All four have the same total variance Tr(F F^T). The noise stands in one of two places:

    weights      zeta_k is added to the point where learner k takes its gradient; F = {delta_j}/sqrt(n), so F^T F = Sigma_w
    gradient     xi is added to the averaged gradient; F = {xi_D of K draws}/sqrt(K), so F^T F estimates E xi_D xi_D^T

The landscape noise xi_D has a mean, the drift E xi_D, beside its fluctuations. What becomes of it is a choice, so that the
two can be told apart:

    as-noise     its energy is part of the zero-mean noise: second moment matched, total strength E|xi_D|^2
    removed      zero-mean noise with the covariance about the mean only
    added        the same, and the drift itself, which stays what it is until the next refresh
    alone        the drift without noise

What no profile keeps: DPSGD's deviations last from step to step while this noise is drawn anew, and xi_D comes from the same
minibatches as xi_S (the cross term of theory.md sec. 3) while this noise is independent of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NoisePlace = Literal["weights", "gradient"]
NoiseShape = Literal["isotropic", "layer", "diagonal", "low-rank"]
NoiseDrift = Literal["as-noise", "removed", "added", "alone"]

PLACES: tuple[str, ...] = ("weights", "gradient")
SHAPES: tuple[str, ...] = ("isotropic", "layer", "diagonal", "low-rank")
DRIFTS: tuple[str, ...] = ("as-noise", "removed", "added", "alone")


@dataclass(frozen=True)
class NoiseProfile:
    """Noise over the steps of a run, refreshed now and then.

    Attributes:
        steps: T steps, rising; what was measured at a step holds from it until the next of them. Before the first there is no noise.
        place: "weights" or "gradient".
        shape: "isotropic", "layer", "diagonal" or "low-rank".
        factors: standard deviations (T, G) of G groups of consecutive coordinates (one group, the layers, every coordinate), or for
            "low-rank" the rows F (T, K, d).
        layers: number of coordinates of each layer, in order; d in all.
        drift: what is added to the zero-mean noise (T, d), or None.
        drift_mode: "as-noise", "removed", "added" or "alone"; see the module.
        facts: where it came from, and how it was measured.
    """

    steps: tuple[int, ...]
    place: NoisePlace
    shape: NoiseShape
    factors: Tensor
    layers: tuple[int, ...]
    drift: Float[Tensor, "T d"] | None = None
    drift_mode: NoiseDrift = "as-noise"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        t, d = len(self.steps), self.num_parameters
        groups = {"isotropic": 1, "layer": len(self.layers), "diagonal": d}
        held = tuple(self.factors.shape)
        fits = held == (t, groups[self.shape]) if self.shape in groups else len(held) == 3 and held[::2] == (t, d)
        if not t or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"a noise profile needs rising steps, not {', '.join(map(str, self.steps)) or 'none'}")
        if not fits or (self.drift is not None and tuple(self.drift.shape) != (t, d)):
            raise ValueError(f"factors of shape {held} do not make {self.shape} noise at {t} steps in {d} coordinates")

    @property
    def num_parameters(self) -> int:
        """d."""
        return sum(self.layers)

    @property
    def total_variance(self) -> np.ndarray:
        """E|noise|^2 of the zero-mean part at each of the steps, (T,) float64: the same for every shape."""
        squares = torch.stack([f.double().square() for f in self.factors.cpu()])
        if self.shape == "low-rank":
            return np.asarray(squares.sum((1, 2)).numpy())
        return np.asarray((squares * self._sizes().double()).sum(1).numpy())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> NoiseProfile:
        """On another device and in another floating-point type."""
        drift = None if self.drift is None else self.drift.to(device, dtype)
        return replace(self, factors=self.factors.to(device, dtype), drift=drift)

    def index(self, step: int) -> int:
        """Which of the profile's steps holds at a step; -1 before the first."""
        return int(np.searchsorted(self.steps, step, side="right")) - 1

    def sample(self, step: int, generator: torch.Generator) -> Float[Tensor, " d"]:
        """The noise of a step, on the profile's device, from a generator on the same: a pure function of its seed."""
        at = self.index(step)
        if at < 0:
            return self.factors.new_zeros(self.num_parameters)
        factor = self.factors[at]
        count = len(factor) if self.shape == "low-rank" else self.num_parameters
        drawn = torch.randn(count, generator=generator, dtype=factor.dtype, device=factor.device)
        noise = drawn @ factor if self.shape == "low-rank" else drawn * self._spread(factor)
        return noise if self.drift is None else noise + self.drift[at]

    def _sizes(self) -> Tensor:
        """Coordinates of each group, (G,)."""
        d = self.num_parameters
        sizes = {"isotropic": [d], "layer": list(self.layers), "diagonal": [1] * d}
        return torch.tensor(sizes[self.shape])

    def _spread(self, factor: Tensor) -> Tensor:
        """Standard deviations (G,) of the groups as they stand beside the coordinates, (1,) or (d,)."""
        return factor.repeat_interleave(self._sizes().to(factor.device)) if self.shape == "layer" else factor


def noise_factors(rows: Float[Tensor, "K d"], shape: NoiseShape, layers: tuple[int, ...]) -> Tensor:
    """What a shape keeps of noise with the covariance F^T F: standard deviations (G,), or F itself (K, d).

    Args:
        rows: F.
        shape: see the module.
        layers: coordinates of each layer, in order.

    >>> rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 12.0]])
    >>> [noise_factors(rows, s, (2, 1)).square().tolist() for s in ("isotropic", "layer", "diagonal")]  # in all 169
    [[56.333335876464844], [12.5, 144.0], [9.0, 16.0, 144.0]]
    """
    if shape not in SHAPES:
        raise ValueError(f"no such noise shape: {shape}; there are {', '.join(SHAPES)}")
    if shape == "low-rank":
        return rows.clone()
    variance = rows.double().square().sum(0)
    if shape == "isotropic":
        variance = variance.mean(0, keepdim=True)
    elif shape == "layer":
        variance = torch.stack([part.mean() for part in variance.split(list(layers))])
    return variance.sqrt().to(rows.dtype)


def drift_apart(
    rows: Float[Tensor, "K d"], mean: Float[Tensor, " d"], mode: NoiseDrift
) -> tuple[Float[Tensor, "F d"], Tensor | None]:
    """Draws of noise with a known mean as rows F of zero-mean noise, and the drift that is added to it, or None.

    The mean being known and not estimated from the draws, both second moments are divided by K and unbiased.

    Args:
        rows: K draws of the noise.
        mean: its mean.
        mode: see the module.
    """
    if mode not in DRIFTS:
        raise ValueError(f"no such treatment of the drift: {mode}; there are {', '.join(DRIFTS)}")
    scale = math.sqrt(len(rows))
    if mode == "as-noise":
        return rows / scale, None
    if mode == "alone":
        return torch.zeros_like(rows[:1]), mean
    return (rows - mean) / scale, mean if mode == "added" else None
