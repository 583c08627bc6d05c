"""The processes of one program: torchrun's ranks, or one process alone.

Rendezvous, restarts, process groups and collectives are torch.distributed's: gloo between CPUs, NCCL between GPUs (with gloo beside it for
what lies on the host). This is only what the program asks of them: who am I, what is my share, and does everybody agree.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

DEFAULT_TIMEOUT = 300.0
"""Seconds that a process waits for another before it gives up."""


class AgreedError(ValueError):
    """A mistake or failure that all ranks raise alike, so that one of them can tell it."""

    alike = True


class LostRankError(ConnectionError):
    """Another process is gone, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the program.

    Attributes:
        rank: 0 to size - 1.
        size: how many there are.
        group: their process group; None for torch's default one, and for one process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

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
        dist.all_gather_object(found, value, group=self.group)
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


def refuse_several(what: str) -> None:
    """Refuse work that is for one process: several would do it all at once, in the same place."""
    if max(current().size, launched().size) > 1:
        raise AgreedError(f"{what} runs in one process; start it without torchrun")


def launch() -> str | None:
    """What the processes that one torchrun starts on a machine have in common, also with those that it starts anew; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    logs = error_file.parts[:-3]  # of LOGS/attempt/rank/error.json; LOGS is this launch's alone
    return hashlib.sha256("\n".join([socket.gethostname(), str(os.getppid()), *logs]).encode()).hexdigest()[:16]


def tells(error: BaseException) -> bool:
    """Whether this process is the one to tell the user of an error: the first rank of what all raise alike, else who met it first."""
    return launched().leads if getattr(error, "alike", False) else _TOLD not in getattr(error, "__notes__", [])


def local_device(device: str) -> str:
    """The device of this process: cuda becomes cuda:K, K the process's number on its machine.

    >>> local_device("cpu")
    'cpu'
    """
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


@contextmanager
def started(device: str = "cpu", timeout: float | int = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
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
    if not 0 < timeout < math.inf:
        raise AgreedError(f"timeout must be a positive number of seconds, not {timeout}")
    store = _meet(device, timeout)
    try:
        with telling_lost_ranks():
            with current().agree():
                _take_gpu(device)
            yield current()
    except BaseException as error:
        if not getattr(error, "alike", False) and not _is_first_to_fail(store):
            error.add_note(_TOLD)
        raise
    finally:
        dist.destroy_process_group()


def _meet(device: str, timeout: float | int) -> Any:
    """Set up the process group; returns the part of the store, where its processes found each other, that no other group has used."""
    here, limit, store = launched(), timedelta(seconds=timeout), None
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") and torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        own = PrefixStore(f"landscape/{_name_of_group(store, here, timeout)}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError, TimeoutError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        reason = _first_line(error)
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            reason = "the port is in use by another program; give torchrun another --master-port"
        elif "imed out" in str(error) or "wait timeout" in str(error):
            reason = f"not all {here.size} processes came within {timeout:g} s; start as many as WORLD_SIZE says, on machines that reach each other"  # fmt: skip
        failure = ConnectionError(f"rank {here.rank} of {here.size} could not meet the others at {where}: {reason}")
        # without torchrun rank 0 has the store
        tells_it = store is None or (_is_first_to_fail(store) if launch() else here.leads)
        if not tells_it:
            failure.add_note(_TOLD)
        raise failure from error
    return own


def _name_of_group(store: Any, here: Ranks, timeout: float | int) -> str:
    """A name that all ranks know and no earlier group had.

    torchrun's store outlives the processes that it starts anew, and addresses of the dead ones are still in it; nor do the machines agree
    on how often they were started. So every rank asks rank 0 under a name of its own, until it has answered them all.

    Raises:
        TimeoutError: some rank did not ask in time; RuntimeError where rank 0 did not answer.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout
    if not here.leads:
        store.set(f"landscape/asks/{here.rank}", mine)
        name = str(store.get(f"landscape/answer/{mine}").decode())
        store.set(f"landscape/came/{name}/{here.rank}", "")
        return name
    missing = set(range(1, here.size))
    while missing:
        if time.monotonic() > end:
            raise TimeoutError("timed out")
        for rank in sorted(missing):
            if store.check([f"landscape/asks/{rank}"]):  # which may be its predecessor's question
                store.set(f"landscape/answer/{store.get(f'landscape/asks/{rank}').decode()}", mine)
        missing -= {rank for rank in missing if store.check([f"landscape/came/{mine}/{rank}"])}
        time.sleep(0.005)
    return mine


def _take_gpu(device: str) -> None:
    """Make cuda mean this process's own GPU."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return
    if device != "cuda":
        raise ValueError(f"of several processes each takes a GPU of its own; give device cuda, not {device}")
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK is not set, so no process knows its GPU; start them with torchrun")
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"torch sees {count} GPUs for more processes on this machine; start at most one a GPU")
    torch.cuda.set_device(number)


def _is_first_to_fail(store: Any) -> bool:
    """Whether no other process has failed before; True where the store does not answer, since its host is lost then."""
    found: list[int] = []

    def count() -> None:
        with suppress(RuntimeError):
            found.append(store.add(f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1))

    # a host that hangs never answers, whatever the store's timeout
    asking = threading.Thread(target=count, daemon=True)
    asking.start()
    asking.join(_ANSWER_TIME)
    return found in ([], [1])


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
            f"another process is gone or does not answer ({_first_line(error)}); continue with --resume from the last whole checkpoint"
        ) from error


_SIGNS_OF_LOSS = ("onnection closed by peer", "onnection reset by peer", "imed out", "roken pipe", "remote process exited", "NCCL error", "onnection refused", "wait timeout")  # fmt: skip
_TOLD = "another process failed before, and tells why"
_ANSWER_TIME = 5.0


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[.*?\] ", "", line).split(". This is typically")[0]  # gloo's source position, and its advice
