"""One file of torch.save, as training scripts write it: a table of tensors, or a dictionary with one in it; or several learners' together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import decent_dp, fsdp, learners_file, lightning, push_sum, torch_file
from landscape.checkpoints.importers.file_names import parse
from landscape.checkpoints.importers.found import Found, Kind
from landscape.checkpoints.importers.torch_optimizer import optimizer_state
from landscape.checkpoints.importers.training_state import State, found_keys, state_of

__all__ = ["FORMAT", "find", "interpret", "optimizer_state"]

FORMAT = "torch.save"
BY_NAME, ALONE = "by its name it is what rank", "it holds one network, as one process saved it"
"""How reasons begin that are said of a file on its own, not of one among those of all ranks."""


def find(path: Path) -> Found | None:
    """What one file of torch.save is; None if it is no such file.

    Raises:
        CheckpointError: it is damaged, holds no weights, or types that are not made here; the message names them and says what to do.
    """
    if not torch_file.is_torch_file(path):
        return None
    return fsdp.find([path]) or interpret(torch_file.load(path), path)


def interpret(content: Any, path: Path) -> Found:
    """The same of what the file holds."""
    for reader in (lightning, push_sum, learners_file):
        found: Found | None = reader.interpret(content, path)  # type: ignore[attr-defined]
        if found is not None:
            return found
    state = state_of(content, path, str(path))
    if state is None:
        raise CheckpointError(
            f"{path} holds no weights that can be told to be a network's: at its top is {found_keys(content)}. Save the network's alone: "
            "torch.save(model.state_dict(), 'weights.pt')"
        )
    return decent_dp.interpret(state, path) or _found(state, path)


def _found(state: State, path: Path) -> Found:
    kind: Kind = "average" if state.averaged else "one model"
    facts = dict(state.facts)
    return Found(
        path=path,
        format=FORMAT,
        kind=kind,
        models=(state.weights,),
        reasons=(*_reasons(list(state.weights.tensors), path), *([state.averaged] if state.averaged else [])),
        step=state.step,
        facts=facts,
        notes=state.notes,
    )


def _reasons(names: Sequence[str], path: Path) -> tuple[str, ...]:
    """What can be known of whose weights these are."""
    name = parse(path.name)
    reasons = []
    if name.rank is not None:
        of = f" of {name.size}" if name.size else ""
        reasons.append(f"{BY_NAME} {name.rank}{of} saved; if the processes had come apart, it is that learner's alone")
    if all(n.startswith(("module.", "_orig_mod.module.")) or n == "n_averaged" for n in names):
        reasons.append(
            "its names begin with module., which DistributedDataParallel puts there, whose processes all have the same weights, to rounding (statistics of "
            "BatchNorm are one process's); but DataParallel and wrappers for gossip put it too, and then it is the weights of the process that saved it"
        )
    elif name.rank is None:
        reasons.append(f"{ALONE}; whether others trained with it, and had the same weights, is not recorded")
    if any("_orig_mod." in n for n in names):
        reasons.append("the network was compiled (_orig_mod.), which changes names only")
    return tuple(reasons)
