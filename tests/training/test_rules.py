"""The update rules against their papers' equations, written down for one learner after another in numpy; and simulated faults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape import streams
from landscape.data.dataset import TensorData
from landscape.data.sampling import IndexSampler
from landscape.models import mlp
from landscape.tasks import Task
from landscape.training import LearnerState, Program, Topology, TrainConfig, topology
from landscape.training.communicator import StackedCommunicator
from landscape.training.config import GOSSIPING, RULE_FIELDS
from landscape.training.faults import FaultyCommunicator
from landscape.training.rules import RULES
from landscape.training.rules.adjacent_leader import leaders
from landscape.training.schedule import parse_schedule

EXACT = {"rtol": 1e-12, "atol": 1e-12}
STEPS = 5
Taker = Callable[[np.ndarray, Tensor], tuple[float, np.ndarray]]


def make_config(algorithm: str, **options: Any) -> TrainConfig:
    defaults = {
        "learning_rate": 0.3,
        "num_learners": 5,
        "local_batch_size": 4,
        "num_steps": STEPS,
        "dtype": "float64",
        "schedule": "step:3:0.5",
    }
    return TrainConfig(**{"algorithm": algorithm, **defaults, **options})


def make_program(task: Task, config: TrainConfig, graph: Topology | None = None, **options: Any) -> Program:
    graph = graph or topology(config.topology, config.num_learners)
    return Program(task, config, graph, task.load_data(None)[0], **options)


def trained(program: Program, steps: int) -> list[LearnerState]:
    """States from step 0 on."""
    states = [program.initial_state()]
    alive = torch.ones(program.num_replicas, dtype=torch.bool, device=program.device)
    for _ in range(steps):
        state, record = program.step(states[-1], alive)
        alive = record.alive
        states.append(state)
    return states


# The papers' equations -----------------------------------------------------------------------------------------------


def sent(row: np.ndarray, config: TrainConfig, learner: int, step: int, exchange: int) -> np.ndarray:
    """What a learner sends in place of its row."""
    if learner < config.num_learners - config.num_faulty:
        return row
    if config.fault == "sign-flip":
        return -config.fault_scale * row
    generator = streams.torch_generator("fault", config.seed, learner, step, exchange)
    return torch.randn(len(row), dtype=torch.float64, generator=generator).numpy() * config.fault_scale


def heard(rows: np.ndarray, config: TrainConfig, learner: int, step: int, exchange: int) -> np.ndarray:
    """All rows as a learner knows them: its own, and what the others send."""
    return np.stack([r if k == learner else sent(r, config, k, step, exchange) for k, r in enumerate(rows)])


def dpsgd_step(w: np.ndarray, u: np.ndarray, at: Any, c: TrainConfig, matrix: np.ndarray, rate: float, t: int) -> Any:
    if c.order == "atc":
        after = w - rate * u
        return [matrix[j] @ heard(after, c, j, t, 1) for j in range(len(w))]
    return [matrix[j] @ heard(w, c, j, t, 1) - rate * u[j] for j in range(len(w))]


def local_sgd_step(w: np.ndarray, u: np.ndarray, at: Any, c: TrainConfig, matrix: np.ndarray, rate: float, t: int) -> Any:  # fmt: skip
    after = w - rate * u
    return np.tile(after.mean(0), (len(w), 1)) if (t + 1) % c.local_steps == 0 else after


def adjacent_leader_step(w: np.ndarray, u: np.ndarray, at: Any, c: TrainConfig, matrix: np.ndarray, rate: float, t: int) -> Any:  # fmt: skip
    """He, Wang & Choromanska 2024: x_(k+1/2) with two corrective forces, and the average with two additional weights."""
    n = len(w)
    losses = [at(j, w[j])[0] for j in range(n)]
    candidates = [[j] + [k for k in range(n) if k != j and matrix[j, k] != 0] for j in range(n)]
    degree = [len(known) - 1 for known in candidates]
    best = [min(known, key=lambda k: losses[k]) for known in candidates]  # the first of equals, so oneself
    central = [max(known, key=lambda k: degree[k]) for known in candidates]
    half = []
    for j in range(n):
        x = heard(w, c, j, t, 1)
        forces = c.leader_pull * (w[j] - x[best[j]]) + c.degree_pull * (w[j] - x[central[j]])
        half.append(w[j] - rate * u[j] - rate * forces)
    after = []
    for j in range(n):
        x = heard(np.stack(half), c, j, t, 2)
        plain = sum(matrix[j, k] * x[k] for k in range(n))
        after.append((1 - c.leader_weight - c.degree_weight) * plain + c.leader_weight * x[best[j]] + c.degree_weight * x[central[j]])  # fmt: skip
    return after


def ubar_step(w: np.ndarray, u: np.ndarray, at: Any, c: TrainConfig, matrix: np.ndarray, rate: float, t: int) -> Any:
    """Guo et al. 2021: the nearest of the neighbours, of these the better ones; x <- a x + (1 - a) R - rate g."""
    after = []
    for j in range(len(w)):
        x = heard(w, c, j, t, 1)
        neighbours = [k for k in range(len(w)) if k != j and matrix[j, k] != 0]
        mixed = w[j]
        if neighbours:
            count = max(1, int(c.kept_fraction * len(neighbours) + 1e-9))
            nearest = sorted(neighbours, key=lambda k: (np.linalg.norm(x[k] - w[j]), k))[:count]
            loss = {k: at(j, x[k])[0] for k in nearest}
            good = [k for k in nearest if loss[k] <= at(j, w[j])[0]] or [min(nearest, key=lambda k: loss[k])]
            mixed = c.own_weight * w[j] + (1 - c.own_weight) * np.mean([x[k] for k in good], axis=0)
        after.append(mixed - rate * u[j])
    return after


STEPPERS = {
    "dpsgd": dpsgd_step,
    "local-sgd": local_sgd_step,
    "adjacent-leader": adjacent_leader_step,
    "ubar": ubar_step,
}


def reference(task: Task, config: TrainConfig, graph: Topology) -> np.ndarray:
    """Weights (T + 1, n, d) of all learners."""
    n, data, module = config.num_learners, task.load_data(None)[0], task.initial_model(config.seed).double()
    sampler = IndexSampler((config.seed,), n, config.local_batch_size, len(data))
    schedule = parse_schedule(config.schedule, config.num_steps)
    start = torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()
    trajectory, buffers = [np.tile(start, (n, 1))], np.zeros((n, len(start)))
    for step in range(config.num_steps):
        indices, weights = sampler.indices(step), trajectory[-1]

        def at(j: int, point: np.ndarray, indices: Tensor = indices) -> tuple[float, np.ndarray]:
            nn.utils.vector_to_parameters(torch.from_numpy(point.copy()), module.parameters())
            module.zero_grad()
            loss = task.loss_fn(module(data.inputs[indices[j]]), data.targets[indices[j]])
            loss.backward()
            return loss.item(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).numpy()

        gamma = config.gamma * parse_schedule(config.gamma_schedule, config.num_steps)(step)
        matrix = (1 - gamma) * np.eye(n) + gamma * graph.matrix(config.seed, step)
        gradients = np.stack([at(j, weights[j])[1] + config.weight_decay * weights[j] for j in range(n)])
        buffers = gradients if step == 0 else config.momentum * buffers + (1 - config.dampening) * gradients
        directions = (
            gradients + config.momentum * buffers if config.nesterov else buffers if config.momentum else gradients
        )
        rate = config.learning_rate * schedule(step)
        trajectory.append(np.stack(STEPPERS[config.algorithm](weights, directions, at, config, matrix, rate, step)))
    return np.stack(trajectory)


MOMENTUM = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
CASES: dict[str, TrainConfig] = {
    **{f"local-sgd every {h}": make_config("local-sgd", local_steps=h) for h in (1, 2, 3, 9)},
    "local-sgd with momentum": make_config("local-sgd", local_steps=2, **MOMENTUM),
    "local-sgd with dampening": make_config("local-sgd", local_steps=3, momentum=0.7, dampening=0.2),
    **{
        f"{algorithm} {graph}": make_config(algorithm, topology=graph, num_learners=n)
        for algorithm in ("adjacent-leader", "ubar")
        for graph, n in (("ring", 5), ("complete", 4), ("star", 5), ("exponential", 7), ("one-peer-exponential", 5),
                         ("random-pairing", 5), ("torus", 9), ("complete", 2))
    },
    **{f"{algorithm} with momentum": make_config(algorithm, topology="star", **MOMENTUM) for algorithm in ("adjacent-leader", "ubar")},
    "adjacent-leader in disagreement": make_config("adjacent-leader", gamma=0.4, topology="star"),
    **{f"dpsgd {o} in disagreement": make_config("dpsgd", order=o, gamma=0.6, gamma_schedule="step:2,3:0.25", topology=g, **MOMENTUM)
       for o, g in (("awc", "ring"), ("atc", "random-pairing"))},
    "adjacent-leader in growing disagreement": make_config("adjacent-leader", gamma_schedule="step:2:0.0", topology="exponential"),
    "adjacent-leader hard": make_config("adjacent-leader", leader_pull=2.0, degree_pull=1.5, leader_weight=0.6, degree_weight=0.4, topology="star"),
    "adjacent-leader to the hub": make_config("adjacent-leader", leader_pull=0.0, leader_weight=0.0, topology="star"),
    "ubar of all": make_config("ubar", topology="complete", kept_fraction=1.0, own_weight=0.2),
    "ubar of half": make_config("ubar", topology="exponential", num_learners=9, kept_fraction=0.5, own_weight=0.0),
    **{
        f"dpsgd {order} {fault}": make_config("dpsgd", order=order, num_faulty=2, fault=fault, fault_scale=0.5, topology=graph)
        for order, fault, graph in (("awc", "gaussian", "ring"), ("atc", "gaussian", "exponential"), ("awc", "gaussian", "star"),
                                    ("awc", "sign-flip", "complete"), ("atc", "sign-flip", "random-pairing"))
    },
    **{
        f"{algorithm} {fault}": make_config(algorithm, num_faulty=1, fault=fault, fault_scale=0.7, topology=graph, kept_fraction=kept, **MOMENTUM)
        for algorithm, kept in (("ubar", 0.75),)
        for fault, graph in (("gaussian", "complete"), ("sign-flip", "exponential"))
    },
    "adjacent-leader gaussian": make_config("adjacent-leader", num_faulty=1, fault_scale=0.7, topology="complete"),
    "adjacent-leader sign-flip": make_config("adjacent-leader", num_faulty=1, fault="sign-flip", topology="star"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_what_its_paper_says(name: str, tiny_task: Task) -> None:
    config = CASES[name]
    graph = topology(config.topology, config.num_learners)
    expected = reference(tiny_task, config, graph)
    found = torch.stack([s.params for s in trained(make_program(tiny_task, config, graph), STEPS)])
    torch.testing.assert_close(found, torch.from_numpy(expected), **EXACT)
    assert not np.allclose(expected[-1], expected[0])


@pytest.mark.parametrize("name", CASES)
def test_learners_one_after_another_and_in_order_do_the_same(name: str, tiny_task: Task) -> None:
    config = CASES[name]
    ends = [
        trained(make_program(tiny_task, c), STEPS)[-1].params
        for c in (config, dataclasses.replace(config, reproducible=True))
    ]
    torch.testing.assert_close(ends[0], ends[1], **EXACT)


@pytest.mark.parametrize("name", ["local-sgd every 2", "adjacent-leader random-pairing", "ubar random-pairing", "ubar gaussian",
                                  "adjacent-leader gaussian", "dpsgd awc gaussian", "dpsgd atc sign-flip", "adjacent-leader star"])  # fmt: skip
def test_replicas_are_runs_of_their_own(name: str, tiny_task: Task) -> None:
    config = CASES[name]
    together = trained(make_program(tiny_task, config, seeds=(0, 3, 0), learning_rates=(0.3, 0.1, 0.2)), STEPS)[
        -1
    ].params
    for part, seed, rate in zip(together.split(config.num_learners), (0, 3, 0), (0.3, 0.1, 0.2), strict=True):
        alone = dataclasses.replace(config, seed=seed, learning_rate=rate)
        torch.testing.assert_close(part, trained(make_program(tiny_task, alone), STEPS)[-1].params, **EXACT)


# Rules that become others --------------------------------------------------------------------------------------------


def ends(task: Task, *configs: TrainConfig) -> list[Tensor]:
    return [trained(make_program(task, c), STEPS)[-1].params for c in configs]


def test_local_sgd_that_averages_always_is_all_reduce(tiny_task: Task) -> None:
    found, expected = ends(tiny_task, make_config("local-sgd"), make_config("ssgd"))
    torch.testing.assert_close(found, expected, **EXACT)


def test_adjacent_leader_without_forces_and_weights_is_gossip(tiny_task: Task) -> None:
    free = make_config(
        "adjacent-leader", leader_pull=0.0, degree_pull=0.0, leader_weight=0.0, degree_weight=0.0, topology="star"
    )
    found, expected = ends(tiny_task, free, make_config("dpsgd", order="atc", topology="star"))
    torch.testing.assert_close(found, expected, **EXACT)


def test_trusting_the_only_neighbour_is_gossip(tiny_task: Task) -> None:
    found, expected = ends(
        tiny_task,
        make_config("ubar", num_learners=2, topology="complete"),
        make_config("dpsgd", num_learners=2, topology="complete"),
    )
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("algorithm", ["local-sgd", "adjacent-leader", "ubar"])
def test_one_learner_takes_plain_steps(algorithm: str, tiny_task: Task) -> None:
    found, expected = ends(tiny_task, *(make_config(a, num_learners=1, **MOMENTUM) for a in (algorithm, "ssgd")))
    torch.testing.assert_close(found, expected, **EXACT)


def test_no_mixing_leaves_learners_alone(tiny_task: Task) -> None:
    found, expected = ends(
        tiny_task, make_config("adjacent-leader", gamma=0.0), make_config("local-sgd", local_steps=99)
    )
    torch.testing.assert_close(found, expected, **EXACT)


def test_followers_are_pulled_to_the_leader(tiny_task: Task) -> None:
    """With all weight on the best, every learner of a complete graph is where it went; with forces alone it comes nearer."""
    all_on_leader = make_config("adjacent-leader", topology="complete", leader_weight=1.0, degree_weight=0.0)
    end = ends(tiny_task, all_on_leader)[0]
    torch.testing.assert_close(end, end[:1].expand_as(end), **EXACT)
    distances = []
    for pull in (0.0, 1.0, 3.0):
        alone = make_config("adjacent-leader", gamma=0.05, topology="complete", leader_pull=pull, degree_pull=0.0, leader_weight=0.0, degree_weight=0.0)  # fmt: skip
        program = make_program(tiny_task, alone)
        distances.append(float(program.consensus_distances(trained(program, STEPS)[-1])))
    assert distances[0] > distances[1] > distances[2]


def test_leaders_at_ties_and_in_replicas() -> None:
    ring = topology("ring", 5).matrix(0, 0)
    losses = np.array([[1.0, 1.0, 1.0, 0.5, 0.5], [5.0, 4.0, 3.0, 2.0, 1.0]])
    best, central = leaders(ring, losses)
    assert best.argmax(2).tolist() == [[4, 1, 3, 3, 4], [4, 2, 3, 4, 4]]
    assert central.argmax(2).tolist() == [[0, 1, 2, 3, 4]] * 2, "on a regular graph everyone is its own hub"
    star = topology("star", 5).matrix(0, 0)
    each, _ = leaders(np.stack([star, ring]), losses)
    assert each.argmax(2).tolist() == [[3, 1, 2, 3, 4], [4, 2, 3, 4, 4]]
    assert leaders(star, losses)[1].argmax(2).tolist() == [[0] * 5] * 2


# Losses of the own minibatch -----------------------------------------------------------------------------------------


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(6, 3))  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"batching": "stacked"}, {"channels_last": True},
                                     {"dtype": "float32", "autocast": "bf16"}])  # fmt: skip
@pytest.mark.parametrize("network", [partial(mlp, (6, 5, 3), "tanh"), convolutional])
def test_losses_at_own_weights_are_those_of_the_step(
    network: Any, options: dict[str, Any], reduction: str, tiny_data: TensorData
) -> None:
    """Dropout masks and batch statistics included, so that UBAR compares like with like."""
    loss = nn.CrossEntropyLoss(reduction=reduction)
    task = Task("own", "", network, loss, lambda root: (tiny_data, tiny_data), 0.7, math.log(3))
    program = make_program(task, make_config("ubar", num_learners=3, learning_rate=0.01, **options), seeds=(0, 1))
    state = trained(program, 2)[-1]
    before = {name: b.clone() for name, b in state.buffers.items()}
    indices = program.sampler.indices(state.step)
    evaluation = program.evaluate(state.params, state, indices)
    for learner in range(6):
        points = torch.stack([state.params[learner], state.params[0] + 0.1, state.params[learner]])
        found = program.minibatches.losses(points, learner, state, indices)
        own = evaluation.losses[learner].to(found.dtype)
        torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=0)
        exact = 0.01 if program.config.autocast == "bf16" else 1e-12  # bfloat16's 8 bits, summed in another order
        torch.testing.assert_close(found[0], own, rtol=exact, atol=0)
        assert found[1] != own
    assert all(torch.equal(b, state.buffers[name]) for name, b in before.items())


# Faults --------------------------------------------------------------------------------------------------------------


def faulty(fault: str, scale: float = 2.0, step: int = 3, num_faulty: int = 1) -> FaultyCommunicator:
    return FaultyCommunicator(StackedCommunicator(3), num_faulty, fault, scale, (5, 6), step)  # type: ignore[arg-type]


def test_a_sign_flip_reaches_the_others_only() -> None:
    rows = torch.arange(12, dtype=torch.float64).reshape(6, 2) + 1
    true = rows.clone()
    shared = torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]], dtype=torch.float64)
    for matrix in (shared, torch.stack([shared, shared.flip(0)])):
        found = faulty("sign-flip").start_mix(rows, matrix).wait()
        for r in range(2):
            m, part = (matrix if matrix.ndim == 2 else matrix[r]), true[3 * r : 3 * r + 3]
            expected = [
                m[j, 0] * part[0] + m[j, 1] * part[1] + m[j, 2] * part[2] * (1 if j == 2 else -2) for j in range(3)
            ]
            torch.testing.assert_close(found[3 * r : 3 * r + 3], torch.stack(expected), **EXACT)
    gathered = faulty("sign-flip", num_faulty=2).start_gather(rows, shared).wait()
    assert [gathered[k].tolist() for k in range(6)] == [
        (true[k] * (1 if k % 3 == 0 else -2)).tolist() for k in range(6)
    ]
    assert torch.equal(rows, true), "a learner's own weights are left alone"
    tells = faulty("sign-flip")
    assert torch.equal(tells.rows(rows), true)
    assert torch.equal(tells.sums(rows)[0], true[:3].sum(0))
    assert torch.equal(tells.means(rows)[1], true[3:].mean(0))


def test_gaussian_faults_are_pure_functions_of_where_and_when() -> None:
    rows, matrix = torch.zeros(6, 4000, dtype=torch.float64), torch.full((3, 3), 1 / 3, dtype=torch.float64)

    def noise(communicator: FaultyCommunicator) -> list[Tensor]:
        gathered = communicator.start_gather(rows, matrix).wait()
        assert all(not gathered[k].any() for k in (0, 1, 3, 4))
        return [gathered[2], gathered[5]]

    one = faulty("gaussian")
    draws = [*noise(one), *noise(one), *noise(faulty("gaussian", step=4))]  # replicas, exchanges, steps
    assert all(torch.equal(a, b) for a, b in zip(noise(faulty("gaussian")), draws[:2], strict=True))
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(6, dtype=torch.float64)
    assert float(correlations.abs().max()) < 4 / math.sqrt(4000)
    every = torch.cat(draws)
    assert abs(float(every.mean())) < 4 * 2 / math.sqrt(len(every))
    assert abs(float(every.std()) - 2) < 4 * 2 / math.sqrt(2 * len(every))


def honest_losses(task: Task, config: TrainConfig) -> Tensor:
    """Training losses of the honest learners at the end."""
    program = make_program(task, config)
    params = trained(program, config.num_steps)[-1].params[: config.num_learners - config.num_faulty]
    data = task.load_data(None)[0]
    return torch.stack(
        [nn.functional.cross_entropy(program.model.output(w, {}, data.inputs), data.targets) for w in params]
    )


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["complete", "exponential"])
def test_one_faulty_learner_breaks_gossip_but_not_ubar(graph: str, tiny_task: Task) -> None:
    options = {"topology": graph, "num_learners": 6, "local_batch_size": 20, "num_steps": 80, "learning_rate": 0.5, "schedule": "constant"}  # fmt: skip
    assert float(honest_losses(tiny_task, make_config("dpsgd", **options)).max()) < 0.15
    assert float(honest_losses(tiny_task, make_config("ubar", **options)).max()) < 0.15
    for fault, scale in (("gaussian", 1.0), ("gaussian", 10.0), ("sign-flip", 1.0), ("sign-flip", 4.0)):
        attack = {"num_faulty": 1, "fault": fault, "fault_scale": scale}
        assert float(honest_losses(tiny_task, make_config("ubar", **options, **attack)).max()) < 0.15, attack
        assert float(honest_losses(tiny_task, make_config("dpsgd", **options, **attack)).mean()) > 0.8, attack


@pytest.mark.parametrize("algorithm", sorted(RULES))
def test_a_replica_that_diverges_leaves_the_others_alone(algorithm: str, tiny_task: Task) -> None:
    options = {"num_faulty": 1, "fault": "sign-flip", "fault_scale": 2.0} if algorithm in GOSSIPING else {}
    config = make_config(algorithm, num_steps=40, topology="complete", weight_decay=1.0, schedule="constant", **options)
    program = make_program(tiny_task, config, seeds=(0, 1), learning_rates=(1e30, 0.1))
    state, alive = program.initial_state(), torch.ones(2, dtype=torch.bool)
    for _ in range(40):
        state, record = program.step(state, alive)
        alive = record.alive
    assert alive.tolist() == [False, True]
    assert bool(state.params.isfinite().all())
    alone = dataclasses.replace(config, seed=1, learning_rate=0.1)
    torch.testing.assert_close(
        state.params[5:], trained(make_program(tiny_task, alone), 40)[-1].params, rtol=1e-9, atol=1e-9
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    ["local-sgd with momentum", "adjacent-leader star", "adjacent-leader sign-flip", "ubar star", "ubar sign-flip"],
)
def test_a_gpu_takes_the_same_steps(name: str, tiny_task: Task) -> None:
    ends = [
        trained(make_program(tiny_task, dataclasses.replace(CASES[name], device=d), seeds=(0, 1)), STEPS)[
            -1
        ].params.cpu()
        for d in ("cpu", "cuda")
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


# Settings ------------------------------------------------------------------------------------------------------------


def test_every_algorithm_has_a_rule() -> None:
    from landscape.training.config import ALGORITHMS

    assert set(RULES) == set(ALGORITHMS)
    assert set(GOSSIPING) < set(ALGORITHMS)
    assert {name for names in RULE_FIELDS.values() for name in names} < {
        f.name for f in dataclasses.fields(TrainConfig)
    }


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("dpsgd", {"local_steps": 2}, "local_steps is for local-sgd"),
        ("local-sgd", {"local_steps": 0}, "local_steps must be at least 1, not 0"),
        ("ubar", {"leader_pull": 0.5}, "leader_pull is for adjacent-leader"),
        ("dpsgd", {"kept_fraction": 0.5}, "kept_fraction is for ubar"),
        ("adjacent-leader", {"degree_pull": -0.1}, "degree_pull must be finite and not negative, not -0.1"),
        ("adjacent-leader", {"leader_pull": math.nan}, "leader_pull must be finite and not negative, not nan"),
        ("adjacent-leader", {"leader_weight": 0.8, "degree_weight": 0.3}, "leader_weight and degree_weight must add up to at most 1, not 1.1"),
        ("ubar", {"kept_fraction": 0.0}, r"kept_fraction must be in \(0, 1\], not 0.0"),
        ("ubar", {"own_weight": 1.5}, r"own_weight must be in \[0, 1\], not 1.5"),
        ("ubar", {"gamma": 0.5}, "gamma is not for ubar"),
        ("ubar", {"gamma_schedule": "step:2:0.5"}, "gamma is not for ubar"),
        ("dpsgd", {"num_faulty": 5}, "num_faulty must be between 0 and 4, so that one of 5 learners is honest, not 5"),
        ("dpsgd", {"num_faulty": -1}, "num_faulty must be between 0 and 4"),
        ("ssgd", {"num_faulty": 1}, "num_faulty is for learners that send each other weights: dpsgd, adjacent-leader, ubar"),
        ("local-sgd", {"num_faulty": 1}, "num_faulty is for learners that send each other weights"),
        ("dpsgd", {"num_faulty": 1, "order": "cta"}, "num_faulty is for awc and atc"),
        ("dpsgd", {"num_faulty": 1, "fault_scale": math.inf}, "fault_scale must be finite and not negative, not inf"),
        ("dpsgd", {"fault_scale": 3.0}, "fault and fault_scale are for runs with num_faulty"),
        ("dpsgd", {"fault": "sign-flip"}, "fault and fault_scale are for runs with num_faulty"),
    ],
)  # fmt: skip
def test_a_setting_that_means_nothing_is_refused(algorithm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(algorithm, **options)


@pytest.mark.parametrize("name", CASES)
def test_settings_come_back_from_json(name: str) -> None:
    assert TrainConfig.from_json(CASES[name].to_json()) == CASES[name]
