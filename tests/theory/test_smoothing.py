import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.checkpoints import Learners
from landscape.functional import ParameterLayout
from landscape.objective import Objective
from landscape.theory.smoothing import (
    KERNELS,
    kernel_deviations,
    smoothed_curvature,
    smoothness_bounds,
)


def scalar_objective(loss: object) -> Objective:
    """L of one weight: one example, input 1."""
    net = nn.Linear(1, 1, bias=False).double()
    return Objective(net, lambda out, target: loss(out[:, 0]), (torch.ones(1, 1).double(), torch.zeros(1).double()))  # type: ignore[operator]


def spread(weights: list[list[float]]) -> Learners:
    tensor = torch.tensor(weights, dtype=torch.float64)
    return Learners(0, tensor, ParameterLayout(("weight",), (torch.Size([1, tensor.shape[1]]),)))


def network(activation: type[nn.Module]) -> tuple[Objective, Learners]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)).double()
        x, y = torch.randn(60, 5).double(), torch.randint(3, (60,))
        objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
        weights = objective.model.initial_weights()[0] + 0.1 * torch.randn(4, objective.num_parameters).double()
    return objective, Learners(0, weights, objective.model.layout)


def test_smoothed_curvature_of_the_absolute_value() -> None:
    """L = |w|: the true smoothed curvature at 0 is sqrt(2/pi)/sigma, the autodiff average 0 (theory.md sec. 5)."""
    sigma = 0.5
    found = smoothed_curvature(
        scalar_objective(torch.abs),
        spread([[0.0], [0.0]]),
        kernel="isotropic",
        num_samples=800,
        step=0.2 * sigma,
        sigma=sigma,
    )
    expected = math.sqrt(2 / math.pi) / sigma
    assert abs(found.lambda_max - expected) < 4 * found.lambda_max_stderr
    assert found.lambda_max_stderr < 0.15 * expected
    assert found.lambda_autodiff == 0
    assert found.kink_part == found.lambda_max
    assert smoothness_bounds(1.0, sigma, math.inf)["sharp"] == pytest.approx(expected)  # the bound is attained


def test_smoothed_curvature_of_a_quartic_under_every_kernel() -> None:
    """L = w^4/4: L'' = 3 w^2, so the smoothed curvature is 3 (w_a^2 + E delta^2); smooth, so no kink part."""
    learners = spread([[1.5], [0.5], [1.0]])
    variance = learners.weight_variance
    assert variance == pytest.approx(1 / 6)
    for kernel in KERNELS:
        found = smoothed_curvature(
            scalar_objective(lambda w: 0.25 * w**4), learners, kernel=kernel, num_samples=200, step=1e-3
        )
        assert abs(found.lambda_max - 3 * (1 + variance)) <= 4 * found.lambda_max_stderr + 1e-5
        assert abs(found.kink_part) < 1e-4
        assert (found.lambda_max_stderr == 0) == (kernel == "learners")


@pytest.mark.parametrize("kernel", KERNELS)
def test_smoothed_curvature_is_the_dense_average_where_the_network_is_smooth(kernel: str) -> None:
    objective, learners = network(nn.GELU)
    found = smoothed_curvature(objective, learners, kernel=kernel, num_samples=6, max_matvecs=60, tol=1e-6, step=1e-3)  # type: ignore[arg-type]
    points = learners.mean + kernel_deviations(learners, kernel, 6)  # type: ignore[arg-type]
    net, data = objective.model, objective.data

    def loss(flat: Tensor) -> Tensor:
        out = torch.func.functional_call(net.module, net.layout.split(flat), (data.inputs,))
        return nn.functional.cross_entropy(out, data.targets)

    dense = torch.stack([torch.func.hessian(loss)(p) for p in points]).mean(0)
    values = torch.linalg.eigvalsh(dense)
    assert found.lambda_autodiff == pytest.approx(float(values[-1]), rel=1e-5)
    assert found.lambda_max == pytest.approx(float(values[-1]), rel=1e-4)
    assert found.lambda_min == pytest.approx(float(values[0]), rel=1e-2, abs=1e-4)
    np.testing.assert_allclose(found.plateau_values, found.lambda_max, rtol=1e-3)


def test_kernels_have_the_covariance_they_claim() -> None:
    generator = torch.Generator().manual_seed(0)
    learners = spread(torch.randn(5, 3, generator=generator, dtype=torch.float64).tolist())
    sigma = learners.deviations.T @ learners.deviations / 5
    count = 200_000
    for kernel, expected in (
        ("isotropic", torch.eye(3, dtype=torch.float64) * sigma.trace() / 3),
        ("covariance", sigma),
    ):
        drawn = kernel_deviations(learners, kernel, count)  # type: ignore[arg-type]
        assert torch.equal(drawn[: count // 2], -drawn[count // 2 :])
        found = drawn.T @ drawn / count
        error = 4 * float(expected.diagonal().max()) * math.sqrt(2 / (count / 2))
        assert float((found - expected).abs().max()) < error
    assert torch.equal(kernel_deviations(learners, "learners", 99), learners.deviations)


def test_nothing_is_smoothed_without_disagreement() -> None:
    objective, learners = network(nn.Tanh)
    equal = Learners(0, learners.mean.expand(3, -1).clone(), learners.layout)
    found = smoothed_curvature(objective, equal, kernel="learners", max_matvecs=60, tol=1e-6)
    assert found.num_samples == 1
    assert found.lambda_max == pytest.approx(found.lambda_autodiff, rel=1e-4)


@pytest.mark.parametrize(("slope", "curvature", "sigma"), [(1.0, 2.0, 0.3), (2.0, 0.5, 1.0), (1.0, 10.0, 0.1)])
def test_the_smooth_bound_is_attained_by_the_clipped_quadratic(slope: float, curvature: float, sigma: float) -> None:
    """Huber's function is G-Lipschitz and l_s-smooth; at 0 its smoothed curvature is l_s P(|delta| < G/l_s) = l_s erf(...)."""
    generator = np.random.default_rng(0)
    deviations = generator.normal(0, sigma, 400_000)
    inside = np.abs(deviations) < slope / curvature
    measured, error = curvature * inside.mean(), curvature * inside.std() / math.sqrt(len(inside))
    bounds = smoothness_bounds(slope, sigma, curvature)
    assert abs(measured - bounds["smooth"]) < 4 * error
    assert bounds["smooth"] <= min(curvature, bounds["sharp"]) <= bounds["duchi"] <= bounds["paper"]


def test_bounds_without_noise_are_infinite() -> None:
    assert smoothness_bounds(1.0, 0.0, 3.0) == {"paper": math.inf, "duchi": math.inf, "sharp": math.inf, "smooth": 3.0}
