import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.curvature.blocks import BlockDiagonalOperator, PreconditionedOperator, adam_diagonal, diagonal_blocks
from landscape.curvature.gauss_newton import fisher, ggn
from landscape.curvature.gradient_moments import gradient_covariance, second_moment
from landscape.curvature.hessian import hessian
from landscape.curvature.operators import AveragedOperator, DenseOperator, SumOperator
from landscape.objective import Objective
from tests.curvature.cases import CASES, Tagger

MAKERS = {"hessian": hessian, "ggn": ggn, "second_moment": second_moment, "gradient_covariance": gradient_covariance}
BUDGETS = {"kept": None, "anew": 0, "some of it": 30_000}


def close(found: Tensor, expected: Tensor, scale: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=scale * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_hessian_is_the_dense_one(name: str, budget: str) -> None:
    case = CASES[name]
    operator = hessian(case.objective(), case.weights, memory_budget=BUDGETS[budget])
    expected = case.dense_hessian()
    close(operator.to_dense(), expected)
    close(operator @ torch.ones(len(expected), dtype=torch.float64), expected.sum(1))
    if budget == "anew":
        assert operator.kept_bytes == 0
    else:
        assert 0 < operator.kept_bytes <= (operator.memory_budget or operator.kept_bytes)


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_gauss_newton_are_the_plain_ones(name: str) -> None:
    case = CASES[name]
    objective = case.objective()
    weights = case.weights.requires_grad_()
    loss = case.loss(weights)
    assert objective.value(weights) == pytest.approx(loss.item(), rel=1e-13)
    close(objective.gradient(weights), torch.autograd.grad(loss, weights)[0])
    close(ggn(objective, weights).to_dense(), case.dense_gauss_newton())


@pytest.mark.filterwarnings("ignore:LastHidden cannot be batched")
@pytest.mark.parametrize("name", [n for n in CASES if "opaque" not in n])
def test_moments_are_those_of_the_gradients_of_single_examples(name: str) -> None:
    case = CASES[name]
    objective = case.objective()
    rows, count = [], objective.num_examples
    for contributions, _ in objective.example_gradients(case.weights, chunk=3):
        rows.append(contributions)
    gradients = torch.cat(rows) * count / objective.norm
    close(gradients.mean(0), objective.gradient(case.weights))
    close(second_moment(objective, case.weights).to_dense(), gradients.T @ gradients / count)
    close(gradient_covariance(objective, case.weights).to_dense(), torch.cov(gradients.T, correction=0))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    "name", ["mlp", "lstm", "convolution with BatchNorm", "transformer on dictionaries, masked tokens"]
)
def test_a_block_is_its_columns_batched_or_not(name: str, maker: str) -> None:
    case = CASES[name]
    operator = MAKERS[maker](case.objective(), case.weights)
    block = torch.randn(operator.dimension, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = torch.stack([operator @ v for v in block.T], 1)
    close(operator @ block, columns)
    operator._batched = False
    close(operator @ block, columns)
    np.testing.assert_allclose(operator @ block.numpy(), columns.numpy(), atol=1e-11)
    np.testing.assert_allclose(operator.to_scipy() @ block.numpy(), columns.numpy(), atol=1e-11)


def test_batches_are_weighted_exactly_whatever_their_sizes() -> None:
    """Ragged batches 32, 32, 32, 4, an empty one, and masked tokens split unevenly over batches."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x, y = torch.randn(100, 3).double(), torch.randint(2, (100,))
        tokens = torch.randint(7, (10, 6))
        labels = tokens.masked_fill(torch.rand(10, 6) < 0.6, -100)
        tagger = Tagger().double()
    for loss_fn in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        ragged = [(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64, 96)]
        found = [
            hessian(Objective(net, loss_fn, data), dict(net.named_parameters())).to_dense()
            for data in ((x, y), ragged, [*ragged[:2], (x[:0], y[:0]), *ragged[2:]])
        ]
        close(found[1], found[0])
        close(found[2], found[0])
        whole = Objective(tagger, loss_fn, {"tokens": tokens, "labels": labels})
        parts = Objective(
            tagger, loss_fn, [{"tokens": tokens[a:b], "labels": labels[a:b]} for a, b in ((0, 1), (1, 8), (8, 10))]
        )
        v = torch.ones(whole.num_parameters, dtype=torch.float64)
        weights = dict(tagger.named_parameters())
        close(hessian(parts, weights) @ v, hessian(whole, weights) @ v)


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 2, 1, 1])),
        (nn.MSELoss(), torch.arange(12.0).view(4, 3).double()),
        (nn.functional.mse_loss, torch.zeros(4, 3).double()),
        (nn.BCEWithLogitsLoss(), torch.ones(4, 3).double()),
        (nn.PoissonNLLLoss(), torch.ones(4, 3).double()),
    ],
)
def test_fisher_is_the_gauss_newton_matrix_of_natural_parameters(loss_fn: Any, targets: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(4, 3).double()
    objective, weights = Objective(net, loss_fn, (x, targets)), dict(net.named_parameters())
    close(fisher(objective, weights).to_dense(), ggn(objective, weights).to_dense())


def test_fisher_of_masked_tokens_in_an_output_that_holds_more_than_scores() -> None:
    case = CASES["transformer on dictionaries, masked tokens"]
    operator = fisher(case.objective(), case.weights)
    close(operator.to_dense(), case.dense_gauss_newton())  # columns batched
    close(operator @ torch.ones(operator.dimension, dtype=torch.float64), case.dense_gauss_newton().sum(1))


def test_fisher_by_its_definition_for_log_probabilities_and_masked_class_weights() -> None:
    """E over the network's own labels of the outer product of gradients; under NLL the Gauss-Newton matrix is zero, and this is not."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double()
        x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, -100, 3, 2])
    weight = torch.tensor([0.5, 2.0, 1.0, 1.0], dtype=torch.float64)
    objective = Objective(net, nn.NLLLoss(weight=weight), [(x[:2], y[:2]), (x[2:], y[2:])])
    weights = objective.flat(dict(net.named_parameters()))
    split = objective.model.layout.split
    jacobian = torch.autograd.functional.jacobian(lambda w: torch.func.functional_call(net, split(w), (x,)), weights)
    probabilities = net(x).exp().detach()
    kept = y >= 0
    example = torch.where(kept, weight[y.clamp(min=0)], 0.0)
    expected = torch.einsum("i,ic,icp,icq->pq", example, probabilities, jacobian, jacobian) / example.sum()
    close(fisher(objective, weights).to_dense(), expected)
    assert float(ggn(objective, weights).to_dense().abs().max()) == 0.0


