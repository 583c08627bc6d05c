from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.deepspeed import find
from landscape.checkpoints.importers.found import Found
from tests.checkpoints.importers.fixtures_c import Hostile, assert_same, expected, network, written

FILE, PART = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"


def found_in(path: Path) -> Found:
    found = find(path)
    assert found is not None
    return found


def save(folder: Path, tag: str = "global_step7", **state: Any) -> Path:
    """What matters of a folder of save_checkpoint."""
    (folder / tag).mkdir(parents=True)
    (folder / "latest").write_text(tag)
    torch.save({"module": network().state_dict(), "global_steps": 7, "dp_world_size": 2, **state}, folder / tag / FILE)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_two_processes_saved(stage: int) -> None:
    folder = written() / f"deepspeed-{stage}"
    for path in (folder, folder / "global_step3"):
        found = found_in(path)
        assert_same(found.models[0].tensors, expected(f"deepspeed-{stage}")["weights"])
        assert (found.format, found.kind, found.step) == ("DeepSpeed", "one model", 3)
        assert found.facts["num_learners"] == 2
        assert found.facts["local_batch_size"] == 8  # two passes of 4
        assert (found.facts["zero_stage"], found.facts["epoch"]) == (stage, 4)
        assert found.facts["writer_version"] == "DeepSpeed 0.19.8"
        assert "2 processes averaged their gradients at every step" in found.reasons[0]
        optimizer, cut = found.models[0].optimizer, [note for note in found.notes if "optim_states.pt" in note]
        if stage == 0:  # beside the weights, and whole
            assert optimizer is not None
            assert optimizer.facts["learning_rate"] == 0.1
            assert len(optimizer.slots["exp_avg"]) == 7  # one of the 8 parameters is frozen
            assert not cut
        else:
            assert optimizer is None
            assert "cut over 2 processes" in cut[0]
        if stage == 2:
            assert (found.facts["learning_rate"], found.facts["betas"]) == (0.1, [0.8, 0.9])


def test_weights_of_16_bits_are_said_to_be_copies() -> None:
    found = found_in(written() / "deepspeed-1-bf16")
    assert_same(found.models[0].tensors, expected("deepspeed-1-bf16")["weights"])
    assert {stored.dtype for stored in found.models[0].tensors.values()} == {torch.bfloat16}
    assert any("bfloat16: the copies that the network computes with; the float32 weights" in n for n in found.notes)


def test_stage_3_is_explained() -> None:
    folder = written() / "deepspeed-3"
    for path in (folder, folder / "global_step3"):
        with pytest.raises(CheckpointError) as raised:
            find(path)
        said = str(raised.value)
        assert "ZeRO stage 3: each of 2 processes" in said
        assert f"zero_to_fp32.py {folder} OUT" in said
        assert "only if you trust" in said
        assert "stage3_gather_16bit_weights_on_model_save" in said


def test_stage_3_with_weights_gathered_beside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(written() / "deepspeed-3", folder)
    safetensors.torch.save_file(network().state_dict(), folder / "model.safetensors")
    (folder / "trainer_state.json").write_text('{"global_step": 3, "epoch": 1}')
    found = found_in(folder)
    assert_same(found.models[0].tensors, network().state_dict())
    assert (found.step, found.facts["num_learners"], found.facts["zero_stage"]) == (3, 2, 3)
    assert any("that both are of one step is not recorded" in note for note in found.notes)
    torch.save(Hostile(tmp_path / "marker"), folder / "global_step3" / PART)
    assert any("DeepSpeed's own record was not read" in note and "system" in note for note in found_in(folder).notes)
    assert not (tmp_path / "marker").exists()


def test_folders_of_accelerate_and_lightning_with_tags_of_their_own(tmp_path: Path) -> None:
    for tag in ("pytorch_model", "checkpoint"):
        folder = save(tmp_path / tag, tag)
        torch.save({"step": 1}, folder / "random_states_0.pkl")
        assert_same(found_in(folder).models[0].tensors, network().state_dict())


