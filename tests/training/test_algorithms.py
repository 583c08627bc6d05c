from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape.data.dataset import TensorData
from landscape.data.sampling import IndexSampler
from landscape.models import mlp
from landscape.tasks import Task
from landscape.training import LearnerState, Program, Topology, TrainConfig, topology
from landscape.training.algorithms import gradient_points
from landscape.training.communicator import StackedCommunicator, spread
from landscape.training.loop import controlled_disagreement
from landscape.training.noise import SHAPES, NoiseProfile, noise_factors
from landscape.training.schedule import parse_schedule

EXACT = {"rtol": 1e-12, "atol": 1e-12}
STEPS = 4

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ssgd": {"algorithm": "ssgd"},
    "ssgd-star": {"algorithm": "ssgd-star", "sigma0": 0.05},
    "awc": {"algorithm": "dpsgd", "order": "awc"},
    "atc": {"algorithm": "dpsgd", "order": "atc"},
    "cta": {"algorithm": "dpsgd", "order": "cta"},
}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.1},
    "all": {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1, "schedule": "warmup:2+cosine"},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
TOPOLOGIES = [("ring", 5), ("complete", 4), ("star", 4), ("exponential", 6), ("one-peer-exponential", 5), ("random-pairing", 5),
              ("ring", 16), ("random-pairing", 16), ("exponential", 24)]  # fmt: skip


def make_config(**options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "learning_rate": 0.3,
        "num_learners": 4,
        "local_batch_size": 4,
        "num_steps": STEPS,
        "dtype": "float64",
    }
    return TrainConfig(**{**defaults, **options})


def make_program(task: Task, config: TrainConfig, graph: Topology | None = None, **options: Any) -> Program:
    return Program(
        task, config, graph or topology(config.topology, config.num_learners), task.load_data(None)[0], **options
    )


def advance(program: Program, steps: int = STEPS) -> list[LearnerState]:
    """States from step 0 on."""
    states, alive = [program.initial_state()], torch.ones(program.num_replicas, dtype=torch.bool)
    for _ in range(steps):
        state, record = program.step(states[-1], alive)
        alive = record.alive
        states.append(state)
    return states


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assign(module: nn.Module, weights: Tensor) -> None:
    nn.utils.vector_to_parameters(weights.clone(), module.parameters())


def plain_loop(task: Task, config: TrainConfig, graph: Topology, zeta: list[Tensor | None]) -> list[Tensor]:
    """The same training with one module and one torch.optim.SGD a learner, weights (n, d) from step 0 on.

    theory.md sec. 2: each optimiser acts on its learner's own gradient point, weight decay included; mixing is around it.
    """
    n, data = config.num_learners, task.load_data(None)[0]
    learners = [task.initial_model(config.seed).double() for _ in range(n)]
    optimisers = [torch.optim.SGD(m.parameters(), lr=config.learning_rate, momentum=config.momentum, dampening=config.dampening,
                                  nesterov=config.nesterov, weight_decay=config.weight_decay) for m in learners]  # fmt: skip
    sampler = IndexSampler((config.seed,), n, config.local_batch_size, len(data))
    schedule = parse_schedule(config.schedule, config.num_steps)
    trajectory = [torch.stack([flat(m) for m in learners])]
    for step in range(config.num_steps):
        indices = sampler.indices(step)
        matrix = torch.from_numpy(graph.matrix(config.seed, step))
        matrix = (1 - config.gamma) * torch.eye(n, dtype=torch.float64) + config.gamma * matrix
        weights = trajectory[-1]
        mixed = [sum((matrix[j, k] * weights[k] for k in range(n)), torch.zeros_like(weights[j])) for j in range(n)]
        start = mixed if config.order == "cta" and config.algorithm == "dpsgd" else list(weights)
        for j in range(n):
            noise = zeta[step]
            assign(learners[j], start[j] if noise is None else start[j] + noise[j])
            optimisers[j].zero_grad()
            task.loss_fn(learners[j](data.inputs[indices[j]]), data.targets[indices[j]]).backward()
            assign(learners[j], start[j])
        if config.algorithm != "dpsgd":  # all-reduce
            for same in zip(*(m.parameters() for m in learners), strict=True):
                mean = torch.stack([p.grad for p in same]).mean(0)
                for p in same:
                    p.grad = mean.clone()
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = config.learning_rate * schedule(step)
            optimiser.step()
        after = torch.stack([flat(m) for m in learners])
        if config.algorithm == "dpsgd" and config.order == "awc":
            after = torch.stack(mixed) + (after - weights)
        if config.algorithm == "dpsgd" and config.order == "atc":
            after = matrix @ after
        trajectory.append(after)
    return trajectory


