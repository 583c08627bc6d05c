"""ResNet, ResNeXt and SENet for 32x32 images."""

from __future__ import annotations

from torch import nn

from landscape.models.blocks import (
    Images,
    Maps,
    Residual,
    SqueezeExcitation,
    conv_norm,
    convolution,
    head,
    network,
    projection,
)

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels and stride of each of the four stages of two blocks."""


def resnet18(num_classes: int = 10) -> nn.Sequential:
    """ResNet-18 (He et al., arXiv 1512.03385): a 3x3 stem without pooling, four stages of two blocks; 11,173,962 parameters."""
    inputs, stages = 64, {}
    for number, (channels, stride) in enumerate(STAGES, start=1):
        stages[f"stage{number}"] = nn.Sequential(_basic(inputs, channels, stride), _basic(channels, channels, 1))
        inputs = channels
    return network(stem=conv_norm(3, 64, 3, nn.ReLU), **stages, head=head(inputs, num_classes))


def _basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    body = nn.Sequential(conv_norm(inputs, outputs, 3, nn.ReLU, stride=stride), conv_norm(outputs, outputs))
    return Residual(body, projection(inputs, outputs, stride), nn.ReLU())


def resnext29(num_classes: int = 10) -> nn.Sequential:
    """ResNeXt-29 (2x64d; Xie et al., arXiv 1611.05431): a 1x1 stem, three stages of three blocks, two groups; 9,128,778 parameters."""
    inputs, stages = 64, {}
    for number, (channels, stride) in enumerate(((128, 1), (256, 2), (512, 2)), start=1):
        blocks = []
        for step in (stride, 1, 1):
            blocks.append(_grouped(inputs, channels, step))
            inputs = 2 * channels
        stages[f"stage{number}"] = nn.Sequential(*blocks)
    return network(stem=conv_norm(3, 64, 1, nn.ReLU), **stages, head=head(inputs, num_classes))


def _grouped(inputs: int, channels: int, stride: int) -> nn.Module:
    body = nn.Sequential(
        conv_norm(inputs, channels, 1, nn.ReLU),
        conv_norm(channels, channels, 3, nn.ReLU, stride=stride, groups=2),
        conv_norm(channels, 2 * channels, 1),
    )
    return Residual(body, projection(inputs, 2 * channels, stride), nn.ReLU())


class PreActivation(nn.Module):
    """body(a) + shortcut(a or x), a = relu(norm(x)) (He et al., arXiv 1603.05027); the shortcut projects a, or is x itself."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(inputs), nn.ReLU()
        self.body = nn.Sequential(
            conv_norm(inputs, outputs, 3, nn.ReLU, stride=stride),
            convolution(outputs, outputs),
            SqueezeExcitation(outputs, outputs // 16, nn.ReLU),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else convolution(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Images) -> Maps:
        """See the class."""
        activated = self.activation(self.norm(x))
        return self.body(activated) + (x if self.shortcut is None else self.shortcut(activated))


def senet18(num_classes: int = 10) -> nn.Sequential:
    """SENet-18 (Hu et al., arXiv 1709.01507): ResNet-18 of pre-activation blocks, squeezed sixteenfold; 11,260,354 parameters."""
    inputs, stages = 64, {}
    for number, (channels, stride) in enumerate(STAGES, start=1):
        blocks = PreActivation(inputs, channels, stride), PreActivation(channels, channels, 1)
        stages[f"stage{number}"] = nn.Sequential(*blocks)
        inputs = channels
    return network(stem=conv_norm(3, 64, 3, nn.ReLU), **stages, head=head(inputs, num_classes))
