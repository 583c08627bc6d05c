"""The function under study: L(w) over a data set, of one fixed network, with explicit weights.

L is the loss over all examples as its reduction says (mean: sum_i l_i / sum_i m_i), without weight decay. Weights are flat
vectors (d,) in named_parameters order, or stacks of them (L, d). The caller's module is copied, put in eval mode
(dropout off, BatchNorm at its running statistics: theory.md sec. 1) and never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from landscape.data.dataset import as_data, stream
from landscape.functional import Buffers, FunctionalModel, chunks
from landscape.losses import ExampleLoss, LossFunction

Weights = Tensor | Mapping[str, Tensor]
"""A flat tensor (d,), or parameters by name."""


class Objective:
    """L(w), its gradients and its minibatch gradients.

    Args:
        model: any nn.Module; its parameters that require a gradient are the weights.
        loss_fn: see `landscape.losses.as_example_loss`.
        data: a pair of tensors, a map-style data set, a `TensorData`, or a list of batches (which cannot be drawn from).
        buffers: buffers to use instead of the module's own, e.g. those of an averaged model.
        device: where to compute; the module's own device by default.
        dtype: floating-point type; the module's own by default.
        chunk: examples times weight vectors that are differentiated at once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: ExampleLoss | LossFunction,
        data: Any,
        *,
        buffers: Buffers | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
    ) -> None:
        first = next(model.parameters())
        self.device, self.dtype = torch.device(device or first.device), dtype or first.dtype
        self.model = FunctionalModel(model, loss_fn).to(self.device, self.dtype)
        self.model.module.eval()
        own = dict(self.model.initial_weights()[1].items())
        self.buffers = {n: (buffers or {}).get(n, b).to(b) for n, b in own.items()}
        self.data = as_data(data, self.device, self.dtype)
        self.chunk = chunk or (8192 if self.device.type == "cpu" else 1 << 17)

    @property
    def num_parameters(self) -> int:
        """d."""
        return self.model.layout.num_parameters

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.data)

    def flat(self, weights: Weights) -> Float[Tensor, " d"]:
        """Weights as a flat tensor (d,) on the objective's device and in its type."""
        flat = weights if isinstance(weights, Tensor) else self.model.layout.join(weights)
        if flat.shape != (self.num_parameters,):
            raise ValueError(f"weights of shape {tuple(flat.shape)}, for a model of {self.num_parameters} parameters")
        return flat.detach().to(self.device, self.dtype)

    def value(self, weights: Weights) -> float:
        """L(w)."""
        return float(self.stacked_values(self.flat(weights)[None])[0])

    def gradient(self, weights: Weights) -> Float[Tensor, " d"]:
        """g(w) = grad L(w), over all examples."""
        return self.stacked_gradients(self.flat(weights)[None])[0]

    def stacked_values(self, weights: Float[Tensor, "L d"]) -> Float[Tensor, " L"]:
        """L at each of some weight vectors, float64."""
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        norm = torch.zeros_like(total)
        for part in self._weight_parts(len(weights)):
            for inputs, targets in self._stream(part):
                held = self._held_buffers(part)
                contributions, example_weights = self.model.losses(weights[part], held, inputs, targets, shared=True)
                total[part] += contributions.sum(1, dtype=torch.float64)
                norm[part] += example_weights.sum(1, dtype=torch.float64)
        return total / norm if self.model.loss.reduction == "mean" else total

    def stacked_gradients(self, weights: Float[Tensor, "L d"]) -> Float[Tensor, "L d"]:
        """Full gradients at each of some weight vectors. Cost: L full gradients, each pass over the data shared."""
        gradients = torch.zeros_like(weights)
        norm = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        for part in self._weight_parts(len(weights)):
            for inputs, targets in self._stream(part):
                held = self._held_buffers(part)
                _, example_weights, summed, _ = self.model.summed_gradients(
                    weights[part], held, inputs, targets, shared=True
                )
                gradients[part] += summed
                norm[part] += example_weights
        if self.model.loss.reduction == "mean":
            gradients /= norm.to(gradients.dtype)[:, None]
        return gradients

    def minibatch_gradients(self, weights: Float[Tensor, "L d"], indices: Tensor) -> Float[Tensor, "L d"]:
        """Gradients of the minibatch loss, weight vector l on examples indices[l], (L, B)."""
        parts = []
        for part in chunks(len(weights), max(1, self.chunk // indices.shape[1])):
            inputs, targets = self.data.batch(indices[part].to(self.device))
            parts.append(self.model.minibatch_gradients(weights[part], self._held_buffers(part), inputs, targets)[1])
        return torch.cat(parts)

    def example_gradients(self, weights: Weights, *, chunk: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
        """Per-example gradients of the contributions, streamed: (b, d) and example weights (b,), b at most `chunk`.

        For a mean-reduced loss with unit weights these are the per-example gradients whose mean is g(w).
        """
        flat = self.flat(weights)
        for inputs, targets in stream(self.data, chunk):
            yield self.model.example_gradients(flat, self.buffers, inputs, targets)

    def _weight_parts(self, count: int) -> Iterator[slice]:
        return chunks(count, max(8, self.chunk // self.num_examples))

    def _stream(self, part: slice) -> Iterator[tuple[Any, Any]]:
        return stream(self.data, max(1, self.chunk // (part.stop - part.start)))

    def _held_buffers(self, part: slice) -> Buffers:
        return {n: b.expand(part.stop - part.start, *b.shape) for n, b in self.buffers.items()}
