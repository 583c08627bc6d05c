"""The recorder as a callback of Lightning's Trainer."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from landscape.checkpoints.recorder import save_learner
from landscape.optional import import_torchvision

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The two names that Lightning goes by, whose classes are not each other's."""


def recorder_callback(
    directory: str | Path, every_num_steps: int, *, network: str | None = None, **facts: str | float | int
) -> Any:
    """A callback that records the weights of every process before the first step, every so many optimizer steps, and at the end.

        trainer = lightning.Trainer(strategy="ddp", callbacks=[recorder_callback("runs/mine", 100, network="net", local_batch_size=32)])

    Args:
        directory: the run directory, one folder for all processes.
        every_num_steps: optimizer steps (trainer.global_step) between checkpoints.
        network: the attribute of the LightningModule that holds the network, so that weights get the network's own names; by default all of the
            LightningModule is recorded, under its names.
        facts: task, algorithm (under DDP ssgd, if not told otherwise), order, topology, learning_rate, local_batch_size, seed, see
            `landscape.save_learner`.

    Returns:
        a Callback of lightning, or of pytorch_lightning where only that has been imported. The optimizer's state is recorded if there is one
        optimizer.

    Raises:
        ValueError: every_num_steps below 1, or neither package is installed.
    """
    if every_num_steps < 1:
        raise ValueError(f"every_num_steps must be at least 1, not {every_num_steps}")

    class Recorder(import_lightning().Callback):  # type: ignore[misc]
        """Calls `landscape.save_learner`."""

        last: int | None = None

        def save(self, trainer: Any, module: Any) -> None:
            step = trainer.global_step
            if step != self.last:
                model = trainer.model if network is None else module.get_submodule(network)
                optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
                known: dict[str, Any] = {"rank": trainer.global_rank, "world_size": trainer.world_size}
                if isinstance(trainer.model, nn.parallel.DistributedDataParallel):
                    known["algorithm"] = "ssgd"
                save_learner(directory, step=step, model=model, optimizer=optimizer, **(known | facts))
                self.last = step

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.save(trainer, pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
            if trainer.global_step % every_num_steps == 0:
                self.save(trainer, pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.save(trainer, pl_module)

    return Recorder()


def import_lightning() -> Any:
    """lightning.pytorch, or pytorch_lightning where that has been imported or nothing else is installed; also beside a torchvision whose compiled operators do not fit torch."""
    wanted = [name for name in PACKAGES if sys.modules.get(name) is not None] or [
        name for name in PACKAGES if importlib.util.find_spec(name.split(".")[0]) is not None
    ]
    if not wanted:
        raise ValueError("the callback needs Lightning; install it with: pip install lightning")
    if wanted[0] not in sys.modules and importlib.util.find_spec("torchvision") is not None:
        import_torchvision("torchvision")
    return importlib.import_module(wanted[0])
