"""Losses and accuracies of stacked weights over a whole data set, and BatchNorm statistics for averaged ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from landscape import streams
from landscape.data.dataset import Examples
from landscape.functional import Buffers, FunctionalModel, chunks, measured_norms
from landscape.ranks import Ranks


def evaluate(
    model: FunctionalModel,
    weights: Float[Tensor, "L d"],
    buffers: Buffers,
    data: Examples,
    *,
    chunk: int | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of each weight vector on all of `data`.

    Args:
        model: in the mode to evaluate in.
        weights: stacked flat weights.
        buffers: stacked buffers {name: (L, ...)}.
        data: on the model's device.
        chunk: examples at once; by default what keeps their inputs below 16 million bytes of float32, between 16 and 4096.
        ranks: processes that hold the same weights and data, and evaluate a share of the examples each.

    Returns:
        losses (L,), float64; and accuracies (L,), float64, the share of targets (of all positions of a sequence that are not ignored) that
        have the highest score; nan where outputs and targets are not classes.
    """
    total, norm, correct, counted = torch.zeros(4, len(weights), dtype=torch.float64, device=weights.device)
    share = range(len(data)) if ranks is None else ranks.share(len(data))
    chunk = _chunk(data) if chunk is None else chunk
    for part in chunks(len(weights), 8):
        held = {n: b[part] for n, b in buffers.items()}
        for rows in chunks(len(share), chunk):
            inputs, targets = data.rows(slice(share.start + rows.start, share.start + rows.stop))
            outputs = model.outputs(weights[part], held, inputs, shared=True)
            for j, output in enumerate(outputs, start=part.start):  # a loss need not have a batching rule
                contributions, example_weights = model.loss(output, targets)
                total[j] += contributions.sum(dtype=torch.float64)
                norm[j] += example_weights.sum(dtype=torch.float64)
            if not targets.is_floating_point() and outputs.shape[1:-1] == targets.shape:
                correct[part] += (outputs.argmax(-1) == targets).flatten(1).sum(1)
                counted[part] += (targets != IGNORED).sum()
    if ranks is not None and ranks.size > 1:
        torch.distributed.all_reduce(sums := torch.stack([total, norm, correct, counted]))
        total, norm, correct, counted = sums
    return total / norm if model.loss.reduction == "mean" else total, correct / counted  # 0/0 is nan


IGNORED = -100
"""torch's target that does not count."""


def _chunk(data: Examples) -> int:
    inputs, _ = data.rows(slice(0, 1))
    return min(4096, max(16, (1 << 22) // max(1, inputs.numel())))


RECALIBRATION_EXAMPLES, RECALIBRATION_BATCH = 2048, 256
"""At most so many examples, and at once."""


def recalibrated(
    model: FunctionalModel, weights: Float[Tensor, "R d"], buffers: Buffers, data: Examples, seeds: Sequence[int]
) -> Buffers:
    """Buffers with BatchNorm's running statistics measured anew at `weights`: the average over batches of 2,048 training examples, or of
    all where there are no more.

    An average of learners has no statistics of its own, and the average of theirs is not its own (theory.md sec. 1). This is for losses
    that are logged; `Objective.recalibrated`, which measures use, takes all the examples.

    Args:
        model: in any mode; dropout is off.
        weights: R weight vectors.
        buffers: {name: (R, ...)}; what is no statistic stays.
        data: the training data, or the part of them that losses are taken over.
        seeds: of the choice of examples, one a weight vector, the same at every step.
    """
    if not measured_norms(model.module):
        return buffers
    trained = model.of(copy.deepcopy(model.module).eval())
    norms = measured_norms(trained.module)
    for norm in norms:
        norm.train()
    held = []
    with torch.no_grad():
        for r, seed in enumerate(seeds):
            indices = torch.arange(len(data))
            if len(data) > RECALIBRATION_EXAMPLES:
                uniform = streams.uniform(streams.philox("recalibration", seed), RECALIBRATION_EXAMPLES)
                indices = torch.from_numpy((uniform * len(data)).astype("int64"))
            parts = indices.to(weights.device).tensor_split(math.ceil(len(indices) / min(RECALIBRATION_BATCH, _chunk(data))))  # fmt: skip
            mine = {name: b[r].clone() for name, b in buffers.items()}
            for k, part in enumerate(parts):
                for norm in norms:
                    norm.momentum = 1 / (k + 1)
                trained.output(weights[r], mine, data.batch(part)[0])
            held.append(mine)
    return {name: torch.stack([b[name] for b in held]) if b.is_floating_point() else b for name, b in buffers.items()}
