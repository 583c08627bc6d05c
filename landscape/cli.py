"""The command line: parsing only. Every command is a library call; the help comes from its docstrings."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, Union

import tyro

from landscape.training.config import TrainConfig

MeasureName = Literal["effective-learning-rate", "noise", "curvature", "smoothing", "stability", "ledger"]
VariantName = Literal["ssgd", "ssgd-star", "dpsgd", "dpsgd-atc", "dpsgd-cta"]

DEBUG_VARIABLE = "LANDSCAPE_DEBUG"


@dataclass(frozen=True)
class Reproduce:
    """Train, measure, compare with theory and report: the main job. Resumes; a complete one says so."""

    out: Path = Path("landscape-reproduce")
    """Directory of everything."""
    preset: Literal["full", "demo", "quick"] = "demo"
    """quick (about a minute and a half), demo (about 8 minutes) or full (about three quarters of an hour), on two cores."""
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
    """Train one run and record it. SSGD, SSGD* or DPSGD, all learners stacked on one device."""

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

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.train import train

        run = train(
            self.task,
            TrainConfig(**asdict(self.config)),
            self.out,
            data_root=self.data_root,
            resume=self.resume,
            overwrite=self.overwrite,
            quiet=self.quiet,
        )
        if not self.quiet:
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
    measures: tuple[MeasureName, ...] = (
        "effective-learning-rate",
        "noise",
        "curvature",
        "smoothing",
        "stability",
        "ledger",
    )
    """Which measures."""
    steps: tuple[int, ...] | None = None
    """Which checkpoints; all by default."""
    num_draws: int = 32
    """Fresh minibatch assignments at each checkpoint."""
    num_smoothing_samples: int = 16
    """Deviations for the sampled smoothing kernels."""
    seed: int = 0
    """Seed of draws, deviations and starting vectors."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk."""
    device: str | None = None
    """Where to compute; the run's own device by default."""
    allow_other_data: bool = False
    """Measure on data whose fingerprint is not the run's."""
    quiet: bool = False
    """No progress bar, no table."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.checkpoint import MeasureConfig
        from landscape.experiments.measure import measure
        from landscape.theory.scorecard import scorecard

        settings = MeasureConfig(
            num_draws=self.num_draws, num_smoothing_samples=self.num_smoothing_samples, seed=self.seed
        )
        groups = measure(
            self.run_directory, self.measures, self.steps, settings=settings, data_root=self.data_root, device=self.device,
            allow_other_data=self.allow_other_data, quiet=self.quiet,
        )  # fmt: skip
        table = scorecard(groups)
        if not self.quiet and not table.empty:
            print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))


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
    Annotated[Report, tyro.conf.subcommand("report")],
    Annotated[Inspect, tyro.conf.subcommand("inspect")],
    Annotated[Tasks, tyro.conf.subcommand("tasks")],
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="landscape",
        description="Why a multi-GPU training run converged or blew up: noise, curvature and effective learning rate, held against theory.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            command.run()
    except KeyboardInterrupt as interrupt:
        print(f"landscape: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"landscape: error: {error}", file=sys.stderr)
        return 2
    return 0
