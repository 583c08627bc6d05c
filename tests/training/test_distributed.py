"""Learners spread over processes do what all of them stacked on one device do."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from landscape.data.dataset import TensorData
from landscape.models import mlp
from landscape.ranks import Ranks, current
from landscape.tasks import Task
from landscape.training.config import TrainConfig
from landscape.training.diagnostics import Diagnostics
from landscape.training.distributed import DistributedCommunicator
from landscape.training.loop import Program
from landscape.training.topology import TOPOLOGIES, topology

STEPS = 4
BUCKET_BYTES = 100
"""So small that a row of 53 weights travels in many messages."""


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(6, 3))  # fmt: skip


class Unused(nn.Module):
    """A network with a parameter that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(6, 4), nn.Linear(2, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


NETWORK = partial(mlp, (6, 5, 3), "tanh")


class Jittered(TensorData):
    """Examples that are moved about at random, and count how often what was announced is what is drawn next."""

    num_random, reads_ahead = 6, True  # type: ignore[assignment]

    def draw(self, indices: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        announced = ANNOUNCED.pop("next", None)
        if announced is not None and torch.equal(announced[0], indices) and torch.equal(announced[1], uniforms):
            ANNOUNCED["hits"] = ANNOUNCED.get("hits", 0) + 1
        inputs, targets = self.batch(indices)
        return inputs + uniforms - 0.5, targets

    def expect(self, indices: Tensor, uniforms: Tensor) -> None:
        ANNOUNCED["next"] = indices.clone(), uniforms.clone()


ANNOUNCED: dict[str, Any] = {}


def make_task(network: Any = NETWORK, kind: type[TensorData] = TensorData) -> Task:
    generator = torch.Generator().manual_seed(1)
    data = kind(torch.randn(40, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (40,), generator=generator))  # fmt: skip
    return Task(
        "spread", "a small network", network, nn.functional.cross_entropy, lambda root: (data, data), 0.7, math.log(3)
    )


def make_config(algorithm: str, **options: Any) -> TrainConfig:
    defaults = {
        "learning_rate": 0.3,
        "num_learners": 5,
        "local_batch_size": 4,
        "num_steps": STEPS,
        "dtype": "float64",
        "weight_decay": 0.01,
        "schedule": "step:2:0.5",
    }
    return TrainConfig(**{"algorithm": algorithm, **defaults, **options})


ORDERS = ("awc", "atc", "cta")
MOMENTUM = {"momentum": 0.9, "nesterov": True}
CASES: dict[str, tuple[TrainConfig, Any]] = {
    "ssgd": (make_config("ssgd", **MOMENTUM), None),
    "ssgd-star": (make_config("ssgd-star", sigma0=0.1), None),
    "ssgd-star-zero-sum": (make_config("ssgd-star", sigma0=0.1, noise_zero_sum=True), None),
    "ssgd-in-parts": (make_config("ssgd", accumulation=2), None),
    "ssgd-unused": (make_config("ssgd"), Unused),
    "ssgd-convolutional": (make_config("ssgd"), convolutional),
    "dpsgd-convolutional": (make_config("dpsgd", channels_last=True), convolutional),
    "dpsgd-in-parts": (make_config("dpsgd", accumulation=4), None),
    "dpsgd-gamma": (make_config("dpsgd", gamma=0.7, gamma_schedule="step:2:0.5", topology="complete"), None),
    "ssgd-augmented-in-parts": (make_config("ssgd", accumulation=2), partial(make_task, kind=Jittered)),
    "dpsgd-augmented": (make_config("dpsgd", batching="interleaved"), partial(make_task, kind=Jittered)),
    "ubar-augmented": (make_config("ubar", topology="complete"), partial(make_task, kind=Jittered)),
    "dpsgd-interleaved": (make_config("dpsgd", batching="interleaved"), None),
    "local-sgd": (make_config("local-sgd", local_steps=2, **MOMENTUM), None),
    "ssgd-reproducible": (make_config("ssgd", reproducible=True), None),
    "dpsgd-reproducible": (make_config("dpsgd", reproducible=True, topology="complete"), None),
    **{
        f"dpsgd-{order}-{graph}": (make_config("dpsgd", order=order, topology=graph, num_learners=4 if graph == "hypercube" else 5), None)
        for order in ORDERS
        for graph in TOPOLOGIES
    },
    "local-sgd-reproducible": (make_config("local-sgd", local_steps=3, reproducible=True), None),
    **{
        f"{rule}-{graph}": (make_config(rule, topology=graph, num_learners=4 if graph == "hypercube" else 5), None)
        for rule in ("adjacent-leader", "ubar")
        for graph in ("ring", "hypercube", "one-peer-exponential", "random-pairing")
    },
    **{f"{rule}-momentum": (make_config(rule, topology="star", num_learners=7, **MOMENTUM), None) for rule in ("adjacent-leader", "ubar")},
    **{f"{rule}-reproducible": (make_config(rule, topology="exponential", num_faulty=1, reproducible=True), None) for rule in ("adjacent-leader", "ubar")},
    **{f"{rule}-convolutional": (make_config(rule, topology="complete"), convolutional) for rule in ("adjacent-leader", "ubar")},
    "adjacent-leader-gamma": (make_config("adjacent-leader", gamma=0.7, gamma_schedule="step:2:0.0", topology="star"), None),
    "adjacent-leader-gaussian": (make_config("adjacent-leader", topology="complete", num_faulty=2), None),
    "ubar-gaussian": (make_config("ubar", topology="complete", num_faulty=2, kept_fraction=1.0), None),
    "ubar-sign-flip-in-parts": (make_config("ubar", num_faulty=1, fault="sign-flip", accumulation=2), None),
    "dpsgd-sign-flip": (make_config("dpsgd", topology="complete", num_learners=9, num_faulty=3, fault="sign-flip"), None),
    "dpsgd-faulty-reproducible": (make_config("dpsgd", topology="exponential", num_faulty=2, reproducible=True), None),
    **{f"dpsgd-{order}-gaussian": (make_config("dpsgd", order=order, num_faulty=2, fault_scale=0.5), None) for order in ("awc", "atc")},
    **{f"dpsgd-{order}-momentum": (make_config("dpsgd", order=order, num_learners=7, **MOMENTUM), None) for order in ORDERS},
}  # fmt: skip


def trained(name: str, ranks: Ranks) -> dict[str, Tensor]:
    """All learners after some steps, and what the run says of itself."""
    config, network = CASES[name]
    ANNOUNCED.clear()
    task = make_task() if network is None else network() if isinstance(network, partial) else make_task(network)
    backend = (
        DistributedCommunicator(ranks, config.num_learners, ordered=config.reproducible, bucket_bytes=BUCKET_BYTES)
        if ranks.size > 1
        else None
    )
    program = Program(task, config, topology(config.topology, config.num_learners), task.load_data(None)[0], communicator=backend)  # fmt: skip
    state, alive = program.initial_state(), torch.ones(1, dtype=torch.bool)
    losses = []
    for _ in range(STEPS):
        before = state
        state, record = program.step(before, alive, keep_gradient=True)
        losses.append(record.losses)
    assert record.mean_gradient is not None
    told = Diagnostics(program).measure(before, record.mean_gradient[0])
    mean, buffers = program.averaged(state)
    return {
        "params": program.communicator.rows(state.params),
        "momentum": torch.zeros(()) if state.momentum is None else program.communicator.rows(state.momentum),
        "losses": torch.cat(losses),
        "mean": mean,
        "gradient": record.mean_gradient,
        "consensus": program.consensus_distances(state),
        "diagnosed": torch.tensor(list(told.values()), dtype=torch.float64).nan_to_num(-1.0),
        **{f"buffer {n}": program.communicator.rows(b) for n, b in state.buffers.items()},
        **{f"averaged buffer {n}": b for n, b in buffers.items()},
    }


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    found = {name: trained(name, current()) for name, (config, _) in CASES.items() if config.num_learners >= size}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_give_the_weights_of_one(size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (size, str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in found[0]:
            alone = trained(name, Ranks())
            exact = CASES[name][0].reproducible
            for key, expected in alone.items():
                for other in found:
                    assert torch.equal(other[name][key], found[0][name][key]), f"{name}, {key}: processes differ"
                if exact and key in ("params", "mean"):
                    assert torch.equal(found[0][name][key], expected), f"{name}, {key}"
                torch.testing.assert_close(found[0][name][key], expected, rtol=1e-10, atol=1e-10,
                                           msg=lambda m, n=name, k=key: f"{n}, {k}: {m}")  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def test_more_processes_than_learners_are_refused() -> None:
    with pytest.raises(
        ValueError, match="5 processes for 4 learners: every process must hold at least one; start at most 4"
    ):
        DistributedCommunicator(Ranks(0, 5), 4)


@pytest.mark.parametrize("count", [1, 4, 7, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_everything_once_and_evenly(count: int, size: int) -> None:
    shares = Ranks(0, size).shares(count)
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_augmentation_hangs_on_seed_learner_and_step_alone() -> None:
    """Not on how learners are batched, nor on the parts; and it changes what is learned, not what is measured."""
    ends: dict[str, Tensor] = {}
    for name, options in {"stacked": {"batching": "stacked"}, "interleaved": {"batching": "interleaved"}, "parts": {"accumulation": 2}}.items():  # fmt: skip
        ANNOUNCED.clear()
        task = make_task(kind=Jittered)
        program = Program(task, make_config("dpsgd", **options), topology("ring", 5), task.load_data(None)[0])
        state, alive = program.initial_state(), torch.ones(1, dtype=torch.bool)
        for _ in range(STEPS):
            state, _ = program.step(state, alive)
        ends[name] = state.params
        pieces = {"stacked": 1, "interleaved": 5, "parts": 2}[name]
        assert ANNOUNCED["hits"] == STEPS * pieces - 1, "all but the first were read ahead"
        assert "next" not in ANNOUNCED, "nothing is read ahead that is not drawn"
    torch.testing.assert_close(ends["stacked"], ends["interleaved"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ends["stacked"], ends["parts"], rtol=1e-12, atol=1e-12)
    plain = Program(make_task(), make_config("dpsgd"), topology("ring", 5), make_task().load_data(None)[0])
    state = plain.initial_state()
    for _ in range(STEPS):
        state, _ = plain.step(state, alive)
    assert float((state.params - ends["stacked"]).abs().max()) > 1e-3
    data = program.train
    assert torch.equal(data.rows(slice(0, 40))[0], make_task().load_data(None)[0].rows(slice(0, 40))[0])


@pytest.mark.parametrize("field", ["accumulation", "channels_last", "batching"])
@pytest.mark.parametrize("algorithm", ["ssgd", "dpsgd", "ubar"])
@pytest.mark.parametrize("loss", ["plain", "weighted", "summed"])
def test_how_a_minibatch_is_taken_does_not_change_the_step(field: str, algorithm: str, loss: str) -> None:
    """On a network without batch statistics; one after another, in parts (some of them without weight), channels innermost."""
    network = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
    task = make_task(lambda: network)
    if loss == "weighted":
        data = task.load_data(None)[0]
        half = dataclasses.replace(data, targets=torch.where(torch.arange(40) % 2 == 0, -100, data.targets))
        weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
        task = dataclasses.replace(task, loss_fn=weighted, load_data=lambda root: (half, half))
    if loss == "summed":
        task = dataclasses.replace(task, loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    base = make_config(algorithm, batching="stacked", learning_rate=0.03, local_batch_size=12)
    other = dataclasses.replace(base, **{field: {"accumulation": 6, "channels_last": True, "batching": "interleaved"}[field]})  # fmt: skip
    ends = []
    for config in (base, other):
        program = Program(task, config, topology("ring", 5), task.load_data(None)[0])
        state, alive = program.initial_state(), torch.ones(1, dtype=torch.bool)
        for _ in range(STEPS):
            state, record = program.step(state, alive)
        assert bool(record.alive.all())
        ends.append(state.params)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


class Dropping(nn.Module):
    """Masks drawn by a function, of which no layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


class Attending(nn.Module):
    """Attention, which draws masks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(3, 1, dropout=0.5, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 3))
        return self.last(self.attention(x, x, x, need_weights=False)[0].flatten(1))


@pytest.mark.parametrize("network", [Dropping, Attending])
def test_masks_hang_on_the_learner_and_not_on_how_learners_are_batched(network: type[nn.Module]) -> None:
    task, ends = make_task(network), []
    for batching in ("stacked", "interleaved"):
        config = make_config("dpsgd", batching=batching)
        program = Program(task, config, topology("ring", 5), task.load_data(None)[0])
        state, alive = program.initial_state(), torch.ones(1, dtype=torch.bool)
        for _ in range(2):
            state, _ = program.step(state, alive)
        ends.append(state.params)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("algorithm", ["ssgd", "dpsgd"])
def test_bfloat16_steps_keep_full_weights_and_stay_close(algorithm: str) -> None:
    task, ends = make_task(), []
    for autocast in ("off", "bf16"):
        config = make_config(algorithm, dtype="float32", autocast=autocast, weight_decay=0.0)
        program = Program(task, config, topology("ring", 5), task.load_data(None)[0])
        state = program.initial_state()
        start = state.params
        state, record = program.step(state, torch.ones(1, dtype=torch.bool))
        assert state.params.dtype == torch.float32
        assert record.losses.dtype == torch.float64
        ends.append(state.params - start)
    assert not torch.equal(ends[0], ends[1]), "bfloat16 was used"
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 0.05  # 8 bits of mantissa, two layers
