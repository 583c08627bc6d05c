"""Which checkpoints there are in a folder, or fit a pattern, by their names alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from landscape.checkpoints.find import entries, find
from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import series
from landscape.checkpoints.importers.file_names import parse
from landscape.checkpoints.importers.series import Entry, group, group_listed
from tests.checkpoints.importers.fixtures_torch import Untied, assert_same, written


def filled(folder: Path, names: Iterable[str]) -> Path:
    """Empty files, and folders for names that end in /."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"")
    return folder


def grouped(folder: Path, at: Path | None = None) -> list[tuple[int | None, list[str]]]:
    return [(entry.step, [str(path.relative_to(folder)) for path in entry.paths]) for entry in group(at or folder)]


STEPS = (100, 20, 3)


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [
        ("step-{}.pt", "step"), ("step_{}.pth", "step"), ("model_step{}.pt", "step"), ("ckpt.step={}.ckpt", "step"), ("global_step{}/", "step"),
        ("checkpoint-{}/", "step"), ("iter_{:07d}.pt", "step"), ("iteration{}.pt", "step"), ("epoch=0-step={}.ckpt", "step"), ("{}_steps.pt", "step"),
        ("epoch_{}.pth", "epoch"), ("model_epoch{}.pt", "epoch"), ("ep{}_model.pt", "epoch"), ("epoch={:03d}-val_loss=0.25.ckpt", "epoch"),
        ("model_{}.pt", "number"), ("ckpt{}.pt", "number"), ("checkpoint_{}/", "number"), ("{}.pt", "number"), ("{}/", "number"), ("model.{}", "number"),
        ("checkpoint_1_{}.pt", "number"), ("ckpt_{}", "number"),
    ],
)  # fmt: skip
def test_numbers_in_names_are_steps(tmp_path: Path, pattern: str, counts: str) -> None:
    names = [pattern.format(step) for step in STEPS]
    found = group(filled(tmp_path, names))
    assert [entry.step for entry in found] == sorted(STEPS)
    assert [entry.paths[0].name for entry in found] == [name.rstrip("/") for name in names[::-1]]
    assert {entry.counts for entry in found} == {counts}
    path = tmp_path / names[0].rstrip("/")
    assert group(path) == [Entry(100, (path,), counts) if pattern != "checkpoint_1_{}.pt" else Entry(None, (path,))]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet_18.pt", "run_1", "vgg-16.pth", "model_v2.pt", "acc_0.93.pt"])
