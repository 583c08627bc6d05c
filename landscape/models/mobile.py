"""MobileNet, MobileNetV2, EfficientNet and ShuffleNetV2 for 32x32 images: networks of depthwise convolutions."""

from __future__ import annotations

import torch
from torch import nn

from landscape.models.blocks import (
    Branches,
    DropPath,
    Images,
    Residual,
    SqueezeExcitation,
    conv_norm,
    head,
    network,
    projection,
)


def mobilenet(num_classes: int = 10) -> nn.Sequential:
    """MobileNet (Howard et al., arXiv 1704.04861), the first stride 1; 3,217,226 parameters."""
    steps = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    inputs, blocks = 32, []
    for channels, stride in steps:
        depthwise = conv_norm(inputs, inputs, 3, nn.ReLU, stride=stride, groups=inputs)
        blocks.append(nn.Sequential(depthwise, conv_norm(inputs, channels, 1, nn.ReLU)))
        inputs = channels
    return network(stem=conv_norm(3, 32, 3, nn.ReLU), blocks=nn.Sequential(*blocks), head=head(inputs, num_classes))


INVERTED = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""MobileNetV2's expansion, channels, number of blocks, stride of the first."""


def mobilenetv2(num_classes: int = 10) -> nn.Sequential:
    """MobileNetV2 (Sandler et al., arXiv 1801.04381), the first two strides 1, each block of stride 1 with a shortcut; 2,296,922 parameters."""
    blocks: list[nn.Module] = []
    inputs = 32
    for expansion, channels, depth, first in INVERTED:
        for stride in (first, *[1] * (depth - 1)):
            inner = expansion * inputs
            body = nn.Sequential(
                conv_norm(inputs, inner, 1, nn.ReLU),
                conv_norm(inner, inner, 3, nn.ReLU, stride=stride, groups=inner),
                conv_norm(inner, channels, 1),
            )
            blocks.append(body if stride > 1 else Residual(body, projection(inputs, channels, 1)))
            inputs = channels
    return network(
        stem=conv_norm(3, 32, 3, nn.ReLU), blocks=nn.Sequential(*blocks), last=conv_norm(inputs, 1280, 1, nn.ReLU),
        head=head(1280, num_classes),
    )  # fmt: skip


EFFICIENT = (
    (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2), (6, 320, 1, 3, 1),
)  # fmt: skip
"""EfficientNet-B0's expansion, channels, number of blocks, kernel, stride of the first."""


def efficientnet_b0(num_classes: int = 10) -> nn.Sequential:
    """EfficientNet-B0 (Tan and Le, arXiv 1905.11946), the first stride 1, no 1280 channels before the scores; 3,599,686 parameters.

    Residual blocks are left out at rates that rise linearly to 0.2 with depth; dropout of 0.2 before the scores. The first block does not expand;
    as in the public form, the expansion is there and counted all the same (1,088 parameters whose gradient is zero).
    """
    blocks: list[nn.Module] = []
    inputs = 32
    total = sum(depth for _, _, depth, _, _ in EFFICIENT)
    for expansion, channels, depth, kernel, first in EFFICIENT:
        for stride in (first, *[1] * (depth - 1)):
            inner = expansion * inputs
            expand = conv_norm(inputs, inner, 1, nn.SiLU)
            body = nn.Sequential(
                expand if expansion > 1 else Unused(expand),
                conv_norm(inner, inner, kernel, nn.SiLU, stride=stride, groups=inner),
                SqueezeExcitation(inner, inputs // 4, nn.SiLU),
                conv_norm(inner, channels, 1),
            )
            if stride == 1 and inputs == channels:
                body.append(DropPath(0.2 * len(blocks) / total))
                blocks.append(Residual(body, nn.Identity()))
            else:
                blocks.append(body)
            inputs = channels
    return network(
        stem=conv_norm(3, 32, 3, nn.SiLU), blocks=nn.Sequential(*blocks), head=head(inputs, num_classes, dropout=0.2)
    )


class Unused(nn.Module):
    """The identity, which holds a module that is never applied."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Images) -> Images:
        """See the class."""
        return x


def shufflenetv2(num_classes: int = 10) -> nn.Sequential:
    """ShuffleNetV2 (1x; Ma et al., arXiv 1807.11164), a 3x3 stem without stride or pooling; 1,263,854 parameters."""
    inputs, stages = 24, {}
    for number, (channels, depth) in enumerate(((116, 3), (232, 7), (464, 3)), start=1):
        half = channels // 2
        shrink = Branches(
            nn.Sequential(conv_norm(inputs, inputs, 3, stride=2, groups=inputs), conv_norm(inputs, half, 1, nn.ReLU)),
            _separable(inputs, half, stride=2),
        )
        keep = [nn.Sequential(SecondHalf(_separable(half, half, stride=1)), Shuffle()) for _ in range(depth)]
        stages[f"stage{number}"] = nn.Sequential(shrink, Shuffle(), *keep)
        inputs = channels
    return network(
        stem=conv_norm(3, 24, 3, nn.ReLU),
        **stages,
        last=conv_norm(inputs, 1024, 1, nn.ReLU),
        head=head(1024, num_classes),
    )


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(inputs, outputs, 1, nn.ReLU),
        conv_norm(outputs, outputs, 3, stride=stride, groups=outputs),
        conv_norm(outputs, outputs, 1, nn.ReLU),
    )


class SecondHalf(nn.Module):
    """The first half of the channels as it is, beside what `body` makes of the second."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Images) -> Images:
        """See the class."""
        first, second = x.chunk(2, dim=1)
        return torch.cat([first, self.body(second)], dim=1)


class Shuffle(nn.Module):
    """The two halves of the channels in turn: 0, C/2, 1, C/2 + 1, ..."""

    def forward(self, x: Images) -> Images:
        """See the class."""
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
