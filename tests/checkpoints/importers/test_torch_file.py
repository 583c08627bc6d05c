"""The one place where files of torch.save are loaded: nothing in them is run, and none keeps it busy, whatever its bytes."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import torch_file
from landscape.checkpoints.importers.harmless import LeftOut
from landscape.checkpoints.importers.pickle_bounds import scan
from tests.checkpoints.importers.fixtures_torch import Hostile, Network, legacy, pickled, trained

Write = Callable[[Any, Path], Path]


def zipped(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("write", [zipped, legacy])
def test_settings_and_scores_are_kept_as_plain_values(tmp_path: Path, write: Write) -> None:
    content = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("a/b")), "score": np.float64(0.5), "half": np.float16(2.0),
        "big": np.arange(3, dtype=">i4")[2], "count": np.int64(-3), "flag": np.bool_(True), "random": ("MT19937", np.arange(624, dtype=np.uint32), 624), "torch": torch.__version__,
        "table": collections.defaultdict(list, {"a": [1]}), "counts": collections.Counter("aab"), "size": torch.Size([2, 3]), "bytes": b"\xff",
        "path": pathlib.Path("c"), "words": {"x"}, "device": torch.device("cuda", 1), "dtype": torch.bfloat16, "large": 1 << 100,
    }  # fmt: skip
    read = torch_file.load(write(content, tmp_path / "a.pt"))
    assert vars(read["args"]) == {"lr": 0.1, "out": pathlib.PurePosixPath("a/b")}
    assert [read[k] for k in ("score", "half", "big", "count", "flag")] == [0.5, 2.0, 2, -3, True]
    assert all(type(read[k]) in (int, float, bool) for k in ("score", "half", "big", "count", "flag"))
    assert read["random"][0] == "MT19937"
    assert isinstance(read["random"][1], LeftOut)
    assert (read["torch"], read["table"], read["counts"]) == (
        str(torch.__version__),
        {"a": [1]},
        collections.Counter("aab"),
    )
    for name in ("size", "bytes", "words", "device", "dtype", "large"):
        assert read[name] == content[name]


@pytest.mark.parametrize("write", [zipped, legacy])
def test_tensors_are_those_that_were_saved(tmp_path: Path, write: Write) -> None:
    base = torch.randn(4, 6)
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
    dtypes += [torch.float8_e4m3fn, torch.uint16] if write is zipped else []
    state = {str(d): (base * 3).to(d) for d in dtypes} | {"t": base.t(), "part": base[1:, ::2]}
    state |= {"scalar": torch.tensor(2.0), "none": torch.empty(0, 3)}
    state |= {"tied": base, "also": base, "parameter": nn.Parameter(base), "conjugate": (base * 1j).conj()}
    path = write(state, tmp_path / "a.pt")
    read = torch_file.tensors_of(torch_file.load(path), path)
    assert list(read) == list(state)
    for name, tensor in state.items():
        held = read[name].read()
        assert (read[name].shape, read[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(
            held.float() if "float8" in name else held, tensor.detach().float() if "float8" in name else tensor.detach()
        )
    assert read["tied"].alias == read["also"].alias == read["parameter"].alias != read["t"].alias


def test_what_the_program_allowed_stays_allowed_and_is_not_used(tmp_path: Path) -> None:
    torch.serialization.add_safe_globals([argparse.Namespace, nn.Linear])
    before = set(torch.serialization.get_safe_globals())
    try:
        with pytest.raises(CheckpointError, match="Linear"):
            torch_file.load(zipped({"m": nn.Linear(1, 1)}, tmp_path / "a.pt"))
        torch_file.load(zipped({"a": argparse.Namespace()}, tmp_path / "b.pt"))
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([g for g in before if g not in (argparse.Namespace, nn.Linear)])


HOSTILE = [
    b"cos\nsystem\n(X%bUtR.", b"cposix\nsystem\n(X%bUtR.", b"csubprocess\nPopen\n(X%bUtR.", b"c__builtin__\neval\n(X%bUtR.", b"cbuiltins\nexec\n(X%bUtR.",
    b"ctorch\nload\n(X%bUtR.", b"cnumpy\nload\n(X%bUtR.", b"(X%bUios\nsystem\n.", b"cbuiltins\ngetattr\n(cargparse\nNamespace\nX%bUtR.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93X%bU\x85R.", b"ctorch.storage\n_load_from_bytes\n(X%bUtR.", b"cshutil\nrmtree\n(X%bUtR.",
    b"ctorch.distributed.device_mesh\nDeviceMesh\n(X%bUtR.", b"cbuiltins\nbytearray\n(X%bUtR.",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_pickle_is_named_and_not_run(tmp_path: Path, number: int) -> None:
    marker = tmp_path / "marker"
    command = f"touch {marker}".encode()
    structure = b"\x80\x02" + HOSTILE[number].replace(b"%bU", struct.pack("<I", len(command)) + command)
    archive = tmp_path / "a.pt"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a/data.pkl", structure)
        made.writestr("a/version", b"3\n")
    for path in (archive, pickled(structure, tmp_path / "b.pt")):
        with pytest.raises(CheckpointError, match=f"{path.name} holds (more than|one process's)"):
            torch_file.load(path)
        with pytest.raises(CheckpointError, match="beside holds"):
            torch_file.load_bytes(path.read_bytes(), "beside")
    assert not marker.exists()


@pytest.mark.parametrize("write", [zipped, legacy])
def test_an_object_that_runs_a_command_is_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"posix\.system.*torch\.save\(model\.state_dict"):
        torch_file.load(write({"w": torch.ones(2), "x": [{"y": Hostile(tmp_path / "marker")}]}, tmp_path / "a.pt"))
    assert not (tmp_path / "marker").exists()


def test_other_kinds_of_files_are_told_apart(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their end in later versions
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for name, content, message in (
        ("module", nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear.*state_dict"),
        ("sparse", {"w": torch.eye(2).to_sparse()}, "sparse tensors.*to_dense"),
        ("quantised", {"w": quantised}, "quantised tensors.*dequantize"),
        ("protocol", None, "another protocol"),
    ):
        path = tmp_path / f"{name}.pt"
        torch.save({"a": 1} if content is None else content, path, pickle_protocol=4 if content is None else 2)
        with pytest.raises(CheckpointError, match=message):
            torch_file.load(path)
    torch.save({"w": torch.ones(2, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match="holds no data"):
        torch_file.tensors_of(torch_file.load(tmp_path / "meta.pt"), tmp_path / "meta.pt")
    script = tmp_path / "script.pt"
    with zipfile.ZipFile(script, "w") as made:  # what torch.jit.save writes, which torch warns of
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            made.writestr(f"script/{member}", pickle.dumps({}, 2))
    with pytest.raises(CheckpointError, match=r"TorchScript program.*state_dict"):
        torch_file.load(script)
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"no file of torch\.save"):
        torch_file.load(tmp_path / "text.pt")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "link.pt", "absent.pt", "."):
        with pytest.raises(CheckpointError, match=r"not a regular file|cannot be read"):
            torch_file.load(tmp_path / name)


def repeated(levels: int) -> bytes:
    """A tuple that holds a tuple twice, and so on."""
    return b")q\x01" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(1, levels)
    )


SLOW = {
    "a tuple of tuples of tuples as a key": b"}" + repeated(100) + b"Ns.",
    "the same in a set": b"c__builtin__\nset\n(](" + repeated(100) + b"etR.",
    "the same counted": b"ccollections\nCounter\n(](" + repeated(40) + b"etR.",
    "the same in an ordered dictionary": b"ccollections\nOrderedDict\n(](](" + repeated(100) + b"NeetR.",
    "a deep tuple as a key": b"})" + b"\x85" * 100_000 + b"Ns.",
    "whole numbers of one hash as keys": b"}(" + b"".join(b"\x8a\x0a" + ((2**61 - 1) * (k + 1)).to_bytes(10, "little") + b"N" for k in range(10_000)) + b"u.",
    "complex numbers of one hash as keys": b"}c__builtin__\ncomplex\nq\x00(" + b"".join(
        b"h\x00G" + struct.pack(">d", -1000003.0 * k) + b"G" + struct.pack(">d", float(k)) + b"\x86RN" for k in range(10_000)
    ) + b"u.",
    "a large set again and again": b"](" + b"".join(b"K" + bytes([i % 256]) for i in range(30_000)) + b"eq\x00c__builtin__\nset\nq\x01](" + b"h\x01h\x00\x85R" * 10_000 + b"e.",
    "an encoding that takes quadratic time": b"c_codecs\nencode\n(X" + struct.pack("<I", 1 << 20) + bytes(range(97, 113)) * (1 << 16) + b"X\x08\x00\x00\x00punycodetR.",
}  # fmt: skip


@pytest.mark.parametrize("what", SLOW)
def test_a_pickle_cannot_keep_the_loader_busy(tmp_path: Path, what: str) -> None:
    path = pickled(b"\x80\x02" + SLOW[what], tmp_path / "a.pt")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"for ever|nested more than|encodes text"):
        torch_file.load(path)
    assert time.monotonic() - start < 5


def test_what_is_large_but_honest_is_read(tmp_path: Path) -> None:
    content = {
        "tuple": tuple(range(20_000)), "keys": {(i, str(i)): i for i in range(2000)}, "floats": {i / 7: i for i in range(10_000)},
        "set": set(range(10_000)), "long": list(range(30_000)), "hashes": {2**61 + i for i in range(500)}, "text": "x" * 1_000_000,
    }  # fmt: skip
    assert torch_file.load(zipped(content, tmp_path / "a.pt")) == content


def test_a_file_that_holds_itself_is_read(tmp_path: Path) -> None:
    table: dict[str, Any] = {"w": torch.ones(2)}
    table["self"], table["list"] = table, [table]
    read = torch_file.load(zipped(table, tmp_path / "a.pt"))
    assert read["self"] is read
    assert list(torch_file.tensors_of(read, tmp_path / "a.pt")) == ["w"]


def test_names_of_methods_may_be_shadowed(tmp_path: Path) -> None:
    """A file may set attributes of ordered dictionaries and of tensors."""
    table = collections.OrderedDict(w=torch.ones(2), v=nn.Parameter(torch.ones(2)))
    for tensor in table.values():
        tensor.detacx = tensor.untyped_storagx = tensor.numex = tensor.itex = 3  # type: ignore[attr-defined]
    vars(table).update(itemx=3, gex=None, keyx="x", valuex=[])
    honest = zipped(table, tmp_path / "a.pt")
    with zipfile.ZipFile(honest) as archive:
        structure = archive.read("a/data.pkl")
    for name in ("detach", "untyped_storage", "numel", "item", "items", "get", "keys", "values"):
        changed = name[:-1] + "x"
        assert changed.encode() in structure
        structure = structure.replace(changed.encode(), name.encode())
    path = archive_of(honest, tmp_path / "b.pt", data_pkl=structure)
    loaded = torch_file.load(path)
    assert loaded.items == 3
    assert loaded["w"].detach == 3
    read = torch_file.tensors_of(loaded, path)
    assert [stored.read().tolist() for stored in read.values()] == [[1.0, 1.0]] * 2


def test_views_that_repeat_what_is_stored_are_refused(tmp_path: Path) -> None:
    path = zipped({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="far more than the file has"):
        torch_file.tensors_of(torch_file.load(path), path)


def test_names_that_are_no_strings_and_other_tensors_are_refused(tmp_path: Path) -> None:
    path = zipped({}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="names a tensor by int"):
        torch_file.tensors_of({1: torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no table of tensors but list"):
        torch_file.tensors_of([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="is a sparse_coo tensor"):
        torch_file.tensors_of({"w": torch.eye(2).to_sparse()}, path)


def test_python_2_s_files_are_read(tmp_path: Path) -> None:
    """Strings in bytes, an ordered dictionary made from a list of pairs, names of modules as they were."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x02NtQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )
    structure = b"\x80\x02ccollections\nOrderedDict\n(](](U\x09fc.weight" + tensor + b"eetR."
    path = pickled(structure, tmp_path / "a.pt")
    with open(path, "r+b") as file:
        file.seek(-len(pickle.dumps([], 2)), io.SEEK_END)
        file.write(pickle.dumps(["0"], 2) + struct.pack("<q", 2) + np.array([1.5, -2.0], "<f4").tobytes())
    assert torch_file.tensors_of(torch_file.load(path), path)["fc.weight"].read().tolist() == [1.5, -2.0]


