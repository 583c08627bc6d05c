from __future__ import annotations

import pytest
import torch
from torch import nn

from landscape.checkpoints import CheckpointError
from landscape.checkpoints.importers.found import Stored
from landscape.checkpoints.naming import Rename, match


class Network(nn.Module):
    """Statistics, a tied, a frozen and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
        self.scale, self.frozen = nn.Parameter(torch.tensor(2.0)), nn.Linear(4, 2)
        self.last.weight = self.first.weight
        self.frozen.requires_grad_(False)


PARAMETERS = ["scale", "first.weight", "norm.weight", "norm.bias"]
FROZEN = ["frozen.weight", "frozen.bias"]
BUFFERS = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def on_disk(tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    return {n: Stored(t.shape, t.dtype, lambda t=t: t, t.data_ptr() or None) for n, t in tensors.items()}


def file_of(prefix: str = "", **changes: torch.Tensor | None) -> dict[str, Stored]:
    tensors = {prefix + n: t for n, t in Network().state_dict().items()}
    for name, tensor in changes.items():
        old = prefix + name.replace("__", ".")
        if tensor is None:
            del tensors[old]
        else:
            tensors[old] = tensor
    return on_disk(tensors)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_model.", "_model.module.", "net.", "model.backbone.", "learner3.model."]
)  # fmt: skip
def test_wrappers_are_taken_off_to_fit_the_module(prefix: str) -> None:
    names = match(file_of(prefix), Network(), (), "file")
    assert list(names.parameters) == PARAMETERS
    assert list(names.frozen) == FROZEN
    assert list(names.buffers) == BUFFERS
    assert all(
        old == prefix + new for table in (names.parameters, names.frozen, names.buffers) for new, old in table.items()
    )
    assert names.order == tuple(n for n, _ in Network().named_parameters())
    assert names.extra == ()


def test_wrappers_in_the_middle_of_names() -> None:
    tensors = {n.replace("norm.", "norm._checkpoint_wrapped_module."): t for n, t in Network().state_dict().items()}
    names = match(on_disk({f"_fsdp_wrapped_module.{n}": t for n, t in tensors.items()}), Network(), (), "file")
    assert names.parameters["norm.bias"] == "_fsdp_wrapped_module.norm._checkpoint_wrapped_module.bias"


def test_a_module_that_is_really_called_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 2)

    for prefix in ("", "module."):
        names = match(on_disk({prefix + n: t for n, t in Outer().state_dict().items()}), Outer(), (), "file")
        assert names.parameters == {"module.weight": f"{prefix}module.weight", "module.bias": f"{prefix}module.bias"}


def test_a_module_around_what_the_file_holds() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))

    names = match(on_disk(dict(Outer().net.state_dict())), Outer(), (), "file")
    assert names.parameters == {f"net.{n}": n for n in ("0.weight", "0.bias", "2.weight", "2.bias")}


@pytest.mark.parametrize("left", ["first.weight", "last.weight"])
def test_of_tied_tensors_a_file_may_hold_only_one(left: str) -> None:
    other = {"first.weight": "last.weight", "last.weight": "first.weight"}[left]
    names = match(file_of(**{other.replace(".", "__"): None}), Network(), (), "file")
    assert names.parameters["first.weight"] == left


def test_tensors_that_are_tied_in_the_module_must_be_one_in_the_file() -> None:
    with pytest.raises(
        CheckpointError, match=r"last\.weight  is tied to first\.weight in the model, but another tensor"
    ):
        match(file_of(last__weight=torch.ones(4, 4)), Network(), (), "file")


def test_of_several_networks_that_fit_the_user_chooses() -> None:
    both = {f"{prefix}.{n}": t for prefix in ("model", "ema") for n, t in Network().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"several networks that fit, under ema\., model\.; leave out"):
        match(on_disk(both), Network(), (), "file")
    names = match(on_disk(both), Network(), [Rename.parse("ema.*=")], "file")
    assert names.parameters["scale"] == "model.scale"
    bare = {**Network().state_dict(), **{f"ema.{n}": t for n, t in Network().state_dict().items()}}
    assert match(on_disk(bare), Network(), (), "file").parameters["scale"] == "scale"


def test_the_wrapped_module_is_unwrapped() -> None:
    assert match(file_of(), nn.DataParallel(Network()), (), "file").parameters == {n: n for n in PARAMETERS}


def test_the_initialisation_order_of_the_first_names_does_not_matter() -> None:
    names = match(file_of("m.", scale=torch.tensor(1.0), **{"norm__weight": torch.ones(4)}), Network(), (), "file")
    assert names.parameters["scale"] == "m.scale"


# One table of what does not fit ----------------------------------------------------------------------------------------


def test_missing_extra_and_misshaped_tensors_are_told_in_one_table_with_the_closest_names() -> None:
    held = file_of(norm__weight=None, norm__bias=torch.ones(5), norm__gamma=torch.ones(4), unrelated=torch.ones(9))
    with pytest.raises(CheckpointError) as error:
        match(held, Network(), (), "some.pt")
    text = str(error.value)
    assert "some.pt does not fit Network" in text
    assert "norm.weight  [4] is not in the file; closest: norm.gamma [4]" in text
    assert "norm.bias    [4] in the model, [5] in the file" in text
    assert "unrelated" in text
    assert "--map" in text


def test_a_table_does_not_grow_without_bound() -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(200)))
    held = on_disk({f"other{i}": torch.ones(2, 2) for i in range(3000)})
    with pytest.raises(CheckpointError, match="and 380 more") as error:
        match(held, module, (), "file")
    assert len(str(error.value)) < 10_000


def test_what_the_model_lacks_is_left_out_and_told() -> None:
    names = match(file_of(ema=torch.ones(3)), Network(), (), "file")
    assert names.extra == ("ema",)


def test_a_missing_counter_of_batches_is_forgiven() -> None:
    names = match(file_of(norm__num_batches_tracked=None), Network(), (), "file")
    assert list(names.buffers) == BUFFERS[:2]


def test_missing_statistics_are_not() -> None:
    with pytest.raises(CheckpointError, match=r"norm\.running_var"):
        match(file_of(norm__running_var=None), Network(), (), "file")


# Rules -----------------------------------------------------------------------------------------------------------------


def test_rules() -> None:
    held = on_disk(
        {
            "encoder." + n if n.startswith("first") else n: t
            for n, t in Network().state_dict().items()
            if n != "last.weight"
        }
    )
    names = match(
        {**held, "head.x": held["scale"]}, Network(), [Rename.parse("encoder.*=*"), Rename.parse("head.*=")], "file"
    )
    assert names.parameters["first.weight"] == "encoder.first.weight"
    assert names.extra == ()


@pytest.mark.parametrize(
    ("rule", "name", "new"),
    [
        ("a.*=b.*", "a.x.y", "b.x.y"),
        ("*.a.*=*.b.*", "x.a.y", "x.b.y"),
        ("a=b", "a", "b"),
        ("a=b", "ab", None),
        ("a.*=", "a.c", ""),
        ("a+(x)=b", "a+(x)", "b"),
        ("*.gamma=*.weight", "norm.gamma", "norm.weight"),
    ],
)
def test_a_rule(rule: str, name: str, new: str | None) -> None:
    assert Rename.parse(rule).of(name) == new


@pytest.mark.parametrize("text", ["", "=", "=b", "a", "a=*", "a.*=*.*"])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match="rule"):
        Rename.parse(text)


def test_a_rule_that_fits_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"encodr\.\*=x\.\* fits no tensor of file"):
        match(file_of(), Network(), [Rename.parse("encodr.*=x.*")], "file")


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match="would both be called"):
        match(on_disk({"a": torch.ones(1), "_orig_mod.a": torch.ones(1)}), None, (), "file")


# Without a module ------------------------------------------------------------------------------------------------------


def test_without_a_module_statistics_are_known_by_name_and_tied_tensors_by_their_memory() -> None:
    network = Network()
    held = on_disk({f"module.{n}": t for n, t in network.state_dict().items()})
    names = match(held, None, (), "file")
    assert list(names.parameters) == [
        "scale",
        "first.weight",
        "norm.weight",
        "norm.bias",
        "frozen.weight",
        "frozen.bias",
    ]
    assert list(names.buffers) == BUFFERS
    assert names.parameters["scale"] == "module.scale"


def test_a_file_without_weights() -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        match(on_disk({"running_mean": torch.ones(2), "step": torch.tensor(3)}), None, (), "file")
