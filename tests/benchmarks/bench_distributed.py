"""Training on several processes: beside one process, beside decent-dp and torch's DDP, and how much of the communication is hidden.

    python -m tests.benchmarks.bench_distributed [stacked] [algorithms] [overlap] [peers] [diagnostics]

Parts that are not named keep what was stored before. Every ratio is of programs that take blocks of steps in turn, in processes that stay up
meanwhile and sleep while it is another's turn. Processes of a group have one thread each and speak gloo through the loopback
device. `peers` needs decent-dp (MIT; `pip install --no-deps decent-dp loguru`), and tells where it is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from landscape.data.sampling import IndexSampler
from landscape.functional import ParameterLayout
from landscape.models.mlp import mlp
from landscape.ranks import Ranks
from landscape.tasks import Task, get_task
from landscape.training import Program, TrainConfig, topology
from landscape.training.diagnostics import Diagnostics
from landscape.training.distributed import DistributedCommunicator
from landscape.training.topology import Topology
from tests.benchmarks.crew import Block, Crew, in_turn, of_cases, ratio
from tests.benchmarks.networks import small_cnn
from tests.benchmarks.timing import RESULTS, store

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mnist-mlp": mlp,
    "wide-mlp": partial(mlp, (784, 2048, 2048, 10)),
    "small-cnn": small_cnn,
}
"""42,310, 5,824,522 and 20,490 parameters."""

RATE = 0.01
STACKED_GOAL = 1.3
GOSSIP_GOAL = 1.0
PEERS_GOAL = 1.0
DIAGNOSTICS_GOAL = 0.03
DIAGNOSE_EVERY = 50


def task(network: str) -> Task:
    """Bundled digits under one of the networks."""
    return Task(network, network, NETWORKS[network], nn.functional.cross_entropy, get_task("mnist-mlp").load_data, 0.7, math.log(10))  # fmt: skip


class Steps:
    """A program and its learners, in steps."""

    def __init__(self, ranks: Ranks, network: str, algorithm: str, num_learners: int, batch: int, graph: Topology | None = None,
                 **options: Any) -> None:  # fmt: skip
        what = task(network)
        config = TrainConfig(algorithm, RATE, num_learners=num_learners, local_batch_size=batch, **options)  # type: ignore[arg-type]
        backend = DistributedCommunicator(ranks, num_learners) if ranks.size > 1 else None
        graph = graph or topology(config.topology, num_learners)
        self.program = Program(what, config, graph, what.load_data(None)[0], communicator=backend)
        self.state, self.alive = self.program.initial_state(), torch.ones(1, dtype=torch.bool)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.state, record = self.program.step(self.state, self.alive)
            float(record.losses[0])  # as the training loop reads it


def programs(ranks: Ranks, network: str, num_learners: int, batch: int, batchings: tuple[str, ...]) -> dict[str, Block]:
    """SSGD and DPSGD (ring, AWC) under each batching."""
    return {
        f"{algorithm} {batching}": Steps(ranks, network, algorithm, num_learners, batch, batching=batching)
        for algorithm in ("ssgd", "dpsgd")
        for batching in batchings
    }


def stacked() -> list[dict[str, Any]]:
    """Two processes of one thread against one process of two threads: the same learners, batches and network."""
    rows, batchings = [], ("stacked", "interleaved")
    cases = [("mnist-mlp", 6, 1000, batchings), ("small-cnn", 4, 64, batchings)]
    with Crew(of_cases, programs, cases, size=2) as ranks, Crew(of_cases, programs, cases, threads=2) as alone:
        for number, ((network, n, batch, _), steps) in enumerate(zip(cases, (6, 2), strict=True)):
            both = (("2 processes ", ranks), ("1 process ", alone))
            calls = {
                name: call for where, crew in both for name, call in crew.calls(number, steps, prefix=where).items()
            }
            times = in_turn(calls, rounds=11)
            for algorithm in ("ssgd", "dpsgd"):
                pairs = {
                    b: ratio(times, f"2 processes {algorithm} {b}", f"1 process {algorithm} {b}") for b in batchings
                }
                own, best = (min(batchings, key=lambda b, k=k, p=pairs: p[b][k]) for k in ("first_ms", "second_ms"))
                fastest = ratio(times, f"2 processes {algorithm} {own}", f"1 process {algorithm} {best}")
                rows.append({"network": network, "num_learners": n, "local_batch_size": batch, "algorithm": algorithm, "goal": STACKED_GOAL,
                             "same_batching": pairs, "fastest_of_each": fastest})  # fmt: skip
                told = ", ".join(f"{b} {tell(p)}" for b, p in (*pairs.items(), ("fastest of each", fastest)))
                print(
                    f"{network:10s} {algorithm:6s} n={n} B={batch}: 2 processes/1 process {told}; goal {STACKED_GOAL}"
                )
    return rows


def tell(found: dict[str, Any]) -> str:
    """A ratio with its times and quartiles."""
    return f"{found['first_ms']:.2f}/{found['second_ms']:.2f} ms = {found['ratio']:.2f} ({found['ratio_lower_quartile']:.2f}-{found['ratio_upper_quartile']:.2f})"


def algorithms() -> list[dict[str, Any]]:
    """A step of DPSGD (ring, AWC) against a step of SSGD on the same processes, several learners on each; `peers` has one on each."""
    rows = []
    for size, cases, steps in (
        (2, [("mnist-mlp", 6, 1000, ("auto",)), ("wide-mlp", 4, 32, ("auto",))], (8, 3)),
        (4, [("mnist-mlp", 8, 1000, ("auto",)), ("wide-mlp", 8, 32, ("auto",))], (5, 2)),
    ):
        with Crew(of_cases, programs, cases, size=size) as crew:
            for number, (network, n, batch, _) in enumerate(cases):
                times = in_turn(crew.calls(number, steps[number]), rounds=10)
                found = ratio(times, "dpsgd auto", "ssgd auto")
                rows.append({"network": network, "processes": size, "num_learners": n, "local_batch_size": batch, "goal": GOSSIP_GOAL, **found})  # fmt: skip
                print(f"{network:10s} {size} processes, n={n}, B={batch}: dpsgd/ssgd {tell(found)}; goal {GOSSIP_GOAL}")
    return rows


class Plain:
    """Plain steps of a wrapped module and optimisers, on the examples that the learner of this rank draws."""

    def __init__(self, ranks: Ranks, network: str, batch: int, wrap: Callable[[nn.Module], tuple[nn.Module, Any]]) -> None:  # fmt: skip
        what = task(network)
        self.data = what.load_data(None)[0]
        self.module, self.optimiser = wrap(what.initial_model(0))
        self.sampler = IndexSampler([0], ranks.size, batch, len(self.data), held=ranks.share(ranks.size))
        self.step = 0

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            inputs, targets = self.data.batch(self.sampler.indices(self.step)[0])
            loss = nn.functional.cross_entropy(self.module(inputs), targets)
            if self.optimiser is not None:
                self.optimiser.zero_grad()
            loss.backward()
            if self.optimiser is not None:
                self.optimiser.step()
            loss.item()
            self.step += 1


def alternating_pairs(size: int) -> Topology:
    """decent-dp's ring: in odd steps 0-1, 2-3, ..., in even steps 1-2, 3-4, ..., half and half."""
    matrices = np.zeros((2, size, size))
    for t, matrix in enumerate(matrices):
        for j in range(size):
            matrix[j, j] = 0.5
            matrix[j, (j + (1 if (j + t) % 2 == 0 else -1)) % size] += 0.5
    return Topology("alternating-pairs", size, "periodic", matrices)


