"""Weights in safetensors files, and in Hugging Face's shards of torch.save: which files of a folder are a network, and what is known of it.

Hugging Face's layout is a folder with `model.safetensors`; or with shards `model-00001-of-00003.safetensors` and an index that says which tensor
is in which; beside them config.json and, from its Trainer, trainer_state.json and optimizer.pt. The older layout has pytorch_model.bin in
their place. torch.distributed.checkpoint's HuggingFaceStorageWriter has each process write files of its own, and note in each which part of
a tensor it holds; on demand it then joins them, leaving them in a folder `sharded`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import hugging_face
from landscape.checkpoints.importers.dcp_kind import kind_of
from landscape.checkpoints.importers.flat_names import Content, apart, learners
from landscape.checkpoints.importers.found import Found, Weights
from landscape.checkpoints.importers.safetensors_header import is_safetensors, read_header
from landscape.checkpoints.importers.safetensors_shards import (
    INDEX,
    PROCESS,
    SHARD,
    SUFFIX,
    TORCH,
    WRITER,
    Read,
    indexed,
    of_processes,
    of_torch,
    one,
    set_of,
    unindexed,
)
from landscape.checkpoints.importers.sharded import is_stack, unstack

STEPS = ("global_step", "step", "iteration")
INDICES = (SUFFIX + INDEX, ".bin" + INDEX)
UNKNOWN = "whose weights they are (one process's, all processes' alike, an average) is not recorded"
UNJOINED = "sharded"
"""Where HuggingFaceStorageWriter leaves what it has joined."""


def find(path: Path) -> Found | None:
    """The network in a file, or in a folder of one of the layouts above; None if it is none of them.

    Headers and indices are read, no tensors. Several files with the same names of tensors in each are learners, not shards, and not this
    importer's.

    Raises:
        CheckpointError: it is one, but damaged, incomplete or hostile; the message names the file.
    """
    if not path.is_dir():
        read = _of_file(path)
        return None if read is None else _found(path, read, [])
    names = _names(path)
    read = _unjoined(path, names) or _in_folder(path, names)
    return None if read is None else _found(path, read, names)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from None


def _found(path: Path, read: Read, names: Sequence[str]) -> Found:
    """What there is to say of one network's tensors.

    Args:
        path: what was given.
        read: the tensors.
        names: of the files beside.
    """
    if not read.tensors:
        raise CheckpointError(f"{read.files[0]} holds no tensors")
    said = {key: int(value) for key, value in read.metadata.items() if re.fullmatch(r"\d{1,15}", value)}
    step = next((said[key] for key in STEPS if key in said), None)
    facts = {"epoch": said["epoch"]} if "epoch" in said else {}
    beside = hugging_face.beside(path, names, list(read.tensors))
    if read.format == WRITER:
        found = _of_writer(path, read)
        found = replace(found, reasons=(read.reason, *found.reasons, *beside.reasons))
    else:
        source = str(read.files[0] if len(read.files) == 1 else path)
        model = Weights(source, read.tensors, beside.optimizer, ordered=read.format == TORCH)
        found = Found(path, read.format, "one model", (model,), (read.reason, *(beside.reasons or [UNKNOWN])))
    steps = [value for value in (beside.step, step, found.step) if value is not None]
    return replace(
        found,
        format=read.format,
        step=steps[0] if steps else None,
        facts={**found.facts, **facts, **beside.facts},
        notes=(*found.notes, *read.notes, *beside.notes),
    )


def _of_writer(path: Path, read: Read) -> Found:
    """What torch.distributed.checkpoint wrote, whose names are those of a whole training state."""
    content = Content(dict(read.tensors), ordered=False)
    grouped = learners(content, str(path))
    if grouped and grouped[0]:
        states = [apart(each, f"{path}, learner {j}") for j, each in enumerate(grouped[0])]
        steps = {state.step for state in states}
        return Found(
            path,
            WRITER,
            "learners",
            tuple(state.weights for state in states),
            (grouped[2], "names that differ are never merged, so each learner is as its process saved it"),
            steps.pop() if len(steps) == 1 else None,
            {**states[0].facts, "num_learners": len(states)},
            tuple(dict.fromkeys(note for state in states for note in state.notes)),
        )
    state = apart(content, str(path))
    tensors = list(state.weights.tensors.values())
    if not tensors:
        raise CheckpointError(f"{path} holds no weights, only the state of an optimizer or of the training")
    kind, reasons = kind_of(state.weights.tensors)
    found = Found(path, WRITER, kind, (state.weights,), reasons, state.step, state.facts, state.notes)
    return unstack(found, tensors[0].shape[0]) if is_stack(tensors) else found


def _of_file(path: Path) -> Read | None:
    if path.name.endswith(INDICES):
        return indexed(path)
    if PROCESS.fullmatch(path.name) or ((shard := SHARD.fullmatch(path.name)) and not _is_whole(path, shard)):
        raise CheckpointError(f"{path} holds a part of a network; give the folder of all its parts, {path.parent}")
    return one(path) if path.name.endswith(SUFFIX) or is_safetensors(path) else None


def _is_whole(path: Path, shard: re.Match[str]) -> bool:
    """Whether a file named as one of several is the only one, or holds the same tensors as another of them: a learner's."""
    if int(shard["count"]) <= 1:
        return True
    alike = [name for name in _names(path.parent) if set_of(SHARD.fullmatch(name)) == set_of(shard)]
    other = next((name for name in alike if name != path.name), None)
    if other is None or shard["suffix"] != SUFFIX:
        return False
    return bool(read_header(path.with_name(other)).places.keys() & read_header(path).places.keys())


