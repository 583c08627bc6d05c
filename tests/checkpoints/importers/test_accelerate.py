from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from landscape.checkpoints.find import find_one
from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.accelerate import find
from landscape.checkpoints.importers.found import Found
from tests.checkpoints.importers.fixtures_c import Hostile, assert_same, expected, network, written


def found_in(path: Path) -> Found:
    found = find(path)
    assert found is not None
    return found


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Of one process, which leaves no trace in this one."""
    environment = dict(os.environ)
    yield Accelerator(cpu=True)
    os.environ.clear()
    os.environ.update(environment)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def save(folder: Path) -> Path:
    """What matters of a folder of save_state."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(network().state_dict(), folder / "model.safetensors", {"format": "pt"})
    torch.save({"step": 1}, folder / "random_states_0.pkl")
    return folder


@pytest.mark.parametrize("name", ["accelerate", "accelerate-bin"])
def test_what_two_processes_saved(name: str) -> None:
    saved, found = expected(name), found_in(written() / name)
    (model,) = found.models
    assert_same(model.tensors, saved["weights"])
    assert (found.format, found.kind) == ("Accelerate's save_state", "one model")
    assert found.facts["num_learners"] == 2
    told = find_one([written() / name])
    assert told.step == 3  # as Adam counted; the scheduler, which takes a step a process, counts 6
    assert any("the optimizer's count of its own" in note for note in told.notes)
    assert any("if they had come apart (as under LocalSGD)" in reason for reason in found.reasons)
    assert any(
        "custom_checkpoint_0.pkl, random_states_0.pkl, random_states_1.pkl: pickles" in note for note in found.notes
    )
    assert model.ordered == (name == "accelerate-bin")
    assert model.optimizer is not None
    assert model.optimizer.facts["learning_rate"] == saved["lr"]
    for slot in ("exp_avg", "exp_avg_sq"):
        assert_same(
            {str(i): t for i, t in model.optimizer.slots[slot].items()}, {str(i): t for i, t in enumerate(saved[slot])}
        )


@pytest.mark.parametrize("safe", [True, False])
def test_what_one_process_saved(tmp_path: Path, accelerator: Accelerator, safe: bool) -> None:
    module = network(3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    model, prepared = accelerator.prepare(module, optimizer)
    accelerator.backward(model(torch.ones(4, 3)).square().mean())
    prepared.step()
    accelerator.save_state(str(tmp_path / "checkpoint_7"), safe_serialization=safe)
    found = found_in(tmp_path / "checkpoint_7")
    assert_same(found.models[0].tensors, module.state_dict())
    assert found.facts == {"num_learners": 1, "save_number": 7}
    assert found.step is None  # SGD does not count
    assert any("there was only one" in reason for reason in found.reasons)
    state = found.models[0].optimizer
    assert state is not None
    assert (state.facts["learning_rate"], state.facts["momentum"]) == (0.5, 0.9)
    parameters = list(module.parameters())
    for index, stored in state.slots["momentum_buffer"].items():
        assert torch.equal(stored.read(), optimizer.state[parameters[int(index)]]["momentum_buffer"])


@pytest.mark.parametrize("safe", [True, False])
def test_the_first_of_several_models_is_read(tmp_path: Path, accelerator: Accelerator, safe: bool) -> None:
    accelerator.prepare(network(0), network(1))
    accelerator.save_state(str(tmp_path / "saved"), safe_serialization=safe)
    found = found_in(tmp_path / "saved")
    assert_same(found.models[0].tensors, network(0).state_dict())
    second = "model_1.safetensors" if safe else "pytorch_model_1.bin"
    assert any("2 models were saved" in note and second in note for note in found.notes)


def test_sharded_weights_of_save_model(tmp_path: Path, accelerator: Accelerator) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    accelerator.save_model(module, str(tmp_path), max_shard_size="1KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert find(tmp_path) is None  # nothing but weights: any library's
    torch.save({"step": 1}, tmp_path / "random_states_0.pkl")
    assert_same(found_in(tmp_path).models[0].tensors, module.state_dict())


def test_a_model_that_fsdp_gathered(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "pytorch_model_fsdp.bin")
    torch.save({"step": 1}, tmp_path / "random_states_0.pkl")
    found = found_in(tmp_path)
    assert_same(found.models[0].tensors, network().state_dict())
    assert "gathered from FSDP's processes" in found.reasons[0]


def test_folders_of_other_importers_are_left_to_them(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    assert find(tmp_path / "nothing") is None
    safetensors.torch.save_file(network().state_dict(), tmp_path / "model.safetensors")
    assert find(tmp_path) is None
    (save(tmp_path / "fsdp") / "pytorch_model_fsdp_0").mkdir()
    assert find(tmp_path / "fsdp") is None
    torch.save({}, tmp_path / "random_states_0.pkl")
    (tmp_path / "model.safetensors").unlink()
    assert find(tmp_path) is None


def test_processes_are_counted_only_where_all_left_their_mark(tmp_path: Path) -> None:
    save(tmp_path)
    shutil.copy(tmp_path / "random_states_0.pkl", tmp_path / "random_states_5.pkl")
    found = found_in(tmp_path)
    assert "num_learners" not in found.facts
    assert any("how many processes there were is not recorded" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    "name",
    [
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "scheduler.bin",
        "sampler.bin",
        "dl_state_dict.bin",
        "scaler.pt",
    ],
)
def test_what_is_not_read_cannot_do_anything(tmp_path: Path, name: str) -> None:
    torch.save({"x": Hostile(tmp_path / "marker")}, save(tmp_path / "saved") / name)
    assert_same(found_in(tmp_path / "saved").models[0].tensors, network().state_dict())
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_optimizers_are_named_and_hostile_weights_refused(tmp_path: Path, legacy: bool) -> None:
    folder, hostile = save(tmp_path / "saved"), {"x": Hostile(tmp_path / "marker")}
    torch.save(hostile, folder / "optimizer.bin", _use_new_zipfile_serialization=not legacy)
    found = found_in(folder)
    assert found.models[0].optimizer is None
    assert any(
        "optimizer.bin holds more than tensors and settings" in note and "system" in note for note in found.notes
    )
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "pytorch_model_fsdp.bin"):
        torch.save(hostile, folder / name, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=f"{name} holds more than .*system"):
            find(folder)
    assert not (tmp_path / "marker").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved")
    torch.save({"state": {}, "param_groups": [{"lr": 0.1, "params": []}]}, folder / "optimizer.bin")
    os.truncate(folder / "optimizer.bin", 100)
    assert any("optimizer.bin" in note for note in found_in(folder).notes)
    (folder / "optimizer.bin").unlink()
    os.mkfifo(folder / "optimizer.bin")
    assert any("optimizer.bin is not a regular file" in note for note in found_in(folder).notes)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        find(folder)
    torch.save([1], folder / "pytorch_model_fsdp.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model_fsdp\.bin"):
        find(folder)
    torch.save({"x": 1}, folder / "pytorch_model_fsdp.bin")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        find(folder)