def peer_programs(ranks: Ranks, network: str, batch: int) -> dict[str, Block]:
    """One learner a process: DPSGD and SSGD as they are here, in decent-dp and in torch's DDP."""
    blocks: dict[str, Block] = {}
    decent = have_decent()

    def gossip(module: nn.Module) -> tuple[nn.Module, None]:
        from decent_dp.ddp import DecentralizedDataParallel
        from loguru import logger

        logger.remove()
        optimiser = partial(torch.optim.SGD, lr=RATE)
        return DecentralizedDataParallel(module, lambda named: optimiser([p for _, p in named]), topology="ring", _local_world_size=1), None  # fmt: skip

    def reduce(module: nn.Module) -> tuple[nn.Module, Any]:
        wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        return wrapped, torch.optim.SGD(wrapped.parameters(), lr=RATE)

    blocks["dpsgd ring"] = Steps(ranks, network, "dpsgd", ranks.size, batch)
    blocks["ssgd"] = Steps(ranks, network, "ssgd", ranks.size, batch)
    blocks["torch DDP"] = plain = Plain(ranks, network, batch, reduce)
    compared = {"ssgd, torch DDP": (blocks["ssgd"], plain)}
    if ranks.size > 2:
        blocks["dpsgd pairs"] = Steps(ranks, network, "dpsgd", ranks.size, batch, graph=alternating_pairs(ranks.size))
    if decent:
        blocks["decent-dp ring"] = plain = Plain(ranks, network, batch, gossip)
        if ranks.size == 2:
            compared["dpsgd ring, decent-dp ring"] = (blocks["dpsgd ring"], plain)

    def differences(steps: int) -> dict[str, float]:
        """Largest difference of the weights after so many first steps, relative to the largest weight."""
        found = {}
        for name, (ours, theirs) in compared.items():
            ours(steps)
            theirs(steps)
            weights = torch.cat([p.detach().flatten() for p in theirs.module.parameters()])
            found[name] = float((ours.state.params[0] - weights).abs().max() / weights.abs().max())
        return found

    return {**blocks, "differences": differences}


