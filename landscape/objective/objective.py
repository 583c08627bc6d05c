"""The function under study: L(w) over a data set, of one fixed network, with explicit weights.

L is the loss over all examples as its reduction says (mean: sum_i l_i / sum_i m_i), without weight decay. Weights are flat
vectors (d,) in named_parameters order, or stacks of them (L, d). The caller's module is copied and never touched; by default the copy
is in eval mode (dropout off, BatchNorm at its running statistics: theory.md sec. 1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from landscape.data.dataset import stream
from landscape.functional import chunks, measured_norms
from landscape.linearisation import Linearised, OutputCurvature, gauss_newton_map, hessian_map, second_moment_map
from landscape.objective.modes import free, measured_statistics
from landscape.objective.peers import own_part
from landscape.objective.setting import Setting, Weights


class Objective(Setting):
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
        group: a torch.distributed process group whose ranks share the work. Every rank makes the same calls, and every value, gradient and
            product is that of all the data, the same to the bit on each of them; a ValueError of one rank is raised on all.
        shared: what `data` are in a group: False for this rank's shard of them; True for all of them, the same on every rank, each of which
            then passes over its share of the examples (or of the fixed batches). Only these can be drawn from.
    """

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
        free(module, parameters)
        return self._with(module)

    def recalibrated(self, weights: Weights, *, batch_size: int = 1000) -> Objective:
        """This objective with BatchNorm's running statistics measured anew at `weights`, over all the data.

        They are the average of the batch statistics, each batch weighted by its examples: what a model that was averaged over learners
        needs, for it has none of its own (theory.md sec. 1).
        """
        module = copy.deepcopy(self.model.module)
        if not measured_norms(module):
            return self
        size = batch_size + (self.num_examples % batch_size == 1)  # a batch of one example has no variance
        first, own = own_part(self.data, size, self.peers)
        batches = ((index, x, y) for index, (x, y) in enumerate(stream(self.data, size, own), first))
        made = self._with(self.model.module)
        made.buffers = measured_statistics(self.model.of(module), self.flat(weights), batches, self.frozen, self.peers)
        return made

    @property
    def norm(self) -> float:
        """sum_i m_i over all examples, or 1 for a sum-reduced loss: what the summed contributions are divided by."""
        if self._norm is None:
            local = 0.0
            with self.peers.agree():
                for _, _, targets in self.batches():
                    local += float(self.model.loss.weights(targets).sum(dtype=torch.float64))
            self.settle_norm(local)
        assert self._norm is not None
        return self._norm

    @property
    def has_equal_weights(self) -> bool:
        """Whether every example weighs the same in the mean: no class weights, no ignored targets."""
        if not self.model.loss.per_example:
            return False
        low, high = math.inf, -math.inf
        with self.peers.agree():
            for _, _, targets in self.batches():
                found = self.model.loss.weights(targets)
                low, high = min(low, float(found.min())), max(high, float(found.max()))
        everywhere = self.peers.collect((low, high))
        return min(least for least, _ in everywhere) == max(most for _, most in everywhere)

    def settle_norm(self, local: float) -> None:
        """Take note of this rank's summed example weights, met in a pass over all its data."""
        if self._norm is None:
            total = self.peers.sum(torch.tensor(local, dtype=torch.float64, device=self.device))
            self._norm = float(total) if self.model.loss.reduction == "mean" else 1.0
            if self._norm == 0:
                raise ValueError("no example has a weight: every target is ignored")

    # Values and gradients ----------------------------------------------------------------------------------------

    def value(self, weights: Weights) -> float:
        """L(w)."""
        return float(self.stacked_values(self.flat(weights)[None])[0])

    def gradient(self, weights: Weights) -> Float[Tensor, " d"]:
        """g(w) = grad L(w), over all examples."""
        return self.stacked_gradients(self.flat(weights)[None])[0]

    def stacked_values(self, weights: Float[Tensor, "L d"]) -> Float[Tensor, " L"]:
        """L at each of some weight vectors, float64."""
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        norm = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.peers.agree():
            for part in self._weight_parts(len(weights)):
                held = self._held_buffers(part)
                for index, inputs, targets in self.batches(part.stop - part.start):
                    with self.frozen(index):
                        contributions, example_weights = self.model.losses(
                            weights[part], held, inputs, targets, shared=True
                        )
                    total[part] += contributions.sum(1, dtype=torch.float64)
                    norm += example_weights[0].sum(dtype=torch.float64) if part.start == 0 else 0
        return self._averaged(total, float(norm))

    def stacked_gradients(self, weights: Float[Tensor, "L d"]) -> Float[Tensor, "L d"]:
        """Full gradients at each of some weight vectors. Cost: L full gradients, each pass over the data shared."""
        gradients = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        norm = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.peers.agree():
            for part in self._weight_parts(len(weights)):
                held = self._held_buffers(part)
                for index, inputs, targets in self.batches(part.stop - part.start):
                    with self.frozen(index):
                        _, example_weights, summed, _ = self.model.summed_gradients(
                            weights[part], held, inputs, targets, shared=True
                        )
                    gradients[part] += summed
                    norm += example_weights[0] if part.start == 0 else 0
        return self._averaged(gradients, float(norm))

    def minibatch_gradients(self, weights: Float[Tensor, "L d"], indices: Tensor) -> Float[Tensor, "L d"]:
        """Gradients of the minibatch loss, weight vector l on examples indices[l], (L, B); in a group, those that this rank asks for."""
        self._needs_independent_examples()
        self.needs_all_data()
        sizes = chunks(len(weights), max(1, self.chunk // indices.shape[1]))
        return torch.cat([self._minibatches(weights[part], indices[part]) for part in sizes])

    def averaged_gradients(
        self, points: Float[Tensor, "*P d"], indices: Int64[Tensor, "K n B"]
    ) -> Float[Tensor, "K d"]:
        """(1/n) sum_j grad L^{mu_kj}(x_kj) for K draws of n minibatches: the averaged gradient g_a of a step, K times over.

        In a group each rank computes what it asks for.

        Args:
            points: x, (d,) for all alike, (n, d) for learners that stay where they are, or (K, n, d).
            indices: the minibatches.

        Cost: K n minibatch gradients; where all points are one and it fits `chunk`, a draw's n minibatches are differentiated as one batch.
        """
        self._needs_independent_examples()
        self.needs_all_data()
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
        """Per-example gradients of the contributions of this rank's examples, streamed: (b, d) and example weights (b,), b at most `chunk`.

        For a mean-reduced loss with unit weights these are the per-example gradients whose mean is g(w).
        """
        self._needs_independent_examples()
        flat = self.flat(weights)
        for inputs, targets in stream(self.data, chunk, own_part(self.data, 1, self.peers)[1]):
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
            self.name_bad_data()
            raise ValueError(f"the loss is {float(found.total)} in batch {index} though its data are finite: these weights have diverged")  # fmt: skip
        return found

    # -------------------------------------------------------------------------------------------------------------

    def _with(self, module: nn.Module) -> Objective:
        made = copy.copy(self)
        made.model = self.model.of(module)
        return made

    def _weight_parts(self, count: int) -> Iterator[slice]:
        return chunks(count, max(8, self.chunk // max(1, self.num_own_examples)))

    def _averaged(self, local: Tensor, norm: float) -> Tensor:
        """Sums over this rank's examples to means over all, from a pass that met the example weights `norm`."""
        if len(local):
            self.settle_norm(norm)
        result = self.peers.sum(local).div_(self.norm)
        if not torch.isfinite(result).all():
            with self.peers.agree():
                self.name_bad_data()
        return result
