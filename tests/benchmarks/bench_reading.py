"""How fast `read_checkpoint` reads, beside the libraries that wrote the files, and how much memory it takes beyond the result.

    python -m tests.benchmarks.bench_reading [--megabytes 1024] [--rounds 9]

All read the same files from the page cache, in turn, each in a process of its own, forked anew, as most of the time of a first reading goes into
memory that the process has not had before. safetensors' load_file maps the file and reads nothing, so that its tensors are copied out of it here;
its other backend reads them. The goal is a rate of at least each library's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from landscape import read_checkpoint
from tests.benchmarks.timing import peak_mib, store

Read = Callable[[], Any]
SHARDS = 4


def network(megabytes: int) -> dict[str, Tensor]:
    """Weights like a transformer's: large matrices of several shapes, and vectors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"attention.weight": (3072, 1024), "attention.bias": (3072,), "up.weight": (4096, 1024), "down.weight": (1024, 4096), "norm.weight": (1024,)}  # fmt: skip
    layer = sum(torch.Size(shape).numel() for shape in shapes.values()) * 4
    layers = max(1, round(megabytes * 1e6 / layer))
    return {f"layers.{i}.{n}": torch.randn(s, generator=generator) for i in range(layers) for n, s in shapes.items()}


def write(state: dict[str, Tensor], folder: Path) -> None:
    """The same weights in every format."""
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "shards").mkdir()
    names, where = list(state), {}
    for i in range(SHARDS):
        part, file = names[i::SHARDS], f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, folder / "shards" / file)
        where |= dict.fromkeys(part, file)
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save(state, folder / "model.pt")
    dcp.save(dict(state), checkpoint_id=folder / "dcp", no_dist=True)


def readers(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, dict[str, Read]]:
    """By format, ours first."""
    one, shards = folder / "model.safetensors", sorted((folder / "shards").glob("*.safetensors"))

    def copied(files: list[Path]) -> dict[str, Tensor]:
        return {n: t.clone() for file in files for n, t in safetensors.torch.load_file(file).items()}

    def distributed() -> dict[str, Tensor]:
        into = {name: torch.empty(shape) for name, shape in shapes.items()}
        dcp.load(into, checkpoint_id=folder / "dcp", no_dist=True)
        return into

    ours = "landscape.read_checkpoint"
    return {
        "safetensors": {
            ours: lambda: read_checkpoint(one),
            "safetensors load_file, copied": lambda: copied([one]),
            "safetensors load_file(backend='pread')": lambda: safetensors.torch.load_file(one, backend="pread"),
        },
        "safetensors, sharded": {
            ours: lambda: read_checkpoint(folder / "shards"),
            "safetensors load_file, copied": lambda: copied(shards),
            "safetensors load_file(backend='pread')": lambda: [
                safetensors.torch.load_file(file, backend="pread") for file in shards
            ],
        },
        "torch.save": {
            ours: lambda: read_checkpoint(folder / "model.pt"),
            "torch.load(mmap=False)": lambda: torch.load(folder / "model.pt", mmap=False, weights_only=True),
        },
        "torch.distributed.checkpoint": {
            ours: lambda: read_checkpoint(folder / "dcp"),
            "torch.distributed.checkpoint.load": distributed,
        },
    }


def apart(read: Read) -> tuple[float, float]:
    """(seconds, MiB of memory beyond what there was before, at most) of one reading, in a process of its own."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            before = peak_mib()
            start = time.perf_counter()
            result = read()
            taken = time.perf_counter() - start
            os.write(send, json.dumps([taken, peak_mib() - before]).encode())
            del result
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    taken, beyond = json.loads(text)
    return taken, beyond


def measure(calls: dict[str, Read], num_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """One row a reader: GB/s, and the ratio of its time to ours, round by round, medians and quartiles."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    beyond: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            seconds, mib = apart(call)
            if i > 0:  # the first fills the page cache
                taken[name].append(seconds)
                beyond[name].append(mib - num_bytes / 2**20)
    ours = next(iter(calls))
    rows = []
    for name in calls:
        rates = _quartiles([num_bytes / 1e9 / t for t in taken[name]])
        ratios = _quartiles([t / o for t, o in zip(taken[name], taken[ours], strict=True)])
        rows.append(
            {"reader": name, "gb_per_s": rates, "time_over_ours": ratios, "mib_beyond_result": max(beyond[name])}
        )
    return rows


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def main(arguments: list[str] | None = None) -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-store", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # before the processes are forked
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of dcp, in one process
    state = network(options.megabytes)
    num_bytes, shapes = sum(tensor.nbytes for tensor in state.values()), {name: t.shape for name, t in state.items()}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        write(state, Path(name))
        del state
        for kind, calls in readers(Path(name), shapes).items():
            found[kind] = measure(calls, num_bytes, options.rounds)
            for row in found[kind]:
                rate, ratio = row["gb_per_s"], row["time_over_ours"]
                print(f"{kind:30s}{row['reader']:42s}{rate['median']:7.2f} GB/s ({rate['lower_quartile']:.2f}-{rate['upper_quartile']:.2f})  time over ours "
                      f"{ratio['median']:5.2f} ({ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f})  {row['mib_beyond_result']:8.0f} MiB beyond", flush=True)  # fmt: skip
    if not options.no_store:
        content = {"bytes": num_bytes, "tensors": len(shapes), "rounds": options.rounds, "formats": found}
        print(f"stored {store('reading_cpu', content).name}")


if __name__ == "__main__":
    main()
