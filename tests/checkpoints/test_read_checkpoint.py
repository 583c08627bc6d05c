from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import landscape as ls
from landscape.checkpoints.find import entries
from landscape.checkpoints.inspect import describe
from tests.checkpoints.corpus import CORPUS, network, place_of, trained
from tests.checkpoints.measured import assert_measured_alike


def learners_of(seeds: range) -> Callable[[], list[nn.Module]]:
    return lambda: [network(j) for j in seeds]


def one_trained() -> list[nn.Module]:
    return [trained()[0]]


SAVED: dict[str, Callable[[], list[nn.Module]]] = {
    "plain": one_trained,
    "legacy": learners_of(range(1)),
    "lightning": one_trained,
    "decent-dp": learners_of(range(2)),
    "rank files": learners_of(range(3)),
    "DCP": one_trained,
    "DCP of learners": learners_of(range(3)),
    "FSDP rank files": learners_of(range(1)),
    "safetensors": learners_of(range(1)),
    "safetensors, sharded": learners_of(range(1)),
    "Accelerate": one_trained,
    "DeepSpeed": learners_of(range(1)),
    "run format": one_trained,
}
STEPS = {
    "plain": 7,
    "lightning": 7,
    "DCP": 7,
    "safetensors": 7,
    "safetensors, sharded": 7,
    "DeepSpeed": 7,
    "run format": 7,
}


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 3, generator=generator), torch.randint(2, (24,), generator=generator)


def written(name: str, folder: Path) -> Path:
    CORPUS[name](folder)
    place = place_of(folder)
    return place / "checkpoints" / "step-00000007" if name == "run format" else place


@pytest.mark.parametrize("name", SAVED)
def test_every_format_reads_as_it_was_saved_and_measures_as_in_memory(tmp_path: Path, name: str) -> None:
    learners = ls.read_checkpoint(written(name, tmp_path), model=network(9))
    assert_measured_alike(learners, SAVED[name](), examples())
    assert learners.step == STEPS.get(name, learners.step)


@pytest.mark.parametrize("name", SAVED)
def test_every_format_reads_without_a_module(tmp_path: Path, name: str) -> None:
    learners = ls.read_checkpoint(written(name, tmp_path))
    modules = SAVED[name]()
    assert sorted(n.removeprefix("net.") for n in learners.layout.names) == sorted(
        n for n, _ in modules[0].named_parameters()
    )
    for j, module in enumerate(modules):
        for key, tensor in learners.parameters(j).items():
            assert torch.equal(tensor, dict(module.named_parameters())[key.removeprefix("net.")])


@pytest.mark.parametrize("name", ["plain", "lightning", "DCP", "Accelerate", "run format"])
def test_adam_s_state_is_read(tmp_path: Path, name: str) -> None:
    learners = ls.read_checkpoint(written(name, tmp_path), model=network(9))
    module, optimizer = trained()
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(
            learners.moments[slot][0], torch.cat([optimizer.state[p][slot].flatten() for p in module.parameters()])
        )
    assert learners.facts["learning_rate"] == 0.1


def test_push_sum_weights_are_divided_out(tmp_path: Path) -> None:
    learners = ls.read_checkpoint(written("SGP", tmp_path), model=network(9))
    for j, row in enumerate(learners.weights):
        biased = torch.cat([p.detach().flatten() for p in network(j).parameters()])
        torch.testing.assert_close(row, biased / (0.5 + j), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CORPUS)
def test_inspect_tells_what_it_is(tmp_path: Path, name: str) -> None:
    CORPUS[name](tmp_path)
    text = describe(place_of(tmp_path))
    assert str(tmp_path) in text
    assert any(kind in text for kind in ("learners", "one model", "average", "shards of one model", "possibly mixed"))


def test_a_link_to_the_latest_checkpoint_does_not_hide_the_series(tmp_path: Path) -> None:
    CORPUS["series"](tmp_path)
    (tmp_path / "latest").symlink_to("model_step10.pt")
    assert [entry.step for entry in entries([tmp_path])] == [5, 10]


def test_files_that_a_shell_lists_are_grouped_by_step_and_rank(tmp_path: Path) -> None:
    paths = [tmp_path / f"ckpt_step{step}_rank{rank}.pt" for step in (10, 20) for rank in (0, 1)]
    for path in paths:
        torch.save(network().state_dict(), path)
    assert [(entry.step, len(entry.paths)) for entry in entries(paths)] == [(10, 2), (20, 2)]


def test_several_steps_are_not_one_checkpoint(tmp_path: Path) -> None:
    CORPUS["series"](tmp_path)
    with pytest.raises(ValueError, match="2 checkpoints"):
        ls.read_checkpoint(tmp_path)
    assert ls.read_checkpoint(tmp_path / "model_step10.pt", model=network()).weights.shape[0] == 1
