from __future__ import annotations

import math

import pytest
import torch

from landscape.data.sampling import BLOCK, IndexSampler


def draw(
    seeds: tuple[int, ...], steps: list[int], num_learners: int = 3, batch: int = 5, examples: int = 11
) -> torch.Tensor:
    """Indices (steps, R n, B)."""
    sampler = IndexSampler(seeds, num_learners, batch, examples)
    return torch.stack([sampler.indices(step) for step in steps])


def test_indices_are_a_pure_function_of_seed_learner_and_step() -> None:
    in_order = draw((4,), list(range(3 * BLOCK)))
    visited = [2 * BLOCK + 1, 0, 5, BLOCK, 3 * BLOCK - 1, 0]  # what a resumed run, or a replay, asks for
    assert torch.equal(draw((4,), visited), in_order[visited])


def test_the_learners_of_a_larger_run_include_those_of_a_smaller_one() -> None:
    """So a rank that holds some of the learners draws what the whole run would."""
    assert torch.equal(draw((4,), [0, 7], num_learners=6)[:, :3], draw((4,), [0, 7], num_learners=3))


def test_replicas_of_equal_seed_draw_the_same_and_lie_replica_major() -> None:
    stacked = draw((4, 9, 4), [3]).unflatten(1, (3, 3))
    assert torch.equal(stacked[:, 0], stacked[:, 2])
    assert torch.equal(stacked[:, 1], draw((9,), [3]))


def test_seeds_learners_and_steps_all_matter() -> None:
    rows = draw((0, 1), list(range(2 * BLOCK)), batch=20, examples=10**6).flatten(0, 1)
    assert len({tuple(r.tolist()) for r in rows}) == len(rows)


def test_another_purpose_draws_other_indices() -> None:
    training, measuring = IndexSampler((0,), 2, 50, 1000), IndexSampler((0,), 2, 50, 1000, purpose="noise draws")
    assert not torch.equal(training.indices(0), measuring.indices(0))


@pytest.mark.parametrize("examples", [1, 2, 7, 60000])
def test_indices_are_int64_in_range_and_of_the_right_shape(examples: int) -> None:
    found = draw((0,), [0, 1], examples=examples)
    assert found.shape == (2, 3, 5)
    assert found.dtype == torch.int64
    assert found.min() >= 0
    assert found.max() < examples


def test_draws_are_uniform_with_replacement() -> None:
    steps, n, batch, examples = 64, 3, 50, 10
    found = draw((1,), list(range(steps)), n, batch, examples)
    counts = torch.bincount(found.flatten(), minlength=examples)
    total, p = found.numel(), 1 / examples
    assert (counts - total * p).abs().max() < 4 * math.sqrt(total * p * (1 - p))
    # with replacement, two draws of a batch agree with probability 1/N
    pairs = found[..., 0::2] == found[..., 1::2]
    assert abs(pairs.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / pairs.numel())
    # and so do the same places of two learners
    across = found[:, 0] == found[:, 1]
    assert abs(across.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / across.numel())
