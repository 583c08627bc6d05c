from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as EarlierProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import dcp, dcp_metadata, recorded, sharded, torch_archive, zip_table
from landscape.checkpoints.importers.found import Found, Stored, Weights
from landscape.checkpoints.importers.sharded import Part, assembled
from landscape.checkpoints.importers.torch_archive import TENSOR_NAMES, Place
from tests.checkpoints.importers.fixtures_sharded import (
    ROOT,
    STEPS,
    Hostile,
    assert_same,
    contents,
    damaged,
    expected,
    four,
    network,
    save_alone,
    two,
)

pytestmark = pytest.mark.slow


def found_at(folder: Path) -> Found:
    found = dcp.find(folder)
    assert found is not None
    return found


# what torch, Lightning and Accelerate write


@pytest.mark.parametrize(
    ("name", "of", "kind", "step"),
    [
        ("ddp", "ddp", "possibly mixed", STEPS),
        ("fsdp1", "fsdp1", "shards of one model", None),
        ("fsdp2", "fsdp2", "shards of one model", 7),
        ("step-12", "fsdp2", "shards of one model", 12),
        ("shapes", "shapes", "possibly mixed", None),
        ("accelerate", "accelerate", "shards of one model", None),
        ("lightning", "lightning", "shards of one model", STEPS),
    ],
)
def test_reads_to_the_bit(name: str, of: str, kind: str, step: int | None) -> None:
    found = found_at(two() / name)
    assert (found.kind, found.step, len(found.models)) == (kind, step, 1)
    assert found.reasons
    assert found.path == two() / name
    for stored in found.models[0].tensors.values():
        read = stored.read()
        assert (read.shape, read.dtype) == (stored.shape, stored.dtype)
    assert_same(contents(found.models[0]), expected(two(), of))


def test_order_is_that_of_the_state_that_was_saved() -> None:
    """The planner spreads tensors over processes by size, so the index has them in another order, to which no optimizer's numbers belong."""
    folder = two() / "ddp"
    listed = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
    names = [n.removeprefix("model.") for n in listed if n.startswith("model.")]
    assert list(found_at(folder).models[0].tensors) == [f"module.{n}" for n in network(0).state_dict()] != names


def test_numbered_moments_without_an_order_are_left_out(tmp_path: Path) -> None:
    folder = changed(two() / "ddp", tmp_path, lambda metadata: setattr(metadata, "planner_data", None))
    found = found_at(folder)
    assert found.models[0].optimizer is not None
    assert found.models[0].optimizer.slots == {}
    assert any("order that is not recorded" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("ddp", {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0.01}),
        ("fsdp2", {"learning_rate": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "optimizer_step": STEPS}),
        ("step-12", {"learning_rate": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "optimizer_step": STEPS}),
        ("fsdp1", {"learning_rate": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0, "optimizer_step": STEPS}),
        ("lightning", {"learning_rate": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "optimizer_step": STEPS}),
        ("accelerate", {"learning_rate": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "optimizer_step": STEPS}),
    ],
)  # fmt: skip
def test_what_the_optimizer_says(name: str, facts: dict[str, Any]) -> None:
    (model,) = found_at(two() / name).models
    assert model.optimizer is not None
    assert model.optimizer.facts == facts


def test_formats_and_counters() -> None:
    assert found_at(two() / "ddp").facts["epoch"] == 2
    assert found_at(two() / "fsdp2").facts["epoch"] == 3
    titan, light, accelerate = (found_at(two() / name) for name in ("step-12", "lightning", "accelerate"))
    assert "torchtitan" in titan.format
    assert "Lightning" in light.format
    assert light.facts["writer_version"].startswith("Lightning 2.")
    assert light.facts["epoch"] == 1
    assert "Accelerate" in accelerate.format
    inner = found_at(two() / "accelerate" / "pytorch_model_fsdp_0")
    assert inner.format == accelerate.format
    assert list(inner.models[0].tensors) == [f"model.{n}" for n in accelerate.models[0].tensors]
    with pytest.raises(CheckpointError, match="holds no weights"):
        dcp.find(two() / "accelerate" / "optimizer_0")


