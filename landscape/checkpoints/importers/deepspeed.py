"""Folders of DeepSpeed's `save_checkpoint`: `latest` names a folder (the tag) with mp_rank_00_model_states.pt and the processes' *_optim_states.pt.

With ZeRO stages 0 to 2 every process has all weights, and one file holds them, in the type they are computed with. The optimizer's state and the
float32 weights of mixed precision are cut over the processes, in pickles that need DeepSpeed's own classes. With stage 3 the weights are cut so too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import safetensors_files, torch_file
from landscape.checkpoints.importers.found import Found, OptimizerState, Stored, Weights, named_within
from landscape.checkpoints.importers.loaded import count, entries, number
from landscape.checkpoints.importers.torch_archive import opened
from landscape.checkpoints.importers.torch_optimizer import optimizer_state

FORMAT, LATEST, SCRIPT = "DeepSpeed", "latest", "zero_to_fp32.py"
MODEL = re.compile(r"mp_rank_(\d{2,6})_model_states\.pt")
PARTITIONED = re.compile(r"zero_pp_rank_(\d{1,6})_mp_rank_(\d{2,6})_model_states\.pt")
LAYER = re.compile(r"layer_\d{1,6}-(?:model_\d{1,6}-)?model_states\.pt")
EXPERT = re.compile(r"(?:layer_\d{1,6}_)?expert_\d{1,6}_mp_rank_\d{2,6}_model_states\.pt")
OPTIMIZER = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank|expp_rank)_\d{1,6}_mp_rank_\d{2,6}_optim_states\.pt")
CONSOLIDATED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HALF = (torch.float16, torch.bfloat16)
LARGEST_TAG = 255
OPTIONS = {"lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay", "eps": "eps"}


def find(folder: Path) -> Found | None:
    """The network in a folder of DeepSpeed, or in the folder of one tag in it; None if it is neither.

    Raises:
        CheckpointError: damaged or hostile files, or weights that are cut over processes (ZeRO stage 3, tensor or pipeline parallelism,
            experts); the message says what to do.
    """
    if not folder.is_dir():
        return None
    names = _names(folder)
    tag = folder if _is_tag(names) else _latest(folder, names)
    if tag is None:
        return None
    held = _names(tag)
    if tag is not folder and any(PARTITIONED.fullmatch(n) for n in held) and any(n in names for n in CONSOLIDATED):
        return _gathered(folder, tag)
    _check_whole(folder, tag, held)
    found = _found(folder, tag, held)
    if tag is folder:
        return found
    left = [
        name for name in names if name != tag.name and (name in CONSOLIDATED or re.fullmatch(r"global_step\d+", name))
    ]
    notes = (f"other checkpoints beside {tag.name} were not read: {', '.join(left[:4])}",) if left else ()
    return replace(found, notes=(*found.notes, *notes))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from None


def _is_tag(names: Sequence[str]) -> bool:
    return any(pattern.fullmatch(name) for name in names for pattern in (MODEL, PARTITIONED, LAYER, EXPERT))


def _latest(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder that `latest` names; None where this is not DeepSpeed's."""
    file = folder / LATEST
    if LATEST not in names or file.is_symlink() or not file.is_file():
        return None
    with opened(file, str(file)) as content:
        name = os.pread(content, LARGEST_TAG + 2, 0).decode(errors="replace").strip()
    sure = SCRIPT in names or "global_step" in name
    if name not in names:  # of what lies in the folder itself: no way leads out
        if sure:
            raise CheckpointError(
                f"{file} names {name[:100]!r}, and there is no such folder beside it; give a tag's folder itself"
            )
        return None
    tag = folder / name
    if not Path(os.path.realpath(tag)).is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(f"{file} names {name[:100]!r}, a link out of the folder; nothing outside is read")
    if tag.is_dir() and _is_tag(_names(tag)):
        return tag
    if sure:
        raise CheckpointError(f"{file} names {name[:100]!r}, which is no folder with *_model_states.pt")
    return None


