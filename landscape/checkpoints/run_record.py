"""What run.json must hold, for all that use it: a record can have the right checksum and still be no run's."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from landscape.checkpoints.format import CheckpointError
from landscape.training.config import TrainConfig


def is_count(value: object) -> bool:
    """Whether a value of JSON is a number of steps, learners or the like."""
    return type(value) is int and 0 <= value < 1 << 62


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number."""
    return type(value) in (int, float)


def is_names(value: object) -> bool:
    """Whether a value of JSON is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_origin(value: object) -> bool:
    """Whether a value of JSON is what is kept of where learners come from."""
    return (
        isinstance(value, dict)
        and all(isinstance(value[key], str) for key in ("format", "kind") if key in value)
        and all(is_names(value[key]) for key in ("reasons", "notes") if key in value)
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_matrices(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(matrix, list) and all(isinstance(row, list) for row in matrix) for matrix in value
    )


_FITS: dict[str, Callable[[Any], bool]] = {
    "format_version": is_count,
    "task": _is_text,
    "status": _is_text,
    "config": _is_table,
    "num_parameters": is_count,
    "topology": _is_table,
    "topology.name": _is_text,
    "topology.num_learners": is_count,
    "topology.kind": _is_text,
    "topology.matrices": _is_matrices,
    "topology.thresholds": lambda value: value is None or _is_table(value),
    "data": _is_table,
    "data.name": _is_text,
    "data.fingerprint": _is_table,
    "imported": is_origin,
    "imported.from": is_names,
    "assumed": is_names,
    "recorded": _is_table,
    "recorded.given": _is_table,
    "provenance": _is_table,
    "outcome": _is_table,
}
"""What each entry of run.json that is there must be; those after a dot are of a table."""


def check_record(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a record whose entries are of types that nobody writes.

    Raises:
        CheckpointError: with the file and the entries.
    """
    wrong = []
    for name, fits in _FITS.items():
        table, _, key = name.rpartition(".")
        held = record.get(table) if table else record
        if isinstance(held, Mapping) and key in held and not fits(held[key]):
            wrong.append(name)
    if wrong:
        raise CheckpointError(f"{path} is not a run's: {', '.join(wrong)} cannot be what it says")


def entry(record: Mapping[str, Any], path: Path, name: str) -> Any:
    """An entry of run.json that must be there; of a table, its name is after a dot.

    Raises:
        CheckpointError: it is missing.
    """
    found: Any = record
    for key in name.split("."):
        if not isinstance(found, Mapping) or key not in found:
            raise CheckpointError(f"{path} is damaged: it lacks {name}")
        found = found[key]
    return found


def config_of(record: Mapping[str, Any], path: Path) -> TrainConfig:
    """The configuration in run.json.

    Raises:
        CheckpointError: it is missing, or no configuration.
    """
    stored = entry(record, path, "config")
    kinds = get_type_hints(TrainConfig)
    wrong = [f"config.{name}" for name, kind in kinds.items() if name in stored and not _is_of(stored[name], kind)]
    if wrong:
        raise CheckpointError(f"{path} is not a run's: {', '.join(wrong)} cannot be what it says")
    try:
        return TrainConfig.from_json(stored)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: its config cannot be: {error}") from None


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value of JSON is of the type of a field."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    return is_number(value) if kind is float else type(value) is kind
