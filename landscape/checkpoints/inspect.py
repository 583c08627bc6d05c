"""What a run or a checkpoint is, without reading tensor data, but for files of torch.save before 1.6, which can only be read whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from landscape.checkpoints.find import entries, find
from landscape.checkpoints.format import RUN_FILE
from landscape.checkpoints.importers.found import Found, Stored, Weights
from landscape.checkpoints.naming import some
from landscape.checkpoints.reader import open_run
from landscape.checkpoints.run_record import entry
from landscape.printable import printable

SHOWN = 24
"""Tensors listed, unless all are asked for."""


def describe(paths: str | Path | Sequence[str | Path], *, every: bool = False) -> str:
    """What there is at some paths: format, learners or average or shards, step, tensors, dtypes; fit for a terminal.

    Args:
        paths: a run, or files, folders or globs of checkpoints.
        every: list all tensors, not the first few.

    Raises:
        CheckpointError: there is nothing that is known here, or it is damaged or dangerous.
    """
    given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if len(given) == 1 and (given[0] / RUN_FILE).is_file():
        return "\n".join(map(printable, _describe_run(given[0])))
    series = entries(given)
    lines = []
    if len(series) > 1:
        counted = {"step": "steps", "epoch": "epochs"}.get(series[0].counts, "numbers")
        lines = [
            f"{given[0]}: {len(series)} checkpoints, {counted} {some((str(e.step) for e in series), 12)}; the last of them:"
        ]
    return "\n".join(map(printable, [*lines, *_describe_found(find(series[-1]), every)]))


def _describe_run(path: Path) -> list[str]:
    run = open_run(path)
    c, steps, record = run.config, run.steps, run.record
    data, assumed = record.get("data", {}), record.get("assumed", [])
    version, topology = (entry(record, path / RUN_FILE, name) for name in ("format_version", "topology.name"))
    fingerprint = data.get("fingerprint", {}).get("train")
    return [
        f"{path}: a run in landscape's format, version {version}, {run.status}",
        f"  task {run.task or 'unknown'}, {c.algorithm}{f' ({c.order})' if c.algorithm == 'dpsgd' else ''}, {c.num_learners} learners x {c.local_batch_size}, alpha {c.learning_rate:g}, seed {c.seed}"
        + (f"; assumed, not recorded: {', '.join(assumed)}" if assumed else ""),
        f"  topology {topology}, data {data.get('name', 'unknown')} ({fingerprint or 'unknown'})",
        f"  {len(steps)} checkpoints"
        + (f": steps {', '.join(map(str, steps[:12]))}{', ...' if len(steps) > 12 else ''}" if steps else ""),
        *(_describe_origin(record["imported"]) if record.get("imported") else []),
    ]


def _describe_origin(imported: Mapping[str, Any]) -> list[str]:
    """Where an imported run comes from, and what was left out."""
    kept = "; of these the average w_a alone was kept" if imported.get("average") is True else ""
    format_, kind = (imported.get(key, "unknown") for key in ("format", "kind"))
    return [
        f"  imported from {some(imported.get('from', []), 3)}: {format_}, {kind}{kept}",
        *(f"    {reason}" for reason in imported.get("reasons", [])),
        *(f"    note: {note}" for note in imported.get("notes", [])),
    ]


def _describe_found(found: Found, every: bool) -> list[str]:
    first = found.models[0]
    count, step = len(found.models), "step unknown" if found.step is None else f"step {found.step}"
    what = f"{count} learners" if found.kind == "learners" else found.kind
    total = sum(stored.num_bytes for stored in first.tensors.values())
    numbers = sum(stored.shape.numel() for stored in first.tensors.values())
    lines = [f"{found.path}: {found.format}: {what} at {step}"]
    lines += [f"  {reason}" for reason in found.reasons]
    each = " each" if count > 1 else ""
    lines.append(
        f"  {len(first.tensors)} tensors{each}, {numbers:,} numbers, {_size(total)}{each}: {_types(first.tensors)}"
    )
    if found.facts:
        lines.append("  recorded: " + ", ".join(f"{k} {_short(v)}" for k, v in found.facts.items()))
    lines += _optimizer(first)
    lines += [f"  note: {note}" for note in found.notes]
    if count > 1:
        lines.append(f"  learners: {some((model.source for model in found.models), 4)}")
    listed = list(first.tensors.items())
    width = max((len(name) for name, _ in listed[: None if every else SHOWN]), default=0)
    lines += [f"    {name:{min(width, 60)}s}  {_said(stored)}" for name, stored in listed[: None if every else SHOWN]]
    if not every and len(listed) > SHOWN:
        lines.append(f"    ... and {len(listed) - SHOWN} more (--all lists them)")
    return lines


def _optimizer(model: Weights) -> list[str]:
    if model.optimizer is None:
        return ["  optimizer: none that can be read"]
    slots = ", ".join(f"{slot} of {len(held)} parameters" for slot, held in model.optimizer.slots.items())
    facts = ", ".join(f"{k} {_short(v)}" for k, v in model.optimizer.facts.items())
    return ["  optimizer: " + "; ".join(filter(None, (slots, facts)))]


def _types(tensors: Mapping[str, Stored]) -> str:
    counts: dict[str, int] = {}
    for stored in tensors.values():
        name = str(stored.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + stored.shape.numel()
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def _said(stored: Stored) -> str:
    return f"{str(stored.dtype).removeprefix('torch.')}{list(stored.shape)}"


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
