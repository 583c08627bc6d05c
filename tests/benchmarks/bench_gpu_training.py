"""Several learners of a ResNet-18 on one GPU against plain training of one model on as many images a step.

    python -m tests.benchmarks.bench_gpu_training [--device cuda] [--width 64] [--learners 8 16] [--total-batch 1024] [--rounds 10]

A step of DPSGD (ring, AWC) of n learners at batch size B, stacked (one batched program, whose convolutions are grouped ones) or interleaved (one
learner after another), beside a step of plain SGD with one model at batch size n B; each in float32 and in bfloat16 autocast, with channels
innermost and not. Images lie on the device and both sides draw them by index there. A row of the table is one arithmetic and layout; its sides take
their turns round by round, and the goal is measured against the plain program of the same row, and told against the fastest plain program too.
`--device cpu --width 8 --learners 2 4 --total-batch 16 --rounds 2 --steps 1` tries that everything runs (torch 2.13 crashes on a CPU in the backward
pass of channels-last convolutions of 4 channels, with a plain model as well).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from landscape.data.dataset import TensorData
from landscape.data.sampling import IndexSampler
from landscape.tasks import Task
from landscape.training import Program, TrainConfig, topology
from tests.benchmarks.crew import in_turn, ratio
from tests.benchmarks.networks import images, resnet18
from tests.benchmarks.timing import seconds, store

GOAL = 1.15
RATE = 0.01


class Plain:
    """SGD of one model, as one writes it."""

    def __init__(self, task: Task, data: TensorData, batch: int, device: str, *, bf16: bool, channels_last: bool) -> None:  # fmt: skip
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = task.initial_model(0).to(device, memory_format=self.layout)  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.data, self.device, self.bf16 = data, torch.device(device), bf16
        self.sampler = IndexSampler([0], 1, batch, len(data))
        self.step = 0

    def __call__(self) -> None:
        inputs, targets = self.data.batch(self.sampler.indices(self.step)[0].to(self.device))
        inputs = inputs.contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = nn.functional.cross_entropy(self.model(inputs).float(), targets)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        loss.item()
        self.step += 1


class Learners:
    """DPSGD of n learners."""

    def __init__(self, task: Task, data: TensorData, learners: int, batch: int, device: str, batching: str, *, bf16: bool, channels_last: bool) -> None:  # fmt: skip
        config = TrainConfig(
            "dpsgd", RATE, num_learners=learners, local_batch_size=batch, device=device, batching=batching,  # type: ignore[arg-type]
            autocast="bf16" if bf16 else "off", channels_last=channels_last,
        )  # fmt: skip
        self.program = Program(task, config, topology("ring", learners), data)
        self.state, self.alive = (
            self.program.initial_state(),
            torch.ones(1, dtype=torch.bool, device=self.program.device),
        )

    def __call__(self) -> None:
        self.state, record = self.program.step(self.state, self.alive)
        float(record.losses[0])


def repeated(step: Callable[[], None], steps: int) -> float:
    """Seconds a step."""
    return seconds(lambda: [step() for _ in range(steps)])[0] / steps


def measure(task: Task, data: TensorData, learners: int, total: int, device: str, rounds: int, steps: int, *, bf16: bool, channels_last: bool) -> dict[str, Any]:  # fmt: skip
    """One row: images/s of plain, stacked and interleaved training; what does not fit into memory is told."""
    how = {"bf16": bf16, "channels_last": channels_last}
    made: dict[str, Callable[[], Callable[[], None]]] = {
        "plain": partial(Plain, task, data, total, device, **how),
        **{b: partial(Learners, task, data, learners, total // learners, device, b, **how) for b in ("stacked", "interleaved")},
    }  # fmt: skip
    calls, left_out, looped = {}, [], False
    for name, make in made.items():
        try:
            program = make()
            program()
            if name == "stacked" and isinstance(program, Learners) and not program.program.model.batched:
                looped = True  # an operation without a batching rule: this is the interleaved program again
                continue
            calls[name] = partial(repeated, program, steps)
        except torch.OutOfMemoryError:
            left_out.append(name)
            torch.cuda.empty_cache()
    times = in_turn(calls, rounds=rounds)
    row = {"num_learners": learners, "total_batch": total, "autocast": "bf16" if bf16 else "off", "channels_last": channels_last, "goal": GOAL,
           "out_of_memory": left_out, "cannot_be_stacked": looped, "images_per_second": {n: total / statistics.median(t) for n, t in times.items()}}  # fmt: skip
    beside = {n: ratio(times, n, "plain") for n in times if n != "plain" and "plain" in times}
    won = min((n for n in times if n != "plain"), key=lambda n: statistics.median(times[n]), default=None)
    print(f"n={learners:2d} batch {total} {'bf16' if bf16 else 'float32':8s}{'channels last' if channels_last else '':14s}"
          + ", ".join(f"{n} {v:.0f}/s" for n, v in row["images_per_second"].items())
          + "".join(f"; {n}/plain {r['ratio']:.2f} ({r['ratio_lower_quartile']:.2f}-{r['ratio_upper_quartile']:.2f})" for n, r in beside.items())
          + f"; {won} won, goal {GOAL}" + (f"; out of memory: {', '.join(left_out)}" if left_out else "") + ("; cannot be stacked" if looped else ""), flush=True)  # fmt: skip
    return {**row, "over_plain": beside, "won": won}


def main(arguments: list[str] | None = None) -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer; 64 is ResNet-18")
    parser.add_argument("--learners", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--total-batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    given = parser.parse_args(arguments)
    inputs, targets, name = images(8192)
    data = TensorData(inputs, targets, name).to(given.device)
    task = Task("resnet18", "ResNet-18 for 32 x 32 images", partial(resnet18, given.width), nn.functional.cross_entropy, lambda _: (data, data), 1.0, math.log(10))  # fmt: skip
    size = sum(p.numel() for p in task.build_model().parameters())
    print(f"ResNet-18 of width {given.width}, {size:,} parameters, on {given.device}; images: {name}")
    torch.backends.cudnn.benchmark = True
    rows = [
        measure(task, data, n, given.total_batch, given.device, given.rounds, given.steps, bf16=bf16, channels_last=last)
        for n in given.learners
        for bf16 in (False, True)
        for last in (False, True)
    ]  # fmt: skip
    fastest: dict[str, Any] = {}
    for n in given.learners:
        mine = [row for row in rows if row["num_learners"] == n]
        speeds = {(key, row["autocast"], row["channels_last"]): v for row in mine for key, v in row["images_per_second"].items()}  # fmt: skip
        plain = max((v, k) for k, v in speeds.items() if k[0] == "plain")
        ours = max((v, k) for k, v in speeds.items() if k[0] != "plain")
        fastest[str(n)] = {"plain": plain[1], "learners": ours[1], "time_ratio": plain[0] / ours[0]}
        print(f"n={n}: fastest plain {plain[0]:.0f}/s {plain[1][1:]}, fastest learners {ours[0]:.0f}/s {ours[1]}: time ratio {plain[0] / ours[0]:.2f} (goal {GOAL})")  # fmt: skip
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.device(given.device).type == "cuda" else None
    content = {"width": given.width, "num_parameters": size, "images": name, "peak_gpu_mib": peak, "rows": rows, "fastest": fastest}  # fmt: skip
    print(f"stored {store(f'training_{torch.device(given.device).type}', content, given.device).name}")


if __name__ == "__main__":
    main()
