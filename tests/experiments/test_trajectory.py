import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from landscape.experiments.train import train
from landscape.experiments.trajectory import run_flatness
from landscape.tasks import Task
from landscape.theory.flatness import variance_flatness
from landscape.training.config import TrainConfig

BASE = TrainConfig("dpsgd", 0.3, num_learners=4, local_batch_size=8, num_steps=30, checkpoint_every=1, dtype="float64")


def test_a_run_gives_the_law_of_its_averaged_weights(tiny_task: Task, tmp_path: Path) -> None:
    from landscape.objective import Objective

    run = train(tiny_task, BASE, tmp_path / "run", quiet=True)
    found = run_flatness(run, range(5, 31), task=tiny_task, num_directions=4)
    data, _ = tiny_task.load_data(None)
    objective = Objective(tiny_task.build_model().double(), tiny_task.loss_fn, data)
    points = torch.stack([run.learners(step).mean for step in range(5, 31)])
    plain = variance_flatness(objective, points, num_directions=4)
    np.testing.assert_allclose(found.variance, plain.variance, rtol=1e-10)
    np.testing.assert_allclose(found.flatness, plain.flatness, rtol=1e-6)
    one = run_flatness(run, range(5, 31), task=tiny_task, num_directions=4, learner=2)
    assert not np.allclose(one.variance, found.variance)


def test_too_few_checkpoints(tiny_task: Task, tmp_path: Path) -> None:
    run = train(tiny_task, dataclasses.replace(BASE, num_steps=5), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="at least 20 checkpoints with finite weights, not 6"):
        run_flatness(run, task=tiny_task)
