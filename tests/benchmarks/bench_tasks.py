"""The paper's eighteen tasks: trained, measured and priced one by one, at a scale that two cores carry; and one step of each in its full form.

    python -m tests.benchmarks.bench_tasks [--data-root DIR] [--tasks NAME ...] [--table]

For each task: 50 steps of SSGD and of DPSGD with four learners, stacked in one process and on two processes of torchrun; at the end alpha_e and
the split of the noise; lambda_max and a spectral density; what preflight said of a product's time and memory, and what it took. Rows are kept in
results/tasks_cpu.json as they are finished; --table prints them. Each task runs in a process of its own, so that memory is its own.

ImageNet and Switchboard cannot be had here. Their networks train on ten classes of ImageNet, and on spoken digits, which is what a row's "form"
says; their full forms take a step on images of full size, and on random frames.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import landscape as ls
from landscape.curvature.preflight import preflight
from landscape.data.dataset import Examples, TensorData
from landscape.data.selection import choose
from landscape.functional import measured_norms
from landscape.provenance import code_version
from landscape.tasks import TASKS, Task, get_task
from landscape.training.loop import Program
from landscape.training.topology import topology
from tests.benchmarks.timing import RESULTS, peak_mib, seconds, store

FORMS: dict[str, tuple[str, float]] = {
    "cifar10-efficientnet-b0": ("cifar10-efficientnet-b0@width=1/4,size=16,examples=2000", 0.1),
    "cifar10-senet18": ("cifar10-senet18@width=1/8,examples=2000", 0.05),
    "cifar10-vgg19": ("cifar10-vgg19@width=1/8,examples=2000", 0.05),
    "cifar10-resnet18": ("cifar10-resnet18@width=1/8,examples=2000", 0.05),
    "cifar10-densenet121": ("cifar10-densenet121@width=1/4,size=16,examples=2000", 0.05),
    "cifar10-mobilenet": ("cifar10-mobilenet@width=1/4,examples=2000", 0.02),
    "cifar10-mobilenetv2": ("cifar10-mobilenetv2@width=1/4,size=16,examples=2000", 0.05),
    "cifar10-shufflenetv2": ("cifar10-shufflenetv2@width=1/2,size=16,examples=2000", 0.02),
    "cifar10-googlenet": ("cifar10-googlenet@width=1/8,size=16,examples=2000", 0.05),
    "cifar10-resnext29": ("cifar10-resnext29@width=1/8,size=16,examples=2000", 0.05),
    "imagenet-alexnet": ("imagenette-alexnet@width=1/4,size=64,examples=1000", 0.2),
    "imagenet-vgg11": ("imagenette-vgg11@width=1/8,size=64,examples=1000", 0.2),
    "imagenet-vgg11-bn": ("imagenette-vgg11-bn@width=1/8,size=64,examples=1000", 0.02),
    "imagenet-resnet50": ("imagenette-resnet50@width=1/8,size=64,examples=1000", 0.02),
    "imagenet-resnext50": ("imagenette-resnext50@width=1/4,size=64,examples=1000", 0.05),
    "imagenet-densenet161": ("imagenette-densenet161@width=1/4,size=64,examples=1000", 0.02),
    "swb300-blstm": ("fsdd-blstm@width=1/8", 0.2),
    "swb2000-blstm": ("fsdd-blstm@width=1/8", 0.2),
}
"""The form that is trained here, and its learning rate."""

LEARNERS, BATCH, STEPS = 4, 16, 50
MEASURED_EXAMPLES = 64
PRICED_EXAMPLES = 128


def row(name: str, data_root: str) -> dict[str, Any]:
    """Everything about one task."""
    form, rate = FORMS[name]
    task = get_task(form)
    found: dict[str, Any] = {
        "task": name, "form": form, "full_parameters": parameters(TASKS[name]), "parameters": parameters(task), "learning_rate": rate,
        "num_learners": LEARNERS, "local_batch_size": BATCH, "steps": STEPS,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for algorithm in ("ssgd", "dpsgd"):
            found[algorithm] = trained(task, algorithm, rate, data_root, Path(folder))
        found["measured"] = measured(Path(folder) / "dpsgd", task, data_root)
    found["curvature"] = priced(task, task.load_data(data_root)[0])
    found["full_step"] = full_step(name, data_root)
    return found | {"made": {**code_version(), "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())}}


def parameters(task: Task) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in task.build_model().parameters())


def config(algorithm: str, rate: float, **options: Any) -> ls.TrainConfig:
    return ls.TrainConfig(
        **{"algorithm": algorithm, "learning_rate": rate, "num_learners": LEARNERS, "local_batch_size": BATCH, "num_steps": STEPS,
           "checkpoint_every": 0, "evaluation_examples": 256, "seed": 0} | options
    )  # fmt: skip


def trained(task: Task, algorithm: str, rate: float, data_root: str, folder: Path) -> dict[str, Any]:
    """The same run on both backends."""
    run = ls.train(task, config(algorithm, rate), folder / algorithm, data_root=data_root, quiet=True)
    metrics = run.metrics
    learners = run.learners(STEPS)
    flags = {"task": task.name, "algorithm": algorithm, "learning-rate": rate, "num-learners": LEARNERS, "local-batch-size": BATCH,
             "num-steps": STEPS, "checkpoint-every": 0, "evaluation-examples": 256, "data-root": data_root,
             "out": str(folder / f"{algorithm}-2")}  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "landscape",
        "train",
        "--quiet",
    ]
    subprocess.run([*command, *(str(w) for k, v in flags.items() for w in (f"--{k}", v))], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    spread = ls.open_run(folder / f"{algorithm}-2")
    other = spread.learners(STEPS)
    apart = (learners.weights - other.weights).norm() / learners.weights.norm()
    statistics_differ = [
        name for name, b in learners.buffers.items() if name.endswith("running_mean") and bool((b[0] != b[1]).any())
    ]
    return {
        "loss_first": float(metrics["train_loss"].iloc[0]), "loss_last": float(metrics["train_loss"].iloc[-1]),
        "loss_last_two_processes": float(spread.metrics["train_loss"].iloc[-1]),
        "accuracy_last": float(metrics["train_accuracy"].iloc[-1]), "sigma_w": float(metrics["sigma_w"].iloc[-1]),
        "sigma_w_two_processes": float(spread.metrics["sigma_w"].iloc[-1]), "weights_apart": float(apart),
        "batch_norms": len(measured_norms(task.build_model())), "batch_norms_that_differ": len(statistics_differ),
        "seconds_per_step": step_seconds(task, config(algorithm, rate), data_root),
    }  # fmt: skip


def step_seconds(task: Task, c: ls.TrainConfig, data_root: str) -> float:
    """Median over steps of one process."""
    program = Program(task, c, topology(c.topology, c.num_learners), task.load_data(data_root)[0])
    state, alive, times = program.initial_state(), torch.ones(1, dtype=torch.bool), []
    for _ in range(8):
        spent, (state, _) = seconds(lambda s=state: program.step(s, alive))
        times.append(spent)
    return statistics.median(times[2:])


def measured(run: Path, task: Task, data_root: str) -> dict[str, Any]:
    """alpha_e and the noise of the DPSGD run at its end, on few examples: that it can be measured, not how it comes out."""
    settings = ls.MeasureConfig(num_draws=8, num_smoothing_samples=4, num_eigenpairs=2, max_matvecs=20, num_examples=MEASURED_EXAMPLES,
                                num_covariance_examples=32, num_probes=2, seed=0)  # fmt: skip
    spent, groups = seconds(lambda: ls.measure(run, ["effective-learning-rate", "noise"], [STEPS], settings=settings, task=task,
                                               data_root=data_root, quiet=True))  # fmt: skip
    rate, noise = groups["effective-learning-rate"].isel(step=0), groups["noise"].isel(step=0)
    return {
        "examples": MEASURED_EXAMPLES, "seconds": spent,
        **{name: float(rate[name]) for name in ("alpha_e_ratio_mean", "alpha_e_ratio_stderr") if name in rate},
        **{name: float(v) for name, v in noise.data_vars.items() if v.ndim == 0 and str(name).startswith("Delta")},
        "identity_error": float(rate["identity_error"]) if "identity_error" in rate else math.nan,
    }  # fmt: skip


def forget_peak() -> int:
    """Give what is free back to the system, and count the largest resident memory anew; returns what is resident, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Largest resident memory since `forget_peak`, in bytes."""
    return round(peak_mib() * 2**20)


def priced(task: Task, train: Examples) -> dict[str, Any]:
    """What preflight says of a Hessian-vector product, and what it takes; lambda_max and a density."""
    objective = ls.Objective(task.initial_model(0), task.loss_fn, choose(train, PRICED_EXAMPLES))
    objective = objective.recalibrated(objective.model.initial_weights()[0])
    weights = objective.model.initial_weights()[0]
    told = preflight(objective, weights)
    before = forget_peak()
    operator = ls.hessian(objective, weights)
    vector = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0))
    first = seconds(lambda: operator @ vector)[0]
    again = statistics.median(seconds(lambda: operator @ vector)[0] for _ in range(3))
    memory = peak() - before
    gradient = statistics.median(seconds(lambda: objective.gradient(weights))[0] for _ in range(3))
    top = ls.top_eigenpairs(operator, k=1, max_matvecs=30, tol=1e-2)
    density = ls.spectral_density(operator, num_probes=2, num_steps=12)
    width = float(density.grid[1] - density.grid[0])
    return {
        "examples": len(choose(train, PRICED_EXAMPLES)), "problems": list(told.problems), "seconds_per_gradient": gradient, "seconds_per_product": again,
        "seconds_first_product": first, "product_over_gradient": again / gradient, "preflight_seconds_per_product": told.seconds_per_product,
        "preflight_seconds_first_product": told.seconds_to_linearise + told.seconds_per_product, "preflight_seconds_per_gradient": told.seconds_per_gradient, "bytes": memory, "preflight_bytes": told.peak_bytes,
        "lambda_max": float(top.values[0]), "residual": float(top.residuals[0]), "converged": bool(top.converged[0]),
        "density_mass": float(np.sum(np.asarray(density.density)) * width),
    }  # fmt: skip


def full_step(name: str, data_root: str) -> dict[str, Any]:
    """One DPSGD step of the full form, four learners of one example each (two where BatchNorm needs them)."""
    task = TASKS[name]
    if name.startswith("swb"):
        task = replace(task, load_data=random_frames)
    elif name.startswith("imagenet-"):
        task = replace(task, load_data=get_task(f"imagenette-{name.removeprefix('imagenet-')}@examples=64").load_data)
    forget_peak()
    train = task.load_data(data_root)[0]
    c = config("dpsgd", 1e-3, local_batch_size=2, num_steps=1)
    program = Program(task, c, topology("ring", LEARNERS), train)
    start = program.initial_state()
    spent, (state, record) = seconds(lambda: program.step(start, torch.ones(1, dtype=torch.bool)))
    return {
        "data": train.name.replace(f"{data_root}/", ""), "local_batch_size": 2, "seconds": spent, "loss": float(record.losses[0]), "finite": bool(record.alive[0]),
        "sigma_w": float(program.consensus_distances(state)[0]) / math.sqrt(program.model.layout.num_parameters), "peak_gib": peak() / 2**30,
    }  # fmt: skip


def random_frames(_: Any) -> tuple[Examples, Examples]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(64, 21, 260, generator=generator),
        torch.randint(0, 32_000, (64, 21), generator=generator),
    )
    data = TensorData(inputs, targets, "random frames")
    return data, data


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| task | run here as | parameters (full) | loss SSGD; DPSGD | sigma_w | alpha_e/alpha | s a step | HVP/gradient | lambda_max | preflight/actual time; memory | full form, a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        c, m, s, d = r["curvature"], r["measured"], r["ssgd"], r["dpsgd"]
        form = r["form"] if not r["form"].startswith(r["task"] + "@") else r["form"].removeprefix(r["task"])
        lines.append(
            f"| {r['task']} | {form} | {r['parameters']:,} ({r['full_parameters']:,}) | {s['loss_first']:.2f} to {s['loss_last']:.2f}; {d['loss_last']:.2f} "
            f"| {d['sigma_w']:.1e} | {m['alpha_e_ratio_mean']:.2f} ± {m['alpha_e_ratio_stderr']:.2f} | {d['seconds_per_step']:.2f} "
            f"| {c['product_over_gradient']:.2f} | {c['lambda_max']:.3g} | {c['preflight_seconds_per_product'] / c['seconds_per_product']:.2f}; "
            f"{c['preflight_bytes'] / max(1, c['bytes']):.2f} | {r['full_step']['seconds']:.1f} s |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tasks named, or all; keep the rows of the others; 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--data-root", default=os.environ.get("LANDSCAPE_DATA_ROOT"))
    parser.add_argument("--table", action="store_true", help="print the stored rows")
    parser.add_argument("--row", choices=list(FORMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    path = RESULTS / "tasks_cpu.json"
    rows = {r["task"]: r for r in json.loads(path.read_text())["rows"]} if path.exists() else {}
    if arguments.row:
        print(json.dumps(row(arguments.row, arguments.data_root)))
        return 0
    failed = False
    if not arguments.table:
        if not arguments.data_root:
            parser.error("name the data sets' folder with --data-root or LANDSCAPE_DATA_ROOT")
        for name in arguments.tasks:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.bench_tasks",
                "--row",
                name,
                "--data-root",
                arguments.data_root,
            ]
            spent, done = seconds(lambda c=command: subprocess.run(c, stdout=subprocess.PIPE, text=True, check=False))
            if done.returncode:
                print(f"{name}: failed", file=sys.stderr)
                failed = True
                continue
            rows[name] = json.loads(done.stdout.splitlines()[-1]) | {"seconds": spent}
            store("tasks_cpu", {"rows": [rows[n] for n in FORMS if n in rows]})
            print(f"{name}: {spent:.0f} s", file=sys.stderr)
    print(table([rows[n] for n in FORMS if n in rows]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