def test_other_tags_beside_are_noted(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    (folder / "global_step9").mkdir()
    torch.save({}, folder / "pytorch_model.bin")
    (note,) = found_in(folder).notes
    assert note == "other checkpoints beside global_step7 were not read: global_step9, pytorch_model.bin"


def test_networks_that_are_cut_otherwise_are_explained(tmp_path: Path) -> None:
    tag = save(tmp_path / "tensors") / "global_step7"
    shutil.copy(tag / FILE, tag / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"tensor or pipeline parallelism \(2 mp_rank files\)"):
        find(tmp_path / "tensors")
    tag = save(tmp_path / "layers") / "global_step7"
    for name in ("layer_00-model_states.pt", "layer_01-model_00-model_states.pt"):
        shutil.copy(tag / FILE, tag / name)
    with pytest.raises(CheckpointError, match="pipeline parallelism"):
        find(tmp_path / "layers")
    tag = save(tmp_path / "experts") / "global_step7"
    shutil.copy(tag / FILE, tag / "layer_0_expert_1_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="mixture of experts"):
        find(tmp_path / "experts")
    save(tmp_path / "ranks", mp_world_size=2)
    with pytest.raises(CheckpointError, match="one of 2 parts"):
        find(tmp_path / "ranks")
    tag = save(tmp_path / "first") / "global_step7"
    (tag / FILE).rename(tag / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt is missing"):
        find(tmp_path / "first")


def test_folders_of_something_else_are_left_to_others(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    assert find(tmp_path / "nothing") is None
    for text in ("", "epoch-3", "..", "/etc", "x" * 5000, "a\0b", "\udcff"):
        (tmp_path / "latest").write_text(text, errors="surrogatepass")
        assert find(tmp_path) is None
    (tmp_path / "epoch-3").mkdir()
    (tmp_path / "latest").write_text("epoch-3")
    assert find(tmp_path) is None
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("epoch-3")
    assert find(tmp_path) is None


@pytest.mark.parametrize(
    "text", ["../other/global_step7", "/tmp/global_step7", "global_step8", "global_step7/..", "global_step7\0"]
)
def test_a_latest_that_leads_nowhere_or_out(tmp_path: Path, text: str) -> None:
    save(tmp_path / "other")
    folder = save(tmp_path / "run")
    (folder / "latest").write_text(text)
    with pytest.raises(CheckpointError, match="there is no such folder beside it"):
        find(folder)


def test_links_that_lead_out(tmp_path: Path) -> None:
    other, folder = save(tmp_path / "other"), save(tmp_path / "run")
    shutil.rmtree(folder / "global_step7")
    (folder / "global_step7").symlink_to(other / "global_step7")
    with pytest.raises(CheckpointError, match="a link out of the folder; nothing outside is read"):
        find(folder)
    (folder / "global_step7").unlink()
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / FILE).symlink_to(other / "global_step7" / FILE)
    with pytest.raises(CheckpointError, match="outside its folder"):
        find(folder)
    (folder / "global_step7" / FILE).unlink()
    (folder / "global_step7" / FILE).symlink_to(FILE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        find(folder)
    (folder / "global_step7" / FILE).unlink()
    os.mkfifo(folder / "global_step7" / FILE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        find(folder)
    (folder / "global_step7" / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"which is no folder with \*_model_states\.pt"):
        find(folder)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["module", "optimizer", "ds_config", "lr_scheduler", "args"])
def test_hostile_files_are_refused_by_name(tmp_path: Path, where: str, legacy: bool) -> None:
    folder = save(tmp_path / "run")
    state = {"module": network().state_dict()} | {where: {"x": Hostile(tmp_path / "marker")}}
    torch.save(state, folder / "global_step7" / FILE, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=f"{FILE} holds more than tensors and settings: .*system"):
        find(folder)
    assert not (tmp_path / "marker").exists()


def test_hostile_files_that_are_not_read_do_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        torch.save(Hostile(tmp_path / "marker"), folder / "global_step7" / name)
    (folder / "zero_to_fp32.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    found = found_in(folder)
    assert_same(found.models[0].tensors, network().state_dict())
    assert any("cut over 2 processes" in note for note in found.notes)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", [1, [], {}, {"module": None}, {"module": {}}, {"module": {"a": 1}}, {"module": {1: torch.ones(1)}}]
)
def test_files_without_weights(tmp_path: Path, content: Any) -> None:
    folder = save(tmp_path / "run")
    torch.save(content, folder / "global_step7" / FILE)
    with pytest.raises(CheckpointError, match=FILE):
        find(folder)
    os.truncate(folder / "global_step7" / FILE, 50)
    with pytest.raises(CheckpointError, match=FILE):
        find(folder)


CONFIGURED = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}}


def test_settings_of_the_configuration(tmp_path: Path) -> None:
    found = found_in(save(tmp_path / "plain", ds_config={**CONFIGURED, "train_batch_size": 32}))
    assert found.facts["local_batch_size"] == 16
    assert (found.facts["learning_rate"], found.facts["momentum"], found.facts["weight_decay"]) == (0.1, 0.9, 1e-4)
    scheduled = save(tmp_path / "scheduled", ds_config=CONFIGURED, lr_scheduler={"last_batch_iteration": 6})
    found = found_in(scheduled)
    assert "learning_rate" not in found.facts
    assert any("0.1 is configured, but a schedule changes it" in note for note in found.notes)
    found = found_in(save(tmp_path / "known", ds_config=CONFIGURED, lr_scheduler={"_last_lr": [0.05]}))
    assert found.facts["learning_rate"] == 0.05
    found = found_in(save(tmp_path / "skipping", skipped_steps=2, frozen_param_shapes={"head.weight": torch.Size([1])}))
    assert found.facts["skipped_steps"] == 2
    assert any("1 frozen parameters were not saved" in note for note in found.notes)


@pytest.mark.parametrize(
    "value", [-1, "auto", None, 10**400, float("nan"), float("inf"), [], {}, [[]], torch.ones(2), True]
)
def test_settings_that_cannot_be_are_left_out(tmp_path: Path, value: Any) -> None:
    config = {"train_batch_size": value, "train_micro_batch_size_per_gpu": value, "gradient_accumulation_steps": value, "zero_optimization": value,
              "optimizer": {"params": {"lr": value, "betas": value}}}  # fmt: skip
    for i, given in enumerate(
        (config, value, {"zero_optimization": {"stage": value}, "optimizer": value, "scheduler": value})
    ):
        state = dict.fromkeys(
            ("dp_world_size", "global_steps", "skipped_steps", "epoch", "lr_scheduler", "frozen_param_shapes", "ds_version", "mp_world_size", "optimizer"),
            value,
        )  # fmt: skip
        found = found_in(save(tmp_path / str(i), ds_config=given, **state))
        assert_same(found.models[0].tensors, network().state_dict())
        assert found.step is None
        assert found.facts.keys() <= {"zero_stage", "writer_version", "learning_rate"}
