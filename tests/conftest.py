"""What all tests share: run-time shape checks, markers that name what is missing, and a task small enough for anything."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from landscape.data.dataset import TensorData
    from landscape.tasks import Task


def _checked_unless_local(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyping's decorator, but for functions inside functions: these would be compiled anew at every call."""
    decorate = _jaxtyped(typechecker=typechecker)
    return lambda thing: thing if "<locals>" in getattr(thing, "__qualname__", "") else decorate(thing)


_jaxtyped = jaxtyping.jaxtyped
if importlib.util.find_spec("beartype") is not None:
    jaxtyping.jaxtyped = _checked_unless_local
    jaxtyping.install_import_hook("landscape", "beartype.beartype")  # before landscape is imported anywhere
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")

DATA_ROOT_VARIABLE = "LANDSCAPE_DATA_ROOT"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device; torch sees none"
    if not os.environ.get(DATA_ROOT_VARIABLE):
        missing["data"] = f"needs {DATA_ROOT_VARIABLE}, the folder of the full data sets; it is not set"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def make_tiny_data(num_examples: int, seed: int) -> TensorData:
    """Three overlapping Gaussian classes in six dimensions, float64."""
    from landscape.data.dataset import TensorData

    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    targets = torch.randint(0, 3, (num_examples,), generator=generator)
    inputs = centres[targets] + torch.randn(num_examples, 6, generator=generator, dtype=torch.float64)
    return TensorData(inputs, targets, "tiny")


@pytest.fixture(scope="session")
def tiny_data() -> TensorData:
    """40 training examples: inputs (40, 6) float64, targets (40,) of 3 classes."""
    return make_tiny_data(40, seed=1)


@pytest.fixture(scope="session")
def tiny_test_data() -> TensorData:
    """24 held-out examples like `tiny_data`."""
    return make_tiny_data(24, seed=2)


@pytest.fixture(scope="session")
def tiny_task(tiny_data: TensorData, tiny_test_data: TensorData) -> Task:
    """A 6-5-3 tanh network (53 parameters) with cross entropy on `tiny_data`."""
    from landscape.models import mlp
    from landscape.tasks import Task

    return Task(
        name="tiny",
        description="6-5-3 network, tanh, cross entropy, 40 random examples",
        build_model=partial(mlp, (6, 5, 3), "tanh"),
        loss_fn=torch.nn.functional.cross_entropy,
        load_data=lambda root: (tiny_data, tiny_test_data),
        threshold=0.7,
        constant_loss=math.log(3),
    )


def _quadratic_step(
    weights: np.ndarray,
    buffers: np.ndarray,
    matrix: np.ndarray,
    x: np.ndarray,
    noise: np.ndarray,
    *,
    order: str,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    start = matrix @ weights if order == "cta" else weights
    direction = x * start + noise
    buffers = momentum * buffers + (1 - dampening) * direction if momentum else np.zeros_like(buffers)
    if momentum:
        direction = direction + momentum * buffers if nesterov else buffers
    if order == "atc":
        return matrix @ (weights - direction), buffers
    return (start if order == "cta" else matrix @ weights) - direction, buffers


@pytest.fixture(scope="session")
def quadratic_step() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """One DPSGD step written down from theory.md sec. 2, on a quadratic that all learners share.

    (weights (..., n, h), momentum buffers times alpha, M (..., n, n), x = alpha lambda (h,), alpha times the gradient noise)
    -> new weights and buffers, h Hessian modes at once.
    """
    return _quadratic_step


@pytest.fixture(scope="session")
def step_matrix(quadratic_step: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Callable[..., np.ndarray]:
    """(M, x, momentum=..., ...) -> the same step as a matrix (2 (n - 1), 2 (n - 1)) on the disagreement and its buffers."""

    def build(matrix: np.ndarray, x: float, **rule: Any) -> np.ndarray:
        n = len(matrix)
        basis = np.linalg.svd(np.ones((1, n)))[2][1:].T  # (n, n - 1), orthogonal to the vector of ones
        columns = []
        for part in (0, 1):
            for k in range(n - 1):
                state = [np.zeros((n, 1)), np.zeros((n, 1))]
                state[part] = basis[:, k : k + 1]
                after = quadratic_step(*state, matrix, np.array([x]), np.zeros(1), **rule)
                columns.append(np.concatenate([basis.T @ after[0], basis.T @ after[1]]))
        return np.concatenate(columns, axis=1)

    return build
