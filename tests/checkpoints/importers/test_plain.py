"""One file of torch.save: what is in it, whose weights these are, and what is left out."""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from landscape.checkpoints.find import find_one
from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import plain
from landscape.checkpoints.importers.found import Found
from landscape.checkpoints.importers.torch_optimizer import optimizer_state
from tests.checkpoints.importers.fixtures_torch import (
    Network,
    Untied,
    assert_same,
    expected,
    expected_slot,
    legacy,
    said,
    spoilt,
    trained,
    written,
)


def found(content: Any, folder: Path, name: str = "a.pt") -> Found:
    torch.save(content, folder / name)
    result = plain.find(folder / name)
    assert result is not None
    return result


def test_ddp_s_checkpoint_is_one_model() -> None:
    read = plain.find(written() / "ddp.pt")
    assert read is not None
    assert_same(read.models[0].tensors, expected("ddp"), "module.")
    assert (read.kind, read.step, read.format) == ("one model", 4, "torch.save")
    assert read.facts == {"epoch": 1, "batch_size": 8, "num_learners": 2}
    assert (
        "names begin with module., which DistributedDataParallel puts there, whose processes all have the same weights, to rounding"
        in said(read)
    )
    assert "not whether that is one process's or the total" in said(read)
    tensors = read.models[0].tensors
    assert tensors["module.first.weight"].alias == tensors["module.second.weight"].alias
    optimizer = read.models[0].optimizer
    assert optimizer is not None
    assert optimizer.facts == {
        "learning_rate": 0.1,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 1e-4,
        "nesterov": True,
    }
    unique = [name for name, _ in Network().named_parameters()]
    held = expected_slot("ddp", "momentum_buffer")
    assert_same(optimizer.slots["momentum_buffer"], {i: held[name] for i, name in enumerate(unique)})


def test_a_compiled_network_keeps_its_names() -> None:
    read = plain.find(written() / "compiled.pt")
    assert read is not None
    assert_same(read.models[0].tensors, expected("ddp"), "_orig_mod.module.")
    assert "compiled (_orig_mod.), which changes names only" in said(read)
    assert "DistributedDataParallel" in said(read)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_with_a_rank_in_its_name_says_so(rank: int) -> None:
    read = plain.find(written() / "ddp-ranks" / f"model_rank{rank}.pt")
    assert read is not None
    assert f"by its name it is what rank {rank} saved" in said(read)


CONTAINERS = ["model", "model_state_dict", "state_dict", "net", "network", "weights", "params", "module", "my_own_name"]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("old", [False, True])
def test_the_network_is_found_in_its_container(tmp_path: Path, container: str, old: bool) -> None:
    state = Untied().state_dict()
    path = (legacy if old else lambda c, p: torch.save(c, p))(
        {container: state, "best_acc": torch.tensor(0.5), "epoch": 3}, tmp_path / "a.pt"
    )
    read = plain.find(path or tmp_path / "a.pt")
    assert read is not None
    assert_same(read.models[0].tensors, state)
    assert (read.step, read.facts) == (None, {"epoch": 3})


@pytest.mark.parametrize("old", [False, True])
def test_a_bare_state_dict_is_read(tmp_path: Path, old: bool) -> None:
    state = Untied().state_dict()
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    read = plain.find(tmp_path / "a.pt")
    assert read is not None
    assert_same(read.models[0].tensors, state)
    assert (read.kind, read.step, read.facts, read.notes) == ("one model", None, {}, ())
    assert "whether others trained with it, and had the same weights, is not recorded" in said(read)


def test_a_network_in_two_containers_is_found(tmp_path: Path) -> None:
    state = Untied().state_dict()
    assert_same(found({"model": {"state_dict": state}, "step": 3}, tmp_path).models[0].tensors, state)


