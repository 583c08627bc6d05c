"""Commands about one run."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from landscape.experiments.checkpoint import MeasureConfig
from landscape.experiments.import_run import ImportConfig
from landscape.ranks import launched, started
from landscape.training.config import TrainConfig

MeasureName = Literal[
    "effective-learning-rate", "noise", "curvature", "smoothing", "stability", "ledger", "covariance", "alignment", "alignment-by-layer",
    "disagreement", "smoothing-length",
]  # fmt: skip


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
        from landscape.tasks import CONVERGENCE_WINDOW

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
            ended, steps = run.record["outcome"], run.config.num_steps
            verdict = ended["outcome"]
            if "median_last_train_loss" in ended:
                verdict = verdict if steps >= CONVERGENCE_WINDOW else "too short to judge"
                detail = f", median training loss of w_a over the last {min(CONVERGENCE_WINDOW, steps)} steps {ended['median_last_train_loss']:.4g}"
            else:
                detail = f" at step {ended['step']}"
            print(f"{run.path}: {run.status}, {verdict}{detail}")


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
class Report:
    """One self-contained report of runs: what they did, what was measured, what was predicted, in words that the numbers decide."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """The runs, measured or not; several are compared."""
    out: Path | None = None
    """The file, replaced if it is there. By default RUN/report.html for one run and ./report.html for several (.md with --format md)."""
    format: Literal["html", "md"] | None = None
    """html: one file that loads nothing. md: Markdown, with its figures in a folder beside it. By default what --out ends in, else html."""
    open: bool = False
    """Show it in the browser when it is written."""

    def run(self) -> None:
        """Run it."""
        import webbrowser

        from landscape.experiments.report import report_runs

        path = report_runs(self.runs, self.out, self.format)
        print(path)
        if self.open and not webbrowser.open(path.resolve().as_uri()):
            print("landscape: no browser was found to show it in; open the file yourself", file=sys.stderr)


@dataclass(frozen=True)
class Inspect:
    """What a run or checkpoint is: format, learners or average or shards, step, tensors. Runs nothing, and reads no tensor data but of files of torch.save before 1.6, which can only be read whole."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="PATH")]
    """A run, or files, folders or globs of a checkpoint, whatever wrote it."""
    all: bool = False
    """List all tensors."""

    def run(self) -> None:
        """Run it."""
        from landscape.checkpoints.inspect import describe

        if not self.paths:
            raise ValueError("name a run or a checkpoint")
        print(describe(self.paths, every=self.all))


@dataclass(frozen=True)
class Import:
    """Write other systems' checkpoints as a run, on which every measure works. Nothing in their files is ever run."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="PATH")]
    """Files, folders or globs (quoted); several steps make one run. A run that a recorder wrote is completed."""
    out: Path
    """The run directory."""
    config: tyro.conf.OmitArgPrefixes[ImportConfig] = field(default_factory=ImportConfig)
    task: str | None = None
    """Whose network and data these are, as for train: needed to measure; own ones as module:function."""
    map: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """OLD=NEW, for names that differ from the task's: * stands for anything, "OLD=" leaves out; may be given several times."""
    average: bool = False
    """Keep the average of the learners alone, w_a; BatchNorm's statistics are marked as in need of recalibration."""
    steps: tuple[int, ...] | None = None
    """Which steps; all by default."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk."""
    overwrite: bool = False
    """Replace the run in --out."""
    quiet: bool = False
    """No progress bar, no messages."""

    def run(self) -> None:
        """Run it."""
        from landscape.experiments.import_run import import_run

        if not self.paths:
            raise ValueError("name at least one checkpoint")
        run = import_run(
            self.paths, self.out, task=self.task, config=self.config, steps=self.steps, rename=self.map, average=self.average,
            data_root=self.data_root, overwrite=self.overwrite, quiet=self.quiet,
        )  # fmt: skip
        if not self.quiet:
            print(f"{run.path}: {len(run.steps)} checkpoints of {run.config.num_learners} learners")


@dataclass(frozen=True)
class Tasks:
    """What can be trained."""

    def run(self) -> None:
        """Run it."""
        from landscape.tasks import TASKS

        width = max(map(len, TASKS))
        for task in TASKS.values():
            root = " (needs --data-root)" if task.needs_data_root else ""
            print(f"{task.name:{width}s}  {task.description}; converged below a loss of {task.threshold:.3g}{root}")
        print(
            "\nSmaller forms: TASK@width=1/4,size=64,examples=5000 (share of the channels, pixels a side, training examples)."
        )


@dataclass(frozen=True)
class RecipeFlags:
    """How a task is customarily trained, as flags for `landscape train`, scaled linearly to the learners and their batches."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="TASK")]
    """What is trained; see `landscape tasks`."""
    num_learners: int = 16
    """n."""
    local_batch_size: int = 64
    """B, examples a learner a step."""
    num_epochs: int | None = None
    """Passes over the data; the warm-up and the steps down keep their share of them. By default the recipe's."""
    num_examples: int | None = None
    """Training examples; by default counted under --data-root."""
    data_root: Path | None = None
    """Folder of data sets, for tasks that read from disk; or set LANDSCAPE_DATA_ROOT."""

    def run(self) -> None:
        """Run it."""
        from landscape.tasks import get_task

        task = get_task(self.task)
        if task.recipe is None:
            raise ValueError(f"task {task.name} has no recipe; choose --learning-rate and --num-steps yourself")
        count = len(task.load_data(self.data_root)[0]) if self.num_examples is None else self.num_examples
        chosen = task.recipe.settings(count, self.num_learners, self.local_batch_size, self.num_epochs)
        flags = {"task": task.name, "num_learners": self.num_learners, "local_batch_size": self.local_batch_size, **chosen}  # fmt: skip
        if self.data_root is not None:
            flags["data_root"] = self.data_root
        print(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items()))