# Against torch.optim.SGD ---------------------------------------------------------------------------------------------


def _plain_cases() -> list[tuple[str, int, str, str]]:
    """All-reduce has no topology; every optimiser meets one topology, the others meet the plain and the fullest ones."""
    cases = [("ring", 5, name, optimiser) for name in ("ssgd", "ssgd-star") for optimiser in OPTIMISERS]
    for graph_name, n in TOPOLOGIES:
        chosen = (
            OPTIMISERS
            if (graph_name, n) == ("ring", 5)
            else ("plain", "all")
            if n > 8
            else ("plain", "all", "nesterov and decay")
        )
        cases += [(graph_name, n, name, optimiser) for name in ("awc", "atc", "cta") for optimiser in chosen]
    return cases


@pytest.mark.parametrize(("graph_name", "n", "name", "optimiser"), _plain_cases())
def test_stacked_equals_a_plain_loop_over_learners(
    tiny_task: Task, graph_name: str, n: int, name: str, optimiser: str
) -> None:
    config = make_config(topology=graph_name, num_learners=n, seed=3, **ALGORITHMS[name], **OPTIMISERS[optimiser])
    program = make_program(tiny_task, config)
    expected = plain_loop(tiny_task, config, program.topology, [program.noise(t) for t in range(STEPS)])
    for state, weights in zip(advance(program), expected, strict=True):
        torch.testing.assert_close(state.params, weights, **EXACT)
    assert not torch.equal(expected[0], expected[-1])


@pytest.mark.parametrize("name", ["awc", "atc", "cta"])
@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_controlled_disagreement_mixes_with_part_of_m(tiny_task: Task, name: str, gamma: float) -> None:
    config = make_config(gamma=gamma, **ALGORITHMS[name])
    program = make_program(tiny_task, config)
    expected = plain_loop(tiny_task, config, program.topology, [None] * STEPS)
    torch.testing.assert_close(advance(program)[-1].params, expected[-1], **EXACT)


@pytest.mark.parametrize("graph_name", ["ring", "random-pairing", "one-peer-exponential"])
def test_a_scheduled_gamma_mixes_with_its_value_at_each_step(tiny_task: Task, graph_name: str) -> None:
    config = make_config(topology=graph_name, gamma=0.8, gamma_schedule="step:2:0.25", **ALGORITHMS["cta"])
    program = make_program(tiny_task, config)
    states = advance(program)
    for before, after in itertools.pairwise(states):
        gamma = 0.8 if before.step < 2 else 0.2
        constant = make_program(tiny_task, dataclasses.replace(config, gamma=gamma, gamma_schedule="constant"))
        assert torch.equal(constant.step(before, torch.ones(1, dtype=torch.bool))[0].params, after.params)
        matrix = program.topology.damped(gamma).matrix(0, before.step)
        assert np.array_equal(program.mixing(before.step).squeeze(0).numpy(), matrix)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_learner_is_plain_sgd(tiny_task: Task, name: str) -> None:
    options = {**ALGORITHMS[name], **OPTIMISERS["all"]}
    if name == "ssgd-star":
        options["sigma0"] = 0.0
    config = make_config(num_learners=1, **options)
    alone = plain_loop(
        tiny_task,
        dataclasses.replace(config, algorithm="ssgd", sigma0=0.0, order="awc"),
        topology("ring", 1),
        [None] * STEPS,
    )
    for graph_name in (
        "ring",
        "complete",
        "torus",
        "hypercube",
        "star",
        "exponential",
        "one-peer-exponential",
        "random-pairing",
    ):
        states = advance(make_program(tiny_task, dataclasses.replace(config, topology=graph_name)))
        torch.testing.assert_close(torch.stack([s.params for s in states]), torch.stack(alone), **EXACT)


