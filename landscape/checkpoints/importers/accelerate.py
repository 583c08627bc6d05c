"""Folders of Accelerate's `save_state`: the weights in safetensors or torch.save, and beside them optimizer.bin, random_states_{process}.pkl ...

Process 0 alone writes the weights and the optimizer's state; random_states_{process}.pkl, which every process writes, tell how many there were.
Sharded models (FSDP) lie in folders of their own, which are torch.distributed.checkpoint's; DeepSpeed's in its own too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import hugging_face, safetensors_files, torch_file
from landscape.checkpoints.importers.found import Found, Weights

FORMAT = "Accelerate's save_state"
OPTIMIZER, GATHERED = "optimizer.bin", "pytorch_model_fsdp.bin"
PICKLES = re.compile(r"random_states_(\d{1,6})\.pkl")
MARKS = re.compile(
    r"random_states_\d{1,6}\.pkl|(optimizer|scheduler|sampler)(_\d{1,3})?\.bin|custom_checkpoint_\d{1,3}\.pkl"
)
FURTHER = re.compile(r"(model|pytorch_model|pytorch_model_fsdp)_\d{1,3}\.(safetensors|bin)")
"""Models after the first: save_state numbers them."""


def find(folder: Path) -> Found | None:
    """The model that `accelerator.save_state` saved into a folder; None if there is none, or one that other importers know.

    Raises:
        CheckpointError: the weights are damaged, incomplete or hostile; the message names the file.
    """
    if not folder.is_dir():
        return None
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from None
    if not any(MARKS.fullmatch(name) for name in names) or any(
        re.fullmatch(r"pytorch_model_fsdp_\d+", n) for n in names
    ):
        return None
    found = _gathered(folder) if GATHERED in names else safetensors_files.find(folder)
    if found is None:
        return None
    notes, optimizer = list(found.notes), found.models[0].optimizer
    further = [name for name in names if FURTHER.fullmatch(name)]
    if further:
        notes.append(
            f"{1 + len(further)} models were saved; these weights are the first's, those in {', '.join(further[:4])} were not read: give such "
            "a file itself to have them"
        )
    if OPTIMIZER in names and optimizer is None:
        optimizer, left_out = hugging_face.optimizer_in(folder / OPTIMIZER, list(found.models[0].tensors))
        notes += left_out
    pickled = [name for name in names if name.endswith(".pkl")]
    if pickled:
        notes.append(
            f"{', '.join(pickled[:4])}{' ...' if len(pickled) > 4 else ''}: pickles of random states and the like, not read"
        )
    count = _processes(names)
    saves = re.fullmatch(r"checkpoint_(\d{1,9})", folder.name)
    return replace(
        found,
        format=FORMAT,
        models=(replace(found.models[0], optimizer=optimizer),),
        reasons=(*(r for r in found.reasons if r != safetensors_files.UNKNOWN), *_reasons(count)),
        facts={
            **found.facts,
            **({"num_learners": count} if count else {}),
            **({"save_number": int(saves[1])} if saves else {}),
        },
        notes=tuple(notes),
    )


def _gathered(folder: Path) -> Found:
    """A whole network that FSDP's processes gathered (StateDictType.FULL_STATE_DICT)."""
    path = folder / GATHERED
    tensors = torch_file.tensors_of(torch_file.load(path), path)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    said = "the whole network was gathered from FSDP's processes, each of which held a part of it"
    return Found(folder, FORMAT, "one model", (Weights(str(path), tensors),), (said,))


def _processes(names: Sequence[str]) -> int | None:
    """How many processes there were; None where the files do not tell."""
    ranks = {int(found[1]) for name in names if (found := PICKLES.fullmatch(name))}
    return len(ranks) if ranks and ranks == set(range(len(ranks))) else None


def _reasons(count: int | None) -> tuple[str, ...]:
    first = "Accelerate saves the weights of process 0"
    if count is None:
        return (f"{first}; how many processes there were is not recorded",)
    if count == 1:
        return (f"{first}, and there was only one (random_states_0.pkl)",)
    return (
        f"{first}, of {count} (random_states_*.pkl): if the processes kept in step (DDP), it is the model of all; if they had come apart (as under "
        "LocalSGD), the others' weights are not in the folder",
    )