@pytest.mark.parametrize("name", ["learners", "slashes", "stack", "own"])
def test_learners(name: str) -> None:
    found = found_at(two() / name)
    assert (found.kind, len(found.models), found.facts["num_learners"]) == ("learners", 2, 2)
    for rank, model in enumerate(found.models):
        wanted = load_file(two() / f"{'learners' if name == 'learners' else 'apart'}.{rank}.expected.safetensors")
        if name == "slashes" or name == "stack":  # saved after training, like "learners"
            wanted = load_file(two() / f"learners.{rank}.expected.safetensors")
            wanted = {n: t for n, t in wanted.items() if "/" not in n}
        assert_same(contents(model), wanted)
        assert model.source not in [other.source for other in found.models if other is not model]
    if name == "learners":
        assert found.step == STEPS
        assert found.models[1].optimizer is not None
        assert found.models[1].optimizer.facts["momentum"] == 0.9


def test_a_stack_is_one_only_where_nothing_else_is_likely() -> None:
    assert found_at(two() / "stack_of_one").kind == "learners"  # one matrix: two learners a process
    square = found_at(two() / "square")  # FSDP of layers that all have four rows
    assert square.kind == "shards of one model"
    assert any("stacked along a first axis" in reason for reason in square.reasons)
    asked = dcp.unstack(square, 4)
    assert (asked.kind, len(asked.models)) == ("learners", 4)
    whole = square.models[0].tensors["1.weight"].read()
    for j, model in enumerate(asked.models):
        assert torch.equal(model.tensors["1.weight"].read(), whole[j])
    with pytest.raises(CheckpointError, match="does not begin with 3 learners"):
        dcp.unstack(square, 3)
    with pytest.raises(CheckpointError, match="4 learners already"):
        dcp.unstack(asked, 4)


def test_a_learner_of_a_stack_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    fill = Place.fill
    monkeypatch.setattr(Place, "fill", lambda place, into: (numbers.append(into.numel()), fill(place, into))[1])
    found = found_at(two() / "stack_of_one")
    assert not numbers
    found.models[2].tensors["0.weight"].read()
    assert numbers == [30]


def test_unstacks_what_is_in_memory_too() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    stored = {"w": Stored(rows.shape, rows.dtype, lambda: rows)}
    found = dcp.unstack(Found(Path("x"), "any", "one model", (Weights("x", stored),)), 3)
    assert [float(model.tensors["w"].read()[0]) for model in found.models] == [0, 2, 4]


# what cannot be known


@pytest.mark.parametrize("name", ["apart", "threads", "single", "async"])
def test_replicas_that_came_apart_are_silently_mixed_and_flagged(name: str) -> None:
    """Two ranks save different weights under the same names: torch keeps some tensors of one and some of the other, and reads them back so."""
    found = found_at(two() / name)
    assert found.kind == "possibly mixed"
    assert any("ranks 0, 1" in reason for reason in found.reasons)
    assert any("mixes them" in reason for reason in found.reasons)
    ranks = [load_file(two() / f"apart.{rank}.expected.safetensors") for rank in range(2)]
    read = contents(found.models[0])
    telling = [n for n in read if not torch.equal(ranks[0][n], ranks[1][n])]
    of_first = {n for n in telling if torch.equal(read[n], ranks[0][n])}
    of_second = {n for n in telling if torch.equal(read[n], ranks[1][n])}
    assert of_first | of_second == set(telling)
    assert of_first
    assert of_second


def test_one_ranks_copy_is_one_model_of_which_more_is_not_known() -> None:
    found = found_at(two() / "lowest")
    assert found.kind == "one model"
    assert any("rank 0" in reason for reason in found.reasons)
    assert any("not recorded" in reason for reason in found.reasons)
    assert_same(contents(found.models[0]), load_file(two() / "apart.0.expected.safetensors"))