def archive_of(path: Path, to: Path, method: int = zipfile.ZIP_STORED, **changed: bytes) -> Path:
    """An archive with the same members, some changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", method) as new:
        for member in old.namelist():
            new.writestr(member, changed.get(member.rpartition("/")[2].replace(".", "_"), old.read(member)))
    return to


def test_archives_that_torch_did_not_write_are_refused(tmp_path: Path) -> None:
    good = zipped({"w": torch.ones(64)}, tmp_path / "good.pt")
    with pytest.raises(CheckpointError, match="compressed"):
        torch_file.load(archive_of(good, tmp_path / "compressed.pt", zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data.pkl", bytes(100 << 20))
    with pytest.raises(CheckpointError, match="compressed"):
        torch_file.load(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "none.pt", "w") as none:
        none.writestr("word/document.xml", "text")
    with pytest.raises(CheckpointError, match=r"not of torch\.save"):
        torch_file.load(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as two:
        two.writestr("a/data.pkl", pickle.dumps({}, 2))
        two.writestr("b/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(CheckpointError, match=r"2 data\.pkl"):
        torch_file.load(tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="data/0 has 1 bytes, not the 256 announced"):
        torch_file.load(archive_of(good, tmp_path / "short.pt", **{"0": b"\0"}))


def test_two_archives_in_one_file_are_read_as_one_or_not_at_all(tmp_path: Path) -> None:
    """The loader's own reading of the table of contents may differ from that of the check."""
    one, other = zipped({"w": torch.zeros(4)}, tmp_path / "one.pt"), zipped({"w": torch.ones(4)}, tmp_path / "other.pt")
    for name, content in (("after", one.read_bytes() + other.read_bytes()), ("comment", b"")):
        path = tmp_path / f"{name}.pt"
        if not content:
            data = bytearray(one.read_bytes())
            comment = other.read_bytes()[-22:]
            data[-2:] = struct.pack("<H", len(comment))
            content = bytes(data) + comment
        path.write_bytes(content)
        try:
            read = torch_file.load(path)["w"]
        except CheckpointError:
            continue
        with zipfile.ZipFile(path) as archive:
            values = archive.read(next(member for member in archive.namelist() if member.endswith("data/0")))
        assert read.numpy().tobytes() == values


