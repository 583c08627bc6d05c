"""The recorder: one line in anybody's own training loop keeps the weights of every process, in the run format.

    ls.save_learner("runs/mine", step=step, model=model, optimizer=optimizer)

Every process writes the learner that it has; there is no process group, no collective and no waiting, see `landscape.checkpoints.marks`.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from landscape.autodiff import unwrap
from landscape.checkpoints.assemble import MOMENTS
from landscape.checkpoints.format import (
    CHECKPOINTS,
    FORMAT_VERSION,
    RUN_FILE,
    seal,
    step_name,
    unseal,
    write_atomically,
)
from landscape.checkpoints.marks import deliver, is_there, restore_replaced, would_write
from landscape.checkpoints.process import Process, this_process, warn_once
from landscape.checkpoints.writer import LearnerTensors, told
from landscape.functional import ParameterLayout
from landscape.provenance import provenance
from landscape.ranks import current, launched
from landscape.training.config import TrainConfig
from landscape.training.topology import Topology
from landscape.training.topology import topology as make_topology

ASSUMED_LEARNING_RATE = 0.1
"""Stands in the configuration, listed as assumed, where neither the optimizer nor the caller tells a rate."""
CONFIGURED = (
    "algorithm", "order", "topology", "gamma", "learning_rate", "local_batch_size", "seed", "momentum", "dampening", "nesterov", "weight_decay",
)  # fmt: skip
"""What run.json's configuration may learn from the caller or the optimizer; the others of these are listed as assumed."""
IDENTITY = ("task", "algorithm", "order", "topology", "seed")
"""What a run does not change on its way."""
SETTINGS = {"lr": "learning_rate", "momentum": "momentum", "dampening": "dampening", "nesterov": "nesterov", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}  # fmt: skip
"""Of an optimizer's groups: torch's names, and ours."""


def save_learner(
    directory: str | Path,
    *,
    step: SupportsIndex,
    model: nn.Module,
    optimizer: Any = None,
    rank: int | None = None,
    world_size: int | None = None,
    task: str | None = None,
    algorithm: str | None = None,
    order: str | None = None,
    topology: str | None = None,
    learning_rate: float | int | None = None,
    local_batch_size: SupportsIndex | None = None,
    seed: int | None = None,
) -> Path:
    """Write this process's learner into a run directory; the checkpoint appears when all processes have written theirs.

    Every process calls this with the same directory and steps, without waiting for the others. A checkpoint appears whole or not at all: if a
    process dies while it saves, that step does not appear, and earlier ones are untouched. Saving a step again does no harm: in the same
    process it must be the same weights; what an earlier job saved there is replaced. Where one process has all there is to keep (DDP: all have
    the same weights), let that one save, with rank=0, world_size=1; where it has several learners, let it save one after another, each as its
    own rank.

    The model, the optimizer and the random state are left alone. Nothing is sent between processes; those with a process group look up one
    word in its store, so that what a killed job left is never taken for this one's. Without one, files tell by their dates
    (`landscape.checkpoints.marks` has the exact guarantee). All processes must have begun before the first of them saves.

    What is not told here can be told later: `landscape import DIRECTORY --task ... --out RUN` makes a run that can be measured.

    Args:
        directory: the run directory, one folder for all processes.
        step: steps taken; an integer of Python, numpy or a tensor, as is local_batch_size.
        model: the network; DDP, DataParallel and torch.compile are taken off.
        optimizer: a torch optimizer, or one that is built like it: momentum buffers and Adam's moments of the model's parameters are kept,
            and its settings. Of a ZeroRedundancyOptimizer, whose state is in parts, only the settings.
        rank: this process; by default torch.distributed's rank if it is set up, else torchrun's RANK, else 0.
        world_size: how many processes save; likewise, else 1.
        task: whose network and data these are, for `landscape measure`: a name or "module:function".
        algorithm: how they are trained, see `TrainConfig`; if not told, assumed to be ssgd for one learner or under DDP, else dpsgd.
        order: DPSGD's: awc, atc or cta.
        topology: who mixes with whom: a name or a file, as for `landscape train`.
        learning_rate: alpha of the step that follows; by default the optimizer's (of its largest group).
        local_batch_size: B, examples a learner a step.
        seed: seed of M(t), if it is one of landscape's own topologies that vary.

    Returns:
        where the checkpoint is, or will be once the other processes have saved.

    Raises:
        ValueError: a model that is no module, or has no trained parameters or none with shapes yet; parameters that are shards (FSDP: save with torch.distributed.checkpoint, and import that); another run in `directory`;
            processes with other networks, types or steps than others, or with the same rank, which are named; facts that are not possible.
        OSError: it could not be written.

    Cost: one pass over the tensors, which are hashed and written as they are, one at a time on the host, and an fsync for each file
    (`tests/benchmarks/results/recorder_cpu.json` has times beside torch.save).
    """
    me = this_process(*_place(rank, world_size))
    step = _whole_number("step", step)
    if step < 0:
        raise ValueError(f"step must not be negative, not {step}")
    if local_batch_size is not None:
        local_batch_size = _whole_number("local_batch_size", local_batch_size)
    network = _whole(_module(model))
    _check_trained(network)
    settings, slots = _optimizer_state(network, optimizer)
    facts = {"task": task, "algorithm": algorithm, "order": order, "topology": topology, "learning_rate": learning_rate, "local_batch_size": local_batch_size, "seed": seed}  # fmt: skip
    given = {name: value for name, value in facts.items() if value is not None}
    given |= {} if learning_rate is None else {"learning_rate": float(learning_rate)}
    default = "ssgd" if me.count == 1 or isinstance(model, nn.parallel.DistributedDataParallel) else "dpsgd"
    config, assumed = _configuration({**settings, **given}, default, me.count, network)
    graph = _topology(config.topology, me.count)
    tensors = LearnerTensors(_weights(network), slots.pop("momentum_buffer", None), slots)
    out, saved = Path(directory), _saved(me.named("rank"), str(Path(directory).absolute()))
    final = out / CHECKPOINTS / step_name(step)
    if saved.get(step) and is_there(final.parent, me, step):
        with told(f"the checkpoint of step {step}", final):
            same = would_write(final.parent, me, tensors, step) == saved[step]
        if not same:
            raise ValueError(f"this process has saved step {step} in {out} already, with other weights; tell the step that this is, or choose another directory")  # fmt: skip
        return final
    with told(f"the checkpoint of step {step}", final):
        _check_run(out, me, network, given, first=not saved)
        if me.rank == 0:
            if not saved and final.parent.is_dir():
                restore_replaced(final.parent)
            if not (out / RUN_FILE).is_file():
                _write_run(out, me, network, config, graph, given, settings, assumed)
        record = _record(step, me, network, tensors, {**settings, **given}, graph)
        tried = [*saved]
        saved[step] = {}
        saved[step] = deliver(final.parent, me, tensors, record, tried)
    return final


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    here = current() if dist.is_available() and dist.is_initialized() else launched()
    rank, count = here.rank if rank is None else rank, here.size if world_size is None else world_size
    if not 0 <= rank < count:
        raise ValueError(f"rank {rank} is not one of {count} processes; give rank= and world_size= that fit together")
    return rank, count


