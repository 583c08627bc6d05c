import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.checkpoints import Learners
from landscape.curvature.third import curved_gradient
from landscape.functional import ParameterLayout
from landscape.objective import Objective
from landscape.theory.smoothed_loss import (
    second_order_rate_ratio,
    second_order_rate_ratio_autodiff,
    smoothed_loss,
)
from landscape.theory.smoothing_length import smoothing_length


def scalar_objective(loss: Callable[[Tensor], Tensor]) -> Objective:
    """L of one weight: one example, input 1."""
    net = nn.Linear(1, 1, bias=False).double()
    return Objective(net, lambda out, target: loss(out[:, 0]), (torch.ones(1, 1).double(), torch.zeros(1).double()))


def spread(weights: list[list[float]]) -> Learners:
    tensor = torch.tensor(weights, dtype=torch.float64)
    return Learners(0, tensor, ParameterLayout(("weight",), (torch.Size([1, tensor.shape[1]]),)))


def network(activation: type[nn.Module], scale: float = 0.1) -> tuple[Objective, Learners]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)).double()
        x, y = torch.randn(60, 5).double(), torch.randint(3, (60,))
        objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
        weights = objective.model.initial_weights()[0] + scale * torch.randn(4, objective.num_parameters).double()
    return objective, Learners(0, weights, objective.model.layout)


QUARTIC = spread([[1.5], [0.5], [1.0]])


def test_loss_and_rate_on_a_quartic() -> None:
    """L = w^4/4 at 1: L~ - L = (6 v + E d^4)/4 (+ third moments), g~ = 1 + 3 v + E d^3; Gaussian E d^4 = 3 v^2."""
    objective = scalar_objective(lambda w: 0.25 * w**4)
    gradient, v = objective.gradient(QUARTIC.mean), 1 / 6
    for kernel in ("isotropic", "covariance"):
        found = smoothed_loss(objective, QUARTIC, gradient, kernel, num_samples=1000)  # type: ignore[arg-type]
        assert abs(found.loss_change.value - (6 * v + 3 * v**2) / 4) < 4 * found.loss_change.stderr
        assert abs(found.rate_ratio.value - (1 + 3 * v)) < 4 * found.rate_ratio.stderr
        assert abs(found.gradient_ratio.value - (1 + 3 * v) ** 2) < 4 * found.gradient_ratio.stderr
        assert found.loss_change.stderr < 0.1
    exact = smoothed_loss(objective, QUARTIC, gradient, "learners")
    assert exact.loss_change.value == pytest.approx(np.mean([1.5**4, 0.5**4, 1.0]) / 4 - 0.25)
    assert exact.rate_ratio.value == pytest.approx(np.mean([1.5**3, 0.5**3, 1.0]))
    assert exact.gradient_ratio.value == pytest.approx(exact.rate_ratio.value**2)
    assert (exact.loss_change.stderr, exact.rate_ratio.stderr) == (0, 0)


def test_errors_over_pairs_are_honest() -> None:
    """Few pairs, many seeds: means without bias, and the variance claimed is the variance over seeds."""
    objective, learners = network(nn.Tanh, 0.1)
    gradient = objective.gradient(learners.mean)
    truth = smoothed_loss(objective, learners, gradient, "isotropic", num_samples=2000)
    found = [smoothed_loss(objective, learners, gradient, "isotropic", num_samples=24, seed=s) for s in range(1, 41)]
    for name in ("loss_change", "rate_ratio", "gradient_ratio"):
        expected = getattr(truth, name)
        values = np.array([getattr(f, name).value for f in found])
        claimed = np.sqrt(np.mean([getattr(f, name).stderr ** 2 for f in found]))
        mean_error = math.hypot(values.std(ddof=1) / math.sqrt(len(values)), expected.stderr)
        assert abs(values.mean() - expected.value) < 4 * mean_error, name
        assert 0.7 < values.std(ddof=1) / claimed < 1.4, name


def test_a_scratch_file_changes_nothing() -> None:
    objective, learners = network(nn.Tanh)
    gradient = objective.gradient(learners.mean)
    held, spilled = (smoothed_loss(objective, learners, gradient, "isotropic", num_samples=6, memory_budget=b) for b in (None, 10))  # fmt: skip
    assert held == spilled


