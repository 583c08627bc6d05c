import numpy as np
import pytest
import torch
from torch import nn

from landscape.curvature.hessian import HessianOperator
from landscape.noise.draws import draw_gradients
from landscape.objective import Objective
from landscape.theory.ledger import one_step_ledger


def make(loss: nn.Module, activation: type[nn.Module]) -> tuple[Objective, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 2)).double()
        x, y = torch.randn(40, 4).double(), torch.randn(40, 2).double()
    objective = Objective(net, loss, (x, y))
    return objective, objective.model.initial_weights()[0]


def ledger(objective: Objective, mean: torch.Tensor, rate: float) -> object:
    gradient = objective.gradient(mean)
    points = mean + 0.1 * torch.randn(3, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = draw_gradients(objective, mean, points, num_learners=3, local_batch_size=5, num_draws=6)
    return one_step_ledger(objective, mean, gradient, draws, HessianOperator(objective, mean), rate)


def test_the_ledger_is_exact_on_a_quadratic() -> None:
    net = nn.Linear(4, 2).double()
    data = (torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(40, 2).double())
    objective = Objective(net, nn.MSELoss(), data)
    found = ledger(objective, objective.model.initial_weights()[0].detach(), 0.8)
    np.testing.assert_allclose(found["realised"], found["predicted"], atol=1e-12)
    assert float(abs(found["remainder_mean"])) < 1e-12


def test_the_remainder_is_of_third_order() -> None:
    objective, mean = make(nn.MSELoss(), nn.Tanh)
    large, small = (float(abs(ledger(objective, mean, rate)["remainder_mean"])) for rate in (0.02, 0.01))
    assert large / small == pytest.approx(8, rel=0.1)


def test_the_split_adds_up_to_the_quadratic_form() -> None:
    objective, mean = make(nn.MSELoss(), nn.Tanh)
    rate, found = 0.3, ledger(*make(nn.MSELoss(), nn.Tanh), 0.3)
    points = mean + 0.1 * torch.randn(3, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = draw_gradients(objective, mean, points, num_learners=3, local_batch_size=5, num_draws=6)
    operator = HessianOperator(objective, mean)
    gradient = objective.gradient(mean)
    direct = [-rate * float(g @ gradient) + rate**2 / 2 * float(g @ (operator @ g)) for g in draws.at_points]
    np.testing.assert_allclose(found["predicted"], direct, rtol=1e-10)
    np.testing.assert_allclose(
        found["gain"] + found["along"] + found["across"] + found["mixed"], found["predicted"], rtol=1e-12
    )
