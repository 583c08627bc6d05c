"""What is studied: plain data. A study trains one task at several total batch sizes and learning rates with every algorithm.

Choosing a grid. Rates are given for the smallest total batch; at k times that batch they are k times as large (linear scaling), so a column of
the grid is one rule followed at every batch. The smallest factor should converge everywhere, the largest fail everywhere, with steps of a
factor of 2 (the bracket of an edge is one such step). Every batch size sees the same number of examples, `num_epochs` passes, so larger batches
take fewer steps, as in the paper; the largest should still take 40 or more. `python -m paper_figs.studies NAME --pilot` runs the first seed
alone, and its runs are kept for the whole study; runs of rates that are added or taken away later are neither lost nor run again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from landscape.tasks.task import Scale

VARIANTS = ("ssgd", "ssgd-star-matched", "dpsgd")
"""SSGD; SSGD* with isotropic noise on the weights, of the spread sigma_w(t) that DPSGD recorded at the same rate and seed, interpolated
between the steps that are logged; DPSGD."""
EVERY = 5
"""Steps between losses at the end of a run that a map judges by; a run's steps and logs are multiples of it, so that none is taken twice."""


@dataclass(frozen=True)
class Along:
    """What is measured along training, and how thoroughly.

    Attributes:
        variants: which algorithms.
        num_seeds: so many of the study's seeds, the first.
        marks: checkpoints, in twentieths of the run.
        num_draws: fresh minibatch assignments for alpha_e and the noise.
        num_examples: training examples that stand for all of them in alpha_e and the noise, a fixed choice, B or more; None for all.
        curvature_examples: the same for the curvatures, which cost most.
        num_samples: deviations of the isotropic kernel.
        max_matvecs: Hessian products for the largest eigenvalue of L.
        smoothing_matvecs: of the smoothed loss, where a product costs two gradients for each deviation.
    """

    variants: tuple[str, ...] = VARIANTS
    num_seeds: int = 1
    marks: tuple[int, ...] = (2, 6, 14)
    num_draws: int = 8
    num_examples: int | None = 256
    curvature_examples: int | None = 128
    num_samples: int = 4
    max_matvecs: int = 12
    smoothing_matvecs: int = 4


@dataclass(frozen=True)
class Study:
    """One task, trained over a grid.

    Attributes:
        name: of the study and of its file.
        task: as `landscape train` takes it, with its scale.
        local_batch_sizes: B, rising; the total batch is n B.
        learning_rates: alpha at the smallest total batch, rising; linearly scaled at the others.
        num_epochs: passes over the training examples, at every batch size.
        converged_share: a run has converged when the median of its last logged training losses is below this share of the loss of constant
            output; short runs of small networks do not come as far as the task's own threshold asks.
        num_learners: n, on a ring.
        seeds: of initial weights and data order, which all algorithms and rates share.
        warmup_epochs: over which a scaled rate rises from that of the smallest batch.
        momentum: of SGD.
        weight_decay: of SGD.
        evaluation_examples: training and held-out examples on which losses and accuracies are taken; 0 for all.
        num_logged: about so many times losses are logged along a run, beside those of the last 50 steps.
        stands_for: the paper's task of the same network.
        along: what is measured along training.
    """

    name: str
    task: str
    local_batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    num_epochs: float
    converged_share: float
    num_learners: int = 4
    seeds: tuple[int, ...] = (1, 2, 3)
    warmup_epochs: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    evaluation_examples: int = 500
    num_logged: int = 12
    stands_for: str | None = None
    along: Along = field(default_factory=Along)

    def __post_init__(self) -> None:
        for name in ("local_batch_sizes", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"study {self.name}: {name} must rise, not {values}")
        if self.num_learners < 2:
            raise ValueError(f"study {self.name}: DPSGD needs at least 2 learners, not {self.num_learners}")
        if not 0 < self.converged_share < 1:
            raise ValueError(f"study {self.name}: converged_share must be between 0 and 1, not {self.converged_share}")
        if not self.num_epochs > 0 or not 0 <= self.warmup_epochs < self.num_epochs:
            raise ValueError(f"study {self.name}: num_epochs must be positive and longer than the warm-up")
        if not set(self.along.variants) <= set(VARIANTS) or not 0 <= self.along.num_seeds <= len(self.seeds):
            raise ValueError(
                f"study {self.name}: what is measured along training must be among {VARIANTS} and the seeds"
            )
        if not all(0 < mark < 20 for mark in self.along.marks):
            raise ValueError(f"study {self.name}: marks are twentieths of a run, 1 to 19, not {self.along.marks}")

    @property
    def total_batches(self) -> tuple[int, ...]:
        """n B."""
        return tuple(self.num_learners * b for b in self.local_batch_sizes)

    def rates_at(self, batch: int) -> tuple[float, ...]:
        """Learning rates at the batch of this index."""
        scale = self.local_batch_sizes[batch] / self.local_batch_sizes[0]
        return tuple(round(rate * scale, 12) for rate in self.learning_rates)

    def num_steps(self, batch: int, num_examples: int) -> int:
        """Steps at the batch of this index, so that every one sees as many examples; a multiple of EVERY, at which losses are taken."""
        return EVERY * max(1, round(self.num_epochs * num_examples / self.total_batches[batch] / EVERY))

    def log_every(self, batch: int, num_examples: int) -> int:
        """Steps between logged losses, a multiple of EVERY."""
        return EVERY * max(1, round(self.num_steps(batch, num_examples) / self.num_logged / EVERY))

    def schedule(self, batch: int, num_examples: int) -> str:
        """Constant, after the warm-up where the rate is scaled."""
        steps = round(self.warmup_epochs * num_examples / self.total_batches[batch])
        scale = self.local_batch_sizes[batch] / self.local_batch_sizes[0]
        return f"warmup:{steps}:{1 / scale:.6g}+constant" if steps and scale > 1 else "constant"

    def scale_label(self, num_examples: int) -> str:
        """In what the study is smaller than the paper, for figures."""
        base, at, scale = self.task.partition("@")
        shape = f"{base}, {Scale.parse(scale)}" if at else base
        known = "" if "examples=" in scale else f", {num_examples:,} training examples"
        batches = ", ".join(map(str, self.total_batches))
        warm = f" ({self.warmup_epochs:g} of warm-up)" if self.warmup_epochs else ""
        return (
            f"{shape}{known}; {self.num_learners} learners on a ring, total batch {batches}, {self.num_epochs:g} epochs{warm}, "
            f"momentum {self.momentum:g}, {len(self.seeds)} seeds; not the paper's scale"
        )

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def pilot(self) -> Study:
        """The first seed alone."""
        return replace(self, seeds=self.seeds[:1], along=replace(self.along, num_seeds=min(1, self.along.num_seeds)))

    def quick(self, num_examples: int, steps: int = 20) -> Study:
        """The same code in about a minute: two batch sizes, rates and seeds, few steps, rough measures, and hardly anything asked for convergence."""
        along = replace(self.along, marks=self.along.marks[-2:], num_draws=4, num_examples=64, curvature_examples=64,
                        num_samples=2, max_matvecs=8, smoothing_matvecs=2, num_seeds=min(1, self.along.num_seeds))  # fmt: skip
        return replace(
            self, name=f"{self.name}-quick", learning_rates=tuple(dict.fromkeys([self.learning_rates[0], self.learning_rates[-1]])),
            local_batch_sizes=self.local_batch_sizes[:2], seeds=self.seeds[:2], converged_share=0.9999, warmup_epochs=0.0,
            num_epochs=min(self.num_epochs, steps * self.total_batches[0] / num_examples), evaluation_examples=64, along=along,
        )  # fmt: skip