def have_decent() -> bool:
    """Whether decent-dp can be imported."""
    return importlib.util.find_spec("decent_dp") is not None


PAIRS = (
    ("dpsgd ring", "ssgd"),
    ("ssgd", "torch DDP"),
    ("dpsgd ring", "decent-dp ring"),
    ("dpsgd pairs", "decent-dp ring"),
)


def peers() -> dict[str, Any]:
    """DPSGD beside decent-dp, and SSGD beside torch's DDP: same network, examples, rate and processes."""
    rows: list[dict[str, Any]] = []
    if not have_decent():
        print("decent-dp is not installed, so DPSGD is not compared with it (pip install --no-deps decent-dp loguru)")
    cases = [("mnist-mlp", 1000), ("wide-mlp", 32)]
    for size, steps in ((2, (10, 3)), (4, (5, 2))):
        with Crew(of_cases, peer_programs, cases, size=size) as crew:
            for number, (network, batch) in enumerate(cases):
                differences = crew.tell(f"{number} differences", 5)[0][-1]
                times = in_turn(crew.calls(number, steps[number], but=["differences"]), rounds=10)
                row = {"network": network, "processes": size, "local_batch_size": batch, "goal": PEERS_GOAL,
                       "relative_differences_after_5_steps": differences,
                       "processor_ms": {n: 1e3 * statistics.median(crew.busy[f"{number} {n}"]) / size for n in times}}  # fmt: skip
                for first, second in PAIRS:
                    if first in times and second in times:
                        row[f"{first} / {second}"] = found = ratio(times, first, second)
                        print(
                            f"{network:10s} {size} processes, B={batch}: {first} / {second} {tell(found)}; goal {PEERS_GOAL}"
                        )
                print(f"    weights differ by {', '.join(f'{v:.1e} ({k})' for k, v in differences.items())} after 5 steps; "
                      f"ms of a processor a step: {', '.join(f'{k} {v:.1f}' for k, v in row['processor_ms'].items())}")  # fmt: skip
                rows.append(row)
    version = importlib.metadata.version("decent-dp") if have_decent() else None
    return {"decent_dp": {"version": version, "licence": "MIT"}, "rows": rows}


