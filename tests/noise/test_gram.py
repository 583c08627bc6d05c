"""The Gram matrix of per-example gradients against a loop of backward passes, in float64, on every way it is made."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape.noise import gram as gram_module
from landscape.noise.capture import trusted_layers
from landscape.noise.examples import Examples
from landscape.noise.gram import example_gram
from landscape.noise.products import add_products, mirror, product_type
from landscape.noise.projections import example_combinations, example_projections
from landscape.objective import Objective
from tests.curvature.cases import CASES

DRAWN = [name for name in CASES if name != "opaque mean"]


def loop_of_backwards(objective: Objective, weights: Tensor) -> Tensor:
    """g_i (N, d), one backward pass an example."""
    rows = []
    for _, inputs, targets in Examples(objective).chunks(1):
        leaf = weights.clone().requires_grad_()
        contributions, _ = objective.model.example_losses(leaf, dict(objective.buffers), inputs, targets)
        rows.append(torch.autograd.grad(contributions.sum(), leaf)[0])
    return torch.stack(rows) * (objective.num_examples / objective.norm)


def summed(objective: Objective, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The Gram matrix and the projections of all layers together."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be batched", category=UserWarning)
        parts = list(example_gram(objective, weights, **options))
    return sum(part.gram for part in parts), sum(part.along for part in parts)  # type: ignore[return-value]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int, classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, (count, *shape), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["captured", pytest.param("vmap", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "budget"), [*((n, b) for n in DRAWN for b in (None, 3000)), ("mlp", 1), ("regression of a matrix", 1)]
)
def test_every_network_at_every_budget(name: str, budget: int | None, method: Any) -> None:
    case = CASES[name]
    objective, weights = case.objective(), case.weights
    rows = loop_of_backwards(objective, weights)
    directions = random(len(weights), 2)
    torch.testing.assert_close(rows.mean(0), objective.gradient(weights))
    for by in ("layer", "whole"):
        found, along = summed(objective, weights, by=by, directions=directions, memory_budget=budget, method=method)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(along, rows @ directions, rtol=1e-10, atol=1e-12)
        assert torch.equal(found, found.T)


@pytest.mark.parametrize("by", ["layer", "parameter", 1])
def test_blocks_are_those_of_their_parameters(by: Any) -> None:
    case = CASES["convolution with BatchNorm"]
    objective = case.objective()
    rows = dict(zip(objective.model.layout.names, loop_of_backwards(objective, case.weights).split(objective.model.layout.sizes, 1), strict=True))  # fmt: skip
    blocks = objective.blocks(by)
    found = list(example_gram(objective, case.weights, by=by, memory_budget=5000))
    assert [part.name for part in found] == list(blocks)
    for part in found:
        own = torch.cat([rows[name] for name in blocks[part.name]], dim=1)
        assert part.num_parameters == own.shape[1]
        torch.testing.assert_close(part.gram, own @ own.T, rtol=1e-10, atol=1e-13)


# Every way a layer can be taken ----------------------------------------------------------------------------------


class Positions(nn.Module):
    """A linear layer on several positions an example."""

    def __init__(self, length: int, width: int, after: int) -> None:
        super().__init__()
        self.lift, self.linear, self.norm = nn.Linear(1, width), nn.Linear(width, after), nn.LayerNorm(after)
        self.head = nn.Linear(after, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.linear(self.lift(x.unsqueeze(-1))).tanh()).mean(1))


def convolution(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    # network, shape of an example, ways that must have been taken
    "outer products": (lambda: nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)), (9,), {"inputs", "slopes", "vector"}),
    "pairs of positions": (lambda: Positions(3, 20, 30), (3,), {"flow", "vector"}),
    "explicit of kept flow": (lambda: convolution(nn.Conv2d(12, 20, 3, padding=1)), (12, 5, 5), {"flow", "vector"}),
    "explicit in the pass": (lambda: convolution(nn.Conv2d(2, 4, 3)), (2, 9, 9), {"rows"}),
    "strided, padded, dilated": (lambda: convolution(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))), (2, 8, 7), {"rows"}),
    "same padding of an even kernel": (lambda: convolution(nn.Conv2d(2, 4, 4, padding="same")), (2, 6, 6), {"rows"}),
    "circular padding": (lambda: convolution(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")), (2, 6, 6), {"rows"}),
    "groups": (lambda: convolution(nn.Conv2d(6, 9, 3, groups=3)), (6, 6, 6), {"rows"}),
    "depthwise": (lambda: convolution(nn.Conv2d(6, 6, 3, groups=6, bias=False)), (6, 6, 6), {"rows"}),
    "groups of one position": (lambda: convolution(nn.Conv2d(30, 60, 3, groups=2)), (30, 3, 3), {"flow"}),
    "one position": (lambda: convolution(nn.Conv2d(8, 12, 3)), (8, 3, 3), {"flow"}),
    "one dimension": (lambda: convolution(nn.Conv1d(3, 5, 3, stride=2, padding=1)), (3, 11), {"rows"}),
    "three dimensions": (lambda: convolution(nn.Conv3d(2, 3, 2, padding=1)), (2, 3, 4, 5), {"rows"}),
    "batch normalisation": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)), (5,), {"vector"}),
    "group normalisation": (lambda: convolution(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), (2, 5, 5), {"vector"}),
    "in place": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ELU(inplace=True), nn.Linear(6, 3)), (5,), {"inputs"}),
}  # fmt: skip


def network(name: str, count: int = 11) -> tuple[Objective, Tensor, set[str]]:
    build, shape, ways = NETWORKS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        torch.manual_seed(0)
        net = build().double()
        x = random(count, *shape)
        net(2 * x + 1)  # lazy layers, running statistics
        objective = Objective(net, nn.CrossEntropyLoss(), (x, labels(count, 3)))
    return objective, objective.model.initial_weights()[0], ways


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("name", "budget"), [*((n, b) for n in NETWORKS for b in (None, 20_000)), ("outer products", 1), ("groups", 1)]
)
def test_every_way_of_taking_a_layer(name: str, budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, weights, ways = network(name)
    taken: set[str] = set()
    consume = gram_module._Gram._consume

    def noted(self: Any, piece: Any, *rest: Any) -> None:
        taken.add(piece.kind)
        consume(self, piece, *rest)

    monkeypatch.setattr(gram_module._Gram, "_consume", noted)
    rows, directions = loop_of_backwards(objective, weights), random(len(weights), 3)
    found, along = summed(objective, weights, directions=directions, memory_budget=budget)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(along, rows @ directions, rtol=1e-10, atol=1e-13)
    assert "columns" not in taken  # all is captured
    assert budget is not None or ways <= taken
    projections = [*example_projections(objective, weights, directions, chunk=4)]
    torch.testing.assert_close(torch.cat([s for s, _ in projections]), rows.square().sum(1))
    torch.testing.assert_close(torch.cat([p for _, p in projections]), rows @ directions)


def test_both_ways_with_kept_flow_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, weights, _ = network("explicit of kept flow")
    rows = loop_of_backwards(objective, weights)
    for pay in (True, False):
        monkeypatch.setattr(gram_module._Gram, "_pairs_pay", lambda self, layer, delta, pay=pay: pay)
        for budget in (None, 120_000):
            found, _ = summed(objective, weights, memory_budget=budget)
            torch.testing.assert_close(found, rows @ rows.T, rtol=1e-10, atol=1e-13)


# Layers that are not what they seem ------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(x).tanh()))


class Beside(nn.Module):
    """A layer whose weight is used outside it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh() + 0.1 * F.linear(x, self.inner.weight))


