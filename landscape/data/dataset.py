"""Data that can be drawn from by index, on any device."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Split = Callable[[Any], tuple[Any, Any]]
"""What makes (inputs, targets) of a batch."""

TARGET_NAMES = ("labels", "label", "targets", "target", "y")
"""Where a batch that is a dictionary keeps its targets."""


@runtime_checkable
class IndexedData(Protocol):
    """Examples that can be drawn by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """Inputs and targets of shape (*indices.shape, ...)."""


class Examples(ABC):
    """A data set that training draws minibatches from and measures pass over, wherever it lies.

    Inputs and targets come on `device`, floating-point ones in `dtype`. What is measured are the examples as they are, of `batch` and
    `rows`; training takes those of `draw`, which may be augmented at random. All randomness is handed in, so that every backend, number of
    processes and resumed run draws the same.

    Attributes:
        name: what it is, for messages and provenance.
    """

    name: str

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating-point type of the inputs."""

    @property
    def num_random(self) -> int:
        """k, the random numbers that `draw` takes for an example; 0 without augmentation."""
        return 0

    @property
    def reads_ahead(self) -> bool:
        """Whether `expect` is of use."""
        return False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """The examples at indices (...,), as inputs (..., *shape) and targets (..., *shape)."""

    def rows(self, part: slice) -> tuple[Any, Any]:
        """Consecutive examples."""
        return self.batch(torch.arange(*part.indices(len(self))))

    def targets_at(self, indices: Tensor) -> Any:
        """The targets of `batch` alone."""
        return self.batch(indices)[1]

    def draw(self, indices: Tensor, uniforms: Tensor) -> tuple[Any, Any]:
        """The same as `batch`, augmented by uniform random numbers.

        Args:
            indices: (..., B).
            uniforms: (..., B, k), float64 in [0, 1), on the CPU.
        """
        return self.batch(indices)

    def expect(self, indices: Tensor, uniforms: Tensor) -> None:
        """Told which examples are drawn next, where data read ahead: they are read meanwhile."""
        raise NotImplementedError(f"{type(self).__name__} does not read ahead")

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Examples:
        """On another device; floating-point tensors in `dtype`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash that tells these data from others, the same wherever they lie."""


@dataclass(frozen=True)
class TensorData(Examples):
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

    @property
    def device(self) -> torch.device:
        """See `Examples`."""
        return self.inputs.device

    @property
    def dtype(self) -> torch.dtype:
        """See `Examples`; of inputs that are no floating-point numbers, torch's default."""
        return self.inputs.dtype if self.inputs.is_floating_point() else torch.get_default_dtype()

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`."""
        flat = indices.flatten()  # index_select moves whole rows, several times faster than advanced indexing
        return (
            self.inputs.index_select(0, flat).unflatten(0, indices.shape),
            self.targets.index_select(0, flat).unflatten(0, indices.shape),
        )

    def targets_at(self, indices: Tensor) -> Tensor:
        """See `Examples`."""
        return self.targets.index_select(0, indices.flatten()).unflatten(0, indices.shape)

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
        return fingerprint_of(self.inputs, self.targets)


def fingerprint_of(*parts: Tensor | bytes) -> str:
    """A short hash of tensors' types, shapes and contents, and of words."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().numpy().reshape(-1).view("uint8").data)
        else:
            digest.update(part)
    return digest.hexdigest()[:16]


class TreeData:
    """A data set that lies in memory as a structure of tensors (dictionaries, tuples), each with the examples along its first axis."""

    def __init__(self, tree: Any, split: Split) -> None:
        counts = {len(t) for t in tensors_in(tree)}
        if len(counts) != 1 or counts == {0}:
            raise ValueError(f"tensors of {', '.join(map(str, sorted(counts)))} examples do not make a data set")
        self.tree, self.split, self.count = tree, split, counts.pop()

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """See `TensorData.batch`."""
        flat = indices.flatten()
        return self.split(
            tree_map(lambda t: t.index_select(0, flat.to(t.device)).unflatten(0, indices.shape), self.tree)
        )

    def rows(self, part: slice) -> tuple[Any, Any]:
        """Consecutive examples, without a copy."""
        return self.split(tree_map(lambda t: t[part], self.tree))


class MapData:
    """A map-style data set (`__len__`, `__getitem__`), collated as torch's DataLoader does."""

    def __init__(
        self,
        dataset: Any,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        split: Split | None = None,
    ) -> None:
        self.dataset = dataset
        self.device = torch.device(device)
        self.dtype = dtype
        self.split = split or split_batch

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """See `TensorData.batch`; examples are read one by one."""
        collated = torch.utils.data.default_collate([self.dataset[int(i)] for i in indices.flatten()])
        moved = move(collated, self.device, self.dtype)
        return self.split(tree_map(lambda t: t.unflatten(0, indices.shape), moved))


class BatchList:
    """A list of ready batches. It can be streamed over, but not drawn from. Batches without examples are left out."""

    def __init__(self, batches: Sequence[Any], device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                 split: Split | None = None) -> None:  # fmt: skip
        take = split or split_batch
        self.counts = [num_examples(take(b)[1]) for b in batches]
        self.batches = [b for b, count in zip(batches, self.counts, strict=True) if count]
        self.counts = [count for count in self.counts if count]
        if not self.batches:
            raise ValueError("the list of batches is empty, or no batch in it has an example")
        self.device, self.dtype, self.split = torch.device(device), dtype, take

    def __len__(self) -> int:
        return sum(self.counts)

    def some(self, numbers: range) -> Iterator[tuple[Any, Any]]:
        """The batches of these numbers."""
        for index in numbers:
            yield self.split(move(self.batches[index], self.device, self.dtype))

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """Not possible."""
        raise ValueError(
            "minibatches cannot be drawn from a list of batches; give a map-style data set or tensors instead"
        )


Data = Examples | TreeData | MapData | BatchList


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a structure."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def num_examples(tree: Any) -> int:
    """How many examples a batch or its targets hold: the length of the first tensor in it."""
    leaves = tensors_in(tree)
    if not leaves or leaves[0].ndim == 0:
        raise ValueError("a batch must hold tensors with the examples along their first axis")
    return len(leaves[0])


def move(tree: Any, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """A structure of tensors on a device, its floating-point tensors in `dtype`. Mappings become plain dictionaries."""
    if isinstance(tree, Mapping):
        return {name: move(value, device, dtype) for name, value in tree.items()}

    def one(t: Any) -> Any:
        return t.to(device, dtype if t.is_floating_point() else None) if isinstance(t, Tensor) else t

    return tree_map(one, tree)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch as people have them.

    A pair (x, y) is taken as it is; of a longer tuple the last is the target and the rest are the model's positional arguments;
    of a dictionary, the entry named like a target (TARGET_NAMES) is the target and the rest are keyword arguments.

    >>> split_batch({"input_ids": 1, "attention_mask": 2, "labels": 3})
    ({'input_ids': 1, 'attention_mask': 2}, 3)
    >>> split_batch((1, 2, 3))
    ((1, 2), 3)
    """
    if isinstance(batch, Mapping):
        names = [name for name in TARGET_NAMES if name in batch]
        if len(names) != 1:
            raise ValueError(
                f"a batch with the entries {', '.join(map(str, batch))}: which is the target? Name it {' or '.join(TARGET_NAMES)}, "
                "or give split=lambda batch: (inputs, targets)"
            )
        return {name: value for name, value in batch.items() if name != names[0]}, batch[names[0]]
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(
            f"a batch of type {type(batch).__name__} is not (inputs, targets); give split=lambda batch: (inputs, targets)"
        )
    return (batch[0], batch[1]) if len(batch) == 2 else (tuple(batch[:-1]), batch[-1])


def as_data(data: Any, device: torch.device | str, dtype: torch.dtype, split: Split | None = None) -> Data:
    """What a user hands over as data, on the device and in the floating-point type of the computation.

    Args:
        data: `Examples`, such as a TensorData; tensors in a tuple or a dictionary, the examples along their first axis; a torch TensorDataset; a map-style
            data set; a list of batches; or a DataLoader, which is read once and kept as a list of batches.
        device: where batches go.
        dtype: floating-point inputs and targets are converted to it.
        split: what makes (inputs, targets) of a batch; `split_batch` by default.
    """
    if isinstance(data, Examples):
        return data.to(device, dtype)
    if isinstance(data, TreeData | MapData | BatchList):
        return data
    if isinstance(data, torch.utils.data.TensorDataset):
        data = data.tensors
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data) and split is None:
        return TensorData(*data).to(device, dtype)
    if isinstance(data, Mapping) or (isinstance(data, tuple) and all(isinstance(t, Tensor) for t in data)):
        return TreeData(move(data, device, dtype), split or split_batch)
    if isinstance(data, torch.utils.data.DataLoader):
        with torch.random.fork_rng(devices=[]):  # a loader seeds its workers from the global state
            data = list(data)
    if isinstance(data, list) and data and isinstance(data[0], tuple | list | Mapping):
        return BatchList(data, device, dtype, split)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if len(data) == 0:
            raise ValueError("the data set has no examples")
        return MapData(data, device, dtype, split)
    if isinstance(data, Iterable):
        raise ValueError(
            "data is an iterator, which can be read only once; give a list of batches, tensors or a map-style data set"
        )
    raise ValueError(f"data of type {type(data).__name__} is not a data set, tensors or a list of batches")


def stream(data: Data, chunk: int, part: range | None = None) -> Iterator[tuple[Any, Any]]:
    """Examples in order, in chunks of at most `chunk` (a list of batches keeps its own).

    Args:
        data: the data.
        chunk: examples at once.
        part: numbers of the examples to take (of a list, of its batches), consecutive; all by default.
    """
    if isinstance(data, BatchList):
        yield from data.some(range(len(data.batches)) if part is None else part)
        return
    part = range(len(data)) if part is None else part
    for start in range(part.start, part.stop, chunk):
        yield _consecutive(data, range(start, min(start + chunk, part.stop)))


def _consecutive(data: Examples | TreeData | MapData, part: range) -> tuple[Any, Any]:
    if isinstance(data, MapData):
        return data.batch(torch.arange(part.start, part.stop))
    return data.rows(slice(part.start, part.stop))


def name_bad_data(data: Data, size: int, part: range) -> None:
    """Raise for the first batch whose inputs or targets hold a number that is not finite.

    Args:
        data: the data.
        size: examples of a batch, for its number.
        part: numbers of the examples to look at (of a list, of its batches), consecutive.
    """
    if isinstance(data, BatchList):
        first = sum(data.counts[: part.start])
        for index, batch in zip(part, data.some(part), strict=True):
            _check_finite(batch, index, first)
            first += data.counts[index]
        return
    start = part.start
    while start < part.stop:
        stop = min((start // size + 1) * size, part.stop)
        _check_finite(_consecutive(data, range(start, stop)), start // size, start)
        start = stop


def _check_finite(batch: tuple[Any, Any], index: int, first: int) -> None:
    count = num_examples(batch[1])
    for t in tensors_in(batch):
        if t.is_floating_point() and not torch.isfinite(t).all():
            rows = (~torch.isfinite(t)).reshape(len(t), -1).any(1).nonzero().flatten()
            raise ValueError(
                f"the data hold nan or infinity: {len(rows)} example(s) of batch {index} (examples {first} to {first + count - 1}), "
                f"the first of them example {first + int(rows[0])}"
            )
