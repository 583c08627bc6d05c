"""All data on every rank, the work shared: the same numbers as in one process, to rounding, and the same on every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from landscape.checkpoints import Learners
from landscape.curvature.density import spectral_density
from landscape.curvature.gradient_moments import gradient_covariance
from landscape.curvature.hessian import hessian
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.preflight import preflight
from landscape.curvature.third import curved_gradient
from landscape.noise.covariance import (
    gradient_covariance_eigenvectors,
    gradient_covariance_spectrum,
    gradient_covariance_summary,
)
from landscape.noise.decomposition import measure_noise
from landscape.noise.draws import draw_gradients
from landscape.noise.gram import example_gram
from landscape.noise.products import band_of
from landscape.noise.reference import reference_gradient
from landscape.objective import Objective
from landscape.ranks import AgreedError, Ranks

N = 31


class Branch(nn.Module):
    """Some parameters that no captured layer has: they go by vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.scale).sin()


def problem(count: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 3, 3), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(),
        nn.Dropout(0.3), nn.Linear(8, 3), Branch(),
    ).double()  # fmt: skip
    x, y = torch.randn(count, 2, 6).double() + 1, torch.randint(3, (count,))
    return net, x, y


def ignoring(y: Tensor) -> Tensor:
    return torch.where(torch.arange(len(y)) % 5 == 0, -100, y)


def listed(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[a:b], y[a:b]) for a, b in ((0, 4), (4, 15), (15, len(x)))]


