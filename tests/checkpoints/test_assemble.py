from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from landscape.checkpoints import CheckpointError
from landscape.checkpoints.assemble import readable
from landscape.checkpoints.importers.found import Found, OptimizerState, Stored, Weights


def make_network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        network[1].running_mean += torch.randn(4)
    return network


def on_disk(tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    return {n: Stored(t.shape, t.dtype, lambda t=t: t.clone()) for n, t in tensors.items()}


def found_of(*states: dict[str, torch.Tensor], optimizers: Any = None, **more: Any) -> Found:
    optimizers = optimizers or [None] * len(states)
    models = tuple(Weights(f"file{j}", on_disk(s), o) for j, (s, o) in enumerate(zip(states, optimizers, strict=True)))
    return Found(Path("x"), "a test", "learners" if len(states) > 1 else "one model", models, **more)


def test_learners_are_what_was_stored_in_the_module_s_order() -> None:
    networks = [make_network(j) for j in range(3)]
    shuffled = [dict(sorted(n.state_dict().items(), reverse=True)) for n in networks]
    learners = readable(found_of(*shuffled, step=7, facts={"epoch": 2}), module=make_network(9)).read()
    assert (learners.step, len(learners), learners.facts) == (7, 3, {"epoch": 2})
    assert list(learners.layout.names) == [n for n, _ in networks[0].named_parameters()]
    for row, network in zip(learners.weights, networks, strict=True):
        assert torch.equal(row, torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert set(learners.buffers) == {n for n, _ in networks[0].named_buffers()}
    assert torch.equal(learners.buffers["1.running_mean"], torch.stack([n[1].running_mean for n in networks]))
    assert learners.origin == {"format": "a test", "kind": "learners", "reasons": [], "notes": []}


def test_some_of_the_learners() -> None:
    states = [dict(make_network(j).state_dict()) for j in range(3)]
    both = readable(found_of(*states))
    assert torch.equal(both.read([2, 0]).weights, both.read().weights[[2, 0]])


def test_an_average_says_that_its_statistics_are_nobody_s() -> None:
    learners = readable(found_of(*(dict(make_network(j).state_dict()) for j in range(3)))).read()
    mean = learners.average()
    assert torch.equal(mean.weights[0], learners.weights.double().mean(0).float())
    assert torch.allclose(mean.buffers["1.running_mean"][0], learners.buffers["1.running_mean"].mean(0))
    assert mean.buffers["1.num_batches_tracked"].dtype == torch.int64
    assert (mean.origin["kind"], len(mean)) == ("average", 1)
    assert "recalibrated" in mean.facts["batch_norm"]
    plain = readable(found_of({"weight": torch.ones(2)}, {"weight": torch.zeros(2)})).read().average()
    assert plain.facts == {}


def test_weights_are_of_the_smallest_type_that_holds_all_of_them() -> None:
    for types, expected in [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float64, torch.float32), torch.float64),
    ]:
        state = {f"p{i}": torch.randn(3).to(t) for i, t in enumerate(types)}
        learners = readable(found_of(state)).read()
        assert learners.weights.dtype == expected
        assert all(torch.equal(learners.parameters(0)[n], t.to(expected)) for n, t in state.items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_quantised_and_complex_parameters_are_refused(dtype: torch.dtype) -> None:
    network = nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError, match=f"weight is of type {str(dtype).removeprefix('torch.')}"):
        readable(found_of({"weight": torch.zeros(2, 2).to(dtype)}), module=network)


def test_learners_of_different_networks_are_refused_with_a_table() -> None:
    a, b, c = ({"w": torch.ones(2, 3), "v": torch.ones(1)} for _ in range(3))
    b["w"], c = torch.ones(3, 2), {"w": c["w"].bfloat16()}
    with pytest.raises(CheckpointError) as error:
        readable(found_of(a, b, c))
    lines = str(error.value).splitlines()
    assert lines[1].split() == ["w", "float32[2,", "3]", "in", "file0;", "float32[3,", "2]", "in", "file1"]
    assert "bfloat16[2, 3] in file2" in lines[2]
    assert "v" in lines[3]
    assert "missing in file2" in lines[3]


