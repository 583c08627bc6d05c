"""Which step a checkpoint is of: what it records, else a step in its name, else what its optimizer counted, else another number in its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import landscape as ls
from landscape.checkpoints.find import entries, find, find_one
from landscape.experiments.import_run import import_run


def state(count: int, **more: Any) -> dict[str, Any]:
    """A training state whose Adam has taken so many steps."""
    network = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    for _ in range(count):
        network(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict(), **more}


@pytest.mark.parametrize(
    ("name", "recorded", "step", "note"),
    [
        ("step_100.pt", {}, 100, "the number in its name; its optimizer counted 3"),
        ("step_100.pt", {"step": 7}, 7, "its name says step 100, it records 7"),
        ("step_3.pt", {}, 3, "the number in its name"),
        ("model_100.pt", {}, 3, "the optimizer's count"),
        ("epoch_100.pt", {}, 3, "the optimizer's count"),
        ("model.pt", {}, 3, "the optimizer's count"),
    ],
)
def test_a_step_in_a_name_wins_over_what_the_optimizer_counted(
    tmp_path: Path, name: str, recorded: dict[str, Any], step: int, note: str
) -> None:
    torch.save(state(3, **recorded), tmp_path / name)
    found = find_one([tmp_path / name])
    assert found.step == step
    assert any(note in told for told in found.notes)


def test_a_series_whose_optimizer_was_made_anew_is_one_of_the_steps_in_the_names(tmp_path: Path) -> None:
    for step in (100, 200):
        torch.save(state(3), tmp_path / f"step_{step}.pt")
    run = import_run(tmp_path / "step_*.pt", tmp_path / "run", quiet=True)
    assert run.steps == [100, 200]


@pytest.mark.parametrize("name", ["step_100_rank{}.pt", "step_100/rank{}.pt"])
def test_learners_of_one_named_step_may_have_counted_otherwise(tmp_path: Path, name: str) -> None:
    for rank in range(2):
        (tmp_path / name.format(rank)).parent.mkdir(exist_ok=True)
        torch.save(state(3 + rank), tmp_path / name.format(rank))
    found = find_one([tmp_path])
    assert (found.step, found.kind) == (100, "learners")
    assert any("its optimizer counted 3, 4" in note for note in found.notes)


def test_learners_that_only_counted_otherwise_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(state(3 + rank), tmp_path / f"rank{rank}.pt")
    with pytest.raises(
        ls.CheckpointError, match=r"different steps, .*\n  learner 0  3\n  learner 1  4\n.*step_100_rank0"
    ):
        find_one([tmp_path])


def test_a_step_in_a_folder_s_name_wins_over_accelerate_s_optimizer(tmp_path: Path) -> None:
    for name in ("step_100", "step_200", "checkpoint_0"):
        (tmp_path / name).mkdir()
        content = state(3)
        safetensors.torch.save_file(content["model"], tmp_path / name / "model.safetensors", {"format": "pt"})
        torch.save(content["optimizer"], tmp_path / name / "optimizer.bin")
        torch.save({"step": 1}, tmp_path / name / "random_states_0.pkl")
    assert [find(entry).step for entry in entries([tmp_path / "step_*"])] == [100, 200]
    assert find_one([tmp_path / "checkpoint_0"]).step == 3


def test_what_a_file_of_learners_records_wins_over_their_optimizers(tmp_path: Path) -> None:
    torch.save({"learners": [state(3), state(4)], "step": 50}, tmp_path / "learners.pt")
    assert find_one([tmp_path / "learners.pt"]).step == 50
