"""A fixed choice of examples is a data set of its own."""

from __future__ import annotations

import pytest
import torch

from landscape.data import TensorData, choose
from landscape.data.selection import Selection


def data(count: int = 50) -> TensorData:
    return TensorData(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count), "numbers")


def test_a_choice_is_the_same_whenever_it_is_made() -> None:
    first, second = choose(data(), 20), choose(data(), 20)
    assert len(first) == 20
    assert first.name == "numbers, 20 of 50 examples"
    inputs, targets = first.rows(slice(0, 20))
    assert torch.equal(inputs[:, 0].long(), targets)
    assert len(set(targets.tolist())) == 20
    assert torch.equal(targets, second.rows(slice(0, 20))[1])
    assert first.fingerprint() == second.fingerprint() != data().fingerprint()
    assert choose(data(), 19).fingerprint() != first.fingerprint()


def test_examples_of_a_choice_are_those_of_the_whole() -> None:
    chosen = choose(data(), 20)
    assert isinstance(chosen, Selection)
    indices = torch.tensor([[3, 0], [19, 3]])
    expected = chosen.numbers[indices]
    assert torch.equal(chosen.batch(indices)[1], expected)
    assert torch.equal(chosen.targets_at(indices), expected)
    assert torch.equal(chosen.draw(indices, torch.empty(2, 2, 0, dtype=torch.float64))[1], expected)
    assert chosen.to("cpu", torch.float64).batch(indices)[0].dtype == torch.float64
    assert (chosen.dtype, chosen.device.type, chosen.num_random, chosen.reads_ahead) == (torch.float32, "cpu", 0, False)


def test_a_choice_of_a_choice_is_one_choice() -> None:
    once = choose(data(), 20)
    twice = choose(once, 5)
    assert isinstance(twice, Selection)
    assert isinstance(twice.whole, TensorData)
    assert set(twice.numbers.tolist()) <= set(once.numbers.tolist())  # type: ignore[attr-defined]


def test_all_and_none() -> None:
    whole = data()
    assert choose(whole, 50) is whole
    assert choose(whole, 51) is whole
    with pytest.raises(ValueError, match="at least 1 example must be chosen, not 0"):
        choose(whole, 0)


def test_choices_are_uniform() -> None:
    """Over nested choices of 1,000 of 4,000: the mean number lies within four standard errors of the middle."""
    numbers = choose(data(4000), 1000).rows(slice(0, 1000))[1].double()
    error = 4000 / 12**0.5 / 1000**0.5 * (1 - 1000 / 4000) ** 0.5
    assert abs(float(numbers.mean()) - 1999.5) < 4 * error
