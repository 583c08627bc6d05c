import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.checkpoints import Learners
from landscape.noise.covariance import gradient_covariance_summary
from landscape.noise.decomposition import decompose, measure_noise
from landscape.noise.draws import draw_gradients
from landscape.objective import Objective


class Point(nn.Module):
    """A weight vector and nothing else: the data choose the loss."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w - x


def quadratic(curvature: Tensor, examples: int = 200, seed: int = 0) -> tuple[Objective, Tensor]:
    """l_i(w) = (1/2) (w - x_i)^T A (w - x_i): gradient A (w - mean x), covariance A Cov(x) A, exactly known."""
    x = torch.randn(examples, len(curvature), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def loss(residual: Tensor, target: Tensor) -> Tensor:
        return 0.5 * torch.einsum("bi,ij,bj->b", residual, curvature, residual)

    return Objective(Point(len(curvature)), loss, (x, torch.zeros(examples))), x


def network(activation: type[nn.Module] = nn.Tanh) -> tuple[Objective, Learners]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)).double()
        x, y = torch.randn(60, 5).double(), torch.randint(3, (60,))
        objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
        weights = objective.model.initial_weights()[0] + 0.3 * torch.randn(4, objective.num_parameters).double()
    return objective, Learners(0, weights, objective.model.layout)


CURVATURE = torch.diag(torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64))


def test_identities_hold_to_rounding() -> None:
    objective, learners = network()
    found = measure_noise(objective, learners, learning_rate=0.7, local_batch_size=8, num_draws=16)
    assert float(found["identity_error"]) < 1e-12
    np.testing.assert_allclose(found["Delta_S"] + found["Delta_2"] + found["cross"], found["xi_squared"], rtol=1e-10)
    excess = (found["alpha_e_ratio"] - 1) ** 2 * 0.7**2 * float(found["gradient_norm_squared"])
    np.testing.assert_allclose(found["Delta"] + excess, found["xi_squared"], rtol=1e-10)


def test_expected_effective_rate_is_the_exact_prediction() -> None:
    objective, learners = network()
    found = measure_noise(objective, learners, learning_rate=0.7, local_batch_size=8, num_draws=400)
    assert abs(float(found["alpha_e_ratio_exact"]) - 1) > 4 * float(
        found["alpha_e_ratio_stderr"]
    )  # DPSGD's rate differs, visibly
    assert abs(float(found["alpha_e_ratio_mean"]) - float(found["alpha_e_ratio_exact"])) < 4 * float(
        found["alpha_e_ratio_stderr"]
    )


def test_ssgd_has_no_landscape_noise_and_keeps_its_rate() -> None:
    objective, learners = network()
    equal = Learners(0, learners.mean.expand(4, -1).clone(), learners.layout)
    found = measure_noise(objective, equal, learning_rate=0.7, local_batch_size=8, num_draws=400)
    assert float(found["Delta_2_mean"]) == 0
    assert float(found["alpha_e_ratio_exact"]) == pytest.approx(1, abs=1e-12)
    assert abs(float(found["alpha_e_ratio_mean"]) - 1) < 4 * float(found["alpha_e_ratio_stderr"])


def test_minibatch_noise_has_its_closed_form() -> None:
    objective, x = quadratic(CURVATURE)
    n, batch, alpha = 5, 10, 0.3
    learners = Learners(0, torch.ones(n, 3, dtype=torch.float64), objective.model.layout)
    found = measure_noise(objective, learners, learning_rate=alpha, local_batch_size=batch, num_draws=600)
    covariance = CURVATURE @ torch.cov(x.T, correction=0) @ CURVATURE
    expected = alpha**2 * float(covariance.trace()) / (n * batch)
    assert abs(float(found["Delta_S_mean"]) - expected) < 4 * float(found["Delta_S_stderr"])


def test_landscape_noise_vanishes_on_a_quadratic_with_shared_curvature() -> None:
    objective, _ = quadratic(CURVATURE)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = measure_noise(
        objective, Learners(0, weights, objective.model.layout), learning_rate=0.3, local_batch_size=10, num_draws=8
    )
    # (1/n) sum_j A (w_j - w_a) = 0: every minibatch has the same Hessian, and the deviations cancel
    assert float(found["Delta_2_mean"]) < 1e-28


def test_drift_on_a_quartic_is_the_gradient_of_the_averaged_sharpness() -> None:
    """l(w) = w^4/4: (1/n) sum (w_a + d_j)^3 - w_a^3 = 3 w_a mean d^2 + mean d^3, and (1/2) d/dw (3 w^2 Sigma) = 3 w Sigma."""
    objective = Objective(
        Point(1), lambda r, _: 0.25 * r[:, 0] ** 4, (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4))
    )
    learners = Learners(0, torch.tensor([[1.5], [0.5], [1.0]], dtype=torch.float64), objective.model.layout)
    found = measure_noise(objective, learners, learning_rate=0.1, local_batch_size=2, num_draws=4)
    sigma = np.mean([0.25, 0.25, 0.0])
    assert float(found["alpha_e_ratio_exact"]) == pytest.approx(1 + 3 * sigma, rel=1e-12)
    assert float(found["systematic_share"]) == pytest.approx(1.0, rel=1e-12)  # no minibatch noise in this data


def test_systematic_share_against_its_definition() -> None:
    objective, learners = network()
    found = measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=300)
    drift = objective.stacked_gradients(learners.weights).mean(0) - objective.gradient(learners.mean)
    draws = draw_gradients(
        objective, learners.mean, learners.weights, num_learners=4, local_batch_size=8, num_draws=800, seed=1
    )
    xi_d = draws.at_points - draws.at_mean
    unbiased = (float(xi_d.mean(0).square().sum()) - float(xi_d.var(0).sum()) / 800) / float(
        xi_d.square().sum(1).mean()
    )
    assert float(found["systematic_share"]) == pytest.approx(
        float(drift @ drift) / float(xi_d.square().sum(1).mean()), rel=0.1
    )
    assert float(found["systematic_share"]) == pytest.approx(unbiased, rel=0.1)


def test_points_move_the_gradients_only() -> None:
    objective, learners = network()
    moved = learners.weights * 1.1
    found = measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=4, points=moved)
    as_function = measure_noise(
        objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=4, points=lambda draw: moved
    )
    np.testing.assert_array_equal(found["Delta_2"], as_function["Delta_2"])
    assert "alpha_e_ratio_exact" not in as_function
    plain = measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=4)
    np.testing.assert_allclose(plain["Delta_S"], found["Delta_S"], rtol=1e-12)
    assert not np.allclose(plain["Delta_2"], found["Delta_2"])


def test_covariance_summary_is_the_dense_covariance() -> None:
    objective, learners = network()
    stacked = torch.cat([g for g, _ in objective.example_gradients(learners.mean)])
    dense = torch.cov(stacked.T, correction=0)
    directions, _ = torch.linalg.qr(
        torch.randn(objective.num_parameters, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    found = gradient_covariance_summary(objective, learners.mean, directions, chunk=7)
    assert found.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    np.testing.assert_allclose(found.along, torch.diagonal(directions.T @ dense @ directions).numpy(), rtol=1e-10)
    assert found.noise_scale == pytest.approx(found.trace / float(objective.gradient(learners.mean).square().sum()))


def test_bad_input() -> None:
    objective, learners = network()
    with pytest.raises(ValueError, match="local_batch_size"):
        measure_noise(objective, learners, learning_rate=1.0, local_batch_size=61, num_draws=4)
    with pytest.raises(ValueError, match="num_draws"):
        measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=1)
    broken = Learners(7, torch.full_like(learners.weights, math.nan), learners.layout)
    with pytest.raises(ValueError, match="step 7 holds weights that are not finite"):
        measure_noise(objective, broken, learning_rate=1.0, local_batch_size=8)
    draws = draw_gradients(objective, learners.mean, learners.weights, num_learners=4, local_batch_size=8, num_draws=2)
    with pytest.raises(ValueError, match="vanishes"):
        decompose(draws, torch.zeros(objective.num_parameters, dtype=torch.float64), 1.0)
