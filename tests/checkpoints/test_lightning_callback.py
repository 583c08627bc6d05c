from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import landscape as ls
from landscape.checkpoints.lightning_callback import recorder_callback

SCRIPT = Path(__file__).parent / "lightning_nursery.py"
needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="needs lightning; not installed"
)


@needs_lightning
@pytest.mark.slow
def test_every_process_is_recorded_under_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(SCRIPT),
        str(tmp_path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    run = ls.open_run(tmp_path / "run")
    assert run.steps == [3, 6]
    assert (run.config.algorithm, run.config.num_learners, run.config.learning_rate, run.config.momentum) == (
        "ssgd",
        2,
        0.1,
        0.9,
    )
    learners = run.learners(6)
    assert learners.consensus_distance == 0
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, tensor in learners.parameters(rank).items():
            assert torch.equal(tensor, state[name])
        for name, buffer in learners.buffers.items():
            assert torch.equal(buffer[rank], state[name])
    assert not torch.equal(learners.buffers["net.1.running_mean"][0], learners.buffers["net.1.running_mean"][1])


def test_steps_between_checkpoints_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_num_steps must be at least 1, not 0"):
        recorder_callback(tmp_path, 0)


def test_without_lightning_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install lightning"):
        recorder_callback(tmp_path, 5)
