"""Checkpoints that accelerate, transformers, deepspeed and torch.distributed.checkpoint's Hugging Face writer save on two processes.

    python -m tests.checkpoints.importers.fixtures_c FOLDER

launches them as torchrun does, but forked from a process that has imported everything once. Beside each, NAME.expected.pt holds what was in memory.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from landscape.checkpoints.importers.found import Stored
from tests.checkpoints.importers import once

ROOT = Path(__file__).parents[3]


def network(seed: int = 0, normalised: bool = True) -> nn.Sequential:
    """Two layers, with BatchNorm between them or not; 7 rows and 5 cannot be cut evenly in two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(3, 7), nn.BatchNorm1d(7) if normalised else nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 2)
        )


def written() -> Path:
    """The folder of all checkpoints."""
    return once.written("tests.checkpoints.importers.fixtures_c")


def expected(name: str) -> dict[str, Any]:
    """What was in memory when a checkpoint was saved."""
    return torch.load(written() / f"{name}.expected.pt", weights_only=True)


class Hostile:
    """What runs a command when it is unpickled: it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def assert_same(tensors: Mapping[str, Stored], saved: Mapping[str, torch.Tensor]) -> None:
    """The tensors on disk are those that were in memory, bit by bit, and are announced as what they are."""
    assert sorted(tensors) == sorted(saved)
    for name, stored in tensors.items():
        read = stored.read()
        assert (stored.shape, stored.dtype) == (read.shape, read.dtype) == (saved[name].shape, saved[name].dtype)
        assert (
            read.contiguous().view(-1).view(torch.uint8).equal(saved[name].contiguous().view(-1).view(torch.uint8))
        ), name


def _remember(folder: Path, name: str, **content: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(content, folder / f"{name}.expected.pt")


def _batch(rank: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))


def _accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    for name, safe in (("accelerate", True), ("accelerate-bin", False)):
        accelerator = Accelerator(cpu=True)
        module = network()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        model, optimizer, scheduler = accelerator.prepare(module, optimizer, scheduler)
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(model(_batch(accelerator.process_index)).square().mean())
            optimizer.step()
            scheduler.step()
        accelerator.register_for_checkpointing(nn.Linear(1, 1))
        accelerator.save_state(str(folder / name), safe_serialization=safe)
        state = optimizer.state_dict()
        moments = {
            slot: [state["state"][i][slot] for i in range(len(state["state"]))] for slot in ("exp_avg", "exp_avg_sq")
        }
        _remember(
            folder,
            name,
            weights=accelerator.unwrap_model(model).state_dict(),
            lr=state["param_groups"][0]["lr"],
            **moments,
        )


def _deepspeed(folder: Path) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # so that it compiles none
    for stage, half in ((0, False), (1, False), (2, False), (3, False), (1, True)):
        name = f"deepspeed-{stage}{'-bf16' if half else ''}"
        module = network(normalised=not half)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
            "gradient_accumulation_steps": 2, "bf16": {"enabled": half}, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        if stage == 2:
            config["optimizer"] = {"type": "Adam", "params": {"lr": 0.1, "betas": [0.8, 0.9], "torch_adam": True}}
        given = None if stage == 2 else torch.optim.Adam(module.parameters(), lr=0.1)
        if stage == 0:
            module[3].bias.requires_grad_(False)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=given, model_parameters=module.parameters(), config=config, dist_init_required=False
        )
        for _ in range(6):
            inputs = _batch(dist.get_rank())
            engine.backward(engine(inputs.bfloat16() if half else inputs).float().square().mean())
            engine.step()
        engine.save_checkpoint(str(folder / name), client_state={"epoch": 4})
        if stage < 3:
            _remember(folder, name, weights=engine.module.state_dict())
        engine.destroy()


def _hugging_face_writer(folder: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def save(name: str, state: dict[str, Any], **options: Any) -> None:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder / name), save_distributed=True, **options))

    model = fully_shard(network(1), mesh=init_device_mesh("cpu", (2,)))
    model(_batch(dist.get_rank())).square().mean().backward()
    sharded = get_model_state_dict(model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    statistics: list[Any] = [None, None]
    dist.all_gather_object(
        statistics, {name: tensor for name, tensor in sharded.items() if name.startswith("1.running")}
    )
    _remember(folder, "writer", weights=whole, statistics=statistics)
    save("writer", dict(sharded))
    save("writer-files", dict(sharded), fqn_to_index_mapping={name: 1 + i % 2 for i, name in enumerate(sharded)})
    floating = {name: tensor for name, tensor in sharded.items() if tensor.is_floating_point()}
    save("writer-joined", {**floating, "scale": torch.tensor(2.0)}, enable_consolidation=True)
    rank = dist.get_rank()
    save("writer-replicas", {name: tensor.detach().clone() for name, tensor in network(rank).state_dict().items()})
    save("writer-learners", {f"learner{rank}": network(rank).state_dict()})
    if rank == 0:
        dcp.save(dict(whole), storage_writer=HuggingFaceStorageWriter(str(folder / "writer-whole")), no_dist=True)


def _transformers(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    examples = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(0, 50, (32, 8))]
    arguments = TrainingArguments(
        str(folder / "trainer"), per_device_train_batch_size=4, max_steps=3, save_steps=3, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, ddp_backend="gloo",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    _remember(folder, "trainer", weights=model.state_dict())
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "pretrained")
        model.save_pretrained(folder / "pretrained-shards", max_shard_size="10KB")
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_all(folder: str) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    for save in (_accelerate, _transformers, _hugging_face_writer, _deepspeed):
        save(Path(folder))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: str) -> None:
    """Launch two processes."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    from landscape.optional import import_torchvision

    import_torchvision("torchvision")  # whose wheel lacks compiled operators; transformers imports it
    for name in ("accelerate", "deepspeed", "transformers.trainer", "transformers.models.gpt2", "torch._dynamo"):
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
