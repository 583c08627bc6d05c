"""The state of torch's optimizers: {"state": {parameter: {slot: tensor}}, "param_groups": [{...}]}.

torch numbers the parameters in the order of the groups, so with one group the numbers follow the order of the parameters that the optimizer was
given; with several they do so only within each, and which parameter is in which group is known only where the groups carry names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.found import OptimizerState, Stored
from landscape.checkpoints.importers.loaded import count, entries, number

SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""What is read: SGD's momentum, Adam's averages of the gradient and of its square."""

OPTIONS = {
    "lr": "learning_rate",
    "momentum": "momentum",
    "dampening": "dampening",
    "eps": "eps",
    "weight_decay": "weight_decay",
}
WRAPPERS = ("module", "_model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
LARGEST_INDEX = 1 << 31


def optimizer_state(
    content: object, names: Sequence[str], source: Path = Path("the optimizer")
) -> tuple[OptimizerState | None, list[str]]:
    """An optimizer's state_dict, as far as it can be told whose each tensor is.

    Args:
        content: the state_dict, or a list of the only one.
        names: of the weights that it may belong to, as the checkpoint has them.
        source: its file, for messages.

    Returns:
        None where there is none to be read; and notes of what was left out, and why.
    """
    notes: list[str] = []
    if isinstance(content, list | tuple) and len(content) != 1:
        return None, [
            f"the state of {len(content)} optimizers was left out: only one can be told to belong to the parameters"
        ] if content else []
    table = entries(content[0] if isinstance(content, list | tuple) else content)
    groups = [entries(group) for group in _listed(table.get("param_groups"))]
    if not groups:
        return None, notes
    facts = _facts(groups, notes)
    state = table.get("state")
    slots, steps = _slots(state if isinstance(state, dict) else {}, source, notes)
    if len(steps) == 1:
        facts["optimizer_step"] = steps.pop()
    return OptimizerState(_whose(slots, groups, names, notes), facts, num_parameters(content)), notes


def is_optimizer(value: object) -> bool:
    """Whether a value has exactly the shape of an optimizer's state_dict."""
    if not isinstance(value, dict) or len(value) != 2:
        return False
    table = entries(value)
    groups = _listed(table.get("param_groups"))
    return isinstance(table.get("state"), dict) and bool(groups) and all("params" in entries(group) for group in groups)


def num_parameters(content: object) -> int | None:
    """How many parameters an optimizer's state_dict numbers; None where it is none."""
    groups = [entries(group) for group in _listed(entries(content).get("param_groups"))]
    return sum(len(_listed(group.get("params"))) for group in groups) if groups else None


def _listed(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _facts(groups: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    """What all groups say alike."""
    said: dict[str, list[Any]] = {}
    for group in groups:
        for option, name in OPTIONS.items():
            value = number(group.get(option))
            if value is not None:
                said.setdefault(name, []).append(float(value))
        betas = [number(beta) for beta in _listed(group.get("betas"))[:3]]
        if len(betas) == 2 and None not in betas:
            said.setdefault("betas", []).append(betas)
        if type(group.get("nesterov")) is bool:
            said.setdefault("nesterov", []).append(group["nesterov"])
    differing = sorted(name for name, values in said.items() if any(value != values[0] for value in values))
    if differing:
        notes.append(f"groups of parameters differ in {', '.join(differing)}, which was left out")
    return {name: values[0] for name, values in said.items() if name not in differing}


def _slots(
    state: dict[Any, Any], source: Path, notes: list[str]
) -> tuple[dict[str, dict[str | int, Stored]], set[int]]:
    """Slots by the optimizer's own keys, and the counts of steps that there are."""
    slots: dict[str, dict[str | int, Stored]] = {}
    steps: set[int] = set()
    others: set[str] = set()
    for key, held in dict.items(state):
        if not isinstance(held, dict) or (type(key) is not str and not (type(key) is int and 0 <= key < LARGEST_INDEX)):
            continue
        step = count(dict.get(held, "step"))
        if step is not None:
            steps.add(step)
        for slot in SLOTS:
            value = dict.get(held, slot)
            if isinstance(value, Tensor):
                try:
                    slots.setdefault(slot, {})[key] = torch_file.stored(
                        value, source, f"the optimizer's {slot} of {str(key)[:100]}"
                    )
                except CheckpointError as error:
                    notes.append(f"the optimizer's state was left out: {error}")
                    return {}, steps
        if len(held) < 32:
            others |= {
                name[:40]
                for name, value in entries(held).items()
                if isinstance(value, Tensor) and name not in (*SLOTS, "step")
            }
    if others:
        notes.append(f"the optimizer's {', '.join(sorted(others)[:8])} were left out")
    return slots, steps


def _whose(
    slots: dict[str, dict[str | int, Stored]],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    notes: list[str],
) -> dict[str, dict[str | int, Stored]]:
    """The slots by the checkpoint's names of the parameters, or by number where one group numbers them all."""
    keys = {key for held in slots.values() for key in held}
    if not keys:
        return {}
    known = _known(names)
    named: dict[str | int, str] = {key: key for key in keys if isinstance(key, str)}
    told: Mapping[str | int, str] = {**_told(groups)} if all(type(key) is int for key in keys) else named
    renamed = {key: known.get(_bare(told[key])) if key in told else None for key in keys}
    if None not in renamed.values() and len(set(renamed.values())) == len(renamed):
        return {slot: {str(renamed[key]): stored for key, stored in held.items()} for slot, held in slots.items()}
    if any(isinstance(key, str) for key in keys):
        notes.append("the optimizer's state was left out: its names of the parameters are not the weights'")
        return {}
    if len(groups) > 1:
        notes.append(
            "the optimizer's state was left out: it numbers the parameters over several groups and does not name them"
        )
        return {}
    numbers = _listed(groups[0].get("params"))
    in_order = all(type(number) is int and number == i for i, number in enumerate(numbers))
    if not in_order or any(isinstance(key, int) and key >= len(numbers) for key in keys):
        notes.append("the optimizer's state was left out: it does not number the parameters from 0")
        return {}
    return slots


def _known(names: Sequence[str]) -> dict[str, str]:
    """The checkpoint's names by what is left of them without wrappers; none where two are then alike."""
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(_bare(name), name) != name:
            return {}
    return known


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _told(groups: Sequence[Mapping[str, Any]]) -> dict[str | int, str]:
    """The names that the groups carry (torch >= 2.6, of optimizers that were given named parameters), by number."""
    told: dict[str | int, str] = {}
    for group in groups:
        indices, called = _listed(group.get("params")), _listed(group.get("param_names"))
        if (
            len(indices) != len(called)
            or not all(type(i) is int for i in indices)
            or not all(type(n) is str for n in called)
        ):
            return {}
        told |= dict(zip(indices, called, strict=True))
    return told