def _check_whole(folder: Path, tag: Path, names: Sequence[str]) -> None:
    """Refuse what is cut over processes, and say what to do."""
    partitioned = [name for name in names if PARTITIONED.fullmatch(name)]
    if partitioned:
        outer = folder if tag is not folder else tag.parent
        raise CheckpointError(
            f"{tag} is a checkpoint of DeepSpeed's ZeRO stage 3: each of {len(partitioned)} processes wrote its share of every weight, in pickles "
            f"that need DeepSpeed's classes, so no network is read. Put it together with the script that DeepSpeed left beside, `python {SCRIPT} "
            f"{outer} OUT` (it unpickles the files: only if you trust who wrote them), and give OUT; or save with "
            "stage3_gather_16bit_weights_on_model_save and engine.save_16bit_model"
        )
    if any(EXPERT.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{tag} is DeepSpeed's checkpoint of a mixture of experts, whose experts lie in files of their own; gather them where it was "
            "trained and save the whole state_dict with torch.save"
        )
    ranks = sorted(int(found[1]) for name in names if (found := MODEL.fullmatch(name)))
    if len(ranks) > 1 or any(LAYER.fullmatch(name) for name in names):
        how = (
            f"tensor or pipeline parallelism ({len(ranks)} mp_rank files)"
            if len(ranks) > 1
            else "pipeline parallelism (layer_* files)"
        )
        raise CheckpointError(
            f"{tag} is DeepSpeed's checkpoint of a network that {how} cut; how its parts fit together only the program that trained it knows: "
            "put it together there (Megatron-DeepSpeed and GPT-NeoX have converters) and save the whole state_dict"
        )
    if ranks != [0]:
        raise CheckpointError(f"{tag}: mp_rank_00_model_states.pt is missing")


def _found(folder: Path, tag: Path, names: Sequence[str]) -> Found:
    path = named_within(tag, next(name for name in names if MODEL.fullmatch(name)), tag)
    state = entries(torch_file.load(path))
    if not isinstance(state.get("module"), dict):
        raise CheckpointError(f"{path} holds no table of weights under 'module', where DeepSpeed puts them")
    tensors = torch_file.tensors_of(state["module"], path, within="module.")
    if not tensors:
        raise CheckpointError(f"{path} holds no weights")
    if (ranks := count(state.get("mp_world_size"))) is not None and ranks > 1:
        raise CheckpointError(f"{path} is one of {ranks} parts of a network (mp_world_size); the others are missing")
    step, facts, notes = _recorded(state)
    optimizer, left_out = _optimizer(state, names, list(tensors), path)
    notes += _of_precision(tensors, names) + left_out
    absent = [name for name in entries(state.get("frozen_param_shapes")) if name not in tensors]
    if absent:
        notes.append(
            f"{len(absent)} frozen parameters were not saved (exclude_frozen_parameters), such as {absent[0][:100]}"
        )
    return Found(
        folder,
        FORMAT,
        "one model",
        (Weights(str(path), tensors, optimizer),),
        _reasons(facts),
        step,
        facts,
        tuple(notes),
    )


def _gathered(folder: Path, tag: Path) -> Found | None:
    """A network of stage 3 of which the whole weights were saved beside its parts."""
    found = safetensors_files.find(folder)
    if found is None:
        return None
    first = next(name for name in _names(tag) if PARTITIONED.fullmatch(name))
    try:
        step, facts, notes = _recorded(entries(torch_file.load(named_within(tag, first, tag))))
    except CheckpointError as error:
        step, facts, notes = None, {}, [f"DeepSpeed's own record was not read: {error}"]
    notes.append(
        f"the weights are those gathered beside {tag.name}, which holds ZeRO stage 3's parts; that both are of one step is not recorded"
    )
    return replace(
        found,
        format=f"{FORMAT} (ZeRO stage 3, gathered)",
        step=found.step if step is None else step,
        facts={**found.facts, **facts},
        notes=(*found.notes, *notes),
    )


# What is recorded ------------------------------------------------------------------------------------------------------