@pytest.mark.parametrize("write", [zipped, legacy])
def test_files_cut_short_or_with_bits_flipped_are_read_or_refused(tmp_path: Path, write: Write) -> None:
    module, optimizer = trained()
    whole = write(
        {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "args": argparse.Namespace(a=1)},
        tmp_path / "a.pt",
    ).read_bytes()
    path, generator = tmp_path / "b.pt", random.Random(0)
    read = 0
    for i in range(150):
        content = bytearray(whole)
        if i % 3 == 0:
            del content[generator.randrange(len(content)) :]
        elif i % 3 == 1:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        else:
            at = generator.randrange(len(content))
            content[at : at + 8] = generator.randbytes(8)
        path.write_bytes(content)
        for load in (lambda: torch_file.load(path), lambda: torch_file.load_bytes(path.read_bytes(), "bytes")):
            try:
                loaded = load()
            except CheckpointError:
                continue
            read += 1
            if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
                try:
                    for stored in torch_file.tensors_of(loaded["model"], path).values():
                        stored.read().sum()
                except CheckpointError:
                    pass
    assert read  # data carry no checksum that is looked at


def test_a_network_with_tied_weights_is_read_with_them_tied(tmp_path: Path) -> None:
    module = Network()
    path = zipped(module.state_dict(), tmp_path / "a.pt")
    read = torch_file.tensors_of(torch_file.load(path), path)
    assert read["first.weight"].alias == read["second.weight"].alias


def test_damaged_escapes_in_a_string_are_no_warning() -> None:
    found = scan(b"cos\nsystem\nS'\\\x06'\n.")
    assert found.names == {"os.system"}
    assert found.problem
