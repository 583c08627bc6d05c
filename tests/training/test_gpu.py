"""The stacked program on a CUDA device, against the same program on the CPU."""

import dataclasses

import pytest
import torch

from landscape.objective import Objective
from landscape.tasks import Task
from landscape.training.config import TrainConfig
from landscape.training.loop import Program
from landscape.training.topology import topology

CONFIG = TrainConfig("dpsgd", 0.3, num_learners=4, local_batch_size=8, num_steps=20, momentum=0.5, dtype="float64")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("algorithm", "order"), [("ssgd", "awc"), ("dpsgd", "awc"), ("dpsgd", "atc"), ("dpsgd", "cta")]
)
def test_cuda_equals_cpu(tiny_task: Task, algorithm: str, order: str) -> None:
    train, _ = tiny_task.load_data(None)
    finals = []
    for device in ("cpu", "cuda"):
        config = dataclasses.replace(CONFIG, algorithm=algorithm, order=order, device=device)  # type: ignore[arg-type]
        program = Program(tiny_task, config, topology("ring", 4), train)
        state, alive = program.initial_state(), torch.ones(1, dtype=torch.bool, device=program.device)
        for _ in range(20):
            state, record = program.step(state, alive)
            alive = record.alive
        finals.append(state.params.cpu())
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=1e-10)


@pytest.mark.gpu
def test_the_objective_on_cuda_equals_the_cpu(tiny_task: Task) -> None:
    train, _ = tiny_task.load_data(None)
    model = tiny_task.build_model().double()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    gradients = [Objective(model, tiny_task.loss_fn, train, device=d).gradient(weights).cpu() for d in ("cpu", "cuda")]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
