"""What a user of Lightning would run under torchrun: two processes on a CPU, with the recorder as a callback."""

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from landscape.checkpoints.lightning_callback import recorder_callback
from landscape.data.vision import import_torchvision

import_torchvision("torchvision")
import lightning.pytorch as pl  # noqa: E402


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(out: str) -> None:
    pl.seed_everything(0)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator))
    model = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accumulate_grad_batches=2, callbacks=[recorder_callback(f"{out}/run", 3, local_batch_size=8, algorithm="ssgd")],
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=4))
    torch.save(model.state_dict(), f"{out}/rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