def test_replicas_of_shards() -> None:
    """HSDP: two replicas of two shards. Which replica a part is from differs between tensors."""
    same, apart, lowest = (found_at(four() / name) for name in ("hsdp", "hsdp_apart", "hsdp_lowest"))
    assert_same(contents(same.models[0]), expected(four(), "hsdp.0"))
    replicas = [expected(four(), f"hsdp_apart.{j}") for j in range(2)]
    read = contents(apart.models[0])
    assert all(not all(torch.equal(read[n], replica[n]) for n in read) for replica in replicas)
    assert same.kind == apart.kind == "possibly mixed"
    assert any("replicated" in reason for reason in apart.reasons)
    assert lowest.kind == "shards of one model"
    assert_same(contents(lowest.models[0]), replicas[0])


def test_shards_of_shards() -> None:
    """Tensor parallelism under FSDP; a bias that one of the two does not cut is there twice."""
    found = found_at(four() / "parallel")
    assert_same(contents(found.models[0]), expected(four(), "parallel"))
    assert found.kind == "possibly mixed"
    assert any("2.bias" in reason for reason in found.reasons)


# laziness


def test_finding_reads_counters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    fill = Place.fill
    monkeypatch.setattr(Place, "fill", lambda place, into: (numbers.append(into.numel()), fill(place, into))[1])
    for name in ("ddp", "fsdp2", "learners", "stack", "shapes", "step-12"):
        found_at(two() / name)
    assert set(numbers) == {1}


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from landscape.checkpoints.importers import dcp, fsdp
torch.empty(1 << 20).fill_(1).sum()
found = dcp.find(Path(sys.argv[1]))
tensors = found.models[0].tensors
result = torch.empty(sum(t.shape.numel() for t in tensors.values()))
pages = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
at = 0
for stored in tensors.values():
    result[at : at + stored.shape.numel()] = stored.read().flatten()
    at += stored.shape.numel()
