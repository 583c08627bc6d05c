"""Writing the run format."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
from torch import Tensor

from landscape.checkpoints.format import (
    CHECKPOINTS,
    FORMAT_VERSION,
    METRICS_FILE,
    RUN_FILE,
    STATE_FILE,
    TEMPORARY_PREFIX,
    digest,
    seal,
    shard_name,
    step_name,
    sync_folder,
    write_atomically,
    write_synced,
)
from landscape.functional import FunctionalModel
from landscape.training.state import LearnerState


class RunWriter:
    """Writes one run directory.

    Args:
        path: the run directory; made if missing.
        record: the content of run.json (task, config, provenance ...).
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = {"format": "landscape-run", "format_version": FORMAT_VERSION, **record}
        self._metrics: TextIO | None = None
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for left in (path / CHECKPOINTS).glob(f"{TEMPORARY_PREFIX}*"):  # of a writer that was killed
            shutil.rmtree(left)

    def write_record(self, **changes: Any) -> None:
        """Write run.json, with changes to it."""
        self.record.update(changes)
        write_atomically(self.path / RUN_FILE, seal(self.record))

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines of metrics.jsonl from a step on, and one cut short: what a run resumed at that step will log again."""
        path = self.path / METRICS_FILE
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["step"] < step:
                kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())

    def append_metrics(self, entry: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; non-finite numbers become null."""
        if self._metrics is None:
            self._metrics = open(self.path / METRICS_FILE, "a")  # noqa: SIM115 - closed by close()
        self._metrics.write(json.dumps(_finite(entry)) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def save_checkpoint(self, state: LearnerState, model: FunctionalModel, facts: dict[str, Any]) -> Path:
        """Write a checkpoint of all learners, whole or not at all.

        Args:
            state: the learners of one replica.
            model: tells the names.
            facts: what else state.json holds (learning rate, local batch size ...).
        """
        final = self.path / CHECKPOINTS / step_name(state.step)
        if final.exists():
            return final
        beside = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}")
        try:
            beside.mkdir()
            count = len(state.params)
            files: dict[str, dict[str, Any]] = {}
            for j in range(count):
                buffers = {n: b[j] for n, b in state.buffers.items()}
                _write_tensors(
                    beside, shard_name("learner", j, count), model.state_dict(state.params[j], buffers), files
                )
                if state.momentum is not None:
                    momentum = model.layout.split(state.momentum[j])
                    _write_tensors(beside, shard_name("optimizer", j, count), momentum, files)
            record = {
                "format": "landscape-checkpoint",
                "format_version": FORMAT_VERSION,
                "step": state.step,
                "num_learners": count,
                "parameters": [[n, list(s)] for n, s in zip(model.layout.names, model.layout.shapes, strict=True)],
                "buffers": sorted(state.buffers),
                "momentum": state.momentum is not None,
                **facts,
                "files": files,
            }
            write_synced(beside / STATE_FILE, seal(record))
            sync_folder(beside)
            os.rename(beside, final)
            sync_folder(final.parent)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise OSError(
                error.errno,
                f"the checkpoint of step {state.step} could not be written ({error.strerror}); earlier ones are untouched",
                str(final),
            ) from error
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return final


def _write_tensors(folder: Path, name: str, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> None:
    content = safetensors.torch.save({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()})
    write_synced(folder / name, content)
    files[name] = {"bytes": len(content), "sha256": digest(content)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
