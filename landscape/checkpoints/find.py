"""What is at a path: the importers (one file a format) asked in turn.

An importer reads names, shapes and settings, and never runs anything in a file; tensor data it reads only of files of torch.save before 1.6, which
can only be read whole. See `importers.found` for what it returns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from landscape.checkpoints.format import CHECKPOINTS, RUN_FILE, STEP_PATTERN, CheckpointError
from landscape.checkpoints.importers import (
    accelerate,
    dcp,
    deepspeed,
    fsdp,
    plain,
    rank_files,
    run_format,
    safetensors_files,
    series,
)
from landscape.checkpoints.importers.found import Found, regular_file
from landscape.checkpoints.importers.series import Entry

SHOWN = 20
"""Rows of a table in a message."""

KNOWN = "torch.save, safetensors, torch.distributed.checkpoint, FSDP, Lightning, Accelerate, DeepSpeed, decent-dp, SGP, landscape's own"


def entries(paths: Sequence[Path]) -> list[Entry]:
    """The checkpoints at some paths, one a step, in the order of their steps.

    Args:
        paths: files, folders or globs. Several that name no steps are the files of one checkpoint.

    Raises:
        CheckpointError: there is nothing, or two are of the same step.
    """
    if len(paths) > 1 and (all(path.is_file() for path in paths) or series.are_ranks(paths)):
        return series.group_listed(paths)
    found = [
        entry for path in paths for entry in (_of_run(path) if (path / RUN_FILE).is_file() else series.group(path))
    ]
    if len(paths) > 1 and len({entry.step for entry in found}) == 1:
        return [Entry(found[0].step, tuple(p for entry in found for p in entry.paths), found[0].counts)]
    if len(found) > 1:
        found.sort(key=lambda entry: -1 if entry.step is None else entry.step)
        for one, other in itertools.pairwise(found):
            if one.step == other.step:
                which = "no step in their names" if one.step is None else f"step {one.step}"
                raise CheckpointError(
                    f"{_named(one)} and {_named(other)} are two checkpoints of {which}; give one of them"
                )
    return found


def _of_run(path: Path) -> list[Entry]:
    """The checkpoints of a run of ours."""
    folders = sorted(p for p in (path / CHECKPOINTS).glob("step-*") if STEP_PATTERN.fullmatch(p.name))
    if not folders:
        raise CheckpointError(f"{path} is a run without checkpoints")
    return [Entry(int(folder.name.removeprefix("step-")), (folder,), "step") for folder in folders]


def find_one(paths: Sequence[Path]) -> Found:
    """The one checkpoint at some paths.

    Raises:
        CheckpointError: there are several, or what there is cannot be read.
    """
    found = entries(paths)
    if len(found) != 1:
        listed = ", ".join(_named(entry) for entry in found[:6]) + (", ..." if len(found) > 6 else "")
        raise CheckpointError(
            f"{paths[0]} holds {len(found)} checkpoints ({listed}); give one of them, or import them all"
        )
    return find(found[0])


def find(entry: Entry) -> Found:
    """What one checkpoint is.

    Its step is the one that it records; else the one in its name; else what its optimizer counted; else another number in its name.

    Raises:
        CheckpointError: no importer knows it, or it is damaged, incomplete or dangerous.
    """
    paths = entry.paths
    if len(paths) > 1 and all(path.is_dir() for path in paths):
        found = rank_files.find(paths, _find_folder)
    elif len(paths) > 1:
        found = fsdp.find(paths) or rank_files.find(paths, find_file)
    elif paths[0].is_dir():
        found = _in_folder(paths[0])
    else:
        found = find_file(paths[0])
    if found is None:
        raise CheckpointError(f"{_named(entry)}: no checkpoint of a format known here ({KNOWN})")
    step, notes = _step(found, entry)
    return replace(found, step=step, notes=(*found.notes, *entry.notes, *notes))


def _step(found: Found, entry: Entry) -> tuple[int | None, list[str]]:
    """The step of a checkpoint, and what there is to say of it."""
    named = entry.step if entry.counts == "step" else None
    if found.step is not None:
        differs = named is not None and named != found.step
        return found.step, [f"its name says step {named}, it records {found.step}"] if differs else []
    if named is not None:
        others = sorted({count for count in _optimizer_steps(found) if count not in (None, named)})
        counted = f"; its optimizer counted {', '.join(map(str, others[:8]))}" if others else ""
        return named, [f"its step is the number in its name{counted}"]
    steps = _optimizer_steps(found)
    if len(set(steps)) > 1:
        rows = [f"  learner {j}  {'unknown' if step is None else step}" for j, step in enumerate(steps[:SHOWN])]
        raise CheckpointError(
            "\n".join([f"{found.path}: the learners are of different steps, by what their optimizers counted:", *rows])
            + "\n  if they belong together, let links to the files have the step in their names, such as step_100_rank0.pt"
        )
    if steps[0] is not None:
        return steps[0], ["its step is the optimizer's count of its own"]
    counted = ", which counts epochs" if entry.counts == "epoch" else ", whatever that counts"
    return entry.step, [] if entry.step is None else [f"its step is the number in its name{counted}"]


def _optimizer_steps(found: Found) -> list[int | None]:
    """What the optimizer of each learner counted."""
    shared = found.facts.get("optimizer_step")
    return [
        shared if model.optimizer is None else model.optimizer.facts.get("optimizer_step") for model in found.models
    ]


def find_file(path: Path) -> Found:
    """What one file is."""
    found = safetensors_files.find(regular_file(path)) or plain.find(path)
    if found is None:
        raise CheckpointError(f"{path} is no checkpoint of a format known here ({KNOWN})")
    return found


def _find_folder(folder: Path) -> Found:
    """What one folder is."""
    found = _in_folder(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint of a format known here ({KNOWN})")
    return found


def _in_folder(folder: Path) -> Found | None:
    for importer in (run_format, deepspeed, accelerate, dcp, safetensors_files):
        found: Found | None = importer.find(folder)  # type: ignore[attr-defined]
        if found is not None:
            return found
    return rank_files.find_in(folder, find_file)


def _named(entry: Entry) -> str:
    return str(entry.paths[0]) if len(entry.paths) == 1 else f"{entry.paths[0]} and {len(entry.paths) - 1} more"