def _recorded(state: Mapping[str, Any]) -> tuple[int | None, dict[str, Any], list[str]]:
    """(steps taken, facts, notes)."""
    facts: dict[str, Any] = {}
    notes: list[str] = []
    config = entries(state.get("ds_config"))
    processes = count(state.get("dp_world_size"))
    if processes:
        facts["num_learners"] = processes
    batch = _local_batch(config, processes)
    if batch:
        facts["local_batch_size"] = batch
    stage = count(entries(config.get("zero_optimization")).get("stage", 0 if config else None))
    if stage is not None and stage <= 3:
        facts["zero_stage"] = stage
    if skipped := count(state.get("skipped_steps")):
        facts["skipped_steps"] = skipped
    for key in ("epoch", "global_samples"):
        if (value := count(state.get(key))) is not None:
            facts[key] = value
    version = state.get("ds_version")
    if isinstance(version, str):
        facts["writer_version"] = f"DeepSpeed {version[:20]}"
    facts |= _settings(state, config, notes)
    return count(state.get("global_steps")), facts, notes


def _local_batch(config: Mapping[str, Any], processes: int | None) -> int | None:
    """Examples of one process in one step: all its micro-batches."""
    whole = count(config.get("train_batch_size"))
    if whole and processes and whole % processes == 0:
        return whole // processes
    micro, passes = count(config.get("train_micro_batch_size_per_gpu")), config.get("gradient_accumulation_steps", 1)
    return micro * passes if micro and count(passes) else None


def _settings(state: Mapping[str, Any], config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Of the optimizer, as the configuration has them; the learning rate as the schedule had it last, where that is recorded."""
    options = entries(entries(config.get("optimizer")).get("params"))
    found: dict[str, Any] = {
        new: value for old, new in OPTIONS.items() if (value := number(options.get(old))) is not None
    }
    betas = options.get("betas")
    if isinstance(betas, list | tuple) and len(betas) == 2 and all(number(beta) is not None for beta in betas):
        found["betas"] = list(betas)
    last = entries(state.get("lr_scheduler")).get("_last_lr")
    if (
        isinstance(last, list)
        and last
        and (rate := number(last[0])) is not None
        and all(other == rate for other in last)
    ):
        found["learning_rate"] = rate
    elif "learning_rate" in found and (entries(config.get("scheduler")) or state.get("lr_scheduler") is not None):
        rate = found.pop("learning_rate")
        notes.append(f"the learning rate is not recorded: {rate:g} is configured, but a schedule changes it")
    return found


def _optimizer(
    state: Mapping[str, Any], names: Sequence[str], tensors: Sequence[str], path: Path
) -> tuple[OptimizerState | None, list[str]]:
    parts = [name for name in names if OPTIMIZER.fullmatch(name)]
    if parts:
        return None, [
            f"the optimizer's state was not read: it is cut over {len(parts)} processes, in pickles that need DeepSpeed's classes ({parts[0]} ...)"
        ]
    return optimizer_state(state.get("optimizer"), tensors, path)


def _of_precision(tensors: Mapping[str, Stored], names: Sequence[str]) -> list[str]:
    half = [stored for stored in tensors.values() if stored.dtype in HALF]
    if not half:
        return []
    kind = str(half[0].dtype).removeprefix("torch.")
    masters = any(OPTIMIZER.fullmatch(name) for name in names)
    where = (
        f"; the float32 weights that the optimizer updates lie in the *_optim_states.pt: `python {SCRIPT} FOLDER OUT` writes them "
        "(it unpickles: only if you trust the files)"
        if masters
        else ""
    )
    return [f"{len(half)} of {len(tensors)} tensors are {kind}: the copies that the network computes with{where}"]


def _reasons(facts: Mapping[str, Any]) -> tuple[str, ...]:
    processes, stage = facts.get("num_learners"), facts.get("zero_stage")
    how = f"ZeRO stage {stage}: " if stage else ""
    if processes == 1:
        return (f"{how}one process trained it and wrote its weights",)
    many = f"{processes} processes" if processes else "processes (how many is not recorded)"
    return (
        f"{how}{many} averaged their gradients at every step, so they held the same weights, of which process 0 wrote its copy; buffers "
        "(BatchNorm's statistics) are process 0's own",
    )
