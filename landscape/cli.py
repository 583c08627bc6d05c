"""The command line: parsing only. Every command is a library call; the help comes from its docstrings."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, Union

import tyro

from landscape.experiments.checkpoint import MeasureConfig
from landscape.ranks import AgreedError, launched, started, tells
from landscape.training.config import Algorithm, Order, TrainConfig
from landscape.training.noise import NoiseDrift, NoisePlace, NoiseShape

MeasureName = Literal[
    "effective-learning-rate", "noise", "curvature", "smoothing", "stability", "ledger", "covariance", "alignment", "alignment-by-layer",
    "disagreement", "smoothing-length",
]  # fmt: skip
VariantName = Literal["ssgd", "ssgd-star", "dpsgd", "dpsgd-atc", "dpsgd-cta"]

DEBUG_VARIABLE = "LANDSCAPE_DEBUG"

LINGER = 5.0
"""Seconds that a process with nothing to tell waits for the one that has."""


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


class TrainFlags(TrainConfig):
    """The configuration of the run."""

    def __post_init__(self) -> None:  # checked when the command runs, for a message of ours
        pass


@dataclass(frozen=True)
class Train:
    """Train one run and record it: all learners stacked on one device, or under torchrun spread over its processes."""

    config: tyro.conf.OmitArgPrefixes[TrainFlags]
    task: str
    """What is trained: a name from `landscape tasks`, or your own as module:function."""
    out: Path
    """The run directory."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk; or set LANDSCAPE_DATA_ROOT."""
    resume: bool = False
    """Continue from the last checkpoint in --out, with the same flags."""
    overwrite: bool = False
    """Replace the run in --out."""
    quiet: bool = False
    """No progress bar, no messages."""
    timeout: float = 300.0
    """Seconds that a process waits for the others before it gives up."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.train import train

        with started(self.config.device, self.timeout) as ranks:
            with ranks.agree():
                config = TrainConfig(**asdict(self.config))
            run = train(
                self.task,
                config,
                self.out,
                data_root=self.data_root,
                resume=self.resume,
                overwrite=self.overwrite,
                quiet=self.quiet,
            )
        if not self.quiet and launched().leads:
            outcome = run.record["outcome"]
            detail = (
                f", median training loss of w_a over the last 50 steps {outcome['median_last_train_loss']:.4g}"
                if "median_last_train_loss" in outcome
                else f" at step {outcome['step']}"
            )
            print(f"{run.path}: {run.status}, {outcome['outcome']}{detail}")


@dataclass(frozen=True)
class Measure:
    """Measure a run's checkpoints against the theory; results go to RUN/measurements.nc."""

    run_directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """The run."""
    config: tyro.conf.OmitArgPrefixes[MeasureConfig] = field(default_factory=MeasureConfig)
    measures: tuple[MeasureName, ...] | None = None
    """Which measures; by default all but smoothing-length, which is the dearest."""
    steps: tuple[int, ...] | None = None
    """Which checkpoints; all by default."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk."""
    device: str | None = None
    """Where to compute; the run's own device by default."""
    allow_other_data: bool = False
    """Measure on data whose fingerprint is not the run's."""
    quiet: bool = False
    """No progress bar, no table."""
    timeout: float = 300.0
    """Seconds a process waits for the others."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.measure import measure
        from landscape.experiments.measures import DEFAULT_MEASURES
        from landscape.theory.scorecard import run_scorecard, scorecard

        groups = measure(
            self.run_directory, self.measures or DEFAULT_MEASURES, self.steps, settings=self.config, data_root=self.data_root,
            device=self.device, allow_other_data=self.allow_other_data, quiet=self.quiet, timeout=self.timeout,
        )  # fmt: skip
        if self.quiet or not launched().leads:
            return
        table = scorecard(groups)
        if not table.empty:
            print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
            if table["step"].nunique() > 1:
                print("\nof the run:\n" + run_scorecard(table).to_string(float_format=lambda v: f"{v:.4g}"))


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


@dataclass(frozen=True)
class Report:
    """One self-contained HTML report of measured runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """Measured runs."""
    out: Path
    """The HTML file."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.reproduce import report_runs

        if not self.runs:
            raise ValueError("name at least one run")
        print(report_runs(self.runs, self.out))


@dataclass(frozen=True)
class Inspect:
    """What a run or checkpoint is: format, learners, steps, tensors. Reads no tensor data."""

    path: Annotated[Path, tyro.conf.Positional]
    """A run directory, or one of its checkpoints."""

    def run(self) -> None:
        """Run it."""
        from landscape.checkpoints.inspect import describe

        print(describe(self.path))


@dataclass(frozen=True)
class Tasks:
    """What can be trained."""

    def run(self) -> None:
        """Run it."""
        from landscape.tasks import TASKS

        for task in TASKS.values():
            root = " (needs --data-root)" if task.needs_data_root else ""
            print(f"{task.name:22s} {task.description}; converged below a loss of {task.threshold:g}{root}")


Command = Union[  # noqa: UP007 - tyro reads the annotations
    Annotated[Reproduce, tyro.conf.subcommand("reproduce")],
    Annotated[Train, tyro.conf.subcommand("train")],
    Annotated[Measure, tyro.conf.subcommand("measure")],
    Annotated[Sweep, tyro.conf.subcommand("sweep")],
    Annotated[Replay, tyro.conf.subcommand("replay")],
    Annotated[Edge, tyro.conf.subcommand("edge")],
    Annotated[Rescue, tyro.conf.subcommand("rescue")],
    Annotated[Report, tyro.conf.subcommand("report")],
    Annotated[Inspect, tyro.conf.subcommand("inspect")],
    Annotated[Tasks, tyro.conf.subcommand("tasks")],
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 2 for a user's mistake or a lost process, 130 after Ctrl-C, 143 after SIGTERM."""
    ranks = launched()
    with contextlib.ExitStack() as silence:
        if not ranks.leads:  # help, or what is wrong with the flags, is told once
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            command = tyro.cli(
                Command,  # type: ignore[arg-type]
                prog="landscape",
                description="Why a multi-GPU training run converged or blew up: noise, curvature and effective learning rate, held against theory.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except SystemExit:
            if not ranks.leads:
                _linger()
            raise
    try:
        if ranks.size > 1 and not isinstance(command, Train | Measure):
            raise AgreedError("only train and measure run on several processes; start this command without torchrun")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            command.run()
    except KeyboardInterrupt as interrupt:
        if tells(interrupt):
            print(f"landscape: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return getattr(interrupt, "status", 130)
    except BrokenPipeError:
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if tells(error):
            print(f"landscape: error: {error}", file=sys.stderr)
        else:
            _linger()
        return 2
    return 0


def _linger() -> None:
    """Let the process that has something to tell do so: torchrun ends all of them as soon as one has ended, with SIGTERM."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    signal.signal(signal.SIGTERM, end)
    with contextlib.suppress(TimeoutError):
        time.sleep(LINGER)
