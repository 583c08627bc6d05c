"""What callers of `save_learner` and `read_checkpoint` get wrong."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import landscape as ls
from landscape.checkpoints import recorder


@pytest.mark.parametrize("step", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_steps_and_batch_sizes_are_integers_of_any_library(tmp_path: Path, step: Any) -> None:
    ls.save_learner(tmp_path, step=step, model=nn.Linear(2, 2), rank=0, world_size=1, local_batch_size=step)
    learners = ls.open_run(tmp_path).learners(3)
    assert (learners.step, learners.facts["local_batch_size"]) == (3, 3)


@pytest.mark.parametrize("step", [torch.tensor(3.0), torch.tensor([3, 4])])
def test_a_step_that_is_no_integer_is_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ValueError, match=r"step must be a whole number \(an int\), not tensor"):
        ls.save_learner(tmp_path, step=step, model=nn.Linear(2, 2), rank=0, world_size=1)
    with pytest.raises(ValueError, match="local_batch_size must be a whole number"):
        ls.save_learner(tmp_path, step=1, local_batch_size=step, model=nn.Linear(2, 2), rank=0, world_size=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [3.0, np.float64(3), "3", None, [3]])
def test_what_is_no_whole_number_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"step must be a whole number \(an int\), not "):
        recorder._whole_number("step", value)


def test_a_state_dict_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"the network itself, a torch\.nn\.Module, not OrderedDict \(a state_dict"):
        recorder._module(OrderedDict(nn.Linear(2, 2).state_dict()))
    with pytest.raises(ValueError, match=r"a torch\.nn\.Module, not str$"):
        recorder._module("model")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU()), "no floating-point parameters that require a gradient"),
        (nn.Linear(2, 2).requires_grad_(False), "no floating-point parameters that require a gradient"),
        (nn.Sequential(nn.LazyLinear(2)), "lazy modules.*call it on a batch"),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), "lazy modules.*call it on a batch"),
    ],
)
def test_a_network_without_weights_to_keep_is_refused(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ls.save_learner(tmp_path, step=1, model=model, rank=0, world_size=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (range(0), "no learners of .* are asked for"),
        (range(2, 1), "no learners of .* are asked for"),
        (range(-1, 1), "has learners 0 to 2, not -1"),
        (range(2, 4), "has learners 0 to 2, not 3"),
        (range(10**12), "has learners 0 to 2, not 3"),
    ],
)
def test_learners_that_are_not_there_are_not_read(tmp_path: Path, which: range, message: str) -> None:
    network = nn.Linear(2, 2)
    for rank in range(3):
        ls.save_learner(tmp_path / "run", step=1, model=network, rank=rank, world_size=3)
        torch.save(network.state_dict(), tmp_path / f"model_rank{rank}.pt")
    for path in (tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "model_rank*.pt"):
        with pytest.raises(ValueError, match=message):
            ls.read_checkpoint(path, which)
        assert len(ls.read_checkpoint(path, range(1, 3))) == 2
