"""Looking into what `torch_file.load` gave: known keys only, type and range of each value checked.

A file can hold itself, share one dictionary a million times, or put anything under the names of a dictionary's own methods, so nothing here walks
through content it does not know, and dictionaries are only touched through `dict` itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

LARGEST_COUNT = 1 << 53

STEPS = ("global_step", "step", "iteration", "iter", "it", "iter_num", "num_updates", "num_steps", "global_steps", "n_iter", "steps", "train_steps")  # fmt: skip
EPOCHS = ("epoch", "current_epoch", "epochs_done")
SETTINGS = (
    "args",
    "config",
    "cfg",
    "hparams",
    "hyper_parameters",
    "hyperparameters",
    "opt",
    "train_args",
    "training_args",
    "meta",
)
"""Where scripts keep what they were told."""

LOCAL_BATCHES = (
    "local_batch_size", "per_device_train_batch_size", "per_device_batch_size", "batch_size_per_device", "batch_size_per_gpu", "per_gpu_batch_size",
    "train_micro_batch_size_per_gpu", "micro_batch_size",
)  # fmt: skip
BATCHES = ("batch_size", "train_batch_size", "global_batch_size", "total_batch_size")
RATES = ("learning_rate", "lr", "base_lr")


def entries(value: object) -> dict[str, Any]:
    """The entries of a dictionary whose keys are strings, as a dictionary of its own; empty for anything else."""
    if not isinstance(value, dict):
        return {}
    return {key: held for key, held in dict.items(value) if type(key) is str}


def settings(value: object) -> dict[str, Any]:
    """The same of a dictionary or of argparse's Namespace."""
    return entries(vars(value)) if type(value) is argparse.Namespace else entries(value)


def number(value: object) -> int | float | None:
    """A finite number, also of a tensor of one entry; None for anything else."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_quantized
        if not plain or value.device.type != "cpu" or Tensor.numel(value) != 1 or value.dtype.is_complex:
            return None
        value = Tensor.item(value)
    if type(value) is int:
        return value if abs(value) < 1 << 1000 else None
    return value if type(value) is float and math.isfinite(value) else None


def count(value: object) -> int | None:
    """A number of steps, epochs or examples; None for anything else."""
    found = number(value)
    return int(found) if found is not None and found == int(found) and 0 <= found < LARGEST_COUNT else None


def has_tensors(value: object) -> bool:
    """Whether a value is a dictionary with a tensor in it, by a name."""
    return isinstance(value, dict) and any(
        isinstance(item, Tensor) and type(key) is str for key, item in dict.items(value)
    )


def is_state_dict(value: object) -> bool:
    """Whether a value is a table of tensors: no dictionaries or lists of anything beside them."""
    return has_tensors(value) and not any(
        isinstance(item, dict | list) and not name.endswith("_extra_state") for name, item in entries(value).items()
    )


def step_in(content: Mapping[str, Any], notes: list[str]) -> int | None:
    """Steps taken, as a training state counts them."""
    found = {key: step for key in STEPS if (step := count(content.get(key))) is not None}
    if not found:
        found = {key: step for key in STEPS if (step := count(entries(content.get("meta")).get(key))) is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{key} {step}" for key, step in found.items())
        notes.append(f"it counts steps in several ways ({listed}); the first was taken")
    return next(iter(found.values()), None)


def facts_in(content: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """What a training state and the settings in it tell of the training: epoch, batch size, learning rate, number of processes."""
    tables = [dict(content), *(settings(content.get(key)) for key in SETTINGS)]
    facts: dict[str, Any] = {}
    epoch = _first((content, entries(content.get("meta"))), EPOCHS, count)
    if epoch is not None:
        facts["epoch"] = epoch
    local = _first(tables, LOCAL_BATCHES, count)
    if local:
        facts["local_batch_size"] = local
    batch = _first(tables, BATCHES, count)
    if batch:
        facts["batch_size"] = batch
        if not local:
            notes.append(
                f"it records a batch size of {batch}, but not whether that is one process's or the total; say it where a measure needs it"
            )
    processes = _first(tables, ("world_size", "num_learners"), count)
    if processes is not None and processes > 1:
        facts["num_learners"] = processes
    return facts


def rate_in(content: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The learning rate in the settings, for where there is no optimizer to tell that of this step."""
    rate = _first([dict(content), *(settings(content.get(key)) for key in SETTINGS)], RATES, number)
    if rate is None or rate <= 0:
        return {}
    notes.append(
        "the learning rate is the one that the training was told; what a schedule made of it by this step is not recorded"
    )
    return {"learning_rate": float(rate)}


def _first(tables: Iterable[Mapping[str, Any]], keys: Iterable[str], read: Any) -> Any:
    listed = list(keys)
    return next((value for table in tables for key in listed if (value := read(table.get(key))) is not None), None)
