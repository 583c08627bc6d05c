"""What Hugging Face's libraries write beside the weights: which network it is, how far its training was, the state of its optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.found import OptimizerState, read_text
from landscape.checkpoints.importers.loaded import LARGEST_COUNT, count, number
from landscape.checkpoints.importers.safetensors_header import json_table
from landscape.checkpoints.importers.torch_optimizer import optimizer_state

LARGEST_JSON = 16 << 20
"""Bytes of config.json or trainer_state.json beyond which they are not read."""

CONFIG, TRAINER, ARGUMENTS, OPTIMIZER = "config.json", "trainer_state.json", "training_args.bin", "optimizer.pt"


@dataclass
class Beside:
    """What lies beside weights.

    Attributes:
        step: steps taken, where recorded.
        facts: what else is recorded.
        reasons: what of it bears on whose weights these are.
        notes: what was left out, and why.
        optimizer: None where there is none that can be read.
    """

    step: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    optimizer: OptimizerState | None = None


def beside(folder: Path, names: Sequence[str], tensors: Sequence[str]) -> Beside:
    """What a folder's files say of the weights in it; damaged ones are noted, not refused, as the weights do not depend on them.

    Args:
        folder: where the weights are.
        names: of its files.
        tensors: names of the weights.
    """
    found = Beside()
    config = _json(folder / CONFIG, found.notes) if CONFIG in names else {}
    _from_config(config, found)
    if OPTIMIZER in names:
        found.optimizer, notes = optimizer_in(folder / OPTIMIZER, tensors)
        found.notes += notes
    trainer = _json(folder / TRAINER, found.notes) if TRAINER in names else {}
    _from_trainer(trainer, found)
    ranks = {int(m[1]) for name in names if (m := re.fullmatch(r"rng_state_(\d{1,6})\.pth", name))}
    if ranks and ranks == set(range(len(ranks))):
        found.facts["num_learners"] = len(ranks)
    if TRAINER in names:
        several = f"; {len(ranks)} processes trained it, and whether all had the same is not recorded" if ranks else ""
        found.reasons.append(f"Hugging Face's Trainer saves the weights of one process{several}")
    if "adapter_config.json" in names:
        found.notes.append("adapter_config.json says that these are an adapter's weights, not the whole network's")
    if ARGUMENTS in names:
        found.notes.append(
            f"{ARGUMENTS} was not read: it is a pickle of a class of its own; batch size and schedule are in it"
        )
    return found


def optimizer_in(path: Path, tensors: Sequence[str]) -> tuple[OptimizerState | None, list[str]]:
    """The state in a file that holds an optimizer's state_dict alone, and notes of what was left out.

    Args:
        path: a file of torch.save.
        tensors: names of the weights that it may belong to.
    """
    try:
        return optimizer_state(torch_file.load(path), tensors, path)
    except CheckpointError as error:
        return None, [f"the optimizer's state was not read: {error}"]


def _json(path: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        text = read_text(path)
        if len(text) > LARGEST_JSON:
            raise CheckpointError(f"{path} has {len(text)} characters; more than {LARGEST_JSON} are not read")
        return json_table(text.encode(), path)
    except CheckpointError as error:
        notes.append(f"{path.name} was not read: {error}")
        return {}


def _from_config(config: Mapping[str, Any], found: Beside) -> None:
    kind, architectures = config.get("model_type"), config.get("architectures")
    if isinstance(kind, str):
        found.facts["model_type"] = kind[:100]
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        found.facts["architecture"] = architectures[0][:100]
    version = config.get("transformers_version")
    if isinstance(version, str):
        found.facts["writer_version"] = f"transformers {version[:20]}"
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict):
        method = quantised.get("quant_method")
        said = f" ({method[:40]})" if isinstance(method, str) else ""
        found.notes.append(
            f"{CONFIG} says that the network is quantised{said}: its packed numbers are not its weights; save it dequantised to measure it"
        )


def _from_trainer(state: Mapping[str, Any], found: Beside) -> None:
    found.step = count(state.get("global_step"))
    epoch, batch = number(state.get("epoch")), count(state.get("train_batch_size"))
    if epoch is not None and 0 <= epoch < LARGEST_COUNT:
        found.facts["epoch"] = int(epoch) if epoch == int(epoch) else epoch
    if batch:
        found.facts["local_batch_size"] = batch
        found.notes.append(
            f"the batch size, {batch}, is that of one device and one pass; whether a step accumulates several is not recorded"
        )
    history = state.get("log_history")
    last = history[-1] if isinstance(history, list) and history and isinstance(history[-1], dict) else {}
    rate = number(last.get("learning_rate"))
    known = found.optimizer is not None and "learning_rate" in found.optimizer.facts
    if rate is not None and not known and found.step is not None and last.get("step") == found.step:
        found.facts["learning_rate"] = rate
