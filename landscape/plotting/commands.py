"""The commands that make a run and its measurements again, from what the run recorded of itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from landscape.plotting.tables import nameless
from landscape.plotting.view import RunView
from landscape.training.config import TrainConfig

FOREIGN = ("importing", "imported", "recorded")
ALWAYS = ("algorithm", "learning_rate", "num_learners", "local_batch_size", "num_steps", "topology", "order", "seed")
"""Flags that are given even where they are the defaults, which another version may have changed."""
WIDTH = 110


def reproduce_commands(views: Sequence[RunView], report: str = "report.html") -> str:
    """Shell commands, with comments: the version, then train and measure for each run, and the report.

    Directories are those of the runs by name only; data that a task reads from disk is to be had under --data-root.

    Args:
        views: the runs.
        report: name of the report.
    """
    said = _versions(views)
    for view in sorted(views, key=lambda v: isinstance(v.run.config.sigma0, str)):  # what follows a run needs that run
        said += ["", f"# {view.label}", *_made(view), *_measured(view)]
    names = [_directory(v) for v in views]
    return "\n".join([*said, "", _wrapped(["landscape report", *names, f"--out {shlex.quote(report)}"])])


def train_command(view: RunView) -> str:
    """The command that trains a run like this, on one line.

    Every setting of the run that is not the default of this version is a flag, and so are those of ALWAYS.
    """
    return " ".join(_train_parts(view))


def measure_commands(view: RunView) -> list[str]:
    """The commands that measure a run as it was measured, one for each set of settings and checkpoints, each on one line."""
    return [" ".join(parts) for parts in _measure_parts(view)]


def _train_parts(view: RunView) -> list[str]:
    config = view.run.config
    parts = ["landscape train", f"--task {shlex.quote(view.run.task)}"]
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        if field.name in ALWAYS or value != field.default:
            parts.append(_flag(field.name, value))
    return [*parts, f"--out {_directory(view)}"]


def _measure_parts(view: RunView) -> list[list[str]]:
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, group in view.groups.items():
        steps = tuple(str(int(s)) for s in group["step"].values)
        alike.setdefault((str(group.attrs.get("settings", "{}")), steps), []).append(name)
    found = []
    for (settings, steps), names in alike.items():
        told = {k: v for k, v in json.loads(settings).items() if k != "data" and v is not None}
        found.append([f"landscape measure {_directory(view)}", *_words("--measures", names), *_words("--steps", steps),
                      *(_flag(k, v) for k, v in told.items())])  # fmt: skip
    return found


def _versions(views: Sequence[RunView]) -> list[str]:
    """Which code made the runs; one line for each version among them."""
    made = dict.fromkeys(
        tuple(str(v.run.record["provenance"].get(k, "unknown")) for k in ("landscape", "git_commit", "torch", "python")) for v in views
    )  # fmt: skip
    return [
        f"# landscape {version}, git {commit}, torch {torch}, Python {python}"
        for version, commit, torch, python in made
    ]


def _made(view: RunView) -> list[str]:
    record, status = view.run.record, view.run.status
    if status == "recorded":
        return ["# recorded by its own training program, with landscape.save_learner: run that program again"]
    if status in FOREIGN:
        source = record.get("imported", {}).get("from", [])
        names = [Path(s).name for s in ([source] if isinstance(source, str) else source)]
        task = [f"--task {shlex.quote(view.run.task)}"] if view.run.task else []
        return [_wrapped(["landscape import", *map(shlex.quote, names), *task, f"--out {_directory(view)}"])]
    return [_wrapped(_train_parts(view))]


def _measured(view: RunView) -> list[str]:
    return [_wrapped(parts) for parts in _measure_parts(view)]


def _words(flag: str, values: Sequence[str]) -> list[str]:
    """A flag of several values in parts between which a line may end; nothing without values.

    >>> _words("--steps", ["0", "20", "40"])
    ['--steps 0', '20', '40']
    """
    return [f"{flag} {values[0]}", *values[1:]] if values else []


def _directory(view: RunView) -> str:
    return shlex.quote(view.run.path.resolve().name)


def _flag(name: str, value: Any) -> str:
    """One flag; a switch has no value.

    >>> _flag("local_batch_size", 10), _flag("nesterov", True), _flag("schedule", "step:3,4")
    ('--local-batch-size 10', '--nesterov', '--schedule step:3,4')
    """
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return flag if value else f"{flag} False"
    return f"{flag} {shlex.quote(nameless(value))}"


def _wrapped(parts: Sequence[str]) -> str:
    """Parts of a command over as many lines as they need, joined by backslashes."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > WIDTH:
            lines.append("    " + part)
        else:
            lines[-1] += " " + part
    return " \\\n".join(lines)
