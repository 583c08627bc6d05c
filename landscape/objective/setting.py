"""What an objective is made of and keeps fixed: network, loss, data, batches, memory, and the processes that share the work."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from landscape import streams
from landscape.autodiff import graph_bytes, unwrap
from landscape.data.dataset import BatchList, MapData, Split, as_data, name_bad_data, num_examples, stream, tensors_in
from landscape.functional import BATCH_NORMS, Buffers, FunctionalModel, clone_buffers
from landscape.losses import ExampleLoss, LossFunction, as_example_loss
from landscape.objective.modes import BatchNormPolicy, free, set_modes
from landscape.objective.peers import Peers, counted, own_part

Weights = Tensor | Mapping[str, Tensor]
"""A flat tensor (d,), or parameters by name."""


class Setting:
    """What `Objective` is built on; its arguments are described there."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: ExampleLoss | LossFunction,
        data: Any,
        *,
        reduction: Literal["mean", "sum"] | None = None,
        split: Split | None = None,
        parameters: str | Sequence[str] | None = None,
        batch_norm: BatchNormPolicy = "running",
        dropout_seed: int | None = None,
        batch_size: int | None = None,
        buffers: Buffers | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        memory_budget: int | None = None,
        group: Any = None,
        shared: bool = False,
    ) -> None:
        model = unwrap(model)
        first = next(model.parameters(), None)
        if first is None:
            raise ValueError(f"{type(model).__name__} has no parameters")
        if batch_norm not in ("running", "ghost"):
            raise ValueError(f"batch_norm {batch_norm!r}; use 'running' or 'ghost'")
        self.device, self.dtype = torch.device(device or first.device), dtype or first.dtype
        self.batch_norm, self.dropout_seed, self.batch_size = batch_norm, dropout_seed, batch_size
        module = copy.deepcopy(model).to(self.device, self.dtype)
        if getattr(module, "is_gradient_checkpointing", False):  # Hugging Face's switch: it hides the graph
            module.gradient_checkpointing_disable()  # type: ignore[operator]
        if parameters is not None:
            free(module, parameters)
        set_modes(module, batch_norm, dropout_seed)
        randomness = "same" if dropout_seed is not None else "different"
        self.model = FunctionalModel(module, as_example_loss(loss_fn, reduction), randomness=randomness)
        own = {name: b.detach().clone() for name, b in module.named_buffers()}
        self.buffers = {n: (buffers or {}).get(n, b).to(b) for n, b in own.items()}
        self.data = as_data(data, self.device, self.dtype, split)
        if self.has_fixed_batches and batch_size is None and not isinstance(self.data, BatchList):
            raise ValueError(
                "ghost batches and frozen dropout masks belong to fixed batches; give batch_size, or a list of batches"
            )
        self._chunk = chunk
        self.memory_budget = memory_budget or (256 << 20 if self.device.type == "cpu" else 2 << 30)
        self._norm: float | None = None
        self._bytes_per_example: float | None = None
        self.peers = Peers.of(group, self.device, shared)
        self._num_examples, self._first_batch = counted(self.data, self._unit, self.peers)

    @property
    def num_parameters(self) -> int:
        """d."""
        return self.model.layout.num_parameters

    @property
    def num_examples(self) -> int:
        """N, of all ranks together."""
        return self._num_examples

    @property
    def num_own_examples(self) -> int:
        """How many of them this rank passes over; perhaps none."""
        _, own = own_part(self.data, self._unit, self.peers)
        return sum(self.data.counts[i] for i in own) if isinstance(self.data, BatchList) else len(own)

    @property
    def has_fixed_batches(self) -> bool:
        """Whether an example's loss hangs on the batch it is in, by ghost batches or frozen dropout masks."""
        ghosts = self.batch_norm == "ghost" and any(isinstance(m, BATCH_NORMS) for m in self.model.module.modules())
        return ghosts or self.dropout_seed is not None

    @property
    def chunk(self) -> int:
        """Examples times weight vectors that are differentiated at once."""
        if self._chunk is None:
            most = 8192 if self.device.type == "cpu" else 1 << 17
            self._chunk = int(min(most, max(1, self.memory_budget // max(1.0, self.bytes_per_example))))
        return self._chunk

    @property
    def bytes_per_example(self) -> float:
        """Memory that a gradient with its graph takes for one example: three times what its forward pass keeps."""
        if self._bytes_per_example is None:
            inputs, targets = self.few(2)
            weights = self.model.initial_weights()[0].requires_grad_()
            with self.frozen(0):
                contributions, _ = self.model.example_losses(weights, clone_buffers(self.buffers), inputs, targets)
            kept = graph_bytes([contributions], without=[weights, *self.lasting(0, (inputs, targets))])
            self._bytes_per_example = 3 * kept / num_examples(targets)
        return self._bytes_per_example

    @property
    def description(self) -> dict[str, Any]:
        """What this is, for the provenance of results."""
        return {
            "model": type(self.model.module).__name__,
            "num_parameters": self.num_parameters,
            "num_examples": self.num_examples,
            "reduction": self.model.loss.reduction,
            "batch_norm": self.batch_norm,
            "dropout_seed": "off" if self.dropout_seed is None else self.dropout_seed,
            "world_size": self.world_size,
        }

    def flat(self, weights: Weights) -> Float[Tensor, " d"]:
        """Weights as a flat tensor (d,) on the objective's device and in its type."""
        if isinstance(weights, Tensor):
            flat = weights
        else:
            flat = self.model.layout.join({n: p.detach().to(self.device, self.dtype) for n, p in weights.items()})
        if flat.shape != (self.num_parameters,):
            raise ValueError(f"weights of shape {tuple(flat.shape)}, for a model of {self.num_parameters} parameters")
        return flat.detach().to(self.device, self.dtype)

    def blocks(self, by: Literal["parameter", "layer"] | int = "layer") -> dict[str, list[str]]:
        """Names of the weights, grouped: one a group, by the module that owns them, or by the first `by` parts of their names."""
        groups: dict[str, list[str]] = {}
        for name in self.model.layout.names:
            parts = name.split(".")
            kept = parts if by == "parameter" else parts[:-1] if by == "layer" else parts[: int(by)]
            groups.setdefault(".".join(kept) or name, []).append(name)
        return groups

    def batches(self, num_weights: int = 1) -> Iterator[tuple[int, Any, Any]]:
        """(index, inputs, targets) of all batches of this rank, in order, for so many weight vectors at once.

        The index of a fixed batch, or of one of a list, is that among all of them.
        """
        first, own = own_part(self.data, self._unit, self.peers)
        fixed = self.has_fixed_batches or isinstance(self.data, BatchList)  # a list keeps its own
        size = self._unit if fixed else max(1, self.chunk // num_weights)
        for index, (inputs, targets) in enumerate(stream(self.data, size, own), first if fixed else 0):
            yield index, inputs, targets

    def few(self, count: int) -> tuple[Any, Any]:
        """The first examples, as (inputs, targets); the first batch where batches are fixed."""
        inputs, targets = next(stream(self.data, count))
        if isinstance(self.data, BatchList) and not self.has_fixed_batches:
            inputs, targets = tree_map(lambda t: t[:count] if isinstance(t, Tensor) else t, (inputs, targets))
        return inputs, targets

    def lasting(self, index: int, batch: Any) -> list[Tensor]:
        """Tensors in memory whether or not the graph of batch `index` is kept: buffers, and data unless read or copied for it."""
        data = self.data
        own = [] if isinstance(data, MapData) else data.batches[index] if isinstance(data, BatchList) else batch
        return [*self.buffers.values(), *tensors_in(own)]

    @property
    def world_size(self) -> int:
        """Ranks that share the work."""
        return self.peers.size

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place, the same on each of them; itself where there is one."""
        return self.peers.sum(tensor)

    def needs_all_data(self) -> None:
        """Raises: ValueError where this rank holds a shard alone, for what is drawn from all the data or takes pairs of them."""
        if self.peers.size > 1 and not self.peers.shared:
            raise ValueError(
                "this rank holds a shard of the data, and what is asked for takes any examples of all of them; give every rank all "
                "the data, Objective(..., group=group, shared=True)"
            )

    @property
    def _unit(self) -> int:
        """Examples that must stay together: those of a fixed batch."""
        return self.batch_size if self.has_fixed_batches and self.batch_size is not None else 1

    def _held_buffers(self, part: slice) -> Buffers:
        return {n: b.expand(part.stop - part.start, *b.shape) for n, b in self.buffers.items()}

    def frozen(self, index: int) -> contextlib.ExitStack:
        """Within, dropout draws the masks of batch `index`, and autocast is off: a Hessian has one type."""
        held = contextlib.ExitStack()
        held.enter_context(torch.autocast(self.device.type, enabled=False))
        if self.dropout_seed is not None:
            held.enter_context(
                streams.seeded("dropout", self.dropout_seed, self._first_batch + index, device=self.device)
            )
        return held

    def _needs_independent_examples(self) -> None:
        if self.has_fixed_batches:
            raise ValueError(
                "with ghost batches or frozen dropout masks an example has no gradient of its own; use batch_norm='running' and "
                "dropout_seed=None for per-example and minibatch gradients"
            )

    def name_bad_data(self) -> None:
        """Raise for the first of this rank's batches whose data hold a number that is not finite."""
        name_bad_data(self.data, self.batch_size or 1024, own_part(self.data, self._unit, self.peers)[1])
