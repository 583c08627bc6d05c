"""A Lightning Trainer on the processes of torchrun, recorded, with what it recorded kept beside by torch.save: recorder_lightning.py FOLDER"""

import sys
from pathlib import Path
from typing import Any

import torch
from departing import leave
from torch import Tensor, nn

from landscape.checkpoints.lightning_callback import import_lightning, recorder_callback

OUT = Path(sys.argv[1])
lightning = import_lightning()


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Keeper(lightning.Callback):  # type: ignore[misc, name-defined]
    """Keeps the state behind every step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        self.keep(trainer, pl_module)

    def keep(self, trainer: Any, module: Any) -> None:
        (OUT / "truth").mkdir(exist_ok=True)
        kept = {"model": module.net.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
        path = OUT / "truth" / f"{trainer.global_step}-{trainer.global_rank}.pt"
        if not path.exists():  # the next batch moves BatchNorm's statistics without a step
            torch.save(kept, path)


if __name__ == "__main__":
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(80, 3), torch.randint(2, (80,)))
    trainer = lightning.Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_steps=5, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            Keeper(),
            recorder_callback(OUT / "network", 2, network="net", task="mnist-mlp", local_batch_size=8),
            recorder_callback(OUT / "whole", 4),
        ],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
    leave()