def test_a_file_that_holds_another_shape_than_it_announced() -> None:
    found = Found(
        Path("x"),
        "a test",
        "one model",
        (Weights("file", {"w": Stored(torch.Size([2]), torch.float32, lambda: torch.ones(3))}),),
    )
    with pytest.raises(CheckpointError, match=r"shape \[3\], not \[2\] as announced"):
        readable(found).read()


def test_one_tensor_at_a_time_is_in_memory() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def read() -> torch.Tensor:
        nonlocal most
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    stored = {f"p{i}": Stored(torch.Size([1000]), torch.float32, read) for i in range(20)}
    readable(Found(Path("x"), "a test", "learners", (Weights("a", stored), Weights("b", stored)))).read()
    assert len(alive) == 40
    assert most <= 2  # the one before is let go when the next has come


# Frozen parameters -----------------------------------------------------------------------------------------------------


def frozen_network(seed: int) -> nn.Module:
    network = make_network(seed)
    network[0].requires_grad_(False)
    return network


def test_frozen_parameters_are_kept_apart() -> None:
    state = dict(make_network(0).state_dict())
    learners = readable(found_of(state), module=frozen_network(1)).read()
    assert list(learners.frozen) == ["0.weight", "0.bias"]
    assert torch.equal(learners.frozen["0.weight"], state["0.weight"])
    assert learners.weights.shape[1] == 4 + 4 + 8 + 2


def test_frozen_parameters_that_differ_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"0\.weight is frozen in the model, but differs between file0 and file1"):
        readable(found_of(*(dict(make_network(j).state_dict()) for j in range(2))), module=frozen_network(1))


# Optimizers ------------------------------------------------------------------------------------------------------------


def trained(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(8, 3, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        optimizer.step()
    return optimizer.state_dict()["state"]


def state_of(
    network: nn.Module, held: dict[Any, Any], *, by_name: bool = False, count: int | None = None
) -> OptimizerState:
    names = [n for n, p in network.named_parameters() if p.requires_grad or not by_name]
    count = len(list(network.parameters())) if count is None else count
    slots: dict[str, dict[str | int, Stored]] = {}
    for index, state in held.items():
        for slot, tensor in state.items():
            if slot != "step":
                key = names[index] if by_name else index
                slots.setdefault(slot, {})[key] = Stored(tensor.shape, tensor.dtype, lambda t=tensor: t)
    return OptimizerState(slots, {"learning_rate": 0.1}, count)


@pytest.mark.parametrize("by_name", [False, True])
def test_adam_s_moments_go_to_their_parameters(by_name: bool) -> None:
    network = make_network(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    held = trained(network, optimizer)
    found = found_of(dict(network.state_dict()), optimizers=[state_of(network, held, by_name=by_name)])
    learners = readable(found, module=make_network(1)).read()
    assert learners.momentum is None
    assert learners.facts["learning_rate"] == 0.1
    for slot in ("exp_avg", "exp_avg_sq"):
        by_hand = torch.cat([optimizer.state[p][slot].flatten() for p in network.parameters()])
        assert torch.equal(learners.moments[slot][0], by_hand)


def test_momentum_of_several_learners() -> None:
    networks = [make_network(j) for j in range(2)]
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in networks]
    states = [state_of(n, trained(n, o)) for n, o in zip(networks, optimizers, strict=True)]
    learners = readable(found_of(*(dict(n.state_dict()) for n in networks), optimizers=states)).read()
    assert learners.momentum is not None
    for row, network, optimizer in zip(learners.momentum, networks, optimizers, strict=True):
        assert torch.equal(
            row, torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in network.parameters()])
        )


