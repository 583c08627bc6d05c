"""Curvature beside pyhessian and curvlinops: same model, data, type and threads, one run, in turn.

    python -m tests.benchmarks.bench_curvature [products] [eigenpairs] [density] [scaling] [preflight]

Parts that are not named keep what was stored before. Every residual below is |H u - lambda u| by the same exact operator, whoever
found the pair.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

import landscape as ls
from landscape.curvature.operators import SymmetricOperator
from landscape.models.mlp import mlp
from tests.benchmarks.networks import digits, images, resnet18
from tests.benchmarks.timing import RESULTS, seconds, side_by_side, store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Batches = list[tuple[Tensor, Tensor]]
LOSS = nn.CrossEntropyLoss()


class Problem:
    """A network, its batches, and the same Hessian as each tool has it."""

    def __init__(self, name: str, model: nn.Module, data: Batches, *, train_steps: int) -> None:
        self.name = name
        self.model = model.to(DEVICE)
        self.data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in data]
        optimiser = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        for step in range(train_steps):  # away from initialisation, where spectra have outliers
            x, y = self.data[step % len(self.data)]
            optimiser.zero_grad()
            LOSS(self.model(x), y).backward()
            optimiser.step()
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.params)
        self.objective = ls.Objective(self.model, LOSS, self.data)
        self.named = {n: p.detach() for n, p in self.model.named_parameters()}

    def gradient(self) -> None:
        """One full-data gradient by plain autograd."""
        for x, y in self.data:
            torch.autograd.grad(LOSS(self.model(x), y), self.params)

    def ours(self, **options: Any) -> SymmetricOperator:
        """Our Hessian."""
        return ls.hessian(self.objective, self.named, **options)

    def pyhessian(self) -> Any:
        """pyhessian's object."""
        from pyhessian import hessian

        return hessian(self.model, LOSS, dataloader=self.data, cuda=DEVICE == "cuda")

    def curvlinops(self) -> Any:
        """curvlinops' operator."""
        from curvlinops import HessianLinearOperator

        return HessianLinearOperator(self.model, LOSS, self.params, self.data, check_deterministic=False)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as pyhessian takes it."""
        return list(self.objective.model.layout.split(vector).values())


def problem(name: str, *, train: bool = True) -> Problem:
    """One of the networks of the table."""
    torch.manual_seed(0)
    if name == "mlp":
        x, y = digits()
        return Problem("784-50-50-10, 5,000 digits in 5 batches", mlp((784, 50, 50, 10), "relu"), batches(x, y, 1000), train_steps=100 * train)  # fmt: skip
    width, count, size = (64, 10_000, 500) if name == "resnet18" else (16, 256, 128)
    x, y, source = images(count)
    return Problem(f"ResNet-18 of width {width}, {count} {source} images in batches of {size}", resnet18(width), batches(x, y, size), train_steps=30 * train)  # fmt: skip


def batches(x: Tensor, y: Tensor, size: int) -> Batches:
    """Consecutive batches."""
    return list(zip(x.split(size), y.split(size), strict=True))


def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
    """pyhessian's backward(create_graph=True) warns of its own reference cycle."""

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return run


