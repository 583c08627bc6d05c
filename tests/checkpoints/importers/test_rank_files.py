"""One file a process: gossip loops of one's own, SGP, and what is wrong with sets of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from landscape.checkpoints.find import find_file, find_one
from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import plain, rank_files
from landscape.checkpoints.importers.found import Found
from tests.checkpoints.importers.fixtures_torch import (
    Network,
    Untied,
    assert_same,
    expected,
    expected_slot,
    said,
    spoilt,
    trained,
    written,
)


def saved(folder: Path, names: Sequence[str], **more: Any) -> list[Path]:
    """One file a learner."""
    paths = []
    for j, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": Untied(j).state_dict(), **more}, folder / name)
        paths.append(folder / name)
    return paths


def learners(paths: Sequence[Path]) -> Found:
    found = rank_files.find(paths, find_file)
    assert found is not None
    return found


def test_a_gossip_loop_s_folders_are_its_learners() -> None:
    found = find_one([written() / "gossip"])
    assert (found.kind, found.format, found.step) == ("learners", "one file a process: torch.save", None)
    assert found.facts == {"epoch": 2, "local_batch_size": 8, "num_learners": 2}
    for rank, model in enumerate(found.models):
        assert_same(model.tensors, expected("gossip", rank))
        assert model.optimizer is not None
        held = expected_slot("gossip", "momentum_buffer", rank)
        assert_same(
            model.optimizer.slots["momentum_buffer"],
            {i: held[n] for i, (n, _) in enumerate(Untied().named_parameters())},
        )
        assert model.optimizer.facts["learning_rate"] == 0.1
    assert not torch.equal(*(model.tensors["0.weight"].read() for model in found.models))
    assert "one a process by its folder, ranks 0 to 1" in said(found)
    assert "whether they differ is only known once they are read" in said(found)


def test_files_of_ddp_s_ranks_may_be_copies() -> None:
    found = find_one([written() / "ddp-ranks"])
    assert found.kind == "learners"
    assert "processes of plain DDP would all save the same weights" in said(found)
    assert "DistributedDataParallel" in said(found)
    for rank, model in enumerate(found.models):
        assert_same(model.tensors, expected("ddp", rank), "module.")


NAMES: list[list[str]] = [
    ["ckpt_rank0.pt", "ckpt_rank1.pt", "ckpt_rank2.pt"],
    ["rank_00.ckpt", "rank_01.ckpt", "rank_02.ckpt"],
    ["checkpoint_r0_n3.pth.tar", "checkpoint_r1_n3.pth.tar", "checkpoint_r2_n3.pth.tar"],
    ["worker1/model.pt", "worker2/model.pt", "worker3/model.pt", "worker0/model.pt"],
    ["worker1.pt", "worker2.pt", "worker3.pt"],
    ["learner-00000-of-00003.pt", "learner-00001-of-00003.pt", "learner-00002-of-00003.pt"],
    ["model-1-of-3.pt", "model-2-of-3.pt", "model-3-of-3.pt"],
    ["0/checkpoint.pth.tar", "1/checkpoint.pth.tar", "2/checkpoint.pth.tar"],
    [f"{rank}/checkpoint.pth.tar" for rank in range(12)],
    [f"rank{rank}.pt" for rank in range(12)],
    ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"],
    ["gpu0.pth", "gpu1.pth"],
]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("listed", [False, True])
def test_ranks_are_told_by_names(tmp_path: Path, names: list[str], listed: bool) -> None:
    paths = saved(tmp_path, names, epoch=1)
    found = learners(paths[::-1]) if listed else find_one([tmp_path])
    by_rank = sorted(range(len(names)), key=lambda j: int("".join(c for c in names[j].replace("n3", "").replace("of-3", "").replace("of-00003", "").replace("size_2", "") if c.isdigit())))  # fmt: skip
    assert [model.source for model in found.models] == [str(paths[j]) for j in by_rank]
    for j, model in zip(by_rank, found.models, strict=True):
        assert_same(model.tensors, Untied(j).state_dict())
    assert found.facts == {"epoch": 1, "num_learners": len(names)}
    assert found.path == tmp_path


def test_files_of_safetensors_are_learners_too(tmp_path: Path) -> None:
    for rank in range(2):
        safetensors.torch.save_file(Untied(rank).state_dict(), tmp_path / f"model_rank{rank}.safetensors")
    found = find_one([tmp_path])
    assert found.kind == "learners"
    for rank, model in enumerate(found.models):
        assert_same(model.tensors, Untied(rank).state_dict())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rank0.pt", "rank2.pt"], r"not one a rank:\n  rank 1  missing\n  1 of 3 ranks are missing"),
        (["rank1.pt", "rank2.pt"], r"\n  rank 0  missing\n  1 of 3 ranks"),
        (["a_r0_n4.pt", "a_r1_n4.pt"], r"\n  rank 2  missing\n  rank 3  missing\n  2 of 4 ranks"),
        (["a_r0_n2.pt", "a_r1_n2.pt", "a_r2_n2.pt"], r"\n  rank 2  a_r2_n2\.pt"),
        (["a_r0_n2.pt", "a_r1_n3.pt"], r"of runs of 2, 3 processes:\n  rank 0  a_r0_n2\.pt\n  rank 1  a_r1_n3\.pt"),
        (["rank0.pt", "rank00.pt", "rank1.pt"], r"\n  rank 0  rank0\.pt, rank00\.pt"),
        (["rank0/a.pt", "rank0/b.pt", "rank1/a.pt"], "are not files of one kind"),
        (["worker0.pt", "rank1.pt"], r"worker0\.pt and rank1\.pt are not files of one kind"),
        (["a.pt", "b.pt"], r"a\.pt tells no rank by its name.*name them \.\.\._rank0\.pt"),
        (["rank0.pt", "rank999999.pt"], "999998 of 1000000 ranks are missing"),
        (["a_r0_n999999.pt", "a_r1_n999999.pt"], "999997 of 999999 ranks are missing"),
    ],
)
def test_sets_of_files_that_are_not_one_a_rank_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        learners(saved(tmp_path, names))
    assert str(refused.value).count("\n") < 30
    assert len(str(refused.value)) < 5000


def test_one_rank_s_file_in_a_folder_is_not_taken_for_the_run(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, ["checkpoint_r0_n4.pth.tar"])
    with pytest.raises(
        CheckpointError, match=r"of 4 processes' files only checkpoint_r0_n4\.pth\.tar is in .*give the file itself"
    ):
        find_one([tmp_path])
    found = find_one([path])
    assert found.kind == "one model"
    assert "by its name it is what rank 0 of 4 saved" in said(found)
    assert rank_files.find([path], find_file) is None


DIFFERENT: list[tuple[list[dict[str, Any]], str]] = [
    ([{"step": 1}, {"step": 1}, {"step": 2}], r"different steps:\n  rank 0  step 1, epoch unknown\n  rank 1  step 1.*\n  rank 2  step 2, epoch unknown"),
    ([{"epoch": 1}, {"epoch": 2}], r"different steps:\n  rank 0  step unknown, epoch 1\n  rank 1  step unknown, epoch 2"),
    ([{}, {"model": {"w": torch.ones(2)}}], r"not of one network:\n  w  float32\[3\] in rank 0; float32\[2\] in rank 1"),
    ([{}, {"model": {"w": torch.ones(3).double()}}], r"\n  w  float32\[3\] in rank 0; float64\[3\] in rank 1"),
    ([{}, {"model": {"v": torch.ones(3)}}], r"\n  w  float32\[3\] in rank 0; missing in rank 1\n  v  missing in rank 0; float32\[3\] in rank 1\n  they have no name in common"),
    ([{}, {"model": {f"v{i}": torch.ones(3) for i in range(100)}}], r"  \.\.\. and more"),
    ([{}, {"model": {"w": torch.ones(3)}, "learners": [{"w": torch.ones(3)}, {"w": torch.ones(3)}]}], r"rank1\.pt holds 2 learners, not one learner"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DIFFERENT)))
def test_learners_that_differ_are_refused_with_a_table(tmp_path: Path, number: int) -> None:
    contents, message = DIFFERENT[number]
    for rank, content in enumerate(contents):
        torch.save({"model": {"w": torch.ones(3)}, **content}, tmp_path / f"rank{rank}.pt")
    with pytest.raises(CheckpointError, match=message) as refused:
        find_one([tmp_path])
    assert str(refused.value).count("\n") < 30


def test_a_number_of_processes_that_does_not_fit_is_noted(tmp_path: Path) -> None:
    found = learners(saved(tmp_path, ["rank0.pt", "rank1.pt"], world_size=4))
    assert "the files record 4 processes, and there are 2 files" in said(found)
    assert found.facts["num_learners"] == 2


@pytest.mark.parametrize("place", [0, 1])
def test_a_hostile_file_among_good_ones_is_named_and_not_run(tmp_path: Path, place: int) -> None:
    saved(tmp_path, ["0/checkpoint.pth.tar", "1/checkpoint.pth.tar"])
    spoilt({"state_dict": Untied().state_dict()}, tmp_path / str(place) / "checkpoint.pth.tar", tmp_path / "marker")
    with pytest.raises(
        CheckpointError, match=rf"{place}/checkpoint\.pth\.tar holds more than tensors and settings: posix\.system"
    ):
        find_one([tmp_path])
    assert not (tmp_path / "marker").exists()


def test_a_file_that_is_cut_short_or_gone_is_named(tmp_path: Path) -> None:
    paths = saved(tmp_path, ["rank0.pt", "rank1.pt"])
    paths[1].write_bytes(paths[1].read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"rank1\.pt"):
        find_one([tmp_path])
    paths[1].unlink()
    paths[1].symlink_to("rank1.pt")
    with pytest.raises(CheckpointError, match=r"rank1\.pt cannot be read"):
        find_one([tmp_path])


# SGP -------------------------------------------------------------------------------------------------------------------


class Gossip:
    """What stochastic_gradient_push's GossipDataParallel holds and saves: numerators x_j and the push-sum weight p_j."""

    def __init__(self, module: nn.Module, weight: float, dtype: torch.dtype = torch.float32) -> None:
        self.module, self.ps_weight, self.is_ps_numerator = module.to(dtype), torch.ones(1).to(dtype) * weight, True

    def state_dict(self) -> dict[str, Any]:
        inner = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        return {"state_dict": inner, "ps_weight": self.ps_weight, "is_ps_numerator": self.is_ps_numerator}

    def unbias(self) -> dict[str, Tensor]:
        """The project's own de-biasing, in place."""
        for parameter in self.module.parameters():
            parameter.data.div_(self.ps_weight.type(parameter.data.dtype))
        self.is_ps_numerator = False
        return {f"module.{name}": tensor.clone() for name, tensor in self.module.state_dict().items()}


