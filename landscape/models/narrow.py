"""Any of the networks with a fraction of its channels."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

from torch import nn

from landscape.models.blocks import SqueezeExcitation
from landscape.models.imagenet import initialise

Layer = nn.Conv2d | nn.BatchNorm2d | nn.Linear | nn.LSTM


def narrow(module: nn.Module, width: Fraction | float | int) -> nn.Module:
    """A network like `module` with all its channels times `width`, newly initialised as the network is.

    The inputs of the first layer and the outputs of the last stay. Grouped convolutions, depthwise ones among them, have fewer groups of the
    same size where two or more whole groups are left, and as many smaller ones elsewhere. The squeezed channels of squeeze-excitation are
    rounded up. Works on networks of Conv2d, BatchNorm2d, Linear and LSTM layers whose other modules keep no number of channels: those of this package and
    torchvision's AlexNet, VGG, ResNet, DenseNet.

    Args:
        module: left as it is. One on the meta device serves as well and costs nothing to build: the result lies on torch's default device.
        width: in (0, 1].

    Raises:
        ValueError: if a number of channels times `width` is no whole number, or the network has other layers with weights.

    >>> [layer.out_features for layer in narrow(nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 3)), 1 / 4)]
    [2, 3]
    """
    share = Fraction(width).limit_denominator(1 << 12)
    if not 0 < share <= 1:
        raise ValueError(f"a width of {width}; use a fraction of the channels in (0, 1], such as 1/4")
    layers = _layers(module)
    ends = [name for name, layer in layers.items() if not isinstance(layer, nn.BatchNorm2d)]
    squeezed = [m for m in module.modules() if isinstance(m, SqueezeExcitation)]
    inner_inputs, inner_outputs = {id(m.excite) for m in squeezed}, {id(m.squeeze) for m in squeezed}

    numbers: dict[str, tuple[int, int]] = {}
    counted: dict[int, str] = {}  # channels that have to be divided, and a layer that has them
    for name, layer in layers.items():
        inputs, outputs = _channels(layer)
        keeps_inputs, keeps_outputs = name == ends[0], name == ends[-1]
        numbers[name] = (
            inputs if keeps_inputs else math.ceil(inputs * share),
            outputs if keeps_outputs else math.ceil(outputs * share),
        )
        if not keeps_inputs and id(layer) not in inner_inputs:
            counted.setdefault(inputs, name)
        if not keeps_outputs and id(layer) not in inner_outputs:
            counted.setdefault(outputs, name)
    for count, name in counted.items():
        if (count * share).denominator > 1:
            step = math.gcd(*counted)
            raise ValueError(
                f"a width of {share} does not divide the {count} channels of {name}; use a multiple of 1/{step}, such as "
                f"{Fraction(1, step) * max(1, int(share * step))}"
            )
    narrower = {id(layer): _narrowed(name, layer, *numbers[name], share) for name, layer in layers.items()}
    result: nn.Module = copy.deepcopy(module, narrower)  # the layers given take their places, and no old one is copied
    initialise(result)
    return result


def _layers(module: nn.Module) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    for name, part in module.named_modules():
        if (
            isinstance(part, Layer)
            and type(part).__module__.startswith("torch.nn.")
            and not getattr(part, "proj_size", 0)
        ):
            found[name] = part
        elif next(part.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"{name or 'the network'} is of type {type(part).__name__}, which cannot be made narrower; convolutions, BatchNorm, linear "
                "layers and LSTMs can (those without a projection)"
            )
    if all(isinstance(layer, nn.BatchNorm2d) for layer in found.values()):
        raise ValueError(f"{type(module).__name__} has no layer that could be made narrower")
    return found


def _channels(layer: Layer) -> tuple[int, int]:
    """Of the inputs and the outputs (of one direction, for an LSTM)."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.BatchNorm2d):
        return layer.num_features, layer.num_features
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.input_size, layer.hidden_size


def _narrowed(name: str, layer: Layer, inputs: int, outputs: int, share: Fraction) -> Layer:
    """A new layer like `layer`, of other numbers of channels, in its type and its train or eval mode."""
    made: Layer
    if isinstance(layer, nn.Conv2d):
        groups = _groups(name, layer, inputs, outputs, share)
        options = _same(layer, "kernel_size", "stride", "padding", "dilation", "padding_mode")
        made = nn.Conv2d(inputs, outputs, groups=groups, bias=layer.bias is not None, **options)
    elif isinstance(layer, nn.BatchNorm2d):
        made = nn.BatchNorm2d(outputs, **_same(layer, "eps", "momentum", "affine", "track_running_stats"))
    elif isinstance(layer, nn.Linear):
        made = nn.Linear(inputs, outputs, bias=layer.bias is not None)
    else:
        options = _same(layer, "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        made = nn.LSTM(inputs, outputs, **options)
    dtype = next((p.dtype for p in layer.parameters()), None)
    return made.to(dtype).train(layer.training)


def _same(layer: Layer, *names: str) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in names}


def _groups(name: str, layer: nn.Conv2d, inputs: int, outputs: int, share: Fraction) -> int:
    if layer.groups == 1:
        return 1
    if layer.groups == layer.in_channels:  # depthwise
        return inputs
    fewer = layer.groups * share
    groups = int(fewer) if fewer.denominator == 1 and fewer > 1 else layer.groups
    if inputs % groups == outputs % groups == 0:
        return groups
    raise ValueError(
        f"a width of {share} leaves {inputs} channels for the {layer.groups} groups of {name}, too few; use a larger one"
    )
