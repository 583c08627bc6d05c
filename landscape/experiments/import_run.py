"""Checkpoints of other systems into a run directory, on which every measure works."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from landscape.checkpoints import CheckpointError, Learners, Run, open_run
from landscape.checkpoints.assemble import Readable, readable
from landscape.checkpoints.find import entries, find
from landscape.checkpoints.format import CHECKPOINTS, RUN_FILE, TEMPORARY_PREFIX, shard_name, step_name
from landscape.checkpoints.importers.found import Found
from landscape.checkpoints.importers.series import Entry
from landscape.checkpoints.naming import some
from landscape.checkpoints.recorder import ASSUMED_LEARNING_RATE
from landscape.checkpoints.writer import LearnerTensors, RunWriter, publish, write_learner
from landscape.experiments.run_directory import holds_run, replacing
from landscape.functional import FunctionalModel
from landscape.printable import printable
from landscape.provenance import provenance
from landscape.ranks import refuse_several
from landscape.tasks import Task, get_task, is_ours
from landscape.theory.stability import learning_rate_thresholds
from landscape.training.config import ALGORITHMS, ORDERS, Algorithm, Order, TrainConfig
from landscape.training.topology import TOPOLOGIES
from landscape.training.topology import topology as make_topology


@dataclass(frozen=True)
class ImportConfig:
    """What checkpoints rarely tell of how they were trained. What is not given is what they recorded, or is listed as assumed."""

    algorithm: Algorithm | None = None
    """How they were trained; by default dpsgd for several learners, ssgd for one model."""
    order: Order | None = None
    """DPSGD's order: awc (adapt while communicate), atc (adapt then combine), cta (combine then adapt)."""
    topology: str | None = None
    """Who mixed with whom: a name, or a file with a matrix or graph, as for `landscape train`."""
    learning_rate: float | int | None = None
    """alpha of the step that follows each checkpoint."""
    local_batch_size: int | None = None
    """B, examples a learner a step."""
    num_learners: int | None = None
    """Of one model that n learners trained together (ssgd): n, if it is not recorded; each has its weights."""
    momentum: float | int | None = None
    """Momentum, local to each learner."""
    nesterov: bool | None = None
    """Nesterov momentum."""
    weight_decay: float | int | None = None
    """Weight decay."""
    gamma: float | int | None = None
    """Controlled disagreement: mixed with (1 - gamma) I + gamma M."""
    seed: int | None = None
    """Seed of M(t), where the topology varies; and of the initial weights of the task's model, which are replaced."""
    device: str | None = None
    """Where to measure later: cpu or cuda."""


