"""The seventeen networks in narrow forms, on images as small as their strides allow."""

from __future__ import annotations

import importlib.util
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from landscape.functional import FunctionalModel
from landscape.models import CIFAR10, IMAGENET, imagenet, narrow
from landscape.models.blocks import DropPath

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision; not installed"
)
CONVOLUTIONAL = [*CIFAR10, *(pytest.param(name, marks=needs_torchvision) for name in IMAGENET)]
WIDTHS = {"shufflenetv2": Fraction(1, 2)}
SIZES = {"vgg19": 32, "alexnet": 64, "vgg11": 32, "vgg11-bn": 32, "resnet50": 64, "resnext50": 64, "densenet161": 32}


def full(name: str) -> nn.Module:
    """At full width, without weights in memory."""
    with torch.device("meta"):
        return CIFAR10[name]() if name in CIFAR10 else imagenet(name)


def small(name: str, seed: int = 0) -> nn.Module:
    """Of 10 classes and 1/8 of the channels (ShuffleNet: 1/2), dropout off."""
    with torch.device("meta"):
        network = CIFAR10[name]() if name in CIFAR10 else imagenet(name, num_classes=10)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return without_dropout(narrow(network, WIDTHS.get(name, Fraction(1, 8))))


def batch(name: str, *lead: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images (*lead, 4, 3, S, S) and their classes (*lead, 4)."""
    generator = torch.Generator().manual_seed(1)
    size = SIZES.get(name, 16)
    images = torch.randn(*lead, 4, 3, size, size, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, 10, (*lead, 4), generator=generator)


def without_dropout(module: nn.Module) -> nn.Module:
    """The same, with the layers that draw random numbers in eval mode."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout | DropPath):
            layer.eval()
    return module


def settled(module: nn.Module, images: Tensor) -> nn.Module:
    """In eval mode, at running statistics that fit the images."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = None  # averages, of one batch
    with torch.no_grad():
        module(images)
    return module.eval()


def smooth(module: nn.Module) -> nn.Module:
    """The same, without kinks: GELU for ReLU, means for maxima."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.ReLU):
            module.set_submodule(name, nn.GELU())
        elif isinstance(layer, nn.MaxPool2d):
            module.set_submodule(name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding))
    return module


def gradient(model: FunctionalModel, weights: Tensor, buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of the summed losses at one weight vector (d,)."""
    lead = {name: b[None] for name, b in buffers.items()}
    return model.summed_gradients(weights[None], lead, x[None], y[None])[2][0]
