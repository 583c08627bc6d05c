"""The stacked program on a CUDA device, against the same program on the CPU."""

import dataclasses

import pytest
import torch

from landscape.objective import Objective
from landscape.tasks import Task
from landscape.training.config import TrainConfig
from landscape.training.loop import Program
from landscape.training.noise import NoiseProfile, noise_factors
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


@pytest.mark.gpu
def test_matched_noise_on_cuda(tiny_task: Task) -> None:
    """The drift alone is the CPU's; what is drawn is drawn on the device, alike from call to call."""
    train, _ = tiny_task.load_data(None)
    rows = torch.randn(3, 53, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = dataclasses.replace(
        CONFIG, algorithm="ssgd-star", sigma0="a run", noise_place="gradient", noise_shape="layer"
    )
    for shape in ("layer", "low-rank"):
        factors = noise_factors(rows, shape, (35, 18))[None]  # type: ignore[arg-type]
        alone = NoiseProfile((0,), "gradient", shape, 0 * factors, (35, 18), drift=rows[:1])  # type: ignore[arg-type]
        noisy = dataclasses.replace(alone, factors=factors)
        programs = [Program(tiny_task, dataclasses.replace(config, device=d), topology("ring", 4), train, profiles=[p])
                    for d, p in (("cpu", alone), ("cuda", alone), ("cuda", noisy), ("cuda", noisy))]  # fmt: skip
        drawn = [p.gradient_noise(5) for p in programs]
        assert all(d is not None for d in drawn)
        torch.testing.assert_close(drawn[0], drawn[1].cpu())  # type: ignore[union-attr]
        assert drawn[2].device.type == "cuda"  # type: ignore[union-attr]
        assert torch.equal(drawn[2], drawn[3])  # type: ignore[arg-type]
        assert not torch.equal(drawn[1], drawn[2])  # type: ignore[arg-type]
