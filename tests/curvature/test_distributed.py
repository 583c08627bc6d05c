"""Data spread over ranks: the same numbers as in one process, to rounding, and the same on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from landscape.curvature.density import spectral_density
from landscape.curvature.gauss_newton import ggn
from landscape.curvature.gradient_moments import gradient_covariance
from landscape.curvature.hessian import hessian
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.trace import trace
from landscape.objective import Objective


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(31, 5).double() + 1, torch.randint(3, (31,))
    return net, x, torch.where(torch.arange(31) % 5 == 0, -100, y)  # ranks hold unequal weights


def measured(data: Any, group: Any) -> dict[str, Any]:
    net, _, _ = problem()
    objective = Objective(net, nn.CrossEntropyLoss(), data, group=group)
    weights = objective.flat(dict(net.named_parameters()))
    block = torch.randn(len(weights), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    operator = hessian(objective, weights)
    return {
        "statistics": objective.recalibrated(weights).buffers["1.running_mean"],
        "value": torch.tensor(objective.value(weights)),
        "gradient": objective.gradient(weights),
        "hessian": operator @ block,
        "again": operator @ block,
        "gauss-newton": ggn(objective, weights) @ block,
        "covariance": gradient_covariance(objective, weights) @ block,
        "eigenvalues": torch.from_numpy(top_eigenpairs(operator, 3, tol=1e-8).values),
        "trace": torch.tensor(trace(operator, num_probes=10).value),
        "nodes": torch.from_numpy(spectral_density(operator, num_probes=2, num_steps=5).nodes),
    }


def work(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    _, x, y = problem()
    bounds = [0, 12, 31] if world_size == 2 else [0, 3, 20, 31]
    shard = slice(bounds[rank], bounds[rank + 1])
    torch.save(measured((x[shard], y[shard]), torch.distributed.group.WORLD), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_the_data_give_what_one_process_gives(world_size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (world_size, str(tmp_path)), nprocs=world_size)
    _, x, y = problem()
    alone = measured((x, y), None)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for name, expected in alone.items():
        for found in ranks:
            assert torch.equal(found[name], ranks[0][name]), name  # to the bit on every rank
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
