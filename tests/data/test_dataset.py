from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from landscape.data.dataset import BatchList, IndexedData, MapData, TensorData, as_data, name_bad_data, stream

INPUTS = torch.arange(24, dtype=torch.float64).view(6, 2, 2)
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


class Examples(Dataset):
    """A map-style data set; its inputs are float64, as numpy would give them."""

    def __init__(self, targets: Tensor = TARGETS) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return INPUTS[index], self.targets[index].item()


@pytest.mark.parametrize("data", [TensorData(INPUTS, TARGETS), MapData(Examples())], ids=["tensors", "map-style"])
@pytest.mark.parametrize(
    "indices", [torch.tensor([3, 0, 3]), torch.tensor([[5, 1], [1, 1], [0, 2]]), torch.tensor([[[4]]])]
)
def test_batches_have_the_shape_of_their_indices(data: IndexedData, indices: Tensor) -> None:
    assert isinstance(data, IndexedData)
    inputs, targets = data.batch(indices)
    assert torch.equal(inputs, INPUTS[indices])
    assert torch.equal(targets, TARGETS[indices])


def test_rows_are_views() -> None:
    inputs, targets = TensorData(INPUTS, TARGETS).rows(slice(2, 5))
    assert torch.equal(targets, TARGETS[2:5])
    assert inputs.data_ptr() == INPUTS[2].data_ptr()


def test_to_converts_floating_point_only_and_leaves_the_original() -> None:
    data = TensorData(INPUTS, TARGETS, "six")
    single = data.to("cpu", torch.float32)
    assert (single.inputs.dtype, single.targets.dtype, single.name) == (torch.float32, torch.int64, "six")
    assert data.inputs.dtype == torch.float64
    assert TensorData(INPUTS, INPUTS).to("cpu", torch.float32).targets.dtype == torch.float32
    assert data.to("cpu").inputs.dtype == torch.float64


def test_the_fingerprint_is_of_the_numbers() -> None:
    print_ = TensorData(INPUTS, TARGETS).fingerprint()
    assert print_ == TensorData(INPUTS.clone(), TARGETS.clone(), "other name").fingerprint()
    assert print_ == TensorData(INPUTS.flip(0).flip(0), TARGETS).fingerprint()
    changed = INPUTS.clone()
    changed[5, 1, 1] += 1e-12
    others = [TensorData(changed, TARGETS), TensorData(INPUTS, TARGETS.flip(0)), TensorData(INPUTS.float(), TARGETS),
              TensorData(INPUTS.view(6, 4), TARGETS), TensorData(INPUTS[:5], TARGETS[:5])]  # fmt: skip
    assert len({print_, *(o.fingerprint() for o in others)}) == 1 + len(others)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="six: 6 inputs, but 5 targets"):
        TensorData(INPUTS, TARGETS[:5], "six")
    with pytest.raises(ValueError, match="six: no examples"):
        TensorData(INPUTS[:0], TARGETS[:0], "six")


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_streaming_gives_every_example_once_in_order(chunk: int) -> None:
    ready = [(INPUTS[:1], TARGETS[:1]), (INPUTS[1:], TARGETS[1:])]
    for data in (TensorData(INPUTS, TARGETS), MapData(Examples()), BatchList(ready)):
        assert len(data) == 6
        parts = list(stream(data, chunk))
        assert torch.equal(torch.cat([x for x, _ in parts]), INPUTS)
        assert torch.equal(torch.cat([y for _, y in parts]), TARGETS)
        assert isinstance(data, BatchList) or max(len(y) for _, y in parts) <= chunk


def test_consecutive_parts_make_the_whole_and_may_be_empty() -> None:
    ready = [(INPUTS[:1], TARGETS[:1]), (INPUTS[1:4], TARGETS[1:4]), (INPUTS[4:], TARGETS[4:])]
    for data, count in ((TensorData(INPUTS, TARGETS), 6), (MapData(Examples()), 6), (BatchList(ready), 3)):
        parts = [x for part in (range(2), range(2, 2), range(2, count)) for x, _ in stream(data, 4, part)]
        assert torch.equal(torch.cat(parts), INPUTS)


def test_bad_data_are_numbered_among_all_whatever_part_is_looked_at() -> None:
    bad = INPUTS.clone()
    bad[3, 0, 1] = torch.inf
    listed = BatchList([(bad[:2], TARGETS[:2]), (bad[2:], TARGETS[2:])])
    whole = r"1 example\(s\) of batch 1 \(examples 2 to 3\), the first of them example 3$"
    for data, part, said in (
        (TensorData(bad, TARGETS), range(6), whole),
        (TensorData(bad, TARGETS), range(3, 6), r"of batch 1 \(examples 3 to 3\), the first of them example 3$"),
        (listed, range(1, 2), r"of batch 1 \(examples 2 to 5\), the first of them example 3$"),
    ):
        with pytest.raises(ValueError, match=said):
            name_bad_data(data, 2, part)
    name_bad_data(TensorData(bad, TARGETS), 2, range(3))
    name_bad_data(listed, 2, range(1))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (TensorData(INPUTS, TARGETS), TensorData),
        ((INPUTS, TARGETS), TensorData),
        (TensorDataset(INPUTS, TARGETS), TensorData),
        (Examples(), MapData),
        ([(INPUTS[:4], TARGETS[:4]), (INPUTS[4:], TARGETS[4:])], BatchList),
        ([[INPUTS, TARGETS]], BatchList),
    ],
)
def test_what_users_hand_over_is_taken_in_the_type_of_the_computation(given: Any, kind: type) -> None:
    data = as_data(given, "cpu", torch.float32)
    assert isinstance(data, kind)
    parts = list(stream(data, 4))
    assert torch.equal(torch.cat([x for x, _ in parts]), INPUTS.float())
    assert torch.equal(torch.cat([y for _, y in parts]), TARGETS)
    assert as_data(data, "cpu", torch.float32) is data or isinstance(data, TensorData)


def test_floating_point_targets_of_a_map_style_set_are_converted_too() -> None:
    data = as_data(Examples(targets=TARGETS.double() / 3), "cpu", torch.float32)
    targets = data.batch(torch.arange(6))[1]
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, TARGETS.float() / 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (iter([(INPUTS, TARGETS)]), "iterator, which can be read only once"),
        (7, "data of type int is not a data set"),
    ],
)
def test_what_is_no_data_is_refused_with_advice(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_data(given, "cpu", torch.float32)


def test_a_list_of_batches_cannot_be_drawn_from_or_empty() -> None:
    with pytest.raises(
        ValueError, match=r"cannot be drawn from a list of batches; give a map-style data set or tensors"
    ):
        BatchList([(INPUTS, TARGETS)]).batch(torch.tensor([0]))
    with pytest.raises(ValueError, match="the list of batches is empty"):
        BatchList([])
