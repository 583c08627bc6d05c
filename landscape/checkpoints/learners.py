"""The learners of one checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from landscape.display import Displayed, Row, Shown, sparkline
from landscape.functional import Buffers, ParameterLayout

NEEDS_RECALIBRATION = "averaged over the learners: measure them anew at these weights (Objective.recalibrated)"
"""What facts["batch_norm"] says of statistics that are no network's own."""


@dataclass(frozen=True, repr=False)
class Learners(Displayed):
    """The learners of one checkpoint.

    Attributes:
        step: steps taken.
        weights: flat weights (n, d), parameters in `layout`'s order.
        layout: names and shapes of the parameters.
        buffers: {name: (n, ...)}.
        momentum: momentum buffers (n, d), or None.
        moments: Adam's running averages, {"exp_avg": (n, d), "exp_avg_sq": (n, d)}, where they are known.
        frozen: parameters that require no gradient, {name: tensor}, the same for all learners, where they are known.
        facts: what else the checkpoint recorded (learning_rate, local_batch_size, algorithm ...).
        origin: of a checkpoint that another system wrote: "format", "kind" (learners, one model, average, shards of one model, possibly
            mixed), "reasons" and "notes" (sentences: why, what cannot be known, what was left out).
    """

    step: int
    weights: Float[Tensor, "n d"]
    layout: ParameterLayout
    buffers: Buffers = field(default_factory=dict)
    momentum: Tensor | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def mean(self) -> Float[Tensor, " d"]:
        """w_a = (1/n) sum_j w_j, summed in float64; exactly w_j where all are equal. Of weights in half precision it is float32."""
        if bool((self.weights == self.weights[0]).all()):
            return self.weights[0].to(_at_least_single(self.weights), copy=True)
        return self.weights.mean(0, dtype=torch.float64).to(_at_least_single(self.weights))

    @cached_property
    def deviations(self) -> Float[Tensor, "n d"]:
        """delta_j = w_j - w_a, in the type of w_a."""
        return self.weights - self.mean

    @property
    def consensus_distance(self) -> float:
        """sqrt(Tr Sigma_w), Sigma_w = (1/n) sum_j delta_j delta_j^T."""
        return float(self.deviations.double().square().sum(1).mean().sqrt())

    @property
    def weight_variance(self) -> float:
        """sigma_w^2 = Tr(Sigma_w)/d, the variance per parameter."""
        return self.consensus_distance**2 / self.weights.shape[1]

    @property
    def mean_buffers(self) -> Buffers:
        """Buffers of the averaged model: floating-point ones averaged, counters the first learner's."""
        return {
            n: b.mean(0, dtype=_at_least_single(b)) if b.is_floating_point() else b[0] for n, b in self.buffers.items()
        }

    def parameters(self, learner: int | None = None) -> dict[str, Tensor]:
        """Parameters by name of one learner, or of the mean w_a: {name: tensor}."""
        return self.layout.split(self.mean if learner is None else self.weights[learner])

    def select(self, which: range) -> Learners:
        """Some of the learners, as views."""
        part = slice(which.start, which.stop)
        return replace(
            self,
            weights=self.weights[part],
            buffers={n: b[part] for n, b in self.buffers.items()},
            momentum=None if self.momentum is None else self.momentum[part],
            moments={n: m[part] for n, m in self.moments.items()},
        )

    def average(self) -> Learners:
        """w_a as the one learner there is, without optimizer state.

        BatchNorm statistics are averaged too, which are not those of w_a; facts["batch_norm"] says so until
        `Objective.recalibrated` has measured them anew.
        """
        has_statistics = any(name.endswith("running_mean") for name in self.buffers)
        return Learners(
            step=self.step,
            weights=self.mean[None],
            layout=self.layout,
            buffers={n: b[None] for n, b in self.mean_buffers.items()},
            frozen=self.frozen,
            facts={**self.facts, **({"batch_norm": NEEDS_RECALIBRATION} if has_statistics else {})},
            origin={**self.origin, "kind": "average"},
        )

    @property
    def is_finite(self) -> bool:
        """Whether every weight is finite."""
        return bool(torch.isfinite(self.weights).all())

    def shown(self) -> Shown:
        """How many, how large, and how far apart."""
        n, d = self.weights.shape
        kept = [
            name
            for name, there in (("momentum", self.momentum is not None), *((m, True) for m in self.moments))
            if there
        ]
        distances = self.deviations.double().norm(dim=1).cpu().numpy()
        rows: list[Row] = [
            ("step", self.step, ""),
            ("learners", n, ""),
            ("parameters", d, ""),
            ("|w_a|", float(self.mean.double().norm()), "weights"),
            ("consensus distance", self.consensus_distance, "weights"),
            ("sigma_w", math.sqrt(self.weight_variance), "weights"),
            *(
                (name.replace("_", " "), value, "")
                for name, value in self.facts.items()
                if name != "num_learners"
                if isinstance(value, str | int | float)
            ),
        ]
        rows += [("kept of the optimiser", ", ".join(kept), "")] if kept else []
        rows += (
            [("read from", f"{self.origin['format']} ({self.origin['kind']})", "")]
            if {"format", "kind"} <= set(self.origin)
            else []
        )
        notes = [] if self.is_finite else ["some weights are not finite"]
        notes += [str(sentence) for sentence in (*self.origin.get("reasons", ()), *self.origin.get("notes", ()))]
        return Shown("Learners", rows, notes, sparkline(distances, "distance of each learner from their mean", from_zero=True) if n <= 64 else "")  # fmt: skip

    def __repr__(self) -> str:
        n, d = self.weights.shape
        return f"Learners(step={self.step}, num_learners={n}, num_parameters={d}, consensus_distance={self.consensus_distance:.4g})"


def _at_least_single(tensor: Tensor) -> torch.dtype:
    """The type in which an average is kept: half precision rounds by as much as learners may differ."""
    return torch.promote_types(tensor.dtype, torch.float32)
