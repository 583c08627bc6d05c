"""torchvision's networks as the package hands them out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from landscape.models import IMAGENET, imagenet
from landscape.optional import import_torchvision
from tests.models.networks import full, needs_torchvision


@needs_torchvision
@pytest.mark.parametrize("name", IMAGENET)
def test_scores_of_a_thousand_classes_or_as_many_as_asked_for(name: str) -> None:
    with torch.device("meta"):
        assert list(imagenet(name).parameters())[-1].shape == (1000,)
        assert imagenet(name, num_classes=10)(torch.zeros(2, 3, 224, 224)).shape == (2, 10)


@needs_torchvision
def test_names_and_weights_are_those_of_torchvision() -> None:
    models = import_torchvision("torchvision.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = models.resnet50(weights=None, num_classes=3)
        torch.manual_seed(0)
        ours = imagenet("resnet50", num_classes=3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@needs_torchvision
def test_densenet_does_not_recompute_its_activations() -> None:
    assert not any(getattr(layer, "memory_efficient", False) for layer in full("densenet161").modules())


def test_an_unknown_name_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no such network for ImageNet: resnet5; there are alexnet, vgg11"):
        imagenet("resnet5")


def test_importing_the_models_imports_no_torchvision() -> None:
    code = "import sys, landscape.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