def passes(objective: Objective) -> dict[str, Any]:
    """What takes whole passes over the data."""
    weights = objective.model.initial_weights()[0]
    block = torch.randn(len(weights), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    operator = hessian(objective, weights)
    return {
        "value": objective.value(weights),
        "many values": objective.stacked_values(weights + 0.1 * block.T),
        "gradient": objective.gradient(weights),
        "many gradients": objective.stacked_gradients(weights + 0.1 * block.T),
        "hessian": operator @ block,
        "again": operator @ block,
        "nothing kept": hessian(objective, weights, memory_budget=0) @ block,
        "curved": curved_gradient(objective, weights, block.T),
        "equal weights": objective.has_equal_weights,
        "number": objective.num_examples,
        "norm": objective.norm,
    }


def wholes(objective: Objective) -> dict[str, Any]:
    """What takes examples one by one, pairs of them, or minibatches."""
    weights = objective.model.initial_weights()[0]
    directions = torch.linalg.qr(torch.randn(len(weights), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q  # fmt: skip
    summary = gradient_covariance_summary(objective, weights, directions, chunk=4)
    values, vectors = gradient_covariance_eigenvectors(objective, weights, 3, centre="gradient")
    found = {
        "covariance": gradient_covariance(objective, weights) @ directions,
        "density": spectral_density(gradient_covariance(objective, weights), num_probes=2, num_steps=4).nodes,
        "eigenvalues": top_eigenpairs(hessian(objective, weights), 2, tol=1e-8).values,
        "trace": summary.trace,
        "along": summary.along,
        "combinations": vectors.abs(),
        "combined values": values,
    }
    for budget in (None, 20_000, 2_000):
        for part in example_gram(objective, weights, directions=directions, memory_budget=budget):
            found[f"gram of {part.name} in {budget}"] = part.gram
            found[f"projections of {part.name} in {budget}"] = part.along
    (plain,) = example_gram(objective, weights, by="whole", directions=directions, method="vmap")
    found |= {"plain gram": plain.gram, "plain projections": plain.along}
    return found


def draws(objective: Objective, num_draws: int = 5) -> dict[str, Any]:
    weights = objective.model.initial_weights()[0]
    layout = objective.model.layout
    away = torch.stack([weights + 0.05 * j for j in range(3)])
    options: dict[str, Any] = {
        "num_learners": 3,
        "local_batch_size": min(4, objective.num_examples),
        "num_draws": num_draws,
    }
    found: dict[str, Any] = {}
    for name, points, budget in (
        ("fixed", away, None), ("alike", weights.expand(3, -1), None), ("moving", lambda k: away + 0.01 * k, None), ("spilled", away, 100),
    ):  # fmt: skip
        drawn = draw_gradients(objective, weights, points, memory_budget=budget, **options)
        assert drawn.point_rows.spilled == (budget is not None)
        found |= {f"{name} at points": drawn.at_points, f"{name} at mean": drawn.at_mean, f"{name} landscape": drawn.landscape_rows.tensor()}  # fmt: skip
    if objective.num_examples >= 24:
        found["reference"] = reference_gradient(objective, weights, 24, num_groups=4).groups
        sample = gradient_covariance_spectrum(objective, weights, num_examples=20)
        found |= {"sampled trace": sample.trace, "sampled spectrum": sample.eigenvalues}
        learners = Learners(0, away, layout)
        noise = measure_noise(objective, learners, learning_rate=0.1, local_batch_size=4, num_draws=4)
        found |= {f"noise {name}": value.values for name, value in noise.data_vars.items() if name != "identity_error"}
    return found


def settings(group: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that is compared, by name; with a group, the data are shared by its ranks."""
    share: dict[str, Any] = {} if group is None else {"group": group, "shared": True}
    net, x, y = problem()
    loss = nn.CrossEntropyLoss()

    def small(count: int) -> Objective:
        return Objective(net, loss, (x[:count], y[:count]), **share)

    def recalibrated() -> dict[str, Any]:
        made = Objective(net, loss, (x, y), **share).recalibrated(dict(net.named_parameters()), batch_size=10)
        return dict(made.buffers)

    return {
        "plain": lambda: (o := Objective(net, loss, (x, y), **share)) and passes(o) | wholes(o) | draws(o),
        "ignored": lambda: (o := Objective(net, loss, (x, ignoring(y)), **share)) and passes(o) | wholes(o),
        "list": lambda: (o := Objective(net, loss, listed(x, y), **share)) and passes(o) | wholes(o),
        "ghost": lambda: passes(Objective(net, loss, (x, y), batch_norm="ghost", batch_size=8, **share)),
        "masks": lambda: passes(Objective(net, loss, (x, y), dropout_seed=3, batch_size=8, **share)),
        "masks of single examples": lambda: passes(Objective(net, loss, (x, y), dropout_seed=3, batch_size=1, **share)),
        "masks of a list": lambda: passes(Objective(net, loss, listed(x, y), dropout_seed=3, **share)),
        "one weight at a time": lambda: passes(Objective(net, loss, (x, y), chunk=3, **share)),
        "statistics": recalibrated,
        "two examples": lambda: passes(small(2)) | draws(small(2), num_draws=2),
    }


def mistakes(group: Any, rank: int) -> dict[str, str]:
    """What is said of data that cannot be, or work that cannot be shared."""
    net, x, y = problem()
    weights = dict(net.named_parameters())
    bad = x.clone()
    bad[27] = torch.nan  # in the last rank's share alone
    loss = nn.CrossEntropyLoss()
    shared, shard = Objective(net, loss, (bad, y), group=group, shared=True), Objective(net, loss, (x, y), group=group)
    flat = shared.model.initial_weights()[0]
    away = flat.expand(3, -1)
    calls: dict[str, Callable[[], Any]] = {
        "value": lambda: shared.value(weights),
        "gradient": lambda: shared.gradient(weights),
        "hessian": lambda: hessian(shared, weights) @ torch.ones(len(flat)),
        "hessian of batches": lambda: hessian(Objective(net, loss, listed(bad, y), group=group, shared=True), weights) @ torch.ones(len(flat)),
        "gram": lambda: list(example_gram(shared, weights)),
        "lengths": lambda: Objective(net, loss, (bad[: 5 + 7 * rank], y[: 5 + 7 * rank]), group=group, shared=True),
        "shard drawn": lambda: draw_gradients(shard, flat, away, num_learners=3, local_batch_size=2, num_draws=2),
        "shard's minibatch": lambda: shard.minibatch_gradients(away, torch.zeros(3, 2, dtype=torch.int64)),
        "shard's gram": lambda: list(example_gram(shard, weights)),
        "shard's reference": lambda: reference_gradient(shard, weights, 16),
        "pyhessian": lambda: top_eigenpairs(hessian(shared, weights), 1, "LM", backend="pyhessian"),
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r".") as caught:
            call()
        found[name] = str(caught.value)
        agreed = name in ("value", "gradient", "hessian", "hessian of batches", "gram", "lengths")
        assert isinstance(caught.value, AgreedError) == agreed, name
    return found


def shards(group: Any, rank: int, size: int) -> dict[str, Any]:
    """Shards that split the fixed batches of a whole."""
    net, x, y = problem()
    own = slice(8 * rank, 8 * rank + 8 if rank < size - 1 else N)
    masks = Objective(net, nn.CrossEntropyLoss(), (x[own], y[own]), dropout_seed=3, batch_size=8, group=group)
    plain = Objective(net, nn.CrossEntropyLoss(), (x[own], ignoring(y)[own]), group=group)
    summary = gradient_covariance_summary(plain, plain.model.initial_weights()[0])
    assert preflight(plain, plain.model.initial_weights()[0]).ok
    return passes(masks) | {"trace": summary.trace, "equal": plain.has_equal_weights, "number": plain.num_examples}


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    group = torch.distributed.group.WORLD
    found: dict[str, Any] = {name: compute() for name, compute in settings(group).items()}
    found["mistakes"], found["shards"] = mistakes(group, rank), shards(group, rank, size)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def check(found: Any, expected: Any, where: str) -> None:
    a, b = torch.as_tensor(found), torch.as_tensor(expected)
    scale = float(b.double().abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(
        a, b, rtol=1e-9, atol=1e-9 * scale + 1e-13, equal_nan=True, msg=lambda m: f"{where}: {m}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_shared_work_gives_what_one_process_gives(size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (size, str(tmp_path)), nprocs=size)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(size)]
    alone = {name: compute() for name, compute in settings(None).items()}
    for setting, expected in alone.items():
        for found in ranks:
            assert found[setting].keys() == expected.keys()
            for name, value in expected.items():
                first = torch.as_tensor(ranks[0][setting][name])
                same = torch.as_tensor(found[setting][name])
                assert torch.equal(first.nan_to_num(), same.nan_to_num()), (setting, name)  # to the bit on every rank
                check(found[setting][name], value, f"{setting}, {name}")
    said = ranks[0]["mistakes"]
    assert all(found["mistakes"] == said for found in ranks)
    for name in ("value", "gradient", "hessian", "gram"):
        assert "the data hold nan or infinity: 1 example(s) of batch 0" in said[name]
        assert f"the first of them example 27 (rank {size - 1} of {size})" in said[name]
    assert "1 example(s) of batch 2 (examples 15 to 30), the first of them example 27" in said["hessian of batches"]
    assert "the ranks hold 5, 12" in said["lengths"]
    for name in ("shard drawn", "shard's minibatch", "shard's gram", "shard's reference"):
        assert "this rank holds a shard of the data" in said[name]
    assert "pyhessian knows one process" in said["pyhessian"]
    net, x, y = problem()
    whole = Objective(net, nn.CrossEntropyLoss(), (x, ignoring(y)))
    assert ranks[0]["shards"]["number"] == N
    expected = gradient_covariance_summary(whole, whole.model.initial_weights()[0]).trace
    assert ranks[0]["shards"]["trace"] == pytest.approx(expected, rel=1e-10)
    assert ranks[0]["shards"]["equal"] is False
    # shards that end where fixed batches do draw the masks that one process draws
    masks = passes(Objective(net, nn.CrossEntropyLoss(), (x, y), dropout_seed=3, batch_size=8))
    for found in ranks:
        for name in ("value", "gradient", "hessian"):
            check(found["shards"][name], masks[name], f"shards, {name}")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 100])
def test_bands_cover_the_triangle_evenly(size: int, count: int) -> None:
    bands = [band_of(count, Ranks(rank, size)) for rank in range(size)]
    assert [i for band in bands for i in band] == list(range(count))
    work = [sum(i + 1 for i in band) for band in bands]
    assert max(work, default=0) <= count * (count + 1) / 2 / size + 2 * count
