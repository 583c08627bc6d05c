"""Commands that train many runs, or one from the middle of another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from landscape.training.config import Algorithm, Order, TrainConfig
from landscape.training.noise import NoiseDrift, NoisePlace, NoiseShape

VariantName = Literal["ssgd", "ssgd-star", "dpsgd", "dpsgd-atc", "dpsgd-cta"]


@dataclass(frozen=True)
class Reproduce:
    """Train, measure, compare with theory and report: the main job. Resumes; a complete one says so."""

    out: Path = Path("landscape-reproduce")
    """Directory of everything."""
    preset: Literal["full", "demo", "quick"] = "demo"
    """quick (about a minute and a half), demo (about 10 minutes) or full (about three quarters of an hour), on two cores."""
    num_seeds: int | None = None
    """Another number of seeds than the preset's; at least 2."""
    task: str = "mnist-mlp"
    """What is trained; see `landscape tasks`."""
    topology: str = "ring"
    """DPSGD's topology."""
    num_learners: int = 6
    """n."""
    local_batch_size: int = 1000
    """B."""
    device: str = "cpu"
    """cpu or cuda."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk; or set LANDSCAPE_DATA_ROOT."""
    quiet: bool = False
    """No progress bars, no messages."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.reproduce import reproduce

        reproduce(**{f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Sweep:
    """A stability map: algorithms x learning rates x seeds, replicas stacked; resumes."""

    learning_rates: tuple[float, ...]
    """Base learning rates."""
    out: Path
    """Directory of the map; OUT/stability-map.nc is its result."""
    task: str = "mnist-mlp"
    """What is trained."""
    algorithms: tuple[VariantName, ...] = ("ssgd", "dpsgd")
    """Which algorithms; ssgd-star with noise matched to DPSGD's, which must be among them."""
    num_seeds: int = 3
    """Seeds 0, 1, ..."""
    num_learners: int = 6
    """n."""
    local_batch_size: int = 1000
    """B."""
    num_steps: int = 500
    """Steps a run."""
    topology: str = "ring"
    """DPSGD's topology."""
    momentum: float = 0.0
    """Momentum."""
    device: str = "cpu"
    """cpu or cuda."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk."""
    quiet: bool = False
    """No progress bar, no table."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.reproduce import summary_table
        from landscape.experiments.sweep import run_sweep

        config = TrainConfig(
            "dpsgd", self.learning_rates[0], num_learners=self.num_learners, local_batch_size=self.local_batch_size, num_steps=self.num_steps,
            topology=self.topology, momentum=self.momentum, device=self.device,
        )  # fmt: skip
        run_sweep(
            self.task,
            config,
            self.algorithms,
            self.learning_rates,
            range(self.num_seeds),
            self.out,
            data_root=self.data_root,
            quiet=self.quiet,
        )
        if not self.quiet:
            print(summary_table(self.out))


@dataclass(frozen=True)
class Replay:
    """Continue a run from one of its checkpoints with something changed, in a directory of its own; what is not given stays."""

    run_directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """The run."""
    step: int
    """The checkpoint to start from."""
    out: Path
    """Directory of the replay."""
    algorithm: Algorithm | None = None
    """ssgd, ssgd-star or dpsgd; from dpsgd to the others every learner starts at w_a."""
    order: Order | None = None
    """DPSGD's order: awc, atc or cta."""
    topology: str | None = None
    """A name, or a file with a matrix or a graph, for as many learners."""
    learning_rate: float | None = None
    """Base learning rate."""
    gamma: float | None = None
    """Controlled disagreement: mix with (1 - gamma) I + gamma M."""
    sigma0: float | str | None = None
    """SSGD*: noise level, a run to match, or a noise profile."""
    noise_place: NoisePlace | None = None
    """SSGD* matched to a run: noise on the weights or the gradient."""
    noise_shape: NoiseShape | None = None
    """What the matched noise keeps."""
    noise_drift: NoiseDrift | None = None
    """What becomes of the landscape noise's mean."""
    noise_every: int | None = None
    """Steps between refreshes of the matched noise."""
    noise_zero_sum: bool | None = None
    """Whether noises on the weights sum to zero over the learners."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    num_steps: int | None = None
    """Where to end, counted from the run's start."""
    device: str | None = None
    """Where to compute; the run's own device by default."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk."""
    resume: bool = False
    """Continue a replay that was cut off, with the same flags."""
    overwrite: bool = False
    """Replace the run in --out."""
    quiet: bool = False
    """No progress bar, no table."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.replay import compare, replay

        options = {f.name: getattr(self, f.name) for f in fields(self)}
        run = replay(options.pop("run_directory"), options.pop("step"), options.pop("out"), **options)
        if not self.quiet:
            print(compare([self.run_directory, run]).T.to_string(header=False, float_format=lambda v: f"{v:.4g}"))


@dataclass(frozen=True)
class Edge:
    """The learning rate where half of the seeds still converge, by bisection, with an interval; resumes."""

    low: float
    """Smallest learning rate."""
    high: float
    """Largest learning rate."""
    out: Path
    """Directory of the runs and the result."""
    task: str = "mnist-mlp"
    """What is trained."""
    algorithm: VariantName = "dpsgd"
    """Which algorithm; ssgd-star with noise matched to DPSGD's."""
    num_seeds: int = 6
    """Seeds 0, 1, ...; below 4 the interval is open."""
    num_rates: int = 4
    """Rates of the coarse grid, both ends included."""
    num_bisections: int = 4
    """Further rates, each halving the step that holds the edge."""
    max_sigma_w: float = float("inf")
    """Count only runs whose weight spread sigma_w ends at or below this."""
    lambda_max: float | None = None
    """Largest eigenvalue of the Hessian that the runs meet, for the predicted edges."""
    num_learners: int = 6
    """n."""
    local_batch_size: int = 1000
    """B."""
    num_steps: int = 500
    """Steps a run."""
    topology: str = "ring"
    """DPSGD's topology."""
    gamma: float = 1.0
    """Controlled disagreement: mix with (1 - gamma) I + gamma M."""
    momentum: float = 0.0
    """Momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    device: str = "cpu"
    """cpu or cuda."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk."""
    quiet: bool = False
    """No progress bar, no table."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.edge import edge_scorecard, find_edge
        from landscape.experiments.variants import variant_named

        config = TrainConfig(
            "dpsgd", self.low, num_learners=self.num_learners, local_batch_size=self.local_batch_size, num_steps=self.num_steps,
            topology=self.topology, gamma=self.gamma, momentum=self.momentum, nesterov=self.nesterov, device=self.device,
        )  # fmt: skip
        variant = variant_named(self.algorithm)
        found = find_edge(
            self.task, config, variant, low=self.low, high=self.high, seeds=range(self.num_seeds), out=self.out, num_rates=self.num_rates,
            num_bisections=self.num_bisections, max_sigma_w=self.max_sigma_w, data_root=self.data_root, quiet=self.quiet,
        )  # fmt: skip
        if self.quiet:
            return
        shown = found.table[["num_converged", "num_seeds", "low", "high"]].to_dataframe()
        print(shown.to_string(float_format=lambda v: f"{v:.4g}"))
        print(f"edge {found.edge:.4g}, 95% interval {found.low:.4g} to {found.high:.4g}, between the rates {found.bracket[0]:.4g} and {found.bracket[1]:.4g}")  # fmt: skip
        if self.lambda_max is not None:
            table = edge_scorecard(found, config, variant, self.lambda_max)
            print(table.drop(columns="step").to_string(index=False, float_format=lambda v: f"{v:.4g}"))


@dataclass(frozen=True)
class Rescue:
    """SSGD, DPSGD, and SSGD with noise calibrated on DPSGD, at the same rates and seeds: what of the noise rescues; resumes."""

    learning_rates: tuple[float, ...]
    """Base learning rates."""
    out: Path
    """Directory of the runs and the result."""
    task: str = "mnist-mlp"
    """What is trained."""
    places: tuple[NoisePlace, ...] = ("weights", "gradient")
    """Where noise is added."""
    shapes: tuple[NoiseShape, ...] = ("isotropic", "layer", "diagonal", "low-rank")
    """What it keeps of DPSGD's."""
    drifts: tuple[NoiseDrift, ...] = ("as-noise",)
    """What becomes of the landscape noise's mean, for noise on the gradient."""
    zero_sum: bool = False
    """Let the learners' weight noises sum to zero, as DPSGD's deviations do."""
    noise_every: int = 5
    """Steps between refreshes of the noise."""
    num_seeds: int = 6
    """Seeds 0, 1, ..."""
    num_learners: int = 6
    """n."""
    local_batch_size: int = 1000
    """B."""
    num_steps: int = 500
    """Steps a run."""
    topology: str = "ring"
    """DPSGD's topology."""
    momentum: float = 0.0
    """Momentum."""
    device: str = "cpu"
    """cpu or cuda."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk."""
    quiet: bool = False
    """No progress bar, no words."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.rescue import rescue_experiment

        config = TrainConfig(
            "dpsgd", self.learning_rates[0], num_learners=self.num_learners, local_batch_size=self.local_batch_size,
            num_steps=self.num_steps, topology=self.topology, momentum=self.momentum, device=self.device,
        )  # fmt: skip
        result = rescue_experiment(
            self.task, config, self.learning_rates, range(self.num_seeds), self.out, places=self.places, shapes=self.shapes,
            drifts=self.drifts, zero_sum=self.zero_sum, noise_every=self.noise_every, data_root=self.data_root, quiet=self.quiet,
        )  # fmt: skip
        if not self.quiet:
            print(result.attrs["conclusion"])