# Identities of theory.md sec. 2 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_complete_mixing_atc_is_ssgd_cta_matches_in_the_mean_and_awc_does_not(tiny_task: Task, optimiser: str) -> None:
    runs = {
        name: [
            s.params
            for s in advance(
                make_program(tiny_task, make_config(topology="complete", **ALGORITHMS[name], **OPTIMISERS[optimiser]))
            )
        ]
        for name in ("ssgd", "awc", "atc", "cta")
    }
    for step in range(1, STEPS + 1):
        ssgd = runs["ssgd"][step]
        torch.testing.assert_close(runs["atc"][step], ssgd, **EXACT)
        torch.testing.assert_close(runs["cta"][step].mean(0), ssgd[0], **EXACT)
        assert (runs["cta"][step] - ssgd).abs().max() > 1e-3
        if step > 1:
            assert (runs["awc"][step].mean(0) - ssgd[0]).abs().max() > 1e-4


def test_all_learners_of_ssgd_stay_equal(tiny_task: Task) -> None:
    program = make_program(tiny_task, make_config(algorithm="ssgd", momentum=0.9))
    state = advance(program)[-1]
    assert torch.equal(state.params, state.params[:1].expand_as(state.params))
    assert float(program.consensus_distances(state)[0]) == pytest.approx(0, abs=1e-15)


def test_ssgd_star_without_noise_is_ssgd(tiny_task: Task) -> None:
    star = advance(make_program(tiny_task, make_config(algorithm="ssgd-star", sigma0=0.0, momentum=0.9)))
    plain = advance(make_program(tiny_task, make_config(algorithm="ssgd", momentum=0.9)))
    assert all(torch.equal(a.params, b.params) for a, b in zip(star, plain, strict=True))


@pytest.mark.parametrize("name", ["awc", "atc", "cta"])
@pytest.mark.parametrize(("graph_name", "n"), TOPOLOGIES[:6], ids=[f"{g}-{n}" for g, n in TOPOLOGIES[:6]])
def test_the_mean_moves_by_the_mean_gradient(tiny_task: Task, graph_name: str, n: int, name: str) -> None:
    """w_a(t+1) = w_a(t) - alpha g_a, g_a the mean of the gradients at the learners' gradient points."""
    program = make_program(tiny_task, make_config(topology=graph_name, num_learners=n, **ALGORITHMS[name]))
    states = advance(program)
    for before, after in itertools.pairwise(states):
        matrix = torch.from_numpy(program.topology.matrix(0, before.step))
        points = gradient_points("dpsgd", program.config.order, before.params, matrix)
        gradients = program.evaluate(points, before, program.sampler.indices(before.step)).gradients
        torch.testing.assert_close(after.params.mean(0), before.params.mean(0) - 0.3 * gradients.mean(0), **EXACT)


def test_momentum_buffers_are_local_and_never_mixed(tiny_task: Task) -> None:
    config = make_config(topology="complete", momentum=0.9, **ALGORITHMS["atc"])
    state = advance(make_program(tiny_task, config))[-1]
    assert torch.allclose(state.params, state.params[:1].expand_as(state.params))
    assert (state.momentum - state.momentum.mean(0)).abs().max() > 1e-3


def test_a_step_leaves_the_state_it_starts_from(tiny_task: Task) -> None:
    for name in ALGORITHMS:
        program = make_program(tiny_task, make_config(momentum=0.9, **ALGORITHMS[name]))
        before = program.initial_state()
        copied = copy.deepcopy(before)
        program.step(before, torch.ones(1, dtype=torch.bool))
        assert torch.equal(before.params, copied.params)
        assert torch.equal(before.momentum, copied.momentum)
        assert before.step == 0


# SSGD*'s noise -------------------------------------------------------------------------------------------------------


def test_the_weight_noise_is_gaussian_of_the_level_asked_for(tiny_task: Task) -> None:
    program = make_program(tiny_task, make_config(algorithm="ssgd-star", sigma0=0.2, num_learners=8))
    draws = torch.stack([program.noise(t) for t in range(20)]) / 0.2
    count = draws.numel()
    assert abs(draws.mean()) < 4 / count**0.5
    assert abs(draws.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / count) ** 0.5
    across = (draws[:, 0] * draws[:, 1]).flatten()
    assert abs(across.mean()) < 4 / len(across) ** 0.5