def import_run(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    task: str | Task | None = None,
    config: ImportConfig | None = None,
    steps: Sequence[int] | None = None,
    rename: Sequence[str] = (),
    average: bool = False,
    data_root: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Run:
    """Write the checkpoints of another system as a run.

    A series is written step by step and learner by learner: in memory are one learner (all of them for an average) and one tensor.

    Args:
        paths: files, folders or globs, see `landscape.read_checkpoint`; several steps make one run. A run of ours, which a recorder wrote
            without saying all, is completed.
        out: the run directory.
        task: whose network and data these are: needed to measure the run, and to tell parameters from buffers with certainty.
        config: how they were trained.
        steps: which of the steps there are; all by default.
        rename: rules OLD=NEW for names that differ from the task's.
        average: keep w_a alone, the average of the learners, in float32 at least. BatchNorm's averaged statistics are marked as in need of recalibration,
            which every measure does.
        data_root: where the task's data lie.
        overwrite: replace a run in `out`, once all of the new one is written: if that fails, the old one is as it was.
        quiet: say nothing.

    Raises:
        ValueError: for anything wrong with the checkpoints or arguments, before anything is written, unless a tensor cannot be read.

    Cost: with `overwrite`, disk for both runs until the new one is whole.
    """
    refuse_several("import")
    given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    out, config = Path(out), config or ImportConfig()
    known = get_task(task) if task is not None else None
    before = _recorded(given)
    if known is None and is_ours(before.get("task", "")):  # another would have code imported that a file names
        known = get_task(before["task"])
    seed = config.seed if config.seed is not None else int(before.get("seed", 0))
    module = None if known is None else known.initial_model(seed)
    there = entries(given)
    wanted = [e for e in there if steps is None or e.counts != "step" or e.step is None or e.step in steps]
    chosen = _chosen([find(entry) for entry in wanted or there], steps, there, given)
    opened = [readable(found, module=module, rename=rename) for found in chosen]
    _check_series(opened)
    trained, assumed = _configuration(config, before, opened, average=average)
    record = {**_record(known, trained, opened, given, data_root=data_root, average=average), "assumed": assumed}
    _check_apart(out, [path for entry in there for path in entry.paths])
    replaces = holds_run(out)
    if replaces and not overwrite:
        raise ValueError(f"{out} already holds a run; replace it with --overwrite, or choose another directory")
    if not quiet:
        _announce(opened, record)
    model = None if known is None or module is None else FunctionalModel(module, known.loss_fn)
    told = {f: getattr(trained, f) for f in FACTS if f not in assumed}
    given_facts = {k: v for k, v in asdict(config).items() if k in FACTS and v is not None}
    with replacing(out) if replaces else nullcontext(out) as place:
        writer = RunWriter(place, record)
        writer.write_record(status="importing")
        notes: dict[int, list[str]] = {}
        for one in tqdm(opened, unit="checkpoint", desc="import", disable=quiet or None, delay=2, leave=False):
            facts = {**told, **one.facts, **given_facts, "algorithm": trained.algorithm}
            step, notes_of_step = _write_checkpoint(place, one, model, trained, facts, average=average)
            notes[step] = notes_of_step
        further = _further(notes, record["imported"]["notes"])
        writer.write_record(
            status="imported",
            imported={**record["imported"], "notes": [*record["imported"]["notes"], *further]},
        )
    if not quiet:
        _say([f"  note: {note}" for note in further])
    return open_run(out)


def _recorded(paths: Sequence[Path]) -> dict[str, Any]:
    """What a run of ours that is to be completed tells: its task and configuration, without what was assumed."""
    if len(paths) != 1 or not (paths[0] / RUN_FILE).is_file():
        return {}
    run = open_run(paths[0])
    record, assumed = run.record, run.record.get("assumed", ())
    known = {k: v for k, v in run.config.to_json().items() if k in record["config"] and k not in assumed}
    if known.get("topology") not in TOPOLOGIES:  # a file that is not read again
        known.pop("topology", None)
    return {**known, "task": record.get("task")}


def _check_apart(out: Path, paths: Sequence[Path]) -> None:
    """Refuse to write over what is to be imported, wherever links lead."""
    home = _resolved(out)
    for path in paths:
        within = itertools.islice(path.rglob("*"), 100_000) if path.is_dir() else ()
        for each in (path, *within):
            if _resolved(each).is_relative_to(home):
                raise ValueError(f"{out} holds what is to be imported ({each}); choose another directory")


def _resolved(path: Path) -> Path:
    """Where a path leads."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise ValueError(
            f"{path} cannot be followed: links lead round in a circle, or its name is too long; remove or correct it"
        ) from None


def _chosen(
    found: Sequence[Found], steps: Sequence[int] | None, there: Sequence[Entry], paths: Sequence[Path]
) -> list[Found]:
    """The checkpoints of the steps asked for, in order, each step once."""
    by_step: dict[int, Found] = {}
    for one in found:
        step = one.step or 0
        if step in by_step:
            raise CheckpointError(f"{by_step[step].path} and {one.path} are both of step {step}; give one of them")
        by_step[step] = one
    absent = [s for s in steps or () if s not in by_step]
    if absent:
        named = {entry.step for entry in there if entry.counts == "step" and entry.step is not None}
        listed = some(map(str, sorted(named | set(by_step))), 20)
        raise ValueError(f"{paths[0]} has no checkpoint of step {', '.join(map(str, absent))}; there are {listed}")
    return [by_step[s] for s in sorted(by_step) if steps is None or s in steps]


def _check_series(opened: Sequence[Readable]) -> None:
    """Refuse checkpoints that are not of one run: other networks, or another number of learners."""
    first = opened[0]
    rows = [
        f"  step {one.found.step or 0}: {len(one)} learners of {one.layout.num_parameters} parameters, {str(one.dtype).removeprefix('torch.')}"
        for one in opened
    ]
    if any((one.layout, one.dtype, len(one)) != (first.layout, first.dtype, len(first)) for one in opened):
        raise CheckpointError("\n".join(["the checkpoints are not of one run:", *rows[:20]]))


def _configuration(
    config: ImportConfig, before: dict[str, Any], opened: Sequence[Readable], *, average: bool
) -> tuple[TrainConfig, list[str]]:
    """The configuration that the run will have: what was given, else recorded, else a default; and which of it that is."""
    there = 1 if average else len(opened[0])
    optimizer = {**before, **{k: v for k, v in opened[0].facts.items() if _is_sound(k, v)}}
    rates = [one.facts.get("learning_rate") for one in opened]
    if optimizer.get("learning_rate", 1) == 0:  # the first step of a warm-up
        optimizer["learning_rate"] = next((r for r in rates if isinstance(r, float) and r > 0), ASSUMED_LEARNING_RATE)
    given = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) is not None}
    names = {f.name for f in fields(TrainConfig)} - {"num_steps", "checkpoint_every", "log_every"}
    numbers = ("learning_rate", "momentum", "dampening", "weight_decay", "gamma")
    values: dict[str, Any] = {
        k: float(v) if k in numbers else v for k, v in {**optimizer, **given}.items() if k in names
    }
    values.setdefault("algorithm", "ssgd" if there == 1 else "dpsgd")
    recorded = opened[0].facts.get("num_learners") if opened[0].found.kind == "one model" and not average else None
    if (
        "num_learners" not in given
        and recorded is not None
        and not (type(recorded) is int and 0 < recorded <= MOST_LEARNERS)
    ):
        raise ValueError(
            f"the checkpoint records {str(recorded)[:100]} processes; tell how many there were with --num-learners"
        )
    count = given.get("num_learners", recorded or there)
    if there > 1 and count != there:
        raise ValueError(f"the checkpoint holds {there} learners, not {count}; leave --num-learners out")
    if there == 1 and values["algorithm"] not in ("ssgd", "ssgd-star") and given.get("algorithm") is not None:
        raise ValueError(
            f"{values['algorithm']} is measured on the weights of each learner, and there is one model; import it as ssgd to measure at it"
        )
    if there == 1 and values["algorithm"] not in ("ssgd", "ssgd-star"):
        values["algorithm"] = "ssgd"
    values["num_learners"] = count
    values.setdefault("learning_rate", ASSUMED_LEARNING_RATE)
    values["num_steps"] = max(1, *(one.found.step or 0 for one in opened))
    values["dtype"] = "float64" if opened[0].dtype == torch.float64 else "float32"
    assumed = [
        f.name
        for f in fields(config)
        if f.name not in {**optimizer, **given} and f.name not in ("num_learners", "device", "seed")
    ]
    if there == 1 and recorded is None and "num_learners" not in given:
        assumed.append("num_learners")
    return TrainConfig(**values), assumed


def _is_sound(name: str, value: Any) -> bool:
    """Whether a fact of a file may stand in the configuration: one that describes the training, of the right type."""
    if name in ("learning_rate", "momentum", "dampening", "weight_decay"):
        return type(value) in (int, float) and math.isfinite(value) and value >= 0
    if name in ("local_batch_size", "seed"):
        return type(value) is int and 0 <= value < 1 << 62
    known: dict[str, tuple[Any, ...]] = {"algorithm": ALGORITHMS, "order": ORDERS, "nesterov": (True, False)}
    return name in known and type(value) in (str, bool) and value in known[name]


MOST_NOTES = 20
"""Notes on single checkpoints that are told."""

MOST_LEARNERS = 4096
"""Processes that a file may claim to have trained one model."""

FACTS = ("algorithm", "order", "learning_rate", "local_batch_size", "seed")
"""What each checkpoint of a run tells of the configuration."""


def _record(
    task: Task | None, config: TrainConfig, opened: Sequence[Readable], paths: Sequence[Path], *,
    data_root: str | Path | None, average: bool,
) -> dict[str, Any]:  # fmt: skip
    """What run.json says."""
    graph = make_topology(config.topology, config.num_learners)
    thresholds = learning_rate_thresholds(
        graph,
        config.algorithm,
        config.order,
        config.momentum,
        config.dampening,
        nesterov=config.nesterov,
        gammas=config.gamma_range,
    )
    data: dict[str, Any] = {"name": "unknown", "fingerprint": {"train": None, "test": None}}
    if task is not None:
        train, test = task.load_data(data_root)
        data = {"name": train.name, "num_train": len(train), "num_test": len(test), "fingerprint": {"train": train.fingerprint(), "test": test.fingerprint()}}  # fmt: skip
    last = opened[-1]
    return {
        "task": "" if task is None else task.name,
        "config": config.to_json(),
        "topology": {**graph.summary(), "thresholds": thresholds, "matrices": graph.matrices.tolist()},
        "data": data,
        **({} if task is None else {"threshold": task.threshold, "constant_loss": task.constant_loss}),
        "num_parameters": last.layout.num_parameters,
        "provenance": provenance(torch.device("cpu")),
        "imported": {"from": [str(p) for p in paths], "average": average, **last.origin()},
    }


def _announce(opened: Sequence[Readable], record: dict[str, Any]) -> None:
    """Say what is imported, and what of it cannot be known, on stderr."""
    last, origin = opened[-1], record["imported"]
    steps = ", ".join(str(one.found.step or 0) for one in opened[:12]) + (", ..." if len(opened) > 12 else "")
    lines = [
        f"{origin['format']}: {origin['kind']}, {len(last)} x {last.layout.num_parameters} parameters, {len(opened)} checkpoints (step {steps})",
        *(f"  {reason}" for reason in origin["reasons"]),
        *(f"  note: {note}" for note in origin["notes"]),
    ]
    if not record["task"]:
        lines.append("  no task was given, so the run can be read but not measured; import it again with --task")
    if record["assumed"]:
        lines.append(f"  assumed, as nobody told: {', '.join(record['assumed'])}")
    numbers = [one.found.step for one in opened]
    if len(opened) > 1 and numbers == list(range(len(opened))):
        lines.append(
            "  the numbers in the names are taken for steps; if they are those of processes, let links to the files be called ..._rank0, ..._rank1"
        )
    _say(lines)


def _further(notes: Mapping[int, Sequence[str]], known: Sequence[str]) -> list[str]:
    """What reading the checkpoints left out that was not known before, each with its steps."""
    steps: dict[str, list[int]] = {}
    for step, told in notes.items():
        for note in told:
            if note not in known:
                steps.setdefault(note, []).append(step)
    listed = [note if len(of) == len(notes) else f"{note} (step {some(map(str, of), 8)})" for note, of in steps.items()]
    return [*listed[:MOST_NOTES], *([f"and {len(listed) - MOST_NOTES} more notes"] if len(listed) > MOST_NOTES else [])]


def _say(lines: Sequence[str]) -> None:
    """Lines on stderr, names from files in them made fit for a terminal."""
    for line in lines:
        print(printable(line), file=sys.stderr)


def _write_checkpoint(
    out: Path,
    opened: Readable,
    model: FunctionalModel | None,
    config: TrainConfig,
    told: Mapping[str, Any],
    *,
    average: bool,
) -> tuple[int, list[str]]:
    """One step of the run, whole or not at all; a learner at a time is in memory, or for an average all of them.

    Returns:
        the step, and the notes of what was left out.
    """
    first = opened.read().average() if average else opened.read([0])
    there, count = (1 if average else len(opened)), config.num_learners
    final = out / CHECKPOINTS / step_name(first.step)
    folder = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}")
    folder.mkdir()
    try:
        files: dict[str, dict[str, Any]] = {}
        notes: dict[str, None] = {}
        for j in range(there):
            learner = first if j == 0 else opened.read([j])
            files |= write_learner(folder, j, count, _tensors_of(learner, model))
            notes |= dict.fromkeys(learner.origin["notes"])
        for j in range(there, count):  # learners that all processes had alike
            files |= _linked(folder, j, count, files)
        record = {
            "step": first.step,
            "num_learners": count,
            "parameters": [[n, list(s)] for n, s in zip(first.layout.names, first.layout.shapes, strict=True)],
            "buffers": sorted(first.buffers),
            "momentum": first.momentum is not None,
            "moments": sorted(first.moments),
            "frozen": sorted(first.frozen),
        }
        facts = {
            k: v for k, v in {**first.facts, **told}.items() if k not in {*record, "format", "format_version", "files"}
        }
        publish(
            folder,
            final,
            {**record, **facts, "imported": {**first.origin, "from": str(opened.found.path)}, "files": files},
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return first.step, list(notes)


def _tensors_of(learners: Learners, model: FunctionalModel | None) -> LearnerTensors:
    """One learner as it is written, under all names of the task's network if there is one."""
    buffers = {n: b[0] for n, b in learners.buffers.items()}
    if model is None:
        weights = {**learners.layout.split(learners.weights[0]), **buffers, **learners.frozen}
    else:
        own = {n: b for n, b in model.initial_weights()[1].items() if n not in buffers}  # counters that old files lack
        weights = {**model.state_dict(learners.weights[0], {**own, **buffers}), **learners.frozen}
    momentum = None if learners.momentum is None else learners.layout.split(learners.momentum[0])
    return LearnerTensors(weights, momentum, {n: learners.layout.split(m[0]) for n, m in learners.moments.items()})


def _linked(folder: Path, index: int, count: int, files: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Further names of the first learner's files, for a learner with the same weights."""
    made = {}
    for kind in ("learner", "optimizer"):
        first, name = shard_name(kind, 0, count), shard_name(kind, index, count)
        if first in files:
            try:
                os.link(folder / first, folder / name)
            except OSError:  # a file system without links
                shutil.copyfile(folder / first, folder / name)
            made[name] = files[first]
    return made
