"""The function under study: L(w) over a data set, of one fixed network, with explicit weights.

L is the loss over all examples as its reduction says (mean: sum_i l_i / sum_i m_i), without weight decay. Weights are flat
vectors (d,) in named_parameters order, or stacks of them (L, d). The caller's module is copied and never touched; by default the copy
is in eval mode (dropout off, BatchNorm at its running statistics: theory.md sec. 1).
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from landscape import streams
from landscape.autodiff import graph_bytes, unwrap
from landscape.data.dataset import BatchList, MapData, Split, as_data, num_examples, stream, tensors_in
from landscape.functional import Buffers, FunctionalModel, chunks, clone_buffers
from landscape.linearisation import Linearised, OutputCurvature, gauss_newton_map, hessian_map, second_moment_map
from landscape.losses import ExampleLoss, LossFunction, as_example_loss

Weights = Tensor | Mapping[str, Tensor]
"""A flat tensor (d,), or parameters by name."""

BatchNormPolicy = Literal["running", "ghost"]

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_DROPOUTS = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)


class Objective:
    """L(w), its gradients, its minibatch gradients and the linear maps that its curvature is made of.

    Args:
        model: any nn.Module; wrappers (DistributedDataParallel, torch.compile) are taken off. Its parameters that require a gradient
            are the weights.
        loss_fn: see `landscape.losses.as_example_loss`.
        data: tensors in a pair, tuple or dictionary, a map-style data set, a `TensorData`, a DataLoader (read once) or a list of batches
            (these two cannot be drawn from). A batch is (inputs, targets) as `split` or `landscape.data.dataset.split_batch` finds
            them; inputs in a tuple are the model's positional arguments, in a dictionary its keyword arguments.
        reduction: what a loss that gives one number a batch does: "mean" (weighted by the number of examples) or "sum".
        split: what makes (inputs, targets) of a batch.
        parameters: names, or patterns such as "layer1.*", of the parameters that are the weights; the others stay as they are.
        batch_norm: "running" statistics (see `recalibrated`), or the batch statistics of fixed "ghost" batches of `batch_size`
            consecutive examples; then examples are no longer independent, and what needs one example's gradient is refused.
        dropout_seed: None switches dropout off; a number draws one mask a batch of `batch_size` from it, and keeps them.
        batch_size: of the fixed batches; a list of batches has its own.
        buffers: buffers to use instead of the module's own, e.g. those of an averaged model.
        device: where to compute; the module's own device by default.
        dtype: floating-point type; the module's own by default.
        chunk: examples times weight vectors that are differentiated at once; by default what fits the memory budget.
        memory_budget: bytes that one pass may take for its graph and its stacked weights, beside weights given and results; by default
            256 MiB on a CPU and 2 GiB on a GPU.
        group: a torch.distributed process group over whose ranks the data are spread: `data` is then this rank's shard, and every value,
            gradient and product is that of all shards, the same on every rank.
    """

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
    ) -> None:
        model = unwrap(model)
        first = next(model.parameters(), None)
        if first is None:
            raise ValueError(f"{type(model).__name__} has no parameters")
        if batch_norm not in ("running", "ghost"):
            raise ValueError(f"batch_norm {batch_norm!r}; use 'running' or 'ghost'")
        self.device, self.dtype = torch.device(device or first.device), dtype or first.dtype
        self.batch_norm, self.dropout_seed, self.batch_size, self.group = batch_norm, dropout_seed, batch_size, group
        module = copy.deepcopy(model).to(self.device, self.dtype)
        if getattr(module, "is_gradient_checkpointing", False):  # Hugging Face's switch: it hides the graph
            module.gradient_checkpointing_disable()  # type: ignore[operator]
        if parameters is not None:
            _free(module, parameters)
        self._set_modes(module)
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

    @property
    def num_parameters(self) -> int:
        """d."""
        return self.model.layout.num_parameters

    @property
    def num_examples(self) -> int:
        """N, of this rank's shard where the data are spread over ranks."""
        return len(self.data)

    @property
    def has_fixed_batches(self) -> bool:
        """Whether an example's loss hangs on the batch it is in, by ghost batches or frozen dropout masks."""
        ghosts = self.batch_norm == "ghost" and any(isinstance(m, _BATCH_NORMS) for m in self.model.module.modules())
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

    # Weights -----------------------------------------------------------------------------------------------------

    def flat(self, weights: Weights) -> Float[Tensor, " d"]:
        """Weights as a flat tensor (d,) on the objective's device and in its type."""
        if isinstance(weights, Tensor):
            flat = weights
        else:
            flat = self.model.layout.join({n: p.detach().to(self.device, self.dtype) for n, p in weights.items()})
        if flat.shape != (self.num_parameters,):
            raise ValueError(f"weights of shape {tuple(flat.shape)}, for a model of {self.num_parameters} parameters")
        return flat.detach().to(self.device, self.dtype)

    def subset(self, parameters: str | Sequence[str], weights: Weights) -> Objective:
        """L as a function of some parameters, the others held at `weights`: its Hessian is a diagonal block of this one's.

        Args:
            parameters: names, or patterns such as "layer1.*".
            weights: where to hold the others.
        """
        values = self.model.layout.split(self.flat(weights))
        module = copy.deepcopy(self.model.module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
        _free(module, parameters)
        return self._with(module)

    def blocks(self, by: Literal["parameter", "layer"] | int = "layer") -> dict[str, list[str]]:
        """Names of the weights, grouped: one a group, by the module that owns them, or by the first `by` parts of their names."""
        groups: dict[str, list[str]] = {}
        for name in self.model.layout.names:
            parts = name.split(".")
            kept = parts if by == "parameter" else parts[:-1] if by == "layer" else parts[: int(by)]
            groups.setdefault(".".join(kept) or name, []).append(name)
        return groups

    def recalibrated(self, weights: Weights, *, batch_size: int = 1000) -> Objective:
        """This objective with BatchNorm's running statistics measured anew at `weights`, over all the data.

        They are the average of the batch statistics, each batch weighted by its examples: what a model that was averaged over learners
        needs, for it has none of its own (theory.md sec. 1).
        """
        module = copy.deepcopy(self.model.module)
        norms = [m for m in module.modules() if isinstance(m, _BATCH_NORMS) and m.running_mean is not None]
        if not norms:
            return self
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
        held, seen = dict(module.named_buffers()), 0
        flat = self.flat(weights)
        model = self.model.of(module)
        size = batch_size + (self.num_examples % batch_size == 1)  # a batch of one example has no variance
        with torch.no_grad():
            for index, (inputs, targets) in enumerate(stream(self.data, size)):
                count = num_examples(targets)
                seen += count
                for part in model.module.modules():
                    if isinstance(part, _BATCH_NORMS):
                        part.momentum = count / seen
                with self.frozen(index):
                    model.output(flat, held, inputs)
        if self.group is not None:
            total = self.sum_over_ranks(torch.tensor(float(seen), dtype=torch.float64, device=self.device))
            for buffer in held.values():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum_over_ranks(buffer.double() * seen) / total)
        made = self._with(self.model.module)
        made.buffers = {name: b.detach().clone() for name, b in held.items()}
        return made

    # Values and gradients ----------------------------------------------------------------------------------------

    @property
    def norm(self) -> float:
        """sum_i m_i over all examples, or 1 for a sum-reduced loss: what the summed contributions are divided by."""
        if self._norm is None:
            self.settle_norm(
                sum(float(self.model.loss.weights(y).sum(dtype=torch.float64)) for _, _, y in self.batches())
            )
        assert self._norm is not None
        return self._norm

    @property
    def has_equal_weights(self) -> bool:
        """Whether every example weighs the same in the mean: no class weights, no ignored targets."""
        found: set[float] = set()
        for _, _, targets in self.batches():
            found.update(self.model.loss.weights(targets).unique().tolist())
            if len(found) > 1 or not self.model.loss.per_example:
                return False
        return True

    def settle_norm(self, local: float) -> None:
        """Take note of this rank's summed example weights, met in a pass over all its data."""
        if self._norm is None:
            total = self.sum_over_ranks(torch.tensor(local, dtype=torch.float64, device=self.device))
            self._norm = float(total) if self.model.loss.reduction == "mean" else 1.0
            if self._norm == 0:
                raise ValueError("no example has a weight: every target is ignored")

    def value(self, weights: Weights) -> float:
        """L(w)."""
        return float(self.stacked_values(self.flat(weights)[None])[0])

    def gradient(self, weights: Weights) -> Float[Tensor, " d"]:
        """g(w) = grad L(w), over all examples."""
        return self.stacked_gradients(self.flat(weights)[None])[0]

    def stacked_values(self, weights: Float[Tensor, "L d"]) -> Float[Tensor, " L"]:
        """L at each of some weight vectors, float64."""
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        for part in self._weight_parts(len(weights)):
            held, norm = self._held_buffers(part), torch.zeros((), dtype=torch.float64, device=self.device)
            for index, inputs, targets in self.batches(part.stop - part.start):
                with self.frozen(index):
                    contributions, example_weights = self.model.losses(
                        weights[part], held, inputs, targets, shared=True
                    )
                total[part] += contributions.sum(1, dtype=torch.float64)
                norm += example_weights[0].sum(dtype=torch.float64)
            self.settle_norm(float(norm))
        return self._checked(self.sum_over_ranks(total) / self.norm)

    def stacked_gradients(self, weights: Float[Tensor, "L d"]) -> Float[Tensor, "L d"]:
        """Full gradients at each of some weight vectors. Cost: L full gradients, each pass over the data shared."""
        gradients = torch.zeros_like(weights)
        for part in self._weight_parts(len(weights)):
            held, norm = self._held_buffers(part), torch.zeros((), dtype=torch.float64, device=self.device)
            for index, inputs, targets in self.batches(part.stop - part.start):
                with self.frozen(index):
                    _, example_weights, summed, _ = self.model.summed_gradients(
                        weights[part], held, inputs, targets, shared=True
                    )
                gradients[part] += summed
                norm += example_weights[0]
            self.settle_norm(float(norm))
        return self._checked(self.sum_over_ranks(gradients).div_(self.norm))

    def minibatch_gradients(self, weights: Float[Tensor, "L d"], indices: Tensor) -> Float[Tensor, "L d"]:
        """Gradients of the minibatch loss, weight vector l on examples indices[l], (L, B)."""
        self._needs_independent_examples()
        sizes = chunks(len(weights), max(1, self.chunk // indices.shape[1]))
        return torch.cat([self._minibatches(weights[part], indices[part]) for part in sizes])

    def averaged_gradients(
        self, points: Float[Tensor, "*P d"], indices: Int64[Tensor, "K n B"]
    ) -> Float[Tensor, "K d"]:
        """(1/n) sum_j grad L^{mu_kj}(x_kj) for K draws of n minibatches: the averaged gradient g_a of a step, K times over.

        Args:
            points: x, (d,) for all alike, (n, d) for learners that stay where they are, or (K, n, d).
            indices: the minibatches.

        Cost: K n minibatch gradients; where all points are one and it fits `chunk`, a draw's n minibatches are differentiated as one batch.
        """
        self._needs_independent_examples()
        draws, learners, batch = indices.shape
        averaged = torch.zeros(draws, self.num_parameters, device=self.device, dtype=self.dtype)
        at_once = max(
            1, self.memory_budget // (8 * self.num_parameters * self.dtype.itemsize)
        )  # weights, gradients, temporaries
        if points.ndim == 1 and self.model.loss.per_example and learners * batch <= self.chunk:
            for part in chunks(draws, min(at_once, max(1, self.chunk // (learners * batch)))):
                held = points.expand(part.stop - part.start, -1)
                averaged[part] = self._minibatches(held, indices[part].flatten(1), parts=learners)
            return averaged
        flat = indices.flatten(0, 1)
        for part in chunks(len(flat), min(at_once, max(1, self.chunk // batch))):
            which = torch.arange(part.start, part.stop, device=self.device)
            held = (
                points.expand(len(which), -1) if points.ndim == 1
                else points[which % learners] if points.ndim == 2
                else points.flatten(0, 1)[which]
            )  # fmt: skip
            averaged.index_add_(0, which // learners, self._minibatches(held, flat[part]))
        return averaged.div_(learners)

    def _minibatches(self, weights: Tensor, indices: Tensor, parts: int = 1) -> Tensor:
        inputs, targets = self.data.batch(indices.to(self.device))
        held = self._held_buffers(slice(0, len(weights)))
        with self.frozen(0):
            return self.model.minibatch_gradients(weights, held, inputs, targets, parts=parts)[1]

    def example_gradients(self, weights: Weights, *, chunk: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
        """Per-example gradients of the contributions, streamed: (b, d) and example weights (b,), b at most `chunk`.

        For a mean-reduced loss with unit weights these are the per-example gradients whose mean is g(w).
        """
        self._needs_independent_examples()
        flat = self.flat(weights)
        for inputs, targets in stream(self.data, chunk):
            with self.frozen(0):
                found = self.model.example_gradients(flat, self.buffers, inputs, targets)
            yield found

    # Curvature ---------------------------------------------------------------------------------------------------

    def linearise(self, weights: Float[Tensor, " d"], index: int, inputs: Any, targets: Any, kind: str) -> Linearised:
        """The curvature of one of `batches(1)`: kind is "hessian", "second-moment", or what stands inside a Gauss-Newton matrix.

        Raises:
            ValueError: for a loss that is not finite, naming the batch.
        """
        with self.frozen(index):
            if kind == "hessian":
                found = hessian_map(self.model, weights, self.buffers, inputs, targets)
            elif kind == "second-moment":
                self._needs_independent_examples()
                found = second_moment_map(self.model, weights, self.buffers, inputs, targets)
            else:
                curvature: OutputCurvature = "fisher" if kind == "fisher" else "hessian"
                found = gauss_newton_map(self.model, weights, self.buffers, inputs, targets, curvature)
        if not torch.isfinite(found.total):
            self._name_bad_data()
            raise ValueError(f"the loss is {float(found.total)} in batch {index} though its data are finite: these weights have diverged")  # fmt: skip
        return found

    def batches(self, num_weights: int = 1) -> Iterator[tuple[int, Any, Any]]:
        """(index, inputs, targets) of all batches, in order, for so many weight vectors at once."""
        if self.has_fixed_batches and self.batch_size is not None:
            size = self.batch_size
        elif isinstance(self.data, BatchList):
            size = 1  # it keeps its own
        else:
            size = max(1, self.chunk // num_weights)
        for index, (inputs, targets) in enumerate(stream(self.data, size)):
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

    # Many processes ----------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Ranks over which the data are spread."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place, the same on each of them; itself where there is one."""
        if self.group is not None:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    # -------------------------------------------------------------------------------------------------------------

    def _set_modes(self, module: nn.Module) -> None:
        module.eval()
        for part in module.modules():
            if self.batch_norm == "ghost" and isinstance(part, _BATCH_NORMS):
                part.train()
            if self.dropout_seed is not None and isinstance(part, _DROPOUTS):
                part.train()

    def _with(self, module: nn.Module) -> Objective:
        made = copy.copy(self)
        made.model = self.model.of(module)
        return made

    def _weight_parts(self, count: int) -> Iterator[slice]:
        return chunks(count, max(8, self.chunk // self.num_examples))

    def _held_buffers(self, part: slice) -> Buffers:
        return {n: b.expand(part.stop - part.start, *b.shape) for n, b in self.buffers.items()}

    def frozen(self, index: int) -> contextlib.ExitStack:
        """Within, dropout draws the masks of batch `index`, and autocast is off: a Hessian has one type."""
        held = contextlib.ExitStack()
        held.enter_context(torch.autocast(self.device.type, enabled=False))
        if self.dropout_seed is not None:
            held.enter_context(streams.seeded("dropout", self.dropout_seed, index, device=self.device))
        return held

    def _needs_independent_examples(self) -> None:
        if self.has_fixed_batches:
            raise ValueError(
                "with ghost batches or frozen dropout masks an example has no gradient of its own; use batch_norm='running' and "
                "dropout_seed=None for per-example and minibatch gradients"
            )

    def _checked(self, result: Tensor) -> Tensor:
        if not torch.isfinite(result).all():
            self._name_bad_data()
        return result

    def _name_bad_data(self) -> None:
        """Raise for the first batch whose data hold a number that is not finite."""
        first = 0
        for index, (inputs, targets) in enumerate(stream(self.data, self.batch_size or 1024)):
            count = num_examples(targets)
            for t in tensors_in((inputs, targets)):
                if t.is_floating_point() and not torch.isfinite(t).all():
                    rows = (~torch.isfinite(t)).reshape(len(t), -1).any(1).nonzero().flatten()
                    raise ValueError(
                        f"the data hold nan or infinity: {len(rows)} example(s) of batch {index} (examples {first} to {first + count - 1}), "
                        f"the first of them example {first + int(rows[0])}"
                    )
            first += count


def _free(module: nn.Module, parameters: str | Sequence[str]) -> None:
    """Let only the parameters that fit a name or pattern require a gradient."""
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    fitting = {p: fnmatch.filter(names, p) for p in patterns}
    empty = [p for p, found in fitting.items() if not found]
    if empty or not patterns:
        raise ValueError(
            f"no parameter is named {', '.join(empty) or '(no pattern given)'}; there are {', '.join(names)}"
        )
    chosen = {name for found in fitting.values() for name in found}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
