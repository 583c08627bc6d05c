"""Several learners in one file of torch.save: a list of state_dicts, a dictionary of them by number, or one of tensors stacked along a first axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.alike import check_alike
from landscape.checkpoints.importers.file_names import WORDS
from landscape.checkpoints.importers.found import Found, Weights
from landscape.checkpoints.importers.loaded import entries, facts_in, has_tensors, step_in
from landscape.checkpoints.importers.sharded import unstack
from landscape.checkpoints.importers.training_state import MODELS, State, state_of

FORMAT = "torch.save"
GROUPS = ("learners", "workers", "replicas", "ranks", "agents", "clients", "peers", "nodes", "models", "state_dicts", "model_state_dicts", "learner_states", "worker_states")  # fmt: skip
"""Under what scripts put all their learners."""

LARGEST_GROUP = 4096
"""Learners in one file."""

SMALLEST_ENTRY = 40
"""Bytes that a tensor takes in a file at least."""

_NUMBERED = re.compile(rf"(?:(?:{'|'.join(WORDS)}|model)s?[_.-]?)?(\d{{1,6}})", re.IGNORECASE)


def interpret(content: Any, path: Path) -> Found | None:
    """The learners in one file; None where there are not several, unmistakably.

    Raises:
        CheckpointError: one is missing, or they are of different networks.
    """
    table = entries(content)
    for name in GROUPS:
        if name in table:
            found = _several(table[name], path, repr(name)) or _stacked(table[name], path, name)
            if found is not None:
                return _with(found, table)
    return _several(content, path, "")


def _several(value: Any, path: Path, within: str) -> Found | None:
    """A list of networks, or a dictionary of them by number."""
    held = _listed(value, path, within)
    if held is None or not 2 <= len(held) <= LARGEST_GROUP:
        return None
    states: list[State] = []
    total, size = 0, path.stat().st_size
    for j, item in enumerate(held):
        state = state_of(item, path, f"{path}, learner {j}")
        if state is None:
            return None
        states.append(state)
        total += len(state.weights.tensors)
        if total * SMALLEST_ENTRY > size:
            raise CheckpointError(f"{path} holds the same tensors for many learners; it is not read")
    models = [state.weights for state in states]
    check_alike(models, [f"learner {j}" for j in range(len(models))], str(path))
    _check_size(models, path)
    steps = {state.step for state in states}
    if len(steps) > 1:
        raise CheckpointError(
            f"{path}: its learners are of different steps: {', '.join(str(state.step) for state in states[:20])}"
        )
    facts = {k: v for k, v in states[0].facts.items() if all(state.facts.get(k) == v for state in states)}
    where = f" under {within}" if within else ""
    return Found(
        path=path,
        format=FORMAT,
        kind="learners",
        models=tuple(models),
        reasons=(
            f"it holds {len(models)} networks{where}, one a learner, with tensors of the same names, shapes and types",
        ),
        step=steps.pop(),
        facts={**facts, "num_learners": len(models)},
        notes=tuple(dict.fromkeys(note for state in states for note in state.notes)),
    )


def _listed(value: Any, path: Path, within: str) -> Sequence[Any] | None:
    """The learners in the order of their numbers."""
    if isinstance(value, list | tuple):
        return value if value and all(isinstance(item, dict) for item in value[:LARGEST_GROUP]) else None
    if not isinstance(value, dict) or not 2 <= len(value) <= LARGEST_GROUP:
        return None
    by_number: dict[int, Any] = {}
    for key, item in dict.items(value):
        number = _number(key)
        if number is None or not isinstance(item, dict) or number in by_number:
            return None
        by_number[number] = item
    first = min(by_number)
    missing = set(range(min(first, 1), max(by_number) + 1)) - set(by_number)
    if missing:
        raise CheckpointError(
            f"{path}: of the networks{' under ' + within if within else ''} that are numbered up to {max(by_number)}, {len(missing)} are missing, "
            f"such as {min(missing)}"
        )
    return [by_number[number] for number in sorted(by_number)]


def _number(key: object) -> int | None:
    if type(key) is int:
        return key if 0 <= key < LARGEST_GROUP else None
    found = _NUMBERED.fullmatch(key) if isinstance(key, str) and len(key) < 40 else None
    return int(found[1]) if found and int(found[1]) < LARGEST_GROUP else None


def _stacked(value: Any, path: Path, name: str) -> Found | None:
    """Tensors of one leading size, under a name that says that they are of learners."""
    table = entries(value)
    inner = next((entries(table[key]) for key in MODELS if has_tensors(table.get(key))), table)
    sizes = {tuple(item.shape[:1]) for item in inner.values() if isinstance(item, Tensor)}
    if len(sizes) != 1 or name in ("models", "state_dicts", "model_state_dicts"):
        return None
    size = next(iter(sizes))
    if not size or not 1 <= size[0] <= LARGEST_GROUP:
        return None
    if size[0] * len(inner) > path.stat().st_size:
        raise CheckpointError(f"{path}: its stack of {size[0]} learners is larger than the file; it is not read")
    one = Found(path, FORMAT, "one model", (Weights(str(path), torch_file.tensors_of(inner, path)),))
    return replace(
        unstack(one, size[0]), reasons=(f"its tensors under {name!r} all begin with {size[0]}: a stack of learners",)
    )


def _with(found: Found, table: dict[str, Any]) -> Found:
    """With what stands beside the learners."""
    notes = list(found.notes)
    step = step_in(table, notes) if found.step is None else found.step
    return replace(found, step=step, facts={**facts_in(table, notes), **found.facts}, notes=tuple(notes))


def _check_size(models: Sequence[Weights], path: Path) -> None:
    needed, room = (
        sum(s.num_bytes for model in models for s in model.tensors.values()),
        2 * path.stat().st_size + (64 << 20),
    )
    if needed > room:
        raise CheckpointError(
            f"{path}: its learners would fill {needed} bytes, far more than the file has; it is not read"
        )