def test_second_order_on_a_quartic_both_ways() -> None:
    objective = scalar_objective(lambda w: 0.25 * w**4)
    gradient = objective.gradient(QUARTIC.mean)
    assert second_order_rate_ratio(objective, QUARTIC, gradient, step=0.01) == pytest.approx(1.5, rel=1e-8)
    assert second_order_rate_ratio_autodiff(objective, QUARTIC, gradient) == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_second_order_by_differences_and_by_autodiff(activation: type[nn.Module]) -> None:
    """Smooth networks: the two agree as the step shrinks. ReLU: between the kinks they do as well, at a finite step not."""
    objective, learners = network(activation, 0.3)
    gradient = objective.gradient(learners.mean)
    autodiff = second_order_rate_ratio_autodiff(objective, learners, gradient)
    assert second_order_rate_ratio(objective, learners, gradient, step=1e-4) == pytest.approx(autodiff, abs=2e-5)
    gap = abs(second_order_rate_ratio(objective, learners, gradient, step=0.25) - autodiff)
    assert gap > 0.02 if activation is nn.ReLU else gap < 0.02


def test_the_curved_gradient_of_a_convolutional_network_is_the_dense_derivative() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
        x, y = torch.randn(7, 1, 4, 4).double(), torch.randint(3, (7,))
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), chunk=3)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, objective.num_parameters, generator=generator, dtype=torch.float64)
    mean = objective.model.initial_weights()[0]
    step = 1e-3
    pushed = [objective.gradient(mean + step * v) + objective.gradient(mean - step * v) for v in directions]
    expected = (torch.stack(pushed).mean(0) - 2 * objective.gradient(mean)) / step**2
    torch.testing.assert_close(curved_gradient(objective, mean, directions), expected, rtol=1e-3, atol=1e-5)
    affine = Objective(nn.Linear(2, 1).double(), lambda out, _: out[:, 0], (torch.ones(3, 2).double(), torch.zeros(3)))
    assert torch.equal(
        curved_gradient(affine, torch.ones(3).double(), torch.ones(1, 3).double()), torch.zeros(3).double()
    )


def test_the_length_that_smooths_a_huber_function() -> None:
    """Huber's smoothed curvature at 0 is l erf(G/(sqrt(2) l sigma)): the length that brings it to a target is known."""
    slope, steep = 1.0, 4.0
    objective = scalar_objective(
        lambda w: torch.where(w.abs() < slope / steep, steep * w**2 / 2, slope * w.abs() - slope**2 / (2 * steep))
    )
    found = smoothing_length(objective, spread([[0.0]] * 2), 1.0, num_samples=2000, sigma=0.1, num_bisections=6)
    assert found.status == "found"
    probability = np.linspace(0.01, 3, 200_000)
    curve = steep * np.array([math.erf(slope / (math.sqrt(2) * steep * s)) for s in probability[::100]])
    expected = float(np.interp(-1.0, -curve, probability[::100]))
    assert abs(found.sigma - expected) < 4 * found.scale_stderr * 0.1 + 0.01 * expected
    assert 0 < found.scale_stderr < 0.1 * found.scale
    assert found.scale * 0.1 == pytest.approx(found.sigma, rel=0.1)  # the sample's own spread


def test_a_length_that_is_not_needed_or_not_enough() -> None:
    quadratic = scalar_objective(lambda w: w**2)  # curvature 2 at every scale
    learners = spread([[0.1], [-0.1]])
    below = smoothing_length(quadratic, learners, 3.0, kernel="learners", smallest_scale=1, largest_scale=16)
    assert (below.status, below.scales) == ("already below", (1.0,))
    above = smoothing_length(quadratic, learners, 1.0, kernel="learners", smallest_scale=1, largest_scale=16)
    assert above.status == "not reached"
    assert above.lambda_max == pytest.approx((2.0, 2.0, 2.0))
    equal = smoothing_length(quadratic, spread([[1.0], [1.0]]), 1.0, kernel="learners")
    assert equal.status == "no deviations"
    assert math.isnan(float(equal.to_xarray()["scale"]))
