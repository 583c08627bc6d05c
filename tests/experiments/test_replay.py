from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from landscape.checkpoints import Run, open_run
from landscape.experiments.measure import measure
from landscape.experiments.replay import compare, replay
from landscape.experiments.train import train
from landscape.tasks import Task
from landscape.training import TrainConfig

BASE: dict[str, Any] = {
    "num_learners": 4, "local_batch_size": 5, "num_steps": 62, "checkpoint_every": 4, "log_every": 3, "seed": 2,
}  # fmt: skip
CONFIGS = {
    "ssgd": TrainConfig("ssgd", 0.2, momentum=0.5, **BASE),
    "ssgd-star": TrainConfig("ssgd-star", 0.2, sigma0=0.05, noise_zero_sum=True, **BASE),
    "dpsgd": TrainConfig("dpsgd", 0.2, topology="random-pairing", momentum=0.9, nesterov=True, schedule="warmup:5+cosine",
                         gamma=0.8, gamma_schedule="step:30:0.5", **BASE),
    "dpsgd-cta": TrainConfig("dpsgd", 0.2, topology="one-peer-exponential", order="cta", momentum=0.5, dtype="float64", **BASE),
}  # fmt: skip


def lines(run: Run) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "elapsed"} for e in entries]


def assert_same_from(found: Run, expected: Run, step: int) -> None:
    """Bitwise: weights, buffers, momentum and facts of every checkpoint from a step on, and every logged number."""
    assert found.status == expected.status
    assert found.steps == [s for s in expected.steps if s >= step]
    for s in found.steps:
        a, b = found.learners(s), expected.learners(s)
        assert torch.equal(a.weights, b.weights)
        assert (a.momentum is None) == (b.momentum is None)
        assert a.momentum is None or torch.equal(a.momentum, b.momentum)
        assert {n: t.numpy().tobytes() for n, t in a.buffers.items()} == {
            n: t.numpy().tobytes() for n, t in b.buffers.items()
        }
        assert a.facts == b.facts
    assert lines(found) == lines(expected)


@pytest.fixture(scope="module")
def runs(tiny_task: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(tiny_task, config, folder / name, quiet=True) for name, config in CONFIGS.items()}


# Nothing changed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), [*((n, 8) for n in CONFIGS), ("dpsgd", 0), ("dpsgd", 60)])
def test_with_nothing_changed_a_replay_repeats_the_run(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path, name: str, step: int
) -> None:
    found = replay(runs[name], step, tmp_path / "replay", task=tiny_task, quiet=True)
    assert_same_from(found, runs[name], step)
    assert found.record["replayed"] == {"path": name, "step": step, "changes": {}, "averaged": False}
    assert found.config == runs[name].config
    if step < 12:  # judged on its own last 50 steps, which are the run's
        assert found.record["outcome"] == runs[name].record["outcome"]


def test_batch_norm_and_dropout_are_repeated(tiny_task: Task, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3))

    task = dataclasses.replace(tiny_task, build_model=build)
    run = train(task, dataclasses.replace(CONFIGS["dpsgd"], num_steps=12), tmp_path / "run", quiet=True)
    assert_same_from(replay(run, 8, tmp_path / "replay", task=task, quiet=True), run, 8)
    single = replay(run, 8, tmp_path / "mean", algorithm="ssgd", task=task, quiet=True).learners(8)
    source = run.learners(8)
    torch.testing.assert_close(single.buffers["1.running_mean"][2], source.buffers["1.running_mean"].mean(0))
    assert int(single.buffers["1.num_batches_tracked"][1]) == 8


