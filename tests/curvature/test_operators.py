import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.curvature.coupled import CoupledOperator
from landscape.curvature.differences import GradientDifferenceOperator
from landscape.curvature.hessian import HessianOperator, hessian
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.operators import AveragedOperator
from landscape.objective import Objective
from landscape.training.topology import topology


def problem(
    activation: type[nn.Module] = nn.Tanh, seed: int = 0, examples: int = 30
) -> tuple[Objective, Tensor, Tensor]:
    """An objective, weights, and the dense Hessian by torch.func."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 3), activation(), nn.Linear(3, 3)).double()
        x, y = torch.randn(examples, 4).double(), torch.randint(3, (examples,))
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), chunk=7)  # ragged chunks
    weights = objective.model.initial_weights()[0]
    layout = objective.model.layout

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(net, layout.split(flat), (x,)), y)

    return objective, weights, torch.func.hessian(loss)(weights)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("memory_budget", [None, 0, 20_000])
def test_hessian_is_the_dense_one(activation: type[nn.Module], memory_budget: int | None) -> None:
    objective, weights, dense = problem(activation)
    operator = HessianOperator(objective, weights, memory_budget=memory_budget)
    torch.testing.assert_close(operator @ torch.eye(len(dense), dtype=torch.float64), dense, rtol=0, atol=1e-12)


def test_matvec_matmat_and_scipy_agree() -> None:
    objective, weights, dense = problem()
    operator = hessian(objective, objective.model.layout.split(weights))
    block = torch.randn(len(dense), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(operator @ block, dense @ block, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator @ block[:, 0], (dense @ block)[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(operator.to_scipy() @ block.numpy(), (dense @ block).numpy(), atol=1e-12)
    assert operator.shape == tuple(dense.shape)
    with pytest.raises(ValueError, match="cannot multiply"):
        operator @ torch.zeros(3)


def test_difference_operator_is_the_hessian_where_the_network_is_smooth() -> None:
    objective, weights, _ = problem(nn.Tanh)
    deviations = 0.1 * torch.randn(5, len(weights), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = weights + deviations
    vector = torch.randn(len(weights), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    average = AveragedOperator([HessianOperator(objective, p) for p in points])
    errors = [
        float((GradientDifferenceOperator(objective, points, e) @ vector - average @ vector).norm())
        for e in (1e-1, 1e-2)
    ]
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)  # central differences: error ~ e^2


def test_hessian_of_a_parameter_that_enters_linearly() -> None:
    net = nn.Linear(3, 1).double()
    objective = Objective(
        net, lambda out, target: out[:, 0] - target, (torch.randn(5, 3).double(), torch.zeros(5).double())
    )
    operator = HessianOperator(objective, objective.model.initial_weights()[0])
    assert torch.equal(operator @ torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["ring", "star", "complete"])
def test_coupled_operator_is_the_linearised_step(name: str) -> None:
    objective, weights, _ = problem()
    n, d, alpha = 3, len(weights), 0.7
    points = weights + 0.2 * torch.randn(n, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mixing = torch.from_numpy(topology(name, n).matrices[0])
    hessians = [HessianOperator(objective, p) for p in points]
    operator = CoupledOperator(mixing, hessians, alpha)
    blocks = [h @ torch.eye(d, dtype=torch.float64) for h in hessians]
    dense = torch.kron(mixing, torch.eye(d, dtype=torch.float64)) - alpha * torch.block_diag(*blocks)
    identity = torch.eye(n * d, dtype=torch.float64)
    torch.testing.assert_close(operator @ identity, dense, rtol=0, atol=1e-12)
    apart = torch.kron(torch.eye(n, dtype=torch.float64) - 1 / n, torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(
        CoupledOperator(mixing, hessians, alpha, disagreement=True) @ identity,
        apart @ dense @ apart,
        rtol=0,
        atol=1e-12,
    )
    expected = np.linalg.eigvalsh(dense.numpy())
    found = top_eigenpairs(operator, which="BE", tol=1e-6, max_matvecs=100)
    np.testing.assert_allclose(found.values, expected[[-1, 0]], atol=1e-6)


def test_coupled_operator_refuses_a_directed_matrix() -> None:
    objective, weights, _ = problem()
    hessians = [HessianOperator(objective, weights)] * 4
    with pytest.raises(ValueError, match="symmetric"):
        CoupledOperator(torch.from_numpy(topology("exponential", 4).matrices[0]), hessians, 0.1)


def test_differences_along_no_direction_are_zero() -> None:
    objective, weights, _ = problem()
    operator = GradientDifferenceOperator(objective, weights[None], 0.01)
    assert torch.equal(operator @ torch.zeros_like(weights), torch.zeros_like(weights))