def test_fisher_needs_a_likelihood() -> None:
    case = CASES["opaque mean"]
    with pytest.raises(ValueError, match="negative log likelihood"):
        fisher(case.objective(), case.weights) @ case.weights
    with pytest.raises(ValueError, match="one number per example"):
        second_moment(case.objective(), case.weights) @ case.weights


@pytest.mark.parametrize("by", ["parameter", "layer", 1])
@pytest.mark.parametrize("name", ["convolution with BatchNorm", "lstm", "frozen, unused and linear parameters"])
def test_diagonal_blocks_are_those_of_the_whole(name: str, by: Any) -> None:
    case = CASES[name]
    objective = case.objective()
    weights = case.weights * 0.9  # not the module's own
    dense = hessian(objective, weights).to_dense()
    found = diagonal_blocks(objective, weights, by)
    members = objective.blocks(by)
    assert list(found) == list(members)
    starts = dict(zip(objective.model.layout.names, np.cumsum([0, *objective.model.layout.sizes]), strict=False))
    sizes = dict(zip(objective.model.layout.names, objective.model.layout.sizes, strict=True))
    expected = torch.zeros_like(dense)
    for block, operator in found.items():
        places = torch.cat([torch.arange(starts[m], starts[m] + sizes[m]) for m in members[block]])
        part = dense[places][:, places]
        close(operator.to_dense(), part)
        expected[places[:, None], places] = part
    close(BlockDiagonalOperator.of(objective, weights, by).to_dense(), expected)


