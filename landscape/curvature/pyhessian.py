"""The same questions asked of pyhessian (Yao et al. 2020), the tool that the field cites, to check ours against.

`backend="pyhessian"` of `top_eigenpairs`, `trace` and `spectral_density` leads here. The answers are pyhessian's own: power iteration
with deflation that stops when the Rayleigh quotient does, a trace that stops when its running mean does, batches weighted by
their number of examples. What is added: a seed, true residuals and standard errors, and a stand-in for torch.eig, which is gone from
torch and which pyhessian 0.1 calls.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape import streams
from landscape.curvature.hessian import HessianOperator
from landscape.curvature.operators import SymmetricOperator


def power_iteration(operator: SymmetricOperator, k: int, tol: float, max_matvecs: int | None, seed: int) -> tuple[np.ndarray, Tensor, int]:  # fmt: skip
    """pyhessian's top k by modulus: values (k,), vectors (d, k) and products taken.

    Args:
        operator: a `HessianOperator`.
        k: how many.
        tol: pyhessian's: relative change of the Rayleigh quotient between two products.
        max_matvecs: for all k together; 100 for each by default, as in pyhessian.
        seed: of its random start.
    """
    with _tool(operator, seed) as tool:
        limit = 100 if max_matvecs is None else max(1, max_matvecs // k)
        values, vectors = tool.eigenvalues(maxIter=limit, tol=tol, top_n=k)
        columns = torch.stack([torch.cat([part.flatten() for part in vector]) for vector in vectors], dim=1)
        return np.array(values, dtype=np.float64), columns.to(operator.dtype), tool.num_matvecs


def quadratic_forms(operator: SymmetricOperator, num_probes: int, tol: float, seed: int) -> np.ndarray:
    """v^T H v of pyhessian's Rademacher probes, at most `num_probes`; it stops when the running mean moves by less than `tol`."""
    with _tool(operator, seed) as tool:
        return np.array(tool.trace(maxIter=num_probes, tol=tol), dtype=np.float64)


def quadrature(operator: SymmetricOperator, num_probes: int, num_steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Nodes and weights (num_probes, num_steps) of pyhessian's stochastic Lanczos quadrature."""
    with _tool(operator, seed) as tool:
        nodes, weights = tool.density(iter=num_steps, n_v=num_probes)
        return np.array(nodes, dtype=np.float64), np.array(weights, dtype=np.float64)


@contextmanager
def _tool(operator: SymmetricOperator, seed: int) -> Iterator[Any]:
    """pyhessian's object for an operator, with what it needs of the world put right and put back."""
    if not isinstance(operator, HessianOperator):
        raise ValueError(f"pyhessian knows the Hessian of an objective, not {type(operator).__name__}")
    try:
        import pyhessian
    except ModuleNotFoundError:
        raise ValueError('backend="pyhessian" needs that package: pip install pyhessian') from None

    class Counting(pyhessian.hessian):  # type: ignore[misc]
        num_matvecs = 0

        def dataloader_hv_product(self, v: list[Tensor]) -> Any:
            self.num_matvecs += 1
            return super().dataloader_hv_product(v)

    objective = operator.objective
    if objective.peers.size > 1:
        raise ValueError("pyhessian knows one process, and the data are spread over several; build the objective without a group")  # fmt: skip
    data = [(inputs, targets) for _, inputs, targets in objective.batches()]
    if not all(isinstance(x, Tensor) and isinstance(y, Tensor) for x, y in data):
        raise ValueError("pyhessian takes batches that are pairs of tensors")
    if objective.has_fixed_batches or objective.model.loss.reduction != "mean":
        raise ValueError("pyhessian knows a mean-reduced loss, eval mode and no fixed batches")
    module = copy.deepcopy(objective.model.module)
    state = objective.model.state_dict(operator.weights, objective.buffers)
    module.load_state_dict(state)

    def criterion(output: Any, targets: Tensor) -> Tensor:
        contributions, example_weights = objective.model.parted(output, targets)
        return contributions.sum() / example_weights.sum()

    devices = [objective.device] if objective.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _symmetric_eig(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        torch.manual_seed(streams.torch_generator("pyhessian", seed).initial_seed())
        yield Counting(module, criterion, dataloader=data, cuda=objective.device.type == "cuda")


@contextmanager
def _symmetric_eig() -> Iterator[None]:
    """torch.eig as it was: real and imaginary parts (n, 2), and vectors; of symmetric matrices, which is what it is asked for."""

    def eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    before = getattr(torch, "eig", None)
    torch.eig = eig  # type: ignore
    try:
        yield
    finally:
        if before is None:
            del torch.eig  # type: ignore
        else:
            torch.eig = before  # type: ignore
