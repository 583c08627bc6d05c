"""decent-dp's checkpoints, as decent-dp's module gives them on two processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import plain, rank_files
from landscape.checkpoints.importers.found import Found
from tests.checkpoints.importers.fixtures_torch import Untied, assert_same, expected, said, spoilt, written


def find_file(path: Path) -> Found:
    found = plain.find(path)
    assert found is not None
    return found


def learners(paths: Sequence[Path]) -> Found:
    found = rank_files.find(paths, find_file)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["decent-sgd", "decent-adam"])
@pytest.mark.parametrize("file", ["ckpt", "weights"])
def test_each_process_s_file_is_one_learner(name: str, file: str) -> None:
    paths = [written() / name / f"{file}_rank{rank}.pt" for rank in range(2)]
    found = learners(paths)
    assert (found.kind, found.format) == ("learners", "one file a process: decent-dp")
    for rank, model in enumerate(found.models):
        assert_same(model.tensors, expected(name, rank), "_model.")
    assert not torch.equal(*(model.tensors["_model.0.weight"].read() for model in found.models))
    assert found.facts == {"algorithm": "dpsgd", "order": "awc", "num_learners": 2}
    assert found.step == (4 if file == "ckpt" else None)
    assert "which decent-dp puts there, whose files hold one learner each" in said(found)
    assert "whether it was saved after global_avg(), when all learners hold their average, is not recorded" in said(
        found
    )


def test_one_file_alone_is_one_model() -> None:
    found = find_file(written() / "decent-sgd" / "weights_rank1.pt")
    assert (found.kind, found.format) == ("one model", "decent-dp")
    assert_same(found.models[0].tensors, expected("decent-sgd", 1), "_model.")


def test_its_optimizers_number_parameters_in_another_order() -> None:
    found = find_file(written() / "decent-sgd" / "ckpt_rank0.pt")
    optimizer = found.models[0].optimizer
    assert optimizer is not None
    assert not optimizer.slots
    assert (optimizer.facts["learning_rate"], optimizer.facts["momentum"]) == (0.1, 0.9)
    assert "decent-dp numbers the parameters in the order of the backward pass" in said(found)
    raw = torch.load(written() / "decent-sgd" / "ckpt_rank0.pt", weights_only=True)["optimizer"][0]["state"]
    assert raw[0]["momentum_buffer"].shape == expected("decent-sgd")["3.bias"].shape  # the last parameter comes first


def test_names_must_all_be_wrapped(tmp_path: Path) -> None:
    state = {f"_model.{n}": t for n, t in Untied().state_dict().items()}
    torch.save({**state, "extra": torch.ones(2)}, tmp_path / "a.pt")
    assert find_file(tmp_path / "a.pt").format == "torch.save"


def test_a_hostile_file_is_named_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    state = {f"_model.{n}": t for n, t in Untied().state_dict().items()}
    torch.save(state, tmp_path / "w_rank0.pt")
    spoilt({"model": state, "optimizer": [{}]}, tmp_path / "w_rank1.pt", marker)
    with pytest.raises(CheckpointError, match=r"w_rank1\.pt holds more than tensors and settings: posix\.system"):
        learners([tmp_path / f"w_rank{rank}.pt" for rank in range(2)])
    assert not marker.exists()
