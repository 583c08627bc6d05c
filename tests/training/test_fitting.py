"""Data that do not fit a network or its loss are refused by name, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape.data import TensorData
from landscape.experiments.train import train
from landscape.functional import FunctionalModel
from landscape.losses import LossFunction
from landscape.tasks import Task
from landscape.training import TrainConfig
from landscape.training.fitting import check_fits

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(12) % 3


def check(targets: Tensor, inputs: Tensor = INPUTS, loss: LossFunction = F.cross_entropy, outputs: int = 3) -> None:
    model = FunctionalModel(nn.Linear(4, outputs), loss).evaluation()
    check_fits("mine", model, TensorData(inputs, targets, "my data"))


def test_what_fits_passes() -> None:
    check(CLASSES)
    check(torch.where(CLASSES == 0, -100, CLASSES))
    check(torch.full((12,), -100))
    check(torch.randn(12, 2), loss=F.mse_loss, outputs=2)
    check(CLASSES[:, None], loss=lambda output, target: (output - target).square().mean(1), outputs=1)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_class_that_the_network_does_not_have(wrong: int) -> None:
    """Wherever it lies, beside ignored targets."""
    targets = CLASSES.clone()
    targets[2], targets[7] = -100, wrong
    with pytest.raises(ValueError, match=r"the loss of task mine cannot take the targets of my data, .*out of bounds"):
        check(targets)


def test_inputs_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"the network of task mine cannot take the examples of my data, of shape \[5\]"):  # fmt: skip
        check(CLASSES, torch.randn(12, 5))


def test_targets_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"cannot take the targets of my data, .* of shape \[2\], with outputs of shape \[3\]"):  # fmt: skip
        check(torch.zeros(12, 2, dtype=torch.long))


def test_a_run_is_not_begun(tmp_path: Path) -> None:
    data = TensorData(INPUTS, CLASSES + 1, "shifted labels")
    task = Task(
        name="own", description="", build_model=lambda: nn.Linear(4, 3), loss_fn=F.cross_entropy, load_data=lambda root: (data, data),
        threshold=0.5, constant_loss=1.1,
    )  # fmt: skip
    config = TrainConfig("dpsgd", 0.1, num_learners=3, local_batch_size=2, num_steps=2)
    with pytest.raises(ValueError, match=r"shifted labels, 1 to 3"):
        train(task, config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
