"""Fresh minibatch gradients at a checkpoint: what one step would have done, many times over (theory.md sec. 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from landscape import streams
from landscape.data.sampling import IndexSampler
from landscape.noise.rows import Rows
from landscape.objective import Objective
from landscape.objective.peers import ALONE, Peers
from landscape.training.algorithms import gradient_points

if TYPE_CHECKING:
    from landscape.checkpoints import Learners

Points = Float[Tensor, "n d"] | Callable[[int], Float[Tensor, "n d"]]
"""Where learners take their gradients: fixed, or a function of the draw (SSGD*'s noise)."""


@dataclass(frozen=True)
class Draws:
    """Learner-averaged minibatch gradients of K independent draws.

    Attributes:
        point_rows: (K, d), g_a = (1/n) sum_j grad L^{mu_j}(x_j).
        mean_rows: (K, d), (1/n) sum_j grad L^{mu_j}(w_a), the same minibatches; the same object where every x_j is w_a.
        num_learners: n.
        local_batch_size: B.
        seed: of the minibatches.
        peers: the ranks that all hold these draws.
    """

    point_rows: Rows
    mean_rows: Rows
    num_learners: int
    local_batch_size: int
    seed: int
    peers: Peers = ALONE

    def __len__(self) -> int:
        return len(self.point_rows)

    @property
    def at_points(self) -> Float[Tensor, "K d"]:
        """g_a of every draw, in memory."""
        return self.point_rows.tensor()

    @property
    def at_mean(self) -> Float[Tensor, "K d"]:
        """The same at w_a, in memory."""
        return self.mean_rows.tensor()

    @cached_property
    def landscape_rows(self) -> Rows:
        """xi_D of every draw, (K, d): in memory where the gradients are, in a file where they are."""
        shape = self.point_rows.shape
        made = Rows(shape, self.point_rows.get(slice(0, 1)), 0 if self.point_rows.spilled else None)
        for k in range(len(self)):
            part = slice(k, k + 1)
            made.put(k, self.point_rows.get(part) - self.mean_rows.get(part))
        return made

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(g_a, the same at w_a) of each draw, (d,) each."""
        return self.some(range(len(self)))

    def some(self, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of the draws of these numbers."""
        for k in numbers:
            part = slice(k, k + 1)
            yield self.point_rows.get(part)[0], self.mean_rows.get(part)[0]


def draw_gradients(
    objective: Objective,
    mean: Float[Tensor, " d"],
    points: Points,
    *,
    num_learners: int,
    local_batch_size: int,
    num_draws: int,
    seed: int = 0,
    memory_budget: int | None = None,
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
        memory_budget: bytes for the 2 K d numbers of the result; what is beyond lies in a scratch file.

    Cost: 2 n K minibatch gradients, those at w_a n at a time; half of that where all points are w_a. Ranks that share the data take K/ranks of
    the draws each, and hand each other the results, so that every one has all of them.
    """
    objective.needs_all_data()
    if local_batch_size < 1 or local_batch_size > objective.num_examples:
        raise ValueError(
            f"local_batch_size must be between 1 and the number of examples ({objective.num_examples}), not {local_batch_size}"
        )
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2 for a standard error, not {num_draws}")
    sampler = IndexSampler([seed], num_learners, local_batch_size, objective.num_examples, purpose="measurement draws")
    mean = mean.to(objective.device, objective.dtype)
    fixed = None if callable(points) else points.to(mean)
    at_mean = fixed is not None and torch.equal(fixed, mean.expand_as(fixed))
    shape, share = (num_draws, len(mean)), None if memory_budget is None else memory_budget // (1 if at_mean else 2)
    mean_rows = Rows(shape, mean, share)
    point_rows = mean_rows if at_mean else Rows(shape, mean, share)
    size = max(1, objective.chunk // (num_learners * local_batch_size))  # draws that fill one batched pass
    size = min(size, max(1, objective.memory_budget // (4 * len(mean) * mean.dtype.itemsize)))
    own = objective.peers.share(num_draws)
    with objective.peers.agree():
        for start in range(own.start, own.stop, size):
            some = range(start, min(start + size, own.stop))
            indices = torch.stack([sampler.indices(draw) for draw in some])
            mean_rows.put(start, objective.averaged_gradients(mean, indices))
            if at_mean:
                continue
            here = torch.stack([points(draw).to(mean) for draw in some]) if callable(points) else fixed
            assert here is not None
            point_rows.put(start, objective.averaged_gradients(here, indices))
    for rows in (mean_rows,) if at_mean else (mean_rows, point_rows):
        rows.hand_round(objective.peers)
    return Draws(point_rows, mean_rows, num_learners, local_batch_size, seed, objective.peers)


def points_of(learners: Learners, seed: int = 0) -> Points:
    """Where the step that follows a checkpoint takes its gradients, as its facts tell: w_j, (M w)_j under CTA, w_a + noise for SSGD*.

    Args:
        learners: their facts may hold algorithm, order, mixing (M of that step) and sigma0 (SSGD*'s noise level).
        seed: of SSGD*'s noise, drawn anew for every draw.

    Raises:
        ValueError: a run under CTA or SSGD* whose checkpoint does not say what M or sigma_0 is.
    """
    facts = learners.facts
    algorithm, order = facts.get("algorithm"), facts.get("order", "awc")
    if algorithm == "dpsgd" and order == "cta":
        if "mixing" not in facts:
            raise ValueError(
                "under CTA gradients are taken at M w, and this checkpoint does not record M; give points=M @ learners.weights"
            )
        return gradient_points(algorithm, order, learners.weights, torch.tensor(facts["mixing"], dtype=torch.float64))
    if algorithm == "ssgd-star":
        if "sigma0" not in facts:
            raise ValueError(
                "SSGD* takes gradients at w_a + noise, and this checkpoint does not record the noise level; give "
                "points=weight_noise_points(learners, sigma0)"
            )
        return weight_noise_points(learners, float(facts["sigma0"]), seed)
    return learners.weights


def weight_noise_points(learners: Learners, sigma: float | int, seed: int = 0) -> Points:
    """SSGD*'s gradient points, w_j + zeta_j with zeta_j ~ N(0, sigma^2 I), drawn anew for every draw; w_j itself for sigma = 0."""
    weights = learners.weights
    if not sigma:
        return weights

    def points(draw: int) -> Tensor:
        generator = streams.torch_generator("measured weight noise", seed, learners.step, draw)
        return weights + (torch.randn(weights.shape, generator=generator) * sigma).to(weights)

    return points
