"""Checkpoints of landscape's own run format, as an importer sees them: every file checked against its recorded size and checksum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from landscape.checkpoints.format import STATE_FILE, STEP_PATTERN, CheckpointError, digest_of, shard_name, unseal
from landscape.checkpoints.importers.found import Found, OptimizerState, Stored, Weights
from landscape.checkpoints.naming import Names, some
from landscape.checkpoints.run_record import is_count, is_names, is_number, is_origin

FORMAT = "landscape's run format"
KNOWN = {
    "format",
    "format_version",
    "step",
    "num_learners",
    "parameters",
    "buffers",
    "momentum",
    "moments",
    "frozen",
    "imported",
    "recorded_at",
    "files",
}


def find(path: Path, which: Sequence[int] | None = None) -> Found | None:
    """A folder checkpoints/step-XXXXXXXX of a run; None if it is none.

    Args:
        path: the folder.
        which: the learners to look at; all of them by default.
    """
    if not is_checkpoint(path):
        return None
    state = read_state(path)
    count = state["num_learners"]
    models = tuple(_learner(path, state, j, count) for j in (range(count) if which is None else which))
    return Found(
        path=path,
        format=FORMAT,
        kind="learners" if count > 1 else "one model",
        models=models,
        reasons=(f"each of its {count} files holds one learner, as it was",),
        step=state["step"],
        facts={k: v for k, v in state.items() if k not in KNOWN},
    )


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of a run, or what is left of one."""
    return (path / STATE_FILE).is_file() or bool(STEP_PATTERN.fullmatch(path.name) and any(path.glob("learner-*")))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint's.
    """
    state = unseal(path / STATE_FILE)
    missing = [k for k in ("step", "num_learners", "parameters", "buffers", "momentum", "files") if k not in state]
    if missing:
        raise CheckpointError(f"{path / STATE_FILE} is not a checkpoint's: it lacks {', '.join(missing)}")
    wrong = [name for name, fits in _FITS.items() if name in state and not fits(state[name])]
    if wrong:
        raise CheckpointError(f"{path / STATE_FILE} is not a checkpoint's: {', '.join(wrong)} cannot be what it says")
    return state


def _is_parameters(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], list) and all(map(is_count, pair[1]))
        for pair in value
    )  # fmt: skip


def _is_files(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in value.values()
    )


_FITS: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "num_learners": lambda value: is_count(value) and value > 0,
    "parameters": lambda value: _is_parameters(value) and bool(value),
    "buffers": is_names,
    "frozen": is_names,
    "moments": is_names,
    "files": _is_files,
    "imported": is_origin,
    "learning_rate": is_number,
    "local_batch_size": is_count,
}
"""What each entry of state.json must be."""


def names_of(state: dict[str, Any], tensors: Mapping[str, Stored]) -> Names:
    """Which tensor is which, as state.json tells."""
    parameters, frozen = [name for name, _ in state["parameters"]], state.get("frozen", [])
    return Names(
        {n: n for n in parameters},
        {n: n for n in state["buffers"] if n in tensors},
        {n: n for n in frozen},
        (*parameters, *frozen),
    )


def _learner(folder: Path, state: dict[str, Any], index: int, count: int) -> Weights:
    name = shard_name("learner", index, count)
    needed = [*(parameter for parameter, _ in state["parameters"]), *state.get("frozen", [])]
    tensors = _tensors(folder, name, state["files"], needed)
    slots: dict[str, dict[str | int, Stored]] = {}
    if state["momentum"] or state.get("moments"):
        held = _tensors(folder, shard_name("optimizer", index, count), state["files"])
        if state["momentum"]:
            slots["momentum_buffer"] = {n: t for n, t in held.items() if "/" not in n}
        for moment in state.get("moments", []):
            slots[moment] = {n.removeprefix(f"{moment}/"): t for n, t in held.items() if n.startswith(f"{moment}/")}
    return Weights(str(folder / name), tensors, OptimizerState(slots) if slots else None)


def _tensors(
    folder: Path, name: str, files: dict[str, dict[str, Any]], needed: Sequence[str] = ()
) -> dict[str, Stored]:
    """The tensors of one file, `needed` among them; its checksum is compared before the first of them is read."""
    path, expected = folder / name, files.get(name)
    if expected is None:
        raise CheckpointError(f"{folder / STATE_FILE} does not list {name}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{path} is cut short or overlong: {size} bytes, but {expected['bytes']} were written")

    @cache
    def check() -> None:
        if digest_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one recorded when it was written")

    try:
        found = mapped(path, before=check)
        missing = [tensor for tensor in needed if tensor not in found]
        if missing:
            raise CheckpointError(f"{path} lacks {some(missing)}, which {STATE_FILE} lists")
    except CheckpointError:
        check()  # which says more
        raise
    return found


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def mapped(path: Path, before: Callable[[], None] = lambda: None) -> dict[str, Stored]:
    """The tensors of a safetensors file; `before` is called ahead of each read."""
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        listed = {name: (torch.Size(s.get_shape()), DTYPES[s.get_dtype()]) for name, s in slices.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            before()
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None

        return read

    return {name: Stored(shape, dtype, reader(name)) for name, (shape, dtype) in listed.items()}
