"""The training program: all learners of all replicas advance together, on one device or on the processes of torchrun.

Shapes: R replicas (seeds, learning rates) of n learners each, L = R n, replica-major; d parameters; B examples a learner. A process of
several holds L of the n learners of one replica.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape import streams
from landscape.data.dataset import Examples
from landscape.data.sampling import IndexSampler
from landscape.data.selection import choose
from landscape.functional import Buffers, FunctionalModel
from landscape.tasks import Task
from landscape.training.algorithms import Evaluation, LocalUpdate, Step
from landscape.training.communicator import Communicator, StackedCommunicator, Take, spread
from landscape.training.config import GOSSIPING, TrainConfig
from landscape.training.faults import FaultyCommunicator
from landscape.training.fitting import check_fits
from landscape.training.minibatches import Minibatches, stacks_well
from landscape.training.noise import NoiseProfile
from landscape.training.rules import RULES
from landscape.training.schedule import parse_schedule
from landscape.training.state import LearnerState
from landscape.training.topology import Topology
from landscape.training.topology import controlled_disagreement as controlled_disagreement


@dataclass(frozen=True)
class StepRecord:
    """What a step tells, one entry a replica.

    Attributes:
        losses: (R,) mean minibatch loss over the learners, at the gradient points.
        alive: (R,) whether the replica was still finite, and so advanced.
        stop: whether any process was asked to stop.
        mean_gradient: (R, d), the learners' gradients averaged, where asked for.
    """

    losses: Tensor
    alive: Tensor
    stop: bool = False
    mean_gradient: Tensor | None = None


class Program:
    """A training program for one config and some replicas of it.

    Args:
        task: what is trained.
        config: its seed and learning rate hold where `seeds` and `learning_rates` are not given.
        topology: M(t).
        train: the training data.
        seeds: one a replica.
        learning_rates: base rate of each replica.
        sigma0: SSGD*'s noise level, (T,) or (R, T) over the steps; by default the config's constant.
        profiles: SSGD*'s matched noise instead, one profile a replica, all in the same place.
        communicator: the backend; stacked by default.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        topology: Topology,
        train: Examples,
        *,
        seeds: Sequence[int] | None = None,
        learning_rates: Sequence[float] | None = None,
        sigma0: np.ndarray | None = None,
        profiles: Sequence[NoiseProfile] | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self.task, self.config, self.topology = task, config, topology
        self.seeds = tuple(seeds if seeds is not None else (config.seed,))
        rates = tuple(learning_rates if learning_rates is not None else [config.learning_rate] * len(self.seeds))
        if len(rates) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds, but {len(rates)} learning rates")
        if config.local_batch_size > len(train):
            raise ValueError(
                f"local_batch_size {config.local_batch_size} is larger than the data ({len(train)} training examples)"
            )
        self.device, self.dtype = config.torch_device(), config.torch_dtype
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = config.tf32
        models = {seed: task.initial_model(seed) for seed in dict.fromkeys(self.seeds)}
        self._initial = [FunctionalModel(models[seed], task.loss_fn).initial_weights() for seed in self.seeds]
        module = models[self.seeds[0]]
        check_fits(task.name, FunctionalModel(module, task.loss_fn).evaluation(), train)
        batched = not config.reproducible and (
            config.batching == "stacked" or (config.batching == "auto" and stacks_well(module))
        )
        self.model = FunctionalModel(module, task.loss_fn, batched=batched).to(self.device, self.dtype)
        self.evaluation_model = self.model.evaluation()
        self.train = train.to(self.device, self.dtype)
        chosen = task.evaluation_examples if config.evaluation_examples is None else config.evaluation_examples
        self.evaluation_examples = chosen or None
        self.evaluated = self.part(self.train)
        self.communicator = communicator or StackedCommunicator(config.num_learners, ordered=config.reproducible)
        self.num_held = len(self.communicator.held)
        if self.num_held < config.num_learners and len(self.seeds) > 1:
            raise ValueError(
                "several replicas at once are for one process; on several processes train one run at a time"
            )
        self.update = LocalUpdate(config.momentum, config.dampening, config.nesterov, config.weight_decay)
        self.schedule = parse_schedule(config.schedule, config.num_steps)
        held = self.communicator.held
        n, batch = config.num_learners, config.local_batch_size
        self.sampler = IndexSampler(self.seeds, n, batch, len(train), held=held)
        self._rates = torch.tensor(rates, dtype=self.dtype, device=self.device).repeat_interleave(self.num_held)[
            :, None
        ]
        self.gamma_schedule = parse_schedule(config.gamma_schedule, config.num_steps)
        self._static: tuple[float, Tensor] | None = None
        level = (
            np.full((1, 1), config.sigma0 if isinstance(config.sigma0, float | int) else 0.0)
            if sigma0 is None
            else np.atleast_2d(sigma0)
        )
        self._sigma0 = np.broadcast_to(level, (len(self.seeds), max(level.shape[1], 1)))
        self._profiles = [p.to(self.device, self.dtype) for p in profiles or ()]
        self._check_profiles()
        self.minibatches = Minibatches(self.model, self.train, config, self.seeds, held)

    def part(self, data: Examples) -> Examples:
        """The part of a data set on which logged losses are taken."""
        return data if self.evaluation_examples is None else choose(data, self.evaluation_examples)

    @property
    def num_replicas(self) -> int:
        """R."""
        return len(self.seeds)

    def initial_state(self) -> LearnerState:
        """Step 0: one initial weight vector a replica, by its seed, shared by its learners."""
        weights = torch.stack([w for w, _ in self._initial]).to(self.device, self.dtype)
        names = self._initial[0][1]
        buffers = {name: torch.stack([b[name] for _, b in self._initial]).to(self.device) for name in names}
        buffers = {n: b.to(self.dtype) if b.is_floating_point() else b for n, b in buffers.items()}
        return LearnerState.replicated(weights, buffers, self.num_held, momentum=self.config.momentum > 0)

    def mixing(self, step: int) -> Tensor:
        """(1 - gamma) I + gamma M of the step on the CPU, (n, n), or (R, n, n) where it depends on the seed; every process finds the same."""
        gamma = self.config.gamma * self.gamma_schedule(step)
        if self.topology.is_static:
            if self._static is None or self._static[0] != gamma:
                self._static = gamma, self._damped(self.topology.matrices[0], gamma)
            return self._static[1]
        if self.topology.kind == "periodic":
            return self._damped(self.topology.matrix(0, step), gamma)
        by_seed = {s: self.topology.matrix(s, step) for s in dict.fromkeys(self.seeds)}
        return self._damped(np.stack([by_seed[s] for s in self.seeds]), gamma)

    def _damped(self, matrix: np.ndarray, gamma: float) -> Tensor:
        return torch.as_tensor(controlled_disagreement(matrix, gamma), dtype=self.dtype)

    def noise_level(self, step: int, replica: int = 0) -> float | None:
        """sigma_0 of the step: standard deviation of the noise on the weights, or None where no single number tells that noise."""
        if self.config.algorithm != "ssgd-star" or self._noise_place == "gradient":
            return 0.0
        if self.config.noise_zero_sum:
            return None
        if self._profiles:
            profile = self._profiles[replica]
            at = profile.index(step)
            return None if profile.shape != "isotropic" else float(profile.factors[at, 0]) if at >= 0 else 0.0
        return float(self._levels(step)[replica])

    def _levels(self, step: int) -> np.ndarray:
        """sigma_0 of each replica, (R,)."""
        return np.asarray(self._sigma0[:, min(step, self._sigma0.shape[1] - 1)])

    def noise(self, step: int) -> Tensor | None:
        """SSGD*'s zeta (L, d) of the step, or None where there is none."""
        profiles = self._profiles if self._noise_place == "weights" else []
        levels = self._levels(step)
        if self.config.algorithm != "ssgd-star" or not (profiles or levels.any()):
            return None
        n, d = self.config.num_learners, self.model.layout.num_parameters
        zeta = torch.empty(self.num_replicas * self.num_held, d, dtype=self.dtype, device=self.device)
        for r, seed in enumerate(self.seeds):
            for i, j in enumerate(self.communicator.held, start=r * self.num_held):
                generator = streams.torch_generator("weight noise", seed, j, step, device=self.device)
                if profiles:
                    zeta[i] = profiles[r].sample(step, generator)
                else:
                    zeta[i].normal_(0.0, float(levels[r]), generator=generator)
        if not self.config.noise_zero_sum:
            return zeta
        return zero_sum(zeta, spread(self.communicator.means(zeta), self.num_held), n)

    def gradient_noise(self, step: int) -> Tensor | None:
        """SSGD*'s xi (L, d) of the step, alike for the learners of a replica, or None where there is none."""
        if self._noise_place != "gradient":
            return None
        drawn = [
            profile.sample(step, streams.torch_generator("gradient noise", seed, step, device=self.device))
            for profile, seed in zip(self._profiles, self.seeds, strict=True)
        ]
        return torch.stack(drawn).repeat_interleave(self.num_held, dim=0)

    @property
    def _noise_place(self) -> str | None:
        """Where the profiles' noise stands."""
        return self._profiles[0].place if self._profiles and self.config.algorithm == "ssgd-star" else None

    def _check_profiles(self) -> None:
        d = self.model.layout.num_parameters
        if self.config.is_calibrated and not self._profiles:
            raise ValueError(
                f"sigma0 names {self.config.sigma0} to match, so the program needs noise profiles; `landscape.train` makes them"
            )
        if self._profiles and len(self._profiles) != self.num_replicas:
            raise ValueError(f"{self.num_replicas} replicas, but {len(self._profiles)} noise profiles")
        for profile in self._profiles:
            if profile.num_parameters != d or profile.place != self._profiles[0].place:
                raise ValueError(
                    f"a noise profile for {profile.num_parameters} parameters on the {profile.place} does not fit: "
                    f"the model has {d} parameters, and the first profile is on the {self._profiles[0].place}"
                )

    def step(self, state: LearnerState, alive: Tensor, *, stop: bool = False, keep_gradient: bool = False) -> tuple[LearnerState, StepRecord]:  # fmt: skip
        """One step of every replica that is alive; the others are frozen at their last finite weights.

        Args:
            state: all learners held here.
            alive: (R,) booleans.
            stop: whether this process is asked to stop; the record says whether any is.
            keep_gradient: whether the record is to hold the averaged gradient.
        """
        c, indices = self.config, self.sampler.indices(state.step).to(self.device)

        def evaluate(points: Tensor, take: Take | None) -> Evaluation:
            ahead = self.train.reads_ahead and state.step + 1 < c.num_steps
            following = self.sampler.indices(state.step + 1).to(self.device) if ahead else None
            return self.minibatches.evaluate(points, state, indices, take, following=following)

        def losses(points: Tensor, learner: int) -> Tensor:
            return self.minibatches.losses(points, learner, state, indices)

        new, evaluation = RULES[c.algorithm](
            Step(
                state,
                c,
                evaluate,
                losses,
                self._exchanging(state.step),
                self.update,
                self.model.layout,
                learning_rates=self._rates * self.schedule(state.step),
                mixing=self.mixing(state.step) if c.algorithm in GOSSIPING else None,
                noise=self.noise(state.step),
                gradient_noise=self.gradient_noise(state.step),
            )
        )
        finite = torch.isfinite(evaluation.losses) & torch.isfinite(new.params.sum(1))  # gradients' too, then
        asked = torch.full_like(evaluation.losses, float(stop), dtype=torch.float64)
        told = self.communicator.sums(torch.stack([evaluation.losses.double(), (~finite).double(), asked], dim=1))
        alive = alive & (told[:, 1] == 0)
        if not bool(alive.all()):
            new = _keep(new, state, alive.repeat_interleave(self.num_held))
        gradient = None
        if keep_gradient and evaluation.mean_gradients is not None:
            gradient = evaluation.mean_gradients[:: self.num_held].clone()  # which may lie in a buffer of the backend's
        elif keep_gradient and evaluation.gradients is not None:
            gradient = self.communicator.means(evaluation.gradients)
        return new, StepRecord(told[:, 0] / c.num_learners, alive, bool(told[:, 2].any()), gradient)

    def _exchanging(self, step: int) -> Communicator:
        """The communicator of the step's rule: the backend, with simulated faults if there are any."""
        c = self.config
        if not c.num_faulty:
            return self.communicator
        return FaultyCommunicator(self.communicator, c.num_faulty, c.fault, c.fault_scale, self.seeds, step)

    def evaluate(
        self, points: Float[Tensor, "L d"], state: LearnerState, indices: Tensor, take: Take | None = None, *, masks: str = "dropout"
    ) -> Evaluation:  # fmt: skip
        """Minibatch losses, gradients and new buffers at points; see `Minibatches`."""
        return self.minibatches.evaluate(points, state, indices, take, masks=masks)

    def averaged(self, state: LearnerState) -> tuple[Tensor, Buffers]:
        """w_a of each replica (R, d) and its buffers: floating-point ones averaged, counters the first learner's; the same on every process."""
        buffers = {
            name: self.communicator.means(b.double()).to(b.dtype) if b.is_floating_point() else b[:: self.num_held]
            for name, b in state.buffers.items()
        }
        return self.communicator.means(state.params), buffers

    def consensus_distances(self, state: LearnerState) -> Tensor:
        """sqrt(Tr Sigma_w) of each replica, (R,) float64, Sigma_w = (1/n) sum_j delta_j delta_j^T."""
        params = state.params.double()
        deviations = params - spread(self.communicator.means(params), self.num_held)
        squares = self.communicator.sums(deviations.square().sum(1, keepdim=True))
        return (squares[:, 0] / self.config.num_learners).sqrt()


def sum_to_zero(noise: Tensor, num_learners: int) -> Tensor:
    """`zero_sum` of noises (L, d) of all learners of some replicas."""
    by_replica = noise.unflatten(0, (-1, num_learners))
    return zero_sum(by_replica, by_replica.mean(1, keepdim=True), num_learners).flatten(0, 1)


def zero_sum(noise: Tensor, mean: Tensor, num_learners: int) -> Tensor:
    """Independent noises of equal covariance less their mean over the learners, times sqrt(n/(n - 1)).

    Each keeps its covariance, and any two are correlated by -1/(n - 1), as deviations from a common mean are.
    """
    return math.sqrt(num_learners / (num_learners - 1)) * (noise - mean)


def _keep(new: LearnerState, old: LearnerState, alive: Tensor) -> LearnerState:
    """New state where alive, old state elsewhere."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(alive.view(-1, *[1] * (a.ndim - 1)), a, b)

    return LearnerState(
        params=choose(new.params, old.params),
        buffers={name: choose(b, old.buffers[name]) for name, b in new.buffers.items()},
        momentum=None if new.momentum is None or old.momentum is None else choose(new.momentum, old.momentum),
        step=new.step,
    )
