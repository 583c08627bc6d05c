"""torchvision's networks for ImageNet, made ready to be differentiated twice."""

from __future__ import annotations

from torch import nn

from landscape.optional import import_torchvision

IMAGENET: dict[str, str] = {
    "alexnet": "alexnet",
    "vgg11": "vgg11",
    "vgg11-bn": "vgg11_bn",
    "resnet50": "resnet50",
    "resnext50": "resnext50_32x4d",
    "densenet161": "densenet161",
}
"""torchvision's name of each network."""


def imagenet(name: str, num_classes: int = 1000) -> nn.Module:
    """One of torchvision's networks with its own initialisation, no weights downloaded; activations are out of place.

    Args:
        name: one of `IMAGENET`.
        num_classes: scores that come out.
    """
    if name not in IMAGENET:
        raise ValueError(f"no such network for ImageNet: {name}; there are {', '.join(IMAGENET)}")
    models = import_torchvision("torchvision.models")
    module: nn.Module = getattr(models, IMAGENET[name])(weights=None, num_classes=num_classes)
    for layer in module.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return module


def initialise(module: nn.Module) -> None:
    """Draw the weights of a torchvision network again as its constructor does; others are left as they are.

    ResNet and ResNeXt: convolutions normal of variance 2 / fan out. VGG: the same, linear layers normal of variance 1e-4.
    DenseNet: convolutions normal of variance 2 / fan in. All biases of these zero, but for ResNet's last. AlexNet: torch's defaults.
    """
    family = type(module).__name__ if type(module).__module__.startswith("torchvision.") else ""
    if family not in ("ResNet", "VGG", "DenseNet"):
        return
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(
                layer.weight, mode="fan_in" if family == "DenseNet" else "fan_out", nonlinearity="relu"
            )
        elif isinstance(layer, nn.Linear) and family == "VGG":
            nn.init.normal_(layer.weight, 0.0, 0.01)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None and family != "ResNet":
            nn.init.zeros_(layer.bias)
