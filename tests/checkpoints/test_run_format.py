from __future__ import annotations

import copy
import dataclasses
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from landscape.checkpoints import CheckpointError, open_run, read_checkpoint
from landscape.checkpoints.format import FORMAT_VERSION, seal, unseal, write_atomically
from landscape.checkpoints.reader import restore_state
from landscape.checkpoints.writer import RunWriter
from landscape.functional import FunctionalModel
from landscape.training import LearnerState, TrainConfig

LEARNERS = 3
FACTS = {"algorithm": "dpsgd", "learning_rate": 0.125, "local_batch_size": 7}


class Network(nn.Module):
    """Everything a checkpoint can meet: statistics, a counter, a scalar, tied and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
        self.scale, self.frozen = nn.Parameter(torch.tensor(2.0)), nn.Linear(4, 2)
        self.last.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.frozen(self.last(self.norm(self.first(x))))


def make_model() -> FunctionalModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FunctionalModel(Network(), F.cross_entropy)


def make_state(
    model: FunctionalModel, step: int, *, momentum: bool = True, dtype: torch.dtype = torch.float32
) -> LearnerState:
    """Learners with awkward numbers in them: subnormal, huge, negative zero, infinite, not a number."""
    generator = torch.Generator().manual_seed(step)
    weights, buffers = model.initial_weights()
    params = torch.randn(LEARNERS, len(weights), generator=generator, dtype=torch.float64).to(dtype)
    params[0, :6] = torch.tensor([1e-42, 3e38, -0.0, torch.inf, torch.nan, 1 / 3], dtype=dtype)
    held = {n: torch.randn(LEARNERS, *b.shape, generator=generator).to(b.dtype) for n, b in buffers.items()}
    held["norm.num_batches_tracked"] = torch.tensor([step, step + 1, 2**40])
    buffer = torch.randn(params.shape, generator=generator, dtype=torch.float64).to(dtype) if momentum else None
    return LearnerState(params, held, buffer, step)


def write_run(path: Path, steps: tuple[int, ...] = (0, 5), **options: Any) -> Path:
    model, writer = (
        make_model(),
        RunWriter(path, {"task": "tiny", "config": TrainConfig("dpsgd", 0.1, num_learners=LEARNERS).to_json()}),
    )
    writer.write_record(status="running")
    for step in steps:
        writer.append_metrics({"step": step, "train_loss": 1.0 / (step + 1)})
        writer.save_checkpoint(make_state(model, step, **options), model, FACTS)
    writer.write_record(status="complete")
    writer.close()
    return path


def checkpoint_folder(run: Path, step: int = 5) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


# What is written is what is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [True, False])
def test_a_round_trip_is_bitwise(tmp_path: Path, momentum: bool, dtype: torch.dtype) -> None:
    model = make_model()
    write_run(tmp_path / "run", momentum=momentum, dtype=dtype)
    run = open_run(tmp_path / "run")
    assert run.steps == [0, 5]
    for step in run.steps:
        written, found = make_state(model, step, momentum=momentum, dtype=dtype), run.learners(step)
        assert (found.step, len(found)) == (step, LEARNERS)
        assert found.weights.dtype == dtype
        assert bits(found.weights) == bits(written.params)
        assert set(found.buffers) == set(written.buffers)
        assert all(bits(found.buffers[n]) == bits(b) for n, b in written.buffers.items())
        assert (found.momentum is None) == (not momentum)
        assert not momentum or bits(found.momentum) == bits(written.momentum)
        assert found.layout == model.layout
        assert found.facts == FACTS
        restored = restore_state(found, make_state(model, 99, momentum=momentum, dtype=dtype))
        assert restored.step == step
        assert bits(restored.params) == bits(written.params)
        assert not momentum or bits(restored.momentum) == bits(written.momentum)
        assert all(bits(restored.buffers[n]) == bits(b) for n, b in written.buffers.items())


def test_files_are_plain_safetensors_and_json_with_the_modules_names(tmp_path: Path) -> None:
    run, model = write_run(tmp_path / "run"), make_model()
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "metrics.jsonl", "run.json"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000000", "step-00000005"]
    folder = checkpoint_folder(run)
    shards = [
        f"{kind}-{j:05d}-of-{LEARNERS:05d}.safetensors" for kind in ("learner", "optimizer") for j in range(LEARNERS)
    ]
    assert sorted(p.name for p in folder.iterdir()) == [*shards, "state.json"]
    state = json.loads((folder / "state.json").read_text())
    assert (state["format"], state["format_version"], state["step"], state["num_learners"]) == (
        "landscape-checkpoint",
        1,
        5,
        LEARNERS,
    )
    assert set(state["files"]) == set(shards)
    assert {k: state[k] for k in FACTS} == FACTS
    record = json.loads((run / "run.json").read_text())
    assert (record["format"], record["status"], record["config"]["num_learners"]) == (
        "landscape-run",
        "complete",
        LEARNERS,
    )
    written = make_state(model, 5)
    for j in range(LEARNERS):
        tensors = safetensors.torch.load_file(folder / shards[j])
        fresh = Network()
        assert set(tensors) == set(fresh.state_dict())
        fresh.load_state_dict(tensors, strict=True)
        assert bits(FunctionalModel(fresh, F.cross_entropy).initial_weights()[0]) == bits(written.params[j])
        assert bits(tensors["last.weight"]) == bits(tensors["first.weight"])
        momentum = safetensors.torch.load_file(folder / shards[LEARNERS + j])
        assert set(momentum) == set(model.layout.names)
        assert bits(momentum["scale"]) == bits(model.layout.split(written.momentum[j])["scale"])


def test_averages_by_hand(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    found = read_checkpoint(checkpoint_folder(tmp_path / "run"))
    finite = dataclasses.replace(found, weights=torch.tensor([[0.0, 0], [3, 0], [0, 6]]))
    assert finite.mean.tolist() == [1, 2]
    assert finite.deviations.tolist() == [[-1, -2], [2, -2], [-1, 4]]
    assert finite.consensus_distance == pytest.approx(10**0.5)
    assert finite.weight_variance == pytest.approx(5)
    assert finite.is_finite
    assert not found.is_finite
    assert found.mean_buffers["norm.num_batches_tracked"] == 5
    torch.testing.assert_close(found.mean_buffers["norm.running_var"], found.buffers["norm.running_var"].mean(0))
    assert found.parameters(1)["scale"].shape == ()


def test_a_run_describes_itself(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    assert (run.task, run.status, run.config.num_learners) == ("tiny", "complete", LEARNERS)
    assert run.metrics["train_loss"].tolist() == [1, 1 / 6]
    assert "algorithm='dpsgd'" in repr(run)
    assert ">complete</td>" in run._repr_html_()
    assert repr(run.learners(0)).startswith("Learners(step=0, num_learners=3")


def test_writing_leaves_the_state_alone_and_an_existing_checkpoint_too(tmp_path: Path) -> None:
    model, writer = make_model(), RunWriter(tmp_path / "run", {})
    state = make_state(model, 5)
    copied = copy.deepcopy(state)
    first = writer.save_checkpoint(state, model, FACTS)
    assert bits(state.params) == bits(copied.params)
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    assert writer.save_checkpoint(dataclasses.replace(state, params=state.params + 1), model, {}) == first
    assert {p.name: p.read_bytes() for p in first.iterdir()} == before


# Damage --------------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["learner-00001-of-00003.safetensors", "optimizer-00002-of-00003.safetensors"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.9999])
def test_a_flipped_bit_in_a_tensor_file_is_found_and_the_file_named(tmp_path: Path, name: str, place: float) -> None:
    path = checkpoint_folder(write_run(tmp_path / "run")) / name
    flip(path, int(place * path.stat().st_size))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: its checksum"):
        open_run(tmp_path / "run").learners(5)
    assert open_run(tmp_path / "run").learners(0).step == 0


@pytest.mark.parametrize("learner", [0, 1])
@pytest.mark.parametrize("listed", [True, False])
def test_a_tensor_file_without_a_tensor_that_is_listed_is_named(tmp_path: Path, learner: int, listed: bool) -> None:
    """Its name was damaged in the file's header; or the record, well sealed, lists another."""
    folder = checkpoint_folder(write_run(tmp_path / "run"))
    name = f"learner-0000{learner}-of-00003.safetensors"
    path, record = folder / name, unseal(folder / "state.json")
    parameter = record["parameters"][0][0]
    if listed:
        path.write_bytes(path.read_bytes().replace(f'"{parameter}"'.encode(), f'"{parameter[:-1]}~"'.encode(), 1))
        said = rf"{name} is damaged: its checksum"
    else:
        record["parameters"][0][0] = "another"
        (folder / "state.json").write_bytes(seal(record))
        said = r"learner-00000-of-00003\.safetensors lacks another, which state\.json lists"
    with pytest.raises(CheckpointError, match=said):
        open_run(tmp_path / "run").learners(5)


