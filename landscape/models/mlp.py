"""Fully connected networks."""

from __future__ import annotations

import itertools

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def mlp(sizes: tuple[int, ...] = (784, 50, 50, 10), activation: str = "relu") -> nn.Sequential:
    """A fully connected network with torch's default initialisation.

    Args:
        sizes: widths from the input to the output.
        activation: "relu", or "gelu" and "tanh", the smooth controls.

    >>> sum(p.numel() for p in mlp().parameters())
    42310
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        if i:
            layers.append(ACTIVATIONS[activation]())
        layers.append(nn.Linear(fan_in, fan_out))
    return nn.Sequential(*layers)
