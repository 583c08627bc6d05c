"""What a training run is told: one frozen dataclass, the source of the flags, their help and their checks."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from landscape.ranks import local_device
from landscape.training.faults import FAULTS, Fault
from landscape.training.noise import DRIFTS, PLACES, SHAPES, NoiseDrift, NoisePlace, NoiseShape
from landscape.training.schedule import parse_schedule

Algorithm = Literal["ssgd", "ssgd-star", "dpsgd", "local-sgd", "adjacent-leader", "ubar"]
Order = Literal["awc", "atc", "cta"]

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
ORDERS: tuple[str, ...] = get_args(Order)
GOSSIPING: tuple[str, ...] = ("dpsgd", "adjacent-leader", "ubar")
"""Those that exchange weights along a topology."""

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}

RULE_FIELDS: dict[str, tuple[str, ...]] = {
    "local-sgd": ("local_steps",),
    "adjacent-leader": ("leader_pull", "degree_pull", "leader_weight", "degree_weight"),
    "ubar": ("kept_fraction", "own_weight"),
}
"""Fields that mean something to one algorithm only."""

FAULT_FIELDS = ("num_faulty", "fault", "fault_scale")


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of one training run (theory.md sec. 2 for the symbols)."""

    algorithm: Algorithm
    """ssgd (all-reduce), ssgd-star (all-reduce, gradients at w_a + noise), dpsgd (gossip), local-sgd (an average every few steps),
    adjacent-leader (gossip led by the best and the best-connected neighbour), or ubar (gossip that leaves out suspect neighbours)."""
    learning_rate: float
    """alpha, the optimiser's base learning rate."""
    num_learners: int = 6
    """n, the number of learners."""
    local_batch_size: int = 1000
    """B, examples a learner a step; the total batch is n B."""
    num_steps: int = 500
    """Steps to train."""
    topology: str = "ring"
    """Who mixes with whom: ring, complete, torus, hypercube, star, exponential, one-peer-exponential, random-pairing, or
    a file with a doubly stochastic matrix (.npy .csv .txt) or a graph (.graphml .edgelist .adjlist)."""
    order: Order = "awc"
    """DPSGD's order: awc (adapt while communicate), atc (adapt then combine), cta (combine then adapt)."""
    momentum: float = 0.0
    """Momentum, local to each learner, as in torch.optim.SGD."""
    dampening: float = 0.0
    """Dampening of the momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 0.0
    """Weight decay; not part of the loss that is reported or measured."""
    schedule: str = "constant"
    """Learning-rate schedule: [warmup:K[:START]+]constant | step:S1,S2,...[:FACTOR] | cosine[:FLOOR]."""
    sigma0: float | str = 0.0
    """SSGD*: standard deviation of the weight noise; or a DPSGD run's directory, to match its recorded sigma_w(t), or its checkpoints
    as the following flags say; or a profile (.safetensors) that was calibrated on one."""
    noise_place: NoisePlace = "weights"
    """SSGD* matched to a run: noise on the weights like its deviations, or on the gradient like its landscape-dependent noise."""
    noise_shape: NoiseShape = "isotropic"
    """What the matched noise keeps: the total variance (isotropic), that of each layer, of each coordinate (diagonal), or the whole
    covariance (low-rank)."""
    noise_drift: NoiseDrift = "as-noise"
    """Noise on the gradient: the mean of the run's landscape noise is part of the noise (as-noise), removed, added beside the noise,
    or added alone."""
    noise_every: int = 0
    """Steps between refreshes of the matched noise from the run's checkpoints; 0: at all of them, or for isotropic noise on the
    weights along the recorded sigma_w(t)."""
    noise_zero_sum: bool = False
    """SSGD*: let the learners' weight noises sum to zero, as DPSGD's deviations do, each with the same covariance."""
    gamma: float = 1.0
    """Controlled disagreement: mix with (1 - gamma) I + gamma M."""
    gamma_schedule: str = "constant"
    """A factor on gamma over the steps, written like --schedule; gamma must stay in [0, 1]."""
    local_steps: int = 1
    """local-sgd: steps between averages of the weights, H."""
    leader_pull: float = 0.1
    """adjacent-leader: lambda_N, force towards the neighbour of smallest loss, times the learning rate."""
    degree_pull: float = 0.1
    """adjacent-leader: lambda_tau, force towards the neighbour of most neighbours, times the learning rate."""
    leader_weight: float = 0.3
    """adjacent-leader: omega_N, additional weight in the average of the neighbour of smallest loss."""
    degree_weight: float = 0.1
    """adjacent-leader: omega_tau, additional weight in the average of the neighbour of most neighbours."""
    kept_fraction: float = 0.4
    """ubar: rho, the fraction of the neighbours, those with the nearest weights, whose losses are looked at; at least one neighbour."""
    own_weight: float = 0.5
    """ubar: a, a learner's own weight beside the trusted neighbours' mean."""
    num_faulty: int = 0
    """Simulated faults: so many learners, the last ones, send corrupted weights; they count in all averages that are reported."""
    fault: Fault = "gaussian"
    """What faulty learners send: gaussian noise of standard deviation --fault-scale, or their weights times minus it (sign-flip)."""
    fault_scale: float = 1.0
    """Size of the fault."""
    accumulation: int = 1
    """Take each learner's minibatch in so many parts, one after another, and average their gradients: less memory."""
    autocast: Literal["off", "bf16"] = "off"
    """bf16: forward and backward passes in bfloat16 where torch.autocast deems it safe; weights, gradients and updates stay in --dtype."""
    channels_last: bool = False
    """Lay images out with channels innermost, which some convolutions like better."""
    batching: Literal["auto", "stacked", "interleaved"] = "auto"
    """The learners of one process: as one batched program (stacked), or one after another (interleaved); auto interleaves convolutions."""
    reproducible: bool = False
    """Take learners one after another and add in their order, so that on a CPU weights and checkpoints do not depend on the number of
    processes, to the bit (with as many threads each); slower, and SSGD's gradients are then gathered, not reduced."""
    diagnose_every: int = 0
    """Steps between online diagnostics (alpha_e, noise scale) in metrics.jsonl, a further minibatch gradient each; 0: none."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 keeps the first and the last only."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl (the last 50 steps are all logged: convergence is judged on them)."""
    evaluation_examples: int | None = None
    """Training and held-out examples on which logged losses are taken, a fixed random choice of each; 0: all; by default the task's own
    number. Where it is not all, the last 50 steps are logged every 5 steps."""
    seed: int = 0
    """Seed of the initial weights, the minibatches, M(t) and SSGD*'s noise."""
    device: str = "cpu"
    """cpu or cuda (or cuda:K)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Arithmetic of weights and gradients."""
    tf32: bool = False
    """Let CUDA matrix products of float32 use TF32 (10-bit mantissa)."""

    def __post_init__(self) -> None:
        problems = [f"{name} {text}" for name, text in self._problems()]
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []

        def require(condition: bool, name: str, text: str) -> None:
            if not condition:
                found.append((name, text))

        require(
            self.algorithm in ALGORITHMS, "algorithm", f"must be one of {', '.join(ALGORITHMS)}, not {self.algorithm!r}"
        )
        require(self.order in ORDERS, "order", f"must be one of {', '.join(ORDERS)}, not {self.order!r}")
        require(self.dtype in DTYPES, "dtype", f"must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "learning_rate",
            f"must be a positive number, not {self.learning_rate}",
        )
        for name in ("num_learners", "local_batch_size", "num_steps", "log_every", "local_steps", "accumulation"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, not {getattr(self, name)}")
        for name in ("checkpoint_every", "diagnose_every"):
            require(getattr(self, name) >= 0, name, f"must not be negative, not {getattr(self, name)}")
        for name, known in (("autocast", ("off", "bf16")), ("batching", ("auto", "stacked", "interleaved"))):
            require(
                getattr(self, name) in known, name, f"must be one of {', '.join(known)}, not {getattr(self, name)!r}"
            )
        require(self.autocast == "off" or self.dtype == "float32", "autocast", "needs dtype float32")
        if self.accumulation > 1:
            require(self.local_batch_size % self.accumulation == 0, "accumulation",
                    f"must divide local_batch_size {self.local_batch_size}, and {self.accumulation} does not")  # fmt: skip
        require(not self.reproducible or self.batching != "stacked", "reproducible", "takes learners one after another, so batching cannot be stacked")  # fmt: skip
        require(0 <= self.momentum < 1, "momentum", f"must be in [0, 1), not {self.momentum}")
        require(0 <= self.dampening < 1, "dampening", f"must be in [0, 1), not {self.dampening}")
        require(
            0 <= self.weight_decay < math.inf,
            "weight_decay",
            f"must be finite and not negative, not {self.weight_decay}",
        )
        require(0 <= self.gamma <= 1, "gamma", f"must be in [0, 1], not {self.gamma}")
        if self.evaluation_examples is not None:
            require(self.evaluation_examples >= 0, "evaluation_examples", f"must not be negative, not {self.evaluation_examples}")  # fmt: skip
        require(self.seed >= 0, "seed", f"must not be negative, not {self.seed}")
        if self.nesterov:
            require(self.momentum > 0 and self.dampening == 0, "nesterov", "needs momentum, and no dampening")
        if isinstance(self.sigma0, str):
            require(self.algorithm == "ssgd-star", "sigma0", "may name a run only for ssgd-star")
        else:
            require(
                math.isfinite(self.sigma0) and self.sigma0 >= 0, "sigma0", f"must not be negative, not {self.sigma0}"
            )
        if self.algorithm != "ssgd-star" and not isinstance(self.sigma0, str):
            require(self.sigma0 == 0, "sigma0", "is for ssgd-star only")
        found += self._rule_problems()
        found += self._noise_problems()
        try:
            parse_schedule(self.schedule, self.num_steps)
        except (ValueError, OverflowError) as error:
            found.append(("schedule", str(error)))
        try:
            low, high = self.gamma_range
            require((low >= 0 and high <= 1) or not 0 <= self.gamma <= 1, "gamma_schedule",
                    f"takes gamma to {high:g}; it must stay in [0, 1]")  # fmt: skip
        except (ValueError, OverflowError) as error:
            found.append(("gamma_schedule", str(error)))
        return found

    def _rule_problems(self) -> list[tuple[str, str]]:
        """What is wrong with the fields of single rules and with the faults, by field."""
        found: list[tuple[str, str]] = []
        for algorithm, names in RULE_FIELDS.items():
            for name in names:
                if self.algorithm != algorithm and getattr(self, name) != getattr(TrainConfig, name):
                    found.append((name, f"is for {algorithm}"))
        for name in ("leader_pull", "degree_pull", "leader_weight", "degree_weight", "fault_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append((name, f"must be finite and not negative, not {getattr(self, name)}"))
        weight = self.leader_weight + self.degree_weight
        if weight > 1:
            found.append(("leader_weight", f"and degree_weight must add up to at most 1, not {weight:g}"))
        if not 0 < self.kept_fraction <= 1:
            found.append(("kept_fraction", f"must be in (0, 1], not {self.kept_fraction}"))
        if not 0 <= self.own_weight <= 1:
            found.append(("own_weight", f"must be in [0, 1], not {self.own_weight}"))
        if self.algorithm == "ubar" and (self.gamma, self.gamma_schedule) != (1, "constant"):
            found.append(("gamma", "is not for ubar, which does not use the values of M; choose own_weight"))
        if self.fault not in FAULTS:
            found.append(("fault", f"must be one of {', '.join(FAULTS)}, not {self.fault!r}"))
        if not self.num_faulty and (self.fault, self.fault_scale) != (TrainConfig.fault, TrainConfig.fault_scale):
            found.append(("fault", "and fault_scale are for runs with num_faulty"))
        if not 0 <= self.num_faulty < self.num_learners:
            found.append(("num_faulty", f"must be between 0 and {self.num_learners - 1}, so that one of {self.num_learners} learners is honest, not {self.num_faulty}"))  # fmt: skip
        elif self.num_faulty and self.algorithm not in GOSSIPING:
            found.append(("num_faulty", f"is for learners that send each other weights: {', '.join(GOSSIPING)}"))
        elif self.num_faulty and self.algorithm == "dpsgd" and self.order == "cta":
            found.append(("num_faulty", "is for awc and atc: under cta gradients are taken at what was received, which checkpoints do not tell"))  # fmt: skip
        return found

    def _noise_problems(self) -> list[tuple[str, str]]:
        """What is wrong with the noise of SSGD*, by field."""
        found: list[tuple[str, str]] = []
        for name, known in (("noise_place", PLACES), ("noise_shape", SHAPES), ("noise_drift", DRIFTS)):
            value = getattr(self, name)
            if value not in known:
                found.append((name, f"must be one of {', '.join(known)}, not {value!r}"))
            elif value != known[0] and not isinstance(self.sigma0, str):
                found.append((name, f"{value} is for ssgd-star with sigma0 naming the run to match"))
        if self.noise_every < 0:
            found.append(("noise_every", f"must not be negative, not {self.noise_every}"))
        elif self.noise_every and not isinstance(self.sigma0, str):
            found.append(("noise_every", "is for ssgd-star with sigma0 naming the run to match"))
        if self.noise_drift != "as-noise" and self.noise_place != "gradient":
            found.append(("noise_drift", "is for noise on the gradient; deviations of the weights have no mean"))
        if self.noise_zero_sum and (self.algorithm != "ssgd-star" or self.noise_place != "weights"):
            found.append(("noise_zero_sum", "is for ssgd-star with noise on the weights"))
        elif self.noise_zero_sum and self.num_learners < 2:
            found.append(("noise_zero_sum", "needs at least 2 learners"))
        return found

    @property
    def is_calibrated(self) -> bool:
        """Whether SSGD*'s noise comes from a profile, and not from a number or a recorded sigma_w(t)."""
        if not isinstance(self.sigma0, str):
            return False
        chosen = (self.noise_place, self.noise_shape, self.noise_every) != ("weights", "isotropic", 0)
        return chosen or self.sigma0.endswith(".safetensors")

    def gamma_at(self, step: int) -> float:
        """gamma(t) of the step that is about to be taken."""
        return self.gamma * parse_schedule(self.gamma_schedule, self.num_steps)(step)

    @property
    def gamma_range(self) -> tuple[float, float]:
        """The smallest and the largest gamma(t) of the run."""
        # schedules are monotone between the numbers that they name, so these and the ends are enough
        last = max(self.num_steps - 1, 0)
        named = [int(m) for m in re.findall(r"\d+", self.gamma_schedule)]
        values = [self.gamma_at(t) for t in (0, last, *named) if t <= last]
        return min(values), max(values)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return DTYPES[self.dtype]

    def torch_device(self) -> torch.device:
        """`device` as torch's, checked to be there; of several processes on a machine each takes its own GPU."""
        try:
            device = torch.device(local_device(self.device))
        except RuntimeError:
            raise ValueError(f"no such device: {self.device}; use cpu or cuda") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch sees no CUDA device here; use --device cpu")
        return device

    def to_json(self) -> dict[str, Any]:
        """All fields, for run.json."""
        return asdict(self)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> TrainConfig:
        """From run.json."""
        known = {f.name for f in fields(TrainConfig)}
        return TrainConfig(**{k: v for k, v in stored.items() if k in known})

    def changes(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Fields in which another config differs, with both values; the device and how learners are batched on it are no part of a run's identity."""
        mine, theirs = self.to_json(), other.to_json()
        return {k: (mine[k], theirs[k]) for k in mine if k not in ("device", "batching") and mine[k] != theirs[k]}
