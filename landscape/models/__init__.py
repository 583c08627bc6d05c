"""Networks, plain torch modules that know nothing of what is done with them."""

from collections.abc import Callable

from torch import nn

from landscape.models.imagenet import IMAGENET as IMAGENET
from landscape.models.imagenet import imagenet as imagenet
from landscape.models.mlp import mlp as mlp
from landscape.models.mobile import efficientnet_b0, mobilenet, mobilenetv2, shufflenetv2
from landscape.models.narrow import narrow as narrow
from landscape.models.plain import densenet121, googlenet, vgg19
from landscape.models.recurrent import blstm as blstm
from landscape.models.residual import resnet18, resnext29, senet18

CIFAR10: dict[str, Callable[[], nn.Module]] = {
    "efficientnet-b0": efficientnet_b0,
    "senet18": senet18,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "densenet121": densenet121,
    "mobilenet": mobilenet,
    "mobilenetv2": mobilenetv2,
    "shufflenetv2": shufflenetv2,
    "googlenet": googlenet,
    "resnext29": resnext29,
}
"""The CIFAR-10 networks, with torch's default initialisation."""
