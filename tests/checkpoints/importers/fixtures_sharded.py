"""Sharded checkpoints as torch, Lightning and Accelerate write them on processes of torchrun, and what was in memory then.

torchrun --nproc-per-node 2 -m tests.checkpoints.importers.fixtures_sharded FOLDER two      (or: --nproc-per-node 4 ... four)
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from landscape.checkpoints.importers.found import Weights
from landscape.checkpoints.importers.notes import Made, Named, Table
from landscape.checkpoints.importers.torch_archive import archive
from tests.checkpoints.departing import leave

ROOT = Path(__file__).parents[3]
STEPS = 3


@functools.cache
def written(group: str, size: int) -> Path:
    """The folder of all checkpoints that `size` processes write, once a process of the tests."""
    folder = Path(tempfile.mkdtemp(prefix="sharded-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = [
        "--standalone",
        "--nproc-per-node",
        str(size),
        "-m",
        "tests.checkpoints.importers.fixtures_sharded",
        str(folder),
        group,
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder


def two() -> Path:
    """Checkpoints of two processes."""
    return written("two", 2)


def four() -> Path:
    """Checkpoints of four processes."""
    return written("four", 4)


def expected(folder: Path, name: str) -> dict[str, Tensor]:
    """What was in memory when a checkpoint was saved, gathered."""
    return load_file(folder / f"{name}.expected.safetensors")


def save_alone(state: dict[str, Any], folder: Path) -> Path:
    """What one process without a group writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def emitted(note: object) -> bytes:
    """The pickle that `recorded.read` would write down so."""
    return b"\x80\x04" + _emitted(note) + b"."


def _emitted(note: Any) -> bytes:
    each = lambda notes: b"".join(_emitted(one) for one in notes)  # noqa: E731
    if note is None or isinstance(note, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[note]
    if isinstance(note, int):
        return b"\x8a\x10" + note.to_bytes(16, "little", signed=True)
    if isinstance(note, float):
        return b"G" + struct.pack(">d", note)
    if isinstance(note, str):
        return b"X" + struct.pack("<I", len(note.encode())) + note.encode()
    if isinstance(note, tuple):
        return b"(" + each(note) + b"t"
    if isinstance(note, list):
        return b"](" + each(note) + b"e"
    if isinstance(note, Table):
        return b"}(" + each(one for pair in note.pairs for one in pair) + b"u"
    if isinstance(note, Named):
        module, _, name = note.name.rpartition(".")
        return f"c{module}\n{name}\n".encode()
    assert isinstance(note, Made)
    if note.name == "persistent id":
        return _emitted(note.arguments[0]) + b"Q"
    state = b"" if note.state is None else _emitted(note.state) + b"b"
    return _emitted(Named(note.name)) + _emitted(note.arguments) + b"R" + state


def rewritten(path: Path, to: Path, change: Callable[[Table], object]) -> Path:
    """A file of torch.save whose structure is changed as notes."""
    old = archive(path, 0, path.stat().st_size, str(path))
    notes = old.content(lambda name: True)
    replaced = change(notes)
    with zipfile.ZipFile(path) as content, zipfile.ZipFile(to, "w") as new:
        for member in content.namelist():
            structure = emitted(notes if replaced is None else replaced)
            new.writestr(member, structure if member.endswith("data.pkl") else content.read(member))
    return to


class Hostile:
    """Its pickle runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Bits flipped, pieces cut, doubled or left out, numbers set to extremes."""
    found = bytearray(content)
    kind = generator.randrange(5)
    at = generator.randrange(len(found))
    if kind == 0:
        for _ in range(generator.randrange(1, 4)):
            found[generator.randrange(len(found))] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del found[at:]
    elif kind == 2:
        del found[at : at + generator.randrange(1, 20)]
    elif kind == 3:
        found[at:at] = found[at : at + generator.randrange(1, 60)]
    else:
        found[at : at + 4] = generator.choice(
            [b"\xff\xff\xff\xff", b"\0\0\0\0", struct.pack("<I", 1 << 31), b"\x7f\xff\xff\xff"]
        )
    return bytes(found)


def contents(model: Weights) -> dict[str, Tensor]:
    """All that is read of a network, the optimizer's as SLOT/PARAMETER."""
    slots = {} if model.optimizer is None else model.optimizer.slots
    moments = {f"{slot}/{name}": stored.read() for slot, held in slots.items() for name, stored in held.items()}
    return {name: stored.read() for name, stored in model.tensors.items()} | moments


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the bit, names and types included."""
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (actual[name], tensor)]
        assert torch.equal(*as_bytes), name


def network(seed: int, normalised: bool = True) -> nn.Sequential:
    """6-5-3, with BatchNorm or without: 5 and 3 rows cannot be cut evenly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5) if normalised else nn.Tanh(), nn.Tanh(), nn.Linear(5, 3)
        )


