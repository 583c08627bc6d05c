"""Online diagnostics against brute force, against closed forms over many seeds, and on a real run."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from landscape.training.config import TrainConfig
from landscape.training.diagnostics import Diagnostics, diagnose
from landscape.training.loop import Program
from landscape.training.topology import topology

if TYPE_CHECKING:
    from landscape.tasks import Task

B = 10


def told(gradients: np.ndarray, step_gradient: np.ndarray) -> dict[str, float]:
    return diagnose(gradients @ step_gradient, gradients @ gradients.mean(0), np.square(gradients).sum(1), B)


def test_estimates_and_errors_are_those_of_all_pairs_and_of_the_jackknife() -> None:
    generator = np.random.default_rng(0)
    gradients, step_gradient = generator.normal(size=(5, 7)) + 1, generator.normal(size=7) + 1

    def directly(g: np.ndarray) -> np.ndarray:
        n = len(g)
        pairs = sum(g[j] @ g[k] for j in range(n) for k in range(n) if j != k) / (n * (n - 1))
        spread = np.square(g - g.mean(0)).sum() / (n - 1)
        return np.array([g.mean(0) @ step_gradient / pairs, B * spread / pairs, pairs])

    found = told(gradients, step_gradient)
    without = np.stack([directly(np.delete(gradients, j, axis=0)) for j in range(5)])
    errors = np.sqrt(4 / 5 * np.square(without - without.mean(0)).sum(0))
    names = ("alpha_e_ratio", "noise_scale", "gradient_norm_squared")
    assert [found[n] for n in names] == pytest.approx(directly(gradients), rel=1e-12)
    assert [found[f"{n}_stderr"] for n in names] == pytest.approx(errors, rel=1e-12)


def test_estimates_are_unbiased_and_their_errors_honest() -> None:
    """400 large batches of 12 gradients around a known g; noise scale B Tr(cov)/|g|^2."""
    generator, g = np.random.default_rng(1), np.full(30, 0.5)
    step_gradient = generator.normal(size=30) + 1
    expected = {
        "alpha_e_ratio": float(step_gradient @ g / (g @ g)),
        "noise_scale": float(B * 30 * 0.25 / (g @ g)),
        "gradient_norm_squared": float(g @ g),
    }
    runs = [told(g + 0.5 * generator.normal(size=(12, 30)), step_gradient) for _ in range(400)]
    for name, value in expected.items():
        z = np.array([(r[name] - value) / r[f"{name}_stderr"] for r in runs])
        estimates = np.array([r[name] for r in runs])
        assert 0.7 < math.sqrt(np.square(z).mean()) < 1.3, name
        bias = estimates.mean() - value
        # a ratio of estimates is biased by about its relative variance: 1% here, allowed beside four standard errors
        assert abs(bias) < 4 * estimates.std() / 20 + (0.0 if name == "gradient_norm_squared" else 0.02 * value), name


def test_too_little_to_tell_is_said() -> None:
    assert diagnose(np.ones(2), np.ones(2), np.ones(2), B) == {}
    opposed = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    found = told(opposed, np.array([1.0, 0]))
    assert found["gradient_norm_squared"] < 0
    assert math.isnan(found["alpha_e_ratio"])
    assert math.isnan(found["noise_scale_stderr"])


def test_a_run_tells_its_effective_learning_rate_within_its_errors(tiny_task: Task) -> None:
    """Where it can be told: alpha_e/alpha of DPSGD steps against g_a . g/|g|^2 with the exact gradient, and the noise scale against the exact Tr C/|g|^2."""
    c = TrainConfig(
        "dpsgd", 0.5, num_learners=12, local_batch_size=30, num_steps=30, dtype="float64", batching="stacked"
    )
    data = tiny_task.load_data(None)[0]
    program = Program(tiny_task, c, topology("ring", 12), data)
    diagnostics, state, z = Diagnostics(program), program.initial_state(), []
    for _ in range(12):
        new, record = program.step(state, torch.ones(1, dtype=torch.bool), keep_gradient=True)
        assert record.mean_gradient is not None
        found = diagnostics.measure(state, record.mean_gradient[0])
        mean = state.params.mean(0)
        each, _ = program.model.example_gradients(mean, {}, data.inputs, data.targets)
        g = each.mean(0)
        exact = {
            "alpha_e_ratio": float(record.mean_gradient[0] @ g / (g @ g)),
            "noise_scale": float((each - g).square().sum(1).mean() / (g @ g)),
            "gradient_norm_squared": float(g @ g),
        }
        z.append([(found[n] - v) / found[f"{n}_stderr"] for n, v in exact.items()])
        if found["gradient_norm_squared"] < 3 * found["gradient_norm_squared_stderr"]:
            z[-1][0] = z[-1][1] = 0.0  # ratios of what is hardly seen are not normal
        state = new
    assert (np.abs(z) < 4.5).all(), "12 gradients: Student's t with 11 degrees of freedom"
    assert (np.sqrt(np.square(z).mean(0)) < 1.6).all()
    assert np.count_nonzero(np.asarray(z)[:, 0]) >= 8


def test_dropout_masks_of_the_diagnostics_are_not_those_of_the_step(tiny_task: Task) -> None:
    """SSGD at fixed weights: alpha_e/alpha is 1 on average. With the step's own masks it was 1.2 on such a network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    task = dataclasses.replace(tiny_task, build_model=lambda: network)
    c = TrainConfig("ssgd", 0.1, num_learners=4, local_batch_size=2, num_steps=400, dtype="float64")
    program = Program(task, c, topology("ring", 4), task.load_data(None)[0])
    start, told = program.initial_state(), []
    diagnostics = Diagnostics(program)
    for step in range(300):
        state = dataclasses.replace(start, step=step)
        _, record = program.step(state, torch.ones(1, dtype=torch.bool), keep_gradient=True)
        assert record.mean_gradient is not None
        indices = diagnostics.sampler.indices(step)
        gradients = program.evaluate(state.params, state, indices, masks="diagnostics dropout").gradients
        assert gradients is not None
        along = gradients @ record.mean_gradient[0]
        pairs = (gradients.sum(0).square().sum() - gradients.square().sum()) / 12
        told.append((float(along.mean()), float(pairs)))
    along, pairs = np.array(told).T
    error = np.std(along - pairs) / math.sqrt(len(along))
    assert abs(along.mean() - pairs.mean()) < 4 * error
    with_own_masks = program.evaluate(start.params, start, program.sampler.indices(0)).gradients
    others = program.evaluate(start.params, start, program.sampler.indices(0), masks="diagnostics dropout").gradients
    assert with_own_masks is not None
    assert others is not None
    assert not torch.equal(with_own_masks, others)