def _whole_number(name: str, value: object) -> int:
    """An integer, also of numpy or of a tensor of one entry."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be a whole number (an int), not {str(value)[:100]}") from None


def _module(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    hint = " (a state_dict does not tell which of its tensors are parameters)" if isinstance(model, Mapping) else ""
    raise ValueError(f"model must be the network itself, a torch.nn.Module, not {type(model).__name__}{hint}")


def _check_trained(network: nn.Module) -> None:
    """Refuse a network that has no weights to keep."""
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        raise ValueError("the network has lazy modules, whose tensors have no shapes yet; call it on a batch before it is saved")  # fmt: skip
    if not any(p.requires_grad and p.is_floating_point() for p in network.parameters()):
        raise ValueError("the network has no floating-point parameters that require a gradient, so there is no learner to save")  # fmt: skip


@functools.cache
def _saved(name: str, directory: str) -> dict[int, dict[str, Any]]:
    """What a process has saved in a directory as one of its ranks: files by step, none for a step where it failed."""
    return {}


@functools.cache
def _topology(name: str, count: int) -> Topology:
    return make_topology(name, count)


def _whole(model: nn.Module) -> nn.Module:
    """The network without wrappers, if each process has all of it."""
    shards = (
        "its parameters are shards, of which no process has a whole network; save it with torch.distributed.checkpoint.save (or, under "
        "DeepSpeed, save_checkpoint), and `landscape import` reads that"
    )
    try:
        network = unwrap(model)
    except ValueError:
        raise ValueError(shards) from None
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in network.modules())
    if wrapped or any(hasattr(p, "ds_tensor") or getattr(p, "_fsdp_flattened", False) or hasattr(p, "_local_shard") for p in network.parameters()):  # fmt: skip
        raise ValueError(shards)
    return network


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of the state_dict, and parameters that hooks took out of it."""
    stored = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    return {**{name: p for name, p in network.named_parameters() if name not in stored}, **stored}


def _record(step: int, me: Process, network: nn.Module, tensors: LearnerTensors, facts: Mapping[str, Any], graph: Topology) -> dict[str, Any]:  # fmt: skip
    """What state.json says, but for the files."""
    layout = ParameterLayout.of(network)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    mixing = {"mixing": graph.matrix(facts.get("seed", 0), step).tolist()} if facts.get("order") == "cta" and "topology" in facts else {}  # fmt: skip
    return {
        "step": step,
        "num_learners": me.count,
        "parameters": [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes, strict=True)],
        "types": [[name, str(t.dtype).removeprefix("torch.")] for name, t in tensors.weights.items()],
        "buffers": sorted(name for name, _ in network.named_buffers() if name in tensors.weights),
        "momentum": tensors.momentum is not None,
        "moments": [name for name in MOMENTS if name in tensors.moments],
        **({"frozen": frozen} if frozen else {}),
        **{name: value for name, value in facts.items() if name not in ("task", "topology", "momentum")},
        **mixing,
    }


