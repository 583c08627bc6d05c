"""Optional packages, imported where they are used and by one function each."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import torch

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
