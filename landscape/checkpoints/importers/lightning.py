"""Lightning's `.ckpt`: a dictionary of torch.save that tells the version, steps and epochs, with the LightningModule's state_dict.

Rank 0 writes it; DDP's `module.` is not in its names. With the callback WeightAveraging (and EMAWeightAveraging) "state_dict" is the average and the
weights of the step are under "current_model_state", which are what is read here.
"""

from __future__ import annotations

from pathlib import Path

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.found import Found, Weights
from landscape.checkpoints.importers.loaded import count, entries, facts_in, has_tensors, number, rate_in
from landscape.checkpoints.importers.torch_optimizer import optimizer_state

VERSION = "pytorch-lightning_version"


def interpret(content: object, path: Path) -> Found | None:
    """A checkpoint of Lightning's Trainer; None if it is none.

    Raises:
        CheckpointError: its weights are missing or cannot be read.
    """
    table = entries(content)
    version = table.get(VERSION)
    if not isinstance(version, str):
        return None
    notes: list[str] = []
    averaged = has_tensors(table.get("current_model_state"))
    weights = table.get("current_model_state" if averaged else "state_dict")
    if not has_tensors(weights):
        raise CheckpointError(f"{path} is a checkpoint of Lightning {version[:20]}, but holds no weights (state_dict)")
    if averaged:
        times = number(entries(table.get("averaging_state")).get("n_averaged"))
        told = "" if times is None else f" over {int(times)} updates"
        notes.append(f"an average of the weights{told} is there too (the callback WeightAveraging); it was left out")
    tensors = torch_file.tensors_of(weights, path)
    optimizer, told_of = optimizer_state(table.get("optimizer_states"), list(tensors), path)
    notes += told_of
    facts = facts_in(table, notes)
    if optimizer is None:
        facts |= rate_in(table, notes)
    optimizers = table.get("optimizer_states")
    if isinstance(optimizers, list) and len(optimizers) > 1:
        notes.append(f"its step is the sum of the steps of {len(optimizers)} optimizers")
    return Found(
        path=path,
        format="Lightning's checkpoint",
        kind="one model",
        models=(Weights(str(path), tensors, optimizer),),
        reasons=(
            "Lightning saves the weights of process 0",
            "its strategies for several processes (DDP) keep the weights of all alike, to rounding; statistics of BatchNorm are process 0's own unless they "
            "were synchronised. How many processes there were is not recorded",
        ),
        step=count(table.get("global_step")),
        facts={**facts, "writer_version": f"Lightning {version[:20]}"},
        notes=tuple(notes),
    )