def test_a_replay_that_was_cut_off_resumes(tiny_task: Task, runs: dict[str, Run], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def cut(after: int) -> Task:
        calls = 0

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Stop
            return F.cross_entropy(output, target, reduction="none")

        return dataclasses.replace(tiny_task, loss_fn=loss)

    for after in (1, 2, 40):  # the first call sees whether the data fit
        with pytest.raises(Stop):
            replay(runs["dpsgd-cta"], 8, tmp_path / "cut", order="awc", task=cut(after), resume=True, quiet=True)
        assert open_run(tmp_path / "cut").status == "running"
    found = replay(runs["dpsgd-cta"], 8, tmp_path / "cut", order="awc", task=cut(10**9), resume=True, quiet=True)
    whole = replay(runs["dpsgd-cta"], 8, tmp_path / "whole", order="awc", task=cut(10**9), quiet=True)
    assert_same_from(found, whole, 8)
    again = replay(runs["dpsgd-cta"], 8, tmp_path / "cut", order="awc", task=tiny_task, resume=True, quiet=True)
    assert again.status == "complete"
    with pytest.raises(ValueError, match="begins elsewhere"):
        replay(runs["dpsgd-cta"], 12, tmp_path / "cut", order="awc", task=tiny_task, resume=True, quiet=True)
    with pytest.raises(ValueError, match="begins elsewhere"):
        train(tiny_task, found.config, tmp_path / "cut", resume=True, quiet=True)
    with pytest.raises(ValueError, match="already holds a run"):
        replay(runs["dpsgd-cta"], 8, tmp_path / "cut", order="awc", task=tiny_task, quiet=True)


# Something changed ---------------------------------------------------------------------------------------------------


CHANGES: list[dict[str, Any]] = [
    {"order": "atc"}, {"topology": "ring"}, {"topology": nx.star_graph(3)}, {"learning_rate": 0.05}, {"gamma": 0.0}, {"num_steps": 20},
    {"algorithm": "ssgd"}, {"algorithm": "ssgd-star", "sigma0": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[" ".join(c) for c in CHANGES])
def test_a_change_acts_from_the_step_on_and_is_recorded(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path, change: dict[str, Any]
) -> None:
    source = runs["dpsgd-cta"]
    found = replay(source, 12, tmp_path / "replay", task=tiny_task, quiet=True, **change)
    assert found.status == "complete"
    assert set(found.record["replayed"]["changes"]) == set(change)
    assert found.steps[:2] == [12, 16]
    assert not torch.equal(found.learners(16).weights, source.learners(16).weights) or "num_steps" in change
    end = found.config.num_steps
    assert found.steps[-1] == end == change.get("num_steps", 62)
    history = [e for e in lines(source) if e["step"] < 12]
    assert lines(found)[: len(history)] == history
    names = {"dpsgd": {"mean", "disagreement"}}.get(found.config.algorithm, {"mean"})
    assert set(found.record["topology"]["thresholds"]) == names


def test_from_dpsgd_to_ssgd_every_learner_starts_at_the_mean(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the step that follows is SSGD's with the averaged buffer and the run's minibatches, not a first step."""
    source, step = runs["dpsgd-cta"], 20
    found = replay(source, step, tmp_path / "replay", algorithm="ssgd", num_steps=24, task=tiny_task)
    assert "every learner starts at w_a, with momentum and buffers averaged" in capsys.readouterr().err
    assert found.record["replayed"]["averaged"]
    before, after = source.learners(step), found.learners(step)
    assert torch.equal(after.weights, before.mean.expand_as(before.weights))
    assert before.momentum is not None
    buffer, weights = before.momentum.mean(0), before.mean.clone()
    from landscape.data.sampling import IndexSampler

    data, sampler = tiny_task.load_data(None)[0], IndexSampler((2,), 4, 5, 40)
    model = tiny_task.build_model().double()
    for t in range(step, 24):
        indices = sampler.indices(t)
        gradients = []
        for j in range(4):
            nn.utils.vector_to_parameters(weights, model.parameters())
            model.zero_grad()
            F.cross_entropy(model(data.inputs[indices[j]]), data.targets[indices[j]]).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        buffer = 0.5 * buffer + torch.stack(gradients).mean(0)
        weights = weights - 0.2 * buffer
    torch.testing.assert_close(found.learners(24).weights[1], weights, rtol=1e-12, atol=1e-12)


def test_between_algorithms_without_disagreement_nothing_is_averaged(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path
) -> None:
    found = replay(
        runs["ssgd"],
        8,
        tmp_path / "a",
        algorithm="dpsgd",
        order="atc",
        topology="complete",
        num_steps=20,
        task=tiny_task,
        quiet=True,
    )
    assert not found.record["replayed"]["averaged"]
    expected = runs["ssgd"].learners(20).weights  # ATC under complete mixing is SSGD, from equal weights and buffers
    torch.testing.assert_close(found.learners(20).weights, expected, rtol=0, atol=1e-5)
    quiet = replay(runs["ssgd-star"], 8, tmp_path / "b", algorithm="ssgd", num_steps=20, task=tiny_task, quiet=True)
    assert (quiet.config.sigma0, quiet.config.noise_zero_sum) == (0.0, False)


def test_a_replay_can_be_measured_and_replayed(tiny_task: Task, runs: dict[str, Run], tmp_path: Path) -> None:
    first = replay(runs["dpsgd-cta"], 8, tmp_path / "first", order="awc", num_steps=20, task=tiny_task, quiet=True)
    second = replay(first, 16, tmp_path / "second", gamma=0.5, task=tiny_task, quiet=True)
    assert second.record["replayed"]["path"] == "first"
    groups = measure(first, ("effective-learning-rate",), [8], task=tiny_task, quiet=True)
    assert groups["effective-learning-rate"]["step"].values.tolist() == [8]
    table = compare([runs["dpsgd-cta"], first.path, second])
    assert table["run"].tolist() == ["dpsgd-cta", "first", "second"]
    assert table["replayed"].tolist() == ["", "dpsgd-cta at 8", "first at 16"]
    assert table["order"].tolist() == ["cta", "awc", "awc"]
    assert table["step"].tolist() == [62, 20, 20]
    last = lines(second)[-1]
    assert table["train_loss"].iloc[2] == last["train_loss"]
    assert table["consensus_distance"].iloc[2] == pytest.approx(second.learners(20).consensus_distance, rel=1e-6)


def test_matched_noise_is_that_of_the_run_that_is_replayed(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path
) -> None:
    star = TrainConfig(
        "ssgd-star", 0.2, sigma0=str(runs["dpsgd-cta"].path), noise_shape="diagonal", dtype="float64", **BASE
    )
    source = train(tiny_task, star, tmp_path / "star", quiet=True)
    found = replay(source, 8, tmp_path / "replay", task=tiny_task, quiet=True)
    assert_same_from(found, source, 8)
    other = replay(source, 8, tmp_path / "other", noise_shape="layer", num_steps=20, task=tiny_task, quiet=True)
    assert not torch.equal(other.learners(20).weights, source.learners(20).weights)
    plain = replay(source, 8, tmp_path / "plain", sigma0=0.01, num_steps=20, task=tiny_task, quiet=True)
    assert (plain.config.noise_shape, plain.config.sigma0) == ("isotropic", 0.01)


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (7, {}, "has no checkpoint of step 7; there are 0, 4, 8"),
        (8, {"topology": nx.cycle_graph(5)}, "is for 5 learners, but there are 4"),
        (8, {"topology": "moebius"}, "no such topology: moebius"),
        (62, {}, "nothing is left to replay after step 62 of 62"),
        (8, {"num_steps": 8}, "nothing is left to replay"),
        (8, {"sigma0": 0.1}, "sigma0 is for ssgd-star only"),
        (8, {"learning_rate": -1.0}, "learning_rate must be a positive number"),
        (8, {"num_steps": 30}, "cosine stretches over num_steps"),
    ],
)
def test_mistakes_are_explained_in_a_line(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path, step: int, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replay(runs["dpsgd"], step, tmp_path / "replay", task=tiny_task, quiet=True, **change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "replay").exists()


def test_its_own_directory_is_refused_even_to_overwrite(tiny_task: Task, runs: dict[str, Run]) -> None:
    with pytest.raises(ValueError, match="needs a directory of its own"):
        replay(runs["dpsgd"], 8, runs["dpsgd"].path, task=tiny_task, overwrite=True, quiet=True)


def test_weights_that_are_not_finite_cannot_be_replayed(
    tiny_task: Task, runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dataclasses.replace(runs["dpsgd"].learners(8), weights=torch.full((4, 53), torch.nan))
    monkeypatch.setattr(Run, "learners", lambda self, step: broken)
    with pytest.raises(ValueError, match="step 8 holds weights that are not finite; replay an earlier one"):
        replay(runs["dpsgd"], 8, tmp_path / "replay", task=tiny_task, quiet=True)


def test_other_data_are_refused(tiny_task: Task, runs: dict[str, Run], tmp_path: Path) -> None:
    train_data, test_data = tiny_task.load_data(None)
    other = dataclasses.replace(train_data, inputs=train_data.inputs + 1)
    with pytest.raises(ValueError, match="fingerprints differ"):
        replay(
            runs["dpsgd"],
            8,
            tmp_path / "replay",
            task=dataclasses.replace(tiny_task, load_data=lambda root: (other, test_data)),
            quiet=True,
        )


def test_a_run_that_diverged_can_be_replayed_at_a_smaller_rate(tiny_task: Task, tmp_path: Path) -> None:
    config = TrainConfig("dpsgd", 1e200, dtype="float64", weight_decay=1.0, **{**BASE, "checkpoint_every": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = train(tiny_task, config, tmp_path / "run", quiet=True)
    assert run.status == "diverged"
    found = replay(run, 0, tmp_path / "replay", learning_rate=0.1, task=tiny_task, quiet=True)
    assert found.status == "complete"
    assert np.isfinite(compare([found])["train_loss"].iloc[0])
