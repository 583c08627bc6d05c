"""Fresh minibatch gradients at a checkpoint: what one step would have done, many times over (theory.md sec. 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from landscape.data.sampling import IndexSampler
from landscape.objective import Objective

Points = Float[Tensor, "n d"] | Callable[[int], Float[Tensor, "n d"]]
"""Where learners take their gradients: fixed, or a function of the draw (SSGD*'s noise)."""


@dataclass(frozen=True)
class Draws:
    """Learner-averaged minibatch gradients of K independent draws.

    Attributes:
        at_points: (K, d), g_a = (1/n) sum_j grad L^{mu_j}(x_j).
        at_mean: (K, d), (1/n) sum_j grad L^{mu_j}(w_a), the same minibatches.
        num_learners: n.
        local_batch_size: B.
        seed: of the minibatches.
    """

    at_points: Float[Tensor, "K d"]
    at_mean: Float[Tensor, "K d"]
    num_learners: int
    local_batch_size: int
    seed: int


def draw_gradients(
    objective: Objective,
    mean: Float[Tensor, " d"],
    points: Points,
    *,
    num_learners: int,
    local_batch_size: int,
    num_draws: int,
    seed: int = 0,
) -> Draws:
    """Hold the learners fixed and draw K fresh minibatch assignments, independent with replacement.

    Args:
        objective: its data must be such that minibatches can be drawn (not a list of batches).
        mean: w_a.
        points: x_j.
        num_learners: n.
        local_batch_size: B.
        num_draws: K.
        seed: of the minibatches; other streams than training's.

    Cost: 2 n K minibatch gradients; half of that where all points are w_a.
    """
    if local_batch_size < 1 or local_batch_size > objective.num_examples:
        raise ValueError(
            f"local_batch_size must be between 1 and the number of examples ({objective.num_examples}), not {local_batch_size}"
        )
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2 for a standard error, not {num_draws}")
    sampler = IndexSampler([seed], num_learners, local_batch_size, objective.num_examples, purpose="measurement draws")
    mean = mean.to(objective.device, objective.dtype)
    at_points, at_mean = [], []
    for draw in range(num_draws):
        indices = sampler.indices(draw)
        here = (points(draw) if callable(points) else points).to(objective.device, objective.dtype)
        if torch.equal(here, mean.expand_as(here)):
            averaged = objective.minibatch_gradients(here, indices).mean(0)
            at_points.append(averaged)
            at_mean.append(averaged)
            continue
        both = objective.minibatch_gradients(torch.cat([here, mean.expand_as(here)]), torch.cat([indices, indices]))
        first, second = both.chunk(2)
        at_points.append(first.mean(0))
        at_mean.append(second.mean(0))
    return Draws(torch.stack(at_points), torch.stack(at_mean), num_learners, local_batch_size, seed)