SLEEP = 0.1
"""Seconds of sleep that stand for forward and backward passes on a device of its own."""


def exchanges(ranks: Ranks) -> dict[str, Block]:
    """AWC's mix and SSGD's bucketed mean of the wide network's numbers: alone, after the sleep, and with the sleep between start and wait."""
    layout = ParameterLayout.of(NETWORKS["wide-mlp"]())
    communicator = DistributedCommunicator(ranks, ranks.size)
    mixing = torch.tensor(topology("ring", ranks.size).matrices[0], dtype=torch.float32)
    weights = torch.randn(1, layout.num_parameters)
    gradients = list(layout.split(weights).items())[::-1]  # in the order of a backward pass

    def mix(before: float, between: float) -> None:
        time.sleep(before)
        handle = communicator.start_mix(weights, mixing)
        time.sleep(between)
        handle.wait()

    def mean(before: float, between: float) -> None:
        time.sleep(before)
        average = communicator.start_mean(layout, 1)
        assert average.take is not None
        for name, gradient in gradients:
            time.sleep(between * gradient[0].numel() / layout.num_parameters)
            average.take(name, gradient)
        average.wait(None)

    def repeated(call: Callable[[float, float], None], before: float, between: float) -> Block:
        return lambda steps: [call(before, between) for _ in range(steps)]

    return {
        f"{name} {how}": repeated(call, *when)
        for name, call in (("mix", mix), ("mean", mean))
        for how, when in (("alone", (0, 0)), ("in sequence", (SLEEP, 0)), ("overlapped", (0, SLEEP)))
    }


def traced(ranks: Ranks) -> dict[str, Block]:
    """Real steps of the wide network under torch's profiler: when messages were under way, and when forward and backward passes went on."""

    def trace(algorithm: str) -> Block:
        steps = Steps(ranks, "wide-mlp", algorithm, ranks.size, 32)
        evaluate = steps.program.evaluate

        def labelled(*arguments: Any) -> Any:
            with torch.profiler.record_function("evaluate"):
                return evaluate(*arguments)

        steps.program.evaluate = labelled  # type: ignore[method-assign]

        def block(count: int) -> list[dict[str, float]]:
            found = []
            for _ in range(count):
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    steps(1)
                found.append(under_way(profile.events()))
            return found

        return block

    return {algorithm: trace(algorithm) for algorithm in ("dpsgd", "ssgd")}


def under_way(events: Any) -> dict[str, float]:
    """Milliseconds of a step's messages (the last, which tells losses, left out) and of its forward and backward passes, and the share of the
    first that lies within the second. A send or receive ends, for the profiler, when it was waited for, so its share is a lower bound."""
    times = {e.name: (e.time_range.start, e.time_range.end) for e in events if e.name == "evaluate"}
    start, end = times["evaluate"]
    messages = sorted((e.time_range.start, e.time_range.end) for e in events if e.name.startswith("gloo:"))[:-1]
    spans: list[tuple[float, float]] = []
    for a, b in messages:
        if spans and a <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(b, spans[-1][1])
        else:
            spans.append((a, b))
    whole = sum(b - a for a, b in spans)
    within = sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)
    return {"messages": len(messages), "messages_ms": whole / 1e3, "passes_ms": (end - start) / 1e3, "messages_within_passes": within / whole}  # fmt: skip


