"""Dotted names of a whole training state taken apart: learners, the model, its optimizer, counters.

torch.distributed.checkpoint flattens nested dictionaries into names such as `learner0.model.fc.weight` or
`optimizer.state.fc.weight.exp_avg`; files of one rank are flattened alike before they come here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.found import OptimizerState, Stored, Weights

SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
OPTIONS = {
    "lr": "learning_rate", "momentum": "momentum", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay", "dampening": "dampening",
}  # fmt: skip
STEPS = ("global_step", "step", "iteration", "iter", "train_steps", "num_steps")
EPOCHS = ("epoch", "current_epoch")
BESIDE = (
    "lr_scheduler",
    "lr_schedulers",
    "scheduler",
    "schedulers",
    "train_state",
    "dataloader",
    "rng_state",
    "grad_scaler",
    "scaler",
)
"""First parts of names of what stands beside a model and is none of it."""

COUNTING = ("train_state", "trainer", "progress", "meta", "metadata", "extra", "app", "state", "training")
"""First parts of names under which steps and epochs are counted."""

_WORDS = "learner|worker|rank|replica|model|node|client|peer|agent|gpu|process|member"
_LEARNER = re.compile(
    rf"(?P<outer>(?:\w+[./])??)(?P<word>{_WORDS})(?:[_-]?|s[._/-]?)(?P<index>\d{{1,5}})[./](?P<name>.+)",
    re.IGNORECASE | re.DOTALL,
)
_OPTIMIZER = re.compile(
    r"(?P<box>(?:[\w-]+\.){0,2}?optim\w*\.(?:\d+\.)?)(?P<part>state|param_groups)\.(?P<rest>.+)", re.DOTALL
)
_BARE = re.compile(
    rf"(?P<box>)(?P<part>state(?=\..*\.(?:{'|'.join(SLOTS)}|step)$)|param_groups)\.(?P<rest>.+)", re.DOTALL
)
LARGEST_COUNT = 1 << 53
SHOWN = 20
"""Notes beyond which the rest is only counted, and other lists that a file could make long."""


@dataclass
class Content:
    """Names and what they stand for.

    Attributes:
        tensors: name -> tensor.
        settings: name -> reads what is no tensor; None where it is nothing simple. May raise CheckpointError.
        ordered: whether they are in the order of the state that was saved.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    settings: dict[str, Callable[[], Any]] = field(default_factory=dict)
    ordered: bool = True


@dataclass(frozen=True)
class State:
    """One learner's part of a training state.

    Attributes:
        weights: its tensors, container taken off, and its optimizer.
        step: steps taken, where recorded.
        facts: what else is recorded.
        notes: what was left out.
    """

    weights: Weights
    step: int | None
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


def learners(content: Content, source: str) -> tuple[list[Content], Content, str] | None:
    """The content of each learner where names begin with it, what is left, and a sentence that says so; None where none do.

    The list is empty where names begin so, but not of learners of one network; the sentence says why.

    `learner0.`, `rank_00.`, `workers.1/` ... are taken off, from names that may have one container before (`model.learner0.`). Numbers must run
    from 0 (or 1) without a gap.

    Raises:
        CheckpointError: there is a gap.
    """
    groups: defaultdict[tuple[str, int], Content] = defaultdict(lambda: Content(ordered=content.ordered))
    rest = Content(ordered=content.ordered)
    for name, stored in content.tensors.items():
        found = _LEARNER.fullmatch(name)
        (groups[_whose(found)].tensors if found else rest.tensors)[_own(found) if found else name] = stored
    for name, setting in content.settings.items():
        found = _LEARNER.fullmatch(name)
        known = found is not None and _whose(found) in groups
        (groups[_whose(found)].settings if known and found else rest.settings)[
            _own(found) if known and found else name
        ] = setting
    words = {word for word, _ in groups}
    if len(words) != 1 or len(groups) < 2:
        return None
    (word,) = words
    numbers = sorted(index for _, index in groups)
    models = [groups[word, index] for index in numbers]
    begin = f"its names begin with {word} {_listed(numbers)}"
    first = _table(models[0])
    if any(_table(model) != first for model in models):
        return (
            [],
            content,
            f"{begin}, but what they hold differs in names, shapes or types, so they are parts of one network",
        )
    if word == "model" and any(stored.shape.numel() > 1 for stored in rest.tensors.values()):
        return [], content, f"{begin}, but other tensors stand beside these, so they are parts of one network"
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        gaps = sorted(set(range(numbers[-1] + 1)) - set(numbers))
        raise CheckpointError(
            f"{source}: {begin}: {_listed(gaps)} {'is' if len(gaps) == 1 else 'are'} missing, so not all learners were saved"
        )
    return models, rest, f"{begin}, each with tensors of the same names, shapes and types"


