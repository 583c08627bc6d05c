"""Writing the run format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from landscape.ranks import current
from landscape.training.state import LearnerState


class RunWriter:
    """Writes one run directory, all processes of the run together: each its own learners, the first what is written once.

    Args:
        path: the run directory; made if missing.
        record: the content of run.json (task, config, provenance ...).
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.ranks = path, current()
        self.record = {"format": "landscape-run", "format_version": FORMAT_VERSION, **record}
        self._metrics: TextIO | None = None
        with self.ranks.agree():
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            if self.ranks.leads:
                for left in (path / CHECKPOINTS).glob(f"{TEMPORARY_PREFIX}*"):  # of a writer that was killed
                    shutil.rmtree(left)

    def write_record(self, **changes: Any) -> None:
        """Write run.json, with changes to it."""
        self.record.update(changes)
        if self.ranks.leads:
            with _told("the record of the run", self.path / RUN_FILE):
                write_atomically(self.path / RUN_FILE, seal(self.record))

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines of metrics.jsonl from a step on, and one cut short: what a run resumed at that step will log again."""
        path = self.path / METRICS_FILE
        if not self.ranks.leads or not path.exists():
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
        if not self.ranks.leads:
            return
        with _told(f"the metrics of step {entry['step']}", self.path / METRICS_FILE):
            if self._metrics is None:
                self._metrics = open(self.path / METRICS_FILE, "a")  # noqa: SIM115 - closed by close()
            self._metrics.write(json.dumps(_finite(entry)) + "\n")
            self._metrics.flush()

    def close(self) -> None:
        """Close metrics.jsonl; a line that could not be written has been told of."""
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            with suppress(OSError):
                metrics.close()

    def save_checkpoint(
        self,
        state: LearnerState,
        model: FunctionalModel,
        facts: dict[str, Any],
        *,
        held: range | None = None,
        num_learners: int | None = None,
    ) -> Path:
        """Write a checkpoint of all learners, whole or not at all; every process writes those that it holds.

        Args:
            state: the learners held here, of one replica.
            model: tells the names.
            facts: what else state.json holds (learning rate, local batch size ...).
            held: which learners these are; by default all there are.
            num_learners: how many there are in all; by default those held.

        Raises:
            OSError: it could not be written, on this or, as an AgreedError, on another process; earlier checkpoints are untouched.
        """
        ranks, final = self.ranks, self.path / CHECKPOINTS / step_name(state.step)
        held = range(len(state.params)) if held is None else held
        count = len(state.params) if num_learners is None else num_learners
        exists, number = ranks.collect((final.exists(), os.getpid()))[0]
        if exists:
            return final
        beside = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{number}")
        try:
            with ranks.agree(), _told(f"the checkpoint of step {state.step}", final):
                if self._metrics is not None:
                    os.fsync(self._metrics.fileno())  # no later than the checkpoint from which a resumed run adds lines
                beside.mkdir(exist_ok=ranks.size > 1)
                files = self._write_learners(beside, state, model, held, count)
                sync_folder(beside)
            record = {
                "format": "landscape-checkpoint",
                "format_version": FORMAT_VERSION,
                "step": state.step,
                "num_learners": count,
                "parameters": [[n, list(s)] for n, s in zip(model.layout.names, model.layout.shapes, strict=True)],
                "buffers": sorted(state.buffers),
                "momentum": state.momentum is not None,
                **facts,
                "files": {name: entry for some in ranks.collect(files) for name, entry in some.items()},
            }
            with ranks.agree(), _told(f"the checkpoint of step {state.step}", final):
                if ranks.leads:
                    write_synced(beside / STATE_FILE, seal(record))
                    sync_folder(beside)
                    os.rename(beside, final)
                    sync_folder(final.parent)
        except BaseException:
            if ranks.leads:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        return final

    def _write_learners(self, folder: Path, state: LearnerState, model: FunctionalModel, held: range, count: int) -> dict[str, dict[str, Any]]:  # fmt: skip
        """Sizes and checksums of the files written, by name."""
        files: dict[str, dict[str, Any]] = {}
        for i, learner in enumerate(held):
            buffers = {n: b[i] for n, b in state.buffers.items()}
            weights = model.state_dict(state.params[i], buffers)
            _write_tensors(folder, shard_name("learner", learner, count), weights, files)
            if state.momentum is not None:
                momentum = model.layout.split(state.momentum[i])
                _write_tensors(folder, shard_name("optimizer", learner, count), momentum, files)
        return files


@contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    """Within, an OSError says what could not be written."""
    try:
        yield
    except OSError as error:
        text = f"{what} could not be written ({error.strerror}); earlier checkpoints are untouched"
        raise OSError(error.errno, text, str(path)) from error


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
