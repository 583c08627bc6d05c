"""What files of torch.save may name besides tensors, and what is made in its place.

A name in a file that torch's restricted loader is told of here leads to the object here, never to what it names: settings and scores are kept as
numbers, strings and dictionaries, arrays of numpy are dropped. Nothing of numpy or of other packages is called.
"""

from __future__ import annotations

import argparse
import pathlib
import struct
from typing import Any


class LeftOut:
    """Stands for an array of numpy (states of random number generators) or an unusual scalar, which are not read."""

    def __setstate__(self, state: object) -> None:
        """Ignores it."""


class NumberType:
    """Stands for a numpy.dtype, which itself would reserve memory of any size."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        """The byte order is all that is of use."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


_SCALARS = {"b1": "?", "?": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q", "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip


def _scalar(kind: object = None, content: object = None, *_: object) -> Any:
    """A scalar of numpy as a number of Python."""
    code = _SCALARS.get(kind.code) if isinstance(kind, NumberType) and isinstance(kind.code, str) else None
    if code is None or not isinstance(kind, NumberType) or not isinstance(content, bytes):
        return LeftOut()
    return struct.unpack(kind.order + code, content)[0]


def _array(*_: object) -> LeftOut:
    return LeftOut()


def _dictionary(*_: object) -> dict[Any, Any]:
    return {}


class _Text(str):
    """A string of a class of its own, such as torch.__version__."""

    def __new__(cls, text: object = "") -> _Text:
        if not isinstance(text, str):
            raise TypeError("a string made of something else")
        return super().__new__(cls, text)


HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PurePosixPath,
    *((pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "_local.PosixPath", "_local.PurePosixPath")),
    *((pathlib.PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath", "_local.WindowsPath")),
    (NumberType, "numpy.dtype"),
    (LeftOut, "numpy.ndarray"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_dictionary, "collections.defaultdict"),
    *((LeftOut, f"builtins.{name}") for name in ("list", "dict", "int", "float", "str", "bool")),
    *((dict, f"{where}.AttributeDict") for where in ("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing", "lightning.fabric.utilities.data")),
    (_Text, "torch.torch_version.TorchVersion"),
]  # fmt: skip
"""Classes and functions beyond torch's own that a file may name, or what is taken in their place: they carry settings and scores, and making one
runs nothing."""

REFUSED = {
    "builtins.bytearray": "",
    "torch._utils._rebuild_qtensor": "quantised tensors (save tensor.dequantize())",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors (save tensor.to_dense())",
    "torch._utils._rebuild_nested_tensor": "nested tensors (save tensor.unbind())",
    "torch._utils._rebuild_device_tensor_from_numpy": "tensors of a device that torch does not have here (save tensor.cpu())",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensors of a device that torch does not have here (save tensor.cpu())",
}
"""What torch's loader allows, but would let a file ask for any amount of memory or time; and what to do."""
