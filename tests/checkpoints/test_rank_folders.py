"""Folders, one a rank, each of which is a checkpoint of its own: Hugging Face's, Accelerate's, torch.distributed.checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from landscape.checkpoints.find import entries, find, find_one
from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.inspect import describe
from landscape.experiments.import_run import import_run
from tests.checkpoints.corpus import _save_dcp, network


def hugging_face(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(network(seed).state_dict(), folder / "model.safetensors", {"format": "pt"})


def accelerate(folder: Path, seed: int) -> None:
    hugging_face(folder, seed)
    torch.save({"step": 1}, folder / "random_states_0.pkl")


def dcp(folder: Path, seed: int) -> None:
    _save_dcp({"model": network(seed).state_dict()}, folder)


FORMATS = [hugging_face, accelerate, dcp]


@pytest.mark.parametrize("save", FORMATS)
@pytest.mark.parametrize("name", ["{}", "rank_{}", "step_7/rank{}", "rank{}/step_7"])
def test_folders_of_ranks_are_learners(tmp_path: Path, save: Callable[[Path, int], None], name: str) -> None:
    for rank in range(3):
        save(tmp_path / name.format(rank), rank)
    found = find_one([tmp_path])
    assert (found.kind, found.step, len(found.models)) == ("learners", 7 if "7" in name else None, 3)
    for rank, model in enumerate(found.models):
        expected = network(rank).state_dict()
        assert all(
            torch.equal(stored.read(), expected[key.removeprefix("model.")]) for key, stored in model.tensors.items()
        )
    assert ("call them step_0" in describe(tmp_path)) == (name == "{}")
    run = import_run(tmp_path, tmp_path / "out" / "run", quiet=True)
    assert (run.config.num_learners, run.steps) == (3, [7 if "7" in name else 0])


@pytest.mark.parametrize("save", FORMATS)
def test_a_pattern_or_a_list_of_folders_of_ranks_is_the_same(tmp_path: Path, save: Callable[[Path, int], None]) -> None:
    for rank in range(2):
        for step in (5, 7):
            save(tmp_path / "whole" / f"step_{step}" / f"rank_{rank}", 10 * step + rank)
            save(tmp_path / "series" / f"rank_{rank}" / f"step_{step}", 10 * step + rank)
    whole = tmp_path / "whole" / "step_5"
    for paths in ([whole], [whole / "rank_*"], [whole / "rank_0", whole / "rank_1"]):
        assert [len(find(entry).models) for entry in entries(paths)] == [2]
    ranks = tmp_path / "series"
    for paths in ([ranks], [ranks / "rank_*"], [ranks / "rank_0", ranks / "rank_1"], [ranks / "rank_*" / "step_*"]):
        found = entries(paths)
        assert [entry.step for entry in found] == [5, 7]
        for entry in found:
            for rank, model in enumerate(find(entry).models):
                name = next(iter(model.tensors))
                expected = network(10 * (entry.step or 0) + rank).state_dict()[name.removeprefix("model.")]
                assert torch.equal(model.tensors[name].read(), expected)


def test_numbers_that_do_not_begin_at_0_are_steps(tmp_path: Path) -> None:
    for step in (100, 200):
        hugging_face(tmp_path / str(step), step)
    assert [entry.step for entry in entries([tmp_path])] == [100, 200]


def test_folders_of_different_steps_are_told_how_to_be_named(tmp_path: Path) -> None:
    for rank in range(2):
        hugging_face(tmp_path / str(rank), rank)
        (tmp_path / str(rank) / "trainer_state.json").write_text(f'{{"global_step": {rank}}}')
    with pytest.raises(
        CheckpointError, match=r"different steps:\n  rank 0  step 0.*\n.*\n  if the folders are .*step_0"
    ):
        find_one([tmp_path])


def test_a_pattern_that_fits_nothing_known_names_what_it_fits(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank_{rank}").mkdir()
    with pytest.raises(CheckpointError, match=r"rank_\* fits no file or folder that is known .*: rank_0, rank_1; give"):
        entries([tmp_path / "rank_*"])


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a_step5", "b_step5"):
        (tmp_path / folder).mkdir()
        torch.save(network().state_dict(), tmp_path / folder / "m.pt")
    with pytest.raises(CheckpointError, match=r"a_step5/m\.pt, b_step5/m\.pt"):
        entries([tmp_path / "*" / "m.pt"])