def overlap() -> dict[str, Any]:
    """How much of the communication is hidden behind a sleep that stands for compute, and where messages lie in real steps."""
    with Crew(exchanges, size=2) as crew:
        times = in_turn({name: partial(crew.seconds, name, 2) for name in crew.names}, rounds=12)
    found: dict[str, Any] = {"sleep_ms": 1e3 * SLEEP, "parameters": 5_824_522, "note": "a sleep stands for compute"}
    for name in ("mix", "mean"):
        rounds = zip(*(times[f"{name} {how}"] for how in ("alone", "in sequence", "overlapped")), strict=True)
        low, middle, high = statistics.quantiles([(b - c) / a for a, b, c in rounds], n=4)
        found[name] = {"exchange_ms": 1e3 * statistics.median(times[f"{name} alone"]), **ratio(times, f"{name} overlapped", f"{name} in sequence"),
                       "hidden": middle, "hidden_lower_quartile": low, "hidden_upper_quartile": high}  # fmt: skip
        print(f"{name}: exchange {found[name]['exchange_ms']:.1f} ms; beside a sleep of {1e3 * SLEEP:.0f} ms / after it {tell(found[name])}; hidden {middle:.0%} ({low:.0%}-{high:.0%})")  # fmt: skip
    with Crew(traced, size=2) as crew:
        for algorithm in crew.names:
            crew.tell(algorithm, 2)
            told = [step for _, _, steps in crew.tell(algorithm, 7) for step in steps]
            medians = {key: statistics.median(step[key] for step in told) for key in told[0]}
            found[f"traced {algorithm}"] = {**medians, "steps": len(told)}
            print(f"traced {algorithm}: {medians['messages']:.0f} messages, {medians['messages_ms']:.1f} ms under way, of these {medians['messages_within_passes']:.0%} "
                  f"while forward and backward passes ({medians['passes_ms']:.1f} ms) went on")  # fmt: skip
    return found


def diagnosed(ranks: Ranks, network: str, num_learners: int, batch: int) -> dict[str, Block]:
    """Steps of DPSGD, bare and each with its diagnostics."""
    steps = Steps(ranks, network, "dpsgd", num_learners, batch)
    diagnostics = Diagnostics(steps.program)

    def measured(count: int) -> None:
        for _ in range(count):
            before = steps.state
            steps.state, record = steps.program.step(before, steps.alive, keep_gradient=True)
            float(record.losses[0])
            assert record.mean_gradient is not None
            diagnostics.measure(before, record.mean_gradient[0])

    return {"bare": steps, "diagnosed": measured}


def diagnostics() -> list[dict[str, Any]]:
    """What diagnostics at one step of 50 cost: (diagnosed step/bare step - 1)/50."""
    rows, cases = [], [("mnist-mlp", 6, 1000), ("small-cnn", 4, 64)]
    for size in (1, 2):
        with Crew(of_cases, diagnosed, cases, size=size) as crew:
            for number, ((network, n, batch), steps) in enumerate(zip(cases, (6, 2), strict=True)):
                found = ratio(in_turn(crew.calls(number, steps), rounds=10), "diagnosed", "bare")
                cost = {
                    key.replace("ratio", "cost"): (float(value) - 1) / DIAGNOSE_EVERY
                    for key, value in found.items()
                    if key.startswith("ratio")
                }
                rows.append({"network": network, "processes": size, "num_learners": n, "local_batch_size": batch, "diagnose_every": DIAGNOSE_EVERY,
                             "goal": DIAGNOSTICS_GOAL, **found, **cost})  # fmt: skip
                print(f"{network:10s} {size} process(es): diagnosed/bare step {tell(found)}, so {cost['cost']:.1%} at one step of {DIAGNOSE_EVERY}; goal {DIAGNOSTICS_GOAL:.0%}")  # fmt: skip
    return rows


PARTS: dict[str, Callable[[], Any]] = {
    "stacked": stacked,
    "algorithms": algorithms,
    "overlap": overlap,
    "peers": peers,
    "diagnostics": diagnostics,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts named (all by default) and store them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    chosen = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    path = RESULTS / "distributed_cpu.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = {part: PARTS[part]() for part in chosen}
    kept = {name: value for name, value in kept.items() if name in PARTS}
    print(f"stored {store('distributed_cpu', {**kept, **found}).name}")


if __name__ == "__main__":
    main()
