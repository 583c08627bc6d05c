"""A dictionary that a training script saved: the model in it, its optimizer, what it says of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.found import OptimizerState, Weights
from landscape.checkpoints.importers.loaded import (
    entries,
    facts_in,
    has_tensors,
    is_state_dict,
    number,
    rate_in,
    step_in,
)
from landscape.checkpoints.importers.torch_optimizer import is_optimizer, optimizer_state

MODELS = (
    "model",
    "model_state_dict",
    "state_dict",
    "model_state",
    "net",
    "net_state_dict",
    "network",
    "weights",
    "params",
    "module",
)
AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema_model_state_dict", "params_ema", "swa", "swa_model", "swa_state_dict")  # fmt: skip
OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optim_state_dict", "optimizer_states", "optimizers", "opt_state_dict", "opt", "last_optimizer_state")  # fmt: skip
BESIDE = ("scheduler", "lr_scheduler", "scaler", "criterion", "rng", "amp", "loss_fn", "sampler")
"""What holds tensors, but is no network; the beginnings of its names."""

LARGEST_TABLE = 256
"""Entries of a training state that are looked at for networks under names not listed here."""


@dataclass(frozen=True)
class State:
    """One network and what stands beside it.

    Attributes:
        weights: its tensors, container taken off, and its optimizer.
        inside: the names of the containers it was in.
        averaged: why it is an average over time, "" where nothing says so.
        step: steps taken, where recorded.
        facts: what else is recorded.
        notes: what was left out, and why.
    """

    weights: Weights
    inside: tuple[str, ...]
    averaged: str
    step: int | None
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


def state_of(content: object, path: Path, source: str) -> State | None:
    """A training state, or a bare table of tensors, taken apart; None where there is no one network in it.

    Args:
        content: what the file holds, or a part of it.
        path: the file, to check sizes against.
        source: names the part in messages.

    Raises:
        CheckpointError: tensors that are not plain, or larger than the file.
    """
    table = entries(content)
    notes: list[str] = []
    inside, found = _network(table, notes)
    if found is None:
        return None
    tensors = torch_file.tensors_of(found, path)
    optimizer, told = _optimizer(table, list(tensors), path) if inside else (None, [])
    notes += told
    step, facts = (step_in(table, notes), facts_in(table, notes)) if inside else (None, {})
    if optimizer is None and inside:
        facts |= rate_in(table, notes)
    averaged = _averaged(inside, found)
    if averaged and optimizer is not None:
        notes.append("the optimizer's state was left out: it belongs to the weights of the step, not to their average")
        facts, optimizer = {**facts, **optimizer.facts}, None
    return State(Weights(source, tensors, optimizer), inside, averaged, step, facts, tuple(notes))


def _network(table: dict[str, Any], notes: list[str]) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """The containers' names, and the table of tensors in them."""
    for names in (MODELS, AVERAGES):
        held = [name for name in names if _inner(table.get(name)) is not None]
        if held:
            chosen = _inner(table[held[0]])
            assert chosen is not None
            others = [name for name in held[1:] if table[name] is not table[held[0]]] + _unknown(table)
            averages = [name for name in AVERAGES if names is MODELS and isinstance(table.get(name), dict)]
            if averages:
                notes.append(f"an average over time is there too ({', '.join(averages)}); it was left out")
            if others:
                notes.append(f"other tables of tensors were left out: {_some(others)}")
            return (held[0], *chosen[0]), chosen[1]
    unknown = _unknown(table)
    if len(unknown) == 1:
        return (unknown[0],), entries(table[unknown[0]])
    return ((), table) if not unknown and _is_bare(table) else ((), None)


def _inner(value: object) -> tuple[tuple[str, ...], dict[str, Any]] | None:
    """A table of tensors, perhaps in one container more."""
    if has_tensors(value):
        return (), entries(value)
    for name in MODELS:
        inner = entries(value).get(name)
        if has_tensors(inner):
            return (name,), entries(inner)
    return None


def _unknown(table: Mapping[str, Any]) -> list[str]:
    """Tables of tensors under names that are not known."""
    known = (*MODELS, *AVERAGES, *OPTIMIZERS)
    listed = [name for name, value in table.items() if isinstance(value, dict) and name not in known][:LARGEST_TABLE]
    return [
        name
        for name in listed
        if not name.lower().startswith(BESIDE) and "optim" not in name.lower() and is_state_dict(table[name])
    ]


def _is_bare(table: dict[str, Any]) -> bool:
    """Whether a dictionary is itself a table of weights: of tensors alone, or with one that is no single number or has a dotted name."""
    tensors = {name: value for name, value in table.items() if isinstance(value, Tensor)}
    like_weights = any(Tensor.dim(value) > 0 or "." in name for name, value in tensors.items())
    return (
        bool(tensors)
        and (like_weights or len(tensors) == len(table))
        and not any(isinstance(table.get(name), dict | list) for name in OPTIMIZERS)
    )


def _optimizer(table: Mapping[str, Any], names: list[str], path: Path) -> tuple[OptimizerState | None, list[str]]:
    for name in OPTIMIZERS:
        if isinstance(table.get(name), dict | list | tuple):
            state, notes = optimizer_state(table[name], names, path)
            if state is not None or notes:
                return state, notes
    others = _optimizers_elsewhere(table)
    if len(others) == 1:
        where, content = next(iter(others.items()))
        state, notes = optimizer_state(content, names, path)
        return state, [*notes, f"what is under {where} was taken for the optimizer's state, by its shape"]
    if others:
        return None, [
            f"the state of {len(others)} optimizers was left out ({_some(list(others))}): only one can be told to belong to the parameters"
        ]
    unread = [
        name for name, held in table.items() if "optim" in name.lower() and isinstance(held, dict | list) and held
    ]
    return None, [
        f"what is under {_some(unread)} was not read: it is no state_dict of an optimizer of torch's"
    ] if unread else []


def _optimizers_elsewhere(table: Mapping[str, Any]) -> dict[str, Any]:
    """What has exactly the shape of an optimizer's state_dict, at the top or one level below, by where it is."""
    found: dict[str, Any] = {}
    for name, held in list(table.items())[:LARGEST_TABLE]:
        inner = list(enumerate(held)) if isinstance(held, list | tuple) else list(entries(held).items())
        places = [(name, held), *((f"{name}.{key}", value) for key, value in inner[:LARGEST_TABLE])]
        for where, value in places:
            if is_optimizer(value) and not any(value is other for other in found.values()):
                found[where] = value
    return found


def _averaged(inside: tuple[str, ...], tensors: Mapping[str, Any]) -> str:
    if "n_averaged" in tensors:
        times = number(tensors["n_averaged"])
        said = "" if times is None else f", which stands at {int(times)}"
        return f"it holds AveragedModel's counter n_averaged{said}: the weights are an average over the training, not those of one step"
    if inside and inside[0] in AVERAGES:
        return f"the weights are under {inside[0]!r}: an average over the training, not those of one step, which are not in the file"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(name[:60] for name in names[:8]) + (", ..." if len(names) > 8 else "")


def found_keys(content: object) -> str:
    """What a file holds at its top, for messages."""
    return _some(list(entries(content))) or f"{type(content).__name__}"
