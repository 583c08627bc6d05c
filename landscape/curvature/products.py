"""Operators made of one linear map a batch, summed over an objective's data: what the Hessian and its relatives share."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landscape.curvature.operators import SymmetricOperator
from landscape.linearisation import Linearised
from landscape.objective import Objective, Weights


class ObjectiveOperator(SymmetricOperator):
    """(factor) sum over batches of a symmetric map at fixed weights.

    Each batch is linearised when a product first meets it. What fits the memory budget is kept and used again by every later product; the
    rest is linearised anew for each product, or once for a block of them. Directions go through one batched pass while that keeps
    the working set small, which pays where networks are so small that overhead rules; the choice hangs on sizes alone, never on timing, so
    that results can be had again.

    Attributes:
        objective: L.
        weights: w, (d,).
        memory_budget: bytes of graphs that may be kept; None for what there is room for when a batch is met (`room`).
        kept_bytes: bytes of graphs kept by now.
    """

    kind: str

    def __init__(self, objective: Objective, weights: Weights, *, memory_budget: int | None = None) -> None:
        """Args: objective; weights (d,) or by name; memory_budget: bytes for kept graphs; None for what there is room for, 0 for none."""
        self.objective = objective
        self.weights = objective.flat(weights)
        self.dimension, self.device, self.dtype = objective.num_parameters, objective.device, objective.dtype
        self.peers = objective.peers
        self.memory_budget = memory_budget
        self.kept_bytes = 0
        self._kept: dict[int, Linearised] = {}
        self._complete, self._met, self._batched = False, False, True
        self._bytes_per_example: float | None = None

    @property
    def description(self) -> dict[str, Any]:
        """The operator and its objective."""
        return {**super().description, **self.objective.description}

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with one vector (d,)."""
        return self._product(vector[None])[0]

    def matmat(self, block: Tensor) -> Tensor:
        """The product with several vectors (d, k)."""
        return self._product(block.T.contiguous()).T

    @abstractmethod
    def _finish(self, total: Tensor, rows: Tensor) -> Tensor:
        """From sums over all ranks (k, d) to the product with rows (k, d)."""

    def _product(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        norm, known = 0.0, self._complete  # graphs kept are a rank's own affair: no rank waits for another within
        with self.peers.agree():
            if known:
                for linear in self._kept.values():
                    total += self._multiply(linear, rows)
            else:
                count = 0
                for index, inputs, targets in self.objective.batches():
                    linear = self._kept.get(index) or self._linearise(index, inputs, targets)
                    total += self._multiply(linear, rows)
                    norm += float(linear.norm)
                    count += 1
                    del linear  # before the next graph is built
                self._complete = len(self._kept) == count
        if not self._met:  # the first product passes over the data on every rank
            self.objective.settle_norm(norm)
            self._met = True
        return self._finish(self.peers.sum(total), rows)

    def _linearise(self, index: int, inputs: Any, targets: Any) -> Linearised:
        linear = self.objective.linearise(self.weights, index, inputs, targets, self.kind)
        if self._bytes_per_example is None:
            held = [self.weights, *self.objective.lasting(index, (inputs, targets))]
            self._bytes_per_example = max(1.0, linear.num_bytes(without=held) / linear.num_examples)
        size = int(self._bytes_per_example * linear.num_examples)
        left = room(self.device) if self.memory_budget is None else self.memory_budget - self.kept_bytes
        if size <= left:
            self._kept[index] = linear
            self.kept_bytes += size
        return linear

    def _multiply(self, linear: Linearised, rows: Tensor) -> Tensor:
        at_once = self._at_once(linear)
        if at_once > 1 and len(rows) > 1 and self._batched:
            try:
                return linear(rows, at_once=at_once)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):  # an operation without a batching rule; a real mistake raises below too
                self._batched = False
        return linear(rows)

    def _at_once(self, linear: Linearised) -> int:
        assert self._bytes_per_example is not None
        share = 64 << 20 if self.device.type == "cpu" else 1 << 30
        return max(1, int(share / (self._bytes_per_example * linear.num_examples)))


def room(device: torch.device) -> int:
    """Bytes that kept graphs may still take on a device: what is free, less a quarter of all there is."""
    free, total = _memory(device)
    return free - total // 4


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; on a host, what the kernel calls available, within the limit of the control group if there is one."""
    return _memory(device)[0]


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes free and in all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    if "MemAvailable" not in sizes:  # not Linux: assume that half of the memory is free
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // 2, total
    free, total = sizes["MemAvailable"], sizes["MemTotal"]
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        total = min(total, limit)
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free, total
