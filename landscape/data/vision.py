"""Data sets in torchvision's layouts, read by torchvision."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from landscape.data.dataset import TensorData

DATA_ROOT_VARIABLE = "LANDSCAPE_DATA_ROOT"
MNIST_FILES = {
    "train-images-idx3-ubyte": 47040016,
    "train-labels-idx1-ubyte": 60008,
    "t10k-images-idx3-ubyte": 7840016,
    "t10k-labels-idx1-ubyte": 10008,
}
"""Files and their sizes in bytes."""
MISSING_OPERATORS = ("nms", "qnms")
"""torchvision's operators that its import asks for, compiled or not."""


def import_torchvision(module: str) -> Any:
    """Import one of torchvision's modules, also beside a torch that lacks its compiled operators.

    A torchvision wheel that does not match torch (built for CUDA, say, beside CPU torch) fails on import because the
    schemas of its operators are missing. Data sets and networks need no compiled operator: the schemas are declared.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError("this task needs torchvision; install it with: pip install --no-deps torchvision") from None
    except RuntimeError as error:
        if not re.search(r"operator torchvision::\w+ does not exist", str(error)):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in MISSING_OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # a schema lives as long as its library
        return importlib.import_module(module)


_declared: list[torch.library.Library] = []


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
    return train, test