class TimeFirst(nn.Module):
    """A layer that sees (T, B, features), with T that of the examples it is tried on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.unsqueeze(0) * torch.linspace(1, 2, 8).to(x)[:, None, None]).tanh().mean(0))


class Doubled(nn.Linear):
    """A layer of another kind."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(x).tanh()))


class Named(nn.Module):
    """A layer called with a keyword, beside one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(input=x).tanh())


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].register_forward_hook(lambda module, args, output: 3 * output)
    net[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return net


TRAPS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {  # network, parameters that must not be captured
    "called twice": (Twice, {"inner.weight", "inner.bias"}),
    "used beside": (Beside, {"inner.weight"}),
    "time first": (TimeFirst, {"inner.weight", "inner.bias"}),
    "of another kind": (lambda: nn.Sequential(Doubled(5, 4), nn.Tanh(), nn.Linear(4, 3)), {"0.weight", "0.bias"}),
    "tied": (Tied, {"inner.weight"}),
    "by keyword": (Named, {"inner.weight", "inner.bias", "unused.weight", "unused.bias"}),
    "hooks of the user's": (hooked, set()),
    "weight normalised": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
        {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_layers_that_are_not_what_they_seem_are_found_out(name: str) -> None:
    build, refused = TRAPS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build().double()
    objective = Objective(net, nn.CrossEntropyLoss(), (random(12, 5), labels(12, 3)))
    weights = objective.model.initial_weights()[0]
    trusted = trusted_layers(objective, weights, *Examples(objective).few(8))
    assert set(objective.model.layout.names) - set(trusted) == refused
    rows = loop_of_backwards(objective, weights)
    for budget in (None, 1000):
        found, _ = summed(objective, weights, memory_budget=budget)
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-10, atol=1e-13)


def test_a_layer_without_gradients_where_it_was_tried_is_not_trusted() -> None:
    """All examples but one leave the layer dead; it is used twice, which only that one shows."""

    class Dead(Beside):
        def forward(self, x: Tensor) -> Tensor:
            return self.head.bias + self.head.weight.sum() * (x[:, :1] > 50) * super().forward(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Dead().double()
    x = random(40, 5)
    x[3, 0] = 100
    objective = Objective(net, nn.CrossEntropyLoss(), (x, labels(40, 3)))
    weights = objective.model.initial_weights()[0]
    rows = loop_of_backwards(objective, weights)
    found, _ = summed(objective, weights)
    torch.testing.assert_close(found, rows @ rows.T)


def test_a_layer_called_otherwise_later_on_is_an_error() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x).tanh()
            return self.head(self.inner(y) if len(x) > 8 else y)

    objective = Objective(Moody(), nn.CrossEntropyLoss(), (torch.randn(12, 5), labels(12, 3)))
    with pytest.raises(ValueError, match="layer inner was not called once"):
        list(example_gram(objective, objective.model.initial_weights()[0]))


# Scale, selection, precision -------------------------------------------------------------------------------------


def test_some_examples_out_of_all() -> None:
    objective, weights, _ = network("outer products")
    rows = loop_of_backwards(objective, weights)
    indices = torch.tensor([7, 0, 7, 3])
    found, _ = summed(objective, weights, indices=indices)
    torch.testing.assert_close(found, rows[indices] @ rows[indices].T)


@pytest.mark.parametrize("name", ["class weights and ignored targets, mean", "class weights and ignored targets, sum"])
def test_gradients_are_scaled_so_that_their_mean_is_the_objectives(name: str) -> None:
    case = CASES[name]
    objective = case.objective()
    found, _ = summed(objective, case.weights)
    gradient = torch.autograd.functional.jacobian(case.loss, case.weights)
    torch.testing.assert_close(found.mean(), gradient @ gradient)


def test_combinations_of_gradients() -> None:
    for name in DRAWN:
        case = CASES[name]
        objective = case.objective()
        coefficients = random(13, 3)
        expected = loop_of_backwards(objective, case.weights).T @ coefficients
        torch.testing.assert_close(example_combinations(objective, case.weights, coefficients), expected)


@pytest.mark.parametrize("name", ["outer products", "explicit of kept flow", "pairs of positions"])
def test_single_precision_is_kept(name: str) -> None:
    """Entries are off by a few times the precision of float32 times |g_i| |g_k|; nothing is lost in the sums."""
    objective, weights, _ = network(name, count=60)
    exact, _ = summed(objective, weights)
    single = Objective(objective.model.module, nn.CrossEntropyLoss(), objective.data, dtype=torch.float32)
    found, _ = summed(single, weights)
    lengths = exact.diagonal().sqrt()
    assert float(((found - exact) / (lengths[:, None] * lengths)).abs().max()) < 2e-6
    assert abs(float(found.trace() / exact.trace()) - 1) < 1e-6


def test_products_of_long_single_precision_rows() -> None:
    rows = torch.randn(300, 50_000, generator=torch.Generator().manual_seed(0)) + 0.5  # partial sums that grow
    total = torch.zeros(300, 300, dtype=torch.float64)
    add_products(total, rows)
    exact = rows.double() @ rows.double().T
    lengths = exact.diagonal().sqrt()
    assert float(((mirror(total) - exact) / (lengths[:, None] * lengths)).abs().max()) < 5e-7
    assert torch.equal(total, total.T)


def test_products_are_not_rounded_to_fewer_bits() -> None:
    assert product_type(torch.zeros(1)) == torch.float32
    assert product_type(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert product_type(torch.zeros(1)) == torch.float64
    finally:
        torch.set_float32_matmul_precision(precision)


# Memory ----------------------------------------------------------------------------------------------------------


def test_what_a_pass_keeps_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, weights, _ = network("explicit in the pass", count=50)
    passes: list[int] = []
    filled = gram_module._Gram._filled

    def noted(self: Any, pieces: Any) -> list[Tensor]:
        found = filled(self, pieces)
        passes.append(sum(t.nbytes for t in found))
        return found

    monkeypatch.setattr(gram_module._Gram, "_filled", noted)
    reference, _ = summed(objective, weights, method="vmap")
    for budget in (10**9, 200_000, 60_000, 20_000):
        passes.clear()
        found, _ = summed(objective, weights, memory_budget=budget)
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-12)
        assert max(passes) <= max(budget // 2, 50 * 18 * 8)  # one row of the weight is the least
    assert len(passes) > 4


# What is left behind ---------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3))  # fmt: skip
    net.train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    objective = Objective(net, nn.CrossEntropyLoss(), (torch.randn(9, 2, 6, 6), labels(9, 3)))
    weights = objective.model.initial_weights()[0]
    inner = {name: t.clone() for name, t in objective.model.module.state_dict().items()}
    state = torch.get_rng_state()
    list(example_gram(objective, weights))
    list(example_projections(objective, weights, weights[:, None]))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(torch.equal(t, inner[name]) for name, t in objective.model.module.state_dict().items())
    assert all(p.grad is None for p in (*net.parameters(), *objective.model.module.parameters()))
    assert not any(m._forward_hooks for m in (*net.modules(), *objective.model.module.modules()))


def test_hooks_are_removed_after_an_error() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            if (x > 1e3).any():
                raise ArithmeticError("no")
            return y

    x = torch.randn(20, 5)
    x[1] = 1e4
    objective = Objective(Failing(), nn.CrossEntropyLoss(), (x, labels(20, 3)))
    with pytest.raises(ArithmeticError):
        list(example_gram(objective, torch.zeros(18)))
    assert not any(m._forward_hooks for m in objective.model.module.modules())


# Errors ----------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    case = CASES["mlp"]
    with pytest.raises(ValueError, match="one number per example"):
        example_gram(CASES["opaque mean"].objective(), CASES["opaque mean"].weights)
    with pytest.raises(ValueError, match="cannot be drawn from a list of batches"):
        example_gram(case.objective(), case.weights, torch.tensor([0, 1]))
    objective, weights, _ = network("outer products")
    for wrong in (torch.tensor([11]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match="from 0 to 10"):
            example_gram(objective, weights, wrong)
    with pytest.raises(ValueError, match="directions"):
        example_gram(objective, weights, directions=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="coefficients"):
        example_combinations(objective, weights, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="diverged"):
        list(example_gram(objective, torch.full_like(weights, torch.inf)))
    norms = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    ghost = Objective(norms, nn.CrossEntropyLoss(), (torch.randn(8, 5), labels(8, 4)), batch_norm="ghost", batch_size=4)
    with pytest.raises(ValueError, match="no gradient of its own"):
        example_gram(ghost, ghost.model.initial_weights()[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu(name: str) -> None:
    objective, weights, _ = network(name)
    there = Objective(objective.model.module, nn.CrossEntropyLoss(), objective.data, device="cuda")
    found, _ = summed(there, weights)
    torch.testing.assert_close(found.cpu(), summed(objective, weights)[0], rtol=1e-9, atol=1e-12)
