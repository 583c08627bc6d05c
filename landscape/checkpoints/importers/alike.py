"""Whether several networks can be learners of one run: the same names, shapes, types and steps."""

from __future__ import annotations

from collections.abc import Sequence

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.found import Stored, Weights

SHOWN = 20
"""Rows of a table in a message."""


def check_alike(models: Sequence[Weights], labels: Sequence[str], where: str) -> None:
    """Refuse networks that differ in names, shapes or types, with a table of one row a tensor.

    Args:
        models: the networks.
        labels: what each is called in the table.
        where: what begins the message.
    """
    first, rows = models[0].tensors, []
    for model, label in zip(models[1:], labels[1:], strict=True):
        for name in dict.fromkeys((*first, *model.tensors)):
            a, b = first.get(name), model.tensors.get(name)
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
                rows.append(f"  {name[:100]}  {_said(a)} in {labels[0]}; {_said(b)} in {label}")
        if len(rows) > SHOWN:
            break
    if not rows:
        return
    shared = any(name in model.tensors for model in models[1:] for name in first)
    hint = (
        ""
        if shared
        else "\n  they have no name in common: if they are parts of one network, put them together and save one state_dict"
    )
    more = ["  ... and more"] if len(rows) > SHOWN else []
    raise CheckpointError("\n".join([f"{where}: the learners are not of one network:", *rows[:SHOWN], *more]) + hint)


def _said(stored: Stored | None) -> str:
    return "missing" if stored is None else f"{str(stored.dtype).removeprefix('torch.')}{list(stored.shape)}"
