"""Checkpoints that DDP, torch.compile, Lightning and decent-dp save on two processes, and what was in memory then.

    python -m tests.checkpoints.importers.fixtures_torch FOLDER

launches them as torchrun does, but forked from a process that has imported everything once. Beside the checkpoint NAME of rank R,
NAME.R.safetensors holds the network's tensors under its own names, and what the optimizer held of each parameter under SLOT/name.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from landscape.checkpoints.importers.found import Found, Stored
from tests.checkpoints.importers import once

ROOT = Path(__file__).parents[3]
STEPS = 4


class Network(nn.Module):
    """Two layers that are tied, BatchNorm between them, and a buffer of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.second = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.norm(self.first(x)))))


class Untied(nn.Sequential):
    """Three layers, BatchNorm between them."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """A learner's minibatch."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(8, 4, generator=generator), torch.randint(2, (8,), generator=generator)


def train(module: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int, steps: int = STEPS) -> None:
    """A few steps."""
    for step in range(steps):
        inputs, targets = batch(rank, step)
        nn.functional.cross_entropy(module(inputs), targets).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def trained(
    seed: int = 0, make: Callable[..., torch.optim.Optimizer] | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network after a few steps of Adam, or another optimizer."""
    module = Untied(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01) if make is None else make(module.parameters())
    train(module, optimizer, seed)
    return module, optimizer


def remember(path: Path, rank: int, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write down what is in memory."""
    held = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    if optimizer is not None:
        for name, parameter in module.named_parameters():
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    held[f"{slot}/{name}"] = value.detach().clone()
    save_file(held, f"{path}.{rank}.safetensors")


def expected(name: str, rank: int = 0) -> dict[str, Tensor]:
    """What the network held when a checkpoint was saved."""
    return {
        key: tensor for key, tensor in load_file(written() / f"{name}.{rank}.safetensors").items() if "/" not in key
    }


def expected_slot(name: str, slot: str, rank: int = 0) -> dict[str, Tensor]:
    """What the optimizer held."""
    held = load_file(written() / f"{name}.{rank}.safetensors")
    return {key.removeprefix(f"{slot}/"): tensor for key, tensor in held.items() if key.startswith(f"{slot}/")}


def assert_same(tensors: Mapping[Any, Stored], saved: Mapping[Any, Tensor], prefix: str = "") -> None:
    """The tensors on disk are those that were in memory, bit by bit, and are announced as what they are."""
    assert sorted(tensors) == sorted(f"{prefix}{name}" if prefix else name for name in saved)
    for name, tensor in saved.items():
        stored = tensors[f"{prefix}{name}" if prefix else name]
        read = stored.read()
        assert (stored.shape, stored.dtype) == (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert read.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8)), name


def said(found: Found) -> str:
    """All sentences that the user gets."""
    return "\n".join((*found.reasons, *found.notes))


class Hostile:
    """What runs a command when it is unpickled: it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def spoilt(content: Any, path: Path, marker: Path) -> Path:
    """A file in which `content` is beside a pickle that runs a command."""
    torch.save({**content, "extra": Hostile(marker)} if isinstance(content, dict) else [content, Hostile(marker)], path)
    with open(path, "rb") as file:
        assert b"system" in file.read()
    return path


def legacy(content: Any, path: Path) -> Path:
    """A file as torch before 1.6 wrote it."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def pickled(content: bytes, path: Path) -> Path:
    """A file of the old kind whose structure is given as operations."""
    with open(path, "wb") as file:
        for each in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}):
            pickle.dump(each, file, protocol=2)
        file.write(content)
        pickle.dump([], file, protocol=2)
    return path


def written() -> Path:
    """The folder of all checkpoints."""
    return once.written("tests.checkpoints.importers.fixtures_torch")


def _distributed_data_parallel(folder: Path, rank: int) -> None:
    module = Network()
    model = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    train(model, optimizer, rank)
    args = argparse.Namespace(lr=0.3, batch_size=8, world_size=2, out=folder)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": STEPS, "epoch": 1, "args": args}
    remember(folder / "ddp", rank, module, optimizer)
    (folder / "ddp-ranks").mkdir(exist_ok=True)
    torch.save(state, folder / "ddp-ranks" / f"model_rank{rank}.pt")
    if rank == 0:
        torch.save(state, folder / "ddp.pt")
        torch.save(torch.compile(model).state_dict(), folder / "compiled.pt")


