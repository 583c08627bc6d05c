import copy

import pytest
import torch
from torch import Tensor, nn

from landscape.data.dataset import MapData, TensorData
from landscape.objective import Objective


def parts(examples: int = 23) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
        return net, torch.randn(examples, 4).double(), torch.randint(3, (examples,))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def test_value_and_gradient_over_any_batching() -> None:
    net, x, y = parts()
    frozen = copy.deepcopy(net).eval()
    loss = nn.functional.cross_entropy(frozen(x), y)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(frozen.parameters()))])
    ragged = [(x[a:b], y[a:b]) for a, b in ((0, 10), (10, 20), (20, 23))]
    for data in (
        (x, y),
        TensorData(x, y),
        Pairs(x, y),
        MapData(Pairs(x, y), dtype=torch.float64),
        ragged,
        torch.utils.data.TensorDataset(x, y),
    ):
        for chunk in (3, 1000):
            objective = Objective(net, nn.functional.cross_entropy, data, chunk=chunk)
            weights = dict(net.named_parameters())
            assert objective.value(weights) == pytest.approx(loss.item(), abs=1e-14)
            torch.testing.assert_close(objective.gradient(weights), expected, rtol=0, atol=1e-14)
            assert objective.num_examples == 23


def test_the_callers_module_is_untouched() -> None:
    net, x, y = parts()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    objective.gradient(dict(net.named_parameters()))
    list(objective.example_gradients(dict(net.named_parameters())))
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_minibatch_gradients_are_those_of_the_examples_drawn() -> None:
    net, x, y = parts()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), chunk=8)
    weights = torch.stack([objective.flat(dict(net.named_parameters())) * s for s in (1.0, 0.5, 2.0)])
    indices = torch.tensor([[0, 1, 1, 5], [22, 3, 4, 4], [7, 8, 9, 10]])
    found = objective.minibatch_gradients(weights, indices)
    for row, drawn, got in zip(weights, indices, found, strict=True):
        alone = Objective(net, nn.CrossEntropyLoss(), (x[drawn], y[drawn])).gradient(row)
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-14)


def test_example_gradients_average_to_the_gradient() -> None:
    net, x, y = parts()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    weights = dict(net.named_parameters())
    stacked = torch.cat([g for g, _ in objective.example_gradients(weights, chunk=6)])
    assert stacked.shape == (23, objective.num_parameters)
    torch.testing.assert_close(stacked.mean(0), objective.gradient(weights), rtol=0, atol=1e-14)


def test_mistakes_are_explained() -> None:
    net, x, y = parts()
    with pytest.raises(ValueError, match="list of batches"):
        Objective(net, nn.CrossEntropyLoss(), [(x, y)]).minibatch_gradients(
            torch.zeros(1, 58), torch.zeros(1, 2, dtype=torch.int64)
        )
    with pytest.raises(ValueError, match="23 inputs, but 22 targets"):
        Objective(net, nn.CrossEntropyLoss(), (x, y[1:]))
    with pytest.raises(ValueError, match="iterator"):
        Objective(net, nn.CrossEntropyLoss(), iter([(x, y)]))
    with pytest.raises(ValueError, match="for a model of"):
        Objective(net, nn.CrossEntropyLoss(), (x, y)).gradient(torch.zeros(3))
    with pytest.raises(ValueError, match="parameters missing"):
        Objective(net, nn.CrossEntropyLoss(), (x, y)).gradient({"0.weight": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match="not one number per example"):
        Objective(net, lambda out, target: nn.functional.cross_entropy(out, target), (x, y)).value(
            dict(net.named_parameters())
        )


def test_a_loader_is_read_once_and_leaves_the_random_state_alone() -> None:
    net, x, y = parts()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    objective = Objective(net, nn.CrossEntropyLoss(), loader)
    assert torch.equal(state, torch.get_rng_state())
    weights = dict(net.named_parameters())
    assert objective.value(weights) == pytest.approx(
        Objective(net, nn.CrossEntropyLoss(), (x, y)).value(weights), rel=1e-13
    )
    assert objective.value(weights) == objective.value(weights)


def test_inputs_in_tuples_and_dictionaries_of_any_source() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a) * b[:, :1]

    _, x, y = parts()
    net = Two()
    weights = dict(net.named_parameters())
    expected = nn.functional.cross_entropy(net(x, x), y).item()
    rows = [{"a": x[i], "b": x[i], "label": y[i]} for i in range(len(x))]

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return rows[i]

    for data in ((x, x, y), [(x[:9], x[:9], y[:9]), (x[9:], x[9:], y[9:])], {"a": x, "b": x, "targets": y}, Rows()):
        objective = Objective(net, nn.CrossEntropyLoss(), data, chunk=4)
        assert objective.value(weights) == pytest.approx(expected, rel=1e-13)
        if not isinstance(data, list):
            drawn = objective.minibatch_gradients(objective.flat(weights)[None], torch.arange(len(x))[None])
            torch.testing.assert_close(drawn[0], objective.gradient(weights))
    swapped = Objective(net, nn.CrossEntropyLoss(), [(y, x)], split=lambda batch: ((batch[1], batch[1]), batch[0]))
    assert swapped.value(weights) == pytest.approx(expected, rel=1e-13)
    with pytest.raises(ValueError, match="which is the target"):
        Objective(net, nn.CrossEntropyLoss(), {"a": x, "b": y}).value(weights)