def test_names_that_look_like_containers_are_a_network_s_own(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.weights, self.net = (
                nn.Linear(2, 2),
                nn.Parameter(torch.ones(3)),
                nn.Parameter(torch.tensor(2.0)),
            )

    state = Odd().state_dict()
    assert_same(found(state, tmp_path).models[0].tensors, state)
    assert_same(found({"step": torch.tensor(1.0)}, tmp_path).models[0].tensors, {"step": torch.tensor(1.0)})


def test_adam_s_moments_and_its_count_of_steps_are_read(tmp_path: Path) -> None:
    module, optimizer = trained()
    read = found({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    state = read.models[0].optimizer
    assert state is not None
    for slot in ("exp_avg", "exp_avg_sq"):
        assert_same(state.slots[slot], {i: optimizer.state[p][slot] for i, p in enumerate(module.parameters())})
    assert state.facts == {
        "learning_rate": 0.01,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "optimizer_step": 4,
    }
    assert read.step is None
    read = find_one([tmp_path])
    assert read.step == 4
    assert "its step is the optimizer's count of its own" in said(read)


@pytest.mark.parametrize(
    "place",
    [
        lambda s: {"opt_sgd": s},
        lambda s: {"optimiser": s},
        lambda s: {"optim": {"sgd": s}},
        lambda s: {"training": {"adam": s, "epoch": 1}},
        lambda s: {"solvers": [s]},
        lambda s: {"opt_a": s, "opt_b": s},
    ],
)
def test_an_optimizer_is_known_by_its_shape_wherever_it_is(tmp_path: Path, place: Any) -> None:
    module, optimizer = trained()
    read = found({"model": module.state_dict(), **place(optimizer.state_dict())}, tmp_path)
    state = read.models[0].optimizer
    assert state is not None
    assert_same(state.slots["exp_avg"], {i: optimizer.state[p]["exp_avg"] for i, p in enumerate(module.parameters())})
    assert state.facts["learning_rate"] == 0.01
    assert "was taken for the optimizer's state, by its shape" in said(read)


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"opt": {"g": trained()[1].state_dict(), "d": trained()[1].state_dict()}}, r"2 optimizers was left out \(opt\.g, opt\.d\)"),
        ({"my_optim": {"velocity": [1.0]}}, "what is under my_optim was not read: it is no state_dict of an optimizer"),
        ({"optimizer": {"state": {}, "param_groups": 5}}, "what is under optimizer was not read"),
    ],
)  # fmt: skip
def test_an_optimizer_that_is_not_read_is_noted(tmp_path: Path, more: dict[str, Any], note: str) -> None:
    read = found({"model": trained()[0].state_dict(), **more}, tmp_path)
    assert read.models[0].optimizer is None
    assert re.search(note, said(read))


def named(module: nn.Module, *, prefix: str = "", groups: int = 1) -> torch.optim.Optimizer:
    pairs = [(f"{prefix}{name}", parameter) for name, parameter in module.named_parameters()]
    cut = len(pairs) // groups
    return torch.optim.Adam([{"params": pairs[i * cut : (i + 1) * cut], "lr": 0.1 / (i + 1)} for i in range(groups)])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_groups_that_name_their_parameters_are_read_by_name(tmp_path: Path, prefix: str) -> None:
    module, optimizer = trained(make=lambda _: torch.optim.SGD([torch.zeros(1)]))
    optimizer = named(module, prefix=prefix, groups=2)
    module(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    read = found(
        {"model": {f"module.{n}": t for n, t in module.state_dict().items()}, "optimizer": optimizer.state_dict()},
        tmp_path,
    )
    state = read.models[0].optimizer
    assert state is not None
    saved = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in module.named_parameters()}
    assert_same(state.slots["exp_avg"], saved, "module.")
    assert "learning_rate" not in state.facts
    assert "groups of parameters differ in learning_rate, which was left out" in said(read)


