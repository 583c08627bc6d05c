"""Processes that record, forked from one that has imported everything: seconds saved at every start.

Reads one JSON request a line: "job" (a function below), "arguments" (its own), "ranks" (one process each, of "size"), and maybe

    "faults"   {rank: [what, number]}: that rank is killed ("kill"), or its disk fails ("fail"), at that operation on files of the folder "out"
    "together" processes have a gloo process group
    "seconds"  after which all are killed

and answers with a line, for each process its exit status (minus the signal's number), what it returned, what it raised, its warnings, and how
many operations on files there were.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from landscape.checkpoints.recorder import save_learner
from landscape.provenance import code_version

WRITTEN = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
LOOKED_AT = {"os.listdir", "os.scandir", "shutil.rmtree"}
SETTLED = 0.06
"""Seconds after which what a process writes is later than its start by any clock's resolution."""


class Network(nn.Module):
    """All of whose weights are one number."""

    def __init__(self, value: float, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, 3)
        for tensor in self.state_dict().values():
            tensor.fill_(value)


def value(attempt: int, step: int, rank: int) -> int:
    return attempt * 10_000 + step * 10 + rank


def save(
    rank: int, size: int, out: str, attempt: int, steps: list[int], place: dict[str, Any] | None = None, width: int = 4, dtype: str = "float32",
    retry: bool = False, last: int | None = None, patience: float = 30.0,
) -> list[str]:  # fmt: skip
    """Weights that tell the attempt, the step and the rank; with `retry`, again where the disk failed; the rank `last` after another, or after
    `patience` seconds."""
    failed = []
    if rank == last:
        _wait_for_others(out, rank, patience)
    for step in steps:
        network = Network(value(attempt, step, rank), width).to(getattr(torch, dtype))
        try:
            save_learner(out, step=step, model=network, **(place or {}))
        except OSError as error:
            if not retry:
                raise
            failed.append(str(error))
            save_learner(out, step=step, model=network, **(place or {}))
    _beside(out, rank).touch()
    return failed


def _beside(out: str, rank: int) -> Path:
    """A file that is there once a process has done all it does; it lies beside `out`, where operations are not counted."""
    return Path(out).parent / f"saved-{rank}-{Path(out).name}"


def _wait_for_others(out: str, rank: int, seconds: float) -> None:
    """Until another process is through, however slow it is: one that has only marked what it wrote may still complete the step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not any(_beside(out, other).exists() for other in range(4) if other != rank):
        time.sleep(0.005)


def save_freely(rank: int, size: int, out: str, num_steps: int) -> None:
    """Each at its own pace."""
    generator = torch.Generator().manual_seed(rank)
    for step in range(num_steps):
        time.sleep(0.004 * float(torch.rand((), generator=generator)))
        save_learner(out, step=step, model=Network(value(0, step, rank)))


def save_each(rank: int, size: int, out: str, each: list[dict[str, Any]]) -> None:
    """As the entry of `each` for the rank says."""
    save(rank, size, out, **({"attempt": 0} | each[rank]))


def save_large(rank: int, size: int, out: str, mebibytes: int) -> float:
    """How many MiB more than before the process had at its peak."""
    network = nn.Linear(1024, 128 * mebibytes, bias=False)
    tied = nn.ModuleList([network, nn.Linear(1, 1), network])
    optimizer = torch.optim.SGD(tied.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[network.weight]["momentum_buffer"] = torch.ones_like(network.weight)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _peak()
    save_learner(out, step=0, model=tied, optimizer=optimizer)
    return _peak() - before


def _peak() -> float:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024  # fmt: skip


def save_sharded(rank: int, size: int, out: str) -> list[str]:
    """What is said of FSDP, in both versions, whole and in part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh("cpu", (size,))
    second, nested = Network(1), nn.Sequential(nn.Linear(3, 3), Network(1))
    fully_shard(second, mesh=mesh)
    fully_shard(nested[1], mesh=mesh)
    cases = [second, nested]
    for original in (True, False):
        inner, whole = Network(1), nn.Sequential(nn.Linear(3, 3), Network(1))
        wrapped = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=original)
        whole[1] = FullyShardedDataParallel(whole[1], device_id=torch.device("cpu"), use_orig_params=original)
        cases += [wrapped, inner, whole]
    said = []
    for case in cases:
        try:
            save_learner(out, step=0, model=case)
        except ValueError as error:
            said.append(str(error))
    return said


def save_with_parts(rank: int, size: int, out: str) -> None:
    """A ZeroRedundancyOptimizer, twice."""
    network = nn.Linear(3, 3)
    optimizer = ZeroRedundancyOptimizer(network.parameters(), torch.optim.Adam, lr=0.25)
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    for step in (0, 1):
        save_learner(out, step=step, model=network, optimizer=optimizer)


def words(rank: int, size: int, out: str) -> str:
    """The job's word."""
    from landscape.checkpoints.process import this_process

    word = str(this_process(rank, size).job)
    if dist.is_initialized():
        dist.barrier()  # rank 0 has the store
    return word


# Forking -------------------------------------------------------------------------------------------------------------


def count_operations(out: str, fault: tuple[str, int] | None) -> list[int]:
    """Count operations on files of a folder, in the list's only entry; at that of the fault, fail."""
    counted, fails = [0], fault is not None and fault[0] == "fail"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in (WRITTEN if fails else WRITTEN | LOOKED_AT):
            return
        inside = out in str(arguments[:2]) or (
            event != "open" and any(type(a) is int and a > 2 for a in arguments[1:2])
        )
        if not inside or (fails and event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        counted[0] += 1
        if fault is not None and counted[0] == fault[1]:
            if fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def child(request: dict[str, Any], rank: int, gate: int, answer: int, port: int) -> None:
    size = request["size"]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.read(gate, 1)  # until all have been forked
    time.sleep(SETTLED)
    if request.get("together"):
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    counted, returned, raised = [0], None, None
    caught: list[warnings.WarningMessage] = []
    try:
        fault = request.get("faults", {}).get(str(rank))
        counted = count_operations(request["arguments"]["out"], fault)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            returned = globals()[request["job"]](rank, size, **request["arguments"])
    except (ValueError, OSError, TypeError) as error:
        raised = f"{type(error).__name__}: {error}"
    except BaseException:
        raised = traceback.format_exc()
    os.write(answer, json.dumps([returned, raised, [str(one.message) for one in caught], counted[0]]).encode())
    os._exit(0 if raised is None else 1)


def serve(request: dict[str, Any]) -> list[list[Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gate, opened = os.pipe()
    children = []
    for rank in request["ranks"]:
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(opened)
            child(request, rank, gate, write, port)
        os.close(write)
        children.append((process, read))
    os.close(opened)
    os.close(gate)
    if "seconds" in request:
        time.sleep(SETTLED + request["seconds"])
        for process, _ in children:
            os.kill(process, signal.SIGKILL)
    answers = []
    for process, read in children:
        ready = select.select([read], [], [], 60)[0]
        content = os.read(read, 1 << 16) if ready else b""
        if not ready:
            os.kill(process, signal.SIGKILL)
        os.close(read)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        answers.append([status, *(json.loads(content) if content else [None, None, [], 0])])
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    code_version()  # which is kept: it asks git
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
