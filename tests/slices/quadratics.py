"""Losses whose slices are known: a linear model under squared loss, and a small network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from landscape.objective import Objective


@dataclass(frozen=True)
class Quadratic:
    """L(w) = mean (x . w - y)^2 over the examples, with its derivatives."""

    inputs: Tensor
    targets: Tensor

    def objective(self, **options: object) -> Objective:
        net = nn.Linear(self.inputs.shape[1], 1, bias=False).double()
        return Objective(net, nn.functional.mse_loss, (self.inputs, self.targets[:, None]), **options)

    def example_losses(self, weights: Tensor) -> Tensor:
        """(..., d) -> (..., N)."""
        return (weights @ self.inputs.T - self.targets).square()

    def loss(self, weights: Tensor) -> Tensor:
        return self.example_losses(weights).mean(-1)

    def gradient(self, weights: Tensor) -> Tensor:
        return 2 * (weights @ self.inputs.T - self.targets) @ self.inputs / len(self.inputs)

    @property
    def hessian(self) -> Tensor:
        return 2 * self.inputs.T @ self.inputs / len(self.inputs)

    def choice(self, indices: Tensor) -> Quadratic:
        return Quadratic(self.inputs[indices], self.targets[indices])


def quadratic(num_examples: int = 40, dimension: int = 6, seed: int = 0) -> Quadratic:
    """Inputs of unequal scale, so that the Hessian's eigenvalues are spread."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_examples, dimension, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(0, -1, dimension, dtype=torch.float64)
    return Quadratic(inputs, torch.randn(num_examples, generator=generator, dtype=torch.float64))


def vectors(count: int, dimension: int, seed: int = 5) -> Tensor:
    """Normal rows, float64."""
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*, norm: bool = False, num_examples: int = 50) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A 4-6-3 network, with BatchNorm if asked for, and its data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(6)] if norm else []
        net = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()
        return net, torch.randn(num_examples, 4).double(), torch.randint(3, (num_examples,))


def mirrored_minima() -> tuple[Objective, Tensor, Tensor]:
    """A 4-6-3 network, its weights after 150 steps of gradient descent, and the same with the hidden units in another order."""
    net, x, _ = network()
    teacher = vectors(3, 4, seed=21)
    objective = Objective(net, nn.CrossEntropyLoss(), (x, (x @ teacher.T).tanh().argmax(1)))
    weights = objective.flat(dict(net.named_parameters()))
    for _ in range(150):
        weights = weights - objective.gradient(weights)
    parts, order = objective.model.layout.split(weights), torch.arange(6).roll(1)
    other = {
        **parts,
        "0.weight": parts["0.weight"][order],
        "0.bias": parts["0.bias"][order],
        "2.weight": parts["2.weight"][:, order],
    }
    return objective, weights, objective.model.layout.join(other)