def test_the_weight_noise_follows_its_levels_over_the_steps(tiny_task: Task) -> None:
    config = make_config(algorithm="ssgd-star", num_learners=2)
    program = make_program(tiny_task, config, sigma0=np.array([0.0, 1.0, 3.0]))
    unit = make_program(tiny_task, dataclasses.replace(config, sigma0=1.0))
    assert program.noise(0) is None
    for step, level in ((1, 1.0), (2, 3.0), (4, 3.0)):
        torch.testing.assert_close(program.noise(step), level * unit.noise(step), **EXACT)


LAYERS = (35, 18)
"""Of the 6-5-3 network."""


def make_profile(place: str, shape: str, level: float = 0.3) -> NoiseProfile:
    rows = level * torch.randn(3, 53, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    factors = torch.stack([noise_factors(scale * rows, shape, LAYERS) for scale in (0.0, 1.0)])  # type: ignore[arg-type]
    return NoiseProfile((0, 2), place, shape, factors, LAYERS)  # type: ignore[arg-type]


@pytest.mark.parametrize("zero_sum", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_profile_on_the_weights_moves_the_gradient_points(tiny_task: Task, shape: str, zero_sum: bool) -> None:
    config = make_config(
        algorithm="ssgd-star", sigma0="a run", noise_shape=shape, noise_zero_sum=zero_sum, momentum=0.5
    )
    program = make_program(tiny_task, config, profiles=[make_profile("weights", shape)])
    noise = [program.noise(t) for t in range(STEPS)]
    assert noise[0] is not None
    assert not noise[1].any()
    assert len({row.numpy().tobytes() for row in noise[2]}) == 4
    assert float(noise[2].sum(0).abs().max() < 1e-12) == zero_sum
    assert program.gradient_noise(2) is None
    for state, weights in zip(advance(program), plain_loop(tiny_task, config, program.topology, noise), strict=True):
        torch.testing.assert_close(state.params, weights, **EXACT)


@pytest.mark.parametrize("optimiser", ["plain", "nesterov"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_profile_on_the_gradient_is_added_to_the_mean_gradient(tiny_task: Task, shape: str, optimiser: str) -> None:
    config = make_config(
        algorithm="ssgd-star", sigma0="a run", noise_place="gradient", noise_shape=shape, **OPTIMISERS[optimiser]
    )
    program = make_program(tiny_task, config, profiles=[make_profile("gradient", shape)])
    plain = make_program(tiny_task, dataclasses.replace(config, algorithm="ssgd", sigma0=0.0, noise_place="weights", noise_shape="isotropic"))  # fmt: skip
    alive, factor = torch.ones(1, dtype=torch.bool), 1 + config.momentum if config.nesterov else 1
    for before, after in itertools.pairwise(advance(program)):
        assert program.noise(before.step) is None
        xi = program.gradient_noise(before.step)
        assert torch.equal(xi, xi[:1].expand_as(xi))
        assert bool(xi.any()) == (before.step >= 2)
        quiet = plain.step(before, alive)[0]
        torch.testing.assert_close(after.params, quiet.params - 0.3 * factor * xi, **EXACT)


def test_replicas_have_profiles_of_their_own(tiny_task: Task) -> None:
    config = make_config(algorithm="ssgd-star", sigma0="a run", noise_place="gradient", noise_shape="layer")
    profiles = [make_profile("gradient", "layer", level) for level in (0.1, 0.4)]
    together = advance(make_program(tiny_task, config, seeds=(0, 5), profiles=profiles))[-1]
    for r, seed in enumerate((0, 5)):
        alone = make_program(tiny_task, dataclasses.replace(config, seed=seed), profiles=[profiles[r]])
        torch.testing.assert_close(together.params[4 * r : 4 * r + 4], advance(alone)[-1].params, **EXACT)


def test_profiles_that_do_not_fit_the_program_are_refused(tiny_task: Task) -> None:
    config = make_config(algorithm="ssgd-star", sigma0="a run", noise_shape="layer")
    short = NoiseProfile((0,), "weights", "layer", torch.ones(1, 1), (7,))
    with pytest.raises(
        ValueError, match="a noise profile for 7 parameters on the weights does not fit: the model has 53"
    ):
        make_program(tiny_task, config, profiles=[short])
    with pytest.raises(ValueError, match="sigma0 names a run to match, so the program needs noise profiles"):
        make_program(tiny_task, config)
    with pytest.raises(ValueError, match="2 replicas, but 1 noise profiles"):
        make_program(tiny_task, config, seeds=(0, 1), profiles=[make_profile("weights", "layer")])
    mixed = [make_profile("weights", "layer"), make_profile("gradient", "layer")]
    with pytest.raises(ValueError, match="on the gradient does not fit"):
        make_program(tiny_task, config, seeds=(0, 1), profiles=mixed)


def test_the_level_of_the_noise_where_a_number_tells_it(tiny_task: Task) -> None:
    def level(step: int, profile: NoiseProfile | None = None, **changes: Any) -> float | None:
        program = make_program(tiny_task, make_config(**changes), profiles=None if profile is None else [profile])
        return program.noise_level(step)

    star = {"algorithm": "ssgd-star", "sigma0": "a run"}
    assert level(0, algorithm="ssgd-star", sigma0=0.25) == 0.25
    assert level(0, algorithm="ssgd-star", sigma0=0.25, noise_zero_sum=True) is None
    assert level(3, make_profile("gradient", "layer"), noise_place="gradient", noise_shape="layer", **star) == 0
    assert level(3, make_profile("weights", "layer"), noise_shape="layer", **star) is None
    isotropic = make_profile("weights", "isotropic")
    assert level(3, isotropic, noise_every=2, **star) == pytest.approx(math.sqrt(isotropic.total_variance[1] / 53))
    assert level(1, isotropic, noise_every=2, **star) == 0


# Replicas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph_name", ["ring", "random-pairing"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_replicas_stacked_equal_each_run_alone(tiny_task: Task, name: str, graph_name: str) -> None:
    n = 12  # sparse mixing
    config = make_config(topology=graph_name, num_learners=n, momentum=0.5, **ALGORITHMS[name])
    seeds, rates = (0, 7, 0, 3), (0.1, 0.2, 0.4, 0.1)
    together = advance(make_program(tiny_task, config, seeds=seeds, learning_rates=rates))[-1]
    for r, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        alone = advance(make_program(tiny_task, dataclasses.replace(config, seed=seed, learning_rate=rate)))[-1]
        kept = together.select(slice(r * n, (r + 1) * n))
        torch.testing.assert_close(kept.params, alone.params, **EXACT)
        torch.testing.assert_close(kept.momentum, alone.momentum, **EXACT)


def test_learners_evaluated_in_several_chunks_are_the_same(tiny_task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_program(tiny_task, make_config(num_learners=5, **ALGORITHMS["awc"]))
    parts = make_program(tiny_task, make_config(num_learners=5, **ALGORITHMS["awc"]))
    monkeypatch.setattr(parts.minibatches, "_chunk", 2)
    torch.testing.assert_close(advance(parts)[-1].params, advance(whole)[-1].params, **EXACT)


def _until_dead(program: Program, steps: int) -> tuple[LearnerState, Tensor]:
    """Three replicas of four learners, the middle one doomed: once dead it must never change or come back."""
    state, alive, frozen = program.initial_state(), torch.ones(3, dtype=torch.bool), None
    for _ in range(steps):
        state, record = program.step(state, alive)
        assert bool((alive | ~record.alive).all())
        alive, doomed = record.alive, state.select(slice(4, 8))
        if frozen is not None:
            assert torch.equal(doomed.params, frozen.params)
            assert torch.equal(doomed.momentum, frozen.momentum)
        elif not bool(alive[1]):
            frozen = copy.deepcopy(doomed)
        assert torch.isfinite(state.params).all()
        assert torch.isfinite(state.momentum).all()
    return state, alive


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_replica_that_blows_up_is_frozen_finite_and_disturbs_no_other(tiny_task: Task, name: str) -> None:
    steps, task = 30, dataclasses.replace(tiny_task, build_model=partial(mlp, (6, 5, 5, 3), "relu"))
    config = make_config(momentum=0.5, **ALGORITHMS[name])
    state, alive = _until_dead(make_program(task, config, seeds=(0, 1, 2), learning_rates=(0.1, 1e100, 0.2)), steps)
    assert alive.tolist() == [True, False, True]
    for r, rate in ((0, 0.1), (2, 0.2)):
        alone = advance(make_program(task, dataclasses.replace(config, seed=r, learning_rate=rate)), steps)[-1]
        torch.testing.assert_close(state.select(slice(4 * r, 4 * r + 4)).params, alone.params, **EXACT)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_replica_whose_update_overflows_keeps_its_last_finite_weights(tiny_task: Task, name: str) -> None:
    """Its loss and gradients are still finite; the learning rate times them is not."""
    task = dataclasses.replace(tiny_task, loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    config = make_config(momentum=0.5, dtype="float32", local_batch_size=40, **ALGORITHMS[name])
    program = make_program(task, config, seeds=(0, 1, 2), learning_rates=(0.01, 3e38, 0.02))
    state, alive = _until_dead(program, 3)
    assert alive.tolist() == [True, False, True]
    assert torch.equal(state.params[4:8], program.initial_state().params[4:8])


def test_seeds_and_rates_must_be_as_many(tiny_task: Task) -> None:
    with pytest.raises(ValueError, match="2 seeds, but 1 learning rates"):
        make_program(tiny_task, make_config(**ALGORITHMS["awc"]), seeds=(0, 1), learning_rates=(0.1,))


def test_a_batch_larger_than_the_data_is_refused(tiny_task: Task) -> None:
    with pytest.raises(ValueError, match=r"local_batch_size 41 is larger than the data \(40 training examples\)"):
        make_program(tiny_task, make_config(local_batch_size=41, **ALGORITHMS["awc"]))


# Networks with state of their own ------------------------------------------------------------------------------------


def _normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("name", ["ssgd", "awc", "atc", "cta"])
def test_batch_norm_statistics_are_each_learners_own(tiny_task: Task, name: str) -> None:
    task = dataclasses.replace(tiny_task, build_model=_normalised)
    config = make_config(num_learners=3, **ALGORITHMS[name])
    states = advance(make_program(task, config))
    data, sampler = task.load_data(None)[0], IndexSampler((0,), 3, 4, 40)
    learners = [task.initial_model(0).double() for _ in range(3)]
    for before in states[:-1]:
        matrix = torch.from_numpy(topology("ring", 3).matrix(0, before.step))
        points = gradient_points(config.algorithm, config.order, before.params, matrix)
        for j, learner in enumerate(learners):
            assign(learner, points[j])
            learner(data.inputs[sampler.indices(before.step)[j]])
    for j, learner in enumerate(learners):
        for buffer, value in learner.named_buffers():
            torch.testing.assert_close(states[-1].buffers[buffer][j], value, **EXACT)


def _dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 3))


@pytest.mark.parametrize("batched", [True, False])
def test_dropout_is_a_pure_function_of_seed_and_step(tiny_task: Task, batched: bool) -> None:
    task = dataclasses.replace(tiny_task, build_model=_dropping)
    program = make_program(task, make_config(batching="stacked" if batched else "interleaved", **ALGORITHMS["awc"]))
    random_state = torch.get_rng_state()
    states = advance(program)
    assert torch.equal(random_state, torch.get_rng_state()), "the global random state is left alone"
    torch.manual_seed(123)
    resumed = program.step(states[2], torch.ones(1, dtype=torch.bool))[0]
    torch.set_rng_state(random_state)
    assert torch.equal(resumed.params, states[3].params)
    at = states[2].params[:1].expand(4, -1)
    indices = program.sampler.indices(2)[:1].expand(4, -1)
    gradients = [program.evaluate(at, dataclasses.replace(states[2], step=t), indices).gradients for t in (2, 3)]
    assert not torch.equal(gradients[0], gradients[1]), "other masks at another step"
    assert len({g.numpy().tobytes() for g in gradients[0]}) == 4, "other masks for each learner"


def test_a_network_that_cannot_be_batched_trains_alike(tiny_task: Task) -> None:
    config = make_config(**ALGORITHMS["cta"])
    task = dataclasses.replace(tiny_task, build_model=lambda: _Branching())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = advance(make_program(task, config))
    assert sum("cannot be batched" in str(w.message) for w in caught) == 1
    expected = plain_loop(task, config, topology("ring", 4), [None] * STEPS)
    torch.testing.assert_close(found[-1].params, expected[-1], **EXACT)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output.tanh() if bool(output.sum() > 0) else output.sin()


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2])),
                                     nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1)])  # fmt: skip
