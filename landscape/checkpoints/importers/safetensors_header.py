"""The header of a safetensors file, checked: where its tensors lie.

A file is eight bytes, the length of the header; the header, JSON; and the tensors without gaps. The rules are those of the safetensors library, and one
more: no name twice. The library itself would map the whole file into memory, which counts as memory used while tensors are read from it, and
which ends the process where the file is cut short meanwhile; here a tensor is read from its place straight to where it is wanted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.found import LARGEST_TEXT, regular_file
from landscape.checkpoints.importers.sharded import Part
from landscape.checkpoints.importers.torch_archive import Place, opened

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

SHARDING = "DCP_SHARDING_INFO"
"""The entry of the metadata in which torch.distributed.checkpoint says which part of each tensor a file holds."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds.

    Attributes:
        path: the file.
        places: name -> where the tensor lies, in the header's order.
        metadata: what its writer noted, strings by name.
        offsets: name -> where in the whole tensor it begins, for files of torch.distributed.checkpoint; None for all others.
    """

    path: Path
    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    offsets: Mapping[str, tuple[int, ...]] | None

    def part(self, name: str, writer: int | str) -> Part:
        """One of its tensors, as a part of a tensor that may be larger."""
        place = self.places[name]
        offsets = (0,) * len(place.shape) if self.offsets is None else self.offsets[name]
        return Part(offsets, place.shape, writer, lambda: place)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the length of a header that it has room for, and a brace."""
    with opened(regular_file(path), str(path)) as file:
        start = os.pread(file, 9, 0)
        size = os.fstat(file).st_size
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def read_header(path: Path) -> Header:
    """The header of a file; no tensor is read.

    Raises:
        CheckpointError: the file is no safetensors file, cut short or damaged, or holds tensors of a type that is not read.
    """
    with opened(regular_file(path), str(path)) as file:
        size = os.fstat(file).st_size
        start = os.pread(file, 8, 0)
        length = int.from_bytes(start, "little")
        if start.startswith(b"PK\x03\x04"):
            raise CheckpointError(
                f"{path} is no safetensors file but begins as one of torch.save. torch.distributed.checkpoint's Hugging Face writer puts what is no "
                "tensor, such as a step, before the header, so that nothing can read the file; have it save tensors only"
            )
        if size < 10 or length > size - 8:
            raise CheckpointError(
                f"{path} is no safetensors file, or cut short: it has {size} bytes, and its header would have {length}"
            )
        if length > LARGEST_TEXT:
            raise CheckpointError(f"{path}: its header has {length} bytes; more than {LARGEST_TEXT} are not read")
        content = os.pread(file, length, 8)
    if len(content) != length or content[:1] != b"{":
        raise CheckpointError(f"{path} is no safetensors file: its header does not begin with a brace")
    entries = json_table(content, path)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} is damaged: its __metadata__ is no table of strings")
    spans = [_span(path, name, entry) for name, entry in entries.items()]
    _check_layout(path, spans, size - 8 - length)
    places = {name: _place(path, span, 8 + length) for name, span in zip(entries, spans, strict=True)}
    return Header(path, places, metadata, _offsets(path, metadata, places))


def json_table(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8 in which no key of any object occurs twice.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        found = json.loads(content.decode(), object_pairs_hook=_table, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: its JSON is nested too deeply") from None
    except ValueError as error:  # the decoders' errors among them
        raise CheckpointError(f"{path} is damaged: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: its JSON is no object")
    return found


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it lists {double[:100]!r} twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"it holds {text}, which is no number of JSON")


@dataclass(frozen=True)
class _Span:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def whole_numbers(value: object) -> tuple[int, ...] | None:
    """A list of non-negative integers that fit a file's size; None where it is something else."""
    if not isinstance(value, list) or len(value) > 64 or not all(type(v) is int and 0 <= v < 1 << 48 for v in value):
        return None
    return tuple(value)


def _span(path: Path, name: str, entry: object) -> _Span:
    said = entry if isinstance(entry, dict) else {}
    shape, offsets, kind = whole_numbers(said.get("shape")), whole_numbers(said.get("data_offsets")), said.get("dtype")
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(kind, str):
        raise CheckpointError(f"{path} is damaged: it does not say type, shape and place of {name[:100]!r}")
    if kind not in DTYPES:
        raise CheckpointError(
            f"{path}: {name[:100]!r} is of type {kind[:20]}, which is not read: quantised, packed or unknown to torch; save the network "
            "in float32, float16 or bfloat16"
        )
    start, stop = offsets
    if math.prod(max(length, 1) for length in shape) >= 1 << 59:  # of empty tensors; their strides would overflow
        raise CheckpointError(f"{path} is damaged: {name[:100]!r} has shape {list(shape)}")
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if stop - start != needed:
        raise CheckpointError(
            f"{path} is damaged: {name[:100]!r}, {kind} of shape {list(shape)}, needs {needed} bytes, but has those from {start} to {stop}"
        )
    return _Span(name, DTYPES[kind], shape, start, stop)


def _check_layout(path: Path, spans: Sequence[_Span], size: int) -> None:
    """Tensors lie side by side and fill the file."""
    end = 0
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        if span.start != end:
            fault = "overlaps another tensor" if span.start < end else f"leaves a gap of {span.start - end} bytes"
            raise CheckpointError(f"{path} is damaged: {span.name[:100]!r} {fault}")
        end = span.stop
    if end != size:
        fault = "cut short" if end > size else "damaged or overlong"
        raise CheckpointError(f"{path} is {fault}: its tensors have {end} bytes, but {size} follow the header")


def _place(path: Path, span: _Span, begin: int) -> Place:
    stride, step = [], 1
    for length in reversed(span.shape):
        stride.append(step)
        step *= length
    position = begin + span.start
    source = f"{path}: {span.name[:200]}"
    return Place(path, source, position, span.dtype, span.shape, tuple(reversed(stride)), position)


def _offsets(
    path: Path, metadata: Mapping[str, str], places: Mapping[str, Place]
) -> Mapping[str, tuple[int, ...]] | None:
    if SHARDING not in metadata:
        return None
    said = json_table(metadata[SHARDING].encode(errors="replace"), path)
    found = {}
    for name, place in places.items():
        entry = said.get(name)
        offsets = whole_numbers(entry.get("saved_offsets")) if isinstance(entry, dict) else None
        if offsets is None or len(offsets) != len(place.shape):
            raise CheckpointError(
                f"{path} is damaged: its {SHARDING} does not say where {name[:100]!r} belongs in the whole tensor"
            )
        found[name] = offsets
    return found
