"""What torch.save wrote, read without running anything in it.

Only torch's own restricted loader is used (weights_only=True), on files that were looked at first: a zip archive is mapped into memory,
so its members must lie in the file as they are, not compressed; a pickle may only name what is listed in `HARMLESS` or what torch
itself allows and is of use here, and must not be made to keep the loader busy (`pickle_bounds`).
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import pickle_bounds
from landscape.checkpoints.importers.found import Stored, regular_file
from landscape.checkpoints.importers.harmless import HARMLESS, REFUSED
from landscape.checkpoints.importers.torch_archive import STORAGES, UNTYPED

LARGEST_PICKLE = 256 << 20
"""Bytes of pickled structure, tensors not counted, beyond which a file is refused."""

ZIP_MAGIC = b"PK\x03\x04"


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as torch.save's do: a zip archive, or the pickle of versions before 1.6."""
    with open(regular_file(path), "rb") as file:
        start = file.read(16)
    return start.startswith(ZIP_MAGIC) or (start[:1] == b"\x80" and len(start) > 1 and start[1] in (2, 3, 4, 5))


def load(path: Path) -> Any:
    """The content of a file of torch.save; tensors of a zip archive are mapped, not read.

    Raises:
        CheckpointError: it is damaged, or holds types that only a full unpickling, which could run anything, would make; these are named.
    """
    zipped = _is_zip(path)
    _check(path, zipped)
    with _loading(str(path)):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def load_bytes(content: bytes, source: str) -> Any:
    """The same of a file's content, or of a part of one; `source` names it in messages."""
    zipped = content.startswith(ZIP_MAGIC)
    if zipped:
        _check_archive(io.BytesIO(content), source, len(content), io.BytesIO(content))
    else:
        _check_pickles(content, source)
    with _loading(source):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def tensors_of(mapping: object, source: Path, *, within: str = "") -> dict[str, Stored]:
    """The tensors of a loaded mapping name -> tensor; what is no tensor is left out.

    Args:
        mapping: a part of what `load` gave.
        source: its file, for messages and for the bound on sizes.
        within: put before the names in messages.

    Raises:
        CheckpointError: names that are no strings, or tensors larger than the file: views that repeat what is stored.
    """
    if not isinstance(mapping, dict):
        raise CheckpointError(
            f"{source}: {within or 'the content'} is no table of tensors but {type(mapping).__name__}"
        )
    found: dict[str, Stored] = {}
    for name, value in dict.items(mapping):  # not mapping.items: the file may have put something else there
        if not isinstance(name, str):
            raise CheckpointError(
                f"{source}: {within or 'the content'} names a tensor by {type(name).__name__}, not by a string"
            )
        if isinstance(value, Tensor):
            found[name] = stored(value, source, f"{within}{name}")
    room = 2 * source.stat().st_size + (64 << 20)
    needed = sum({(s.alias, s.shape): s.num_bytes for s in found.values()}.values())
    if needed > room:
        raise CheckpointError(
            f"{source}: its tensors would fill {needed} bytes, far more than the file has; it is not read"
        )
    return found


