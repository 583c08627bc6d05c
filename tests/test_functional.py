from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape.functional import FunctionalModel, ParameterLayout, chunks
from landscape.models import mlp

LEARNERS, BATCH = 4, 7


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, under a second name, with a class head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = (
            nn.Linear(6, 6, bias=False),
            nn.Linear(6, 6, bias=False),
            nn.Linear(6, 3),
        )
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(torch.tanh(self.encoder(x))))


class Frozen(nn.Module):
    """The first layer does not train; a scalar parameter scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(6, 5), nn.Linear(5, 3), nn.Parameter(torch.tensor(1.5))
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.first(x)))


class Shared(nn.Module):
    """One normalisation, statistics and all, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(torch.tanh(self.first(self.norm(x)))))


class Branching(nn.Module):
    """Control flow that depends on the data: it cannot be batched."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        return output.tanh() if bool(output.sum() > 0) else output.sin()


def _mlp() -> nn.Module:
    return mlp((6, 5, 3), "tanh")


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(),
                         nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3))  # fmt: skip


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def _counting_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=None), nn.Tanh(), nn.Linear(5, 3))


def _seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


BATCHABLE = [pytest.param(b, id=b.__name__.strip("_")) for b in (_mlp, _convolution, _batch_norm, Tied, Frozen, Shared)]
ALL = [
    *BATCHABLE,
    pytest.param(Branching, id="Branching"),
    pytest.param(_counting_batch_norm, id="counting_batch_norm"),
]
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def stacked(model: FunctionalModel, count: int = LEARNERS) -> tuple[Tensor, dict[str, Tensor]]:
    """Different weights, and the module's buffers, for each of some learners."""
    weights, buffers = model.initial_weights()
    generator = torch.Generator().manual_seed(1)
    moved = weights + 0.3 * torch.randn(count, len(weights), generator=generator, dtype=weights.dtype)
    return moved, {n: b.repeat(count, *[1] * b.ndim) for n, b in buffers.items()}


