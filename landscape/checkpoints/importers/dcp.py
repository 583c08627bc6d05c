"""Directories of torch.distributed.checkpoint (DCP): `.metadata` beside `__{rank}_{i}.distcp`.

DCP stores one tensor a name. Where several processes save a tensor under one name, one of them, chosen by how much each has to write already,
does; the others' are dropped without a word. So processes that had come apart and saved their weights under the same names (plain DDP code run
on decentralised training) leave a directory that holds at most one network, in which tensors of different processes stand side by side. What
can be known of that from which rank's file each tensor lies in is said in `Found.reasons`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import dcp_metadata, torch_file
from landscape.checkpoints.importers.dcp_kind import kind_of
from landscape.checkpoints.importers.dcp_metadata import Entries
from landscape.checkpoints.importers.flat_names import LARGEST_COUNT, Content, State, apart, learners
from landscape.checkpoints.importers.found import Found, Weights
from landscape.checkpoints.importers.sharded import is_stack, stack_of
from landscape.checkpoints.importers.sharded import unstack as unstack

METADATA = ".metadata"
PLAIN, LIGHTNING, ACCELERATE, TITAN = (
    "torch.distributed.checkpoint", "Lightning's sharded checkpoint (torch.distributed.checkpoint)",
    "Accelerate's FSDP checkpoint (torch.distributed.checkpoint)", "torchtitan's checkpoint (torch.distributed.checkpoint)",
)  # fmt: skip
_OWN_METADATA = re.compile(r"__(\d{1,9})\.metadata")


def find(folder: Path) -> Found | None:
    """The checkpoint in a directory of DCP, or in one of Accelerate's that holds such directories; None if it is neither.

    Read are the index, the table of contents of settings, and counters; no weights.

    Raises:
        CheckpointError: it is one, but damaged, hostile, or of a kind that is not read; the message says which.
    """
    if not folder.is_dir():
        return None
    if (folder / METADATA).is_file():
        return _found(folder, _entries(folder / METADATA))
    inner = folder / "pytorch_model_fsdp_0"
    if (inner / METADATA).is_file():
        return _accelerate(folder, inner)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from None
    own = sorted((int(m[1]), folder / name) for name in names if (m := _OWN_METADATA.fullmatch(name)))
    if own:
        return _uncoordinated(folder, own)
    if any(isinstance(dcp_metadata.writer_of(name), int) for name in names):
        raise CheckpointError(
            f"{folder} holds .distcp files, but not the {METADATA} that says what is in them: the save did not end"
        )
    return None


def _entries(path: Path) -> Entries:
    entries = dcp_metadata.read(path)
    flat = next((name for name in entries.tensors if name.rpartition(".")[2] in ("_flat_param", "flat_param")), None)
    if flat is not None:
        raise CheckpointError(
            f"{path.parent} holds FSDP's flat parameters ({flat[:100]}), which do not say where the network's own begin; save with "
            "StateDictType.SHARDED_STATE_DICT or torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )
    return entries


def _content(entries: Entries) -> Content:
    return Content(
        dict(entries.tensors), {name: found.setting for name, found in entries.settings.items()}, entries.ordered
    )


def _found(folder: Path, entries: Entries, extra: Entries | None = None) -> Found:
    content = _content(entries)
    if extra is not None:
        beside = _content(extra)
        both = content.ordered and beside.ordered
        content = Content({**beside.tensors, **content.tensors}, {**beside.settings, **content.settings}, both)
    grouped = learners(content, str(folder))
    if grouped is not None and grouped[0]:
        found = _learners(folder, *grouped)
    else:
        found = _one(folder, content, () if grouped is None else (grouped[2],))
    facts = {
        **found.facts,
        **({"writer_version": f"torch.distributed.checkpoint {entries.version}"} if entries.version else {}),
    }
    found = _with_meta(replace(found, format=_format(folder, content), facts=facts))
    if found.step is None and (step := re.fullmatch(r"(?:.*[-_=.])?step[-_=]?(\d{1,15})", folder.name)):
        found = replace(found, step=int(step[1]), notes=(*found.notes, "its step is the one in the folder's name"))
    return found


def _format(folder: Path, content: Content) -> str:
    if (folder / "meta.pt").is_file():
        return LIGHTNING
    if re.fullmatch(r"pytorch_model_fsdp_\d+", folder.name):
        return ACCELERATE
    names = (*content.tensors, *content.settings)
    if any(name.startswith("train_state.") for name in names) and not any(name.startswith("model.") for name in names):
        return TITAN
    return PLAIN


def _learners(folder: Path, contents: Sequence[Content], rest: Content, said: str) -> Found:
    states = [apart(content, f"{folder}, learner {j}") for j, content in enumerate(contents)]
    shared = apart(rest, str(folder))
    notes = [note for state in states for note in state.notes] + list(shared.notes)
    if shared.weights.tensors:
        left = next(iter(shared.weights.tensors))
        notes.append(
            f"{len(shared.weights.tensors)} tensors that belong to no learner were left out, such as {left[:100]}"
        )
    steps = {state.step for state in states} - {None}
    if len(steps) > 1:
        raise CheckpointError(
            f"{folder}: the learners are of different steps: {', '.join(str(state.step) for state in states)}"
        )
    facts = {k: v for k, v in states[0].facts.items() if all(state.facts.get(k) == v for state in states)}
    return Found(
        path=folder,
        format=PLAIN,
        kind="learners",
        models=tuple(state.weights for state in states),
        reasons=(
            said,
            "names that differ are never merged by torch.distributed.checkpoint, so each learner is as its process saved it",
        ),
        step=steps.pop() if steps else shared.step,
        facts={**shared.facts, **facts, "num_learners": len(states)},
        notes=tuple(dict.fromkeys(notes)),
    )


def _one(folder: Path, content: Content, said: tuple[str, ...]) -> Found:
    state = apart(content, str(folder))
    tensors = list(state.weights.tensors.values())
    if not tensors:
        raise CheckpointError(f"{folder} holds no weights, only the state of an optimizer or of the training")
    kind, reasons = kind_of(state.weights.tensors)
    found = Found(folder, PLAIN, kind, (state.weights,), (*said, *reasons), state.step, state.facts, state.notes)
    stack = stack_of(tensors)
    if stack is not None and is_stack(tensors):
        found = replace(
            found,
            reasons=(
                f"every tensor begins with {stack[0]} and is cut along that axis alone, into {stack[1]} equal parts",
            ),
        )
        return unstack(found, stack[0])
    if stack is not None:
        hint = (
            f"every tensor begins with {stack[0]}: if these are learners stacked along a first axis, give the network (--task, or model=), whose shapes tell them apart; tensors "
            "alone do not tell, as FSDP cuts along the first axis too"
        )
        found = replace(found, reasons=(*found.reasons, hint))
    return found


def _with_meta(found: Found) -> Found:
    """Lightning keeps what is no tensor in meta.pt."""
    path = found.path / "meta.pt"
    if not path.is_file():
        return found
    try:
        content = torch_file.load(path)
    except CheckpointError as error:
        return replace(found, notes=(*found.notes, f"its step and settings are not known: {error}"))
    said: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    step, epoch = (
        value if type(value := said.get(key)) is int and 0 <= value < LARGEST_COUNT else None
        for key in ("global_step", "epoch")
    )
    facts = {**found.facts, **({} if epoch is None else {"epoch": epoch})}
    version = said.get("pytorch-lightning_version")
    if isinstance(version, str):
        facts["writer_version"] = f"Lightning {version[:20]}"
    return replace(found, step=found.step if step is None else step, facts=facts)


def _accelerate(folder: Path, inner: Path) -> Found:
    """Accelerate puts the model and its optimizer in directories of their own."""
    notes: list[str] = []
    if (folder / "pytorch_model_fsdp_1").exists():
        notes.append(
            "it holds several models; the first, pytorch_model_fsdp_0, was read: give another's folder to read that"
        )
    extra = None
    if (folder / "optimizer_0" / METADATA).is_file():
        try:
            extra = dcp_metadata.read(folder / "optimizer_0" / METADATA)
        except CheckpointError as error:
            notes.append(f"the optimizer's state was not read: {error}")
    found = _found(inner, _entries(inner / METADATA), extra)
    return replace(found, path=folder, format=ACCELERATE, notes=(*found.notes, *notes))


def _uncoordinated(folder: Path, own: Sequence[tuple[int, Path]]) -> Found:
    """Saved with use_collectives=False: each process wrote an index of its own, and nothing was merged."""
    ranks = [rank for rank, _ in own]
    if ranks != list(range(len(ranks))):
        missing = next(rank for rank in range(len(ranks) + 1) if rank not in ranks)
        raise CheckpointError(
            f"{folder}: __{missing}.metadata is missing beside those of ranks {', '.join(map(str, ranks[:20]))}"
        )
    try:
        entries = [dcp_metadata.read(path) for _, path in own]
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. (Each process wrote an index of its own here, use_collectives=False; processes that hold shards of one model can only be put "
            "together when they save with use_collectives=True)"
        ) from None
    states: list[State] = [
        apart(_content(found), f"{folder}, rank {rank}") for rank, found in zip(ranks, entries, strict=True)
    ]
    steps = {state.step for state in states} - {None}
    if len(steps) > 1:
        raise CheckpointError(
            f"{folder}: the processes are of different steps: {', '.join(str(state.step) for state in states)}"
        )
    models: tuple[Weights, ...] = tuple(state.weights for state in states)
    facts = {k: v for k, v in states[0].facts.items() if all(state.facts.get(k) == v for state in states)}
    return Found(
        path=folder,
        format=PLAIN,
        kind="learners" if len(models) > 1 else "one model",
        models=models,
        reasons=(
            f"each of {len(models)} processes wrote an index of its own (use_collectives=False) that lists whole tensors, so nothing was merged",
        ),
        step=steps.pop() if steps else None,
        facts={**facts, **({"num_learners": len(models)} if len(models) > 1 else {})},
        notes=tuple(dict.fromkeys(note for state in states for note in state.notes)),
    )
