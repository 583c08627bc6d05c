"""The noise decomposition against the arithmetic it cannot avoid, and its peak memory on a network of 10^7 parameters.

K draws for n learners need 2 n K minibatch gradients and one full gradient; the goal is 1.3 times the time of just these, each
learner's gradients in one batched pass. The memory is that of a process that imports, builds, measures and exits, less that of one that
only imports.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from torch import nn

import landscape as ls
from landscape.data.sampling import IndexSampler
from landscape.noise.decomposition import measure_noise
from tests.benchmarks.networks import digits
from tests.benchmarks.timing import paired, peak_mib, seconds, store

GOAL = 1.3
NUM_DRAWS = 16


def learners_of(objective: ls.Objective, count: int, spread: float = 0.01) -> ls.Learners:
    """Learners around the initial weights."""
    start = objective.model.initial_weights()[0]
    weights = torch.empty(count, len(start), dtype=start.dtype)
    for row in weights:
        row.normal_(0, spread, generator=torch.Generator().manual_seed(len(row))).add_(start)
    return ls.Learners(0, weights, objective.model.layout)


def arithmetic(num_learners: int, batch: int) -> dict[str, Any]:
    """measure_noise over its bare gradients."""
    inputs, targets = digits()
    net = nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))
    objective = ls.Objective(net, nn.CrossEntropyLoss(), (inputs, targets))
    learners = learners_of(objective, num_learners)
    sampler = IndexSampler([0], num_learners, batch, len(inputs))
    mean, stacked = learners.mean.expand(num_learners, -1), learners.weights
    points = learners.mean + learners.deviations  # given, so that no exact prediction is asked for

    def whole() -> None:
        measure_noise(
            objective, learners, learning_rate=0.1, local_batch_size=batch, num_draws=NUM_DRAWS, points=lambda draw: points
        )  # fmt: skip

    def bare() -> None:
        objective.gradient(learners.mean)
        for draw in range(NUM_DRAWS):
            indices = sampler.indices(draw)
            objective.minibatch_gradients(stacked, indices)
            objective.minibatch_gradients(mean, indices)

    return {"num_learners": num_learners, "local_batch_size": batch, "num_draws": NUM_DRAWS, "goal": GOAL, **paired(whole, bare, repeats=9, warmup=2)}  # fmt: skip


def large_network(gib: float) -> None:
    """In a process of its own: measure_noise on 10^7 parameters within a budget; prints the rise of memory and the time."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    base = peak_mib()
    net = nn.Sequential(nn.Linear(784, 5000), nn.ReLU(), nn.Linear(5000, 1210), nn.ReLU(), nn.Linear(1210, 10))
    inputs = torch.rand(2000, 784, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(2000) % 10
    budget = int(gib * 2**30)
    objective = ls.Objective(net, nn.CrossEntropyLoss(), (inputs, targets), memory_budget=budget // 8)
    del net
    learners = learners_of(objective, 6)
    held = peak_mib() - base
    took, found = seconds(lambda: measure_noise(objective, learners, learning_rate=0.1, local_batch_size=32, num_draws=16, memory_budget=budget // 8))  # fmt: skip
    print(objective.num_parameters, held, peak_mib() - base, took, float(found["identity_error"]))


def memory(gib: float = 1.0) -> dict[str, Any]:
    """The process above."""
    code = f"from tests.benchmarks.bench_noise import large_network; large_network({gib})"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    names = ("num_parameters", "mib_with_learners_built", "peak_mib_above_import", "seconds", "identity_error")
    return {"budget_mib": gib * 1024, "num_learners": 6, "num_draws": 16, "local_batch_size": 32, **dict(zip(names, map(float, out), strict=True))}  # fmt: skip


def main() -> None:
    """Print and store the tables."""
    rows = [arithmetic(n, b) for n, b in ((6, 1000), (16, 64))]
    for row in rows:
        print(f"n={row['num_learners']:3d} B={row['local_batch_size']:5d}: {row['first_ms']:.0f} ms over {row['second_ms']:.0f} ms, ratio {row['ratio']:.2f} (goal {GOAL})")  # fmt: skip
    large = memory()
    print(f"{large['num_parameters']:.3g} parameters: {large['peak_mib_above_import']:.0f} MiB above the imports (budget {large['budget_mib']:.0f}), {large['seconds']:.0f} s")  # fmt: skip
    print(f"stored {store('noise_cpu', {'decomposition': rows, 'large_network': large}).name}")


if __name__ == "__main__":
    main()