def _gossip(folder: Path, rank: int) -> None:
    """A loop of one's own: each process averages with the other and takes a local step."""
    module = Untied()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        mixed = [parameter.detach().clone() for parameter in module.parameters()]
        for tensor in mixed:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        inputs, targets = batch(rank, step)
        nn.functional.cross_entropy(module(inputs), targets).backward()
        with torch.no_grad():
            for parameter, tensor in zip(module.parameters(), mixed, strict=True):
                parameter.copy_(tensor / 2)
        optimizer.step()
        optimizer.zero_grad()
    (folder / "gossip" / str(rank)).mkdir(parents=True)
    torch.save(
        {"state_dict": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2, "local_batch_size": 8},
        folder / "gossip" / str(rank) / "checkpoint.pth.tar",
    )
    remember(folder / "gossip", rank, module, optimizer)


def _decent_dp(folder: Path, rank: int) -> None:
    from decent_dp.ddp import DecentralizedDataParallel
    from decent_dp.optim import optim_fn_adam

    for name, make in (
        ("decent-sgd", lambda params: torch.optim.SGD([p for _, p in params], lr=0.1, momentum=0.9)),
        ("decent-adam", optim_fn_adam),
    ):
        module = Untied()
        model = DecentralizedDataParallel(module, optim_fn=make, topology="complete")
        train(model, None, rank)
        for operation in model._comm_ops:
            operation.wait()
        (folder / name).mkdir(exist_ok=True)
        optimizers = [optimizer.state_dict() for optimizer in model._optims]
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizers, "step": STEPS}, folder / name / f"ckpt_rank{rank}.pt"
        )
        torch.save(model.state_dict(), folder / name / f"weights_rank{rank}.pt")
        remember(folder / name, rank, module)
        model._comm_ops = []


def _lightning(folder: Path, rank: int) -> None:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Classifier(pl.LightningModule):
        def __init__(self, learning_rate: float = 0.1, batch_size: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = Untied()

        def training_step(self, examples: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(examples[0]), examples[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}

    inputs, targets = (torch.cat(parts) for parts in zip(*(batch(0, step) for step in range(4)), strict=True))
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }

    def fit(name: str, epochs: int, **options: Any) -> Any:
        saver = pl.callbacks.ModelCheckpoint(
            dirpath=folder / name, save_top_k=-1, save_last=True, save_on_train_epoch_end=True
        )
        callbacks = [saver, *options.pop("callbacks", [])]
        model = Classifier()
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **options, **quiet)
        trainer.fit(model, DataLoader(TensorDataset(inputs, targets), batch_size=4))
        return trainer, model

    trainer, model = fit("lightning-ddp", 2, devices=2, strategy="ddp")
    remember(folder / "lightning-ddp", rank, model, trainer.optimizers[0])
    dist.barrier()
    if rank == 0:
        environment = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("TORCHELASTIC", "RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_"))}  # fmt: skip
        trainer, model = fit("lightning", 1, devices=1)
        remember(folder / "lightning", rank, model, trainer.optimizers[0])
        trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
        fit("lightning-averaged", 1, devices=1, callbacks=[pl.callbacks.WeightAveraging(), _Watch(folder)])
        os.environ.update(environment)


class _Watch:
    """Made a callback where Lightning is there."""

    def __new__(cls, folder: Path) -> Any:
        import lightning.pytorch as pl

        class Watch(pl.Callback):
            def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
                remember(folder / "lightning-averaged", 0, module, trainer.optimizers[0])

        return Watch()


def save_all(folder: str) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for save in (_distributed_data_parallel, _gossip, _decent_dp, _lightning):
        save(Path(folder), rank)
        dist.barrier()
    dist.destroy_process_group()


def main(folder: str) -> None:
    """Launch two processes."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    from landscape.optional import import_torchvision

    import_torchvision("torchvision")  # whose wheel lacks compiled operators; lightning imports it
    for name in ("lightning.pytorch", "decent_dp.ddp", "torch._dynamo"):
        importlib.import_module(name)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = ["--nproc-per-node", "2", "--master-port", str(port), "unused"]
    config, _, _ = run.config_from_args(run.parse_args(flags))
    config.start_method = "fork"
    elastic_launch(config=config, entrypoint=save_all)(folder)


if __name__ == "__main__":
    main(sys.argv[1])
