from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from landscape.training import TrainConfig

BASE: dict[str, Any] = {"algorithm": "dpsgd", "learning_rate": 0.1}
CONFIGS = [
    TrainConfig("ssgd", 0.1),
    TrainConfig("ssgd-star", 1 / 3, sigma0=0.01, momentum=0.9, nesterov=True),
    TrainConfig("ssgd-star", 1e-7, sigma0="runs/earlier"),
    TrainConfig("dpsgd", 2.0, num_learners=16, local_batch_size=7, num_steps=3, topology="random-pairing", order="atc",
                momentum=0.5, dampening=0.25, weight_decay=1e-4, schedule="warmup:2+cosine:0.1", gamma=0.3,
                checkpoint_every=0, log_every=1, seed=12, dtype="float64", tf32=True),
]  # fmt: skip


def unchecked(**given: Any) -> TrainConfig:
    """A config made past the run-time type checks that tests put around it, and through its own."""
    config = object.__new__(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        object.__setattr__(config, field.name, given.get(field.name, field.default))
    config.__post_init__()
    return config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("algorithm", "sgd"), ("algorithm", "DPSGD"), ("order", "caw"), ("dtype", "bfloat16"),
        ("learning_rate", 0.0), ("learning_rate", -0.1), ("learning_rate", math.nan), ("learning_rate", math.inf),
        ("num_learners", 0), ("num_learners", -2), ("local_batch_size", 0), ("num_steps", 0), ("log_every", 0),
        ("checkpoint_every", -1),
        ("momentum", 1.0), ("momentum", -0.1), ("momentum", math.nan),
        ("dampening", 1.0), ("dampening", -0.1), ("dampening", math.nan),
        ("weight_decay", -1e-4), ("weight_decay", math.nan), ("weight_decay", math.inf),
        ("gamma", -0.1), ("gamma", 1.1), ("gamma", math.nan),
        ("seed", -1), ("nesterov", True), ("sigma0", 0.1), ("sigma0", "runs/earlier"),
        ("schedule", "linear"), ("schedule", "cosine:nan"), ("schedule", ""),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} ") as caught:
        unchecked(**{**BASE, field: value})
    assert field in ("nesterov", "sigma0") or str(value) in str(caught.value)


@pytest.mark.parametrize("sigma0", [-0.1, math.nan, math.inf])
def test_a_bad_noise_level_is_named(sigma0: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma0 "):
        TrainConfig("ssgd-star", 0.1, sigma0=sigma0)


def test_nesterov_needs_momentum_without_dampening() -> None:
    with pytest.raises(ValueError, match="nesterov needs momentum, and no dampening"):
        TrainConfig(**BASE, nesterov=True, momentum=0.9, dampening=0.1)
    TrainConfig(**BASE, nesterov=True, momentum=0.9)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"learning_rate .*; num_steps .*; momentum .*; schedule "):
        TrainConfig("dpsgd", -1.0, num_steps=0, momentum=2.0, schedule="linear")


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config: TrainConfig) -> None:
    stored = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert TrainConfig.from_json(stored) == config
    assert set(stored) == {f.name for f in dataclasses.fields(TrainConfig)}


def test_a_stored_config_may_have_fields_more_and_fewer() -> None:
    assert TrainConfig.from_json({**BASE, "of_a_later_version": 1}) == TrainConfig(**BASE)


def test_changes_name_the_fields_but_not_the_device() -> None:
    mine = TrainConfig(**BASE)
    assert mine.changes(TrainConfig(**BASE)) == {}
    assert mine.changes(dataclasses.replace(mine, device="cuda")) == {}
    assert mine.changes(dataclasses.replace(mine, learning_rate=0.2, seed=3)) == {
        "learning_rate": (0.1, 0.2),
        "seed": (0, 3),
    }


def test_dtypes_and_devices() -> None:
    assert TrainConfig(**BASE).torch_dtype == torch.float32
    assert TrainConfig(**BASE, dtype="float64").torch_dtype == torch.float64
    assert TrainConfig(**BASE).torch_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="no such device: gpu; use cpu or cuda"):
        TrainConfig(**BASE, device="gpu").torch_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA; torch sees a device")
def test_cuda_where_there_is_none_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device here; use --device cpu"):
        TrainConfig(**BASE, device="cuda").torch_device()
