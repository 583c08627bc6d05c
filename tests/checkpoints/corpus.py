"""A small whole checkpoint of each format, to be damaged: written in one process, by the real library where it is light."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from landscape import save_learner


def network(seed: int = 0) -> nn.Module:
    """BatchNorm and two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """After one step of Adam."""
    made = network(seed)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    made(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    return made, optimizer


def _plain(folder: Path) -> None:
    made, optimizer = trained()
    state = {f"module.{n}": t for n, t in made.state_dict().items()}
    torch.save(
        {"model": state, "optimizer": optimizer.state_dict(), "step": 7, "args": argparse.Namespace(lr=0.1)},
        folder / "model.pt",
    )


def _legacy(folder: Path) -> None:
    torch.save(network().state_dict(), folder / "model.pt", _use_new_zipfile_serialization=False)


def _lightning(folder: Path) -> None:
    made, optimizer = trained()
    state = {f"net.{n}": t for n, t in made.state_dict().items()}
    torch.save(
        {"epoch": 1, "global_step": 7, "pytorch-lightning_version": "2.6.6", "state_dict": state, "loops": {"fit_loop": {"state_dict": {}}},
         "callbacks": {}, "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [], "hyper_parameters": {"lr": 0.1}},
        folder / "epoch=1-step=7.ckpt",
    )  # fmt: skip


def _decent_dp(folder: Path) -> None:
    torch.save({f"_model.{n}": t for n, t in network().state_dict().items()}, folder / "model_rank0.pt")
    torch.save({f"_model.{n}": t for n, t in network(1).state_dict().items()}, folder / "model_rank1.pt")


def _ranks(folder: Path) -> None:
    for rank in range(3):
        (folder / str(rank)).mkdir()
        torch.save({"state_dict": network(rank).state_dict(), "epoch": 3}, folder / str(rank) / "checkpoint.pth.tar")


def _sgp(folder: Path) -> None:
    for rank in range(2):
        state = {
            "state_dict": network(rank).state_dict(),
            "ps_weight": torch.tensor([0.5 + rank]),
            "is_ps_numerator": True,
        }
        torch.save({"state_dict": state, "epoch": 3, "itr": 5}, folder / f"checkpoint_r{rank}_n2.pth.tar")


def _dcp(folder: Path) -> None:
    made, optimizer = trained()
    state = {"model": made.state_dict(), "optimizer": optimizer.state_dict(), "step": 7}
    _save_dcp(state, folder / "dcp")


def _save_dcp(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of there being no other process
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def _dcp_learners(folder: Path) -> None:
    state = {f"learner{j}": network(j).state_dict() for j in range(3)}
    _save_dcp(state, folder / "dcp")


def _fsdp(folder: Path) -> None:
    full = network().state_dict()
    for rank in range(2):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        mesh = init_device_mesh("cpu", (2,))
        state: dict[str, Any] = {}
        for name, tensor in full.items():
            parts = tensor.chunk(2) if tensor.ndim else ()
            state[name] = (
                tensor
                if not tensor.ndim
                else DTensor.from_local(parts[rank].clone(), mesh, [Shard(0)], run_check=False)
            )
        torch.save(state, folder / f"shard_rank{rank}.pt")
        dist.destroy_process_group()


def _safetensors(folder: Path) -> None:
    safetensors.torch.save_file(network().state_dict(), folder / "model.safetensors", {"format": "pt", "step": "7"})


def _safetensors_sharded(folder: Path) -> None:
    state = network().state_dict()
    names = list(state)
    where = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        safetensors.torch.save_file({n: state[n] for n in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "architectures": ["Mine"]}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7, "epoch": 1.0, "train_batch_size": 8}))


def _accelerate(folder: Path) -> None:
    made, optimizer = trained()
    safetensors.torch.save_file(made.state_dict(), folder / "model.safetensors", {"format": "pt"})
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save({"last_epoch": 7, "_step_count": 8}, folder / "scheduler.bin")
    for rank in range(2):
        torch.save({"step": 7, "torch_manual_seed": torch.get_rng_state()}, folder / f"random_states_{rank}.pkl")


def _deepspeed(folder: Path) -> None:
    (folder / "latest").write_text("global_step7")
    tag = folder / "global_step7"
    tag.mkdir()
    made = network()
    shapes = [{n: p.shape for n, p in made.named_parameters()}]
    torch.save(
        {"module": made.state_dict(), "buffer_names": [n for n, _ in made.named_buffers()], "optimizer": None, "param_shapes": shapes,
         "frozen_param_shapes": None, "lr_scheduler": None, "global_steps": 7, "global_samples": 56, "dp_world_size": 2, "mp_world_size": 1,
         "ds_config": {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}, "ds_version": "0.19.8"},
        tag / "mp_rank_00_model_states.pt",
    )  # fmt: skip
    for rank in range(2):
        torch.save({"optimizer_state_dict": {"zero_stage": 1}}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _series(folder: Path) -> None:
    for step in (5, 10):
        torch.save(network(step).state_dict(), folder / f"model_step{step}.pt")


def _run_format(folder: Path) -> None:
    made, optimizer = trained()
    save_learner(folder / "run", step=7, model=made, optimizer=optimizer, rank=0, world_size=1)


CORPUS: dict[str, Callable[[Path], None]] = {
    "plain": _plain,
    "legacy": _legacy,
    "lightning": _lightning,
    "decent-dp": _decent_dp,
    "rank files": _ranks,
    "SGP": _sgp,
    "DCP": _dcp,
    "DCP of learners": _dcp_learners,
    "FSDP rank files": _fsdp,
    "safetensors": _safetensors,
    "safetensors, sharded": _safetensors_sharded,
    "Accelerate": _accelerate,
    "DeepSpeed": _deepspeed,
    "series": _series,
    "run format": _run_format,
}
"""Writes a checkpoint into an empty folder, by format."""


def place_of(folder: Path) -> Path:
    """What a user would name: the folder, or the one folder or file in it."""
    held = list(folder.iterdir())
    return held[0] if len(held) == 1 else folder
