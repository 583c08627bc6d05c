"""The minibatches of a step: losses, gradients and new buffers of the learners held here, a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from landscape import streams
from landscape.data.dataset import TensorData
from landscape.functional import (
    LARGEST_STREAMED_TOGETHER,
    Buffers,
    FunctionalModel,
    ParameterLayout,
    chunks,
    clone_buffers,
)
from landscape.training.algorithms import Evaluation
from landscape.training.communicator import Take
from landscape.training.config import TrainConfig
from landscape.training.state import LearnerState

EXAMPLES_PER_CHUNK = {"cpu": 8192, "cuda": 1 << 17}
"""Examples gathered and differentiated at once: fits the cache of a CPU, fills a GPU."""


class Minibatches:
    """Evaluates a network on the learners' own minibatches, as a configuration says: in parts, in bfloat16, stacked or interleaved.

    Args:
        model: in train mode, on its device.
        data: the training data, there too.
        config: accumulation, autocast, channels_last, local_batch_size.
        seeds: one a replica.
        held: the learners of each replica that are held here.
    """

    def __init__(
        self, model: FunctionalModel, data: TensorData, config: TrainConfig, seeds: Sequence[int], held: range
    ) -> None:
        self.model, self.data, self.config, self.seeds, self.held = model, data, config, seeds, held
        self.device = data.inputs.device
        random = draws_random_numbers(
            model, data
        )  # as dropout does; masks must hang on the learner alone, not on which are batched with it
        large = self.device.type == "cpu" and model.layout.num_parameters > LARGEST_STREAMED_TOGETHER
        alone = not model.batched or random or (large and config.batching == "auto")
        at_once = EXAMPLES_PER_CHUNK.get(self.device.type, 8192) * config.accumulation // config.local_batch_size
        self._chunk = 1 if alone else max(1, at_once)

    def evaluate(self, points: Float[Tensor, "L d"], state: LearnerState, indices: Tensor, take: Take | None = None, *, masks: str = "dropout") -> Evaluation:  # fmt: skip
        """Losses, gradients and new buffers at points; gradients go to `take` if there is one.

        A minibatch taken in parts has the same loss, the parts' contributions over the whole minibatch's weight; only batch statistics
        are those of the parts.

        Args:
            points: one a learner held here.
            state: whose buffers and step count.
            indices: (L, B).
            take: see `FunctionalModel.streamed_gradients`.
            masks: names the stream of dropout masks; what is independent of the step draws from another.
        """
        kept = None
        if (
            take is None and self._chunk == 1
        ):  # straight to their place, not by way of one tensor a parameter and one a learner
            kept = torch.zeros_like(points)
        parts = [
            self._evaluate_chunk(points, state, indices, part, take if kept is None else into(kept[part.start], self.model.layout), masks)
            for part in chunks(len(points), self._chunk)
        ]  # fmt: skip
        if len(parts) == 1:
            return parts[0] if kept is None else replace(parts[0], gradients=kept)
        gradients = [p.gradients for p in parts if p.gradients is not None]
        return Evaluation(
            torch.cat([p.losses for p in parts]),
            torch.cat(gradients) if gradients else kept,
            {name: torch.cat([p.buffers[name] for p in parts]) for name in state.buffers},
        )

    def losses(self, points: Float[Tensor, "P d"], row: int, state: LearnerState, indices: Tensor) -> Float[Tensor, " P"]:  # fmt: skip
        """Losses of one learner's minibatch at points, as `evaluate` takes them: its buffers, its dropout masks.

        Args:
            points: any weight vectors.
            row: of the learner, among those held here.
            state: whose buffers and step count.
            indices: (L, B), of all learners held here.
        """
        found = [
            self._losses_chunk(points[part], row, state, indices[row]) for part in chunks(len(points), self._chunk)
        ]
        return torch.cat(found)

    def _evaluate_chunk(self, points: Tensor, state: LearnerState, indices: Tensor, part: slice, take: Take | None, masks: str) -> Evaluation:  # fmt: skip
        buffers: Buffers = {name: b[part] for name, b in state.buffers.items()}
        losses, gradients = torch.zeros((), device=self.device), None
        norms = self._norms(indices[part]) if self.config.accumulation > 1 else None
        with self._set_up(part.start, state.step, masks):
            for inputs, targets in self._parts(indices[part]):
                if take is not None:
                    found, buffers = self.model.streamed_gradients(points[part], buffers, inputs, targets, take, norms)
                elif norms is None:
                    found, gradients, buffers = self.model.minibatch_gradients(points[part], buffers, inputs, targets)
                else:
                    found, _, more, buffers = self.model.summed_gradients(points[part], buffers, inputs, targets)
                    found, more = found / norms, more / norms[:, None]
                    gradients = more if gradients is None else gradients.add_(more)
                losses = losses + found
        return Evaluation(losses, gradients, buffers)

    def _losses_chunk(self, points: Tensor, row: int, state: LearnerState, indices: Tensor) -> Tensor:
        buffers = {name: b[row].expand(len(points), *b.shape[1:]) for name, b in state.buffers.items()}
        losses = torch.zeros(len(points), dtype=points.dtype, device=self.device)
        with self._set_up(row, state.step, "dropout"):
            for batch in self._parts(indices[None]):
                inputs, targets = tree_map(lambda t: t[0], batch)
                losses += self.model.losses(points, buffers, inputs, targets, shared=True)[0].sum(1)
        return losses / self._norms(indices[None])

    def _norms(self, indices: Tensor) -> Tensor:
        """Summed example weights (l,) of minibatches (l, B), or ones for a sum-reduced loss."""
        if self.model.loss.reduction != "mean":
            return torch.ones(len(indices), device=self.device)
        targets = self.data.batch(indices)[1]
        return torch.stack([self.model.loss.weights(y).sum() for y in targets]).to(self.data.inputs.dtype)

    @contextmanager
    def _set_up(self, row: int, step: int, masks: str) -> Iterator[None]:
        """Within, dropout draws the masks of the learner in a row, and autocast is as configured, keeping no casts from part to part."""
        replica, learner = divmod(row, len(self.held))
        with (
            streams.seeded(masks, self.seeds[replica], self.held[learner], step, device=self.device),
            torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.config.autocast == "bf16", cache_enabled=False
            ),
        ):
            yield

    def _parts(self, indices: Tensor) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets (l, B/parts, ...) of minibatches (l, B), a part at a time."""
        for few in indices.chunk(self.config.accumulation, dim=1):
            inputs, targets = self.data.batch(few)
            yield (channels_last(inputs) if self.config.channels_last else inputs), targets


def into(row: Float[Tensor, " d"], layout: ParameterLayout) -> Take:
    """What puts streamed gradients of one learner into a flat vector of zeros; those that come again are added."""
    places, filled = layout.split(row), set[str]()

    def take(name: str, gradients: Tensor) -> None:
        if name in filled:
            places[name].add_(gradients[0])
        else:
            places[name].copy_(gradients[0])
        filled.add(name)

    return take


def draws_random_numbers(model: FunctionalModel, data: TensorData) -> bool:
    """Whether the network's forward pass draws from torch's random state, by a layer or by a function."""
    device = data.inputs.device

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    weights, buffers = model.initial_weights()
    inputs, _ = data.batch(torch.tensor([0, len(data) - 1], device=device))
    with streams.seeded("probe", 0, device=device), torch.no_grad():
        before = state()
        model.output(weights, clone_buffers(buffers), inputs)
        return not torch.equal(before, state())


def stacks_well(module: nn.Module) -> bool:
    """Whether learners are faster as one batched program than one after another: not with convolutions, which become grouped ones."""
    return not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())


def channels_last(inputs: Any) -> Any:
    """Stacked images (L, B, C, H, W) with channels innermost in memory; other inputs as they are."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 5:
        return inputs
    return inputs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