@pytest.mark.parametrize("name", ["learner-00000-of-00003.safetensors", "optimizer-00000-of-00003.safetensors"])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_truncated_tensor_file_is_named_with_its_sizes(tmp_path: Path, name: str, keep: int) -> None:
    path = checkpoint_folder(write_run(tmp_path / "run")) / name
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(
        CheckpointError, match=rf"{name} is cut short or overlong: {len(content[:keep])} bytes, but {len(content)}"
    ):
        open_run(tmp_path / "run").learners(5)


def read_state(run: Path) -> None:
    open_run(run).learners(5)


JSON_FILES: list[tuple[Callable[[Path], Path], Callable[[Path], Any]]] = [
    (lambda run: checkpoint_folder(run) / "state.json", read_state),
    (lambda run: run / "run.json", open_run),
]


@pytest.mark.parametrize(("locate", "read"), JSON_FILES, ids=["state.json", "run.json"])
def test_every_flipped_bit_in_a_json_file_is_found_and_the_file_named(
    tmp_path: Path, locate: Callable[[Path], Path], read: Callable[[Path], Any]
) -> None:
    """But for a flip that leaves the record the same, as in white space."""
    path = locate(write_run(tmp_path / "run"))
    content = path.read_bytes()
    harmless = 0
    for offset in range(0, len(content), 7):
        flip(path, offset)
        try:
            same = json.loads(path.read_bytes()) == json.loads(content)
        except ValueError:
            same = False
        if same:
            read(tmp_path / "run")
            harmless += 1
        else:
            with pytest.raises(CheckpointError, match=path.name):
                read(tmp_path / "run")
        path.write_bytes(content)
    assert harmless < len(content) / 7 / 4


