"""What is at a path: the importers (one file a format) asked in turn.

An importer reads names, shapes and settings, never tensor data, and never runs anything in a file; see `importers.found` for what it returns.
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

KNOWN = "torch.save, safetensors, torch.distributed.checkpoint, FSDP, Lightning, Accelerate, DeepSpeed, decent-dp, SGP, landscape's own"


def entries(paths: Sequence[Path]) -> list[Entry]:
    """The checkpoints at some paths, one a step, in the order of their steps.

    Args:
        paths: files, folders or globs. Several that name no steps are the files of one checkpoint.

    Raises:
        CheckpointError: there is nothing, or two are of the same step.
    """
    if len(paths) > 1 and all(path.is_file() for path in paths):
        return series.group_files(paths)
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
    """What one checkpoint is. The step that it records wins over the number in its name.

    Raises:
        CheckpointError: no importer knows it, or it is damaged, incomplete or dangerous.
    """
    paths = entry.paths
    if len(paths) > 1:
        found = fsdp.find(paths) or rank_files.find(paths, find_file)
    elif paths[0].is_dir():
        found = _in_folder(paths[0])
    else:
        found = find_file(paths[0])
    if found is None:
        raise CheckpointError(f"{_named(entry)}: no checkpoint of a format known here ({KNOWN})")
    notes = (*found.notes, *entry.notes)
    if found.step is None and entry.step is not None:
        counted = {"step": "", "epoch": ", which counts epochs"}.get(entry.counts, ", whatever that counts")
        return replace(found, step=entry.step, notes=(*notes, f"its step is the number in its name{counted}"))
    if entry.step is not None and entry.counts == "step" and found.step != entry.step:
        notes = (*notes, f"its name says step {entry.step}, it records {found.step}")
    return replace(found, notes=notes)


def find_file(path: Path) -> Found:
    """What one file is."""
    found = safetensors_files.find(regular_file(path)) or plain.find(path)
    if found is None:
        raise CheckpointError(f"{path} is no checkpoint of a format known here ({KNOWN})")
    return found


def _in_folder(folder: Path) -> Found | None:
    for importer in (run_format, deepspeed, accelerate, dcp, safetensors_files):
        found: Found | None = importer.find(folder)  # type: ignore[attr-defined]
        if found is not None:
            return found
    return rank_files.find_in(folder, find_file)


def _named(entry: Entry) -> str:
    return str(entry.paths[0]) if len(entry.paths) == 1 else f"{entry.paths[0]} and {len(entry.paths) - 1} more"
