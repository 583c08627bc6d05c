from pathlib import Path

import numpy as np
import pytest

from landscape.experiments import sweep
from landscape.experiments.sweep import Variant, run_sweep, stability_map
from landscape.experiments.train import outcome, train
from landscape.results import load_dataset
from landscape.tasks import Task
from landscape.training.config import TrainConfig

BASE = TrainConfig("dpsgd", 0.3, num_learners=3, local_batch_size=8, num_steps=60, log_every=20, dtype="float64")
VARIANTS = [
    Variant("ssgd"),
    Variant("dpsgd"),
    Variant("dpsgd", "atc"),
    Variant("ssgd-star", sigma0="matched"),
    Variant("ssgd-star", sigma0=0.05),
]


def test_replicas_of_a_map_are_the_runs_they_stand_for(tiny_task: Task, tmp_path: Path) -> None:
    found = stability_map(tiny_task, BASE, VARIANTS, [0.3, 0.8], [0, 1], tmp_path / "map", quiet=True)
    assert found["median_last_loss"].dims == ("variant", "learning_rate", "seed")
    assert found["variant"].values.tolist() == ["ssgd", "dpsgd", "dpsgd-atc", "ssgd-star-matched", "ssgd-star-0.05"]
    for variant, order in (("dpsgd", "awc"), ("dpsgd-atc", "atc")):
        config = TrainConfig(
            "dpsgd",
            0.8,
            num_learners=3,
            local_batch_size=8,
            num_steps=60,
            log_every=20,
            dtype="float64",
            order=order,
            seed=1,
        )
        run = train(tiny_task, config, tmp_path / variant, quiet=True)
        here = found.sel(variant=variant, learning_rate=0.8, seed=1)
        assert float(here["median_last_loss"]) == pytest.approx(
            run.record["outcome"]["median_last_train_loss"], rel=1e-10
        )
        assert str(here["outcome"].values) == run.record["outcome"]["outcome"]
        logged = run.metrics[run.metrics["step"] % 20 == 0]
        np.testing.assert_allclose(here["train_loss"], logged["train_loss"], rtol=1e-10)
        np.testing.assert_allclose(here["sigma_w"], logged["sigma_w"], rtol=1e-10, atol=1e-16)


def test_matched_noise_follows_the_recorded_spread(tiny_task: Task, tmp_path: Path) -> None:
    found = stability_map(
        tiny_task,
        BASE,
        [Variant("dpsgd"), Variant("ssgd-star", sigma0="matched")],
        [0.3],
        [0],
        tmp_path / "map",
        quiet=True,
    )
    run = train(
        tiny_task,
        TrainConfig("dpsgd", 0.3, num_learners=3, local_batch_size=8, num_steps=60, log_every=20, dtype="float64"),
        tmp_path / "d",
        quiet=True,
    )
    star = TrainConfig(
        "ssgd-star",
        0.3,
        num_learners=3,
        local_batch_size=8,
        num_steps=60,
        log_every=20,
        dtype="float64",
        sigma0=str(run.path),
    )
    single = train(tiny_task, star, tmp_path / "s", quiet=True)
    # the run's last 50 steps are all logged, the map's every 20th: the interpolated levels differ a little
    assert found["median_last_loss"].sel(variant="ssgd-star-matched").item() == pytest.approx(
        single.record["outcome"]["median_last_train_loss"], rel=0.02
    )


def test_finished_replicas_are_not_run_again(tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stability_map(tiny_task, BASE, [Variant("dpsgd")], [0.3], [0, 1], tmp_path / "map", quiet=True)
    ran: list[int] = []
    original = sweep.run_replicas
    monkeypatch.setattr(
        sweep, "run_replicas", lambda program, *rest: ran.append(program.num_replicas) or original(program, *rest)
    )
    again = stability_map(tiny_task, BASE, [Variant("dpsgd")], [0.3, 0.8], [0, 1], tmp_path / "map", quiet=True)
    assert ran == [2]
    np.testing.assert_array_equal(
        again["median_last_loss"].sel(learning_rate=0.3), first["median_last_loss"].sel(learning_rate=0.3)
    )


def test_a_replica_that_diverges_is_recorded_with_its_step(tiny_task: Task, tmp_path: Path) -> None:
    found = stability_map(tiny_task, TrainConfig("ssgd", 1e200, num_learners=2, local_batch_size=8, num_steps=60, dtype="float64", weight_decay=10.0),
                          [Variant("ssgd")], [0.01, 1e200], [0], tmp_path / "map", quiet=True)  # fmt: skip
    assert found["outcome"].values.ravel().tolist()[1] == "non-finite"
    assert found["diverged_at"].values.ravel().tolist()[0] == -1
    assert found["diverged_at"].values.ravel().tolist()[1] >= 0
    assert found["median_last_loss"].values.ravel()[1] == np.inf


def test_outcomes() -> None:
    losses = np.array([[0.1, 2.3, 1.5, 0.1, np.nan]] * 3)
    alive = np.array([True, True, True, False, True])
    assert outcome(losses, 0.7, np.log(10), alive) == ["converged", "stuck", "slow", "non-finite", "non-finite"]


def test_matched_noise_needs_dpsgd(tiny_task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs DPSGD"):
        stability_map(tiny_task, BASE, [Variant("ssgd-star", sigma0="matched")], [0.3], [0], tmp_path, quiet=True)


def test_sweep_by_name(tmp_path: Path) -> None:
    config = TrainConfig("dpsgd", 0.5, num_learners=2, local_batch_size=10, num_steps=3)
    run_sweep("mnist-mlp-tanh", config, ("ssgd", "dpsgd-cta"), (0.5,), (0,), tmp_path, quiet=True)
    assert load_dataset(tmp_path / "stability-map.nc")["variant"].values.tolist() == ["ssgd", "dpsgd-cta"]
    with pytest.raises(ValueError, match="learning_rate"):
        run_sweep("mnist-mlp", config, ("ssgd",), (-1.0,), (0,), tmp_path, quiet=True)