@pytest.mark.parametrize(("locate", "read"), JSON_FILES, ids=["state.json", "run.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"[1, 2]", b"null", b'"text"', b"\xff\xfe", b'{"checksum": "0"}']
)
def test_a_json_file_with_something_else_in_it_is_named(
    tmp_path: Path, locate: Callable[[Path], Path], read: Callable[[Path], Any], content: bytes
) -> None:
    path = locate(write_run(tmp_path / "run"))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged"):
        read(tmp_path / "run")


@pytest.mark.parametrize(("locate", "read"), JSON_FILES, ids=["state.json", "run.json"])
def test_a_newer_format_says_upgrade(
    tmp_path: Path, locate: Callable[[Path], Path], read: Callable[[Path], Any]
) -> None:
    path = locate(write_run(tmp_path / "run"))
    record = {k: v for k, v in json.loads(path.read_bytes()).items() if k != "checksum"}
    path.write_bytes(seal({**record, "format_version": FORMAT_VERSION + 1, "of_the_future": 1}))
    with pytest.raises(
        CheckpointError,
        match=rf"{path.name} was written by a newer version of landscape \(format 2; .* up to 1\): upgrade",
    ):
        read(tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["learner-00002-of-00003.safetensors", "optimizer-00000-of-00003.safetensors", "state.json"]
)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (checkpoint_folder(write_run(tmp_path / "run")) / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        open_run(tmp_path / "run").learners(5)


def test_what_is_no_run_or_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ValueError, match=r"holds no run \(run\.json is missing\)"):
            open_run(path)
        with pytest.raises(
            ValueError, match=r"there is no checkpoint at|state\.json is missing|no checkpoint of a format known here"
        ):
            read_checkpoint(path)
    run = open_run(write_run(tmp_path / "run"))
    with pytest.raises(ValueError, match="has no checkpoint of step 3; there are 0, 5"):
        run.learners(3)


def test_errors_of_damage_are_value_errors() -> None:
    assert issubclass(CheckpointError, ValueError)


# Writes that fail ----------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk: no file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 1200])
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones_and_nothing_half_done(
    tmp_path: Path, size: int
) -> None:
    run, model = write_run(tmp_path / "run"), make_model()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    writer = RunWriter(run, unseal(run / "run.json"))
    largest = max(len(c) for p, c in before.items() if "step-" in str(p))
    assert size < largest
    with (
        largest_file(size),
        pytest.raises(
            OSError, match=r"checkpoint of step 10 could not be written \(.*\); earlier checkpoints are untouched"
        ),
    ):
        writer.save_checkpoint(make_state(model, 10), model, FACTS)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000000", "step-00000005"]
    assert open_run(run).learners(5).step == 5
    writer.save_checkpoint(make_state(model, 10), model, FACTS)  # and works again once there is room
    assert open_run(run).steps == [0, 5, 10]


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = (run / "run.json").read_bytes()
    writer = RunWriter(run, unseal(run / "run.json"))
    with largest_file(50), pytest.raises(OSError):  # noqa: PT011 - of whatever kind
        writer.write_record(status="diverged")
    assert (run / "run.json").read_bytes() == before
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "metrics.jsonl", "run.json"]


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    left = run / "checkpoints" / ".writing-step-00000010-123"
    left.mkdir()
    (left / "learner-00000-of-00003.safetensors").write_bytes(b"half")
    assert open_run(run).steps == [0, 5]
    RunWriter(run, unseal(run / "run.json"))
    assert not left.exists()


