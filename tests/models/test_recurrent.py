"""The acoustic model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from landscape.functional import FunctionalModel
from landscape.linearisation import gauss_newton_map, hessian_map
from landscape.models import blstm, narrow
from tests.models.networks import gradient


@pytest.fixture
def case() -> tuple[FunctionalModel, Tensor, Tensor]:
    """Two layers of two cells a direction; frames (3, 4, 2) and states (3, 4) of 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = blstm(features=2, states=3, cells=2, layers=2, bottleneck=3).double()
        frames, states = torch.randn(3, 4, 2, dtype=torch.float64), torch.randint(0, 3, (3, 4))
    return FunctionalModel(network, cross_entropy, batched=False), frames, states


def test_the_number_of_parameters_at_the_defaults() -> None:
    with torch.device("meta"):
        network = blstm()
        assert network(torch.zeros(2, 21, 260)).shape == (2, 21, 32_000)
    assert sum(p.numel() for p in network.parameters()) == 43_154_944
    layers = {n: sum(p.numel() for p in part.parameters()) for n, part in network.named_children()}
    assert layers == {"lstm": 3_170_304 + 5 * 6_299_648, "bottleneck": 262_400, "head": 8_224_000}


def test_scores_of_a_frame_depend_on_all_frames_of_its_example_alone(
    case: tuple[FunctionalModel, Tensor, Tensor],
) -> None:
    model, frames, _ = case
    frames = frames.clone().requires_grad_()
    for time in (0, 1, 3):
        (slope,) = torch.autograd.grad(model.module(frames)[1, time].sum(), frames)
        assert (slope[1].abs().sum(1) > 0).all()
        assert not slope[[0, 2]].any()


def test_second_derivatives_are_those_of_a_dense_hessian(case: tuple[FunctionalModel, Tensor, Tensor]) -> None:
    model, frames, states = case
    weights, buffers = model.initial_weights()

    def loss(flat: Tensor) -> Tensor:
        return model.example_losses(flat, buffers, frames, states)[0].sum()

    dense = torch.autograd.functional.hessian(loss, weights)
    directions = torch.randn(5, len(weights), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = hessian_map(model, weights, buffers, frames, states)(directions)
    torch.testing.assert_close(products, directions @ dense, rtol=1e-9, atol=1e-12)
    found = gauss_newton_map(model, weights, buffers, frames, states)(directions) @ directions.T
    torch.testing.assert_close(found, found.T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(found).min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_are_differences_of_gradients_in_the_narrow_form(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        network = blstm(features=20, states=30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = narrow(network, 1 / 64)  # 8 cells a direction
        frames, states = torch.randn(2, 21, 20), torch.randint(0, 30, (2, 21))
    model = FunctionalModel(network, cross_entropy, batched=False)
    exact = model.to("cpu", torch.float64)
    weights, buffers = exact.initial_weights()
    direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction /= direction.norm()
    ahead, behind = (gradient(exact, weights + s * direction, buffers, frames.double(), states) for s in (1e-4, -1e-4))
    difference = (ahead - behind) / 2e-4
    product = hessian_map(model.to("cpu", dtype), weights.to(dtype), buffers, frames.to(dtype), states)(
        direction[None].to(dtype)
    )[0]
    assert (product - difference).norm() < (1e-6 if dtype == torch.float64 else 1e-4) * difference.norm()
    single = gradient(model, weights.float(), buffers, frames, states).double()
    double = gradient(exact, weights, buffers, frames.double(), states)
    assert (single - double).norm() < 1e-5 * double.norm()


def test_a_state_dict_goes_round(case: tuple[FunctionalModel, Tensor, Tensor]) -> None:
    model, frames, _ = case
    other = blstm(features=2, states=3, cells=2, layers=2, bottleneck=3).double()
    other.load_state_dict(model.module.state_dict())
    before = frames.clone()
    assert torch.equal(other(frames), model.module(frames))
    assert torch.equal(frames, before)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_gradient_on_cuda_is_the_cpus_in_either_mode(case: tuple[FunctionalModel, Tensor, Tensor], mode: bool) -> None:  # fmt: skip
    model, frames, states = case
    model.module.train(mode)
    weights, buffers = model.initial_weights()
    found = []
    for device in ("cpu", "cuda"):
        there = model.to(device, torch.float64)
        moved = weights.to(device)[None], {n: b.to(device)[None] for n, b in buffers.items()}
        found.append(there.summed_gradients(*moved, frames.to(device), states.to(device), shared=True)[2].cpu())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