def _unjoined(folder: Path, names: Sequence[str]) -> Read | None:
    """What HuggingFaceStorageWriter joined, as the processes wrote it: joining (torch 2.13) makes zeros of tensors without axes."""
    inner = folder / UNJOINED
    if UNJOINED not in names or inner.is_symlink() or not inner.is_dir():
        return None
    read = of_processes(inner, _names(inner))
    if read is None:
        return None
    joined = any(SHARD.fullmatch(name) for name in names)
    note = f"read from {UNJOINED}/, not from the files joined from it: joining them makes zeros of tensors without axes"
    return replace(read, notes=(*read.notes, note)) if joined else read


def _in_folder(folder: Path, names: Sequence[str]) -> Read | None:
    """A folder's weights, chosen as Hugging Face's libraries do; None where there are none, or which are meant cannot be told."""
    files = [name for name in names if name.endswith(SUFFIX)]
    indices = [name for name in names if name.endswith(INDICES)]
    indices.sort(key=lambda name: (name != f"model{SUFFIX}{INDEX}", name.endswith(f".bin{INDEX}"), name))
    shards = [shard for name in names if (shard := SHARD.fullmatch(name))]
    shards = [shard for shard in shards if shard["suffix"] == SUFFIX] or shards
    if any(PROCESS.fullmatch(name) for name in files):
        read = of_processes(folder, names)
    elif f"model{SUFFIX}" in files:
        read = one(folder / f"model{SUFFIX}")
    elif indices:
        read = indexed(folder / indices[0])
    elif shards and (shards[0]["suffix"] == SUFFIX or not files):
        read = unindexed(folder, shards)
    elif len(files) == 1:
        read = one(folder / files[0])
    elif not files and "pytorch_model.bin" in names:
        read = of_torch([folder / "pytorch_model.bin"])
    else:
        return None
    if read is None:
        return None
    used = {file.name for file in read.files}
    others = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    left = [name for name in (*files, *indices, *others) if name not in used]
    if not left:
        return read
    more = f" and {len(left) - 4} more" if len(left) > 4 else ""
    return replace(read, notes=(*read.notes, f"other weights beside them were not read: {', '.join(left[:4])}{more}"))
