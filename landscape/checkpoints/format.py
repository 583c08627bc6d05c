"""The run format, readable with safetensors, JSON and netCDF alone.

    RUN/run.json                                   task, config, seed, versions, data fingerprint, status
    RUN/metrics.jsonl                              one line a logged step
    RUN/checkpoints/step-00000100/
        learner-00000-of-00006.safetensors         exactly the module's state_dict names
        optimizer-00000-of-00006.safetensors       momentum buffers by parameter name, with momentum only
        state.json                                 step, parameter names in order, sizes and checksums of the files
    RUN/measurements.nc                            what `landscape measure` found

A checkpoint is written beside its place, synced, and renamed: it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
MEASUREMENTS_FILE = "measurements.nc"
STEP_PATTERN = re.compile(r"step-(\d{8,})")
TEMPORARY_PREFIX = ".writing-"
ASIDE_PREFIX = ".replaced-"

LARGEST_RECORD = 256 << 20
"""Bytes of run.json or state.json beyond which it is refused; the mixing matrix of 4,096 learners takes 160 MiB."""


class CheckpointError(ValueError):
    """A run or checkpoint that is damaged, incomplete, or from a newer format."""


def step_name(step: int) -> str:
    """Folder of a step's checkpoint.

    >>> step_name(100)
    'step-00000100'
    """
    return f"step-{step:08d}"


def shard_name(kind: str, index: int, count: int) -> str:
    """File of one learner.

    >>> shard_name("learner", 0, 6)
    'learner-00000-of-00006.safetensors'
    """
    return f"{kind}-{index:05d}-of-{count:05d}.safetensors"


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, whole or not at all."""
    beside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    try:
        write_synced(beside, content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def seal(record: dict[str, Any]) -> bytes:
    """A JSON record with a checksum of itself."""
    return json.dumps({**record, "checksum": _checksum(record)}, indent=1).encode()


def unseal(path: Path) -> dict[str, Any]:
    """Read a sealed JSON record, or say what is wrong with it."""
    try:
        if path.exists() and not path.is_file():  # a pipe would hang
            raise CheckpointError(f"{path} is not a regular file")
        size = path.stat().st_size
        if size > LARGEST_RECORD:
            raise CheckpointError(
                f"{path} has {size} bytes, too many for the record of a run or checkpoint; it is not read"
            )
        record = json.loads(path.read_bytes())
        checksum = record.pop("checksum")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of landscape (format {version}; this one reads up to {FORMAT_VERSION}): upgrade landscape"
        )
    if checksum != _checksum(record):
        raise CheckpointError(f"{path} is damaged: it does not match its own checksum")
    return dict(record)


def digest(content: bytes) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    return digest(json.dumps(record, sort_keys=True).encode())
