"""Processes that stay up and run blocks of steps when they are told to, so that programs on several processes are timed in turn."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from landscape.ranks import Ranks, current

Block = Callable[[int], Any]
"""Takes so many steps, the same on all processes."""

Build = Callable[..., Mapping[str, Block]]
"""Called in each process with its ranks and the crew's arguments."""


class Crew:
    """Processes of one gloo group, or one process alone. They sleep in a read of their pipe until they are told what to run.

    Args:
        build: makes the blocks, by name; a function of a module.
        arguments: passed to it after the ranks.
        size: how many processes.
        threads: of each.
    """

    def __init__(self, build: Build, *arguments: Any, size: int = 1, threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, threads, self.folder.name, build, arguments, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        self.busy: dict[str, list[float]] = {}
        self.names: list[str] = self._answers()[0]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except BrokenPipeError:
                continue  # that process is gone, and has told why
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
        self.folder.cleanup()

    def tell(self, name: str, steps: int = 1) -> list[tuple[float, float, Any]]:
        """Run a block: of each process, its seconds, those of its threads on a processor, and what the block returned."""
        for pipe in self.pipes:
            pipe.send((name, steps))
        return self._answers()

    def calls(
        self, case: int, steps: int, *, prefix: str = "", but: Sequence[str] = ()
    ) -> dict[str, Callable[[], float]]:
        """What `in_turn` is to call for a case of `of_cases`: all its blocks, some left out."""
        names = [name.split(" ", 1)[1] for name in self.names if name.startswith(f"{case} ")]
        return {prefix + name: partial(self.seconds, f"{case} {name}", steps) for name in names if name not in but}

    def seconds(self, name: str, steps: int) -> float:
        """Seconds a step of the slowest process."""
        found = self.tell(name, steps)
        self.busy.setdefault(name, []).append(sum(busy for _, busy, _ in found) / steps)
        return max(took for took, _, _ in found) / steps

    def _answers(self) -> list[Any]:
        return [pipe.recv() for pipe in self.pipes]


def _serve(
    rank: int, size: int, threads: int, folder: str, build: Build, arguments: tuple[Any, ...], pipe: Connection
) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    blocks = build(current() if size > 1 else Ranks(), *arguments)
    pipe.send(list(blocks))
    while (told := pipe.recv()) is not None:
        name, steps = told
        if size > 1:
            dist.barrier()
        begun, busy = time.perf_counter(), time.process_time()
        found = blocks[name](steps)
        pipe.send((time.perf_counter() - begun, time.process_time() - busy, found))
    if size > 1:
        dist.destroy_process_group()


def of_cases(ranks: Ranks, build: Build, cases: Sequence[tuple[Any, ...]]) -> dict[str, Block]:
    """A build that makes those of several cases, so that they share the processes; names begin with the number of the case."""
    return {f"{i} {name}": block for i, case in enumerate(cases) for name, block in build(ranks, *case).items()}


def in_turn(calls: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """What each call says it took, round by round; every other round goes backwards through them."""
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            times[name].append(calls[name]())
    return times


def ratio(times: Mapping[str, list[float]], first: str, second: str) -> dict[str, float | str]:
    """Median milliseconds of both, and median and quartiles of first/second round by round."""
    ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"first": first, "second": second, "first_ms": 1e3 * statistics.median(times[first]), "second_ms": 1e3 * statistics.median(times[second]),
            "ratio": middle, "ratio_lower_quartile": low, "ratio_upper_quartile": high, "rounds": len(ratios)}  # fmt: skip
