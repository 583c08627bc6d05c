"""What README and CHANGELOG say of stored benchmarks is what they hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.benchmarks.timing import RESULTS
from tests.checkpoints.corpus import CORPUS

RISES = {"imagenet-resnext50"}
"""Tasks of which DPSGD's loss rose in the stored row."""


def stored(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def test_eighteen_tasks_train_on_both_backends_and_are_foreseen_within_a_factor_of_two() -> None:
    rows = stored("tasks_cpu")["rows"]
    assert len({row["task"] for row in rows}) == 18
    for row in rows:
        for algorithm in ("ssgd", "dpsgd"):
            run = row[algorithm]
            falls = max(run["loss_last"], run["loss_last_two_processes"]) < run["loss_first"]
            assert falls != (algorithm == "dpsgd" and row["task"] in RISES), (row["task"], algorithm)
        assert min(row["dpsgd"]["sigma_w"], row["dpsgd"]["sigma_w_two_processes"]) > 0
        curvature = row["curvature"]
        assert 0.5 < curvature["preflight_seconds_per_product"] / curvature["seconds_per_product"] < 2, row["task"]
        assert 0.5 < curvature["preflight_bytes"] / curvature["bytes"] < 2, row["task"]
        assert curvature["density_mass"] == pytest.approx(1, abs=0.01)
        assert row["full_step"]["finite"]


def test_ten_thousand_tries_of_every_layout_without_a_failure() -> None:
    formats = stored("fuzz_importers")["formats"]
    assert formats.keys() == CORPUS.keys()
    for name, found in formats.items():
        assert (found["tries"], found["crashes"], found["failures"]) == (10_000, 0, []), name
        assert found["slowest_s"] < 0.4
    assert 35 < sum(found["seconds"] for found in formats.values()) / 60 < 40
