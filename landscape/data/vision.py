"""Data sets in torchvision's layouts, read by torchvision."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from landscape.data.dataset import TensorData
from landscape.data.images import ImageData, check_labels
from landscape.optional import import_torchvision

DATA_ROOT_VARIABLE = "LANDSCAPE_DATA_ROOT"
MNIST_FILES = {
    "train-images-idx3-ubyte": 47040016,
    "train-labels-idx1-ubyte": 60008,
    "t10k-images-idx3-ubyte": 7840016,
    "t10k-labels-idx1-ubyte": 10008,
}
"""Files and their sizes in bytes."""
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the channels over all pixels of the 50,000 training images, computed from them. (The deviations 0.2023, 0.1994, 0.2010 that many programs
carry are means of the deviations within single images.)"""


def data_root(given: str | Path | None) -> Path:
    """The folder of data sets: as given, or from LANDSCAPE_DATA_ROOT."""
    root = given or os.environ.get(DATA_ROOT_VARIABLE)
    if not root:
        raise ValueError(
            f"this task reads a data set from disk; name its folder with --data-root DIR or {DATA_ROOT_VARIABLE}"
        )
    return Path(root).expanduser()


def mnist(root: str | Path | None = None, *, download: bool = False) -> tuple[TensorData, TensorData]:
    """The full MNIST, 60,000 and 10,000 images (N, 1, 28, 28), float32 in [0, 1].

    Args:
        root: a folder that holds MNIST/raw/*-ubyte, as torchvision lays it out.
        download: fetch it there first, as torchvision does.
    """
    folder = data_root(root)
    datasets = import_torchvision("torchvision.datasets")
    try:
        parts = [datasets.MNIST(str(folder), train=train, download=download) for train in (True, False)]
    except (RuntimeError, ValueError, AssertionError, LookupError, OSError) as error:  # whatever torchvision meets
        if download:
            raise ValueError(
                f"MNIST could not be downloaded to {folder}: {error}; without a network, put the files there"
            ) from error
        raw = folder / "MNIST" / "raw"
        missing = [name for name in MNIST_FILES if not (raw / name).is_file()]
        damaged = [n for n, size in MNIST_FILES.items() if n not in missing and (raw / n).stat().st_size != size]
        found = f"missing: {', '.join(missing) or 'nothing'}; damaged, so delete it first: {', '.join(damaged) or 'nothing'}"
        raise ValueError(
            f"MNIST cannot be read from {raw} ({found}); get it with: "
            f'python -c "from landscape.data.vision import mnist; mnist({str(folder)!r}, download=True)"'
        ) from error
    train, test = [
        TensorData(p.data.unsqueeze(1).to(torch.float32) / 255.0, p.targets.to(torch.int64), f"MNIST, {name}")
        for p, name in zip(parts, ("train", "test"), strict=True)
    ]
    for part in (train, test):
        check_labels(f"{part.name} under {folder}", part.targets, 10)
    return train, test


def cifar10(root: str | Path | None = None, *, download: bool = False) -> tuple[ImageData, ImageData]:
    """CIFAR-10 (Krizhevsky, Learning multiple layers of features from tiny images, 2009): 50,000 and 10,000 images of 3x32x32 in 10 classes.

    Training images are augmented (see `ImageData`), test images are not; both are normalised by the channels' mean and deviation over the
    training images. The files are pickles: torchvision reads them, and only if the md5 of every file is that of the official one, so that
    nothing but the official contents is ever unpickled.

    Args:
        root: a folder that holds cifar-10-batches-py/, as torchvision lays it out.
        download: fetch it there first (170 MB), as torchvision does.
    """
    folder = data_root(root)
    datasets = import_torchvision("torchvision.datasets")
    try:
        with warnings.catch_warnings():  # the pickles are of 2009, and numpy says so
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            parts = [datasets.CIFAR10(str(folder), train=train, download=download) for train in (True, False)]
    except (RuntimeError, ValueError, AssertionError, LookupError, OSError) as error:  # whatever torchvision meets
        if download:
            raise ValueError(
                f"CIFAR-10 could not be downloaded to {folder}: {error}; without a network, unpack {datasets.CIFAR10.filename} there "
                f"(from {datasets.CIFAR10.url})"
            ) from error
        raise ValueError(
            f"CIFAR-10 cannot be read from {folder / datasets.CIFAR10.base_folder} ({_what_is_wrong(datasets.CIFAR10, folder)}); get it with: "
            f'python -c "from landscape.data.vision import cifar10; cifar10({str(folder)!r}, download=True)"'
        ) from error
    train, test = [
        ImageData(
            torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets, dtype=torch.int64),
            CIFAR10_MEAN, CIFAR10_STD, f"CIFAR-10, {name}", augmented=name == "train",
        )
        for p, name in zip(parts, ("train", "test"), strict=True)
    ]  # fmt: skip
    for part in (train, test):
        check_labels(part.name, part.targets, 10)
    return train, test


def _what_is_wrong(official: Any, folder: Path) -> str:
    """Which files of CIFAR-10 are missing or are not the official ones."""
    place = folder / official.base_folder
    if (folder / official.train_list[0][0]).is_file():
        return f"{folder} is that folder itself; name the one that holds it"
    sums = dict(official.train_list + official.test_list + [(official.meta["filename"], official.meta["md5"])])
    missing = [name for name in sums if not (place / name).is_file()]
    damaged = [name for name in sums if name not in missing and _md5(place / name) != sums[name]]
    packed = f"; {official.filename} is there, but not unpacked" if (folder / official.filename).is_file() else ""
    return f"missing: {', '.join(missing) or 'nothing'}; damaged or changed, by md5: {', '.join(damaged) or 'nothing'}{packed}"


def _md5(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
