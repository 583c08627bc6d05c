from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from landscape.data.vision import CIFAR10_MEAN, CIFAR10_STD, MNIST_FILES, cifar10, data_root, mnist
from landscape.optional import import_torchvision

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision; not installed"
)


def test_without_a_data_root_the_error_says_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANDSCAPE_DATA_ROOT", raising=False)
    with pytest.raises(ValueError, match=r"--data-root DIR or LANDSCAPE_DATA_ROOT"):
        mnist()


def test_the_argument_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LANDSCAPE_DATA_ROOT", str(tmp_path))
    assert data_root(None) == tmp_path
    assert data_root("elsewhere") == Path("elsewhere")
    assert data_root("~/sets") == Path.home() / "sets"


def test_without_torchvision_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="pip install --no-deps torchvision"):
        mnist(tmp_path)


@needs_torchvision
@pytest.mark.parametrize("module", ["torchvision", "torchvision.datasets", "torchvision.models"])
def test_torchvision_is_imported_beside_any_build_of_torch(module: str) -> None:
    assert import_torchvision(module).__name__ == module


@needs_torchvision
def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read") as caught:
        mnist(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "MNIST" / "raw") in message
    assert all(name in message for name in MNIST_FILES)
    assert f"mnist({str(tmp_path)!r}, download=True)" in message


@needs_torchvision
@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"\x00\x00\x08\x03\x00\x00\xea\x60", b"\xff" * 16])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        (raw / name).write_bytes(content)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        ValueError, match=r"missing: t10k-labels-idx1-ubyte; damaged, so delete it first: train-images-idx3-ubyte, "
    ):
        mnist(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"missing: nothing; damaged, so delete it first: train-images-idx3-ubyte, "):
        mnist(tmp_path)


@needs_torchvision
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([*range(9), 200], "labels must be 0 to 9; 1 are not, the first 200 at example 9"),
        ([*range(9), 8], "no example of 1 of 10 classes"),
    ],
)
def test_labels_out_of_range_and_classes_without_an_example_are_refused(tmp_path: Path, labels: list[int], said: str) -> None:  # fmt: skip
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(np.array([0x803, 10, 28, 28], ">i4").tobytes() + bytes(7840))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, 10], ">i4").tobytes() + bytes(labels))
    with pytest.raises(ValueError, match=f"MNIST, train under .*{said}"):
        mnist(tmp_path)


@pytest.mark.data
@needs_torchvision
def test_the_full_mnist_is_read() -> None:
    for data, count in zip(mnist(), (60_000, 10_000), strict=True):
        assert data.inputs.shape == (count, 1, 28, 28)
        assert data.inputs.dtype == torch.float32
        assert (float(data.inputs.min()), float(data.inputs.max())) == (0, 1)
        assert data.targets.dtype == torch.int64
        assert len(data.targets.unique()) == 10
    assert mnist()[0].targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]