def test_a_number_that_need_not_count_checkpoints_is_no_step(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert group(tmp_path / name) == [Entry(None, (tmp_path / name,))]


@pytest.mark.parametrize(
    "pattern",
    ["step{s}_rank{r}.pt", "rank{r}_step{s}.pt", "checkpoint_ep{s}_r{r}_n2.pth.tar", "ep{s}_checkpoint_r{r}_n2.pth.tar", "rank{r}/step_{s}.pt", "{r}/model_{s}.pt",
     "step_{s}/rank{r}.pt", "step-{s}/{r}/checkpoint.pth.tar", "iter{s}-learner-{r}-of-2.safetensors", "model_{s}_worker{r}.pt"],
)  # fmt: skip
def test_the_files_of_a_step_s_ranks_belong_together(tmp_path: Path, pattern: str) -> None:
    filled(tmp_path, [pattern.format(s=step, r=rank) for step in STEPS for rank in (1, 0)])
    assert grouped(tmp_path) == [
        (step, [pattern.format(s=step, r=rank) for rank in range(2)]) for step in sorted(STEPS)
    ]


WHOLE = [
    [".metadata", "__0_0.distcp", "__1_0.distcp"], ["__0_0.distcp"], ["latest", "global_step5/mp_rank_00_model_states.pt", "global_step9/x.pt"],
    ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "random_states_1.pkl"],
    ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"], ["config.json", "model.safetensors"], ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
    ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"], ["state.json", "learner-00000-of-00001.safetensors"],
    ["learner-00000-of-00002.safetensors", "learner-00001-of-00002.safetensors"], ["run.json", "checkpoints/step-00000001/state.json"],
    ["shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WHOLE)))
def test_a_folder_that_is_one_checkpoint_is_not_taken_apart(tmp_path: Path, number: int) -> None:
    for name, step in (("run", None), ("step-7", 7), ("checkpoint-12", 12)):
        folder = filled(tmp_path / name, WHOLE[number])
        assert group(folder) == [Entry(step, (folder,))]
    filled(tmp_path / "more" / "step_10", WHOLE[number])
    filled(tmp_path / "more" / "step_9", WHOLE[number])
    assert grouped(tmp_path / "more") == [(9, ["step_9"]), (10, ["step_10"])]


def test_files_of_ranks_without_steps_are_one_checkpoint(tmp_path: Path) -> None:
    for names in (
        ["rank0.pt", "rank1.pt", "rank10.pt", "rank2.pt"],
        ["0/a.pt", "1/a.pt"],
        ["worker_0/a.pt", "worker_3/a.pt"],
    ):
        folder = filled(tmp_path / names[0].replace("/", ""), names)
        ordered = sorted(names, key=lambda name: int("".join(c for c in name if c.isdigit())))
        assert grouped(folder) == [(None, ordered)]


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    assert grouped(filled(tmp_path, ["model.pt", "optimizer.pt", "config.json", "log.txt"])) == [(None, ["model.pt"])]
    assert grouped(filled(tmp_path / "step-5", ["model.pt"]))[0] == (5, ["model.pt"])


def test_what_has_no_step_beside_what_has_is_passed_over_and_noted(tmp_path: Path) -> None:
    filled(tmp_path, ["model_step5.pt", "model_step10.pt", "last.ckpt", "best.pt", "best_step7.pt", "other.pt", "README.md", "a.json", "optimizer_step5.pt", ".hidden_step3.pt", "logs/x", "epoch_4.pt"])  # fmt: skip
    found = group(tmp_path)
    assert [entry.step for entry in found] == [5, 10]
    (first, second) = found[0].notes
    for name in ("last.ckpt", "best.pt", "best_step7.pt", "other.pt", "epoch_4.pt"):
        assert name in first
    assert "README" not in first
    assert second == "passed over, as by their names they are not weights: optimizer_step5.pt"


def test_a_hugging_face_trainer_s_folder_is_a_series_of_its_checkpoints(tmp_path: Path) -> None:
    filled(
        tmp_path,
        ["model.safetensors", "config.json", "checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors"],
    )
    found = group(tmp_path)
    assert [(entry.step, entry.paths[0].name) for entry in found] == [
        (500, "checkpoint-500"),
        (1000, "checkpoint-1000"),
    ]
    assert "model.safetensors, whose name tells no step, was passed over" in found[0].notes[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["model_step5.pt", "ema_step5.pt", "model_step6.pt"],
            r"several checkpoints of one step:\n  step 5  ema_step5\.pt, model_step5\.pt\n  give those of one kind",
        ),
        (
            ["epoch=0-step=8.ckpt", "epoch=0-step=8-v1.ckpt"],
            r"\n  step 8  epoch=0-step=8-v1\.ckpt, epoch=0-step=8\.ckpt",
        ),
        (["step_5.pt", "step_05.pt"], r"\n  step 5  step_05\.pt, step_5\.pt"),
        (
            ["step5_rank0.pt", "step5_rank1.pt", "step6_rank0.pt"],
            r"not every step has the files of all 2 ranks:\n  step 6  lacks rank 1\n",
        ),
        (["step5_rank0.pt", "step5.pt"], r"several checkpoints of one step"),
        (["a.pt", "b.pt"], r"2 checkpoints whose names tell no step: a\.pt, b\.pt; give one"),
        (
            ["a_rank0.pt", "a_rank1.pt", "b_rank0.pt"],
            r"files of ranks of 2 kinds: a_rank0\.pt, a_rank1\.pt, b_rank0\.pt; give one, or those of one kind",
        ),
        (["resnet_18.pt", "vgg.pt"], "2 checkpoints whose names tell no step"),
        ([f"a{i}_step{j}.pt" for i in "xy" for j in range(100)], r"\n  \.\.\. and 80 more"),
    ],
)
def test_what_names_do_not_tell_apart_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        group(filled(tmp_path, names))
    assert str(refused.value).count("\n") < 30


def test_patterns_choose_among_files(tmp_path: Path) -> None:
    filled(tmp_path, ["model_5.pt", "model_10.pt", "ema_5.pt", "0/a.pt", "1/a.pt", "0/b.pt", "run_1/step_5/m.pt", "run_1/step_7/m.pt", "w_rank0.pt", "w_rank1.pt", "v_rank0.pt"])  # fmt: skip
    assert grouped(tmp_path, tmp_path / "model_*") == [(5, ["model_5.pt"]), (10, ["model_10.pt"])]
    assert grouped(tmp_path, tmp_path / "*" / "a.pt") == [(None, ["0/a.pt", "1/a.pt"])]
    assert grouped(tmp_path, tmp_path / "run_?" / "*" / "m.pt") == [
        (5, ["run_1/step_5/m.pt"]),
        (7, ["run_1/step_7/m.pt"]),
    ]
    assert grouped(tmp_path, tmp_path / "run_1" / "step_*") == [(5, ["run_1/step_5/m.pt"]), (7, ["run_1/step_7/m.pt"])]
    assert grouped(tmp_path, tmp_path / "w_*") == [(None, ["w_rank0.pt", "w_rank1.pt"])]
    assert grouped(tmp_path, tmp_path / "e*") == [(None, ["ema_5.pt"])]
    assert grouped(tmp_path, tmp_path / "w_rank*") == [(None, ["w_rank0.pt", "w_rank1.pt"])]
    filled(
        tmp_path,
        [
            f"{outer}{i}/{inner}{j}.pt"
            for outer, inner in (("rank", "step_"), ("step_", "rank"), ("s/", "rank"))
            for i in range(2)
            for j in (0, 1)
        ],
    )
    for pattern, name in (
        ("rank?/step_?.pt", "rank{r}/step_{s}.pt"),
        ("step_?/rank?.pt", "step_{s}/rank{r}.pt"),
        ("s/?/rank?.pt", "s/{s}/rank{r}.pt"),
    ):
        assert grouped(tmp_path, tmp_path / pattern) == [
            (s, [name.format(s=s, r=r) for r in range(2)]) for s in range(2)
        ]
    filled(tmp_path, ["odd[1].pt"])
    assert grouped(tmp_path, tmp_path / "odd[1].pt") == [(None, ["odd[1].pt"])]


