from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from landscape.data.vision import MNIST_FILES, data_root, import_torchvision, mnist

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
