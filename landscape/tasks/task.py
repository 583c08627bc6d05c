"""What a task is, and the recipe that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from landscape import streams
from landscape.data.dataset import Examples
from landscape.losses import ExampleLoss, LossFunction

CONVERGENCE_WINDOW = 50
"""Steps at a run's end over which the median training loss of w_a is compared with a task's threshold (theory.md sec. 8)."""


@dataclass(frozen=True)
class Recipe:
    """How a network is customarily trained on one device, and from there on many by linear scaling of the learning rate with a warm-up.

    Attributes:
        total_batch_size: examples a step of the baseline.
        learning_rate: of the baseline.
        num_epochs: passes over the training data.
        momentum: of SGD.
        weight_decay: of SGD.
        milestones: epochs at which the rate is multiplied by `decay`.
        decay: that factor.
        warmup_epochs: epochs over which a scaled rate is reached from the baseline's.
    """

    total_batch_size: int
    learning_rate: float
    num_epochs: int
    momentum: float
    weight_decay: float
    milestones: tuple[int, ...]
    decay: float = 0.1
    warmup_epochs: int = 5

    def settings(self, num_examples: int, num_learners: int, local_batch_size: int, num_epochs: int | None = None) -> dict[str, Any]:  # fmt: skip
        """Fields of a `TrainConfig`: learning_rate, num_steps, schedule, momentum and weight_decay.

        The rate is the baseline's times (num_learners local_batch_size)/total_batch_size (Goyal et al., arXiv 1706.02677); where that is
        more than the baseline's, it is reached from there over the warm-up. Milestones stay at their share of the epochs.

        >>> Recipe(128, 0.1, 10, 0.9, 5e-4, (5, 8)).settings(50_000, 16, 64)["learning_rate"]
        0.8
        """
        epochs = self.num_epochs if num_epochs is None else num_epochs
        if min(num_examples, num_learners, local_batch_size, epochs) < 1:
            raise ValueError("a recipe needs at least one example, learner, example a learner and epoch")
        scale = num_learners * local_batch_size / self.total_batch_size
        per_epoch = math.ceil(num_examples / (num_learners * local_batch_size))
        steps = epochs * per_epoch
        stretch = epochs / self.num_epochs
        milestones = sorted({round(m * stretch * per_epoch) for m in self.milestones})
        milestones = [m for m in milestones if 0 < m < steps]
        shape = f"step:{','.join(map(str, milestones))}:{self.decay:g}" if milestones else "constant"
        warmup = round(self.warmup_epochs * stretch * per_epoch) if scale > 1 else 0
        return {
            "learning_rate": round(self.learning_rate * scale, 12),
            "num_steps": steps,
            "schedule": f"warmup:{warmup}:{1 / scale:.6g}+{shape}" if warmup else shape,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True)
class Scale:
    """A smaller form of a task, for machines that do not carry the whole one: what follows the @ of its name.

    Attributes:
        width: share of the channels; None for all.
        size: side of the images in pixels; None for theirs.
        examples: training examples, a fixed random choice of them; None for all.
    """

    width: Fraction | None = None
    size: int | None = None
    examples: int | None = None

    @staticmethod
    def parse(text: str) -> Scale:
        """Read "width=1/4,size=64,examples=5000".

        >>> Scale.parse("width=1/4,examples=5000")
        Scale(width=Fraction(1, 4), size=None, examples=5000)
        """
        found: dict[str, Any] = {}
        try:
            for part in text.split(","):
                name, _, value = part.partition("=")
                if name in found or name not in ("width", "size", "examples"):
                    raise ValueError
                found[name] = Fraction(value) if name == "width" else int(value)
                if found[name] <= 0 or (name == "width" and found[name] > 1):
                    raise ValueError
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f"scale {text!r} cannot be read; use width=FRACTION (of the channels, at most 1), size=PIXELS, examples=NUMBER, "
                "separated by commas"
            ) from None
        return Scale(**found)

    def refuse(self, name: str, *fields: str) -> None:
        """Raise for fields that mean nothing to a task."""
        for field in fields:
            if getattr(self, field) is not None:
                raise ValueError(f"task {name} has no {field} to choose")

    def __str__(self) -> str:
        parts = [
            f"{self.width} of the channels" if self.width is not None else "",
            f"{self.size}x{self.size} images" if self.size is not None else "",
            f"{self.examples:,} training examples" if self.examples is not None else "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        name: as given to --task.
        description: one line.
        build_model: makes the network with its default initialisation, from torch's global random state.
        loss_fn: see `landscape.losses`.
        load_data: (data root or None) -> training and held-out data.
        threshold: a run has converged when the median training loss of w_a over its last 50 steps is below this.
        constant_loss: the training loss of the best constant output; a run that ends near it is stuck.
        needs_data_root: whether the data lie on disk.
        evaluation_examples: training and held-out examples on which logged losses are taken, a fixed choice; None for all.
        recipe: how it is customarily trained.
    """

    name: str
    description: str
    build_model: Callable[[], nn.Module]
    loss_fn: ExampleLoss | LossFunction
    load_data: Callable[[str | Path | None], tuple[Examples, Examples]]
    threshold: float
    constant_loss: float
    needs_data_root: bool = False
    evaluation_examples: int | None = None
    recipe: Recipe | None = None

    def initial_model(self, seed: int) -> nn.Module:
        """The network with the initial weights of a seed; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(streams.philox("initial weights", seed).random_raw() >> 1))
            return self.build_model()
