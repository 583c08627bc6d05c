"""Tries of the importers on damaged files: an error of ours, or learners; within bounds of time and memory; nothing run, nothing written."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from landscape.checkpoints.assemble import readable
from landscape.checkpoints.find import entries, find
from tests.checkpoints.corpus import CORPUS, place_of
from tests.checkpoints.mutation import mutate

LONGEST = 10.0
"""Seconds within which a try must end."""

ROOM = 512 << 20
"""Bytes of address space that a try may take beyond what the process has."""


@dataclass
class Tally:
    """What became of tries.

    Attributes:
        tries: how many.
        refused: with an error of ours.
        read: in spite of the damage (to what does not matter, or to tensor data that carry no checksum).
        slowest: seconds of the slowest.
        failures: (number of the try, what was changed, what happened) of those that broke a promise.
    """

    tries: int = 0
    refused: int = 0
    read: int = 0
    slowest: float = 0.0
    failures: list[tuple[int, str, str]] = field(default_factory=list)


class TooLong(BaseException):
    """Not an Exception, so that nothing catches it."""


def fuzz(name: str, numbers: range, folder: Path, *, bounded: bool = False) -> Tally:
    """Try a format on so many damaged checkpoints, each determined by its number.

    Args:
        name: in CORPUS.
        numbers: of the tries.
        folder: to work in.
        bounded: limit the process's address space too; for a process of its own.
    """
    whole = folder / "whole"
    whole.mkdir(parents=True)
    CORPUS[name](whole)
    marker, tally = folder / "marker", Tally()
    _read(place_of(whole))
    if bounded:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    for number in numbers:
        rng = random.Random(f"{name} {number}")
        work = folder / "work"
        shutil.copytree(whole, work)
        changed = mutate(work, rng, marker)
        around = sorted(p.name for p in folder.iterdir())
        start = time.monotonic()
        try:
            with _within(LONGEST), warnings.catch_warnings():
                warnings.simplefilter("error")
                _read(place_of(work) if any(work.iterdir()) else work)
            tally.read += 1
        except ValueError as error:
            tally.refused += 1
            if len(str(error)) > 20_000:
                tally.failures.append((number, changed, f"a message of {len(str(error))} characters"))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            tally.failures.append((number, changed, f"{type(error).__name__}: {str(error)[:300]}"))
        tally.slowest = max(tally.slowest, time.monotonic() - start)
        tally.tries += 1
        if marker.exists() or sorted(p.name for p in folder.iterdir()) != around:
            tally.failures.append((number, changed, "something was run or written"))
            marker.unlink(missing_ok=True)
        shutil.rmtree(work)
    return tally


def _read(path: Path) -> None:
    for entry in entries([path]):
        readable(find(entry)).read()


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