CIFAR: dict[str, Any] = {
    "local_batch_sizes": (8, 16, 32),
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "num_epochs": 5,
    "num_logged": 8,
    "evaluation_examples": 150,
}
"""Momentum and decay of the recipes."""

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study("mnist-mlp", "mnist-mlp", (40, 80, 160), (0.2, 0.25, 0.3, 0.35, 0.4), num_epochs=30, converged_share=0.3,
              num_learners=6, seeds=(1, 2, 3, 4, 5, 6), evaluation_examples=1000),
        Study("cifar10-senet18", "cifar10-senet18@width=1/8,size=16,examples=1000", learning_rates=(0.1, 0.2, 0.4, 0.8), converged_share=0.85,
              stands_for="cifar10-senet18", **CIFAR),
        Study("cifar10-resnet18", "cifar10-resnet18@width=1/8,size=16,examples=1000", learning_rates=(0.05, 0.1, 0.2), converged_share=0.9,
              stands_for="cifar10-resnet18", **CIFAR),
        Study("cifar10-vgg19", "cifar10-vgg19@width=1/8,examples=1000", learning_rates=(0.0125, 0.025, 0.05), converged_share=0.9,
              stands_for="cifar10-vgg19", **CIFAR),
        Study("fsdd-blstm", "fsdd-blstm@width=1/16,examples=1000", (8, 16, 32), (0.4, 0.8, 1.6), num_epochs=6, converged_share=0.9,
              momentum=0.9, num_logged=8, evaluation_examples=150, stands_for="swb300-blstm"),
        Study("imagenette-resnet50", "imagenette-resnet50@width=1/16,size=32,examples=1000", (8, 32), (0.0125, 0.025, 0.05, 0.1, 0.2),
              num_epochs=5, converged_share=0.95, momentum=0.9, weight_decay=1e-4, num_logged=8, evaluation_examples=150,
              stands_for="imagenet-resnet50", along=Along(num_examples=128, curvature_examples=64)),
    )
}  # fmt: skip
"""By name."""


def study_named(name: str) -> Study:
    """The study of a name.

    Raises:
        ValueError: if there is none.
    """
    if name not in STUDIES:
        raise ValueError(f"no such study: {name}; there are {', '.join(STUDIES)}")
    return STUDIES[name]
