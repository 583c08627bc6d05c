"""A fixed choice of a data set's examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from landscape import streams
from landscape.data.dataset import Examples, fingerprint_of

CHOICE_SEED = 0


@dataclass(frozen=True)
class Selection(Examples):
    """Some examples of a data set, under numbers of their own.

    Attributes:
        whole: the data set.
        numbers: (N,) int64 on the CPU, the examples in it.
        name: see `Examples`.
    """

    whole: Examples
    numbers: Tensor
    name: str

    @property
    def device(self) -> torch.device:
        """See `Examples`."""
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        """See `Examples`."""
        return self.whole.dtype

    @property
    def num_random(self) -> int:
        """See `Examples`."""
        return self.whole.num_random

    @property
    def reads_ahead(self) -> bool:
        """See `Examples`."""
        return self.whole.reads_ahead

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: Tensor) -> tuple[Any, Any]:
        """See `Examples`."""
        return self.whole.batch(self._there(indices))

    def targets_at(self, indices: Tensor) -> Any:
        """See `Examples`."""
        return self.whole.targets_at(self._there(indices))

    def draw(self, indices: Tensor, uniforms: Tensor) -> tuple[Any, Any]:
        """See `Examples`."""
        return self.whole.draw(self._there(indices), uniforms)

    def expect(self, indices: Tensor, uniforms: Tensor) -> None:
        """See `Examples`."""
        self.whole.expect(self._there(indices), uniforms)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Selection:
        """See `Examples`."""
        return replace(self, whole=self.whole.to(device, dtype))

    def fingerprint(self) -> str:
        """See `Examples`."""
        return fingerprint_of(self.whole.fingerprint().encode(), self.numbers)

    def _there(self, indices: Tensor) -> Tensor:
        return self.numbers[indices.cpu()].to(indices.device)


def choose(data: Examples, count: int) -> Examples:
    """The same `count` examples whenever asked, drawn without replacement, or all the data if there are no more.

    >>> from landscape.data import TensorData
    >>> data = TensorData(torch.zeros(100, 2), torch.arange(100))
    >>> few = choose(data, 3)
    >>> len(few), len(choose(data, 100)), few.fingerprint() == choose(data, 3).fingerprint()
    (3, 100, True)
    """
    if count >= len(data):
        return data
    if count < 1:
        raise ValueError(f"at least 1 example must be chosen, not {count}")
    order = streams.permutation(streams.philox("choice of examples", CHOICE_SEED), len(data))
    chosen = torch.from_numpy(order[:count].copy()).sort().values
    whole, numbers = (data.whole, data.numbers[chosen]) if isinstance(data, Selection) else (data, chosen)
    return Selection(whole, numbers, f"{whole.name}, {count:,} of {len(whole):,} examples")