def write_cifar10(
    monkeypatch: pytest.MonkeyPatch, root: Path, labels: dict[str, list[int]] | None = None
) -> dict[str, np.ndarray]:
    """A small data set in CIFAR-10's format, 20 images a file, whose sums torchvision takes for the official ones."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator, images, sums = np.random.default_rng(0), {}, {}
    for name in CIFAR10_FILES:
        images[name] = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        content: Any = {"data": images[name], "labels": (labels or {}).get(name, list(range(10)) * 2)}
        if name == "batches.meta":
            content = {"label_names": [f"class {c}" for c in range(10)]}
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    official = import_torchvision("torchvision.datasets").CIFAR10
    monkeypatch.setattr(official, "train_list", [[name, sums[name]] for name in CIFAR10_FILES[:5]])
    monkeypatch.setattr(official, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(official, "meta", {**official.meta, "md5": sums["batches.meta"]})
    return images


@needs_torchvision
def test_cifar10_is_read_in_torchvisions_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = write_cifar10(monkeypatch, tmp_path)
    train, test = cifar10(tmp_path)
    assert (len(train), len(test), train.name, test.name) == (100, 20, "CIFAR-10, train", "CIFAR-10, test")
    assert (train.num_random, test.num_random) == (3, 0)
    assert train.pixels.is_contiguous()
    expected = np.concatenate([images[name] for name in CIFAR10_FILES[:5]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(train.pixels.numpy(), expected)
    assert np.array_equal(test.pixels.numpy(), images["test_batch"].reshape(-1, 3, 32, 32))
    assert train.targets.tolist() == list(range(10)) * 10


@needs_torchvision
def test_missing_cifar10_files_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CIFAR-10 cannot be read from") as caught:
        cifar10(tmp_path)
    message = str(caught.value)
    assert f"missing: {', '.join(CIFAR10_FILES)}; damaged or changed, by md5: nothing" in message
    assert f"cifar10({str(tmp_path)!r}, download=True)" in message
    assert "not unpacked" not in message
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is there, but not unpacked"):
        cifar10(tmp_path)


class Trap:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> Any:
        return open, (Trap.mark, "w")

    mark = ""


@needs_torchvision
@pytest.mark.parametrize("damaged", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_changed_cifar10_file_is_named_and_never_unpickled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damaged: str
) -> None:
    write_cifar10(monkeypatch, tmp_path)
    monkeypatch.setattr(Trap, "mark", str(tmp_path / "mark"))
    (tmp_path / "cifar-10-batches-py" / damaged).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=f"missing: nothing; damaged or changed, by md5: {damaged}\\)"):
        cifar10(tmp_path)
    assert not (tmp_path / "mark").exists()
    (tmp_path / "cifar-10-batches-py" / damaged).unlink()
    with pytest.raises(ValueError, match=f"missing: {damaged}; damaged or changed, by md5: nothing"):
        cifar10(tmp_path)


@needs_torchvision
def test_the_folder_of_cifar10_itself_is_not_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_cifar10(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="is that folder itself; name the one that holds it"):
        cifar10(tmp_path / "cifar-10-batches-py")


@needs_torchvision
def test_without_a_network_the_error_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(import_torchvision("torchvision.datasets").CIFAR10, "download", offline)
    with pytest.raises(
        ValueError,
        match=r"could not be downloaded to .*no route to host; without a network, unpack cifar-10-python\.tar\.gz there",
    ):
        cifar10(tmp_path, download=True)


@needs_torchvision
@pytest.mark.parametrize(
    ("file", "labels", "message"),
    [
        ("data_batch_2", [0, 1, 10, *range(7)] * 2, r"CIFAR-10, train: labels must be 0 to 9; 2 are not, the first 10 at example 22"),
        ("test_batch", [0] * 20, r"CIFAR-10, test: no example of 9 of 10 classes"),
    ],
)  # fmt: skip
def test_labels_of_cifar10_are_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, labels: list[int], message: str
) -> None:
    write_cifar10(monkeypatch, tmp_path, {file: labels})
    with pytest.raises(ValueError, match=message):
        cifar10(tmp_path)


@pytest.mark.data
@needs_torchvision
def test_the_full_cifar10_is_read() -> None:
    train, test = cifar10()
    for data, count in ((train, 50_000), (test, 10_000)):
        assert data.pixels.shape == (count, 3, 32, 32)
        assert torch.bincount(data.targets).tolist() == [count // 10] * 10
    assert train.targets[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    for channel, mean, std in zip(train.pixels.unbind(1), CIFAR10_MEAN, CIFAR10_STD, strict=True):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        levels = torch.arange(256, dtype=torch.float64) / 255
        found = float((counts * levels).sum() / counts.sum())
        assert abs(found - mean) < 5e-5  # four digits
        assert abs(float((counts * (levels - found) ** 2).sum() / counts.sum()) ** 0.5 - std) < 5e-5
    assert [d.fingerprint() for d in (train, test)] == ["dacfad2f905801ec", "ca3e3f85f298c6de"]
