"""Whose tensor is whose: names of a checkpoint onto the names of a module.

Wrappers put their own names before or between a module's (DDP `module.`, torch.compile `_orig_mod.`, FSDP1, activation checkpointing, decent-dp
`_model.`, a LightningModule the attribute that holds the network). With a module at hand, names are found as the module's own state_dict has them
and checked by shape; without one, parameters and buffers are told apart by what BatchNorm calls its statistics and by type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from landscape.autodiff import unwrap
from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.found import Stored

BETWEEN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What wrappers put anywhere between the names of modules; no network of one's own is called so."""

BEFORE = ("module", "_model", "_forward_module")
"""What wrappers put before all names; taken off only where every name has it, or where a module asks for it."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "n_averaged")
"""Last parts of names that are buffers, where no module tells."""

SHOWN = 20
"""Rows of a table in a message."""


@dataclass(frozen=True)
class Rename:
    """A rule OLD=NEW for names: each * in OLD stands for anything, each * in NEW for what the one in its place stood for; an empty NEW drops.

    >>> Rename.parse("encoder.*=enc.*").of("encoder.0.weight")
    'enc.0.weight'
    >>> Rename.parse("head.*=").of("head.bias")
    ''
    """

    old: str
    new: str

    @staticmethod
    def parse(text: str) -> Rename:
        """A rule as it is written.

        Raises:
            ValueError: it has no =, or more * on the right than on the left.
        """
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise ValueError(f"a rule for names is written OLD=NEW, such as 'encoder.*=enc.*', not {text!r}")
        if new.count("*") > old.count("*"):
            raise ValueError(f"the rule {text!r} has more * on the right than on the left")
        return Rename(old, new)

    def of(self, name: str) -> str | None:
        """The new name; None where the rule does not apply."""
        match = re.fullmatch("(.*)".join(map(re.escape, self.old.split("*"))), name, flags=re.DOTALL)
        if match is None:
            return None
        pieces, groups = self.new.split("*"), list(match.groups())
        return "".join(piece + (groups.pop(0) if i < len(pieces) - 1 else "") for i, piece in enumerate(pieces))


@dataclass(frozen=True)
class Names:
    """Which tensor of a checkpoint is which: each a table from the module's name to the checkpoint's, in the module's order.

    Attributes:
        parameters: those that are trained, tied ones once, in named_parameters order.
        buffers: BatchNorm statistics and the like.
        frozen: parameters that require no gradient.
        order: all parameters, trained and frozen, in named_parameters order.
        extra: names of the checkpoint that no module's name took.
        by_module: whether a module told the order, and not the checkpoint.
    """

    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    frozen: Mapping[str, str]
    order: tuple[str, ...]
    extra: tuple[str, ...] = ()
    by_module: bool = False


def match(tensors: Mapping[str, Stored], module: nn.Module | None, rules: Sequence[Rename], source: str) -> Names:
    """The names of a checkpoint's tensors, onto a module's if there is one.

    Args:
        tensors: as the checkpoint names them.
        module: whose weights these are; None: they are told apart by name and type.
        rules: for names that differ, applied first, the first that fits.
        source: names the checkpoint in messages.

    Raises:
        CheckpointError: parameters or statistics of the module are not in the checkpoint or have another shape (one table lists them with
            the closest names that there are), or two tensors get the same name.
        ValueError: a rule that fits no name.
    """
    renamed = _renamed(tensors, rules, source)
    return _by_kind(tensors, renamed, source) if module is None else _onto(tensors, renamed, unwrap(module), source)


def _renamed(tensors: Mapping[str, Stored], rules: Sequence[Rename], source: str) -> dict[str, str]:
    """{new name: name in the checkpoint}, wrappers' names between taken out."""
    found: dict[str, str] = {}
    used = set()
    for name in tensors:
        new = ".".join(part for part in name.split(".") if part not in BETWEEN)
        for rule in rules:
            changed = next((c for c in (rule.of(name), rule.of(new)) if c is not None), None)
            if changed is not None:
                used.add(rule)
                new = changed
                break
        if not new:
            continue
        if new in found:
            raise CheckpointError(
                f"{source}: {found[new]} and {name} would both be called {new}; tell them apart with --map OLD=NEW"
            )
        found[new] = name
    for rule in rules:
        if rule not in used:
            raise ValueError(f"the rule {rule.old}={rule.new} fits no tensor of {source}; it holds {some(tensors)}")
    return found


