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
