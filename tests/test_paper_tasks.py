"""Each of the paper's networks trains on real data under SSGD and DPSGD and can be measured, in a small form; two of them learn.

Fifty steps of each on both backends, and a step of the full forms, are in tests/benchmarks/bench_tasks.py, which takes an hour and three quarters on two cores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import landscape as ls
from landscape.data.selection import choose
from landscape.functional import measured_norms
from landscape.tasks import get_task

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* classes have no example"),
]

FORMS = (
    "cifar10-efficientnet-b0@width=1/8,examples=32",
    "cifar10-senet18@width=1/16,size=16,examples=32",
    "cifar10-vgg19@width=1/16,examples=32",
    "cifar10-resnet18@width=1/16,size=16,examples=32",
    "cifar10-densenet121@width=1/4,size=8,examples=32",
    "cifar10-mobilenet@width=1/8,size=16,examples=32",
    "cifar10-mobilenetv2@width=1/8,size=16,examples=32",
    "cifar10-shufflenetv2@width=1/2,size=16,examples=32",
    "cifar10-googlenet@width=1/8,size=8,examples=32",
    "cifar10-resnext29@width=1/16,size=8,examples=32",
    "imagenette-alexnet@width=1/16,size=64,examples=32",
    "imagenette-vgg11@width=1/16,size=32,examples=32",
    "imagenette-vgg11-bn@width=1/16,size=32,examples=32",
    "imagenette-resnet50@width=1/16,size=32,examples=32",
    "imagenette-resnext50@width=1/4,size=32,examples=32",
    "imagenette-densenet161@width=1/4,size=32,examples=32",
    "fsdd-blstm@width=1/32,examples=32",
)
CONFIG = {"num_learners": 4, "local_batch_size": 4, "num_steps": 2, "checkpoint_every": 0, "evaluation_examples": 16}
FEW = ls.MeasureConfig(num_draws=3, num_smoothing_samples=2, num_examples=8)


@pytest.mark.parametrize("form", FORMS)
def test_it_trains_and_can_be_measured(form: str, tmp_path: Path) -> None:
    task = get_task(form)
    ssgd = ls.train(task, ls.TrainConfig("ssgd", 0.01, **CONFIG), tmp_path / "ssgd", quiet=True)
    dpsgd = ls.train(task, ls.TrainConfig("dpsgd", 0.01, **CONFIG), tmp_path / "dpsgd", quiet=True)
    for run in (ssgd, dpsgd):
        assert run.status == "complete"
        assert np.isfinite(run.metrics["train_loss"]).all()
        assert run.record["evaluation_examples"] == 16
    last = dpsgd.learners(2)
    assert ssgd.learners(2).consensus_distance == 0
    assert last.consensus_distance > 0
    statistics = [b for name, b in last.buffers.items() if name.endswith("running_mean")]
    assert len(statistics) == len(measured_norms(task.build_model()))
    applied = [b for b in statistics if bool(b.any())]  # EfficientNet's first expansion is counted, and not applied
    assert len(applied) >= len(statistics) - 1
    assert all(bool((b[0] != b[1]).any()) for b in applied), "each learner has statistics of its own"

    found = ls.measure(dpsgd, ["effective-learning-rate"], [2], settings=FEW, task=task, quiet=True)["effective-learning-rate"]  # fmt: skip
    assert found.attrs["num_examples"] == 8
    assert np.isfinite(float(found["alpha_e_ratio_mean"][0]))
    assert float(found["alpha_e_ratio_stderr"][0]) > 0

    train = choose(task.load_data(None)[0], 4)
    objective = ls.Objective(task.initial_model(0), task.loss_fn, train).recalibrated(last.mean)
    operator = ls.hessian(objective, last.mean)
    u, v = torch.randn(2, objective.num_parameters, generator=torch.Generator().manual_seed(0))
    hu, hv = operator @ u, operator @ v
    scale = float(u.norm() * hv.norm() + v.norm() * hu.norm())
    assert abs(float(u @ hv - v @ hu)) < 1e-4 * scale
    top = ls.top_eigenpairs(operator, k=1, max_matvecs=8, tol=0.1)
    quotient = float(top.vectors[:, 0] @ (operator @ top.vectors[:, 0]))
    assert float(top.values[0]) == pytest.approx(quotient, rel=1e-3, abs=1e-5)
    density = ls.spectral_density(operator, num_probes=1, num_steps=6)
    assert float(np.trapezoid(density.density, density.grid)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("form", "rate", "batch", "least"), [
    ("cifar10-resnet18@width=1/16,size=16", 0.1, 32, 0.3),
    ("fsdd-blstm@width=1/8", 0.5, 8, 0.09),
])  # fmt: skip
def test_an_epoch_teaches(form: str, rate: float, batch: int, least: float, tmp_path: Path) -> None:
    """Held-out accuracy of w_a well above chance: a tenth for the images, a thirtieth for the frames (0.04 for the commonest state)."""
    task = get_task(form)
    steps = len(task.load_data(None)[0]) // (4 * batch)
    config = ls.TrainConfig("dpsgd", rate, num_learners=4, local_batch_size=batch, num_steps=steps, momentum=0.9, checkpoint_every=0,
                            log_every=100, evaluation_examples=512)  # fmt: skip
    run = ls.train(task, config, tmp_path / "run", quiet=True)
    assert float(run.metrics["test_accuracy"].iloc[-1]) > least
    assert float(run.metrics["train_loss"].iloc[-1]) < 0.9 * float(run.metrics["train_loss"].iloc[0])
    assert float(run.metrics["sigma_w"].iloc[-1]) > 0
