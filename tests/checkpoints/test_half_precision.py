"""Averages of learners that are stored in half precision are not rounded to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import landscape as ls
from landscape.experiments.import_run import import_run
from landscape.functional import ParameterLayout


def learners(dtype: torch.dtype, *, equal: bool = False) -> ls.Learners:
    """Six learners around 1, half a step of bfloat16 apart."""
    offsets = torch.zeros(6) if equal else torch.arange(6) % 2 * 2.0**-7
    weights = (1 + offsets[:, None]).expand(6, 4).to(dtype)
    return ls.Learners(0, weights, ParameterLayout(("w",), (torch.Size([4]),)), {"running_mean": weights})


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_w_a_and_the_deviations_are_exact(stored: torch.dtype, kept: torch.dtype) -> None:
    for equal in (False, True):
        half = learners(stored, equal=equal)
        offset = 0.0 if equal else 2.0**-8
        assert half.mean.dtype == half.deviations.dtype == half.mean_buffers["running_mean"].dtype == kept
        assert half.mean.tolist() == half.mean_buffers["running_mean"].tolist() == [1 + offset] * 4
        assert half.deviations.abs().unique().tolist() == [offset]
        assert half.consensus_distance == 2 * offset


def test_an_average_is_imported_as_it_is(tmp_path: Path) -> None:
    for rank, row in enumerate(learners(torch.bfloat16).weights):
        torch.save({"w": row.clone()}, tmp_path / f"step_5_rank{rank}.pt")
    run = import_run(tmp_path / "*.pt", tmp_path / "run", average=True, quiet=True)
    assert run.learners(5).weights.tolist() == [[1 + 2.0**-8] * 4]


def test_the_disagreement_of_learners_in_half_precision_has_a_plane() -> None:
    weights = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    objective = ls.Objective(
        torch.nn.Linear(3, 3), torch.nn.CrossEntropyLoss(), (torch.ones(4, 3), torch.arange(4) % 3)
    )
    half = ls.Learners(0, weights, objective.model.layout)
    assert torch.isfinite(ls.disagreement_plane(half).origin).all()
