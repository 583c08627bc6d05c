"""Who writes a checkpoint: this process, told apart from others of its job and of jobs before it."""

from __future__ import annotations

import functools
import os
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

RESOLUTION = 0.02
"""Seconds by which the system's times of processes and files may be early."""


@dataclass(frozen=True)
class Process:
    """One of the processes that write.

    Attributes:
        rank: which learner it has.
        count: of how many.
        word: of this process alone.
        job: of all processes of its process group; None without one.
    """

    rank: int
    count: int
    word: str
    job: str | None

    def named(self, kind: str) -> str:
        """A name that no other process gives.

        >>> Process(1, 4, "c0ffee", None).named("rank")
        'rank-00001-c0ffee'
        """
        return f"{kind}-{self.rank:05d}-{self.word}"


def this_process(rank: int, count: int) -> Process:
    """The process that calls this, as one of so many."""
    return Process(rank, count, _word(os.getpid()), _job(rank, count))


@functools.lru_cache(maxsize=1)
def _word(process: int) -> str:  # a fork is another process
    return uuid.uuid4().hex


def _job(rank: int, count: int) -> str | None:
    """A word in the process group's store, if rank and count are the group's and not others that the caller made up."""
    if not (dist.is_available() and dist.is_initialized()) or (dist.get_rank(), dist.get_world_size()) != (rank, count):
        return None
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    try:
        return None if store is None else str(store.compare_set("landscape/job", "", uuid.uuid4().hex).decode())
    except dist.DistError:  # whoever kept the store has gone
        return None


def beginning(folder: Path) -> float:
    """Make a folder, and tell when this process began by the clock that dates files there."""
    now = time.time()
    folder.mkdir()
    return folder.stat().st_mtime - now + _process_start() + RESOLUTION


def _process_start() -> float:
    """When this process began, by the system's clock; where the system does not tell, when this module was loaded."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _loaded[0]
    plausible = ticks > 0 and age > time.monotonic() - _loaded[1] - RESOLUTION
    return time.time() - age if plausible else _loaded[0]


def warn_once(text: str, stacklevel: int) -> None:
    """Warn, once a process: torch's own dealing with warnings makes Python forget which it has shown."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=stacklevel + 1)


_said: set[str] = set()
_loaded = [time.time(), time.monotonic()]


def _begin_anew() -> None:
    _loaded[:] = [time.time(), time.monotonic()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