def test_replacing_a_file_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with largest_file(2), pytest.raises(OSError):  # noqa: PT011
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [path]


# metrics.jsonl -------------------------------------------------------------------------------------------------------


def test_non_finite_metrics_become_null(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=())
    writer = RunWriter(run, {})
    writer.append_metrics({"step": 0, "a": float("nan"), "b": [1.0, float("-inf")], "c": {"d": float("inf")}})
    writer.close()
    assert json.loads((run / "metrics.jsonl").read_text()) == {"step": 0, "a": None, "b": [1.0, None], "c": {"d": None}}


@pytest.mark.parametrize("cut", ['{"step": 7, "train_lo', "{", '{"step": 7, "train_loss": 0.1', "\x00\x00\x00"])
def test_a_last_line_cut_short_is_skipped_and_dropped_on_resuming(tmp_path: Path, cut: str) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(cut)
    assert open_run(run).metrics["step"].tolist() == [0, 5]
    writer = RunWriter(run, unseal(run / "run.json"))
    writer.keep_metrics_until(6)
    writer.append_metrics({"step": 6, "train_loss": 0.25})
    writer.close()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 5, 6]


def test_a_run_resumed_at_a_step_logs_that_step_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step, kept in ((6, [0, 5]), (5, [0]), (0, [])):
        RunWriter(run, unseal(run / "run.json")).keep_metrics_until(step)
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == kept


def test_a_run_without_metrics_has_an_empty_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=())
    assert open_run(run).metrics.empty
    RunWriter(run, {}).keep_metrics_until(3)
    assert not (run / "metrics.jsonl").exists()