def save_gossip(path: Path, gossip: Gossip, optimizer: torch.optim.Optimizer | None = None, **more: Any) -> Path:
    meters = {
        "batch_meter": {"val": 0.1, "avg": 0.2, "ptag": "Time"},
        "best_prec1": torch.tensor(0.3),
        "is_best": False,
        "elapsed_time": 3.0,
    }
    state = {
        "epoch": 3,
        "itr": 0,
        "state_dict": gossip.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }
    torch.save({**state, **meters, **more}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("make", [Untied, Network])
def test_push_sum_weights_are_divided_out_as_the_project_does(tmp_path: Path, dtype: torch.dtype, make: Any) -> None:
    gossips = [Gossip(make(rank), weight, dtype) for rank, weight in enumerate((0.3, 1.7, 1.0))]
    for rank, gossip in enumerate(gossips):
        optimizer = torch.optim.SGD(gossip.module.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        save_gossip(tmp_path / f"checkpoint_r{rank}_n3.pth.tar", gossip, optimizer)
    found = find_one([tmp_path])
    assert (found.kind, found.format, found.step) == (
        "learners",
        "one file a process: SGP (stochastic_gradient_push)",
        None,
    )
    for model, gossip in zip(found.models, gossips, strict=True):
        biased = {f"module.{n}": t.clone() for n, t in gossip.module.state_dict().items()}
        unbiased = gossip.unbias()
        assert_same(model.tensors, unbiased)
        for name in biased:
            is_buffer = "running" in name or "num_batches" in name
            if is_buffer or name.endswith("weight"):
                assert torch.equal(biased[name], unbiased[name]) == (is_buffer or bool(gossip.ps_weight == 1))
    aliases = {name: stored.alias for name, stored in found.models[0].tensors.items()}
    assert (make is Untied) or aliases["module.first.weight"] == aliases["module.second.weight"]
    weights = [float(gossip.ps_weight) for gossip in gossips]
    assert found.facts == {"epoch": 3, "num_learners": 3, "push_sum_weights": weights}
    optimizer_found = found.models[0].optimizer
    assert optimizer_found is not None
    assert optimizer_found.facts["nesterov"] is True
    assert "parameters were divided by the push-sum weight (ps_weight)" in said(found)


def test_weights_that_are_de_biased_already_are_left_as_they_are(tmp_path: Path) -> None:
    gossip = Gossip(Untied(), 0.5)
    unbiased = gossip.unbias()
    found = plain.find(save_gossip(tmp_path / "checkpoint_r0_n1.pth.tar", gossip, itr=7))
    assert found is not None
    assert_same(found.models[0].tensors, unbiased)
    assert "de-biased already (is_ps_numerator is false)" in said(found)
    assert "saved at iteration 7 of an epoch; how many steps an epoch has is not recorded" in said(found)
    assert (found.step, found.facts) == (None, {"epoch": 3, "push_sum_weight": 0.5})


def test_the_wrapper_s_state_alone_is_read(tmp_path: Path) -> None:
    gossip = Gossip(Untied(), 0.25)
    torch.save(gossip.state_dict(), tmp_path / "a.pt")
    found = plain.find(tmp_path / "a.pt")
    assert found is not None
    assert_same(found.models[0].tensors, gossip.unbias())
    torch.save(
        {"state_dict": {"state_dict": Untied().state_dict()}, "epoch": 1}, tmp_path / "b.pt"
    )  # without processes
    alone = plain.find(tmp_path / "b.pt")
    assert alone is not None
    assert_same(alone.models[0].tensors, Untied().state_dict())


def test_buffers_that_look_like_parameters_are_not_guessed_at(tmp_path: Path) -> None:
    module = Untied()
    module.register_buffer("positions", torch.ones(3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(
        CheckpointError, match=r"6 parameters in its optimizer, but 7 tensors that look like some.*model\.unbias\(\)"
    ):
        plain.find(save_gossip(tmp_path / "a.pt", Gossip(module, 0.5), optimizer))
    found = plain.find(save_gossip(tmp_path / "b.pt", Gossip(module, 1.0), optimizer))
    assert found is not None
    assert_same(found.models[0].tensors, {f"module.{n}": t for n, t in module.state_dict().items()})


@pytest.mark.parametrize("weight", [None, 0.0, -1.0, float("nan"), float("inf"), torch.ones(2), "1", 1e-300, [1.0]])
def test_impossible_push_sum_weights_are_refused(tmp_path: Path, weight: Any) -> None:
    state = {"state_dict": Untied().state_dict(), "ps_weight": weight, "is_ps_numerator": True}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="ps_weight is not one positive number"):
        plain.find(tmp_path / "a.pt")
    torch.save({"state_dict": {**state, "is_ps_numerator": None}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="does not tell whether"):
        plain.find(tmp_path / "a.pt")


def test_epochs_of_sgp_are_a_series(tmp_path: Path) -> None:
    from landscape.checkpoints.find import entries, find

    for epoch in range(3):
        for rank in range(2):
            gossip = Gossip(trained(10 * epoch + rank)[0], 0.5 + rank)
            save_gossip(tmp_path / f"ep{epoch}_checkpoint_r{rank}_n2.pth.tar", gossip, epoch=epoch + 1)
    (tmp_path / "model_best_r0_n2.pth.tar").write_bytes(b"")
    (tmp_path / "out_r0_n2.csv").write_text("BEGIN-TRAINING")
    listed = entries([tmp_path])
    assert [(entry.step, entry.counts, len(entry.paths)) for entry in listed] == [
        (0, "epoch", 2),
        (1, "epoch", 2),
        (2, "epoch", 2),
    ]
    assert [find(entry).facts["epoch"] for entry in listed] == [1, 2, 3]
