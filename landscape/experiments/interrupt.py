"""Ctrl-C and SIGTERM that let the work in hand reach a safe place."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType

from landscape.ranks import launched

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 2.0
"""Seconds in which a further signal counts as the same one under torchrun, which hands on what the terminal or Slurm has sent already."""


class Stopped(KeyboardInterrupt):
    """Work that was stopped at a safe place.

    Attributes:
        status: the exit status that tells by what: 130 for Ctrl-C, 143 for SIGTERM.
    """

    alike = True  # on all processes, see landscape.ranks.tells

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.status = 128 + number


class Interruptible:
    """Within this context the first Ctrl-C or SIGTERM sets `requested`; a later Ctrl-C interrupts at once.

    Outside the main thread, where signals cannot be handled, `requested` stays False. Where an error or a stop ends the work of one process
    among several, signals stay without effect for a moment more: torchrun sends SIGTERM to the others as soon as one has ended, and they
    are to end by themselves, with their own message and status.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number: int = signal.SIGTERM
        self._at = 0.0
        self._ended = math.inf
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and launched().size > 1:
            self.requested, self._at = True, time.monotonic()
            self._ended = self._at
        else:
            self._restore()

    def stopped(self, message: str) -> Stopped:
        """What to raise at the safe place; where another process was asked and this was not, as by SIGTERM."""
        return Stopped(message, self.number)

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self._ended + GRACE:
            self._restore()
            os.kill(os.getpid(), number)
            return
        grace = GRACE if launched().size > 1 else 0.0
        if self.requested and number == signal.SIGINT and time.monotonic() >= self._at + grace:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.number, self._at = True, number, time.monotonic()