def batches(*lead: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(*lead, BATCH, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (*lead, BATCH), generator=generator)


def load(module: nn.Module, model: FunctionalModel, weights: Tensor) -> nn.Module:
    """A plain module with the given flat weights."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in model.layout.split(weights).items():
            module.get_parameter(name).copy_(value)
    return module


def plain_gradient(module: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])]
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("build", BATCHABLE)
def test_batched_equals_one_at_a_time(build: Callable[[], nn.Module], shared: bool) -> None:
    batched, looped = (FunctionalModel(_seeded(build), F.cross_entropy, batched=b) for b in (True, False))
    weights, buffers = stacked(batched)
    inputs, targets = batches() if shared else batches(LEARNERS)
    found = batched.summed_gradients(weights, buffers, inputs, targets, shared=shared)
    torch.testing.assert_close(
        found, looped.summed_gradients(weights, buffers, inputs, targets, shared=shared), **EXACT
    )
    assert found[2].shape == weights.shape
    torch.testing.assert_close(
        batched.losses(weights, buffers, inputs, targets, shared=shared),
        looped.losses(weights, buffers, inputs, targets, shared=shared),
        **EXACT,
    )
    torch.testing.assert_close(
        batched.outputs(weights, buffers, inputs, shared=shared),
        looped.outputs(weights, buffers, inputs, shared=shared),
        **EXACT,
    )
    assert batched.batched, "fell back to one at a time"


@pytest.mark.parametrize("build", BATCHABLE)
def test_example_gradients_batched_equal_one_at_a_time_and_add_up(build: Callable[[], nn.Module]) -> None:
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), ignore_index=1)
    batched, looped = (FunctionalModel(_seeded(build).eval(), loss_fn, batched=b) for b in (True, False))
    weights, buffers = batched.initial_weights()
    inputs, targets = batches()
    gradients, example_weights = batched.example_gradients(weights, buffers, inputs, targets)
    torch.testing.assert_close(
        (gradients, example_weights), looped.example_gradients(weights, buffers, inputs, targets), **EXACT
    )
    assert batched.batched, "fell back to one at a time"
    module = _seeded(build).eval()
    expected = plain_gradient(
        module, F.cross_entropy(module(inputs), targets, weight=loss_fn.weight.double(), ignore_index=1)
    )
    torch.testing.assert_close(gradients.sum(0) / example_weights.sum(), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:.*cannot be batched over learners")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("build", ALL)
def test_gradients_are_those_of_a_plain_module(build: Callable[[], nn.Module], reduction: str) -> None:
    module = _seeded(build)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    model = FunctionalModel(module, loss_fn)
    weights, buffers = stacked(model)
    inputs, targets = batches(LEARNERS)
    summed, norm, gradients, _ = model.summed_gradients(weights, buffers, inputs, targets)
    for j in range(LEARNERS):
        alone = load(module, model, weights[j])
        loss = loss_fn(alone(inputs[j]), targets[j])
        scale = norm[j] if reduction == "mean" else 1.0
        torch.testing.assert_close(summed[j] / scale, loss.detach(), **EXACT)
        torch.testing.assert_close(gradients[j] / scale, plain_gradient(alone, loss), **EXACT)


@pytest.mark.parametrize("build", ALL)
def test_what_cannot_be_batched_says_so_once_and_is_right(build: Callable[[], nn.Module]) -> None:
    module = _seeded(build)
    model, looped = FunctionalModel(module, F.cross_entropy), FunctionalModel(module, F.cross_entropy, batched=False)
    weights, buffers = stacked(model)
    inputs, targets = batches(LEARNERS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [model.summed_gradients(weights, buffers, inputs, targets) for _ in range(3)]
        outputs = model.outputs(weights, buffers, inputs)
    expected = looped.summed_gradients(weights, buffers, inputs, targets)
    for result in found:
        torch.testing.assert_close(result, expected, **EXACT)
    torch.testing.assert_close(outputs, looped.outputs(weights, buffers, inputs), **EXACT)
    told = [str(w.message) for w in caught]
    if build in (Branching, _counting_batch_norm):
        assert len(told) == 1
        assert "cannot be batched over learners" in told[0]
        assert type(module).__name__ in told[0]
    else:
        assert told == []


def test_a_real_mistake_is_raised_and_not_called_a_fallback() -> None:
    model = FunctionalModel(_seeded(_mlp), F.cross_entropy)
    weights, buffers = stacked(model)
    inputs, targets = batches(LEARNERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.summed_gradients(weights, buffers, inputs[..., :5], targets)
    assert model.batched


@pytest.mark.parametrize("batched", [True, False])
def test_batch_norm_statistics_evolve_per_learner_as_in_a_plain_loop(batched: bool) -> None:
    module = _seeded(_batch_norm).train()
    model = FunctionalModel(module, F.cross_entropy, batched=batched)
    weights, buffers = stacked(model)
    alone = [load(module, model, w) for w in weights]
    for step in range(3):
        inputs, targets = (t.roll(step, 1) * (step + 1) for t in batches(LEARNERS))
        buffers = model.summed_gradients(weights, buffers, inputs, targets % 3)[3]
        for j, plain in enumerate(alone):
            plain(inputs[j])
    assert int(buffers["1.num_batches_tracked"][0]) == 3
    for j, plain in enumerate(alone):
        for name, value in plain.named_buffers():
            torch.testing.assert_close(buffers[name][j], value, **EXACT)


@pytest.mark.parametrize("batched", [True, False])
def test_losses_and_outputs_leave_the_buffers_given_as_they_were(batched: bool) -> None:
    model = FunctionalModel(_seeded(_batch_norm).train(), F.cross_entropy, batched=batched)
    weights, buffers = stacked(model)
    before = {n: b.clone() for n, b in buffers.items()}
    inputs, targets = batches(LEARNERS)
    model.losses(weights, buffers, inputs, targets)
    model.outputs(weights, buffers, inputs)
    model.summed_gradients(weights, buffers, inputs, targets)
    assert all(torch.equal(buffers[n], b) for n, b in before.items())


@pytest.mark.parametrize("batched", [True, False])
def test_evaluation_uses_the_running_statistics_and_no_dropout(batched: bool) -> None:
    module = nn.Sequential(_seeded(_batch_norm), nn.Dropout(0.5)).double().train()
    model = FunctionalModel(module, F.cross_entropy, batched=batched).evaluation()
    weights, buffers = stacked(model)
    inputs, targets = batches(LEARNERS)
    found = model.outputs(weights, buffers, inputs)
    for j in range(LEARNERS):
        torch.testing.assert_close(found[j], load(module, model, weights[j]).eval()(inputs[j]).detach(), **EXACT)
    fresh = model.summed_gradients(weights, buffers, inputs, targets)[3]
    assert all(torch.equal(buffers[n], b) for n, b in fresh.items())


def test_tied_weights_are_one_and_get_the_gradient_of_both_uses() -> None:
    module = _seeded(Tied)
    model = FunctionalModel(module, F.cross_entropy)
    assert model.layout.names == ("encoder.weight", "head.weight", "head.bias")
    assert model.layout.num_parameters == 36 + 18 + 3
    weights, buffers = model.initial_weights()
    inputs, targets = batches()
    found = model.summed_gradients(2 * weights[None], buffers, inputs[None], targets[None])[2][0] / BATCH
    doubled = load(module, model, 2 * weights)
    assert doubled.decoder.weight is doubled.encoder.weight
    torch.testing.assert_close(found, plain_gradient(doubled, F.cross_entropy(doubled(inputs), targets)), **EXACT)
    saved = model.state_dict(2 * weights, buffers)
    assert torch.equal(saved["decoder.weight"], saved["encoder.weight"])


def test_frozen_parameters_stay_and_are_no_weights() -> None:
    module = _seeded(Frozen)
    model = FunctionalModel(module, F.cross_entropy)
    assert model.layout.names == ("scale", "last.weight", "last.bias")
    weights, buffers = model.initial_weights()
    saved = model.state_dict(3 * weights, buffers)
    assert torch.equal(saved["first.weight"], module.first.weight)
    assert float(saved["scale"]) == 4.5
    assert saved["scale"].shape == ()


@pytest.mark.parametrize("build", ALL)
def test_state_dict_has_exactly_the_modules_names_and_loads_into_it(build: Callable[[], nn.Module]) -> None:
    module = _seeded(build)
    model = FunctionalModel(module, F.cross_entropy)
    weights, buffers = stacked(model)
    buffers = {n: b + 1 for n, b in buffers.items()}
    saved = model.state_dict(weights[1], {n: b[1] for n, b in buffers.items()})
    assert list(saved) == list(module.state_dict())
    assert [t.shape for t in saved.values()] == [t.shape for t in module.state_dict().values()]
    fresh = _seeded(build, seed=5)
    fresh.load_state_dict(saved, strict=True)
    assert torch.equal(FunctionalModel(fresh, F.cross_entropy).initial_weights()[0], weights[1])
    assert all(torch.equal(b, buffers[n][1]) for n, b in fresh.named_buffers())


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_the_callers_module_mode_gradients_and_random_state_are_left_alone(batched: bool, train: bool) -> None:
    module = _seeded(_batch_norm).train(train)
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = copy.deepcopy(module.state_dict())
    random_state = torch.get_rng_state()
    model = FunctionalModel(module, F.cross_entropy, batched=batched)
    weights, buffers = stacked(model)
    inputs, targets = batches(LEARNERS)
    model.summed_gradients(weights, buffers, inputs, targets)
    model.losses(weights, buffers, inputs, targets)
    model.outputs(weights, buffers, inputs)
    model.evaluation().example_gradients(weights[0], {n: b[0] for n, b in buffers.items()}, inputs[0], targets[0])
    model.to("cpu", torch.float32)
    model.initial_weights()[0].zero_()
    assert module.training is train
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    assert all(p.grad is None for n, p in module.named_parameters() if n != "0.weight")
    assert all(p.dtype == torch.float64 for p in module.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("batched", [True, False])
def test_a_loss_that_returns_one_number_is_refused_with_advice(batched: bool) -> None:
    model = FunctionalModel(_seeded(_mlp), lambda output, target: F.cross_entropy(output, target), batched=batched)
    weights, buffers = stacked(model)
    with pytest.raises(ValueError, match=r"shape \(\), not one number per example; return per-example losses"):
        model.summed_gradients(weights, buffers, *batches(LEARNERS))
    with pytest.raises(ValueError, match="not one number per example"):
        model.losses(weights, buffers, *batches(LEARNERS))


def test_moving_to_another_type_keeps_the_function() -> None:
    model = FunctionalModel(_seeded(Frozen), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])))
    single = model.to("cpu", torch.float32)
    weights, buffers = stacked(model)
    inputs, targets = batches(LEARNERS)
    exact = model.summed_gradients(weights, buffers, inputs, targets)[2]
    found = single.summed_gradients(weights.float(), buffers, inputs.float(), targets)[2]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_layout_splits_and_joins_any_leading_axes() -> None:
    layout = ParameterLayout.of(_seeded(Frozen))
    flat = torch.arange(2 * 4 * layout.num_parameters, dtype=torch.float64).view(2, 4, -1)
    pieces = layout.split(flat)
    assert {n: tuple(p.shape) for n, p in pieces.items()} == {
        "scale": (2, 4),
        "last.weight": (2, 4, 3, 5),
        "last.bias": (2, 4, 3),
    }
    assert torch.equal(layout.join(pieces, lead=2), flat)
    assert layout.split(flat)["last.bias"].data_ptr() == flat[..., -3:].data_ptr(), "views, not copies"


def test_layout_follows_named_parameters_and_says_what_is_wrong() -> None:
    module = _seeded(_convolution)
    layout = ParameterLayout.of(module)
    assert layout.names == tuple(n for n, _ in module.named_parameters())
    with pytest.raises(ValueError, match=f"of 5 numbers, for a model of {layout.num_parameters} parameters"):
        layout.split(torch.zeros(5))
    with pytest.raises(ValueError, match=r"parameters missing: .*1\.bias"):
        layout.join({"1.weight": torch.zeros(4, 1, 3)})
    with pytest.raises(ValueError, match="Linear has no parameter that requires a gradient"):
        ParameterLayout.of(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (3, 3), (7, 3), (7, 1), (7, 0), (7, 100)])
def test_chunks_cover_the_range_once(count: int, size: int) -> None:
    parts = list(chunks(count, size))
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all(0 < part.stop - part.start <= max(1, size) for part in parts)
