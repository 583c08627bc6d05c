"""Stochastic Gradient Push (SGP; facebookresearch/stochastic_gradient_push): weights that are divided by a push-sum weight.

Under push-sum learner j holds numerators x_j and a weight p_j > 0; its de-biased estimate, at which gradients are taken, is w_j = x_j / p_j. The
project's `GossipDataParallel.state_dict()` is {"state_dict": {"module.*"}, "ps_weight": p_j of shape [1], "is_ps_numerator": whether what is stored is
x_j}; its `unbias()` divides `module.parameters()` alone, in their own type, never buffers, and so does this. In its file "epoch" counts finished
epochs and "itr" iterations within the next one, so that steps are not recorded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.found import Found, Stored
from landscape.checkpoints.importers.loaded import entries, has_tensors, number
from landscape.checkpoints.importers.torch_optimizer import num_parameters
from landscape.checkpoints.importers.training_state import State, state_of
from landscape.checkpoints.naming import STATISTICS

FORMAT = "SGP (stochastic_gradient_push)"
WEIGHT = "push_sum_weight"
"""The fact that tells p_j."""


def interpret(content: object, path: Path) -> Found | None:
    """One learner's file of SGP; None if it is none.

    Raises:
        CheckpointError: the push-sum weight is missing or cannot be one, or it cannot be told which tensors it divides.
    """
    table = entries(content)
    inner = entries(table.get("state_dict"))
    gossip = inner if "is_ps_numerator" in inner or "ps_weight" in inner else table
    if not has_tensors(gossip.get("state_dict")) or not ("is_ps_numerator" in gossip or "ps_weight" in gossip):
        return None
    training = {} if gossip is table else {key: value for key, value in table.items() if key != "state_dict"}
    state = state_of({**training, "state_dict": gossip["state_dict"]}, path, str(path))
    assert state is not None
    numerators, weight = gossip.get("is_ps_numerator"), number(gossip.get("ps_weight"))
    if type(numerators) is not bool:
        raise CheckpointError(
            f"{path} has a push-sum weight, but does not tell whether its tensors are numerators of it (is_ps_numerator)"
        )
    facts = dict(state.facts)
    if weight is not None:
        facts[WEIGHT] = float(weight)
    if not numerators:
        reason = "its tensors are de-biased already (is_ps_numerator is false)"
    else:
        if weight is None or not 2.0**-126 <= weight < 2.0**126:
            raise CheckpointError(
                f"{path} holds numerators of push-sum, but its ps_weight is not one positive number; without it they are no weights"
            )
        state, divided = _unbiased(state, weight, num_parameters(table.get("optimizer")), path)
        reason = f"{divided} parameters were divided by the push-sum weight (ps_weight), as the training does before it takes gradients; buffers were not"
    notes = list(state.notes)
    if count := number(table.get("itr")):
        notes.append(f"it was saved at iteration {count:g} of an epoch; how many steps an epoch has is not recorded")
    return Found(
        path=path,
        format=FORMAT,
        kind="one model",
        models=(state.weights,),
        reasons=("a file of SGP holds one learner", reason),
        step=state.step,
        facts=facts,
        notes=tuple(notes),
    )


def _unbiased(state: State, weight: float | int, given: int | None, path: Path) -> tuple[State, int]:
    """Parameters divided when they are read; and how many there are. The optimizer was given `given` of them."""
    tensors = state.weights.tensors
    parameters = {
        n: s for n, s in tensors.items() if s.dtype.is_floating_point and n.rpartition(".")[2] not in STATISTICS
    }
    distinct = len({(stored.alias or name, stored.shape) for name, stored in parameters.items()})
    if weight != 1 and given is not None and distinct != given:
        raise CheckpointError(
            f"{path} has a push-sum weight of {weight:.6g} and {given} parameters in its optimizer, but {distinct} tensors that look like some: "
            "which of them are buffers, that are not divided, cannot be told. Call model.unbias() in the program that trained it and save again"
        )
    divided = {name: _divided(stored, weight) for name, stored in parameters.items()} if weight != 1 else {}
    return replace(state, weights=replace(state.weights, tensors={**tensors, **divided})), len(parameters)


def _divided(stored: Stored, weight: float | int) -> Stored:
    """Divided in its own type, as `unbias` does; tied weights stay tied."""
    read = stored.read

    def divided() -> Tensor:
        return read() / torch.tensor(weight, dtype=stored.dtype)

    return replace(stored, read=divided)