def _whose(found: re.Match[str]) -> tuple[str, int]:
    return found["word"].lower(), int(found["index"])


def _own(found: re.Match[str]) -> str:
    return found["outer"] + found["name"]


def _table(content: Content) -> dict[str, tuple[Any, Any]]:
    """Names, shapes and types of what is no state of an optimizer, which a learner may lack before its first step."""
    return {
        name: (stored.shape, stored.dtype)
        for name, stored in content.tensors.items()
        if not _OPTIMIZER.fullmatch(name) and not _BARE.fullmatch(name)
    }


def _listed(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    return ", ".join(map(str, listed[:10])) + (" ..." if len(listed) > 10 else "")


def apart(content: Content, source: str) -> State:
    """One learner's names taken apart into model, optimizer and counters.

    The model keeps its names, save for the container before them where an optimizer's names show what it is (`model.fc.weight` beside
    `optimizer.state.fc.weight.exp_avg`).
    """
    notes: list[str] = []
    counters = {
        name
        for name in (*content.tensors, *content.settings)
        if counter(name) is not None and _is_single(content, name)
    }
    boxes: defaultdict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for name in (*content.tensors, *content.settings):
        found = _OPTIMIZER.fullmatch(name) or _BARE.fullmatch(name)
        if found:
            boxes[found["box"]][name] = found["part"], found["rest"]
    taken = {name for names in boxes.values() for name in names} | counters
    beside = (*(f"{before}." for before in BESIDE), *[box for box in boxes if box][:SHOWN])
    tensors = {n: stored for n, stored in content.tensors.items() if n not in taken and not n.startswith(beside)}
    left_out = [n for n in content.tensors if n not in taken and n.startswith(beside)]
    if left_out:
        notes.append(f"{len(left_out)} tensors that are no weights were left out, such as {left_out[0][:100]}")
    optimizer = None
    if len(boxes) > 1:
        notes.append(
            f"the state of {len(boxes)} optimizers was left out: only one can be told to belong to the parameters"
        )
    elif boxes:
        ((_, names),) = boxes.items()
        optimizer, whose = _optimizer(content, names, notes)
        tensors = _contained(tensors, whose, notes)
    step, facts = _counters(content, counters, notes)
    if len(notes) > SHOWN:
        notes = [*notes[:SHOWN], f"and {len(notes) - SHOWN} more entries of that kind"]
    return State(Weights(source, tensors, optimizer), step, facts, tuple(notes))


def _is_single(content: Content, name: str) -> bool:
    return name in content.settings or content.tensors[name].shape.numel() == 1


def counter(name: str) -> str | None:
    """The last part of a name that counts steps or epochs, outside a model."""
    path = re.split(r"[./]", name)
    inside = len(path) == 1 or (len(path) <= 3 and path[0] in COUNTING)
    return path[-1] if inside and path[-1] in (*STEPS, *EPOCHS, "lr", "learning_rate") else None


def _contained(tensors: dict[str, Stored], whose: set[str], notes: list[str]) -> dict[str, Stored]:
    """The model's tensors under its own names, what it is put in taken off: that which makes most of the optimizer's names the model's."""
    candidates = {""}
    for parameter in sorted(whose)[:3]:
        candidates |= {name.removesuffix(parameter) for name in tensors if name.endswith(f".{parameter}")}
    if not whose and tensors:
        first = {name.partition(".")[0] for name in tensors}
        candidates |= {
            f"{box}." for box in ("model", "state_dict", "model_state_dict", "module", "net") if first == {box}
        }
        prefix = max(sorted(candidates), key=len)
    else:
        nearest = sorted(candidates, key=lambda before: (len(before), before))[:SHOWN]
        prefix = max(nearest, key=lambda before: (sum(before + name in tensors for name in whose), -len(before)))
    inside = {name.removeprefix(prefix): stored for name, stored in tensors.items() if name.startswith(prefix)}
    outside = [name for name in tensors if not name.startswith(prefix)]
    if outside:
        notes.append(f"{len(outside)} tensors beside {prefix[:100]}* were left out, such as {outside[0][:100]}")
    return inside


def _optimizer(
    content: Content, names: Mapping[str, tuple[str, str]], notes: list[str]
) -> tuple[OptimizerState | None, set[str]]:
    """The optimizer's state and the names of the parameters that it knows; none where it numbers them."""
    slots: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    steps: set[int] = set()
    others: set[str] = set()
    for name, (part, rest) in names.items():
        whose, _, slot = rest.rpartition(".")
        if part != "state" or not whose:
            continue
        if slot == "step":
            count = _number(content, name, notes)
            if count is not None and count == int(count):
                steps.add(int(count))
        elif name in content.tensors and slot in SLOTS:
            slots[slot][whose] = content.tensors[name]
        elif name in content.tensors:
            others.add(slot)
    parameters = {key for held in slots.values() for key in held}
    groups = {name: rest for name, (part, rest) in names.items() if part == "param_groups"}
    numbered = bool(parameters) and all(key.isdecimal() and len(key) < 8 for key in parameters)
    if not parameters:
        parameters = {rest.rpartition(".")[0] for rest in groups.values()}
        numbered = all(re.fullmatch(r"\d*", key) for key in parameters)
    facts = _options(content, groups, notes)
    if len(steps) == 1:
        facts["optimizer_step"] = steps.pop()
    if others:
        notes.append(f"the optimizer's {', '.join(sorted(others))[:200]} were left out")
    several = len({rest.partition(".")[0] for rest in groups.values()}) > 1
    if numbered and slots and (several or not content.ordered):
        why = "over several groups" if several else "in an order that is not recorded"
        notes.append(f"the optimizer's state was left out: it numbers the parameters {why} and does not name them")
        slots.clear()
    held = {
        slot: {int(key) if numbered else key: stored for key, stored in of_slot.items()}
        for slot, of_slot in slots.items()
    }  # fmt: skip
    return (OptimizerState(held, facts) if held or facts else None), set() if numbered else parameters


def _options(content: Content, groups: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    """What all groups of parameters say alike."""
    said: defaultdict[str, list[Any]] = defaultdict(list)
    for name, rest in groups.items():
        option = rest.rpartition(".")[2]
        if option not in OPTIONS:
            continue
        value = _pair(content, name, notes) if option == "betas" else _number(content, name, notes)
        if value is not None and len(said[option]) < 2 and value not in said[option]:
            said[option].append(value)
    differing = sorted(option for option, values in said.items() if len(values) > 1)
    if differing:
        notes.append(f"groups of parameters differ in {', '.join(differing)}, which was left out")
    return {OPTIONS[option]: values[0] for option, values in said.items() if len(values) == 1}


def _counters(content: Content, names: Iterable[str], notes: list[str]) -> tuple[int | None, dict[str, Any]]:
    """(steps taken, {epoch, learning_rate})."""
    found: dict[str, int | float] = {}
    for name in sorted(names):
        kind, value = counter(name), _number(content, name, notes)
        if kind is None or value is None:
            continue
        if kind in ("lr", "learning_rate"):
            found.setdefault("learning_rate", value)
        elif value == int(value) and 0 <= value < LARGEST_COUNT:
            found.setdefault("epoch" if kind in EPOCHS else kind, int(value))
    steps = [found.pop(kind) for kind in STEPS if kind in found]
    if len(set(steps)) > 1:
        notes.append(f"it counts steps in several ways, {', '.join(map(str, steps))}; the first was taken")
    return (int(steps[0]) if steps else None), dict(found)


def _number(content: Content, name: str, notes: list[str]) -> int | float | None:
    """A finite number, a setting or a tensor of one entry."""
    try:
        stored = content.tensors.get(name)
        if stored is not None:
            value = (
                stored.read().reshape(()).item() if stored.shape.numel() == 1 and not stored.dtype.is_complex else None
            )
        else:
            value = content.settings[name]()
    except CheckpointError as error:
        notes.append(f"{name[:100]} was not read: {error}")
        return None
    return value if isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300 else None


def _pair(content: Content, name: str, notes: list[str]) -> list[Any] | None:
    try:
        value = content.settings[name]() if name in content.settings else None
    except CheckpointError as error:
        notes.append(f"{name[:100]} was not read: {error}")
        return None
    numbers = isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    return value if numbers else None
