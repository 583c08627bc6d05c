"""What the measures of one checkpoint share, and how thoroughly they measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from landscape import streams
from landscape.checkpoints import Learners, Run
from landscape.curvature.hessian import HessianOperator
from landscape.curvature.lanczos import Eigenpairs, top_eigenpairs
from landscape.experiments.profiles import matched_points, stored_profile
from landscape.experiments.train import matched_sigma0
from landscape.noise.covariance import CovarianceSummary, gradient_covariance_summary
from landscape.noise.decomposition import decompose, smoothed_by_points
from landscape.noise.draws import Draws, Points, draw_gradients, weight_noise_points
from landscape.noise.projections import example_projections
from landscape.noise.reference import ReferenceGradient, reference_gradient
from landscape.noise.rows import Rows
from landscape.objective import Objective
from landscape.tasks import Task
from landscape.theory.modes import LocalRule
from landscape.theory.smoothed_loss import SmoothedLoss, smoothed_loss
from landscape.theory.smoothing import (
    KERNELS,
    Kernel,
    SmoothedCurvature,
    smoothed_curvature,
)
from landscape.theory.stability import learning_rate_thresholds
from landscape.training.algorithms import gradient_points
from landscape.training.config import TrainConfig
from landscape.training.loop import sum_to_zero
from landscape.training.topology import Topology


@dataclass(frozen=True)
class MeasureConfig:
    """How thoroughly to measure."""

    num_draws: int = 32
    """Fresh minibatch assignments at each checkpoint; errors shrink as 1/sqrt."""
    num_smoothing_samples: int = 16
    """Deviations for the isotropic and covariance-matched kernels (antithetic pairs)."""
    num_eigenpairs: int = 20
    """Top eigenpairs of H(w_a), for noise against curvature and the noise-only prediction of the disagreement."""
    max_matvecs: int = 80
    """Bound on Hessian products of each eigenvalue problem."""
    smoothing_matvecs: int = 8
    """The same for the smoothed Hessians, where a product costs 2 S gradients."""
    num_covariance_examples: int = 500
    """Examples whose gradients make the spectrum of their covariance; a spectrum costs the cube of this."""
    num_probes: int = 12
    """Probes for traces of products of noise and curvature."""
    num_examples: int | None = None
    """Training examples that stand for all of them, a fixed random choice: L, its gradient, its curvature and the minibatches are then those
    of the choice. All by default."""
    num_gradient_examples: int | None = None
    """Examples for the full gradient that draws are compared with, debiased; all of them by default. Predictions and the ledger still
    take the exact one."""
    memory_gb: float | int | None = None
    """Memory of a process, in GiB, beside the learners' weights, that draws and kept graphs may take: what is beyond lies in a file or is computed anew.
    Bases of eigenproblems (curvature, alignment) and single gradients are not bounded by it."""
    learning_rate: float | int | None = None
    """alpha, for checkpoints that do not record it; overrides what they record."""
    local_batch_size: int | None = None
    """B, likewise."""
    seed: int = 0
    """Seed of draws, deviations and starting vectors, which differ from checkpoint to checkpoint."""


class Checkpoint:
    """What the measures of one checkpoint share, each computed when first asked for."""

    def __init__(self, run: Run, step: int, task: Task, objective: Objective, settings: MeasureConfig) -> None:
        self.run, self.step, self.task, self.settings = run, step, task, settings
        self._objective = objective
        self.config: TrainConfig = run.config
        self.seed = streams.at_step(settings.seed, step)
        self.learners: Learners = run.learners(step)
        self._check_network()

    def _check_network(self) -> None:
        """Refuse weights that are not of the task's network, name for name."""
        own, theirs = self._objective.model.layout, self.learners.layout
        frozen = dict(self._objective.model.module.named_parameters())
        if own != theirs:
            pairs = zip(
                zip(own.names, own.shapes, strict=True), zip(theirs.names, theirs.shapes, strict=True), strict=False
            )
            first = next((f"{a[0]} {list(a[1])} there, {b[0]} {list(b[1])} here" for a, b in pairs if a != b), f"{len(own.names)} parameters there, {len(theirs.names)} here")  # fmt: skip
            raise ValueError(
                f"the parameters of {self.run.path} are not those of task {self.task.name} in name, shape and order ({first}); "
                f"landscape import {self.run.path} --task {self.task.name} --out OTHER puts them in its order"
            )
        for name, tensor in self.learners.frozen.items():
            if name in frozen and not torch.equal(frozen[name].detach().cpu(), tensor.to(frozen[name].dtype)):
                raise ValueError(
                    f"{name} is frozen in task {self.task.name}, but differs between the checkpoints of {self.run.path}"
                )

    @cached_property
    def objective(self) -> Objective:
        """L(w), with BatchNorm's statistics frozen as measured at w_a (theory.md sec. 1)."""
        return self._objective.recalibrated(self.mean)

    @cached_property
    def learning_rate(self) -> float:
        """alpha of the step that follows."""
        return float(self._facts["learning_rate"])

    @cached_property
    def local_batch_size(self) -> int:
        """B."""
        return int(self._facts["local_batch_size"])

    @cached_property
    def _facts(self) -> dict[str, float | int]:
        s, recorded = self.settings, self.learners.facts
        given = {"learning_rate": s.learning_rate, "local_batch_size": s.local_batch_size}
        found = {name: recorded.get(name) if value is None else value for name, value in given.items()}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(
                f"the checkpoint of step {self.step} does not record its {' and '.join(missing)}; give {flags}"
            )
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def mean(self) -> Tensor:
        """w_a (d,)."""
        return self.learners.mean.to(self._objective.device, self._objective.dtype)

    @cached_property
    def gradient(self) -> Tensor:
        """g(w_a) (d,), over all training data."""
        return self.objective.gradient(self.mean)

    @cached_property
    def reference(self) -> ReferenceGradient:
        """What draws are compared with: g, or its estimate from some examples."""
        count = self.settings.num_gradient_examples
        if count is None or count >= self.objective.num_examples:
            return ReferenceGradient(self.gradient[None], self.objective.num_examples, self.objective.num_examples)
        return reference_gradient(self.objective, self.mean, count, seed=self.seed)

    def share(self, part: int, among: int = 1) -> int | None:
        """So many eighths of the memory budget, in bytes, shared among several."""
        return None if self.settings.memory_gb is None else int(self.settings.memory_gb * 2**30) * part // (8 * among)

    @cached_property
    def topology(self) -> Topology:
        """M(t) as the run recorded it, with the gamma of the step that follows."""
        return self.topology_at(self.step)

    def topology_at(self, step: int) -> Topology:
        """The same with the gamma of another step."""
        record = self.run.record["topology"]
        made = Topology(record["name"], record["num_learners"], record["kind"], np.asarray(record["matrices"]))
        return made.damped(self.config.gamma_at(step))

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """Largest stable alpha lambda, by mode."""
        recorded = self.run.record["topology"].get("thresholds")
        if recorded is not None:
            return dict(recorded)
        c = self.config  # of a recorder, which knows no theory
        return learning_rate_thresholds(self.topology, c.algorithm, c.order, c.momentum, c.dampening, nesterov=c.nesterov, gammas=c.gamma_range)  # fmt: skip

    @cached_property
    def mixing(self) -> Tensor:
        """M of the step that follows, (n, n) float64."""
        return torch.as_tensor(self.topology.matrix(self.config.seed, self.step))

    @cached_property
    def rule(self) -> LocalRule:
        """Order and momentum."""
        c = self.config
        return LocalRule(c.order, c.momentum, c.dampening, c.nesterov)

    @cached_property
    def sigma0(self) -> float | None:
        """SSGD*'s level of independent isotropic noise on the weights at this step; None for other algorithms and other noise."""
        if self.config.algorithm != "ssgd-star":
            return None
        if self.config.is_calibrated or self.config.noise_zero_sum:
            return None
        return self._level

    @cached_property
    def _level(self) -> float:
        """SSGD*'s level of isotropic noise, whether or not it sums to zero."""
        if "sigma0" in self.learners.facts:
            return float(self.learners.facts["sigma0"])
        level = self.config.sigma0
        return (
            float(matched_sigma0(level, self.config.num_steps + 1)[self.step])
            if isinstance(level, str)
            else float(level)
        )

    @cached_property
    def points(self) -> Points:
        """Where the following step takes its gradients: w_j, (M w)_j under CTA, w_a + fresh noise for SSGD*.

        Calibrated noise that is added to the gradient itself moves no point, and is no part of what is measured here.
        """
        profile = stored_profile(self.run)
        if profile is not None:
            return matched_points(self.run, self.learners, profile, self.seed)
        weights = self.learners.weights.to(self.mean)
        if self.sigma0:
            return weight_noise_points(self.learners, self.sigma0, self.seed)
        if self.config.noise_zero_sum and self._level:
            drawn = weight_noise_points(self.learners, self._level, self.seed)
            assert callable(drawn)
            return lambda draw: weights + sum_to_zero(drawn(draw).to(weights) - weights, len(weights))
        return gradient_points(self.config.algorithm, self.config.order, weights, self.mixing)

    @cached_property
    def standing(self) -> Learners:
        """The learners where they take their gradients, which is what smooths the landscape: at M w under CTA (theory.md sec. 2)."""
        points = self.points
        if callable(points) or torch.equal(points, self.learners.weights.to(points)):
            return self.learners
        return Learners(self.step, points, self.learners.layout)

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """Kernels that apply: all for learners that differ, isotropic sigma_0 for SSGD*, and one trivial one for SSGD."""
        if self.sigma0:
            return ("isotropic",)
        if callable(self.points):
            return ()  # noise of another kind than these kernels
        return KERNELS if self.standing.consensus_distance > 0 else ("learners",)

    @cached_property
    def draws(self) -> Draws:
        """Fresh minibatch gradients."""
        return draw_gradients(
            self.objective, self.mean, self.points, num_learners=len(self.learners), local_batch_size=self.local_batch_size,
            num_draws=self.settings.num_draws, seed=self.seed, memory_budget=self.share(2),
        )  # fmt: skip

    @cached_property
    def decomposition(self) -> xr.Dataset:
        """Section 3."""
        points, reference = self.points, self.reference
        exact = (
            None
            if callable(points) or not reference.is_exact
            else smoothed_by_points(self.objective, points, self.mean, self.gradient)
        )
        return decompose(self.draws, reference, self.learning_rate, self.objective.model.layout, exact)

    @cached_property
    def step_noise(self) -> dict[str, Rows]:
        """Gradients (K, d) of fresh draws that make the steps of SSGD, SSGD* and DPSGD at this checkpoint, the same minibatches for all.

        SSGD* takes them at w_a + isotropic noise of the learners' spread, or of its own sigma_0. "landscape" is xi_D of the run's own points.
        """
        found = {"ssgd": self.draws.mean_rows}
        own = (
            "ssgd-star" if self.config.algorithm == "ssgd-star" else "dpsgd"
        )  # at the learners' points, whatever mixes them
        if self.draws.point_rows is self.draws.mean_rows:  # all gradients are taken at w_a
            return found
        if own == "dpsgd":
            centre = Learners(self.step, self.mean.expand(len(self.learners), -1), self.learners.layout)
            spread = math.sqrt(self.standing.weight_variance)
            found["ssgd-star"] = draw_gradients(
                self.objective, self.mean, weight_noise_points(centre, spread, self.seed), num_learners=len(self.learners),
                local_batch_size=self.local_batch_size, num_draws=self.settings.num_draws, seed=self.seed,
                memory_budget=self.share(1),
            ).point_rows  # fmt: skip
        return {**found, own: self.draws.point_rows, "landscape": self.draws.landscape_rows}

    @cached_property
    def noise_norms(self) -> np.ndarray:
        """|g_i - g| of every example, (N,)."""
        g = self.gradient.double()
        norm = float(g @ g)
        found = example_projections(self.objective, self.mean, self.gradient[:, None])
        parts = [g.new_zeros(0)]  # this rank may have no example
        with self.objective.peers.agree():
            parts += [squares - 2 * along[:, 0] + norm for squares, along in found]
        return self.objective.peers.joined(torch.cat(parts)).clamp_min(0).sqrt().cpu().numpy()

    @cached_property
    def hessian(self) -> HessianOperator:
        """H(w_a)."""
        return HessianOperator(self.objective, self.mean, memory_budget=self.share(2))

    @cached_property
    def eigenpairs(self) -> Eigenpairs:
        """Top eigenpairs of H(w_a)."""
        s = self.settings
        return top_eigenpairs(self.hessian, s.num_eigenpairs, "LA", tol=0.01, max_matvecs=s.max_matvecs, seed=self.seed)

    @cached_property
    def covariance(self) -> CovarianceSummary:
        """C at w_a, along the top eigenvectors of H(w_a)."""
        return gradient_covariance_summary(self.objective, self.mean, self.eigenpairs.vectors)

    @cached_property
    def learner_hessians(self) -> list[HessianOperator]:
        """H at every learner's gradient point; one where all are equal."""
        points = self.points
        if callable(points) or self.learners.consensus_distance == 0:
            return [self.hessian]
        return [HessianOperator(self.objective, p, memory_budget=self.share(1, len(points))) for p in points]

    @cached_property
    def learner_lambda_max(self) -> list[float]:
        """lambda_max(H(w_j))."""
        if len(self.learner_hessians) == 1:
            return [float(self.eigenpairs.values[0])] * len(self.learners)
        s = self.settings
        return [
            float(
                top_eigenpairs(h, tol=1e-3, max_matvecs=s.max_matvecs, seed=self.seed, miss_probability=1.0).values[0]
            )
            for h in self.learner_hessians
        ]

    @cached_property
    def smoothed(self) -> dict[Kernel, SmoothedCurvature]:
        """Smoothed curvature under each kernel."""
        s = self.settings
        return {
            k: smoothed_curvature(self.objective, self.standing, kernel=k, num_samples=s.num_smoothing_samples,
                                  max_matvecs=s.smoothing_matvecs, seed=self.seed, sigma=self.sigma0)
            for k in self.kernels
        }  # fmt: skip

    @cached_property
    def smoothed_losses(self) -> dict[Kernel, SmoothedLoss]:
        """Loss and gradient smoothed by each kernel."""
        s = self.settings
        return {
            k: smoothed_loss(self.objective, self.standing, self.gradient, k, num_samples=2 * s.num_smoothing_samples, seed=self.seed,
                             sigma=self.sigma0, memory_budget=self.share(2))
            for k in self.kernels
        }  # fmt: skip