def test_several_groups_without_names_are_left_out(tmp_path: Path) -> None:
    module, _ = trained()
    first, *rest = module.parameters()
    optimizer = torch.optim.Adam([{"params": [first]}, {"params": rest}], lr=0.1)
    module(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    read = found({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    assert read.models[0].optimizer is not None
    assert not read.models[0].optimizer.slots
    assert read.models[0].optimizer.facts["learning_rate"] == 0.1
    assert "it numbers the parameters over several groups and does not name them" in said(read)


def test_an_optimizer_s_state_by_name_is_read(tmp_path: Path) -> None:
    """As torch.distributed.checkpoint.state_dict gives it."""
    state = Untied().state_dict()
    moments = {
        name: {"exp_avg": torch.randn(tensor.shape), "step": torch.tensor(3.0)}
        for name, tensor in state.items()
        if "bias" in name
    }
    group = {"params": list(moments), "lr": torch.tensor(0.5)}
    read = found({"model": state, "optim": {"state": moments, "param_groups": [group]}}, tmp_path)
    optimizer = read.models[0].optimizer
    assert optimizer is not None
    assert_same(optimizer.slots["exp_avg"], {name: held["exp_avg"] for name, held in moments.items()})
    assert optimizer.facts == {"learning_rate": 0.5, "optimizer_step": 3}
    other, notes = optimizer_state({"state": {"elsewhere": moments["0.bias"]}, "param_groups": [group]}, list(state))
    assert other is not None
    assert not other.slots
    assert "its names of the parameters are not the weights'" in notes[0]


NO_OPTIMIZERS: list[Any] = [
    None, 3, {}, [], {"state": {}}, {"param_groups": []}, {"param_groups": 5, "state": 5}, {"param_groups": [3], "state": {0: {"exp_avg": 3}}},
    {"param_groups": [{"params": [1, 2]}], "state": {7: {"exp_avg": torch.ones(2)}}}, {"param_groups": [{"params": [True]}], "state": {0: {"exp_avg": torch.ones(2)}}},
    {"param_groups": [{"params": [0], "param_names": [["x"]]}], "state": {-1: {"exp_avg": torch.ones(2)}, "w": 3, (1,): {}, 1 << 80: {}}},
    {"param_groups": [{"params": [0], "lr": float("nan"), "betas": "ab", "momentum": 10**400, "eps": torch.ones(3), "weight_decay": 1j}], "state": []},
    {"param_groups": [{"params": [0], "betas": (0.9, None)}], "state": {0: {"step": torch.ones(2)}, 1: {"step": -1}, 2: {"step": 1e308}}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NO_OPTIMIZERS)))
def test_what_is_no_optimizer_is_left_out(tmp_path: Path, number: int) -> None:
    content = NO_OPTIMIZERS[number]
    state, notes = optimizer_state(content, ["w"])
    assert state is None or not state.slots
    assert all(isinstance(note, str) for note in notes)
    assert state is None or not {"learning_rate", "betas", "momentum", "eps", "weight_decay", "optimizer_step"} & set(
        state.facts
    )
    weights = {"w": torch.ones(2)}
    assert_same(found({"model": weights, "optimizer": content}, tmp_path).models[0].tensors, weights)


def test_several_optimizers_are_left_out() -> None:
    state, notes = optimizer_state([{"param_groups": []}] * 2, [])
    assert state is None
    assert notes == ["the state of 2 optimizers was left out: only one can be told to belong to the parameters"]
    assert optimizer_state([], []) == (None, [])


def test_the_network_is_preferred_to_its_average(tmp_path: Path) -> None:
    module, average = Untied(), Untied(1)
    read = found(
        {
            "state_dict": module.state_dict(),
            "state_dict_ema": average.state_dict(),
            "discriminator": Network().state_dict(),
        },
        tmp_path,
    )
    assert_same(read.models[0].tensors, module.state_dict())
    assert read.kind == "one model"
    assert "an average over time is there too (state_dict_ema); it was left out" in said(read)
    assert "other tables of tensors were left out: discriminator" in said(read)


def test_an_average_alone_is_said_to_be_one(tmp_path: Path) -> None:
    module, optimizer = trained()
    read = found({"model_ema": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    assert_same(read.models[0].tensors, module.state_dict())
    assert read.kind == "average"
    assert "the weights are under 'model_ema': an average over the training" in said(read)
    assert read.models[0].optimizer is None
    assert read.facts["learning_rate"] == 0.01
    assert "belongs to the weights of the step, not to their average" in said(read)


@pytest.mark.parametrize("contained", [False, True])
def test_averaged_model_s_counter_tells_an_average(tmp_path: Path, contained: bool) -> None:
    averaged = AveragedModel(Untied())
    for seed in range(3):
        averaged.update_parameters(Untied(seed))
    state = averaged.state_dict()
    read = found({"model": state, "epoch": 1} if contained else state, tmp_path)
    assert_same(read.models[0].tensors, state)
    assert read.kind == "average"
    assert "AveragedModel's counter n_averaged, which stands at 3" in said(read)


@pytest.mark.parametrize(
    ("content", "step", "facts"),
    [
        ({"global_step": 7, "epoch": 2}, 7, {"epoch": 2}),
        ({"iteration": torch.tensor(5), "args": argparse.Namespace(local_batch_size=16, lr=0.5, world_size=4)}, 5,
         {"local_batch_size": 16, "learning_rate": 0.5, "num_learners": 4}),
        ({"iter_num": 9, "config": {"batch_size": 12, "learning_rate": 6e-4}}, 9, {"batch_size": 12, "learning_rate": 6e-4}),
        ({"num_updates": 3.0, "args": {"per_device_train_batch_size": 2, "train_batch_size": 8}}, 3, {"local_batch_size": 2, "batch_size": 8}),
        ({"meta": {"iter": 11, "epoch": 3}}, 11, {"epoch": 3}),
        ({"step": True, "epoch": -1, "batch_size": "8", "lr": float("inf")}, None, {}),
        ({"step": 10**400, "epoch": 0.5, "args": 5, "config": [1], "world_size": 1}, None, {}),
        ({"step": float("nan"), "iteration": torch.ones(2), "it": torch.tensor(1j), "lr": -1.0}, None, {}),
        ({"it": torch.ones(1, dtype=torch.bfloat16)}, 1, {}),
    ],
)  # fmt: skip
def test_what_the_script_recorded_is_told(
    tmp_path: Path, content: dict[str, Any], step: int | None, facts: dict[str, Any]
) -> None:
    read = found({"model": Untied().state_dict(), **content}, tmp_path)
    assert (read.step, read.facts) == (step, facts)
    assert ("one process's or the total" in said(read)) == ("batch_size" in facts and "local_batch_size" not in facts)


def test_two_counts_of_steps_are_noted(tmp_path: Path) -> None:
    read = found({"model": Untied().state_dict(), "step": 4, "iteration": 5}, tmp_path)
    assert read.step == 4
    assert "it counts steps in several ways (step 4, iteration 5); the first was taken" in said(read)


def of_learners(n: int = 3) -> list[dict[str, Tensor]]:
    return [Untied(seed).state_dict() for seed in range(n)]


def stacked(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


SHAPES: list[tuple[Any, int | None]] = [
    (lambda states: states, None),
    (lambda states: tuple(states), None),
    (lambda states: {"learners": states, "step": 5}, 5),
    (lambda states: {"models": {f"model_{j}": state for j, state in enumerate(states)}}, None),
    (lambda states: dict(enumerate(states)), None),
    (lambda states: {f"worker{j + 1}": state for j, state in enumerate(states)}, None),
    (lambda states: {"ranks": [{"model": state, "step": 5} for state in states]}, 5),
    (lambda states: {"workers": stacked(states), "step": 5}, 5),
    (lambda states: {"replicas": {"model": stacked(states)}}, None),
]


@pytest.mark.parametrize(("shape", "step"), SHAPES)
def test_several_learners_in_one_file_are_told_apart(tmp_path: Path, shape: Any, step: int | None) -> None:
    states = of_learners()
    read = found(shape(states), tmp_path)
    assert (read.kind, read.facts, read.step) == ("learners", {"num_learners": 3}, step)
    for model, state in zip(read.models, states, strict=True):
        assert_same(model.tensors, state)


def test_learners_keep_their_optimizers(tmp_path: Path) -> None:
    made = [trained(seed) for seed in range(2)]
    read = found(
        {"learners": [{"model": m.state_dict(), "optimizer": o.state_dict()} for m, o in made], "epoch": 3}, tmp_path
    )
    assert (find_one([tmp_path]).step, read.facts) == (4, {"epoch": 3, "num_learners": 2})
    for model, (module, optimizer) in zip(read.models, made, strict=True):
        assert model.optimizer is not None
        assert_same(
            model.optimizer.slots["exp_avg"],
            {i: optimizer.state[p]["exp_avg"] for i, p in enumerate(module.parameters())},
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({0: {"w": torch.ones(2)}, 2: {"w": torch.ones(2)}}, "1 are missing, such as 1"),
        (
            [{"w": torch.ones(2)}, {"w": torch.ones(3)}],
            r"not of one network:\n  w  float32\[2\] in learner 0; float32\[3\] in learner 1",
        ),
        ([{"a.w": torch.ones(2)}, {"b.w": torch.ones(2)}], r"no name in common: if they are parts of one network"),
        (
            {"learners": [{"model": {"w": torch.ones(2)}, "step": 1}, {"model": {"w": torch.ones(2)}, "step": 2}]},
            "different steps: 1, 2",
        ),
        ({"learners": [{"w": torch.ones(2)}] * 4000}, "the same tensors for many learners"),
        ({"workers": {f"{i}": torch.ones(4000, 0) for i in range(100)}}, "is larger than the file"),
        ({"encoder": {"w": torch.ones(2)}, "decoder": {"w": torch.ones(3)}}, "at its top is encoder, decoder"),
        ({"state": {}, "param_groups": []}, "no weights that can be told"),
        ({"model": {"layers": {"w": torch.ones(2)}}}, "no weights that can be told"),
        (torch.ones(3), "at its top is Tensor"),
        ([torch.ones(3)], "at its top is list"),
        ({}, "no weights"),
        (5, "at its top is int"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        found(content, tmp_path)


def test_content_that_holds_itself_is_read(tmp_path: Path) -> None:
    table: dict[str, Any] = {"epoch": 1}
    bomb: Any = table
    for _ in range(100):
        bomb = {"a": bomb, "b": bomb, "model": bomb, "learners": [bomb, bomb]}
    table |= {
        "model": {"w": torch.ones(2)},
        "args": table,
        "optimizer": table,
        "meta": table,
        "learners": [table],
        "state_dict": table,
        "x": bomb,
        "models": bomb,
    }
    read = found(table, tmp_path)
    assert_same(read.models[0].tensors, {"w": torch.ones(2)})
    table["self"] = table.pop("model")
    loop: list[Any] = []
    loop += [loop, loop]
    for hard in (bomb, loop, {"learners": loop}, {"model": loop}, {"learners": {0: loop, 1: loop}}):
        with pytest.raises(CheckpointError):
            found(hard, tmp_path)


def test_many_names_of_one_dictionary_take_no_time(tmp_path: Path) -> None:
    shared = {f"x{i}": i for i in range(2000)}
    content = {f"y{i}": shared for i in range(2000)} | {
        "state": dict.fromkeys(range(2000), shared),
        "param_groups": [shared] * 2000,
    }
    read = found({"model": {"w": torch.ones(2)}, "optimizer": content, **content}, tmp_path)
    assert_same(read.models[0].tensors, {"w": torch.ones(2)})


PLACES: list[Any] = [
    {"model": {"w": torch.ones(2)}}, {"w": torch.ones(2)}, {"learners": [{"w": torch.ones(2)}] * 2}, [{"w": torch.ones(2)}, {"w": torch.ones(2)}],
    {"state_dict": {"state_dict": {"w": torch.ones(2)}, "ps_weight": torch.ones(1), "is_ps_numerator": True}},
    {"pytorch-lightning_version": "2.6.6", "state_dict": {"w": torch.ones(2)}}, {"_model.w": torch.ones(2)},
    {"state": {}, "param_groups": []},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PLACES)))
def test_a_hostile_pickle_anywhere_is_named_and_not_run(tmp_path: Path, number: int) -> None:
    marker = tmp_path / "marker"
    path = spoilt(PLACES[number], tmp_path / "a.pt", marker)
    with pytest.raises(CheckpointError, match=r"posix\.system.*code would have to be run.*was not read"):
        plain.find(path)
    for inner in PLACES[number] if isinstance(PLACES[number], dict) else ():
        if isinstance(PLACES[number][inner], dict):
            spoilt({**PLACES[number], inner: {**PLACES[number][inner], "hostile": 1}}, path, marker)
            with pytest.raises(CheckpointError, match="posix"):
                plain.find(path)
    assert not marker.exists()


def test_what_is_not_of_torch_save_is_left_to_others(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"text"), ("empty", b""), ("b.safetensors", b"\x08\0\0\0\0\0\0\0{}      ")):
        (tmp_path / name).write_bytes(content)
        assert plain.find(tmp_path / name) is None


KEYS = [
    "model", "state_dict", "model_ema", "optimizer", "optimizer_states", "state", "param_groups", "params", "param_names", "step", "epoch", "args", "meta", "lr",
    "betas", "exp_avg", "momentum_buffer", "ps_weight", "is_ps_numerator", "pytorch-lightning_version", "global_step", "current_model_state", "averaging_state",
    "n_averaged", "learners", "models", "worker0", "worker1", "0", "1", "_model.w", "module.w", "w", "x.running_mean", "hyper_parameters", "batch_size", "itr",
]  # fmt: skip


def anything(generator: random.Random, depth: int = 0) -> Any:
    """A value that a file may hold where another is expected."""
    kind = generator.randrange(14 if depth < 4 else 8)
    if kind < 3:
        shape = generator.choice([(), (1,), (2,), (2, 3), (0,), (3, 0)])
        return torch.ones(
            shape,
            dtype=generator.choice(
                [torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64, torch.float64]
            ),
        )
    if kind == 3:
        return generator.choice([0, 1, -1, 7, 10**30, 10**400, True, None, 2**63])
    if kind == 4:
        return generator.choice([0.5, float("nan"), float("inf"), -1.0, 1e308, 1j])
    if kind == 5:
        return generator.choice(
            [
                "",
                "2.6.6",
                "w",
                "x" * 5000,
                b"bytes",
                torch.float32,
                torch.Size([2]),
                torch.device("cuda"),
                pathlib.PurePosixPath("a"),
            ]
        )
    if kind == 6:
        return argparse.Namespace(**{generator.choice(["lr", "batch_size", "world_size"]): anything(generator, 9)})
    if kind == 7:
        return generator.choice(
            [nn.Parameter(torch.ones(2)), torch.ones(1).expand(5), torch.ones(2, 3).t(), set(), {1}, ()]
        )
    if kind < 10:
        made = [anything(generator, depth + 1) for _ in range(generator.randrange(4))]
        return made if kind == 8 else tuple(made)
    table: dict[Any, Any] = {}
    for _ in range(generator.randrange(6)):
        key = (
            generator.choice([*KEYS, 0, 1, 2, (1, 2), None, 2.5])
            if generator.random() < 0.3
            else generator.choice(KEYS)
        )
        table[key] = anything(generator, depth + 1) if generator.random() < 0.95 else table
    return table


def try_anything(numbers: Iterable[int], folder: Path) -> int:
    """How many of the files hold weights; the others are refused, and nothing else happens."""
    read = 0
    for number in numbers:
        torch.save(anything(random.Random(number)), folder / "a.pt")
        try:
            result = plain.find(folder / "a.pt")
        except CheckpointError as error:
            if len(str(error)) > 3000:
                raise AssertionError(f"{number}: a message of {len(str(error))} characters") from error
            continue
        assert result is not None
        read += 1
        json.dumps(
            [
                result.facts,
                result.notes,
                result.reasons,
                result.step,
                [m.optimizer and m.optimizer.facts for m in result.models],
            ]
        )
        for model in result.models:
            for slot in model.optimizer.slots.values() if model.optimizer else ():
                assert all(stored.read().shape == stored.shape for stored in slot.values())
            assert all(stored.read().shape == stored.shape for stored in model.tensors.values())
    return read


def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path: Path) -> None:
    assert try_anything(range(600), tmp_path) > 20
