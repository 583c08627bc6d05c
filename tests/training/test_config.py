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
    TrainConfig("ssgd-star", 1e-7, sigma0="runs/earlier", noise_place="gradient", noise_shape="low-rank", noise_drift="added",
                noise_every=5),
    TrainConfig("dpsgd", 2.0, num_learners=16, local_batch_size=7, num_steps=3, topology="random-pairing", order="atc",
                momentum=0.5, dampening=0.25, weight_decay=1e-4, schedule="warmup:2+cosine:0.1", gamma=0.3,
                gamma_schedule="step:1:0.5", checkpoint_every=0, log_every=1, seed=12, dtype="float64", tf32=True),
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
        ("noise_every", -1), ("noise_every", 3), ("noise_shape", "diagonal"), ("noise_place", "gradient"), ("noise_zero_sum", True),
        ("gamma_schedule", "linear"), ("gamma_schedule", "step:5:1.5"),
        ("schedule", "linear"), ("schedule", "cosine:nan"), ("schedule", ""),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} ") as caught:
        unchecked(**{**BASE, field: value})
    assert field in ("nesterov", "sigma0", "noise_every", "noise_zero_sum", "gamma_schedule") or str(value) in str(
        caught.value
    )


@pytest.mark.parametrize("sigma0", [-0.1, math.nan, math.inf])
def test_a_bad_noise_level_is_named(sigma0: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma0 "):
        TrainConfig("ssgd-star", 0.1, sigma0=sigma0)


def test_nesterov_needs_momentum_without_dampening() -> None:
    with pytest.raises(ValueError, match="nesterov needs momentum, and no dampening"):
        TrainConfig(**BASE, nesterov=True, momentum=0.9, dampening=0.1)
    TrainConfig(**BASE, nesterov=True, momentum=0.9)


def test_matched_noise_of_no_such_kind_is_refused() -> None:
    star = {**BASE, "algorithm": "ssgd-star", "sigma0": "runs/earlier"}
    with pytest.raises(
        ValueError, match="noise_shape must be one of isotropic, layer, diagonal, low-rank, not 'round'"
    ):
        unchecked(**star, noise_shape="round")
    with pytest.raises(ValueError, match="noise_drift is for noise on the gradient"):
        TrainConfig(**star, noise_drift="removed")
    with pytest.raises(ValueError, match="noise_zero_sum is for ssgd-star with noise on the weights"):
        TrainConfig(**star, noise_place="gradient", noise_zero_sum=True)
    with pytest.raises(ValueError, match="noise_zero_sum needs at least 2 learners"):
        TrainConfig("ssgd-star", 0.1, sigma0=0.1, num_learners=1, noise_zero_sum=True)


@pytest.mark.parametrize(
    ("changes", "calibrated"),
    [({}, False), ({"noise_every": 5}, True), ({"noise_shape": "layer"}, True), ({"noise_place": "gradient"}, True),
     ({"sigma0": "noise.safetensors"}, True), ({"sigma0": 0.1}, False)],
)  # fmt: skip
def test_when_noise_comes_from_checkpoints(changes: dict[str, Any], calibrated: bool) -> None:
    star = {**BASE, "algorithm": "ssgd-star", "sigma0": "runs/earlier", **changes}
    assert TrainConfig(**star).is_calibrated is calibrated


@pytest.mark.parametrize(
    ("schedule", "at", "ends"),
    [("constant", {0: 0.4, 9: 0.4}, (0.4, 0.4)), ("step:3:0.5", {2: 0.4, 3: 0.2}, (0.2, 0.4)), ("step:3,6:1.5", {7: 0.9}, (0.4, 0.9)),
     ("warmup:4+cosine:0.5", {0: 0.1, 3: 0.4, 10: 0.2}, (0.1, 0.4))],
)  # fmt: skip
def test_gamma_over_the_steps(schedule: str, at: dict[int, float], ends: tuple[float, float]) -> None:
    config = TrainConfig(**BASE, gamma=0.4, gamma_schedule=schedule, num_steps=10)
    assert {t: round(config.gamma_at(t), 12) for t in at} == at
    low, high = config.gamma_range
    every = [config.gamma_at(t) for t in range(10)]
    assert (low, high) == (min(every), max(every))
    assert high == pytest.approx(ends[1])
    assert low == pytest.approx(ends[0], rel=0.1)  # a cosine's last step is short of its floor


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
