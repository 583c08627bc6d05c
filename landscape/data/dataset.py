"""Data that can be drawn from by index, on any device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class IndexedData(Protocol):
    """Examples that can be drawn by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """Inputs and targets of shape (*indices.shape, ...)."""


@dataclass(frozen=True)
class TensorData:
    """A data set that lies in memory as two tensors.

    Attributes:
        inputs: (N, ...).
        targets: (N,) class indices, or (N, ...) values.
        name: what it is, for messages and provenance.
    """

    inputs: Tensor
    targets: Tensor
    name: str = "data"

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{self.name}: {len(self.inputs)} inputs, but {len(self.targets)} targets")
        if len(self.inputs) == 0:
            raise ValueError(f"{self.name}: no examples")

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at indices (...,), as inputs (..., *shape) and targets (..., *shape)."""
        flat = indices.flatten()  # index_select moves whole rows, several times faster than advanced indexing
        return (
            self.inputs.index_select(0, flat).unflatten(0, indices.shape),
            self.targets.index_select(0, flat).unflatten(0, indices.shape),
        )

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """Consecutive examples, without a copy."""
        return self.inputs[part], self.targets[part]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TensorData:
        """On another device; floating-point tensors in `dtype`."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype) if dtype is not None and t.is_floating_point() else t.to(device)

        return replace(self, inputs=move(self.inputs), targets=move(self.targets))

    def fingerprint(self) -> str:
        """A short hash of the contents, the same for the same numbers wherever they lie."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class MapData:
    """A map-style data set (`__len__`, `__getitem__` giving (input, target)), collated as torch's DataLoader does."""

    def __init__(self, dataset: Any, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.dataset = dataset
        self.device = torch.device(device)
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `TensorData.batch`; examples are read one by one."""
        inputs, targets = torch.utils.data.default_collate([self.dataset[int(i)] for i in indices.flatten()])
        inputs, targets = (t.to(self.device, self.dtype if t.is_floating_point() else None) for t in (inputs, targets))
        return inputs.unflatten(0, indices.shape), targets.unflatten(0, indices.shape)


class BatchList:
    """A list of ready batches. It can be streamed over, but not drawn from."""

    def __init__(self, batches: Sequence[tuple[Any, Any]]) -> None:
        if not batches:
            raise ValueError("the list of batches is empty")
        self.batches = batches

    def __len__(self) -> int:
        return sum(len(target) for _, target in self.batches)

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """Not possible."""
        raise ValueError(
            "minibatches cannot be drawn from a list of batches; give a map-style data set or tensors instead"
        )


def as_data(data: Any, device: torch.device | str, dtype: torch.dtype) -> TensorData | MapData | BatchList:
    """What a user hands over as data, on the device and in the floating-point type of the computation.

    Args:
        data: a TensorData, a pair of tensors, a torch TensorDataset of two, a map-style data set, or a list of batches.
        device: where batches go.
        dtype: floating-point inputs and targets are converted to it.
    """
    if isinstance(data, TensorData):
        return data.to(device, dtype)
    if isinstance(data, MapData | BatchList):
        return data
    if isinstance(data, torch.utils.data.TensorDataset) and len(data.tensors) == 2:
        return TensorData(*data.tensors).to(device, dtype)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        return TensorData(*data).to(device, dtype)
    if isinstance(data, list) and data and isinstance(data[0], tuple | list):
        return BatchList([TensorData(x, y).to(device, dtype).rows(slice(None)) for x, y in data])
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapData(data, device, dtype)
    if isinstance(data, Iterable):
        raise ValueError(
            "data is an iterator, which can be read only once; give a list of batches, tensors or a map-style data set"
        )
    raise ValueError(f"data of type {type(data).__name__} is not a data set, a pair of tensors or a list of batches")


def stream(data: TensorData | MapData | BatchList, chunk: int) -> Iterator[tuple[Any, Any]]:
    """All examples in order, in chunks of at most `chunk` (a list of batches keeps its own)."""
    if isinstance(data, BatchList):
        yield from data.batches
        return
    for start in range(0, len(data), chunk):
        stop = min(start + chunk, len(data))
        yield data.rows(slice(start, stop)) if isinstance(data, TensorData) else data.batch(torch.arange(start, stop))