def test_preconditioning_averages_and_algebra_against_dense_ones() -> None:
    case = CASES["mlp"]
    objective, weights = case.objective(), case.weights
    operator, dense = hessian(objective, weights), case.dense_hessian()
    moments = torch.rand(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = adam_diagonal(moments, step=10)
    close(scale, (moments / (1 - 0.999**10)).sqrt() + 1e-8)
    close(PreconditionedOperator(operator, scale).to_dense(), dense / scale.sqrt()[:, None] / scale.sqrt())
    other = hessian(objective, weights * 0.5)
    close(AveragedOperator([operator, other]).to_dense(), (dense + other.to_dense()) / 2)
    close(
        (2 * operator - other).shift(0.5).to_dense(),
        2 * dense - other.to_dense() + 0.5 * torch.eye(len(dense)).double(),
    )
    basis = torch.linalg.qr(
        torch.randn(len(dense), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).Q
    close(operator.restrict(basis).to_dense(), basis.T @ dense @ basis)
    away = torch.eye(len(dense)).double() - basis @ basis.T
    close(operator.project_out(basis).to_dense(), away @ dense @ away)
    with pytest.raises(ValueError, match="positive"):
        PreconditionedOperator(operator, torch.zeros(len(dense)))
    with pytest.raises(ValueError, match="not orthonormal"):
        operator.restrict(2 * basis)
    with pytest.raises(ValueError, match="cannot be added"):
        SumOperator([operator, DenseOperator(torch.eye(2))])
    with pytest.raises(ValueError, match="not symmetric"):
        DenseOperator(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


def test_another_device_or_type_than_the_models() -> None:
    case = CASES["convolution with BatchNorm"]
    expected = case.dense_hessian()
    single = hessian(case.objective(dtype=torch.float32), case.weights)
    assert (single @ torch.ones(single.dimension, dtype=torch.float64)).dtype == torch.float32
    torch.testing.assert_close(single.to_dense().double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    mlp = CASES["mlp"]
    half = copy.deepcopy(mlp.model).to(torch.bfloat16)
    back = Objective(half, mlp.loss_fn, mlp.batches, dtype=torch.float64)
    close(hessian(back, mlp.weights).to_dense(), mlp.dense_hessian())  # weights are the argument's, not the module's


def test_wrapped_modules_and_callers_state() -> None:
    case = CASES["mlp"]
    module = copy.deepcopy(case.model).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own imports
        wrapped = nn.DataParallel(torch.compile(module))
    state = torch.get_rng_state()
    close(hessian(Objective(wrapped, case.loss_fn, case.batches), case.weights).to_dense(), case.dense_hessian())
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_custom_functions_that_cannot_be_batched_are_taken_one_at_a_time() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            if upstream.detach().abs().sum().item() < 0:  # a question that vmap cannot answer
                return upstream * 0
            return 3 * x**2 * upstream

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(self.layer(x))

    with torch.random.fork_rng():
        torch.manual_seed(4)
        net, x, y = Net().double(), torch.randn(6, 3).double(), torch.randint(2, (6,))
    operator = hessian(Objective(net, nn.CrossEntropyLoss(), (x, y)), dict(net.named_parameters()))
    layer = net.layer

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy((x @ flat[:6].view(2, 3).T + flat[6:]) ** 3, y)

    flat = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
    close(operator.to_dense(), torch.func.hessian(loss)(flat))


def test_the_first_derivative_that_diverges_is_named() -> None:
    case = CASES["mlp"]
    with pytest.raises(ValueError, match="these weights have diverged"):
        hessian(case.objective(), case.weights * float("nan")) @ case.weights


def test_an_output_that_is_an_object_with_logits() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(CASES["mlp"].model)

        def forward(self, x: Tensor) -> Output:
            return Output(self.inner(x))

    case = CASES["mlp"]
    objective = Objective(Net(), case.loss_fn, case.batches)
    close(hessian(objective, case.weights).to_dense(), case.dense_hessian())
    close(ggn(objective, case.weights).to_dense(), case.dense_gauss_newton())
    close(fisher(objective, case.weights).to_dense(), case.dense_gauss_newton())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_as_on_the_cpu(name: str) -> None:
    case = CASES[name]
    operator = hessian(case.objective(device="cuda"), case.weights)
    assert operator.device.type == "cuda"
    close(operator.to_dense().cpu(), case.dense_hessian(), 1e-10)
    single = hessian(case.objective(device="cuda", dtype=torch.float32), case.weights)
    found, expected = single.to_dense().double().cpu(), case.dense_hessian()
    assert float((found - expected).norm()) <= 1e-3 * float(expected.norm())  # TF32 may be on
