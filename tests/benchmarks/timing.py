"""Ratios measured side by side: the two sides alternate, so that a change of the machine's speed meets both."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from landscape.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def paired(
    first: Callable[[], Any], second: Callable[[], Any], *, repeats: int = 60, warmup: int = 10
) -> dict[str, float]:
    """Median times in milliseconds of both sides, and the median and quartiles of the ratio first/second, pair by pair."""

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(warmup):
        timed(first)
        timed(second)
    pairs = [(timed(first), timed(second)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "first_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "second_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": middle,
        "ratio_lower_quartile": low,
        "ratio_upper_quartile": high,
        "pairs": repeats,
    }


def side_by_side(calls: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Each call once a round, in turn; median milliseconds and, round by round, the median and quartiles of the ratio to the first call."""
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(seconds(calls[name])[0])
    found = {}
    for name in names:
        ratios = [t / base for t, base in zip(times[name], times[names[0]], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        found[name] = {"ms": 1e3 * statistics.median(times[name]), "ratio": quartiles[1], "ratio_lower_quartile": quartiles[0],
                       "ratio_upper_quartile": quartiles[2], "rounds": rounds}  # fmt: skip
    return found


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time of one call, and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_mib() -> float:
    """Largest resident memory of this process alone so far: ru_maxrss starts from the peak of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def store(name: str, content: dict[str, Any], device: str = "cpu") -> Path:
    """Write results/NAME.json with provenance."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance(device), **content}, indent=1) + "\n")
    return path
