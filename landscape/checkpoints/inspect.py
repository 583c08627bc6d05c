"""What a run or a checkpoint is, without reading tensor data."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from landscape.checkpoints.format import RUN_FILE, STATE_FILE, CheckpointError, unseal
from landscape.checkpoints.reader import open_run


def describe(path: str | Path) -> str:
    """A few lines on a run directory or on one checkpoint of it."""
    path = Path(path)
    if (path / RUN_FILE).is_file():
        return _describe_run(path)
    if (path / STATE_FILE).is_file():
        return _describe_checkpoint(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    raise ValueError(f"{path} is neither a run ({RUN_FILE}) nor a checkpoint ({STATE_FILE}) of landscape's format")


def _describe_run(path: Path) -> str:
    run = open_run(path)
    c, steps = run.config, run.steps
    lines = [
        f"{path}: a run in landscape's format, version {run.record['format_version']}, {run.status}",
        f"  task {run.task}, {c.algorithm}{f' ({c.order})' if c.algorithm == 'dpsgd' else ''}, {c.num_learners} learners x {c.local_batch_size}, alpha {c.learning_rate:g}, seed {c.seed}",
        f"  topology {run.record['topology']['name']}, data {run.record['data']['name']} ({run.record['data']['fingerprint']['train']})",
        f"  {len(steps)} checkpoints"
        + (f": steps {', '.join(map(str, steps[:12]))}{', ...' if len(steps) > 12 else ''}" if steps else ""),
    ]
    return "\n".join(lines)


def _describe_checkpoint(path: Path) -> str:
    state = unseal(path / STATE_FILE)
    lines = [
        f"{path}: a checkpoint in landscape's format, version {state['format_version']}: {state['num_learners']} learners at step {state['step']}"
        + (", with momentum" if state["momentum"] else ""),
    ]
    for name in sorted(state["files"]):
        try:
            with safe_open(path / name, framework="pt") as file:
                shapes = [(key, file.get_slice(key)) for key in file.keys()]  # noqa: SIM118 - not a dict
                listed = ", ".join(f"{k} {s.get_dtype()}{list(s.get_shape())}" for k, s in shapes)
        except (FileNotFoundError, SafetensorError) as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from None
        lines.append(f"  {name}: {listed}")
    return "\n".join(lines)