def test_the_minibatch_loss_is_the_users(tiny_task: Task, loss_fn: nn.Module) -> None:
    task = dataclasses.replace(tiny_task, loss_fn=loss_fn)
    config = make_config(learning_rate=0.05, seed=1, local_batch_size=8, **ALGORITHMS["awc"])
    reference = copy.deepcopy(task)
    expected = plain_loop(
        dataclasses.replace(reference, loss_fn=copy.deepcopy(loss_fn).double()),
        config,
        topology("ring", 4),
        [None] * STEPS,
    )
    torch.testing.assert_close(advance(make_program(task, config))[-1].params, expected[-1], **EXACT)


# Mixing and averages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(("graph_name", "n"), TOPOLOGIES, ids=[f"{g}-{n}" for g, n in TOPOLOGIES])
def test_mixing_is_the_matrix_product_dense_or_sparse(graph_name: str, n: int, replicas: int) -> None:
    tensor = torch.randn(replicas * n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = topology(graph_name, n)
    communicator = StackedCommunicator(n)
    for step in range(3):
        shared = torch.from_numpy(graph.matrix(0, step))
        each = torch.stack([torch.from_numpy(graph.matrix(r, step)) for r in range(replicas)])
        for matrix in (shared, each, shared):
            expected = torch.cat(
                [(matrix if matrix.ndim == 2 else matrix[r]) @ part for r, part in enumerate(tensor.split(n))]
            )
            for backend in (communicator, StackedCommunicator(n, ordered=True)):
                torch.testing.assert_close(backend.start_mix(tensor, matrix).wait(), expected, rtol=1e-14, atol=1e-14)
    means = torch.stack([part.mean(0) for part in tensor.split(n)])
    for found in (communicator.means(tensor), StackedCommunicator(n, ordered=True).means(tensor)):
        torch.testing.assert_close(found, means, rtol=1e-14, atol=1e-14)
    everyone = torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in tensor.split(n)])
    assert torch.equal(spread(communicator.means(tensor), n), communicator.means(tensor).repeat_interleave(n, dim=0))
    torch.testing.assert_close(spread(means, n), everyone)


