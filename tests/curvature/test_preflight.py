import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from landscape.curvature.hessian import hessian
from landscape.curvature.preflight import preflight
from landscape.objective import Objective
from tests.curvature.cases import CASES


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return 2 * upstream * ctx.saved_tensors[0]


class Cut(torch.autograd.Function):
    """Right gradient, but its own derivative is cut off: the Hessian would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return 2 * upstream * ctx.saved_tensors[0].detach()


class Net(nn.Module):
    def __init__(self, middle: Any) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(4, 5), nn.Linear(5, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def tried(middle: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, y = Net(middle), torch.randn(40, 4), torch.randint(3, (40,))
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), **options)
    state = torch.get_rng_state()
    found = preflight(objective, dict(net.named_parameters()))
    assert torch.equal(state, torch.get_rng_state())
    return found


@pytest.mark.parametrize(
    ("middle", "problem"),
    [
        (Once.apply, "not symmetric"),
        (Cut.apply, "differs from central differences of the gradient"),
        (lambda t: t + torch.randn_like(t), "two evaluations of the same product differ"),
        (lambda t: nn.functional.dropout(t, 0.5), "two evaluations of the same product differ"),
        (lambda t: checkpoint(torch.tanh, t, use_reentrant=True), "use_reentrant=False"),
        (lambda t: (t - t).sqrt(), "loss is nan|not finite"),
        (lambda t: torch.cdist(t[None], t[None, :1], p=1.5)[0].expand(-1, 5), "no second derivative"),
    ],
)
def test_what_would_fail_is_foreseen(middle: Any, problem: str) -> None:
    found = tried(middle)
    assert not found.ok
    assert any(re.search(problem, p) for p in found.problems), found.problems
    assert math.isnan(found.seconds_per_product)
    assert "problem: " in str(found)


@pytest.mark.parametrize(
    "middle",
    [
        torch.tanh,
        torch.relu,
        lambda t: nn.functional.relu(t, inplace=True),
        lambda t: checkpoint(torch.tanh, t, use_reentrant=False),
    ],
)
def test_what_works_passes(middle: Any) -> None:
    found = tried(middle)
    assert found.ok, found.problems
    assert found.seconds(10) > found.seconds(1) > 0


def test_every_kind_of_network_passes() -> None:
    for case in CASES.values():
        found = preflight(case.objective(), case.weights)
        assert found.ok, (case.name, found.problems)


def test_low_precision_is_refused_and_high_chosen() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, y = nn.Linear(4, 3).to(torch.bfloat16), torch.randn(8, 4), torch.randint(3, (8,))
    weights = dict(net.named_parameters())
    assert "bfloat16" in preflight(Objective(net, nn.CrossEntropyLoss(), (x, y)), weights).problems[0]
    assert preflight(Objective(net, nn.CrossEntropyLoss(), (x, y), dtype=torch.float32), weights).ok


def test_autocast_around_the_call_changes_nothing() -> None:
    case = CASES["mlp"]
    objective = case.objective(dtype=torch.float32)
    operator, again = hessian(objective, case.weights), hessian(objective, case.weights)
    expected = operator.to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(again.to_dense(), expected)


def test_notes_tell_what_was_decided() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
        net[0].bias.requires_grad_(False)
        x, y = torch.randn(20, 4), torch.randint(3, (20,))
    found = preflight(Objective(net, nn.CrossEntropyLoss(), (x, y)), dict(net.named_parameters()))
    text = str(found)
    for words in (
        "running statistics",
        "dropout layer(s) are off",
        "ReLU have kinks",
        "held fixed: 0.bias",
        "a gradient takes about",
    ):
        assert words in text


def test_memory_is_foreseen_within_a_factor_of_two() -> None:
    for name in ("convolution with BatchNorm", "lstm", "transformer on dictionaries, masked tokens", "mlp"):
        case = CASES[name]
        objective = case.objective()
        operator = hessian(objective, case.weights)
        foreseen = preflight(objective, case.weights).kept_bytes
        operator @ case.weights
        assert operator.kept_bytes / 2 <= foreseen <= 2 * operator.kept_bytes


def test_a_budget_that_is_too_small_is_said() -> None:
    case = CASES["lstm"]
    found = preflight(case.objective(), case.weights, memory_budget=20_000)
    assert found.kept_bytes <= 20_000
    assert any("built anew" in note for note in found.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hessian(case.objective(), case.weights, memory_budget=20_000).memory_budget == 20_000


def test_a_gradient_that_jumps_is_not_taken_for_a_wrong_backward() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, y = Net(torch.relu), torch.randn(40, 4), torch.randint(3, (40,))
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.zero_()  # all activations lie at the kink
    found = preflight(Objective(net, nn.CrossEntropyLoss(), (x, y)), dict(net.named_parameters()))
    assert found.ok, found.problems
    assert any("the gradient jumps at these weights" in note for note in found.notes)
    assert math.isfinite(found.seconds_per_product)
