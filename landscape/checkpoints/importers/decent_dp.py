"""decent-dp (`DecentralizedDataParallel`): each process saves its own learner, under names that begin with `_model.`.

Its step mixes what was sent after the last one and then adds the local update, whose gradient was taken before the mixing: adapt while communicate
(awc). What it saves between steps is w_j(t) itself; or, after `global_avg()`, the average of all learners in every process's file, of which nothing in
a file tells. It has one optimizer a bucket of parameters, in the order of the backward pass, so that their states cannot be told apart by number.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from landscape.checkpoints.importers.found import Found, OptimizerState
from landscape.checkpoints.importers.training_state import State

PREFIX = "_model."


def interpret(state: State, path: Path) -> Found | None:
    """One learner's file of decent-dp; None if it is none.

    Args:
        state: what the file holds.
        path: the file.
    """
    tensors = state.weights.tensors
    if not tensors or not all(name.startswith(PREFIX) for name in tensors):
        return None
    notes, optimizer = state.notes, state.weights.optimizer
    numbered = optimizer is not None and any(isinstance(key, int) for held in optimizer.slots.values() for key in held)
    if optimizer is not None and numbered:
        notes = (
            *notes,
            "the optimizer's state was left out: decent-dp numbers the parameters in the order of the backward pass",
        )
        optimizer = OptimizerState({}, optimizer.facts)
    return Found(
        path=path,
        format="decent-dp",
        kind="one model",
        models=(replace(state.weights, optimizer=optimizer),),
        reasons=(
            "its names begin with _model., which decent-dp puts there, whose files hold one learner each",
            "whether it was saved after global_avg(), when all learners hold their average, is not recorded",
        ),
        step=state.step,
        facts={**state.facts, "algorithm": "dpsgd", "order": "awc"},
        notes=notes,
    )
