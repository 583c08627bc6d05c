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
from landscape.data.dataset import Examples
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

Piece = tuple[Tensor, Tensor]
"""What is drawn at once, see `Examples.draw`: indices (l, B) and uniform random numbers (l, B, k)."""


class Minibatches:
    """Evaluates a network on the learners' own minibatches, as a configuration says: in parts, in bfloat16, stacked or interleaved.

    Args:
        model: in train mode, on its device.
        data: the training data, there too; augmented, where it is, by numbers that hang on seed, learner and step alone.
        config: accumulation, autocast, channels_last, local_batch_size.
        seeds: one a replica.
        held: the learners of each replica that are held here.
    """

    def __init__(
        self, model: FunctionalModel, data: Examples, config: TrainConfig, seeds: Sequence[int], held: range
    ) -> None:
        self.model, self.data, self.config, self.seeds, self.held = model, data, config, seeds, held
        self.device = data.device
        random = draws_random_numbers(
            model, data
        )  # as dropout does; masks must hang on the learner alone, not on which are batched with it
        large = self.device.type == "cpu" and model.layout.num_parameters > LARGEST_STREAMED_TOGETHER
        alone = not model.batched or random or (large and config.batching == "auto")
        at_once = EXAMPLES_PER_CHUNK.get(self.device.type, 8192) * config.accumulation // config.local_batch_size
        self._chunk = 1 if alone else max(1, at_once)

    def evaluate(self, points: Float[Tensor, "L d"], state: LearnerState, indices: Tensor, take: Take | None = None, *, masks: str = "dropout", following: Tensor | None = None) -> Evaluation:  # fmt: skip
        """Losses, gradients and new buffers at points; gradients go to `take` if there is one.

        A minibatch taken in parts has the same loss, the parts' contributions over the whole minibatch's weight; only batch statistics
        are those of the parts.

        Args:
            points: one a learner held here.
            state: whose buffers and step count.
            indices: (L, B).
            take: see `FunctionalModel.streamed_gradients`.
            masks: names the stream of dropout masks and augmentation; what is independent of the step draws from another.
            following: (L, B) of the step after this, for data that read ahead.
        """
        kept = None
        if (
            take is None and self._chunk == 1
        ):  # straight to their place, not by way of one tensor a parameter and one a learner
            kept = torch.zeros_like(points)
        pieces = list(chunks(len(points), self._chunk))
        then = self._pieces(following, pieces[0], state.step + 1, masks)[0] if following is not None else None
        parts = []
        for i, part in enumerate(pieces):
            after = self._pieces(indices, pieces[i + 1], state.step, masks)[0] if i + 1 < len(pieces) else then
            goes = take if kept is None else into(kept[part.start], self.model.layout)
            parts.append(self._evaluate_chunk(points, state, indices, part, goes, masks, after))
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
        found = [self._losses_chunk(points[part], row, state, indices) for part in chunks(len(points), self._chunk)]
        return torch.cat(found)

    def _evaluate_chunk(self, points: Tensor, state: LearnerState, indices: Tensor, part: slice, take: Take | None, masks: str, after: Piece | None) -> Evaluation:  # fmt: skip
        buffers: Buffers = {name: b[part] for name, b in state.buffers.items()}
        losses, gradients = torch.zeros((), device=self.device), None
        norms = self._norms(indices[part]) if self.config.accumulation > 1 else None
        with self._set_up(part.start, state.step, masks):
            for inputs, targets in self._parts(self._pieces(indices, part, state.step, masks), after):
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
            for batch in self._parts(self._pieces(indices, slice(row, row + 1), state.step, "dropout")):
                inputs, targets = tree_map(lambda t: t[0], batch)
                losses += self.model.losses(points, buffers, inputs, targets, shared=True)[0].sum(1)
        return losses / self._norms(indices[row : row + 1])

    def _norms(self, indices: Tensor) -> Tensor:
        """Summed example weights (l,) of minibatches (l, B), or ones for a sum-reduced loss."""
        if self.model.loss.reduction != "mean":
            return torch.ones(len(indices), device=self.device)
        targets = self.data.targets_at(indices)
        return torch.stack([self.model.loss.weights(y).sum() for y in targets]).to(self.data.dtype)

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

    def _pieces(self, indices: Tensor, rows: slice, step: int, masks: str) -> list[Piece]:
        """What is drawn at once of the minibatches of some learners, one after another: indices (l, B/parts) and random numbers."""
        mine = indices[rows]
        uniforms = torch.empty(*mine.shape, self.data.num_random, dtype=torch.float64)
        purpose = "augmentation" if masks == "dropout" else f"augmentation, {masks}"
        for i in range(len(mine) if self.data.num_random else 0):
            replica, learner = divmod(rows.start + i, len(self.held))
            bits = streams.philox(purpose, self.seeds[replica], self.held[learner], counter=step)
            uniforms[i] = torch.from_numpy(streams.uniform(bits, *uniforms.shape[1:]))
        parts = self.config.accumulation
        return list(zip(mine.chunk(parts, dim=1), uniforms.chunk(parts, dim=1), strict=True))

    def _parts(self, pieces: Sequence[Piece], after: Piece | None = None) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets (l, B/parts, ...) of each piece; meanwhile the data may read the next one."""
        for i, piece in enumerate(pieces):
            inputs, targets = self.data.draw(*piece)
            following = pieces[i + 1] if i + 1 < len(pieces) else after
            if following is not None and self.data.reads_ahead:
                self.data.expect(*following)
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


def draws_random_numbers(model: FunctionalModel, data: Examples) -> bool:
    """Whether the network's forward pass draws from torch's random state, by a layer or by a function."""
    device = data.device

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    weights, buffers = model.initial_weights()
    inputs, _ = data.batch(torch.tensor([0, len(data) - 1], device=device))
    with streams.seeded("probe", 0, device=device), torch.no_grad():
        before = state()
        model.output(weights, clone_buffers(buffers), inputs)
        return not torch.equal(before, state())


def stacks_well(module: nn.Module) -> bool:
    """Whether learners are faster as one batched program than one after another: not with convolutions, which become grouped ones, nor
    with recurrent layers, which have no batched form."""
    return not any(isinstance(m, nn.modules.conv._ConvNd | nn.RNNBase) for m in module.modules())


def channels_last(inputs: Any) -> Any:
    """Stacked images (L, B, C, H, W) with channels innermost in memory; other inputs as they are."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 5:
        return inputs
    return inputs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