status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with that of the process that started this one
peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
print(pages, peak, result.nbytes, result.double().sum().item())
"""


def test_memory_is_the_result_and_one_tensor() -> None:
    """200 MB in twelve tensors of two parts: 16.8 MB beside the result."""
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, str(two() / "large")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is freed goes back
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    before, peak, size, total = (float(word) for word in ended.stdout.split())
    assert size == 12 * 4096 * 1024 * 4
    assert total == sum((10 * i + rank) * 2048 * 1024 for i in range(12) for rank in range(2))
    assert peak - before - size < 1.4 * 4096 * 1024 * 4


# damaged and hostile


def changed(folder: Path, tmp_path: Path, change: Callable[[Metadata], object], name: str = "changed") -> Path:
    """A copy of a checkpoint whose index is changed."""
    copy = tmp_path / name
    shutil.copytree(folder, copy)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    replaced = change(metadata)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata if replaced is None else replaced))
    return copy


def read_all(folder: Path) -> None:
    for model in found_at(folder).models:
        contents(model)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)


HIDDEN = {
    "instead of it": lambda metadata, bad: bad,
    "in its plan": lambda metadata, bad: setattr(metadata, "planner_data", {"x": [bad]}),
    "as a key": lambda metadata, bad: metadata.storage_data.update({bad: 1}),
    "as a shape": lambda metadata, bad: setattr(metadata.state_dict_metadata["0.weight"], "size", bad),
    "as an attribute": lambda metadata, bad: setattr(metadata, "extra", bad),
    "as an identity": lambda metadata, bad: setattr(metadata, "storage_meta", bad),
}


@pytest.mark.parametrize("where", HIDDEN)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_hostile_index(where: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = changed(two() / "apart", tmp_path, lambda metadata: None)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    bad = HIDDEN[where](metadata, Hostile(marker)) or metadata
    (folder / ".metadata").write_bytes(pickle.dumps(bad, protocol=protocol))
    refused(folder, r"names '(posix|nt)\.system'.*Nothing was run")
    assert not marker.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # what torch does
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(V1\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x01x\x85R.",
        b"(iposix\nsystem\n.",
        b"\x80\x02(cposix\nsystem\nX\x01\x00\x00\x00xo.",
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93\x8c\x08__init__\x86\x8c\x08builtins\x8c\x07getattr\x93R.",
        b"\x80\x02c__builtin__\ngetattr\nctorch\nSize\nX\x0b\x00\x00\x00__globals__\x86R.",
        b"\x80\x02ctorch.serialization\n_get_layout\n}X\x08\x00\x00\x00__code__Nsb.",
        b"\x80\x04N\x94r\xff\xff\xff\xffN.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fx.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffx.",
        b"\x80\x04\x8b\xff\xff\xff\xff.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        b"\x80\x04" + b"(" * 10_000 + b".",
        b"\x80\x04" + b"]" * 10_000 + b"a" * 9_999 + b".",
        b"\x80\x04)" + b"\x94h\x00\x86" * 100 + b"}h\x00Ns.",
        b"\x80\x04}" + b"\x94h\x00h\x00s" * 100 + b".",
        b"\x80\x04)\x94"
        + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(80))
        + b"}\x94h\x50Ns.",
        b"\x80\x04.",
        b"",
        b".",
        b"\x80\x04}u.",
        b"\x80\x04]b.",
        b"\x80\x04\x8c\x02\xff\xfe.",
        b"\x80\x04\x8a\x20" + b"\x7f" * 32 + b".",
    ],
)
def test_hostile_pickles(content: bytes, tmp_path: Path) -> None:
    """Code, memory, hashes of tuples nested 80 times in pairs, recursion: nothing but an error of ours, at once."""
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        dcp.find(tmp_path)


def test_a_class_that_is_allowed_is_not_called(tmp_path: Path) -> None:
    note = recorded.read(b"\x80\x02ctorch\nSize\nK\x05\x85R.", "x", {"torch.Size"}.__contains__)
    assert (note.name, note.arguments) == ("torch.Size", (5,))
    with pytest.raises(CheckpointError, match=r"builtins\.bytearray"):
        recorded.read(pickle.dumps(bytearray(3)), "x", dcp_metadata.NAMES.__contains__)


def with_part(folder: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    """A copy of a checkpoint in which one entry is another archive, in a file of its own."""

    def point(metadata: Metadata) -> None:
        (index,) = [index for index in metadata.storage_data if index.fqn == name]
        metadata.storage_data[index] = _StorageInfo("__0_9.distcp", 0, len(content))

    copy = changed(folder, tmp_path, point)
    (copy / "__0_9.distcp").write_bytes(content)
    return copy


def archive_of(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def test_hostile_part(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = with_part(two() / "apart", tmp_path, "0.weight", archive_of(Hostile(marker)))
    assert found_at(folder).kind == "possibly mixed"
    refused(folder, r"__0_9.distcp: 0.weight names 'posix.system'")
    assert not marker.exists()


def test_hostile_setting(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = with_part(two() / "ddp", tmp_path, "step", archive_of(Hostile(marker)))
    found = found_at(folder)
    assert found.step is None
    assert any("step was not read" in note and "posix.system" in note for note in found.notes)
    assert not marker.exists()


def test_hostile_meta(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    shutil.copytree(two() / "lightning", tmp_path / "lightning")
    torch.save({"global_step": 4, "callbacks": Hostile(marker)}, tmp_path / "lightning" / "meta.pt")
    found = found_at(tmp_path / "lightning")
    assert found.step is None
    assert any("meta.pt" in note and "posix.system" in note for note in found.notes)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(5, 5), r"of shape \[5, 5\], but torch.float32 and \[5, 6\]"),
        (torch.zeros(5, 6).double(), "torch.float64"),
        (torch.zeros(5, 6).to_sparse(), "names 'torch._utils._rebuild_sparse"),
        (torch.zeros(1).expand(5, 6), "repeat the 4 bytes"),
        ([torch.zeros(5, 6)], "holds no plain tensor"),
        (torch.zeros(5, 6, dtype=torch.complex64).conj(), "conjugate"),
        (torch.zeros(5, 6, device="meta"), "names|without numbers"),
    ],
)  # fmt: skip
def test_parts_that_are_not_what_is_announced(value: object, message: str, tmp_path: Path) -> None:
    content = archive_of(value) + bytes(0)
    folder = with_part(two() / "apart", tmp_path, "0.weight", content)
    refused(folder, message)


def rezipped(content: bytes, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            change(new, member, old.read(member))
    return file.getvalue()


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    content = archive_of(torch.arange(30.0).reshape(5, 6))

    def compress(new: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(member.filename, data, zipfile.ZIP_DEFLATED)

    def reverse(new: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(member.filename, b"big" if member.filename.endswith("byteorder") else data)

    def lose(new: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        if not member.filename.endswith("data/0"):
            new.writestr(member.filename, data)

    def repeat(new: zipfile.ZipFile, member: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(member.filename, data)
        if member.filename.endswith("data.pkl"):
            new.writestr(f"other/{member.filename}", data)

    for j, (change, message) in enumerate(
        [(compress, "is compressed"), (reverse, "big-endian"), (lose, "lacks data/0"), (repeat, "2 data.pkl")]
    ):
        (tmp_path / str(j)).mkdir()
        refused(with_part(two() / "apart", tmp_path / str(j), "0.weight", rezipped(content, change)), message)
    (tmp_path / "comment").mkdir()
    refused(with_part(two() / "apart", tmp_path / "comment", "0.weight", content + b"!"), "no table of contents")


def test_wide_archives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tables of 64 bits, which torch writes beyond 4 GB, as zipfile writes them when it is told that 100 bytes are much."""
    content = archive_of({"w": torch.arange(300.0)})
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    wide = rezipped(content, lambda new, member, data: new.writestr(member.filename, data))
    monkeypatch.undo()
    assert zip_table.END_64 in wide
    (tmp_path / "w.pt").write_bytes(wide)
    archive = torch_archive.archive(tmp_path / "w.pt", 0, len(wide), "w")
    place = torch_archive.place_of(archive.content(TENSOR_NAMES.__contains__).by_name()["w"], archive, "w")
    assert place is not None
    read = torch.empty(300)
    place.fill(read)
    assert torch.equal(read, torch.arange(300.0))


