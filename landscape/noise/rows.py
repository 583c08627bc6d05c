"""Many long vectors: in memory while they fit a budget, beyond it in a scratch file that is read in rows or in columns."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from landscape.objective.peers import Peers

HANDED = 64 << 20
"""Bytes that a rank hands the others at once."""


class Rows:
    """(m, d) numbers, written by rows.

    Beyond the budget they lie in an unnamed temporary file (in the folder that TMPDIR names), which vanishes with this object.

    Args:
        shape: (m, d).
        like: a tensor of the type and device that rows are given back in.
        memory_budget: bytes that may be held in memory; None for any number.
    """

    def __init__(self, shape: tuple[int, int], like: Tensor, memory_budget: int | None = None) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device
        size = shape[0] * shape[1] * like.dtype.itemsize
        self._memory: Tensor | None = None
        if memory_budget is None or size <= memory_budget:
            self._memory = torch.zeros(shape, dtype=self.dtype, device=self.device)
        else:
            self._file = tempfile.TemporaryFile(prefix="landscape-rows-")  # noqa: SIM115
            self._file.truncate(size)
            weakref.finalize(self, self._file.close)

    @property
    def spilled(self) -> bool:
        """Whether the rows lie in a file."""
        return self._memory is None

    def __len__(self) -> int:
        return self.shape[0]

    def put(self, start: int, rows: Tensor) -> None:
        """Write rows start, start + 1, ..."""
        if self._memory is not None:
            self._memory[start : start + len(rows)] = rows
            return
        for i, row in enumerate(rows.to(self.dtype).detach().cpu().contiguous(), start):
            content, written = memoryview(row.view(torch.uint8).numpy()), 0
            while written < len(content):  # one call moves at most 2 GiB
                written += os.pwrite(self._file.fileno(), content[written:], i * self._row_bytes + written)

    def get(self, part: slice) -> Tensor:
        """Some rows, (k, d)."""
        if self._memory is not None:
            return self._memory[part]
        start, stop, _ = part.indices(len(self))
        return self._read(start * self._row_bytes, stop - start, self.shape[1])

    def columns(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """All columns in order, at most `width` at a time: (which, (m, width))."""
        for start in range(0, self.shape[1], width):
            part = slice(start, min(start + width, self.shape[1]))
            if self._memory is not None:
                yield part, self._memory[:, part]
            else:
                offsets = [i * self._row_bytes + part.start * self.dtype.itemsize for i in range(len(self))]
                yield part, torch.cat([self._read(at, 1, part.stop - part.start) for at in offsets])

    def hand_round(self, peers: Peers) -> None:
        """Give every rank all rows, where each has written those of its `Peers.share` of their number. Cost: (m, d) numbers received."""
        if peers.size == 1:
            return
        at_once = max(1, HANDED // self._row_bytes)
        for owner, own in enumerate(peers.shares(len(self))):
            for start in range(own.start, own.stop, at_once):
                part = slice(start, min(start + at_once, own.stop))
                rows = self.get(part) if owner == peers.rank else torch.empty(part.stop - start, self.shape[1], device=self.device, dtype=self.dtype)  # fmt: skip
                peers.hand_round(rows, owner)
                if owner != peers.rank:
                    self.put(start, rows)

    def tensor(self) -> Tensor:
        """All of them, (m, d), in memory."""
        return self.get(slice(0, len(self)))

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * self.dtype.itemsize

    def _read(self, offset: int, rows: int, width: int) -> Tensor:
        content = bytearray(rows * width * self.dtype.itemsize)
        filled, view = 0, memoryview(content)
        while filled < len(content):
            filled += os.preadv(self._file.fileno(), [view[filled:]], offset + filled)
        return torch.frombuffer(content, dtype=self.dtype).view(rows, width).to(self.device)


CHUNK = 1 << 18
"""Numbers of a vector that are converted to float64 at once."""


def pieces(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Consecutive parts of a vector of these sizes, in pieces of at most CHUNK: (index of the part, where)."""
    begin = 0
    for index, size in enumerate(sizes):
        for start in range(begin, begin + size, CHUNK):
            yield index, slice(start, min(start + CHUNK, begin + size))
        begin += size


def products_by_part(rows: Tensor, others: Tensor, sizes: Sequence[int]) -> np.ndarray:
    """rows (p, d) @ others (q, d).T over consecutive parts of d of these sizes, (parts, p, q) float64."""
    total = torch.zeros(len(sizes), len(rows), len(others), dtype=torch.float64, device=rows.device)
    for index, where in pieces(sizes):
        total[index] += rows[:, where].double() @ others[:, where].double().T
    return total.cpu().numpy()
