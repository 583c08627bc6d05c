"""What one save of the recorder costs, beside torch.save of the same state, both waited for until they are on disk.

python -m tests.benchmarks.bench_recorder
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import landscape as ls
from landscape.models.mlp import mlp
from tests.benchmarks.timing import side_by_side, store

ROUNDS = 9
NETWORKS = {"784-50-50-10 (42,310)": (784, 50, 50, 10), "25 million": (2000, 3500, 3500, 1500, 10)}


def trained(sizes: tuple[int, ...], kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and an optimizer after one step."""
    model = mlp(sizes, "relu")
    made: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if kind == "SGD"
        else torch.optim.Adam(model.parameters())
    )
    model(torch.randn(4, sizes[0])).square().mean().backward()
    made.step()
    return model, made


def compared(sizes: tuple[int, ...], kind: str, folder: Path) -> dict[str, Any]:
    """Milliseconds a save, and bytes written."""
    model, optimizer = trained(sizes, kind)
    steps, numbers = itertools.count(), itertools.count()

    def recorded() -> None:
        step = next(steps)
        ls.save_learner(folder / "run", step=step, model=model, optimizer=optimizer, rank=0, world_size=1)
        if step > 1:
            shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step - 2:08d}")

    def saved() -> None:
        path = folder / f"{next(numbers) % 2}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    found = side_by_side({"torch.save and fsync": saved, "save_learner": recorded}, rounds=ROUNDS)
    newest = max((folder / "run" / "checkpoints").iterdir())
    size = sum(p.stat().st_size for p in newest.iterdir())
    for row in found.values():
        row["MB_per_s"] = size / 1e3 / row["ms"]
    return {"bytes": size, **found}


def main() -> None:
    """See the module."""
    torch.manual_seed(0)
    found = {}
    for name, sizes in NETWORKS.items():
        for kind in ("SGD", "Adam"):
            with tempfile.TemporaryDirectory() as folder:
                found[f"{name}, {kind}"] = compared(sizes, kind, Path(folder))
            print(name, kind, found[f"{name}, {kind}"])
    store("recorder_cpu", found)


if __name__ == "__main__":
    main()
