"""Networks and data of the benchmarks."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from landscape.data.digits import digits as split_digits
from landscape.optional import import_torchvision


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.around = nn.Identity() if same else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for 32 x 32 images; 11,173,962 parameters at width 64."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for after, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(before, after, stride), Block(after, after, 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def digits() -> tuple[Tensor, Tensor]:
    """All 5,000 digits, (5000, 784) and (5000,), in a fixed random order."""
    train, test = split_digits()
    inputs, targets = torch.cat([train.inputs, test.inputs]).flatten(1), torch.cat([train.targets, test.targets])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return inputs[order], targets[order]


def images(count: int) -> tuple[Tensor, Tensor, str]:
    """CIFAR-10 images, normalised; normal noise with random labels where LANDSCAPE_DATA_ROOT does not hold them. And which."""
    root = os.environ.get("LANDSCAPE_DATA_ROOT")
    if root and os.path.isdir(os.path.join(root, "cifar-10-batches-py")):
        data = import_torchvision("torchvision.datasets").CIFAR10(root, train=True, download=False)
        pixels = torch.from_numpy(data.data[:count]).permute(0, 3, 1, 2).float() / 255
        mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
        return ((pixels - mean) / std).contiguous(), torch.tensor(data.targets[:count]), "CIFAR-10"
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator), "noise"


def small_cnn() -> nn.Module:
    """Two convolutions and a linear layer for 28 x 28 images; 20,490 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip
