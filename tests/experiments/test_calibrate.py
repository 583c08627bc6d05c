from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from landscape.checkpoints import CheckpointError, Run, open_run
from landscape.experiments.calibrate import _check, calibrate_noise, calibrate_shapes, layer_sizes, run_points
from landscape.experiments.profiles import load_profile, matched_points, save_profile, stored_profile
from landscape.experiments.run_directory import NOISE_FILE
from landscape.experiments.train import train
from landscape.functional import ParameterLayout
from landscape.noise.draws import draw_gradients
from landscape.objective import Objective
from landscape.tasks import Task
from landscape.training import TrainConfig
from landscape.training.noise import SHAPES, NoiseProfile
from landscape.training.topology import topology

BASE: dict[str, Any] = {
    "num_learners": 4, "local_batch_size": 5, "num_steps": 12, "checkpoint_every": 3, "log_every": 3, "seed": 2, "dtype": "float64",
}  # fmt: skip
STAR = TrainConfig("ssgd-star", 0.3, sigma0="to be named", noise_shape="diagonal", **BASE)


@pytest.fixture(scope="module")
def runs(tiny_task: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    configs = {
        "dpsgd": TrainConfig("dpsgd", 0.3, **BASE),
        "cta": TrainConfig("dpsgd", 0.3, order="cta", topology="random-pairing", gamma=0.7, gamma_schedule="step:6:0.5", **BASE),
        "ssgd": TrainConfig("ssgd", 0.3, **BASE),
        "one": TrainConfig("dpsgd", 0.3, **{**BASE, "num_learners": 1}),
        "equal": TrainConfig("dpsgd", 0.3, order="atc", topology="complete", **BASE),
    }  # fmt: skip
    return {name: train(tiny_task, config, folder / name, quiet=True) for name, config in configs.items()}


@pytest.fixture(scope="module")
def objective(tiny_task: Task) -> Objective:
    return Objective(tiny_task.build_model().double(), tiny_task.loss_fn, tiny_task.load_data(None)[0])


def gradient_noise(objective: Objective, run: Run, step: int, num_draws: int) -> torch.Tensor:
    learners = run.learners(step)
    draws = draw_gradients(
        objective, learners.mean, run_points(run, learners), num_learners=4, local_batch_size=5, num_draws=num_draws, seed=1
    )  # fmt: skip
    return draws.at_points - draws.at_mean


# On the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_on_the_weights_has_the_variance_of_the_deviations(runs: dict[str, Run], shape: Any) -> None:
    found = calibrate_noise(runs["dpsgd"], shape=shape)
    assert (found.steps, found.layers) == ((0, 3, 6, 9, 12), (35, 18))
    expected = [runs["dpsgd"].learners(s).consensus_distance ** 2 for s in found.steps]
    np.testing.assert_allclose(found.total_variance, expected, rtol=1e-12)
    assert found.total_variance[0] == 0
    sigma_w = runs["dpsgd"].learners(9).deviations
    covariance = sigma_w.T @ sigma_w / 4
    if shape == "low-rank":
        torch.testing.assert_close(found.factors[3].T @ found.factors[3], covariance)
    if shape == "diagonal":
        torch.testing.assert_close(found.factors[3].square(), covariance.diag())
    if shape == "layer":
        parts = [float(p.mean()) for p in covariance.diag().split([35, 18])]
        assert found.factors[3].square().tolist() == pytest.approx(parts)


def test_under_cta_the_gradient_points_are_matched(runs: dict[str, Run]) -> None:
    """(M w)_j, with M damped as it was at that step."""
    run, step = runs["cta"], 9
    matrix = topology("random-pairing", 4).damped(0.35).matrix(2, step)
    learners = run.learners(step)
    assert learners.facts["mixing"] == matrix.tolist()
    points = torch.from_numpy(matrix) @ learners.weights
    assert torch.equal(run_points(run, learners), points)
    found = calibrate_noise(run, shape="low-rank")
    exact = float((points - learners.mean).square().sum() / 4)
    assert found.total_variance[3] == pytest.approx(exact, rel=1e-12)
    assert exact < 0.9 * learners.consensus_distance**2


def test_refreshes_are_where_they_are_asked_for(runs: dict[str, Run]) -> None:
    assert calibrate_noise(runs["dpsgd"], every=6).steps == (0, 6, 12)
    with pytest.raises(
        ValueError, match="no checkpoint of step 2, so its noise cannot be refreshed every 2 steps; there are 0, 3, 6"
    ):
        calibrate_noise(runs["dpsgd"], every=2)


# On the gradient -----------------------------------------------------------------------------------------------------


def test_noise_on_the_gradient_has_the_second_moment_of_the_landscape_noise(
    tiny_task: Task, runs: dict[str, Run], objective: Objective
) -> None:
    run = runs["dpsgd"]
    rows = gradient_noise(objective, run, 9, 8)
    kinds: list[Any] = [(s, d) for s in SHAPES for d in ("as-noise", "removed", "added", "alone")]
    found = calibrate_shapes(run, "gradient", kinds, num_draws=8, seed=1, every=9, task=tiny_task)
    learners = run.learners(9)
    drift = objective.stacked_gradients(learners.weights).mean(0) - objective.gradient(learners.mean)
    whole, centred = float(rows.square().sum() / 8), float((rows - drift).square().sum() / 8)
    for shape in SHAPES:
        assert found[shape, "as-noise"].total_variance[1] == pytest.approx(whole, rel=1e-10)
        assert found[shape, "removed"].total_variance[1] == pytest.approx(centred, rel=1e-10)
        assert found[shape, "added"].total_variance[1] == pytest.approx(centred, rel=1e-10)
        assert found[shape, "alone"].total_variance[1] == 0
        assert found[shape, "removed"].drift is None
        for kind in ("added", "alone"):
            held = found[shape, kind].drift
            assert held is not None
            torch.testing.assert_close(held[1], drift)
            assert not held[0].any()
    torch.testing.assert_close(found["low-rank", "as-noise"].factors[1], rows / math.sqrt(8))
    assert found["low-rank", "as-noise"].facts["num_draws"] == 8
    alone = found["isotropic", "alone"].sample(9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(alone, drift)


def test_the_strength_splits_into_drift_and_fluctuations(
    tiny_task: Task, runs: dict[str, Run], objective: Objective
) -> None:
    """E|xi_D|^2 = |E xi_D|^2 + Tr Cov, over 600 draws: the difference of the two profiles is the exact drift's square."""
    rows = gradient_noise(objective, runs["dpsgd"], 12, 600)
    learners = runs["dpsgd"].learners(12)
    drift = objective.stacked_gradients(learners.weights).mean(0) - objective.gradient(learners.mean)
    gap = rows.square().sum(1) - (rows - drift).square().sum(1)
    stderr = float(gap.std() / math.sqrt(len(gap)))
    assert abs(float(gap.mean()) - float(drift @ drift)) < 4 * stderr
    assert stderr < float(rows.square().sum(1).mean())


# SSGD* with it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["weights", "gradient"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ssgd_star_trains_with_it_and_resumes_bit_identically(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path, place: Any, shape: Any
) -> None:
    """Even where the run that was matched is gone: the profile is the run's own."""
    source = tmp_path / "source"
    shutil.copytree(runs["dpsgd"].path, source)
    calls = {"left": 10**9}

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise InterruptedError
        return F.cross_entropy(output, target, reduction="none")

    task = dataclasses.replace(tiny_task, loss_fn=loss)
    config = dataclasses.replace(STAR, sigma0=str(source), noise_place=place, noise_shape=shape, noise_every=3)
    whole = train(task, config, tmp_path / "whole", quiet=True)
    calls["left"] = 10**9
    held = stored_profile(whole)
    assert held is not None
    assert (held.place, held.shape, held.facts["source"]) == (place, shape, "source")
    used = 10**9 - calls["left"]
    train(task, config, tmp_path / "count", quiet=True)
    used = 10**9 - calls["left"]
    calls["left"] = round(0.8 * used)
    with pytest.raises(InterruptedError):
        train(task, config, tmp_path / "cut", quiet=True)
    shutil.rmtree(source)
    calls["left"] = 10**9
    assert open_run(tmp_path / "cut").steps[-1] < 12
    found = train(task, config, tmp_path / "cut", resume=True, quiet=True)
    for step in whole.steps:
        assert torch.equal(found.learners(step).weights, whole.learners(step).weights)
        assert found.learners(step).facts == whole.learners(step).facts
    assert found.record["outcome"] == whole.record["outcome"]
    told = whole.learners(6).facts.get("sigma0")
    if place == "gradient":
        assert told == 0
    elif shape == "isotropic":
        assert told == pytest.approx(math.sqrt(held.total_variance[2] / 53))
    else:
        assert told is None


def test_a_profile_by_its_file_is_the_profile_of_its_run(tiny_task: Task, runs: dict[str, Run], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_profile(calibrate_noise(runs["dpsgd"], shape="diagonal"), path)
    by_run = train(tiny_task, dataclasses.replace(STAR, sigma0=str(runs["dpsgd"].path)), tmp_path / "a", quiet=True)
    by_file = train(tiny_task, dataclasses.replace(STAR, sigma0=str(path)), tmp_path / "b", quiet=True)
    assert torch.equal(by_run.learners(12).weights, by_file.learners(12).weights)
    for changes, message in (
        ({"noise_shape": "layer"}, "noise shape diagonal, not layer; say so with --noise-shape diagonal"),
        ({"noise_place": "gradient"}, "noise place weights, not gradient"),
        ({"noise_every": 3}, "refreshes of its own; leave --noise-every out"),
        ({"sigma0": str(tmp_path / "none.safetensors")}, "is neither a run nor a noise profile"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_task, dataclasses.replace(STAR, **{"sigma0": str(path), **changes}), tmp_path / "c", quiet=True)
        assert not (tmp_path / "c").exists()


def test_the_points_of_a_run_with_matched_noise(tiny_task: Task, runs: dict[str, Run], tmp_path: Path) -> None:
    config = dataclasses.replace(STAR, sigma0=str(runs["dpsgd"].path), noise_zero_sum=True)
    run = train(tiny_task, config, tmp_path / "run", quiet=True)
    learners, profile = run.learners(9), stored_profile(run)
    assert profile is not None
    points = matched_points(run, learners, profile)
    assert callable(points)
    noise = torch.stack([points(draw) - learners.weights for draw in range(500)])
    assert float(noise.sum(1).abs().max()) < 1e-10
    squares = noise.square().sum(2).flatten()
    assert abs(float(squares.mean()) - profile.total_variance[3]) < 4 * float(squares.std()) / math.sqrt(
        len(squares) / 4
    )
    assert torch.equal(points(3), points(3))
    assert stored_profile(runs["dpsgd"]) is None


# On disk -------------------------------------------------------------------------------------------------------------


def test_a_profile_survives_the_disk(tiny_task: Task, runs: dict[str, Run], tmp_path: Path) -> None:
    made = calibrate_noise(
        runs["dpsgd"], place="gradient", shape="low-rank", drift="added", num_draws=4, task=tiny_task
    )
    save_profile(made, tmp_path / "p.safetensors")
    found = load_profile(tmp_path / "p.safetensors")
    for name in ("steps", "place", "shape", "layers", "drift_mode"):
        assert getattr(found, name) == getattr(made, name)
    assert dict(found.facts) == dict(made.facts)
    assert made.drift is not None
    assert found.drift is not None
    assert torch.equal(found.drift, made.drift)
    assert torch.equal(found.factors, made.factors)


def test_files_that_hold_no_profile_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        load_profile(tmp_path / "p.safetensors")
    (tmp_path / "p.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_profile(tmp_path / "p.safetensors")
    safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match="holds no noise profile"):
        load_profile(tmp_path / "q.safetensors")


def test_a_run_killed_after_its_profile_is_begun_again(tiny_task: Task, runs: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NOISE_FILE).write_bytes(b"cut short")
    config = dataclasses.replace(STAR, sigma0=str(runs["dpsgd"].path))
    assert train(tiny_task, config, tmp_path / "run", quiet=True).status == "complete"


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ssgd", {}, "a run of ssgd with 4 learner.*has no disagreement to match; name a DPSGD run"),
        ("one", {}, "a run of dpsgd with 1 learner"),
        (
            "equal",
            {},
            r"equal: the learners are equal at every checkpoint used \(steps 0, 3, 6, 9, 12\), so there is no disagreement",
        ),
        ("dpsgd", {"every": 13}, r"the learners are equal at every checkpoint used \(steps 0\)"),
        ("dpsgd", {"shape": "round"}, "no such noise shape: round; there are isotropic, layer, diagonal, low-rank"),
        ("dpsgd", {"place": "bias"}, "no such place for noise: bias; there are weights, gradient"),
        ("dpsgd", {"place": "gradient", "drift": "gone"}, "no such treatment of the drift: gone"),
        ("dpsgd", {"drift": "removed"}, "drift removed is for noise on the gradient"),
    ],
)
def test_mistakes_are_explained_in_a_line(
    tiny_task: Task, runs: dict[str, Run], name: str, options: dict[str, Any], message: str
) -> None:
    def call() -> None:
        kind = (options.get("shape", "isotropic"), options.get("drift", "as-noise"))
        _check(runs[name], options.get("place", "weights"), [kind])
        calibrate_noise(runs[name], every=options.get("every"), task=tiny_task)

    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["weights", "gradient"])
