"""What is measured on learners that were read must be what is measured on the same weights in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import landscape as ls


def flat(module: nn.Module) -> torch.Tensor:
    """Weights (d,) of a module in named_parameters order."""
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def numbers(learners: ls.Learners, objective: ls.Objective) -> dict[str, float]:
    """alpha_e/alpha and its error from a few draws, and lambda_max at w_a."""
    noise = ls.measure_noise(objective, learners, learning_rate=0.1, local_batch_size=4, num_draws=4)
    top = ls.top_eigenpairs(ls.hessian(objective, learners.mean), k=1, tol=1e-4)
    return {
        "alpha_e": float(noise["alpha_e_ratio_mean"]),
        "alpha_e_stderr": float(noise["alpha_e_ratio_stderr"]),
        "lambda_max": float(top.values[0]),
    }


def assert_measured_alike(
    learners: ls.Learners, modules: Sequence[nn.Module], examples: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Weights and buffers equal to the bit, and so alpha_e and lambda_max.

    Args:
        learners: as they were read.
        modules: the networks that were saved, one a learner.
        examples: inputs and class labels.
    """
    expected = torch.stack([flat(m) for m in modules])
    assert learners.weights.dtype == expected.dtype
    assert torch.equal(learners.weights, expected)
    for name, buffer in learners.buffers.items():
        assert torch.equal(buffer, torch.stack([dict(m.named_buffers())[name] for m in modules]))
    objective = ls.Objective(modules[0].eval(), nn.CrossEntropyLoss(), examples)
    layout = objective.model.layout
    assert learners.layout == layout
    in_memory = ls.Learners(
        learners.step,
        expected,
        layout,
        {n: torch.stack([dict(m.named_buffers())[n] for m in modules]) for n in learners.buffers},
    )
    found = numbers(learners, objective)
    assert found == numbers(in_memory, objective)
    assert found["lambda_max"] != 0