def test_missing_and_cut_files(tmp_path: Path) -> None:
    for j, (change, message) in enumerate(
        [
            (lambda f: (f / "__1_0.distcp").unlink(), r"__1_0.distcp cannot be read: No such file"),
            (
                lambda f: os.truncate(f / "__1_0.distcp", 5000),
                r"__1_0.distcp: .* is cut short: it ends at byte \d+, but the file has 5000",
            ),
            (lambda f: (f / ".metadata").unlink(), "not the .metadata"),
            (lambda f: os.truncate(f / ".metadata", 700), r"\.metadata is (cut short|damaged)"),
            (lambda f: ((f / "__1_0.distcp").unlink(), os.mkfifo(f / "__1_0.distcp")), "not a regular file"),
        ]
    ):
        shutil.copytree(two() / "fsdp2", tmp_path / str(j))
        change(tmp_path / str(j))
        refused(tmp_path / str(j), message)


def test_a_file_that_shrinks_after_it_was_found(tmp_path: Path) -> None:
    shutil.copytree(two() / "fsdp2", tmp_path / "x")
    found = found_at(tmp_path / "x")
    os.truncate(tmp_path / "x" / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="damaged, cut short"):
        contents(found.models[0])


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes((two() / "apart" / "__0_0.distcp").read_bytes())

    def pointing(name: object) -> Callable[[Metadata], None]:
        def change(metadata: Metadata) -> None:
            for index, info in metadata.storage_data.items():
                metadata.storage_data[index] = replace(info, relative_path=name)

        return change

    for j, name in enumerate(["../secret", str(tmp_path / "secret"), "x/../../secret", "a\0b", "", "x" * 5000, 5]):
        folder = changed(two() / "apart", tmp_path, pointing(name), str(j))
        refused(folder, r"outside its folder|names a file by|cannot be read|does not say where")
    folder = changed(two() / "apart", tmp_path, lambda metadata: None, "linked")
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").symlink_to(tmp_path / "secret")
    refused(folder, "outside its folder")


