"""Acoustic models."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class BLSTM(nn.Module):
    """Scores of the states of every frame: a bidirectional LSTM, a linear bottleneck, a linear layer."""

    def __init__(self, features: int, states: int, cells: int, layers: int, bottleneck: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, cells, layers, bidirectional=True, batch_first=True)
        self.bottleneck = nn.Linear(2 * cells, bottleneck)
        self.head = nn.Linear(bottleneck, states)

    def forward(self, frames: Float[Tensor, "B T features"]) -> Float[Tensor, "B T states"]:
        """See the class."""
        return self.head(self.bottleneck(self.lstm(frames)[0]))


def blstm(features: int = 260, states: int = 32_000, cells: int = 512, layers: int = 6, bottleneck: int = 256) -> BLSTM:
    r"""The bidirectional LSTM acoustic model, torch's default initialisation.

    Parameters: with $c$ cells a direction, layer $l$ of the LSTM has $2 \cdot 4c (f_l + c + 2)$, where $f_1$ is the number of features and
    $f_l = 2c$ above; then $(2c + 1) b$ and $(b + 1) s$. At the defaults 3,170,304 + 5 * 6,299,648 + 262,400 + 8,224,000 = 43,154,944.

    Args:
        features: of a frame.
        states: of the hidden Markov model, whose scores come out.
        cells: of each direction of each layer.
        layers: of the LSTM.
        bottleneck: outputs of the linear layer before the last.

    >>> sum(p.numel() for p in blstm(features=2, states=5, cells=3, layers=2, bottleneck=4).parameters())
    485
    """
    return BLSTM(features, states, cells, layers, bottleneck)