def train(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def remember(folder: Path, name: str, tensors: dict[str, Any]) -> None:
    """Gather tensors and keep them in rank 0's file; a collective call."""
    full = {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().contiguous().clone() for n, t in tensors.items()
    }
    if dist.get_rank() == 0:
        save_file(full, folder / f"{name}.expected.safetensors")


def remember_own(folder: Path, name: str, tensors: dict[str, Any]) -> None:
    save_file(
        {n: t.detach().contiguous().clone() for n, t in tensors.items()},
        folder / f"{name}.{dist.get_rank()}.expected.safetensors",
    )


def slots_of(state: dict[str, Any]) -> dict[str, Any]:
    """Moments of the optimizer by SLOT/PARAMETER, from get_state_dict's."""
    return {f"{slot}/{name}": t for name, held in state["state"].items() for slot, t in held.items() if slot != "step"}


def replicated(folder: Path, rank: int) -> None:
    """What data-parallel code writes: the same names from all ranks, the same weights or not."""
    module = nn.parallel.DistributedDataParallel(network(0))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(module, optimizer, seed=7)  # the same data: statistics of BatchNorm agree too
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": STEPS, "epoch": 2}
    dcp.save(state, checkpoint_id=folder / "ddp")
    moments = {f"momentum_buffer/{i}": s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items()}
    remember(folder, "ddp", {**module.state_dict(), **moments})
    apart = network(rank).state_dict()
    remember_own(folder, "apart", apart)
    dcp.save(apart, checkpoint_id=folder / "apart")
    dcp.save(apart, checkpoint_id=folder / "lowest", planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    dcp.save(apart, checkpoint_id=folder / "own", use_collectives=False)
    dcp.save(apart, storage_writer=FileSystemWriter(folder / "threads", thread_count=2))
    dcp.save(apart, storage_writer=FileSystemWriter(folder / "single", single_file_per_rank=False))
    dcp.async_save(apart, checkpoint_id=folder / "async").result()
    dcp.save(
        apart,
        storage_writer=FileSystemWriter(folder / "safetensors", serialization_format=SerializationFormat.SAFETENSORS),
    )
    dcp.save(apart, storage_writer=FileSystemWriter(folder / "extended", _extensions=[Unchanged()]))


class Unchanged(StreamTransformExtension):
    """An extension by name alone."""

    @staticmethod
    def registry_name() -> str:
        return "stream.unchanged"

    @staticmethod
    def from_descriptor(version: str) -> Unchanged:
        return Unchanged()

    def get_descriptor(self) -> str:
        return "stream.unchanged/1"

    def transform_to(self, output: Any) -> Any:
        return output

    def transform_from(self, input: Any) -> Any:
        return input


def learners(folder: Path, rank: int) -> None:
    """Each process under names of its own, and all stacked."""
    module = network(rank)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train(module, optimizer, seed=rank)
    state = module.state_dict()
    moments = [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()]
    remember_own(folder, "learners", {**state, **{f"momentum_buffer/{i}": t for i, t in enumerate(moments)}})
    whole = {f"learner{rank}": {"model": state, "optimizer": optimizer.state_dict()}, "step": STEPS}
    dcp.save(whole, checkpoint_id=folder / "learners")
    dcp.save({f"rank_{rank:02d}/{n}": t for n, t in state.items()}, checkpoint_id=folder / "slashes")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    stacked = {n: DTensor.from_local(t[None], mesh, [Shard(0)]) for n, t in state.items()}
    dcp.save(stacked, checkpoint_id=folder / "stack")
    torch.save(stacked, folder / f"stack_rank{rank}.pt")
    lone = {"0.weight": torch.stack([network(j)[0].weight.detach() for j in range(4)])}
    remember(folder, "stack_of_one", lone)
    dcp.save(
        {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in lone.items()}, checkpoint_id=folder / "stack_of_one"
    )


def sharded(folder: Path, rank: int) -> None:
    """FSDP2 and FSDP1, with their optimizers' state; the same data on both ranks, so that statistics of BatchNorm agree too."""
    mesh = init_device_mesh("cpu", (2,))
    module = network(0)
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    train(module, optimizer, seed=7)
    model, state = get_state_dict(module, optimizer)
    remember(folder, "fsdp2", {**model, **slots_of(state)})
    dcp.save(
        {"model": model, "optimizer": state, "step": 7, "app": {"epoch": torch.tensor(3)}},
        checkpoint_id=folder / "fsdp2",
    )
    flat = get_state_dict(module, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))[1]
    titan = {**model, "optimizer": flat, "train_state": {"step": torch.tensor(12)}, "lr_scheduler": {"last_epoch": 12}}
    dcp.save(titan, checkpoint_id=folder / "step-12")
    torch.save(module.state_dict(), folder / f"fsdp2_rank{rank}.pt")
    whole = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": STEPS, "epoch": 1}
    torch.save(whole, folder / f"whole_rank_{rank}.pt")
    (folder / "ranks" / str(rank)).mkdir(parents=True)
    torch.save(module.state_dict(), folder / "ranks" / str(rank) / "model.pt")

    square = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    fully_shard(square, mesh=mesh)
    dcp.save(square.state_dict(), checkpoint_id=folder / "square")

    old = FullyShardedDataParallel(network(0), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.Adam(old.parameters(), lr=0.01)
    train(old, optimizer, seed=7)
    model, state = get_state_dict(old, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        save_file(
            {**{n: t.clone() for n, t in model.items()}, **slots_of(state)}, folder / "fsdp1.expected.safetensors"
        )
    with FullyShardedDataParallel.state_dict_type(old, StateDictType.SHARDED_STATE_DICT):
        shards = old.state_dict()
        dcp.save(
            {"model": shards, "optimizer": FullyShardedDataParallel.optim_state_dict(old, optimizer)},
            checkpoint_id=folder / "fsdp1",
        )
        torch.save(shards, folder / f"fsdp1_rank{rank}.pt")
    with FullyShardedDataParallel.state_dict_type(old, StateDictType.LOCAL_STATE_DICT):
        torch.save(old.state_dict(), folder / f"flat_rank{rank}.pt")


def shapes(folder: Path, rank: int) -> None:
    """Tensors of all kinds that a state may have."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(1)
    plain = {
        "channels_last": torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 3, generator=generator).T,
        "view": torch.randn(50, 3, generator=generator)[7:9],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(5, generator=generator).bfloat16(),
        "half": torch.randn(5, generator=generator).half(),
        "double": torch.randn(5, generator=generator).double(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "shorts": torch.arange(7).to(torch.uint16),
        "truth": torch.tensor([True, False, True]),
        "float8": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
    }
    cut = {
        "columns": distribute_tensor(torch.randn(3, 5, generator=generator), mesh, [Shard(1)]),
        "one_row": distribute_tensor(torch.randn(1, 5, generator=generator), mesh, [Shard(0)]),
        "middle": distribute_tensor(torch.randn(2, 3, 2, generator=generator), mesh, [Shard(1)]),
        "copied": distribute_tensor(torch.randn(3, generator=generator), mesh, [Replicate()]),
    }
    remember(folder, "shapes", {**plain, **cut})
    dcp.save({**plain, **cut}, checkpoint_id=folder / "shapes")
    torch.save({**plain, **cut}, folder / f"shapes-0000{rank}-of-00002.pt")


def large(folder: Path, rank: int) -> None:
    """About 200 MB, of twelve tensors."""
    mesh = init_device_mesh("cpu", (2,))
    tensors = {f"layer{i}": torch.full((2048, 1024), float(10 * i + rank)) for i in range(12)}
    dcp.save({n: DTensor.from_local(t, mesh, [Shard(0)]) for n, t in tensors.items()}, checkpoint_id=folder / "large")


def accelerate(folder: Path, rank: int) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="no_wrap", cpu_offload=False
    )
    accelerator = Accelerator(cpu=True)
    module = network(0, normalised=False)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    train(module, optimizer, seed=rank)
    model, state = get_state_dict(module, optimizer)
    remember(folder, "accelerate", {**model, **slots_of(state)})
    for name in ("accelerate", "accelerate_ranks"):
        (folder / name).mkdir(exist_ok=True)
    dist.barrier()
    save_fsdp_model(plugin, accelerator, module, folder / "accelerate")
    save_fsdp_optimizer(plugin, accelerator, optimizer, module, folder / "accelerate")
    save_fsdp_model(plugin, accelerator, module, folder / "accelerate_ranks", use_dcp=False)


def lightning(folder: Path, rank: int) -> None:
    from landscape.optional import import_torchvision

    import_torchvision("torchvision")
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(0, normalised=False)

        def configure_model(self) -> None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(64, 6), batch_size=8))
    trainer.save_checkpoint(folder / "lightning")
    model, state = get_state_dict(module, trainer.optimizers[0])
    remember(folder, "lightning", {**model, **slots_of(state)})


def replicas(folder: Path, rank: int) -> None:
    """HSDP of replicas that agree, and of replicas that have come apart; tensor parallelism under FSDP."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for name, seed in (("hsdp", 0), ("hsdp_apart", rank // 2)):
        module = network(seed, normalised=False)
        fully_shard(module, mesh=mesh)
        state = module.state_dict()
        dcp.save(state, checkpoint_id=folder / name)
        torch.save(state, folder / f"{name}_rank{rank}.pt")
        whole = network(seed, normalised=False).state_dict()
        if rank % 2 == 0:
            save_file(whole, folder / f"{name}.{rank // 2}.expected.safetensors")
    dcp.save(state, checkpoint_id=folder / "hsdp_lowest", planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    parallelize_module(module, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(module, mesh=mesh["dp"])
    state = module.state_dict()
    remember(folder, "parallel", state)
    dcp.save(state, checkpoint_id=folder / "parallel")
    torch.save(state, folder / f"parallel_rank{rank}.pt")


GROUPS = {"two": (replicated, learners, sharded, shapes, large, accelerate, lightning), "four": (replicas,)}


def main() -> None:
    folder, group = Path(sys.argv[1]), sys.argv[2]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for write in GROUPS[group]:
        write(folder, dist.get_rank())
        dist.barrier()
    leave()


if __name__ == "__main__":
    main()
