"""BatchNorm statistics of an averaged model."""

from __future__ import annotations

import torch
from torch import nn

from landscape.data.dataset import TensorData
from landscape.functional import FunctionalModel
from landscape.training.evaluate import RECALIBRATION_BATCH, RECALIBRATION_EXAMPLES, evaluate, recalibrated


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def test_recalibration_measures_the_statistics_at_the_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    count = RECALIBRATION_EXAMPLES + 452
    data = TensorData(torch.randn(count, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (count,), generator=generator))  # fmt: skip
    model = FunctionalModel(network(), nn.functional.cross_entropy)
    weights, own = model.initial_weights()
    stacked = torch.stack([weights, 2 * weights])
    buffers = {name: torch.stack([b, b]) for name, b in own.items()}
    found = recalibrated(model, stacked, buffers, data, seeds=(3, 3))
    for r in range(2):
        layers = model.layout.split(stacked[r])
        hidden = data.inputs @ layers["0.weight"].T + layers["0.bias"]
        # examples are drawn with replacement: the mean of 2,048 lies within 5 standard errors of that of all
        tolerance = 5 * hidden.std(0) / RECALIBRATION_EXAMPLES**0.5
        assert bool(((found["1.running_mean"][r] - hidden.mean(0)).abs() < tolerance).all())
        torch.testing.assert_close(found["1.running_var"][r], hidden.var(0), rtol=0.05, atol=0)
    assert torch.equal(found["1.num_batches_tracked"], buffers["1.num_batches_tracked"])
    again = recalibrated(model, stacked, found, data, seeds=(3, 3))
    assert all(torch.equal(found[name], again[name]) for name in found), "it does not hang on what was there before"
    assert model.module.training
    assert RECALIBRATION_EXAMPLES % RECALIBRATION_BATCH == 0, "the average weighs batches alike"
    losses = [evaluate(model.evaluation(), stacked, b, data)[0] for b in (buffers, found)]
    assert not torch.equal(losses[0], losses[1])


def test_recalibration_takes_each_of_few_examples_once() -> None:
    data = TensorData(torch.randn(300, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.zeros(300, dtype=torch.long))  # fmt: skip
    model = FunctionalModel(network(), nn.functional.cross_entropy)
    weights, own = model.initial_weights()
    layers = model.layout.split(weights)
    hidden = data.inputs @ layers["0.weight"].T + layers["0.bias"]
    found = recalibrated(model, weights[None], {name: b[None] for name, b in own.items()}, data, seeds=(3,))
    torch.testing.assert_close(found["1.running_mean"][0], hidden.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["1.running_var"][0], (hidden[:150].var(0) + hidden[150:].var(0)) / 2)


def test_accuracy_of_sequences_counts_the_positions_that_are_not_ignored() -> None:
    scores = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [5.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    targets = torch.tensor([[0, 1, 1], [1, -100, -100]])
    model = FunctionalModel(nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False)), nn.functional.cross_entropy)
    weights = torch.eye(2).flatten()[None]
    for chunk in (None, 1):
        losses, accuracies = evaluate(model, weights, {}, TensorData(scores, targets), chunk=chunk)
        assert float(accuracies[0]) == 3 / 4
        expected = nn.functional.cross_entropy(scores.movedim(-1, 1), targets).double()
        torch.testing.assert_close(losses[0], expected, rtol=1e-6, atol=0)


def test_accuracy_is_unknown_where_outputs_are_no_classes() -> None:
    model = FunctionalModel(nn.Linear(2, 2), nn.functional.mse_loss)
    weights, _ = model.initial_weights()
    _, accuracies = evaluate(model, weights[None], {}, TensorData(torch.randn(5, 2), torch.randn(5, 2)))
    assert bool(accuracies.isnan().all())


def test_a_network_without_statistics_keeps_its_buffers() -> None:
    model = FunctionalModel(nn.Linear(4, 3).double(), nn.functional.cross_entropy)
    buffers = {"kept": torch.ones(1, 2)}
    data = TensorData(torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    assert recalibrated(model, model.initial_weights()[0][None], buffers, data, seeds=(0,)) is buffers