@pytest.mark.parametrize("only_trained", [False, True])
def test_an_optimizer_of_a_partly_frozen_network(only_trained: bool) -> None:
    network = frozen_network(0)
    given = [p for p in network.parameters() if p.requires_grad or not only_trained]
    optimizer = torch.optim.SGD(given, lr=0.1, momentum=0.9)
    state = state_of(network, trained(network, optimizer), count=len(given))
    learners = readable(found_of(dict(network.state_dict()), optimizers=[state]), module=frozen_network(1)).read()
    assert learners.momentum is not None
    by_hand = torch.cat(
        [optimizer.state[p]["momentum_buffer"].flatten() for p in network.parameters() if p.requires_grad]
    )
    assert torch.equal(learners.momentum[0], by_hand)


def test_an_optimizer_of_some_parameters_is_not_taken_for_one_of_all() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    optimizer = torch.optim.SGD([network[2].weight, network[3].weight], lr=0.1, momentum=0.9)
    network(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    for count in (2, None):
        state = state_of(network, optimizer.state_dict()["state"], count=2)
        found = found_of(dict(network.state_dict()), optimizers=[OptimizerState(state.slots, {}, count)])
        assert readable(found, module=network).read().momentum is None


def test_moments_keep_their_own_type() -> None:
    network = nn.Linear(2, 2, bias=False)
    held = {0: {"exp_avg_sq": torch.full((2, 2), 1e-10), "exp_avg": torch.full((2, 2), 1e-9)}}
    state = {"weight": network.weight.detach().half()}
    learners = readable(found_of(state, optimizers=[state_of(network, held)]), module=network).read()
    assert learners.weights.dtype == torch.float16
    assert float(learners.moments["exp_avg_sq"][0, 0]) == pytest.approx(1e-10)


def test_what_not_every_learner_has_is_left_out_also_learner_by_learner() -> None:
    networks = [make_network(j) for j in range(2)]
    optimizer = torch.optim.SGD(networks[0].parameters(), lr=0.1, momentum=0.9)
    state = state_of(networks[0], trained(networks[0], optimizer))
    both = readable(found_of(*(dict(n.state_dict()) for n in networks), optimizers=[state, None]))
    assert both.read([0]).momentum is None


def test_numbered_state_of_names_in_another_order_is_left_out_without_a_module() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(12)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    state = dict(sorted(network.state_dict().items()))
    weights = Weights("file", on_disk(state), state_of(network, optimizer.state_dict()["state"]), ordered=False)
    found = Found(Path("x"), "a test", "one model", (weights,))
    assert readable(found).read().momentum is None
    momentum = readable(found, module=network).read().momentum
    assert torch.equal(
        momentum[0], torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in network.parameters()])
    )


def test_an_optimizer_whose_numbers_may_mean_either_is_left_out() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    network[0].requires_grad_(False)
    held = {1: {"momentum_buffer": torch.ones(2, 2)}}  # the second of all, or of the trained
    state = OptimizerState(state_of(network, held).slots)
    learners = readable(found_of(dict(network.state_dict()), optimizers=[state]), module=network).read()
    assert learners.momentum is None
    assert any("momentum_buffer was left out" in note for note in learners.origin["notes"])


def test_an_optimizer_of_another_network_is_left_out() -> None:
    network = make_network(0)
    held = {0: {"momentum_buffer": torch.ones(5)}}
    learners = readable(found_of(dict(network.state_dict()), optimizers=[state_of(network, held)])).read()
    assert learners.momentum is None


def test_parameters_without_state_have_zeros_and_this_is_told() -> None:
    network = make_network(0)
    held = {0: {"momentum_buffer": torch.ones(4, 3)}}
    learners = readable(found_of(dict(network.state_dict()), optimizers=[state_of(network, held)])).read()
    assert learners.momentum is not None
    assert learners.momentum.count_nonzero() == 12
    assert "zero for 5 parameters" in learners.origin["notes"][0]
