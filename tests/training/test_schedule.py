from __future__ import annotations

import math

import pytest

from landscape.training.schedule import parse_schedule

STEPS = 100


def factors(spec: str, steps: int = STEPS) -> list[float]:
    schedule = parse_schedule(spec, steps)
    return [schedule(t) for t in range(steps)]


def cosine(step: int, total: int, floor: float = 0.0) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * step / total)) / 2


CASES = [
    ("constant", [1.0] * STEPS),
    ("step:30", [1.0] * 30 + [0.1] * 70),
    ("step:30,60", [1.0] * 30 + [0.1] * 30 + [0.01] * 40),
    ("step:30,60:0.5", [1.0] * 30 + [0.5] * 30 + [0.25] * 40),
    ("step:60,30:0.5", [1.0] * 30 + [0.5] * 30 + [0.25] * 40),
    ("cosine", [cosine(t, 100) for t in range(STEPS)]),
    ("cosine:0.2", [cosine(t, 100, 0.2) for t in range(STEPS)]),
    ("warmup:4+constant", [0.25, 0.5, 0.75, 1.0] + [1.0] * 96),
    ("warmup:4:0.2+constant", [0.4, 0.6, 0.8, 1.0] + [1.0] * 96),
    ("warmup:1:0.5+constant", [1.0] * STEPS),
    ("warmup:20+cosine:0.1", [(t + 1) / 20 for t in range(20)] + [cosine(t, 80, 0.1) for t in range(80)]),
    ("warmup:20+step:30", [(t + 1) / 20 for t in range(20)] + [1.0] * 10 + [0.1] * 70),
    ("warmup:150+cosine", [(t + 1) / 150 for t in range(STEPS)]),  # a warm-up longer than the run
]


@pytest.mark.parametrize(("spec", "expected"), CASES, ids=[c[0] for c in CASES])
def test_factors_over_a_run(spec: str, expected: list[float]) -> None:
    assert factors(spec) == pytest.approx(expected, rel=1e-12)


def test_the_cosine_runs_from_one_to_its_floor() -> None:
    schedule = parse_schedule("cosine:0.2", STEPS)
    assert schedule(0) == 1
    assert schedule(STEPS // 2) == pytest.approx(0.6)
    assert schedule(STEPS) == pytest.approx(0.2)
    assert schedule(5 * STEPS) == pytest.approx(0.2)


@pytest.mark.parametrize("spec", [c[0] for c in CASES])
def test_a_schedule_is_a_pure_function_of_the_step(spec: str) -> None:
    schedule = parse_schedule(spec, STEPS)
    assert [schedule(t) for t in reversed(range(STEPS))] == factors(spec)[::-1]
    assert schedule.spec == spec


@pytest.mark.parametrize(
    "spec",
    ["", "linear", "constant:1", "step", "step:", "step:a", "step:10:b", "step:10:0.1:3", "cosine:x", "cosine:0.1:2",
     "warmup:5", "warmup+constant", "warmup:5+", "warmup:x+constant", "warmup:5:1:2+constant", "constant+constant",
     "warmup:5+warmup:5", "cosine:nan", "cosine:-0.1", "cosine:1.5", "step:10:nan", "step:10:inf", "step:10:-1"],
)  # fmt: skip
def test_what_cannot_be_read_is_quoted_with_the_usage(spec: str) -> None:
    with pytest.raises(
        ValueError, match=r"schedule '.*' cannot be read; use \[warmup:K\[:START\]\+\]constant \| step:"
    ) as caught:
        parse_schedule(spec, STEPS)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["warmup:-1+constant", "warmup:5:-0.1+constant", "warmup:5:2+cosine", "warmup:5:nan+constant"]
)
def test_a_warm_up_out_of_range_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="warm-up needs a positive number of steps and a start between 0 and 1"):
        parse_schedule(spec, STEPS)