def test_opaque_losses_are_weighted_by_the_batch_or_summed() -> None:
    net, x, y = parts()
    weights = dict(net.named_parameters())
    frozen = copy.deepcopy(net).eval()
    ragged = [(x[a:b], y[a:b]) for a, b in ((0, 10), (10, 20), (20, 23))]
    for reduction in ("mean", "sum"):

        def loss_fn(output: Tensor, target: Tensor, reduction: str = reduction) -> Tensor:
            return nn.functional.cross_entropy(output, target, reduction=reduction)

        objective = Objective(net, lambda o, t, f=loss_fn: f(o, t), ragged, reduction=reduction)  # type: ignore[misc]
        assert objective.value(weights) == pytest.approx(loss_fn(frozen(x), y).item(), rel=1e-13)
        reference = torch.autograd.grad(loss_fn(frozen(x), y), list(frozen.parameters()))
        torch.testing.assert_close(objective.gradient(weights), torch.cat([g.flatten() for g in reference]))
    with pytest.raises(ValueError, match="reduction='mean'"):
        Objective(net, lambda o, t: nn.functional.cross_entropy(o, t), ragged).value(weights)
    with pytest.raises(ValueError, match="leave reduction out"):
        Objective(
            net, lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"), ragged, reduction="mean"
        ).value(weights)


def test_token_scores_are_found_wherever_the_classes_are() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net, x, y = nn.Linear(4, 3).double(), torch.randn(6, 5, 4).double(), torch.randint(3, (6, 5))
    expected = nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten()).item()
    weights = dict(net.named_parameters())
    assert Objective(net, nn.CrossEntropyLoss(), (x, y)).value(weights) == pytest.approx(expected, rel=1e-13)
    moved = nn.Sequential(net, nn.Flatten(1), nn.Unflatten(1, (5, 3)))
    named = dict(moved.named_parameters())
    assert Objective(moved, nn.CrossEntropyLoss(), (x, y)).value(named) == pytest.approx(expected, rel=1e-13)


def test_ghost_batches_are_the_training_loss_of_fixed_batches() -> None:
    net, x, y = parts()
    training = nn.Sequential(*[m for m in copy.deepcopy(net) if not isinstance(m, nn.Dropout)]).train()
    batches = [(x[a:b], y[a:b]) for a, b in ((0, 8), (8, 16), (16, 23))]
    losses = [nn.functional.cross_entropy(training(a), b, reduction="sum") for a, b in batches]
    loss = torch.stack(losses).sum() / 23
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(training.parameters()))])
    weights = dict(net.named_parameters())
    for data, options in (((x, y), {"batch_size": 8}), (batches, {})):
        objective = Objective(net, nn.CrossEntropyLoss(), data, batch_norm="ghost", **options)
        before = {n: b.clone() for n, b in objective.buffers.items()}
        assert objective.value(weights) == pytest.approx(loss.item(), rel=1e-13)
        torch.testing.assert_close(objective.gradient(weights), reference)
        stacked = objective.stacked_gradients(objective.flat(weights).expand(3, -1))
        torch.testing.assert_close(stacked, reference.expand(3, -1))
        assert all(torch.equal(b, before[n]) for n, b in objective.buffers.items())
        with pytest.raises(ValueError, match="no gradient of its own"):
            next(objective.example_gradients(weights))
    with pytest.raises(ValueError, match="give batch_size"):
        Objective(net, nn.CrossEntropyLoss(), (x, y), batch_norm="ghost")


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    net, x, y = parts()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    weights = {n: 2 * p for n, p in net.named_parameters()}
    hidden = nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
    whole = objective.recalibrated(weights)
    torch.testing.assert_close(whole.buffers["1.running_mean"], hidden.mean(0))
    torch.testing.assert_close(whole.buffers["1.running_var"], hidden.var(0))
    parted = objective.recalibrated(weights, batch_size=10)  # the average of batch statistics, by their examples
    torch.testing.assert_close(parted.buffers["1.running_mean"], hidden.mean(0))
    variances = torch.stack([h.var(0) for h in hidden.split(10)])
    torch.testing.assert_close(
        parted.buffers["1.running_var"], (variances * torch.tensor([[10], [10], [3]]) / 23).sum(0)
    )
    assert torch.equal(objective.buffers["1.running_mean"], torch.zeros(5).double())
    assert whole.value(weights) != objective.value(weights)