def _weight(metadata: Metadata) -> TensorStorageMetadata:
    return metadata.state_dict_metadata["model.0.weight"]


def _info(metadata: Metadata, **values: Any) -> None:
    index = MetadataIndex("model.0.weight", [0, 0])
    metadata.storage_data[index] = replace(metadata.storage_data[index], **values)


CHANGES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "part missing": (lambda m: _weight(m).chunks.pop(), r"is not whole"),
    "first part missing": (lambda m: _weight(m).chunks.pop(0), r"begins at \[0, 0\] is missing|is not whole"),
    "part twice": (lambda m: _weight(m).chunks.append(_weight(m).chunks[0]), r"overlap at \[0, 0\]"),
    "part shifted": (lambda m: setattr(_weight(m).chunks[1], "sizes", torch.Size([1, 6])), r"begins at \[4, 0\] is missing"),
    "part too large": (lambda m: setattr(_weight(m).chunks[1], "sizes", torch.Size([3, 6])), "reaches beyond"),
    "axes differ": (lambda m: setattr(_weight(m).chunks[1], "sizes", torch.Size([12])), "has 2 axes"),
    "no parts": (lambda m: _weight(m).chunks.clear(), "is not whole"),
    "giant": (lambda m: setattr(_weight(m), "size", torch.Size([1 << 40, 1 << 40])), "is not whole"),
    "giant part": (lambda m: setattr(_weight(m).chunks[1], "sizes", torch.Size([1 << 40, 6])), "cannot hold"),
    "negative": (lambda m: setattr(_weight(m), "size", (-5, 6)), "does not say its shape"),
    "negative part": (lambda m: setattr(_weight(m).chunks[1], "offsets", (-3, 0)), "does not say where a part"),
    "many axes": (lambda m: setattr(_weight(m), "size", (1,) * 100), "does not say its shape"),
    "empty but endless": (lambda m: (setattr(_weight(m), "size", (0, 1 << 47, 1 << 47)), _weight(m).chunks.clear()), "no tensor has the shape"),
    "truth for a size": (lambda m: setattr(_weight(m), "size", (True, 6)), "does not say its shape"),
    "text for a size": (lambda m: setattr(_weight(m), "size", "56"), "does not say its shape"),
    "another type": (lambda m: setattr(_weight(m).properties, "dtype", torch.float64), "torch.float64"),
    "unknown type": (lambda m: setattr(_weight(m).properties, "dtype", torch.qint8), "qint8, which is not read"),
    "negative place": (lambda m: _info(m, offset=-1), "does not say where"),
    "place beyond": (lambda m: _info(m, offset=1 << 45), "is cut short"),
    "length beyond": (lambda m: _info(m, length=1 << 70), "is cut short"),
    "overlap": (lambda m: _info(m, offset=100), "overlaps another entry"),
    "no place": (lambda m: m.storage_data.pop(MetadataIndex("model.0.weight", [0, 0])), "in which file"),
    "no places": (lambda m: setattr(m, "storage_data", None), "does not say where its tensors are"),
    "no list": (lambda m: setattr(m, "state_dict_metadata", [1]), "lists no tensors"),
    "name not text": (lambda m: m.state_dict_metadata.update({"x": 3}), "does not say what x is"),
    "part not part": (lambda m: _weight(m).chunks.append(7), "does not say where a part"),
    "setting nowhere": (lambda m: m.state_dict_metadata.update({"x": BytesStorageMetadata()}), "does not say where x is"),
    "other root": (lambda m: TensorProperties(), "not torch.distributed.checkpoint's"),
    "extension": (lambda m: _info(m, transform_descriptors=["stream.zstd/1"]), "extension 'stream.zstd/1'"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_indices_that_say_what_cannot_be(change: str, tmp_path: Path) -> None:
    edit, message = CHANGES[change]
    keep = change in ("other root",)
    refused(changed(two() / "fsdp2", tmp_path, edit if keep else lambda m: (edit(m), None)[1]), message)


def test_refused_by_name(tmp_path: Path) -> None:
    refused(two() / "extended", "extension 'stream.unchanged/1'")
    refused(two() / "safetensors", "SerializationFormat.SAFETENSORS")
    flat = TensorStorageMetadata(
        TensorProperties(), torch.Size([3]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))]
    )
    content = archive_of(torch.zeros(3))
    index = {MetadataIndex("model._flat_param", [0]): _StorageInfo("__0_0.distcp", 0, len(content))}
    (tmp_path / "__0_0.distcp").write_bytes(content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"model._flat_param": flat}, None, index)))
    refused(tmp_path, "SHARDED_STATE_DICT")


