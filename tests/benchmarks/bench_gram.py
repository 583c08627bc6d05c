"""The Gram matrix of per-example gradients against a loop of backward passes, and against the product X X^T alone of gradients that are there.

    python -m tests.benchmarks.bench_gram [time] [memory]

Goals on a CPU: 2,000 digits in the 784-50-50-10 network at least 10 times faster than the loop (with its product), and within 1.5 times the product alone; the same
beside a convolutional network, whose gradients are rebuilt in blocks. Memory: the covariance spectrum of 500 examples at d = 10^7 within 1 GB above
what the imports take, in a process of its own. Parts that are not named keep what was stored before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from landscape.models.mlp import mlp
from landscape.noise.covariance import gradient_covariance_spectrum
from landscape.noise.gram import example_gram
from landscape.objective import Objective
from tests.benchmarks.networks import digits
from tests.benchmarks.timing import RESULTS, peak_mib, seconds, side_by_side, store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSS = nn.CrossEntropyLoss()


def convolutional() -> nn.Module:
    """Four layers for the digits, most of whose 89,770 parameters are in convolutions; smooth, so that rounding flips no gradient at a kink."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64),
        nn.GELU(), nn.Conv2d(64, 96, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(96 * 16, 10),
    ).eval()  # fmt: skip


def looped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Per-example gradients (m, d), one backward pass each."""
    parameters = list(model.parameters())
    rows = torch.empty(len(x), sum(p.numel() for p in parameters), device=x.device)
    for i in range(len(x)):
        found = torch.autograd.grad(LOSS(model(x[i : i + 1]), y[i : i + 1]), parameters)
        rows[i] = torch.cat([g.flatten() for g in found])
    return rows


def timed(name: str, count: int = 2000) -> dict[str, Any]:
    """One network: the Gram matrix of all layers, the loop with its product, and the product alone."""
    torch.manual_seed(0)
    x, y = (t[:count].to(DEVICE) for t in digits())
    model = (mlp((784, 50, 50, 10), "relu") if name == "mlp" else convolutional()).to(DEVICE)
    objective = Objective(model, LOSS, (x, y))
    weights = objective.model.initial_weights()[0]
    rows = looped(model, x, y)
    budget = None if DEVICE == "cuda" else 1 << 30

    def ours() -> Tensor:
        total = torch.zeros(count, count, dtype=torch.float64, device=DEVICE)
        for part in example_gram(objective, weights, memory_budget=budget):
            total += part.gram
        return total

    def loop() -> Tensor:
        gradients = looped(model, x, y)
        return gradients @ gradients.T

    calls: dict[str, Callable[[], Any]] = {"ours": ours, "loop of backward passes": loop, "product alone": lambda: rows @ rows.T}  # fmt: skip
    found = side_by_side(calls, rounds=3 if name == "mlp" else 1, warmup=1 if name == "mlp" else 0)
    lengths = rows.double().norm(dim=1)
    gap = float(((ours() - rows.double() @ rows.double().T) / (lengths[:, None] * lengths)).abs().max())
    faster = found["loop of backward passes"]["ms"] / found["ours"]["ms"]
    beside = found["ours"]["ms"] / found["product alone"]["ms"]
    print(f"\n{name}, m = {count}, d = {len(weights):,}; off by {gap:.1e} |g_i||g_k| at most")
    for call, row in found.items():
        print(f"  {call:26s}{row['ms']:10.0f} ms")
    goals = {"faster_than_loop": 10.0 if name == "mlp" else None, "over_product": 1.5}
    print(f"  {faster:.1f} times faster than the loop (goal {goals['faster_than_loop']}); {beside:.2f} of the product alone (goal 1.5)")  # fmt: skip
    return {"network": name, "num_examples": count, "num_parameters": len(weights), "goals": goals,
            "faster_than_loop": faster, "over_product": beside, "largest_difference": gap, **found}  # fmt: skip


def memory() -> dict[str, Any]:
    """The covariance spectrum of 500 examples at d = 10^7, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_gram", "_memory"], capture_output=True, text=True, check=True)  # fmt: skip
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\nm = {row['num_examples']}, d = {row['num_parameters']:,}: {row['seconds']:.1f} s, peak {row['peak_mib']:.0f} MiB above the imports' "
        f"{row['imports_mib']:.0f} MiB (goal {row['goal_mib']}); the gradients themselves would take {row['gradients_mib']:.0f} MiB"
    )
    return row


def _memory() -> None:
    before = peak_mib()
    torch.manual_seed(0)
    x, y = torch.randn(1000, 784), torch.randint(10, (1000,))
    objective = Objective(mlp((784, 2500, 2500, 700, 10), "relu"), LOSS, (x, y))
    weights = objective.model.initial_weights()[0]
    took, found = seconds(lambda: gradient_covariance_spectrum(objective, weights, num_examples=500, centre="gradient"))
    print(json.dumps({"num_examples": 500, "num_parameters": len(weights), "seconds": took, "peak_mib": peak_mib() - before, "goal_mib": 1000,
                      "imports_mib": before, "gradients_mib": 500 * len(weights) * 4 / 2**20, "trace": float(found.trace[0])}))  # fmt: skip


def main(parts: list[str]) -> None:
    """Run parts (all by default), and store them with what was stored before."""
    if parts == ["_memory"]:
        return _memory()
    name = f"gram_{DEVICE}"
    path = RESULTS / f"{name}.json"
    stored = {k: v for k, v in json.loads(path.read_text()).items() if k != "provenance"} if path.exists() else {}
    runs: dict[str, Callable[[], Any]] = {"time": lambda: [timed("mlp"), timed("convolutional")], "memory": memory}
    for part in parts or runs:
        stored[part] = runs[part]()
        store(name, stored, DEVICE)


if __name__ == "__main__":
    main(sys.argv[1:])