def keeping(calls: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """The same calls, each putting what it returned last into a dictionary."""
    results: dict[str, Any] = {}

    def keep(name: str) -> Callable[[], Any]:
        def run() -> None:
            results[name] = calls[name]()

        return run

    return results, {name: keep(name) for name in calls}


def products(name: str) -> dict[str, Any]:
    """Hessian-vector products in units of a full-data gradient."""
    goals = {"mlp": 1.6, "resnet-narrow": 2.6}
    p = problem(name)
    vector = torch.randn(p.size, device=DEVICE)
    block = torch.randn(p.size, 4, device=DEVICE)
    kept, anew, gauss_newton = p.ours(), p.ours(memory_budget=0), ls.ggn(p.objective, p.named)
    theirs, other = p.pyhessian(), p.curvlinops()
    calls = {
        "gradient": p.gradient,
        "ours": lambda: kept @ vector,
        "ours, graphs not kept": lambda: anew @ vector,
        "ours, 4 vectors": lambda: kept @ block,
        "ours, 4 vectors, graphs not kept": lambda: anew @ block,
        "ours, Gauss-Newton": lambda: gauss_newton @ vector,
        "pyhessian": quiet(lambda: theirs.dataloader_hv_product(p.split(vector))),
        "curvlinops": lambda: other @ vector,
    }
    found = side_by_side(calls, rounds=30 if name == "mlp" else 5, warmup=1)
    reference = kept @ vector
    flat = torch.cat([t.flatten() for t in quiet(lambda: theirs.dataloader_hv_product(p.split(vector)))()[1]])
    gap = float((reference - flat).norm() / reference.norm())
    print(f"\n{p.name}, d = {p.size:,}; goal {goals.get(name)}; relative difference from pyhessian {gap:.1e}")
    for call, row in found.items():
        print(
            f"  {call:34s}{row['ms']:10.1f} ms{row['ratio']:8.2f}  [{row['ratio_lower_quartile']:.2f}, {row['ratio_upper_quartile']:.2f}]"
        )
    return {
        "problem": p.name,
        "num_parameters": p.size,
        "goal": goals.get(name),
        "difference_from_pyhessian": gap,
        **found,
    }


def eigenpairs(name: str) -> dict[str, Any]:
    """The top 5 eigenpairs, each tool at its own tolerance of 1e-3."""
    p = problem(name)
    exact = p.ours()

    def residuals(values: np.ndarray, vectors: Tensor) -> list[float]:
        images = exact @ vectors
        gaps = (images - vectors * torch.as_tensor(values, dtype=vectors.dtype, device=vectors.device)).norm(dim=0)
        return [float(g / abs(v)) for g, v in zip(gaps, values, strict=True)]

    def ours(**options: Any) -> Any:
        found = ls.top_eigenpairs(p.ours(), 5, tol=1e-3, **options)
        return found.values, found.vectors, found.num_matvecs

    def theirs() -> Any:
        tool = p.pyhessian()
        count = [0]
        product = tool.dataloader_hv_product

        def counted(v: list[Tensor]) -> Any:
            count[0] += 1
            return product(v)

        tool.dataloader_hv_product = counted
        torch.manual_seed(0)
        values, vectors = tool.eigenvalues(maxIter=100, tol=1e-3, top_n=5)
        return np.array(values), torch.stack([torch.cat([t.flatten() for t in v]) for v in vectors], 1), count[0]

    def other() -> Any:
        count = [0]
        operator = p.curvlinops().to_scipy()

        def counted(v: np.ndarray) -> np.ndarray:
            count[0] += 1
            return operator.matvec(v)

        start = np.random.default_rng(0).standard_normal(p.size).astype(np.float32)
        wrapped = LinearOperator(operator.shape, matvec=counted, dtype=np.float32)
        values, vectors = eigsh(wrapped, k=5, which="LA", tol=1e-3, v0=start)
        order = np.argsort(-values)
        return values[order], torch.from_numpy(vectors[:, order].copy()).to(DEVICE), count[0]

    calls = {"ours": ours, "ours, not certified": lambda: ours(miss_probability=1.0), "pyhessian": quiet(theirs), "curvlinops + eigsh": other}  # fmt: skip
    results, kept = keeping(calls)
    found = side_by_side(kept, rounds=5 if name == "mlp" else 1, warmup=1 if name == "mlp" else 0)
    row: dict[str, Any] = {
        "problem": p.name,
        "num_parameters": p.size,
        "goals": {"pyhessian": 5.0, "curvlinops + eigsh": 3.0},
    }
    print(f"\ntop 5 eigenpairs, {p.name}")
    for call, timing in found.items():
        values, vectors, count = results[call]
        gaps = residuals(np.asarray(values, dtype=np.float64), vectors.to(torch.float32))
        row[call] = {
            **timing,
            "values": [float(v) for v in values],
            "relative_residuals": gaps,
            "num_matvecs": count,
        }
        print(f"  {call:22s}{timing['ms'] / 1e3:8.2f} s  x{timing['ratio']:5.2f}  {count:4d} products, worst relative residual {max(gaps):.1e}; {np.round(values, 3)}")  # fmt: skip
    return row


def small_network() -> tuple[Problem, np.ndarray]:
    """About 1,000 parameters, and the exact spectrum of its Hessian in float64."""
    torch.manual_seed(0)
    x, y = digits()
    x = torch.nn.functional.avg_pool2d(x.view(-1, 1, 28, 28), 4).flatten(1)  # 49 inputs
    p = Problem(
        "49-17-8-10, 5,000 digits in 5 batches", mlp((49, 17, 8, 10), "tanh"), batches(x, y, 1000), train_steps=200
    )
    fine = ls.Objective(p.model, LOSS, p.data, dtype=torch.float64)
    dense = ls.hessian(fine, p.named).to_dense()
    return p, np.linalg.eigvalsh(dense.cpu().numpy())


def density(name: str) -> dict[str, Any]:
    """10 probes of 50 Lanczos steps: time, and Wasserstein distance to the exact spectrum of a small network, over 5 seeds."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    p, exact = small_network() if name == "small" else (problem(name), None)
    probes, steps = 10, 50

    def ours(seed: int = 0, **options: Any) -> Any:
        found = ls.spectral_density(p.ours(), num_probes=probes, num_steps=steps, seed=seed, **options)
        atoms = np.concatenate([found.nodes.ravel(), found.outliers])
        return atoms, np.concatenate([found.weights.ravel() / probes, np.full(len(found.outliers), 1 / p.size)])

    def deflated(seed: int = 0) -> Any:
        return ours(seed, eigenpairs=ls.top_eigenpairs(p.ours(), 10, "LM", miss_probability=1.0))

    def other(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        runs = [fast_lanczos(p.curvlinops(), steps) for _ in range(probes)]
        return np.concatenate([v.cpu().numpy() for v, _ in runs]), np.concatenate([(u[0] ** 2).cpu().numpy() for _, u in runs])  # fmt: skip

    calls = {
        "ours": ours,
        "ours, 10 outliers found and taken out": deflated,
        "pyhessian": lambda seed=0: ours(seed, backend="pyhessian"),
        "curvlinops": other,
    }
    found = side_by_side(calls, rounds=1, warmup=0)
    row: dict[str, Any] = {
        "problem": p.name,
        "num_parameters": p.size,
        "num_probes": probes,
        "num_steps": steps,
        "goal": 2.0,
    }
    print(f"\ndensity, {p.name}: {probes} probes of {steps} steps")
    for call, timing in found.items():
        row[call], text = dict(timing), ""
        if exact is not None:
            atoms = [calls[call](seed) for seed in range(5)]
            distances = [wasserstein_distance(nodes, exact, np.clip(weights, 0, None)) for nodes, weights in atoms]
            row[call]["wasserstein_distances"] = distances
            text = f"W1 {np.mean(distances):.2e} (over 5 seeds, {min(distances):.1e} to {max(distances):.1e})"
        print(f"  {call:40s}{timing['ms'] / 1e3:8.2f} s  x{timing['ratio']:5.2f}  {text}")
    return row


def scaling() -> dict[str, Any]:
    """Seconds of a product over a factor of 16 in examples and in parameters, and the slope of their logarithms."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    for what in ("examples", "parameters"):
        calls = {}
        for factor in (1, 2, 4, 8, 16):
            count, hidden = (1000 * factor, 64) if what == "examples" else (2000, 64 * factor)
            x, y = torch.randn(count, 784), torch.randint(10, (count,))
            p = Problem(
                f"784-{hidden}-10, {count} examples", mlp((784, hidden, 10), "tanh"), batches(x, y, 1000), train_steps=0
            )
            vector, operator = torch.randn(p.size, device=DEVICE), p.ours()
            calls[f"{count} x {p.size}"] = lambda operator=operator, vector=vector: operator @ vector
        found = side_by_side(calls, rounds=10)
        times = [row["ms"] for row in found.values()]
        slope = float(np.polyfit(np.log([1, 2, 4, 8, 16]), np.log(times), 1)[0])
        made[what] = {"milliseconds": dict(zip(found, times, strict=True)), "log_log_slope": slope}
        print(
            f"\nproducts against {what}: {', '.join(f'{n}: {t:.1f} ms' for n, t in zip(found, times, strict=True))}; slope {slope:.2f}"
        )
    return made


def estimates(name: str) -> dict[str, Any]:
    """What preflight foresaw against what happened: time of 30 products, memory in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_curvature", f"_estimate:{name}"], capture_output=True, text=True, check=True)  # fmt: skip
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"\npreflight, {row['problem']}: seconds {row['foreseen_seconds']:.2f} foreseen, {row['seconds']:.2f} taken; "
          f"MiB {row['foreseen_mib']:.0f} foreseen, {row['mib']:.0f} taken")  # fmt: skip
    return row


def _estimate(name: str) -> None:
    p = problem(name, train=False)  # nothing else may have taken memory before
    vector = torch.randn(p.size, device=DEVICE)
    before, highest, done = _resident_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], _resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    operator = p.ours()

    def thirty() -> None:
        for _ in range(30):
            operator @ vector

    took, _ = seconds(thirty)
    done.set()
    watcher.join()
    found = ls.preflight(p.objective, p.named)
    print(json.dumps({"problem": p.name, "foreseen_seconds": found.seconds(30), "seconds": took,
                      "foreseen_mib": found.peak_bytes / 2**20, "mib": highest[0] - before}))  # fmt: skip


def _resident_mib() -> float:
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _peak_mib() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(parts: list[str]) -> None:
    """Run parts (all by default), and store them with what was stored before."""
    for part in parts:
        if part.startswith("_estimate:"):
            return _estimate(part.removeprefix("_estimate:"))
    name = f"curvature_{DEVICE}"
    path = RESULTS / f"{name}.json"
    stored = {k: v for k, v in json.loads(path.read_text()).items() if k != "provenance"} if path.exists() else {}
    networks = ["mlp", "resnet-narrow"] + (["resnet18"] if DEVICE == "cuda" else [])
    small = (
        networks if DEVICE == "cuda" else ["mlp"]
    )  # hundreds of products by each tool: too long for a residual network on a CPU
    runs: dict[str, Callable[[], Any]] = {
        "products": lambda: [products(n) for n in networks],
        "eigenpairs": lambda: [eigenpairs(n) for n in small],
        "density": lambda: [density(n) for n in ("small", *small)],
        "scaling": scaling,
        "preflight": lambda: [estimates(n) for n in networks],
    }
    for part in parts or runs:
        stored[part] = runs[part]()
        stored["peak_memory_mib"] = _peak_mib()
        store(name, stored, DEVICE)


if __name__ == "__main__":
    main(sys.argv[1:])
