"""Lightning's checkpoints, as Lightning writes them on one process and on two."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import plain
from landscape.checkpoints.importers.found import Found
from tests.checkpoints.importers.fixtures_torch import (
    Hostile,
    Untied,
    assert_same,
    expected,
    expected_slot,
    said,
    written,
)


def read_from(path: Path) -> Found:
    found = plain.find(path)
    assert found is not None
    return found


def content(**more: Any) -> dict[str, Any]:
    return {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": Untied().state_dict(),
        "global_step": 8,
        "epoch": 1,
        **more,
    }


@pytest.mark.parametrize(
    ("name", "file", "rate"),
    [("lightning-ddp", "epoch=1-step=8.ckpt", 0.025), ("lightning", "epoch=0-step=8.ckpt", 0.05)],
)
def test_a_checkpoint_of_the_trainer_is_read(name: str, file: str, rate: float) -> None:
    found = read_from(written() / name / file)
    assert_same(found.models[0].tensors, expected(name))
    assert (found.format, found.kind, found.step) == ("Lightning's checkpoint", "one model", 8)
    assert found.facts == {"epoch": int(file[6]), "batch_size": 4, "writer_version": "Lightning 2.6.6"}
    optimizer = found.models[0].optimizer
    assert optimizer is not None
    assert (optimizer.facts["learning_rate"], optimizer.facts["optimizer_step"]) == (rate, 8)
    parameters = [n for n, t in expected(name).items() if "running" not in n and "num_batches" not in n]
    for slot in ("exp_avg", "exp_avg_sq"):
        held = expected_slot(name, slot)
        assert len(held) == 6
        numbers = {
            i: held[n]
            for i, n in enumerate(sorted(parameters, key=list(dict(Untied().named_parameters(prefix="net"))).index))
        }
        assert_same(optimizer.slots[slot], numbers)
    assert "Lightning saves the weights of process 0" in said(found)
    assert "How many processes there were is not recorded" in said(found)


def test_the_processes_of_ddp_had_the_weights_that_are_read() -> None:
    found = read_from(written() / "lightning-ddp" / "last.ckpt")
    other = expected("lightning-ddp", rank=1)
    for name, stored in found.models[0].tensors.items():
        if "running" not in name:
            assert torch.equal(stored.read(), other[name])


def test_weights_alone_are_read_with_what_is_recorded() -> None:
    found = read_from(written() / "weights.ckpt")
    assert_same(found.models[0].tensors, expected("lightning"))
    assert found.models[0].optimizer is None
    assert (found.step, found.facts["learning_rate"]) == (8, 0.1)
    assert "what a schedule made of it by this step is not recorded" in said(found)


def test_with_weight_averaging_the_weights_of_the_step_are_read() -> None:
    path = written() / "lightning-averaged" / "last.ckpt"
    found = read_from(path)
    raw = torch.load(path, weights_only=True)
    assert_same(found.models[0].tensors, raw["current_model_state"])
    assert_same(found.models[0].tensors, expected("lightning-averaged"))
    assert any(not torch.equal(raw["state_dict"][n], t) for n, t in raw["current_model_state"].items())
    assert found.kind == "one model"
    assert "an average of the weights over 8 updates is there too" in said(found)


def test_several_optimizers_are_left_out(tmp_path: Path) -> None:
    state = {"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}
    torch.save(content(optimizer_states=[state, state]), tmp_path / "a.ckpt")
    found = read_from(tmp_path / "a.ckpt")
    assert found.models[0].optimizer is None
    assert "the state of 2 optimizers was left out" in said(found)
    assert "its step is the sum of the steps of 2 optimizers" in said(found)


def test_settings_of_argparse_are_read(tmp_path: Path) -> None:
    torch.save(content(hyper_parameters=argparse.Namespace(lr=0.3, batch_size_per_gpu=5)), tmp_path / "a.ckpt")
    assert read_from(tmp_path / "a.ckpt").facts == {
        "epoch": 1,
        "local_batch_size": 5,
        "learning_rate": 0.3,
        "writer_version": "Lightning 2.6.6",
    }


class Settings:
    """A class of one's own in the hyper-parameters."""


@pytest.mark.parametrize(
    "place",
    ["hyper_parameters", "callbacks", "loops", "optimizer_states", "lr_schedulers", "state_dict", "MixedPrecision"],
)
@pytest.mark.parametrize("hostile", [False, True])
def test_types_of_one_s_own_are_named_and_not_made(tmp_path: Path, place: str, hostile: bool) -> None:
    thing = Hostile(tmp_path / "marker") if hostile else Settings()
    torch.save(content(**{place: {"x": [thing]}}), tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"holds more than tensors and settings: (posix\.system|.*test_lightning\.Settings)\. .*save what is wanted alone",
    ):
        plain.find(tmp_path / "a.ckpt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"state_dict": None}, {"state_dict": {}}, {"state_dict": {"w": 3}}, {"state_dict": [torch.ones(2)]}, {"state_dict": {3: torch.ones(2)}},
        {"state_dict": {"w": torch.ones(2, device="meta")}}, {"state_dict": {"w": torch.ones(1).expand(1 << 40)}},
    ],
)  # fmt: skip
def test_missing_or_impossible_weights_are_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    torch.save(content(**damage), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        plain.find(tmp_path / "a.ckpt")


def test_impossible_counters_are_left_out(tmp_path: Path) -> None:
    for step in (-1, 2.5, "8", None, 1 << 200, torch.ones(3), [8]):
        torch.save(
            content(global_step=step, epoch=step, optimizer_states=step, hyper_parameters=step), tmp_path / "a.ckpt"
        )
        found = read_from(tmp_path / "a.ckpt")
        assert (found.step, set(found.facts)) == (None, {"writer_version"})


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    whole = (written() / "lightning" / "last.ckpt").read_bytes()
    path, generator = tmp_path / "a.ckpt", random.Random(1)
    for i in range(60):
        damaged = bytearray(whole)
        if i % 2:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        else:
            del damaged[generator.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            found = plain.find(path)
        except CheckpointError:
            continue
        for stored in found.models[0].tensors.values() if found else ():
            stored.read()
