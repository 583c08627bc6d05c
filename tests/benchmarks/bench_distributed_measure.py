"""Measuring by two processes of one thread each, against one process of two threads (the same cores) and of one (half of them).

The sides take turns round by round, in the same two processes, of which the second only waits while the first works alone. Threads of one process
wait for each other at every operation, so that what else runs on the machine slows them most: the load is stored beside the times.

    python -m tests.benchmarks.bench_distributed_measure [--rounds K]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import landscape as ls
from landscape.models import mlp
from landscape.noise.draws import draw_gradients
from landscape.noise.gram import example_gram
from landscape.ranks import current
from tests.benchmarks.networks import digits
from tests.benchmarks.timing import seconds, store

WIDTHS = {"784-50-50-10": (784, 50, 50, 10), "784-512-512-10": (784, 512, 512, 10)}
NUM_LEARNERS, BATCH, NUM_DRAWS, NUM_EXAMPLES = 6, 256, 8, 500


def network(widths: tuple[int, ...]) -> nn.Module:
    """A ReLU network with initial weights that every process draws alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mlp(widths, "relu")


def calls(widths: tuple[int, ...], group: Any) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    share: dict[str, Any] = {} if group is None else {"group": group, "shared": True}
    objective = ls.Objective(network(widths), nn.CrossEntropyLoss(), digits(), **share)
    weights = objective.model.initial_weights()[0]
    hessian = ls.hessian(objective, weights)
    vector = torch.ones_like(weights)
    points = torch.stack([weights * (1 + 0.01 * j) for j in range(NUM_LEARNERS)])
    indices = torch.arange(NUM_EXAMPLES) * (objective.num_examples // NUM_EXAMPLES)

    def draws() -> torch.Tensor:
        drawn = draw_gradients(
            objective, weights, points, num_learners=NUM_LEARNERS, local_batch_size=BATCH, num_draws=NUM_DRAWS
        )
        return drawn.at_points

    def gram() -> torch.Tensor:
        found = [part.gram for part in example_gram(objective, weights, indices)]
        return torch.stack(found).sum(0)

    return {
        "gradient": lambda: objective.gradient(weights),
        "Hessian product": lambda: hessian @ vector,
        f"{NUM_DRAWS} draws of {NUM_LEARNERS} x {BATCH}": draws,
        f"Gram matrix of {NUM_EXAMPLES}": gram,
    }


def ratios(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Median and quartiles of the time of two ranks over that of one process, round by round."""
    found = [a / b for a, b in zip(times["ranks"][1:], times[name][1:], strict=True)]
    low, middle, high = statistics.quantiles(found, n=4)
    key = f"ratio_to_two_{name}" if name == "threads" else f"ratio_to_one_{name}"
    return {key: middle, f"{key}_lower_quartile": low, f"{key}_upper_quartile": high}


def work(rank: int, folder: str, rounds: int) -> None:
    """One of the two processes; the first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = []
    for name, widths in WIDTHS.items():
        together, alone = calls(widths, dist.group.WORLD), calls(widths, None) if rank == 0 else {}
        for call, shared in together.items():
            times: dict[str, list[float]] = {"threads": [], "thread": [], "ranks": []}
            gap = 0.0
            for _ in range(rounds + 1):
                current().barrier()
                one = None
                if rank == 0:
                    torch.set_num_threads(2)
                    took, one = seconds(alone[call])
                    times["threads"].append(took)
                    torch.set_num_threads(1)
                    times["thread"].append(seconds(alone[call])[0])
                current().barrier()
                took, both = seconds(shared)
                times["ranks"].append(took)
                if one is not None:
                    gap = max(gap, float((one - both).norm() / one.norm()))
            if rank == 0:
                rows.append({
                    "network": name, "call": call, "one_process_two_threads_ms": 1e3 * statistics.median(times["threads"][1:]),
                    "one_process_one_thread_ms": 1e3 * statistics.median(times["thread"][1:]),
                    "two_ranks_one_thread_ms": 1e3 * statistics.median(times["ranks"][1:]),
                    **ratios(times, "threads"), **ratios(times, "thread"), "rounds": rounds, "relative_difference": gap,
                })  # fmt: skip
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args(arguments).rounds
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, rounds), nprocs=2)
        rows = json.loads(Path(folder, "rows.json").read_text())
    for row in rows:
        print(f"{row['network']:15s} {row['call']:22s} 2 threads {row['one_process_two_threads_ms']:8.1f} ms, 1 thread {row['one_process_one_thread_ms']:8.1f} ms, 2 ranks {row['two_ranks_one_thread_ms']:8.1f} ms, "
              f"ratios {row['ratio_to_two_threads']:.2f} and {row['ratio_to_one_thread']:.2f}, numbers within {row['relative_difference']:.1g}")  # fmt: skip
    print(f"stored {store('distributed_measure_cpu', {'load_average': os.getloadavg()[0], 'rows': rows}).name}")


if __name__ == "__main__":
    main()
