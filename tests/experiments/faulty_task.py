"""A small task, and a fault that the environment asks for: what a user's own module would be, on a machine that fails.

FAULT is "WHAT:RANK:STEP", at that step of that rank, in the first start only (torchrun's restarts are spared):

    SIGKILL, SIGSTOP, SIGTERM, SIGINT   the rank gets that signal as the step begins
    agent-SIGTERM, agent-SIGINT         its parent does, torchrun's agent
    hangs                               the rank goes no further, until SIGTERM
    all-SIGKILL-writing                 the whole job is killed in the middle of that step's checkpoint
    full                                the disk is full when the rank writes that step's checkpoint
    full-metrics                        or that step's metrics
    data, other-data, other-model       the rank's data are missing, or other than the others'; its initial weights are others
"""

import errno
import io
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from landscape.checkpoints import writer
from landscape.data.dataset import TensorData
from landscape.tasks import Task
from landscape.training.loop import Program

RANK, RESTARTS = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
WHAT, FAULTY, STEP = os.environ.get("FAULT", "none:0:0").split(":")
FAILS = int(FAULTY) == RANK and RESTARTS == 0


def fail() -> None:
    if WHAT == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(600)
    process = os.getppid() if WHAT.startswith("agent") else os.getpid()
    os.kill(process, getattr(signal, WHAT.removeprefix("agent-")))
    if WHAT.startswith("agent"):
        time.sleep(1)  # until it has handed that on


def faulty_step(self: Program, state: Any, *arguments: Any, **options: Any) -> Any:
    if FAILS and ("SIG" in WHAT or WHAT == "hangs") and not WHAT.endswith("writing") and state.step == int(STEP):
        fail()
    return take_step(self, state, *arguments, **options)


def faulty_write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    written = write(path, tensors)
    if FAILS and f"step-{int(STEP):08d}" in path.parent.name and WHAT in ("full", "all-SIGKILL-writing"):
        os.truncate(path, written["bytes"] // 2)
        if WHAT == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.killpg(0, signal.SIGKILL)
    return written


class FullDisk(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def faulty_append(self: writer.RunWriter, entry: dict[str, Any]) -> None:
    if FAILS and WHAT == "full-metrics" and entry["step"] == int(STEP):
        self._metrics = FullDisk()
    append(self, entry)


take_step, Program.step = Program.step, faulty_step  # type: ignore[method-assign]
write, writer._write_tensors = writer._write_tensors, faulty_write
append, writer.RunWriter.append_metrics = writer.RunWriter.append_metrics, faulty_append  # type: ignore[method-assign]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 3))
        if FAILS and WHAT == "other-model":
            with torch.no_grad():
                self.layers[0].bias += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def load_data(root: object) -> tuple[TensorData, TensorData]:
    if FAILS and WHAT == "data":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/images")
    generator = torch.Generator().manual_seed(int(FAILS and WHAT == "other-data"))
    inputs = torch.randn(64, 6, generator=generator)
    targets = inputs[:, :3].argmax(1)
    return TensorData(inputs[:40], targets[:40], "faulty"), TensorData(inputs[40:], targets[40:], "faulty")


def make() -> Task:
    return Task(
        "faulty_task:make", "fails when told", Network, nn.functional.cross_entropy, load_data, 0.7, math.log(3)
    )
