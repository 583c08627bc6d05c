"""From tensors on disk to learners in memory, one tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import run_format
from landscape.checkpoints.importers.dcp import unstack
from landscape.checkpoints.importers.found import Found, Stored, Weights
from landscape.checkpoints.importers.sharded import LARGEST_STACK
from landscape.checkpoints.learners import Learners
from landscape.checkpoints.naming import SHOWN, Names, Rename, match, some
from landscape.functional import ParameterLayout

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of Adam's running averages of the gradient and of its square."""


@dataclass(frozen=True)
class Readable:
    """A checkpoint of which it is known whose each tensor is, and that can be read learner by learner.

    Attributes:
        found: what is on disk.
        names: which tensor is which.
        layout: names and shapes of the parameters.
        dtype: of the weights: the smallest type that holds all parameters exactly.
    """

    found: Found
    names: Names
    layout: ParameterLayout
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.found.models)

    def read(self, which: Sequence[int] | None = None) -> Learners:
        """Read learners into one tensor of weights; beside it at most one tensor of the checkpoint is in memory.

        Raises:
            ValueError: no learner, or one that is not there, is asked for.
            CheckpointError: a file is damaged.
        """
        found, names, layout = self.found, self.names, self.layout
        if which is not None:
            check_selection(which, len(self), found.path)
        models = [found.models[j] for j in (range(len(self)) if which is None else which)]
        first = models[0]
        weights = _empty(len(models), layout.num_parameters, self.dtype)
        for row, model in zip(weights, models, strict=True):
            _fill(layout.split(row), {name: model.tensors[old] for name, old in names.parameters.items()}, model.source)
        buffers: dict[str, Tensor] = {}
        for name, old in names.buffers.items():
            stored = first.tensors[old]
            buffers[name] = torch.empty(len(models), *stored.shape, dtype=stored.dtype)
            for row, model in zip(buffers[name], models, strict=True):
                _put(row, model.tensors[old], name, model.source)
        moments, notes = _moments(found.models, models, names, layout)
        if found.step is None:
            notes.append("its step is not recorded, and stands as 0")
        return Learners(
            step=found.step or 0,
            weights=weights,
            layout=layout,
            buffers=buffers,
            momentum=moments.pop("momentum_buffer", None),
            moments=moments,
            frozen={name: first.tensors[old].read().clone() for name, old in names.frozen.items()},
            facts=self.facts,
            origin=self.origin(notes),
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What the checkpoint records beside tensors: its own facts, and what the optimizers of all learners say alike."""
        return {**self.found.facts, **_optimizer_facts(self.found.models)}

    def origin(self, notes: Sequence[str] = ()) -> dict[str, Any]:
        """What there is to say of where the learners come from."""
        left_out = (
            [f"{len(self.names.extra)} tensors that the model does not have: {some(self.names.extra)}"]
            if self.names.extra
            else []
        )
        found = self.found
        return {
            "format": found.format,
            "kind": found.kind,
            "reasons": list(found.reasons),
            "notes": [*found.notes, *left_out, *notes],
        }


def check_selection(which: Sequence[int], count: int, path: Path) -> None:
    """Refuse to read no learner, or one that is not there."""
    if not len(which):
        raise ValueError(f"no learners of {path} are asked for ({which}); leave learners out for all {count}")
    wrong = next((j for j in which if not 0 <= j < count), None)
    if wrong is not None:
        raise ValueError(
            f"{path} has learners 0 to {count - 1}, not {wrong}; choose among them, such as learners=range({count})"
        )


def readable(found: Found, *, module: nn.Module | None = None, rename: Sequence[str] = ()) -> Readable:
    """Tell whose each tensor is, and check that all learners are of one network; no tensor is read but frozen ones.

    Args:
        found: a checkpoint.
        module: whose parameters these are: their order, which are trained, which tied. Without it the order is the checkpoint's. If the
            checkpoint's tensors are all the module's stacked along a further leading axis, each slice is a learner.
        rename: rules OLD=NEW, see `naming.Rename`.

    Raises:
        CheckpointError: names or shapes do not fit, or learners differ in them or in their types.
    """
    names: Names | None = None
    if module is None and not rename and found.format == run_format.FORMAT:
        names = run_format.names_of(run_format.read_state(found.path), found.models[0].tensors)
    if names is None:
        rules = [Rename.parse(text) for text in rename]
        try:
            names = match(found.models[0].tensors, module, rules, found.models[0].source)
        except CheckpointError as error:
            if module is None:
                raise
            found, names = _unstacked(found, module, rules, error)
    _check_alike(found.models, names)
    first = found.models[0].tensors
    layout = ParameterLayout(tuple(names.parameters), tuple(first[old].shape for old in names.parameters.values()))
    return Readable(found, names, layout, _common_type(found.models[0], names))


def _unstacked(found: Found, module: nn.Module, rules: Sequence[Rename], error: CheckpointError) -> tuple[Found, Names]:
    """The learners of a stack that only the module's shapes tell to be one; raises `error` if it is none."""
    shapes = [stored.shape for stored in found.models[0].tensors.values()]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(found.models) != 1 or len(sizes) != 1 or not 0 < min(sizes) <= LARGEST_STACK:
        raise error
    learners = unstack(found, sizes.pop())
    try:
        return learners, match(learners.models[0].tensors, module, rules, learners.models[0].source)
    except CheckpointError:
        raise error from None


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for weights; numpy asks for it in huge pages, whose first use costs a fraction."""
    return torch.from_numpy(np.empty(rows * columns * dtype.itemsize, np.uint8)).view(dtype).view(rows, columns)


def _fill(into: Mapping[str, Tensor], tensors: Mapping[str, Stored], source: str) -> None:
    for name, stored in tensors.items():
        _put(into[name], stored, name, source)


def _put(into: Tensor, stored: Stored, name: str, source: str) -> None:
    if stored.shape != into.shape:
        raise CheckpointError(f"{source}: {name} has shape {list(stored.shape)}, not {list(into.shape)}")
    stored.read_into(into)


def _common_type(model: Weights, names: Names) -> torch.dtype:
    """The smallest type that holds all parameters of a model exactly."""
    found = torch.get_default_dtype()
    for i, (name, old) in enumerate(names.parameters.items()):
        dtype = model.tensors[old].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(
                f"{model.source}: the parameter {name} is of type {str(dtype).removeprefix('torch.')}; quantised and complex networks "
                "have no landscape that this program measures"
            )
        found = dtype if i == 0 else torch.promote_types(found, dtype)
    return found


def _check_alike(models: Sequence[Weights], names: Names) -> None:
    """Refuse learners that differ in names, shapes or types of what is read, with a table."""
    first, rows = models[0], []
    for old in (*names.parameters.values(), *names.buffers.values(), *names.frozen.values()):
        a = first.tensors[old]
        for model in models[1:]:
            b = model.tensors.get(old)
            if b is None or (b.shape, b.dtype) != (a.shape, a.dtype):
                rows.append(f"  {old}  {_said(a)} in {first.source}; {_said(b)} in {model.source}")
    if rows:
        more = [f"  ... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        raise CheckpointError("\n".join(["the learners are not of one network:", *rows[:SHOWN], *more]))
    for model in models[1:]:
        for name, old in names.frozen.items():
            if not torch.equal(first.tensors[old].read(), model.tensors[old].read()):
                raise CheckpointError(
                    f"{name} is frozen in the model, but differs between {first.source} and {model.source}"
                )


def _said(stored: Stored | None) -> str:
    return "missing" if stored is None else f"{str(stored.dtype).removeprefix('torch.')}{list(stored.shape)}"


def _moments(
    every: Sequence[Weights], models: Sequence[Weights], names: Names, layout: ParameterLayout
) -> tuple[dict[str, Tensor], list[str]]:
    """The optimizers' state (n, d) of some learners, where every learner has it and it fits; and why what was left out was."""
    states = [model.optimizer for model in every]
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    for slot in ("momentum_buffer", *MOMENTS):
        if not any(state is not None and state.slots.get(slot) for state in states):
            continue
        if any(_of_parameters(model, slot, names, layout) is None for model in every):
            notes.append(
                f"the optimizer's {slot} was left out: it does not fit the parameters, or not every learner has it"
            )
            continue
        chosen = [_of_parameters(model, slot, names, layout) or {} for model in models]
        dtype = functools.reduce(torch.promote_types, [s.dtype for each in chosen for s in each.values()])
        found[slot] = torch.zeros(len(models), layout.num_parameters, dtype=dtype)
        for row, each, model in zip(found[slot], chosen, models, strict=True):
            _fill(layout.split(row), each, model.source)
            if len(each) < len(layout.names):
                notes.append(
                    f"the optimizer's {slot} is zero for {len(layout.names) - len(each)} parameters that had none ({model.source})"
                )
    return found, notes


def _of_parameters(model: Weights, slot: str, names: Names, layout: ParameterLayout) -> dict[str, Stored] | None:
    """One slot by the module's names; None where it cannot be told whose it is."""
    state = model.optimizer
    held = {} if state is None else state.slots.get(slot, {})
    by_index = {key: stored for key, stored in held.items() if isinstance(key, int)}
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    if not by_index:
        olds = {old: name for name, old in names.parameters.items()}
        frozen = set(names.frozen.values())
        if not held or any(key not in olds and key not in frozen for key in held):
            return None
        chosen = {olds[str(key)]: stored for key, stored in held.items() if key in olds}
    else:
        assert state is not None
        numbered = _numbered(by_index, names, shapes, state.num_parameters)
        if numbered is None or not (model.ordered or names.by_module):
            return None
        chosen = numbered
    return chosen if all(stored.shape == shapes[name] for name, stored in chosen.items()) else None


def _numbered(
    held: Mapping[int, Stored], names: Names, shapes: Mapping[str, torch.Size], count: int | None
) -> dict[str, Stored] | None:
    """An optimizer numbers the parameters that it was given: all of the network's, or those that are trained; None if neither or both fit.

    Without the count of those it was given, it must hold the state of every one.
    """
    fitting = []
    for order in dict.fromkeys((names.order, tuple(shapes))):
        if len(order) != (len(held) if count is None else count):
            continue
        if all(0 <= i < len(order) and shapes.get(order[i]) == stored.shape for i, stored in held.items()):
            fitting.append({order[i]: stored for i, stored in held.items()})
    return fitting[0] if len({tuple(each) for each in fitting}) == 1 else None


def _optimizer_facts(models: Sequence[Weights]) -> dict[str, Any]:
    """What all learners' optimizers say alike."""
    every = [dict(model.optimizer.facts) for model in models if model.optimizer is not None]
    return {k: v for k, v in every[0].items() if all(other.get(k) == v for other in every)} if every else {}