def test_a_rank_without_its_index(tmp_path: Path) -> None:
    shutil.copytree(two() / "own", tmp_path / "own")
    (tmp_path / "own" / "__0.metadata").unlink()
    refused(tmp_path / "own", r"__0.metadata is missing")


def test_what_is_something_else(tmp_path: Path) -> None:
    assert dcp.find(tmp_path) is None
    (tmp_path / "model.pt").write_bytes(b"x")
    assert dcp.find(tmp_path) is None
    assert dcp.find(tmp_path / "model.pt") is None
    assert dcp.find(tmp_path / "missing") is None


def test_earlier_versions(tmp_path: Path) -> None:
    """torch 2.0 to 2.2 wrote properties of another class, no version and no list of paths."""

    def earlier(metadata: Metadata) -> None:
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.properties = EarlierProperties(dtype=entry.properties.dtype)
        for name in ("planner_data", "storage_meta", "version"):
            delattr(metadata, name)

    found = found_at(changed(two() / "fsdp2", tmp_path, earlier))
    assert_same(contents(found.models[0]), expected(two(), "fsdp2"))
    assert "writer_version" not in found.facts


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol: int, tmp_path: Path) -> None:
    folder = changed(two() / "fsdp2", tmp_path, lambda m: None)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    assert_same(contents(found_at(folder).models[0]), expected(two(), "fsdp2"))


