"""Data sets in torchvision's layouts, read by torchvision."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from landscape.data.dataset import TensorData

DATA_ROOT_VARIABLE = "LANDSCAPE_DATA_ROOT"


def import_torchvision(module: str) -> Any:
    """Import one of torchvision's modules, also beside a torch that lacks its compiled operators.

    A torchvision wheel that does not match torch (built for CUDA, say, beside CPU torch) fails on import because the
    schema of its operator `nms` is missing. Data sets and networks need no compiled operator: the schema is declared.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ValueError("this task needs torchvision; install it with: pip install --no-deps torchvision") from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import sys

        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
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
    except RuntimeError as error:
        missing = [n for n in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
                   if not (folder / "MNIST" / "raw" / n).is_file()]  # fmt: skip
        if download:
            raise ValueError(
                f"MNIST could not be downloaded to {folder}: {error}; without a network, put the files there"
            ) from error
        raise ValueError(
            f"MNIST is not under {folder / 'MNIST' / 'raw'} (missing: {', '.join(missing) or 'nothing, so a file is damaged'}); get it with: "
            f'python -c "from landscape.data.vision import mnist; mnist({str(folder)!r}, download=True)"'
        ) from error
    train, test = [
        TensorData(p.data.unsqueeze(1).to(torch.float32) / 255.0, p.targets.to(torch.int64), f"MNIST, {name}")
        for p, name in zip(parts, ("train", "test"), strict=True)
    ]
    return train, test
