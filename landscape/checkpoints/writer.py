"""Writing the run format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from landscape.checkpoints.format import (
    ASIDE_PREFIX,
    CHECKPOINTS,
    FORMAT_VERSION,
    METRICS_FILE,
    RUN_FILE,
    STATE_FILE,
    TEMPORARY_PREFIX,
    seal,
    shard_name,
    step_name,
    sync_folder,
    write_atomically,
    write_synced,
)
from landscape.functional import FunctionalModel
from landscape.ranks import current
from landscape.training.state import LearnerState


class RunWriter:
    """Writes one run directory, all processes of the run together: each its own learners, the first what is written once.

    Args:
        path: the run directory; made if missing.
        record: the content of run.json (task, config, provenance ...).
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.ranks = path, current()
        self.record = {"format": "landscape-run", "format_version": FORMAT_VERSION, **record}
        self._metrics: TextIO | None = None
        with self.ranks.agree():
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            if self.ranks.leads:
                for left in (path / CHECKPOINTS).glob(f"{TEMPORARY_PREFIX}*"):  # of a writer that was killed
                    shutil.rmtree(left)

    def write_record(self, **changes: Any) -> None:
        """Write run.json, with changes to it."""
        self.record.update(changes)
        if self.ranks.leads:
            with told("the record of the run", self.path / RUN_FILE):
                write_atomically(self.path / RUN_FILE, seal(self.record))

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines of metrics.jsonl from a step on, and one cut short: what a run resumed at that step will log again."""
        path = self.path / METRICS_FILE
        if not self.ranks.leads or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["step"] < step:
                kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())

    def append_metrics(self, entry: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; non-finite numbers become null."""
        if not self.ranks.leads:
            return
        with told(f"the metrics of step {entry['step']}", self.path / METRICS_FILE):
            if self._metrics is None:
                self._metrics = open(self.path / METRICS_FILE, "a")  # noqa: SIM115 - closed by close()
            self._metrics.write(json.dumps(_finite(entry)) + "\n")
            self._metrics.flush()

    def close(self) -> None:
        """Close metrics.jsonl; a line that could not be written has been told of."""
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            with suppress(OSError):
                metrics.close()

    def save_checkpoint(
        self,
        state: LearnerState,
        model: FunctionalModel,
        facts: dict[str, Any],
        *,
        held: range | None = None,
        num_learners: int | None = None,
    ) -> Path:
        """Write a checkpoint of all learners, whole or not at all; every process writes those that it holds.

        Args:
            state: the learners held here, of one replica.
            model: tells the names.
            facts: what else state.json holds (learning rate, local batch size ...).
            held: which learners these are; by default all there are.
            num_learners: how many there are in all; by default those held.

        Raises:
            OSError: it could not be written, on this or, as an AgreedError, on another process; earlier checkpoints are untouched.
        """
        ranks, final = self.ranks, self.path / CHECKPOINTS / step_name(state.step)
        held = range(len(state.params)) if held is None else held
        count = len(state.params) if num_learners is None else num_learners
        exists, number = ranks.collect((final.exists(), os.getpid()))[0]
        if exists:
            return final
        beside = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{number}")
        try:
            with ranks.agree(), told(f"the checkpoint of step {state.step}", final):
                if self._metrics is not None:
                    os.fsync(self._metrics.fileno())  # no later than the checkpoint from which a resumed run adds lines
                beside.mkdir(exist_ok=ranks.size > 1)
                files: dict[str, dict[str, Any]] = {}
                for i, learner in enumerate(held):
                    files |= write_learner(beside, learner, count, _tensors_of(state, i, model))
                sync_folder(beside)
            record = {
                "step": state.step,
                "num_learners": count,
                "parameters": [[n, list(s)] for n, s in zip(model.layout.names, model.layout.shapes, strict=True)],
                "buffers": sorted(state.buffers),
                "momentum": state.momentum is not None,
                **facts,
                "files": {name: entry for some in ranks.collect(files) for name, entry in some.items()},
            }
            with ranks.agree(), told(f"the checkpoint of step {state.step}", final):
                if ranks.leads:
                    publish(beside, final, record)
        except BaseException:
            if ranks.leads:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        return final


