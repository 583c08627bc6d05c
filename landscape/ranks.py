"""The processes of one program: torchrun's ranks, or one process alone.

Rendezvous, restarts, process groups and collectives are torch.distributed's: gloo between CPUs, NCCL between GPUs (with gloo beside it for
what lies on the host). This is only what the program asks of them: who am I, what is my share, and does everybody agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

DEFAULT_TIMEOUT = 300.0
"""Seconds that a process waits for another before it gives up."""


class AgreedError(ValueError):
    """A mistake or failure that all ranks raise alike, so that one of them can tell it."""


class LostRankError(ConnectionError):
    """Another process is gone, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the program.

    Attributes:
        rank: 0 to size - 1.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what is written once, and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of range(count): consecutive, as even as may be, the first ranks one more.

        >>> [list(Ranks(r, 3).share(7)) for r in range(3)]
        [[0, 1, 2], [3, 4], [5, 6]]
        """
        whole, more = divmod(count, self.size)
        first = self.rank * whole + min(self.rank, more)
        return range(first, first + whole + (self.rank < more))

    def shares(self, count: int) -> list[range]:
        """Every rank's part of range(count)."""
        return [Ranks(r, self.size).share(count) for r in range(self.size)]

    def collect(self, value: T) -> list[T]:
        """Every rank's value, on every rank; small picklable things between processes that trust each other."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for all."""
        self.collect(None)

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Within, a ValueError or OSError of any rank becomes the same AgreedError on all; no collective may be called within."""
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.size == 1:
                raise
            failure = error
        if self.size == 1:
            return
        told = self.collect(None if failure is None else str(failure))
        failed = [r for r, text in enumerate(told) if text is not None]
        if failed:
            different = dict.fromkeys(told[r] for r in failed)
            where = "" if len(failed) == self.size else f" (rank {', '.join(map(str, failed))} of {self.size})"
            raise AgreedError("; ".join(str(text) for text in different) + where) from failure


def current() -> Ranks:
    """The ranks of the process group that is set up; one process where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def launched() -> Ranks:
    """The ranks that torchrun (or whoever set its variables) announced, whether or not they have met."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def was_restarted() -> bool:
    """Whether torchrun started these processes anew after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(device: str) -> str:
    """The device of this process: cuda becomes cuda:K, K the process's number on its machine.

    >>> local_device("cpu")
    'cpu'
    """
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def started(device: str = "cpu", timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """Within, the processes that torchrun launched can speak to each other; a process group that exists already is used and kept.

    Args:
        device: cpu or cuda: what the processes compute on.
        timeout: seconds to wait for another process, at the start and later.

    Raises:
        ConnectionError: the others did not come, or the port is taken; LostRankError when one is lost later.
    """
    if current().size > 1 or launched().size == 1:
        with telling_lost_ranks():
            yield current()
        return
    here = launched()
    cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(torch.device(local_device(device)))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        reason = _first_line(error)
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            reason = "the port is in use by another program; give torchrun another --master-port"
        elif "imed out" in str(error):
            reason = f"not all {here.size} processes came within {timeout:g} s; start as many as WORLD_SIZE says, on machines that reach each other"  # fmt: skip
        raise ConnectionError(
            f"rank {here.rank} of {here.size} could not meet the others at {where}: {reason}"
        ) from error
    try:
        with telling_lost_ranks():
            yield current()
    finally:
        dist.destroy_process_group()


@contextmanager
def telling_lost_ranks() -> Iterator[None]:
    """Within, what torch raises when another process dies or hangs becomes a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if current().size == 1 or not any(sign in text for sign in _SIGNS_OF_LOSS):
            raise
        raise LostRankError(
            f"another process is gone or does not answer ({_first_line(error)}); restart with --resume from the last whole checkpoint"
        ) from error


_SIGNS_OF_LOSS = ("onnection closed by peer", "onnection reset by peer", "imed out", "roken pipe", "remote process exited", "NCCL error", "onnection refused")  # fmt: skip


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[.*?\] ", "", line).split(". This is typically")[0]  # gloo's source position, and its advice
