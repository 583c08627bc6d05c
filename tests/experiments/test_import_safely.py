"""Imports that go wrong, and what imports tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import landscape as ls
from landscape.checkpoints.format import seal, unseal
from landscape.checkpoints.inspect import describe
from landscape.cli.program import main
from landscape.experiments.import_run import import_run


def save(folder: Path, step: int, ranks: int = 2, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        torch.save({"model": {"w": torch.full((3,), 1.0 * rank)}, **more}, folder / f"step_{step}_rank{rank}.pt")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_damaged_source_leaves_the_run_that_it_was_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "theirs", 5)
    run = import_run(tmp_path / "theirs", tmp_path / "run", quiet=True)
    before = contents(run.path)
    recorded = tmp_path / "recorded"
    for step in (1, 2):
        ls.save_learner(recorded, step=step, model=nn.Linear(2, 2), rank=0, world_size=1)
    damaged = recorded / "checkpoints" / "step-00000002" / "learner-00000-of-00001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(
        content[:-1] + bytes([content[-1] ^ 1])
    )  # found when the tensors are read, after the first step
    with pytest.raises(ls.CheckpointError, match="checksum"):
        import_run(recorded, run.path, overwrite=True, quiet=True)
    assert contents(run.path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recorded", "run", "theirs"]
    damaged.write_bytes(content)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if target == run.path and ".writing-" in str(source):
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="the disk is gone"):
        import_run(recorded, run.path, overwrite=True, quiet=True)
    assert contents(run.path) == before
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(run.path)
    assert import_run(recorded, tmp_path / "link", overwrite=True, quiet=True).steps == [1, 2]
    assert ls.open_run(run.path).steps == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "recorded", "run", "theirs"]


def test_an_import_over_a_run_speaks_of_no_flag_that_it_lacks(tmp_path: Path) -> None:
    save(tmp_path / "theirs", 5)
    import_run(tmp_path / "theirs", tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="already holds a run; replace it with --overwrite") as refused:
        import_run(tmp_path / "theirs", tmp_path / "run", quiet=True)
    assert "resume" not in str(refused.value)


def test_links_in_circles_are_named(tmp_path: Path) -> None:
    save(tmp_path / "theirs", 5)
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    with pytest.raises(ValueError, match=r"circle/run cannot be followed: links lead round"):
        import_run(tmp_path / "theirs", circle / "run", quiet=True)
    (tmp_path / "theirs" / "step_5_rank0.pt").unlink()
    (tmp_path / "theirs" / "step_5_rank0.pt").symlink_to("step_5_rank0.pt")
    with pytest.raises(ValueError, match=r"step_5_rank0\.pt cannot be"):
        import_run(tmp_path / "theirs", tmp_path / "run", quiet=True)
    inner = tmp_path / "inner"
    inner.mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, inner / "model.safetensors")
    (inner / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(ValueError, match=r"loop\.txt cannot be followed"):
        import_run(inner, tmp_path / "run", quiet=True)


def test_steps_that_are_missing_and_those_that_are_there_are_told(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path / "theirs", step)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7, 8; there are 10, 20, 30$"):
        import_run(tmp_path / "theirs", tmp_path / "run", steps=[20, 7, 8], quiet=True)


def test_what_was_left_out_is_told_at_import_and_by_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    momentum = {"state": {0: {"momentum_buffer": torch.ones(9)}}, "param_groups": [{"params": [0], "lr": 0.1}]}
    torch.save({"model": {"w": torch.ones(3)}, "optimizer": momentum}, tmp_path / "model.pt")
    import_run(tmp_path / "model.pt", tmp_path / "run")
    told, shown = capsys.readouterr().err, describe(tmp_path / "run")
    for note in ("momentum_buffer was left out: it does not fit", "its step is not recorded, and stands as 0"):
        assert told.count(f"note: the optimizer's {note}" if "momentum" in note else f"note: {note}") == 1
        assert shown.count(note) == 1


def test_inspect_tells_that_a_run_is_an_average(tmp_path: Path) -> None:
    save(tmp_path / "theirs", 5)
    import_run(tmp_path / "theirs", tmp_path / "run", average=True, quiet=True)
    assert "learners; of these the average w_a alone was kept" in describe(tmp_path / "run")


# Records with the right checksum that are no run's ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"task": 5}, "task"),
        ({"status": ["imported"]}, "status"),
        ({"config": 5}, "config"),
        ({"config": {"algorithm": "dpsgd"}}, "learning_rate"),
        ({"config": {"algorithm": "dpsgd", "learning_rate": "0.1"}}, "config.learning_rate"),
        ({"config": {"algorithm": ["dpsgd"], "learning_rate": 0.1}}, "config.algorithm"),
        ({"config": {"algorithm": "none", "learning_rate": 0.1}}, "algorithm"),
        ({"config": {"algorithm": "dpsgd", "learning_rate": 0.1, "num_learners": 2.5}}, "config.num_learners"),
        ({"config": {"algorithm": "dpsgd", "learning_rate": 0.1, "evaluation_examples": "x"}}, "evaluation_examples"),
        ({"topology": "ring"}, "topology"),
        ({"topology": {}}, "topology.name"),
        ({"data": [1]}, "data"),
        ({"data": {"fingerprint": 1}}, "data.fingerprint"),
        ({"imported": 3}, "imported"),
        ({"imported": {"from": 3}}, "imported.from"),
        ({"imported": {"reasons": [3]}}, "imported"),
        ({"assumed": 1}, "assumed"),
        ({"assumed": [1]}, "assumed"),
        ({"format_version": "1"}, "format_version"),
    ],
)
def test_a_record_that_is_no_run_s_is_refused_by_file_and_field(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    run = tmp_path / "recorded"
    ls.save_learner(run, step=1, model=nn.Linear(2, 2), rank=0, world_size=1)
    (run / "run.json").write_bytes(seal({**unseal(run / "run.json"), **change}))
    for use in (describe, lambda path: import_run(path, tmp_path / "run", quiet=True)):
        if use is not describe and field.startswith("topology.name"):
            continue  # which no import needs
        with pytest.raises(ls.CheckpointError, match=r"run\.json .*" + field.replace(".", r"\.")):
            use(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": [0.1]}, "learning_rate"),
        ({"local_batch_size": "8"}, "local_batch_size"),
        ({"imported": {"reasons": 5}}, "imported"),
        ({"imported": {"notes": [5]}}, "imported"),
    ],
)
def test_a_state_that_is_no_checkpoint_s_is_refused_by_file_and_field(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    run = tmp_path / "recorded"
    ls.save_learner(run, step=1, model=nn.Linear(2, 2), rank=0, world_size=1)
    state = run / "checkpoints" / "step-00000001" / "state.json"
    state.write_bytes(seal({**unseal(state), **change}))
    with pytest.raises(ls.CheckpointError, match=rf"state\.json .*{field}"):
        ls.open_run(run).learners(1)


def test_a_record_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "run.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ls.CheckpointError, match=r"run\.json has 1099511627776 bytes, too many"):
        ls.open_run(tmp_path)


# The terminal --------------------------------------------------------------------------------------------------------

PRINTED = "\x1b]0;owned\x07\x1b[2J\u202e"
HOSTILE = f"{PRINTED}\udc80"


def test_names_from_files_reach_the_terminal_escaped_and_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"a{PRINTED}\nlandscape: all is well", "long" * 10_000]
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path / "model.pt")]) == 0
    shown = capsys.readouterr().out
    (tmp_path / f"b{HOSTILE}.pt").write_bytes(b"nothing")
    assert main(["inspect", str(tmp_path / f"b{HOSTILE}.pt")]) == 2
    said = capsys.readouterr().err
    whole = tmp_path / f"b{PRINTED}.pt"
    torch.save({"w": torch.ones(2)}, whole)
    assert main(["import", str(whole), "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run")]) == 0
    for text in (shown, said, told.err, told.out, capsys.readouterr().out):
        assert all(c.isprintable() or c == "\n" for c in text)
        assert max(map(len, text.splitlines())) < 1000
    assert r"a\x1b]0;owned\x07\x1b[2J\u202e\nlandscape: all is well" in shown
    assert r"b\x1b]0;owned\x07\x1b[2J\u202e\udc80.pt" in said


@pytest.mark.parametrize("kept", [10, 500, 2000])
def test_a_zip_archive_that_is_cut_short_is_said_to_be(tmp_path: Path, kept: int) -> None:
    torch.save({"w": torch.ones(5000)}, tmp_path / "model.pt")
    os.truncate(tmp_path / "model.pt", kept)
    with pytest.raises(ls.CheckpointError, match=r"model\.pt is cut short, or no zip archive"):
        describe(tmp_path / "model.pt")