@dataclass(frozen=True)
class LearnerTensors:
    """What is written of one learner.

    Attributes:
        weights: exactly the names of the module's state_dict.
        momentum: momentum buffers by parameter name, if there are any.
        moments: Adam's running averages, torch's name of each -> by parameter name.
    """

    weights: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def write_learner(folder: Path, index: int, count: int, tensors: LearnerTensors) -> dict[str, dict[str, Any]]:
    """Write one learner's files into a folder, and wait until they are on disk.

    Returns:
        sizes and checksums by file name, for state.json.

    Cost: one pass over the tensors, which are written and hashed piece by piece; on the host a copy of one tensor at a time, where it lies on
    a device or is not contiguous.
    """
    moments = {f"{moment}/{n}": t for moment, held in tensors.moments.items() for n, t in held.items()}
    contents = {"learner": tensors.weights, "optimizer": {**(tensors.momentum or {}), **moments}}
    names = {kind: shard_name(kind, index, count) for kind, held in contents.items() if held}
    return {name: _write_tensors(folder / name, contents[kind]) for kind, name in names.items()}


def publish(folder: Path, final: Path, record: dict[str, Any]) -> None:
    """Complete a checkpoint, all of whose files lie in `folder`, by its state.json, and let it appear under its name.

    A checkpoint that has the name already is replaced: it is moved aside, to come back if the new one cannot take its place.
    """
    header = {"format": "landscape-checkpoint", "format_version": FORMAT_VERSION}
    write_synced(folder / STATE_FILE, seal({**header, **record}))
    sync_folder(folder)
    aside = final.with_name(f"{ASIDE_PREFIX}{final.name}")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(folder, final)
    except OSError:
        with suppress(FileNotFoundError):
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def told(what: str, path: Path) -> Iterator[None]:
    """Within, an OSError says what could not be written."""
    try:
        yield
    except OSError as error:
        text = f"{what} could not be written ({error.strerror}); earlier checkpoints are untouched"
        raise OSError(error.errno, text, str(path)) from error


def _tensors_of(state: LearnerState, i: int, model: FunctionalModel) -> LearnerTensors:
    weights = model.state_dict(state.params[i], {n: b[i] for n, b in state.buffers.items()})
    return LearnerTensors(weights, None if state.momentum is None else model.layout.split(state.momentum[i]))


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file: the length of a header, the header (types, shapes and places), and the numbers, wide types first.

    safetensors' own writer takes all tensors on the host at once, and refuses those that share memory.

    Returns:
        its size and checksum.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ends = list(accumulate(tensors[name].numel() * tensors[name].element_size() for name in names))
    places = {
        name: {"dtype": _type(name, tensors[name]), "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        for name, start, end in zip(names, [0, *ends], ends, strict=False)
    }
    header = json.dumps(places, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    checksum = hashlib.sha256()
    with open(path, "wb") as file:
        head = memoryview(len(header).to_bytes(8, "little") + header)
        for content in chain([head], map(partial(_numbers, tensors), names)):
            for start in range(0, len(content), PIECE):
                checksum.update(content[start : start + PIECE])
                file.write(content[start : start + PIECE])
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(header) + (ends[-1] if ends else 0), "sha256": checksum.hexdigest()}


PIECE = 1 << 22
"""Bytes that are hashed and written at a time."""

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""What safetensors calls them."""


def _type(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in TYPES or tensor.layout != torch.strided or tensor.is_meta:
        where = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a tensor of {str(tensor.dtype).removeprefix('torch.')} ({where}), which safetensors files cannot hold")  # fmt: skip
    return TYPES[tensor.dtype]


def _numbers(tensors: Mapping[str, Tensor], name: str) -> memoryview:
    """The bytes of a tensor, a copy only if it is on a device or not contiguous."""
    flat = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride() != (1,):  # one number counts as contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return memoryview(flat.view(torch.uint8).numpy())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