def stored(tensor: Tensor, source: Path, name: str) -> Stored:
    """A loaded (or mapped) tensor, dense and on the CPU, as one that is still on disk."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        kind = (
            "quantized"
            if tensor.is_quantized
            else str(tensor.layout).removeprefix("torch.")
            if tensor.layout != torch.strided
            else type(tensor).__name__
        )
        raise CheckpointError(
            f"{source}: {name} is a {kind} tensor; save a plain dense one (tensor.dequantize(), .to_dense() or .full_tensor())"
        )
    if tensor.device.type != "cpu":
        raise CheckpointError(f"{source}: {name} holds no data (it lies on the {tensor.device.type} device)")
    flat = Tensor.detach(tensor)  # not tensor.detach, as above
    storage = flat.untyped_storage()
    alias = (str(source), storage.data_ptr(), flat.storage_offset(), tuple(flat.stride())) if storage.nbytes() else None
    return Stored(flat.shape, flat.dtype, lambda: flat, alias)


def _is_zip(path: Path) -> bool:
    try:
        with open(regular_file(path), "rb") as file:
            return file.read(4) == ZIP_MAGIC
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _check(path: Path, zipped: bool) -> None:
    size = path.stat().st_size
    if zipped:
        with open(path, "rb") as file:
            _check_archive(file, str(path), size, str(path))
        return
    if size > LARGEST_PICKLE and not _begins_legacy(path):
        raise CheckpointError(f"{path} is no file of torch.save")
    with open(path, "rb") as file:
        _check_pickles(file.read(LARGEST_PICKLE), str(path))


def _begins_legacy(path: Path) -> bool:
    with open(path, "rb") as file:
        return torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in file.read(64)


def _check_archive(file: Any, source: str, size: int, given: Any) -> None:
    """Refuse an archive whose members are compressed, overlap its bounds, or whose structure names what may not be made."""
    if not zipfile.is_zipfile(file):  # which looks for the table of contents at its end alone
        raise CheckpointError(
            f"{source} is cut short, or no zip archive as torch.save writes it: it has no table of contents at its end; copy or save it again"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(m.filename.rpartition("/")[2] == "constants.pkl" for m in members):
                raise CheckpointError(
                    f"{source} is a TorchScript program, not weights; save its state_dict() with torch.save"
                )
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise CheckpointError(
                        f"{source}: {member.filename[:100]!r} is compressed, as torch.save never does; it is not read"
                    )
                if member.flag_bits & 1:
                    raise CheckpointError(f"{source}: {member.filename[:100]!r} is encrypted")
                if member.header_offset + member.file_size > size:
                    raise CheckpointError(f"{source} is cut short: {member.filename[:100]!r} ends beyond its end")
            if archive.comment or min((m.header_offset for m in members), default=1) != 0:
                raise CheckpointError(
                    f"{source} holds something beside its archive, as torch.save never writes; it is not read"
                )
            if sum(m.file_size for m in members) > size:
                raise CheckpointError(f"{source}: its members overlap; it is not read")
            pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(
                    f"{source} is a zip archive, but not of torch.save (it holds {len(pickles)} data.pkl)"
                )
            if pickles[0].file_size > LARGEST_PICKLE:
                raise CheckpointError(f"{source}: its structure alone has {pickles[0].file_size} bytes; it is not read")
            structure = archive.read(pickles[0])
    except CheckpointError:
        raise
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        NotImplementedError,
        EOFError,
        OverflowError,
        IndexError,
        UnicodeDecodeError,
    ) as error:
        raise CheckpointError(f"{source} is a damaged zip archive: {_first_line(error)}") from None
    storages = _check_pickles(structure, source, only_first=True)
    _check_storages(
        storages, {m.filename: m.file_size for m in members}, pickles[0].filename.removesuffix("data.pkl"), source
    )
    with _loading(source):  # torch reads the table of contents in its own way
        seen = torch._C.PyTorchFileReader(given).get_record("data.pkl")
    if seen != structure:
        raise CheckpointError(f"{source} is made to look different to different programs; it is not read")


def _check_pickles(content: bytes, source: str, *, only_first: bool = False) -> frozenset[pickle_bounds.Storage]:
    """Refuse pickles that name types which only a full unpickling would make, or that would keep the loader busy. Nothing is run."""
    names: set[str] = set()
    at, problem = 0, ""
    for _ in range(
        1 if only_first else 5
    ):  # of old files: a magic number, a version, the machine, the content, what is stored
        found = pickle_bounds.scan(content, at)
        names |= found.names
        at, problem = found.end, found.problem
        if problem:
            break
    blocked = names - allowed_names()
    if blocked:
        raise CheckpointError(f"{source} {_explained(blocked)}")
    if problem:
        raise CheckpointError(f"{source} is no file of torch.save, or a damaged one: {problem}")
    return found.storages


def _check_storages(
    storages: frozenset[pickle_bounds.Storage], sizes: Mapping[str, int], prefix: str, source: str
) -> None:
    """Refuse an archive that lacks numbers that its structure speaks of; the loader would take what comes after them."""
    for kind, key, count in storages:
        dtype = STORAGES.get(kind)
        expected = None if dtype is None and kind != UNTYPED else count * (1 if dtype is None else dtype.itemsize)
        there = sizes.get(f"{prefix}data/{key}")
        if there is None or (expected is not None and there != expected):
            raise CheckpointError(
                f"{source} is damaged: data/{key[:100]} has {there or 0} bytes, not the {'' if expected is None else expected} announced"
            )


def _explained(blocked: set[str]) -> str:
    """What a file holds that is not read, and what to do."""
    known = sorted({REFUSED[name] for name in blocked if REFUSED.get(name)})
    if known and all(REFUSED.get(name) for name in blocked):
        return f"holds {', '.join(known)}, which are not read"
    if any(name.startswith(("torch.distributed.tensor.", "torch.distributed._shard")) for name in blocked):
        return (
            "holds one process's shares of sharded tensors; give the files of all processes at once, or save with "
            "torch.distributed.checkpoint or full_tensor()"
        )
    listed = ", ".join(name[:100] for name in sorted(blocked)[:8]) + (", ..." if len(blocked) > 8 else "")
    return (
        f"holds more than tensors and settings: {listed}. To make these, code would have to be run that the file chooses, so it "
        "was not read. If you trust whoever wrote it, load it in the program that made it and save what is wanted alone: "
        "torch.save(model.state_dict(), 'weights.pt')"
    )


@cache
def allowed_names() -> frozenset[str]:
    """The classes and functions that a file may name, by their full names."""
    with _only_harmless():
        own = torch._weights_only_unpickler._get_user_allowed_globals()
    return frozenset(torch._weights_only_unpickler._get_allowed_globals()) - frozenset(REFUSED) | frozenset(own)


def _is_allowed(name: str) -> bool:
    return name in allowed_names()


@contextmanager
def _only_harmless() -> Iterator[None]:
    """Within, torch's loader allows what it does itself and `HARMLESS`, and nothing that the program allowed besides."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(HARMLESS)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Within, torch does not warn of old types of storage, and what it fails with is a CheckpointError."""
    try:
        with warnings.catch_warnings(), _only_harmless():
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise CheckpointError(f"{source} asks for more memory than there is") from None
    except Exception as error:  # the loader meets damage in too many ways to name
        raise CheckpointError(f"{source} cannot be read: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
