from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.curvature.hessian import hessian
from landscape.objective import Objective
from landscape.theory.flatness import average_direction_sharpness, variance_flatness

D = 12
CURVATURES = torch.logspace(2, -1, D, dtype=torch.float64)
FLOOR = 0.5


def quadratic(curvatures: Tensor = CURVATURES, floor: float = FLOOR, dtype: torch.dtype = torch.float64) -> Objective:
    """L = floor + sum_i lambda_i w_i^2/2, as a linear model with squared loss: rows sqrt((d + 1) lambda_i/2) e_i, and one of zeros."""
    d = len(curvatures)
    inputs = torch.cat([torch.diag((curvatures * (d + 1) / 2).sqrt()), torch.zeros(1, d).double()])
    targets = torch.zeros(d + 1, 1).double()
    targets[-1] = math.sqrt((d + 1) * floor)
    net = nn.Linear(d, 1, bias=False).to(dtype)
    return Objective(net, nn.functional.mse_loss, (inputs.to(dtype), targets.to(dtype)))


def uncorrelated(variances: Tensor, steps: int, seed: int = 0) -> Tensor:
    """(T, d) centred, with exactly these variances along the axes and no correlation between them."""
    drawn = torch.randn(steps, len(variances), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns = torch.linalg.qr(drawn - drawn.mean(0)).Q
    return columns * (variances * (steps - 1)).sqrt()


def walk(steps: int, dimension: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(steps, dimension, generator=generator, dtype=torch.float64).cumsum(0) * 0.01


# Closed forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
def test_a_quadratic_with_noise_of_a_power_of_the_curvature(gamma: float) -> None:
    """sigma^2 = lambda^(gamma - 1): psi = 2 (gamma - 1); widths 2 sqrt(2 (e - 1) L/lambda)."""
    variances = 1e-4 * CURVATURES ** (gamma - 1)
    found = variance_flatness(quadratic(), uncorrelated(variances, 500), relative_error=1e-6)
    order = torch.argsort(variances, descending=True, stable=True)
    np.testing.assert_allclose(found.variance, variances[order], rtol=1e-9)
    assert found.loss == pytest.approx(FLOOR)
    assert not found.censored.any()
    assert found.settled.all()
    assert found.explained == pytest.approx(1)
    if gamma != 1:  # equal variances have no directions of their own
        exact = 2 * np.sqrt(2 * (math.e - 1) * FLOOR / CURVATURES[order].numpy())
        np.testing.assert_allclose(found.flatness, exact, rtol=2e-6)
        assert (np.abs(found.flatness - exact) <= found.flatness_error).all()
        assert found.psi == pytest.approx(2 * (gamma - 1), abs=1e-4)
        assert found.law.verdict == "measured"
        directions = found.directions.abs()
        torch.testing.assert_close(directions, torch.eye(D).double()[:, order], rtol=0, atol=1e-8)


def test_an_interval_that_is_not_symmetric() -> None:
    """Off the minimum, at w: floor + lambda (w + theta)^2/2 = e L on either side."""
    centre = torch.zeros(D).double()
    centre[3] = 0.2
    trajectory = centre + uncorrelated(1e-4 * torch.linspace(2, 1, D).double(), 400)
    found = variance_flatness(quadratic(), trajectory, relative_error=1e-6)
    level = math.e * found.loss
    assert found.loss == pytest.approx(FLOOR + float(CURVATURES[3]) * 0.02)
    # across, what is at 0.2 along axis 3 stays in the loss
    others = np.sqrt(2 * (level - found.loss) / CURVATURES.numpy())
    others[3] = math.sqrt(2 * (level - FLOOR) / float(CURVATURES[3]))
    np.testing.assert_allclose(found.flatness, 2 * others, rtol=2e-6)


@pytest.mark.parametrize("psi", [0.0, 2.0, 4.0])
def test_psi_is_covered_by_its_interval(psi: float) -> None:
    rng = np.random.default_rng(0)
    hits = []
    for seed in range(60):
        scatter = torch.from_numpy(np.exp(0.5 * rng.standard_normal(D)))
        found = variance_flatness(quadratic(), uncorrelated(1e-4 * CURVATURES ** (psi / 2) * scatter, 100, seed))
        made = found.to_xarray()
        hits.append(float(made["psi_low"]) <= psi <= float(made["psi_high"]))
    assert abs(np.mean(hits) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 60)


def test_variances_of_simulated_descent() -> None:
    """w <- w - alpha (lambda w + noise): sigma^2 = alpha c/(lambda (2 - alpha lambda)), samples correlated by 1 - alpha lambda."""
    alpha, steps = 0.01, 20_000
    curvatures = torch.logspace(1.5, 0.5, 8, dtype=torch.float64)
    rng, w, rows = np.random.default_rng(0), np.zeros(8), []
    rates, noise = 1 - alpha * curvatures.numpy(), np.sqrt(curvatures.numpy() ** 3)
    for _ in range(steps):
        w = rates * w - alpha * noise * rng.standard_normal(8)
        rows.append(w)
    found = variance_flatness(quadratic(curvatures), torch.from_numpy(np.array(rows[2000:])))
    exact = (alpha * curvatures**2 / (2 - alpha * curvatures)).numpy()
    assert (np.abs(found.variance - exact) < 4 * found.variance_stderr).all()
    assert (found.variance_stderr < 0.2 * exact).all()
    correlated = len(rows[2000:]) * (1 - rates**2) / (1 + rates**2)
    np.testing.assert_allclose(found.effective_samples, correlated, rtol=0.15)
    assert float(2 * found.law.low) < 4.1 + 0.3
    assert found.psi == pytest.approx(4, abs=0.5)


def test_errors_of_variances_are_calibrated() -> None:
    """Of correlated samples along one direction."""
    z = []
    for seed in range(100):
        rng, x, rows = np.random.default_rng(seed), 0.0, []
        for _ in range(1500):
            x = 0.9 * x + rng.standard_normal()
            rows.append([x, 0.001 * rng.standard_normal()])
        found = variance_flatness(quadratic(CURVATURES[:2]), torch.tensor(rows[100:], dtype=torch.float64), reach=1e6)
        z.append((found.variance[0] - 1 / (1 - 0.81)) / found.variance_stderr[0])
    assert 0.7 < np.sqrt(np.mean(np.square(z))) < 1.3


# Honesty -------------------------------------------------------------------------------------------------------------


def test_censored_directions_are_flagged_and_left_out() -> None:
    trajectory = uncorrelated(1e-4 * CURVATURES, 300)
    exact = 2 * np.sqrt(2 * (math.e - 1) * FLOOR / CURVATURES.numpy())
    reach = 1.0
    found = variance_flatness(quadratic(), trajectory, reach=reach)
    assert found.reach == reach
    assert np.array_equal(found.censored, exact / 2 > reach)
    assert 0 < found.censored.sum() < D
    np.testing.assert_allclose(found.flatness[found.censored], 2 * reach)
    np.testing.assert_allclose(found.flatness[~found.censored], exact[~found.censored], rtol=2e-3)
    assert found.law.num_points == (~found.censored).sum()
    everything = variance_flatness(quadratic(), trajectory, reach=1e-6)
    assert everything.censored.all()
    assert everything.law.num_points == 0
    assert everything.law.verdict == "inconclusive"
    np.testing.assert_allclose(everything.flatness, 2e-6)


def test_a_drifting_trajectory_is_inconclusive() -> None:
    """A random walk's principal components are cosines in time, and their variances a power law of no meaning."""
    found = variance_flatness(quadratic(), walk(300))
    assert not found.settled[:2].any()
    assert found.variance[:2].sum() > 0.5 * found.variance.sum()
    assert found.law.verdict == "inconclusive"
    assert "not stationary" in found.law.reason
    line = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None] * torch.ones(D).double()
    found = variance_flatness(quadratic(), line)
    assert len(found.variance) == 1
    assert found.law.verdict == "inconclusive"


def test_a_loss_that_is_not_finite_far_away_ends_the_interval() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x + (1 - self.w).log().sum()  # nan from w = 1 on

    data = (torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    objective = Objective(Guarded(), nn.functional.mse_loss, data)
    trajectory = uncorrelated(torch.tensor([1e-4, 1e-6], dtype=torch.float64), 50)
    found = variance_flatness(objective, trajectory, reach=100.0, relative_error=1e-5)
    # (1 + log(1 - w))^2 = e at w = 1 - exp(sqrt(e) - 1) on one side, 1 - exp(-sqrt(e) - 1) on the other
    exact = math.exp(math.sqrt(math.e) - 1) - math.exp(-math.sqrt(math.e) - 1)
    np.testing.assert_allclose(found.flatness, exact, rtol=1e-4)


def test_few_points_and_few_directions() -> None:
    found = variance_flatness(
        quadratic(), uncorrelated(torch.ones(2, dtype=torch.float64), 3) @ torch.eye(2, D).double()
    )
    assert len(found.variance) == 2
    assert found.law.verdict == "inconclusive"
    assert found.directions.shape == (D, 2)
    limited = variance_flatness(quadratic(), uncorrelated(1e-4 * CURVATURES, 100), num_directions=3)
    assert limited.explained == pytest.approx(float(CURVATURES[:3].sum() / CURVATURES.sum()))


def test_float32_and_a_badly_scaled_trajectory() -> None:
    variances = 1e-4 * CURVATURES
    plain = variance_flatness(quadratic(), uncorrelated(variances, 300))
    short = variance_flatness(quadratic(dtype=torch.float32), uncorrelated(variances, 300).float())
    np.testing.assert_allclose(short.flatness, plain.flatness, rtol=5e-3)
    np.testing.assert_allclose(short.variance, plain.variance, rtol=1e-4)
    small = variance_flatness(quadratic(), 1e-8 * uncorrelated(variances, 300), reach=10.0)
    np.testing.assert_allclose(small.flatness, plain.flatness, rtol=2e-3)
    assert small.psi == pytest.approx(plain.psi, abs=0.01)


def test_labels_and_values_counted() -> None:
    objective = quadratic()
    taken = []
    original = objective.stacked_values
    objective.stacked_values = lambda w: taken.append(len(w)) or original(w)  # type: ignore[method-assign,func-returns-value]
    found = variance_flatness(objective, uncorrelated(1e-4 * CURVATURES, 100))
    assert sum(taken) == found.num_values
    assert len(taken) < 30  # all ends advance together
    made = found.to_xarray()
    assert made.sizes["direction"] == D
    assert float(made["psi"]) == found.psi
    assert float(made["psi_stderr"]) == 2 * found.law.stderr
    assert all({"long_name", "units"} <= set(v.attrs) for v in made.values())


def test_refusals() -> None:
    moving = uncorrelated(CURVATURES, 20)
    with pytest.raises(ValueError, match="at least 3 points"):
        variance_flatness(quadratic(), moving[:2])
    with pytest.raises(ValueError, match="does not move"):
        variance_flatness(quadratic(), torch.ones(5, D).double())
    with pytest.raises(ValueError, match="needs a positive one"):
        variance_flatness(quadratic(floor=0.0), torch.stack([moving[0], -moving[0], 0 * moving[0]]))
    for options in ({"num_directions": 0}, {"relative_error": 0.0}, {"reach": -1}):
        with pytest.raises(ValueError, match=r"must be|at least"):
            variance_flatness(quadratic(), moving, **options)


# Average-direction sharpness -----------------------------------------------------------------------------------------


def test_on_a_quadratic_the_sharpness_is_half_the_trace_of_h_sigma() -> None:
    deviations = 0.1 * torch.randn(5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deviations -= deviations.mean(0)
    mean = torch.ones(D).double()
    objective = quadratic()
    found = average_direction_sharpness(objective, mean, deviations)
    h = hessian(objective, mean).to_dense()
    assert float(found["sharpness"]) == pytest.approx(float((deviations @ h * deviations).sum()) / 10, rel=1e-10)
    assert float(found["sharpness_stderr"]) == 0
    each = [objective.value(mean + delta) - objective.value(mean) for delta in deviations]
    np.testing.assert_allclose(found["learner_excess"], each, rtol=1e-10)
    assert float(found["sharpness_spread"]) == pytest.approx(np.std(each, ddof=1))
    assert float(found["loss"]) == pytest.approx(objective.value(mean))


def test_one_learner_and_none() -> None:
    found = average_direction_sharpness(quadratic(), torch.ones(D).double(), torch.zeros(1, D).double())
    assert float(found["sharpness"]) == 0
    assert np.isnan(found["sharpness_spread"])
    with pytest.raises(ValueError, match="no deviations"):
        average_direction_sharpness(quadratic(), torch.ones(D).double(), torch.zeros(0, D).double())