def test_recalibration_under_frozen_masks_and_with_one_example_left_over() -> None:
    net, x, y = parts()
    net = nn.Sequential(nn.Dropout(0.5), *net)  # before the BatchNorm
    weights = {n: p.detach() for n, p in net.named_parameters()}
    state = torch.get_rng_state()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), dropout_seed=3, batch_size=10)
    first, again = (
        objective.recalibrated(weights, batch_size=11).buffers["2.running_mean"] for _ in range(2)
    )  # 23 = 2 x 11 + 1
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(
        first, Objective(net, nn.CrossEntropyLoss(), (x, y)).recalibrated(weights).buffers["2.running_mean"]
    )


def test_dropout_masks_are_frozen_by_their_seed() -> None:
    net, x, y = parts()
    weights = dict(net.named_parameters())
    state = torch.get_rng_state()
    first, same, other = (
        Objective(net, nn.CrossEntropyLoss(), (x, y), dropout_seed=s, batch_size=10) for s in (1, 1, 2)
    )
    assert first.value(weights) == first.value(weights) == same.value(weights)
    assert first.value(weights) != other.value(weights)
    assert first.value(weights) != Objective(net, nn.CrossEntropyLoss(), (x, y)).value(weights)
    assert torch.equal(state, torch.get_rng_state())
    flat = first.flat(weights)
    step = 1e-6 * torch.ones_like(flat)
    difference = (first.value(flat + step) - first.value(flat - step)) / 2
    assert float(first.gradient(flat) @ step) == pytest.approx(difference, rel=1e-6)
    pair = first.stacked_values(torch.stack([flat, flat]))  # batched over weights: the same masks for each
    assert float(pair[0]) == float(pair[1])


def test_subsets_hold_the_rest_where_they_are_told() -> None:
    net, x, y = parts()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    weights = {n: 1.5 * p.detach() for n, p in net.named_parameters()}
    part = objective.subset("4.*", weights)
    assert part.model.layout.names == ("4.weight", "4.bias")
    assert part.value(weights) == pytest.approx(objective.value(weights), rel=1e-13)
    torch.testing.assert_close(part.gradient(weights), objective.gradient(weights)[-18:])
    only = Objective(net, nn.CrossEntropyLoss(), (x, y), parameters=["0.weight", "1.*"])
    assert only.num_parameters == 20 + 10
    assert objective.blocks("layer") == {
        "0": ["0.weight", "0.bias"],
        "1": ["1.weight", "1.bias"],
        "4": ["4.weight", "4.bias"],
    }
    with pytest.raises(ValueError, match=r"no parameter is named nothing\.\*"):
        objective.subset("nothing.*", weights)


@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_bad_data_are_named(where: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, y = nn.Linear(4, 2).double(), torch.randn(23, 4).double(), torch.randn(23, 2).double()
    (x if where == "inputs" else y)[17, 1] = float("nan")
    batches = [(x[a:b], y[a:b]) for a, b in ((0, 10), (10, 20), (20, 23))]
    objective = Objective(net, nn.MSELoss(), batches)
    weights = dict(net.named_parameters())
    message = r"1 example\(s\) of batch 1 \(examples 10 to 19\), the first of them example 17"
    for call in (
        objective.value,
        objective.gradient,
        lambda w: objective.linearise(objective.flat(w), 1, *batches[1], "hessian"),
    ):
        with pytest.raises(ValueError, match=message):
            call(weights)
    clean = Objective(net, nn.MSELoss(), (x.nan_to_num(), y.nan_to_num()))
    assert torch.isnan(
        clean.gradient(objective.flat(weights) * float("nan"))
    ).all()  # diverged weights are an answer, not an error


def test_nothing_left_to_weigh_is_an_error() -> None:
    net, x, y = parts()
    with pytest.raises(ValueError, match="every target is ignored"):
        Objective(net, nn.CrossEntropyLoss(), (x, torch.full_like(y, -100))).value(dict(net.named_parameters()))