def _optimizer_state(network: nn.Module, optimizer: Any) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Settings, and state by parameter name, of the network's trained parameters."""
    if optimizer is None:
        return {}, {}
    names = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
    groups = [g for g in getattr(optimizer, "param_groups", []) if any(id(p) in names for p in g["params"])]
    if not groups:
        warn_once(f"{type(optimizer).__name__} has none of the model's parameters; nothing of it is recorded", stacklevel=3)  # fmt: skip
        return {}, {}
    largest = max(groups, key=lambda group: sum(p.numel() for p in group["params"]))
    settings = {ours: _plain(largest[theirs]) for theirs, ours in SETTINGS.items() if theirs in largest}
    settings = {name: float(value) if type(value) is int else value for name, value in settings.items() if value is not None}  # fmt: skip
    rates = [_plain(group.get("lr")) for group in groups]
    if len(set(rates)) > 1:
        settings["learning_rates"] = rates
    settings["optimizer"] = type(optimizer).__name__
    parts = any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
    state = getattr(optimizer, "state", None)
    if parts or not isinstance(state, Mapping):
        warn_once(f"the state of {type(optimizer).__name__} is not this process's alone, or not as torch.optim's; only its settings are recorded", stacklevel=3)  # fmt: skip
        return settings, {}
    held = {names[id(p)]: (p, state[p]) for group in groups for p in group["params"] if id(p) in names and p in state}
    slots = {}
    for slot in ("momentum_buffer", *MOMENTS):
        found = {
            name: each[slot]
            for name, (p, each) in held.items()
            if isinstance(each.get(slot), Tensor) and each[slot].shape == p.shape and "square_avg" not in each  # RMSprop's is another
        }  # fmt: skip
        if found:
            slots[slot] = found
    steps = [_plain(each.get("step")) for _, each in held.values()]
    counted = [int(value) for value in steps if isinstance(value, int | float)]
    return settings | ({"optimizer_step": max(counted)} if counted else {}), slots


def _plain(value: Any) -> Any:
    """A setting as JSON holds it; None for what is none."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float) and math.isfinite(value) else None


# run.json ------------------------------------------------------------------------------------------------------------


def _configuration(known: Mapping[str, Any], algorithm: str, count: int, network: nn.Module) -> tuple[TrainConfig, list[str]]:  # fmt: skip
    """The configuration with what is known, and which of CONFIGURED is assumed."""
    values = {name: known[name] for name in CONFIGURED if name in known}
    if values.get("learning_rate") == 0:  # at the foot of a warm-up
        del values["learning_rate"]
    if values.get("nesterov") and "momentum" not in values:  # a switch of NAdam and the like
        del values["nesterov"]
    assumed = [name for name in CONFIGURED if name not in values]
    defaults = {"algorithm": algorithm, "learning_rate": ASSUMED_LEARNING_RATE}
    dtype: Literal["float32", "float64"] = "float64" if next(network.parameters()).dtype == torch.float64 else "float32"
    return TrainConfig(**{**defaults, **values}, num_learners=count, dtype=dtype), assumed


def _check_run(out: Path, me: Process, network: nn.Module, given: Mapping[str, Any], *, first: bool) -> None:
    """Refuse to write into a run that is another."""
    if not first or not (out / RUN_FILE).is_file():
        return
    record = unseal(out / RUN_FILE)
    if "recorded" not in record:
        raise ValueError(f"{out} holds a run that landscape trained or imported; choose another directory")
    mine = {"num_learners": me.count, "num_parameters": ParameterLayout.of(network).num_parameters, **{k: v for k, v in given.items() if k in IDENTITY}}  # fmt: skip
    theirs = {**record["recorded"]["given"], "num_learners": record["config"]["num_learners"], "num_parameters": record["num_parameters"]}  # fmt: skip
    for name, value in mine.items():
        if name in theirs and theirs[name] != value:
            raise ValueError(f"{out} holds a run with {name} {theirs[name]}, and rank {me.rank} has {value}; give all ranks the same, or choose another directory")  # fmt: skip


def _write_run(
    out: Path, me: Process, network: nn.Module, config: TrainConfig, graph: Topology, given: Mapping[str, Any],
    settings: Mapping[str, Any], assumed: list[str],
) -> None:  # fmt: skip
    """run.json: what is known of the run, who told it, and what is assumed."""
    device = next(network.parameters()).device
    record = {
        "format": "landscape-run",
        "format_version": FORMAT_VERSION,
        "task": given.get("task", ""),
        "config": config.to_json(),
        "topology": {**graph.summary(), "matrices": graph.matrices.tolist()},
        "data": {"name": "unknown", "fingerprint": {"train": None, "test": None}},
        "num_parameters": ParameterLayout.of(network).num_parameters,
        "num_processes": max(me.count, current().size, launched().size),
        "provenance": provenance(device),
        "recorded": {"given": dict(given), "optimizer": dict(settings)},
        "assumed": assumed,
        "status": "recorded",
    }
    out.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(out / RUN_FILE, seal(json.loads(json.dumps(record))))
    except FileNotFoundError:  # another process that is rank 0 too was faster, of which the marks will tell
        if not (out / RUN_FILE).is_file():
            raise