def test_names_of_parts_of_one_network_are_no_learners(tmp_path: Path) -> None:
    """Pipeline stages under `rank0.`, a Sequential of equal layers under `model.`, and a learner that is missing."""

    def saved(name: str, state: dict[str, Any]) -> Path:
        return save_alone(state, tmp_path / name)

    stages = found_at(saved("stages", {"rank0.embed": torch.zeros(3), "rank1.head": torch.ones(4)}))
    assert (stages.kind, list(stages.models[0].tensors)) == ("one model", ["rank0.embed", "rank1.head"])
    assert any("parts of one network" in reason for reason in stages.reasons)
    layers = found_at(saved("layers", {f"model.{i}.weight": torch.ones(3, 3) for i in range(3)}))
    assert (layers.kind, len(layers.models[0].tensors)) == ("one model", 3)
    ensemble = {f"models.{i}.weight": torch.ones(3, 3) for i in range(3)}
    assert found_at(saved("ensemble", ensemble)).kind == "learners"
    assert found_at(saved("heads", {**ensemble, "trunk.weight": torch.ones(3)})).kind == "one model"
    with pytest.raises(CheckpointError, match=r"learner 0, 2: 1 is missing"):
        found_at(saved("gap", {"learner0.w": torch.zeros(3), "learner2.w": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="different steps"):
        found_at(saved("steps", {f"learner{i}": {"w": torch.zeros(3), "step": 10 * i} for i in range(2)}))


def test_several_optimizers_and_groups(tmp_path: Path) -> None:
    module = network(0, normalised=False)
    first = torch.optim.SGD(
        [{"params": module[0].parameters()}, {"params": module[3].parameters(), "lr": 0.5}], lr=0.1, momentum=0.9
    )
    module(torch.ones(2, 6)).sum().backward()
    first.step()
    save_alone({"model": module.state_dict(), "optimizer": first.state_dict()}, tmp_path / "g")
    found = found_at(tmp_path / "g")
    assert found.models[0].optimizer is not None
    assert found.models[0].optimizer.slots == {}
    assert found.models[0].optimizer.facts == {"momentum": 0.9, "dampening": 0, "weight_decay": 0}
    assert any("several groups" in note for note in found.notes)
    assert any("differ in lr" in note for note in found.notes)
    state = {"model": module.state_dict(), "optimizer_0": first.state_dict(), "optimizer_1": first.state_dict()}
    save_alone(state, tmp_path / "two")
    found = found_at(tmp_path / "two")
    assert found.models[0].optimizer is None
    assert list(found.models[0].tensors) == [f"model.{n}" for n in module.state_dict()]
    assert any("2 optimizers" in note for note in found.notes)


# parts that tile


def _part(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Part:
    return Part(offsets, sizes, 0, lambda: pytest.fail("nothing is read"))


@given(st.data())
def test_parts_tile_if_each_entry_is_in_one_of_them(data: st.DataObject) -> None:
    """Against counting entries, over grids of boxes with some moved, dropped or doubled."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    cuts = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for axis in cuts:
        pairs = list(itertools.pairwise(axis))
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in pairs]
    for _ in range(data.draw(st.integers(0, 2))):
        j = data.draw(st.integers(0, len(boxes))) if boxes else 0
        kind = data.draw(st.sampled_from(["drop", "double", "grow", "nothing"]))
        if j < len(boxes) and kind == "drop":
            boxes.pop(j)
        elif j < len(boxes) and kind == "double":
            boxes.append(boxes[j])
        elif j < len(boxes) and kind == "grow" and shape:
            axis = data.draw(st.integers(0, len(shape) - 1))
            o, s = boxes[j]
            boxes[j] = o, (*s[:axis], min(s[axis] + 1, shape[axis] - o[axis]), *s[axis + 1 :])
    times = torch.zeros(shape)
    for o, s in boxes:
        sharded._box(times, o, s).add_(1)
    parts = [_part(o, s) for o, s in boxes]
    if bool((times == 1).all()):
        stored = assembled(shape, torch.float32, parts, "w")
        assert tuple(stored.shape) == shape
    else:
        wrong = min(tuple(int(i) for i in index) for index in (times != 1).nonzero())
        said = "missing" if times[wrong] == 0 else "overlap"
        with pytest.raises(CheckpointError, match=rf"{said}.*" if said == "overlap" else said) as caught:
            assembled(shape, torch.float32, parts, "w")
        assert str(list(wrong)) in str(caught.value)


def test_thousands_of_parts_are_checked_in_time() -> None:
    parts = [_part((i, j), (1, 1)) for i in range(100) for j in range(100)]
    assembled((100, 100), torch.float32, parts, "w")
    with pytest.raises(CheckpointError, match=r"\[50, 50\] is missing"):
        assembled((100, 100), torch.float32, [part for part in parts if part.offsets != (50, 50)], "w")


# damage at random


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["fsdp2", "learners", "lightning"])
def test_any_damage_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    """Bits flipped, pieces cut, doubled or moved, numbers set to extremes: a result or a CheckpointError."""
    files = _files(two() / name)
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    generator = random.Random(0)
    refusals = []
    for trial in range(30):
        path = generator.choice(sorted(files)) if trial % 2 else ".metadata"
        (tmp_path / path).write_bytes(damaged(files[path], generator))
        try:
            read_all(tmp_path)
        except CheckpointError as error:
            refusals.append(str(error))
        (tmp_path / path).write_bytes(files[path])
    assert len(refusals) > 10
    assert all(str(tmp_path) in message for message in refusals)


def test_every_place_where_an_index_may_be_cut(tmp_path: Path) -> None:
    content = (two() / "apart" / ".metadata").read_bytes()
    for file in ("__0_0.distcp", "__1_0.distcp"):
        shutil.copy(two() / "apart" / file, tmp_path / file)
    for end in range(0, len(content), 23):
        (tmp_path / ".metadata").write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            dcp.find(tmp_path)


@given(st.binary(max_size=200))
@example(b"\x80\x04}.")
def test_any_bytes_as_a_pickle(content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CheckpointError):
        recorded.read(content, "x", lambda name: True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