def _by_kind(tensors: Mapping[str, Stored], renamed: dict[str, str], source: str) -> Names:
    """Without a module: statistics by their names, other buffers by their type, tied tensors once."""
    for prefix in BEFORE:
        if renamed and all(name.startswith(f"{prefix}.") for name in renamed if not _is_statistic(name)):
            renamed = {name.removeprefix(f"{prefix}."): old for name, old in renamed.items()}
    parameters, buffers, seen = {}, {}, set()
    for name, old in renamed.items():
        stored = tensors[old]
        if _is_statistic(name) or not (stored.dtype.is_floating_point or stored.dtype.is_complex):
            buffers[name] = old
        elif stored.alias is None or (stored.alias, stored.shape) not in seen:
            seen.add((stored.alias, stored.shape))
            parameters[name] = old
    if not parameters:
        raise CheckpointError(f"{source} holds no weights: {some(tensors)}")
    return Names(parameters, buffers, {}, tuple(parameters))


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def _onto(tensors: Mapping[str, Stored], renamed: dict[str, str], module: nn.Module, source: str) -> Names:
    wanted = module.state_dict(keep_vars=True)
    strip, put = _prefixes(tensors, renamed, wanted, source)
    there = {put + name.removeprefix(strip): old for name, old in renamed.items() if name.startswith(strip)}
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    tied: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        tied.setdefault(id(tensor), []).append(name)
    first = dict(module.named_parameters())
    buffers = [n for n, _ in module.named_buffers() if n in wanted]
    found: dict[str, str] = {}
    problems: list[tuple[str, str]] = []
    taken: set[str] = set()
    for name in (*trained, *frozen, *buffers):
        tensor = first.get(name, wanted.get(name))
        assert tensor is not None
        names = [n for n in dict.fromkeys((name, *tied.get(id(tensor), ()))) if n in there]
        taken.update(there[n] for n in names)
        fitting = [n for n in names if tensors[there[n]].shape == tensor.shape]
        if fitting:
            found[name] = there[fitting[0]]
            problems += [(other, f"is tied to {name} in the model, but another tensor in the file") for other in fitting[1:]
                         if not _is_same(tensors[there[fitting[0]]], tensors[there[other]])]  # fmt: skip
        elif names:
            problems.append(
                (name, f"{_shape(tensor.shape)} in the model, {_shape(tensors[there[names[0]]].shape)} in the file")
            )
        elif name.rpartition(".")[2] != "num_batches_tracked":  # which torch did not count before 0.4.1
            problems.append((name, f"{_shape(tensor.shape)} is not in the file"))
    extra = tuple(old for old in tensors if old not in taken)
    if problems:
        raise CheckpointError(_table(source, module, problems, wanted, tensors, extra))
    return Names(
        {n: found[n] for n in trained},
        {n: found[n] for n in buffers if n in found},
        {n: found[n] for n in frozen},
        tuple(first),
        tuple(old for old in extra if old in renamed.values()),
        by_module=True,
    )


def _is_same(one: Stored, other: Stored) -> bool:
    return (one.alias is not None and one.alias == other.alias) or torch.equal(one.read(), other.read())


def _prefixes(
    tensors: Mapping[str, Stored], renamed: Mapping[str, str], wanted: Mapping[str, torch.Tensor], source: str
) -> tuple[str, str]:
    """What to take off the checkpoint's names and what to put before them so that most fit the module's, by name and shape."""
    candidates = {("", "")}
    for first in list(wanted)[:2]:
        candidates |= {(name.removesuffix(first), "") for name in renamed if name.endswith(f".{first}")}
    for first in list(renamed)[:2]:
        candidates |= {("", name.removesuffix(first)) for name in wanted if name.endswith(f".{first}")}
    # a leading wrapper that the first names of the module do not show (they may be missing)
    candidates |= {(f"{prefix}.", "") for prefix in BEFORE}

    def fitting(candidate: tuple[str, str]) -> set[str]:
        strip, put = candidate
        return {
            old
            for name, old in renamed.items()
            if name.startswith(strip)
            and (to := put + name.removeprefix(strip)) in wanted
            and wanted[to].shape == tensors[old].shape
        }

    fits = {candidate: fitting(candidate) for candidate in sorted(candidates)}
    best = max(fits, key=lambda c: (len(fits[c]), -len(c[0]) - len(c[1])))
    rivals = [c for c in fits if c != best and len(fits[c]) == len(fits[best]) and not fits[c] & fits[best]]
    if rivals and fits[best] and best != ("", ""):
        prefixes = sorted({c[0] for c in (best, *rivals)})
        raise CheckpointError(
            f"{source} holds several networks that fit, under {', '.join(prefixes)}; leave out all but one of them with --map, such as "
            f"--map '{prefixes[-1]}*=' (rename=[...])"
        )
    return best


def _table(
    source: str, module: nn.Module, problems: list[tuple[str, str]], wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, Stored],
    extra: tuple[str, ...],
) -> str:  # fmt: skip
    """One table of what does not fit, with the closest names that the checkpoint has beside it."""
    rows = [f"{source} does not fit {type(module).__name__}:"]
    width = max(len(name) for name, _ in problems[:SHOWN])
    for name, text in problems[:SHOWN]:
        alike = [e for e in extra if name in wanted and tensors[e].shape == wanted[name].shape]
        close = difflib.get_close_matches(name, alike[:1000], n=2, cutoff=0.3) or difflib.get_close_matches(
            name, extra[:1000], n=2
        )
        beside = f"; closest: {', '.join(f'{c} {_shape(tensors[c].shape)}' for c in close)}" if close else ""
        rows.append(f"  {name:{width}s}  {text}{beside}")
    if len(problems) > SHOWN:
        rows.append(f"  ... and {len(problems) - SHOWN} more")
    if extra:
        rows.append(f"  in the file only: {some(extra)}")
    rows.append(
        "  names that differ only in spelling are told with --map OLD=NEW (rename=[...]), * standing for anything"
    )
    return "\n".join(rows)


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def some(names: Iterable[str], count: int = 8) -> str:
    """The first of some names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "") or "nothing"
