"""Building blocks that the convolutional networks share.

No block keeps a number of channels: they are read off the tensors, so that `landscape.models.narrow` need change layers only.
All keep torch's default initialisation, as the public 32x32 forms do.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Images = Float[Tensor, "B C H W"]
Maps = Float[Tensor, "B D I J"]


def network(**parts: nn.Module) -> nn.Sequential:
    """Named parts, one after another."""
    return nn.Sequential(OrderedDict(parts))


def convolution(
    inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size of the image, but for its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def conv_norm(
    inputs: int, outputs: int, kernel: int = 3, activation: type[nn.Module] | None = None, *,
    stride: int = 1, groups: int = 1, bias: bool = False,
) -> nn.Sequential:  # fmt: skip
    """A convolution, BatchNorm and an activation."""
    layers: dict[str, nn.Module] = {
        "conv": convolution(inputs, outputs, kernel, stride=stride, groups=groups, bias=bias),
        "norm": nn.BatchNorm2d(outputs),
    }
    return network(**layers) if activation is None else network(**layers, activation=activation())


def head(inputs: int, num_classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Mean over the image, and scores (B, num_classes)."""
    before = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *before, nn.Linear(inputs, num_classes))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The shortcut of a residual block: the identity where the shapes allow it."""
    return nn.Identity() if stride == 1 and inputs == outputs else conv_norm(inputs, outputs, kernel=1, stride=stride)


class Residual(nn.Module):
    """activation(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut
        self.activation = activation or nn.Identity()

    def forward(self, x: Images) -> Maps:
        """See the class."""
        return self.activation(self.body(x) + self.shortcut(x))


class Branches(nn.Module):
    """What several modules make of one input, side by side as channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Images) -> Maps:
        """See the class."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class SqueezeExcitation(nn.Module):
    """Each channel times a number in (0, 1) made of all channels' means (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.squeeze = convolution(channels, squeezed, kernel=1, bias=True)
        self.activation = activation()
        self.excite = convolution(squeezed, channels, kernel=1, bias=True)

    def forward(self, x: Images) -> Images:
        """See the class."""
        means = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.excite(self.activation(self.squeeze(means))))


class DropPath(nn.Module):
    """Leaves out a residual block for a random share `rate` of the examples while training (Huang et al., arXiv 1603.09382).

    What stays is divided by 1 - rate. Draws come from torch's global generator, one per example.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Images) -> Images:
        """See the class."""
        return x * F.dropout(x.new_ones(len(x), 1, 1, 1), self.rate, self.training)