def test_listed_files_are_grouped_as_by_a_pattern(tmp_path: Path) -> None:
    names = ["a_5_rank0.pt", "a_5_rank1.pt", "a_7_rank0.pt", "a_7_rank1.pt"]
    folder = filled(tmp_path, [*names, "run/0/w.pt", "run/1/w.pt", "net_3.pt", "net_4.pt"])
    found = group_listed([folder / name for name in names])
    assert [(entry.step, [path.name for path in entry.paths]) for entry in found] == [(5, names[:2]), (7, names[2:])]
    assert [entry.step for entry in group_listed([folder / "net_4.pt", folder / "net_3.pt"])] == [3, 4]
    ranks = [folder / "run" / str(rank) / "w.pt" for rank in range(2)]
    assert group_listed(ranks) == [Entry(None, tuple(ranks))]
    with pytest.raises(CheckpointError, match="names tell no step"):
        group_listed([folder / "x.pt", folder / "y.pt"])


@pytest.mark.parametrize(("name", "message"), [("absent", "there is nothing at"), ("no*", "nothing fits"), ("**/x.pt", "goes through any number"), ("a\0b", "cannot be read|nothing at"), ("x" * 5000, "cannot be read|nothing at")])  # fmt: skip
def test_where_nothing_is_it_is_said(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        group(tmp_path / name)
    assert len(str(refused.value)) < 6000


def test_an_empty_folder_is_left_to_others(tmp_path: Path) -> None:
    assert group(tmp_path) == [Entry(None, (tmp_path,))]
    assert group(filled(tmp_path, ["notes.txt", "logs/events"])) == [Entry(None, (tmp_path,))]


def test_links_in_circles_pipes_and_odd_names_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "step_1.pt").symlink_to("step_1.pt")
    (tmp_path / "step_2.pt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "step_3.pt")
    (tmp_path / "step_4.pt").symlink_to(tmp_path)
    (tmp_path / os.fsdecode(b"step_5\xff.pt")).write_bytes(b"")
    (tmp_path / "step_99999999999999999999.pt").write_bytes(b"")
    (tmp_path / ("step_6" + "_" * 200 + ".pt")).write_bytes(b"")
    assert [entry.step for entry in group(tmp_path)] == [1, 2, 3, 4, 5, 6]
    for entry in entries([tmp_path])[:3]:
        with pytest.raises(CheckpointError, match=r"cannot be read|not a regular file"):
            find(entry)


def test_a_folder_of_very_many_files_is_listed_fast(tmp_path: Path) -> None:
    for step in range(20_000):
        (tmp_path / f"model_step{step}.pt").touch()
    start = time.process_time()
    found = group(tmp_path)
    assert time.process_time() - start < 20
    assert [entry.step for entry in found] == list(range(20_000))


def test_folders_are_gone_into_two_levels_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, [f"step_{s}/0/deep/deeper/rank{r}.pt" for s in range(3) for r in range(2)])
    seen = []
    listed = series._listed
    monkeypatch.setattr(series, "_listed", lambda folder: seen.append(folder) or listed(folder))
    group(tmp_path)
    assert all(len(folder.relative_to(tmp_path).parts) <= 2 for folder in seen)


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MOST", 3)
    with pytest.raises(CheckpointError, match="more than 3 files; give a pattern"):
        group(filled(tmp_path, [f"{i}.pt" for i in range(5)]))


def test_real_series_are_read(tmp_path: Path) -> None:
    listed = entries([written() / "lightning-ddp"])
    assert [(entry.step, entry.counts) for entry in listed] == [(4, "step"), (8, "step")]
    assert [find(entry).step for entry in listed] == [4, 8]
    for step in STEPS:
        for rank in range(2):
            torch.save(Untied(step + rank).state_dict(), tmp_path / f"m_{step}_rank{rank}.pt")
    for entry in entries([tmp_path]):
        assert entry.step is not None
        found = find(entry)
        assert found.kind == "learners"
        for rank, model in enumerate(found.models):
            assert_same(model.tensors, Untied(entry.step + rank).state_dict())


def test_names_of_any_kind_are_parsed_in_no_time() -> None:
    start = time.process_time()
    for name in (
        "rank" * 5000,
        "1-of-" * 5000,
        "_" * 10_000,
        "step" * 5000 + "1",
        "9" * 10_000,
        "r1" * 5000,
        "e1_" * 5000,
        ".pt" * 5000,
        ".." * 5000,
    ):
        parse(name)
    assert time.process_time() - start < 2
