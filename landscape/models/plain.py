"""VGG, GoogLeNet and DenseNet for 32x32 images."""

from __future__ import annotations

from torch import nn

from landscape.models.blocks import Branches, conv_norm, convolution, head, network


def vgg19(num_classes: int = 10) -> nn.Sequential:
    """VGG-19 with BatchNorm (Simonyan and Zisserman, arXiv 1409.1556), one linear layer at the end; 20,040,522 parameters."""
    inputs, stages = 3, {}
    for number, (channels, depth) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)), start=1):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(conv_norm(inputs, channels, 3, nn.ReLU, bias=True))
            inputs = channels
        stages[f"stage{number}"] = nn.Sequential(*layers, nn.MaxPool2d(2))
    return network(**stages, head=head(inputs, num_classes))


INCEPTIONS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)  # fmt: skip
"""Per stage and block: channels of the 1x1 branch, before and in the 3x3 branch, before and in the 5x5 branch, of the pooled branch."""


def googlenet(num_classes: int = 10) -> nn.Sequential:
    """GoogLeNet (Szegedy et al., arXiv 1409.4842), the 5x5 convolutions as two 3x3 ones, no auxiliary scores; 6,166,250 parameters."""
    inputs, stages = 192, {}
    for number, blocks in enumerate(INCEPTIONS, start=1):
        layers: list[nn.Module] = [nn.MaxPool2d(3, stride=2, padding=1)] if number > 1 else []
        for widths in blocks:
            layers.append(_inception(inputs, *widths))
            inputs = widths[0] + widths[2] + widths[4] + widths[5]
        stages[f"stage{number}"] = nn.Sequential(*layers)
    return network(stem=conv_norm(3, 192, 3, nn.ReLU, bias=True), **stages, head=head(inputs, num_classes))


def _inception(
    inputs: int, one: int, before_three: int, three: int, before_five: int, five: int, pooled: int
) -> nn.Module:
    def layer(fan_in: int, fan_out: int, kernel: int) -> nn.Module:
        return conv_norm(fan_in, fan_out, kernel, nn.ReLU, bias=True)

    return Branches(
        layer(inputs, one, 1),
        nn.Sequential(layer(inputs, before_three, 1), layer(before_three, three, 3)),
        nn.Sequential(layer(inputs, before_five, 1), layer(before_five, five, 3), layer(five, five, 3)),
        nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), layer(inputs, pooled, 1)),
    )


def densenet121(num_classes: int = 10) -> nn.Sequential:
    """DenseNet-121 (Huang et al., arXiv 1608.06993) of growth 32, channels halved between its stages; 6,956,298 parameters."""
    growth, channels, stages = 32, 64, {}
    for number, depth in enumerate((6, 12, 24, 16), start=1):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(Branches(_dense(channels, growth), nn.Identity()))
            channels += growth
        if number < 4:
            halved = channels // 2
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), convolution(channels, halved, kernel=1), nn.AvgPool2d(2)]
            channels = halved
        stages[f"stage{number}"] = nn.Sequential(*layers)
    last = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    return network(stem=convolution(3, 64), **stages, last=last, head=head(channels, num_classes))


def _dense(inputs: int, growth: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(inputs), nn.ReLU(), convolution(inputs, 4 * growth, kernel=1),
        nn.BatchNorm2d(4 * growth), nn.ReLU(), convolution(4 * growth, growth),
    )  # fmt: skip
