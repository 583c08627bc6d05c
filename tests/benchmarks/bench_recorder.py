"""What a save costs: the recorder beside torch.save of the same weights and optimizer state, with and without waiting for the disk.

    python -m tests.benchmarks.bench_recorder [--rounds 15]

One process saves a network of 42,310 parameters (the digits') and one of 25 million, with SGD's momentum and with Adam's moments. The calls alternate,
so that a change of the disk's speed meets all. torch.save writes no checksum; `synced` waits until its file is on disk, as the recorder does for
all of its own. "beside the disk" is the recorder's time over that of writing and syncing one file of as many bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from landscape.checkpoints.recorder import save_learner
from landscape.models.mlp import mlp
from tests.benchmarks.timing import seconds, store

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "42 thousand": lambda: mlp((784, 50, 50, 10), "relu"),
    "25 million": lambda: nn.Sequential(*[nn.Linear(1250, 1250) for _ in range(16)]),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
}


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def timed(network: str, optimizer_name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Median seconds of each call."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    optimizer = OPTIMIZERS[optimizer_name](model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    path, steps = folder / "torch.pt", iter(range(10**6))
    recorded = save_learner(folder / "run", step=next(steps), model=model, optimizer=optimizer)
    size = sum(p.stat().st_size for p in recorded.glob("*.safetensors"))
    content = os.urandom(size)

    def record() -> None:
        save_learner(folder / "run", step=next(steps), model=model, optimizer=optimizer)

    def save() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)

    def save_synced() -> None:
        save()
        sync(path)

    def write() -> None:
        with open(folder / "plain", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    calls = {"recorder": record, "torch.save": save, "torch.save, synced": save_synced, "plain file, synced": write}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            spent = seconds(call)[0]
            if turn >= 2:
                times[name].append(spent)
        shutil.rmtree(folder / "run" / "checkpoints")
        for left in (path, folder / "plain"):
            left.unlink()
    found = {}
    for name, spent in times.items():
        low, middle, high = statistics.quantiles(spent, n=4)
        found[name] = {
            "seconds": middle,
            "lower_quartile": low,
            "upper_quartile": high,
            "MB_per_s": size / middle / 1e6,
        }
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["recorder"], times[name], strict=True)) for name in calls
    }
    return {"parameters": sum(p.numel() for p in model.parameters()), "bytes": size, "rounds": rounds, "calls": found, "recorder_over": ratios}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Time all and store it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args(arguments).rounds
    results = []
    for network in NETWORKS:
        for optimizer in OPTIMIZERS:
            with tempfile.TemporaryDirectory() as folder:
                row = timed(network, optimizer, rounds, Path(folder))
            results.append({"network": network, "optimizer": optimizer, **row})
            print(f"\n{network}, {optimizer}: {row['bytes'] / 1e6:.1f} MB, medians of {rounds}")
            for name, call in row["calls"].items():
                print(f"  {name:20s}{1e3 * call['seconds']:9.1f} ms{call['MB_per_s']:9.1f} MB/s{row['recorder_over'][name]:8.2f} times as long is the recorder")  # fmt: skip
    store("recorder_cpu", {"threads": torch.get_num_threads(), "saves": results})


if __name__ == "__main__":
    main()