def test_means_and_consensus_distances_by_hand(tiny_task: Task) -> None:
    params = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [1.0, 5.0]], dtype=torch.float64)
    assert StackedCommunicator(2).means(params).tolist() == [[1, 0], [1, 3]]
    program = make_program(tiny_task, make_config(num_learners=2, **ALGORITHMS["awc"]), seeds=(0, 1))
    assert program.consensus_distances(LearnerState(params, {}, None, 0)).tolist() == [1, 2]
    matrix = np.full((2, 2), 0.5)
    assert controlled_disagreement(matrix, 1.0) is matrix
    assert controlled_disagreement(matrix, 0.5).tolist() == [[0.75, 0.25], [0.25, 0.75]]
    assert controlled_disagreement(np.stack([matrix, np.eye(2)]), 0.0).tolist() == [np.eye(2).tolist()] * 2


def test_the_program_leaves_the_data_and_the_random_state_alone(tiny_task: Task, tiny_data: TensorData) -> None:
    before, random_state = tiny_data.fingerprint(), torch.get_rng_state()
    for name in ALGORITHMS:
        advance(make_program(tiny_task, make_config(**ALGORITHMS[name])), 1)
    assert tiny_data.fingerprint() == before
    assert torch.equal(random_state, torch.get_rng_state())


def test_initial_weights_depend_on_the_seed_only(tiny_task: Task) -> None:
    state = make_program(
        tiny_task, make_config(**ALGORITHMS["awc"]), seeds=(0, 1, 0), learning_rates=(0.1, 0.1, 0.5)
    ).initial_state()
    first, second, third = state.params.split(4)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    assert torch.equal(first, first[:1].expand_as(first))
    assert torch.equal(flat(tiny_task.initial_model(1).double()), second[0])


def test_accuracy_improves_on_a_task_that_can_be_learned(tiny_task: Task) -> None:
    """The whole thing learns."""
    program = make_program(
        tiny_task, make_config(learning_rate=0.5, local_batch_size=20, num_steps=80, **ALGORITHMS["awc"])
    )
    data = tiny_task.load_data(None)[0]
    states = advance(program, 80)
    losses = [
        float(F.cross_entropy(program.model.output(s.params.mean(0), {}, data.inputs), data.targets))
        for s in (states[0], states[-1])
    ]
    assert losses[1] < 0.5 * losses[0]