def test_checkpoints_that_are_not_finite(
    tiny_task: Task, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    """Weights never are in a run of ours; gradients may overflow at the last checkpoints of one that diverged."""
    original = Run.learners

    def broken(value: float) -> Any:
        def learners(self: Run, step: int) -> Any:
            found = original(self, step)
            if step < 9:
                return found
            return dataclasses.replace(
                found, weights=found.weights + value * torch.arange(4, dtype=torch.float64)[:, None]
            )

        return learners

    monkeypatch.setattr(Run, "learners", broken(math.nan))
    with pytest.raises(ValueError, match="the checkpoint of step 9 holds weights that are not finite"):
        calibrate_noise(runs["dpsgd"], place=place, task=tiny_task, num_draws=2)
    if place == "weights":
        return
    monkeypatch.setattr(Run, "learners", broken(2e307))
    with pytest.raises(ValueError, match="the noise at step 9 is not finite"):
        calibrate_noise(runs["dpsgd"], place=place, task=tiny_task, num_draws=2)
    diverged = Run(runs["dpsgd"].path, {**runs["dpsgd"].record, "status": "diverged"})
    assert calibrate_noise(diverged, place=place, task=tiny_task, num_draws=2).steps == (0, 3, 6)


def test_layers_are_the_modules_that_own_parameters() -> None:
    layout = ParameterLayout(
        ("scale", "a.weight", "a.bias", "a.inner.weight", "b.weight"), tuple(torch.Size([k]) for k in (1, 2, 3, 4, 5))
    )
    assert layer_sizes(layout) == (1, 5, 4, 5)


def test_the_type_of_a_profile_is_the_runs(runs: dict[str, Run]) -> None:
    made = calibrate_noise(runs["dpsgd"], shape="layer")
    assert isinstance(made, NoiseProfile)
    assert made.factors.dtype == torch.float64
