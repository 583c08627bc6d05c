"""Small networks of many kinds, with ragged batches and the same loss written down plainly: truth for the operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from landscape.functional import ParameterLayout
from landscape.objective import Objective


@dataclass(frozen=True)
class Case:
    """A network, a loss as users give it, ragged batches, and what both amount to on all examples at once."""

    name: str
    model: nn.Module
    loss_fn: Any
    batches: list[Any]
    together: Any  # one batch of all examples
    call: Callable[[nn.Module, dict[str, Tensor], Any], Tensor]  # (model, state, batch) -> scores
    plain: Callable[[Tensor, Any], Tensor]  # (scores, batch) -> the loss, one number
    options: dict[str, Any]

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])

    def objective(self, **options: Any) -> Objective:
        return Objective(self.model, self.loss_fn, self.batches, **{**self.options, **options})

    def scores(self, flat: Tensor) -> Tensor:
        return self.call(self.model, ParameterLayout.of(self.model).split(flat), self.together)

    def loss(self, flat: Tensor) -> Tensor:
        return self.plain(self.scores(flat), self.together)

    def dense_hessian(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(self.loss, self.weights)

    def dense_gauss_newton(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            scores = self.scores(self.weights)
            jacobian = torch.autograd.functional.jacobian(lambda w: self.scores(w).flatten(), self.weights)
        inner = torch.autograd.functional.hessian(
            lambda z: self.plain(z.view_as(scores), self.together), scores.detach().flatten()
        )
        return jacobian.T @ inner @ jacobian


def _pairs(x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def _positional(model: nn.Module, state: dict[str, Tensor], batch: Any) -> Tensor:
    return functional_call(model, state, (batch[0],))


class LastHidden(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 2, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tagger(nn.Module):
    """A transformer that scores each token, called with keyword arguments and answering with a dictionary; input and output embeddings tied."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 7)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.layer(self.embed(tokens), src_key_padding_mask=mask)
        return {"logits": self.head(hidden), "hidden": hidden}


class Partial(nn.Module):
    """One frozen layer, one that is not used, one parameter that enters linearly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(self.frozen(self.first(x)).tanh())


def cases() -> dict[str, Case]:
    """By name."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = (4, 4, 4, 1)
        x, y = torch.randn(13, 4).double(), torch.randint(3, (13,))
        weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
        ignored = torch.where(torch.arange(13) % 3 == 0, -100, y)
        pictures = torch.randn(13, 2, 6, 6).double()
        steps, tokens = torch.randn(13, 3, 2).double(), torch.randint(7, (13, 6))
        padding = torch.arange(6)[None] >= torch.randint(2, 7, (13, 1))
        labels = tokens.roll(1, dims=1).masked_fill(padding, -100)
        values = torch.randn(13, 2, 3).double()

        convolution = nn.Sequential(
            nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.GELU(), nn.Conv2d(3, 4, 2, bias=False, groups=1), nn.Tanh(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
        ).double()  # fmt: skip
        convolution(3 * pictures + 1)  # running statistics that are not the default
        made = [
            Case("mlp", nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss(), _pairs(x, y, sizes),
                 (x, y), _positional, lambda z, b: cross_entropy(z, b[1]), {}),
            Case("class weights and ignored targets, sum", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double(),
                 nn.CrossEntropyLoss(weight=weight, reduction="sum"), _pairs(x, ignored, sizes), (x, ignored), _positional,
                 lambda z, b: cross_entropy(z, b[1], weight=weight, reduction="sum"), {}),
            Case("class weights and ignored targets, mean", nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 3)).double(),
                 nn.CrossEntropyLoss(weight=weight), _pairs(x, ignored, sizes), (x, ignored), _positional,
                 lambda z, b: cross_entropy(z, b[1], weight=weight), {}),
            Case("regression of a matrix", nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (2, 3))).double(), nn.functional.mse_loss,
                 _pairs(x, values, sizes), (x, values), _positional, lambda z, b: nn.functional.mse_loss(z, b[1]), {}),
            Case("opaque mean", nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), lambda z, t: (z.exp().sum(1) - z[:, 0] * t).square().mean(),
                 _pairs(x, y, sizes), (x, y), _positional, lambda z, b: (z.exp().sum(1) - z[:, 0] * b[1]).square().mean(), {"reduction": "mean"}),
            Case("convolution with BatchNorm", convolution.eval(), nn.CrossEntropyLoss(label_smoothing=0.1), _pairs(pictures, y, sizes),
                 (pictures, y), _positional, lambda z, b: cross_entropy(z, b[1], label_smoothing=0.1), {}),
            Case("lstm", LastHidden().double(), cross_entropy, _pairs(steps, y, sizes), (steps, y), _positional,
                 lambda z, b: cross_entropy(z, b[1]), {}),
            Case("transformer on dictionaries, masked tokens", Tagger().double().eval(), nn.CrossEntropyLoss(),
                 [{"tokens": t, "mask": m, "labels": k} for t, m, k in zip(tokens.split(sizes), padding.split(sizes), labels.split(sizes), strict=True)],
                 (tokens, padding, labels), lambda model, state, b: functional_call(model, state, (b[0], b[1]))["logits"],
                 lambda z, b: cross_entropy(z.flatten(0, 1), b[2].flatten()), {}),
            Case("frozen, unused and linear parameters", Partial().double(), cross_entropy, _pairs(x, y, sizes), (x, y),
                 lambda model, state, b: functional_call(model, state, (b[0],)), lambda z, b: cross_entropy(z, b[1]), {}),
        ]  # fmt: skip
    return {case.name: case for case in made}


CASES = cases()
