"""The recorder as a Lightning callback, under torchrun on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from landscape.checkpoints import open_run
from landscape.checkpoints.lightning_callback import import_lightning, recorder_callback

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "recorder_lightning.py"), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.mark.slow
def test_lightnings_training_is_recorded_to_the_bit(recorded: Path) -> None:
    """At optimizer steps, of which two batches make one; also the last, which is none of every second."""
    run = open_run(recorded / "network")
    assert run.steps == [0, 2, 4, 5]
    for step in run.steps:
        learners = run.learners(step)
        assert len(learners) == 2
        assert learners.consensus_distance == 0
        assert torch.equal(*learners.buffers["1.running_mean"]) == (step == 0)  # of each its own
        for rank in (0, 1):
            truth = torch.load(recorded / "truth" / f"{step}-{rank}.pt", weights_only=True)
            read = {**learners.parameters(rank), **{n: b[rank] for n, b in learners.buffers.items()}}
            assert read.keys() == truth["model"].keys()
            assert all(torch.equal(read[name], tensor) for name, tensor in truth["model"].items())
            assert set(learners.moments) == ({"exp_avg", "exp_avg_sq"} if step else set())
            for slot, moments in learners.moments.items():
                expected = [each[slot].flatten() for each in truth["optimizer"]["state"].values()]
                assert torch.equal(moments[rank], torch.cat(expected))
        assert (learners.facts["learning_rate"], learners.facts["local_batch_size"]) == (0.01, 8)
    assert (run.task, run.config.algorithm, run.config.num_learners) == ("mnist-mlp", "ssgd", 2)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in run.steps]


@pytest.mark.slow
def test_the_whole_module_is_recorded_under_its_own_names(recorded: Path) -> None:
    whole, network = open_run(recorded / "whole"), open_run(recorded / "network")
    assert whole.steps == [0, 4, 5]
    assert torch.equal(whole.learners(4).weights, network.learners(4).weights)
    assert [f"net.{name}" for name in network.learners(4).layout.names] == list(whole.learners(4).layout.names)


def test_the_callback_is_lightnings(tmp_path: Path) -> None:
    assert isinstance(recorder_callback(tmp_path, 3), import_lightning().Callback)
    with pytest.raises(ValueError, match="every_num_steps must be at least 1, not 0"):
        recorder_callback(tmp_path, 0)


def test_without_lightning_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install lightning"):
        recorder_callback(tmp_path, 5)
