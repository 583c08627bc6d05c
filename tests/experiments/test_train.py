from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape.checkpoints import Run, open_run
from landscape.data.dataset import TensorData
from landscape.data.selection import choose
from landscape.experiments.interrupt import Interruptible
from landscape.experiments.train import matched_sigma0, outcome, train
from landscape.models import mlp
from landscape.tasks import Task
from landscape.training import TrainConfig, topology

BASE: dict[str, Any] = {
    "num_learners": 4,
    "local_batch_size": 5,
    "num_steps": 17,
    "checkpoint_every": 5,
    "log_every": 3,
    "seed": 2,
}
CONFIGS = {
    "ssgd": TrainConfig("ssgd", 0.2, **BASE),
    "ssgd-star": TrainConfig("ssgd-star", 0.2, sigma0=0.05, **BASE),
    "dpsgd": TrainConfig(
        "dpsgd", 0.2, topology="random-pairing", momentum=0.9, nesterov=True, schedule="warmup:5+cosine", **BASE
    ),
    "dpsgd-float64": TrainConfig(
        "dpsgd", 0.2, topology="one-peer-exponential", order="cta", momentum=0.5, dtype="float64", **BASE
    ),
}


class Stop(Exception):
    """The run is cut off here."""


class Stopping:
    """Cross entropy that cuts the run off at its k-th evaluation."""

    def __init__(self, after: float = math.inf) -> None:
        self.calls, self.after = 0, after

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise Stop
        return F.cross_entropy(output, target, reduction="none")


def lines(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    entries = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "elapsed"} for e in entries]


def assert_same_training(found: Run, expected: Run, *, extra_steps: set[int] = frozenset()) -> None:
    """Bitwise: weights, buffers and momentum of every checkpoint; and every logged number."""
    assert found.status == expected.status
    assert found.record["outcome"] == expected.record["outcome"]
    assert set(found.steps) - extra_steps == set(expected.steps) - extra_steps
    for step in expected.steps:
        a, b = found.learners(step), expected.learners(step)
        assert a.weights.numpy().tobytes() == b.weights.numpy().tobytes()
        assert (a.momentum is None) == (b.momentum is None)
        assert a.momentum is None or a.momentum.numpy().tobytes() == b.momentum.numpy().tobytes()
        assert {n: t.numpy().tobytes() for n, t in a.buffers.items()} == {
            n: t.numpy().tobytes() for n, t in b.buffers.items()
        }
        assert a.facts == b.facts
    assert lines(found) == lines(expected)


# A whole run ---------------------------------------------------------------------------------------------------------


def test_a_run_records_what_it_did(tiny_task: Task, tmp_path: Path) -> None:
    config = CONFIGS["dpsgd"]
    run = train(tiny_task, config, tmp_path / "run", quiet=True)
    assert (run.status, run.task, run.config) == ("complete", "tiny", config)
    assert run.steps == [0, 5, 10, 15, 17]
    assert run.metrics["step"].tolist() == list(range(18))  # the last 50 steps are all logged
    assert run.record["data"]["num_train"] == 40
    assert run.record["num_parameters"] == 53
    assert run.record["topology"]["name"] == "random-pairing"
    assert run.record["outcome"]["median_last_train_loss"] == pytest.approx(run.metrics["train_loss"].median())
    assert run.record["provenance"]["torch"] == torch.__version__
    assert len(run.learners(17)) == 4
    # the recorded numbers are those of the recorded weights
    final, data = run.learners(17), tiny_task.load_data(None)
    entry = run.metrics.iloc[-1]
    for weights, key, part in [(final.mean, "train_loss", data[0]), (final.mean, "test_loss", data[1])]:
        model = tiny_task.build_model()
        nn.utils.vector_to_parameters(weights, model.parameters())
        assert float(F.cross_entropy(model(part.inputs.float()), part.targets).detach()) == pytest.approx(
            entry[key], rel=1e-5
        )
    assert len(entry["learner_test_loss"]) == 4
    assert entry["consensus_distance"] == pytest.approx(final.consensus_distance, rel=1e-5)
    assert entry["sigma_w"] == pytest.approx(math.sqrt(final.weight_variance), rel=1e-5)
    rates = run.metrics["learning_rate"].dropna()
    assert rates.iloc[0] == pytest.approx(0.2 / 5)
    assert rates.max() == pytest.approx(0.2)


def test_losses_on_a_part_of_the_data_are_logged_every_fifth_step_of_the_last_fifty(
    tiny_task: Task, tmp_path: Path
) -> None:
    """Of a fixed choice of the examples, the same after an interruption; convergence is judged on them alone."""
    config = TrainConfig("dpsgd", 0.1, num_learners=3, local_batch_size=2, num_steps=61, log_every=7, checkpoint_every=20,
                         evaluation_examples=10, topology="complete")  # fmt: skip
    run = train(tiny_task, config, tmp_path / "run", quiet=True)
    judged = [*range(16, 61, 5), 61]
    assert run.metrics["step"].tolist() == sorted({*range(0, 62, 7), *judged})
    assert run.record["evaluation_examples"] == 10
    model = tiny_task.initial_model(0).double()
    inputs, targets = choose(tiny_task.load_data(None)[0], 10).rows(slice(0, 10))
    last = run.learners(61)
    model.load_state_dict({name: value.double() for name, value in last.parameters().items()})
    expected = F.cross_entropy(model(inputs), targets).item()
    assert run.metrics["train_loss"].iloc[-1] == pytest.approx(expected, rel=1e-5), "in float32"
    losses = run.metrics.set_index("step")["train_loss"][judged]
    assert run.record["outcome"]["median_last_train_loss"] == pytest.approx(float(losses.median()))


def test_only_the_last_fifty_steps_and_every_kth_are_logged(tiny_task: Task, tmp_path: Path) -> None:
    config = TrainConfig("ssgd", 0.1, num_learners=1, local_batch_size=2, num_steps=61, log_every=4, checkpoint_every=0)
    run = train(tiny_task, config, tmp_path / "run", quiet=True)
    assert run.metrics["step"].tolist() == [0, 4, 8, *range(12, 62)]
    assert run.steps == [0, 61]
    window = run.metrics["train_loss"].iloc[-50:]
    assert run.record["outcome"]["median_last_train_loss"] == pytest.approx(window.median())


def test_training_is_reproducible_and_seeds_differ(tiny_task: Task, tmp_path: Path) -> None:
    first, again = (train(tiny_task, CONFIGS["dpsgd"], tmp_path / name, quiet=True) for name in ("a", "b"))
    assert_same_training(again, first)
    other = train(tiny_task, dataclasses.replace(CONFIGS["dpsgd"], seed=3), tmp_path / "c", quiet=True)
    assert not torch.equal(other.learners(17).weights, first.learners(17).weights)


def test_a_graph_of_the_users_own(tiny_task: Task, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["dpsgd"], topology="ring")
    run = train(tiny_task, config, tmp_path / "run", topology=nx.star_graph(3), quiet=True)
    matrix = np.asarray(run.record["topology"]["matrices"][0])
    assert np.count_nonzero(matrix[0]) == 4
    with pytest.raises(ValueError, match="topology: its mixing matrix is not the run's"):
        train(tiny_task, config, tmp_path / "run", resume=True, quiet=True)
    assert (
        train(tiny_task, config, tmp_path / "run", topology=nx.star_graph(3), resume=True, quiet=True).status
        == "complete"
    )


@pytest.mark.parametrize("name", ["exponential", "one-peer-exponential", "hypercube", "star"])
def test_every_kind_of_topology_trains(tiny_task: Task, tmp_path: Path, name: str) -> None:
    config = TrainConfig("dpsgd", 0.2, num_learners=8, local_batch_size=5, num_steps=2, topology=name)
    assert train(tiny_task, config, tmp_path / "run", quiet=True).status == "complete"


def test_a_directed_matrix_that_is_not_normal_trains(tiny_task: Task, tmp_path: Path) -> None:
    skewed = np.array([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0, 0.25, 0.5], [0.25, 0, 0.25, 0.5]])
    config = TrainConfig("dpsgd", 0.2, num_learners=4, local_batch_size=5, num_steps=2)
    assert train(tiny_task, config, tmp_path / "run", topology=skewed, quiet=True).status == "complete"


def test_messages_go_to_stderr_and_none_when_quiet(
    tiny_task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_task, CONFIGS["dpsgd"], tmp_path / "a", quiet=True)
    assert capsys.readouterr() == ("", "")
    train(tiny_task, CONFIGS["dpsgd"], tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == ""
    assert "tiny: dpsgd, 4 learners x 5, alpha 0.2" in err
    assert "(mean)" in err
    assert "(disagreement)" in err


def _branching_loss(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output, target, reduction="none")
    return losses if bool(losses.sum() > 0) else -losses


def test_a_loss_that_cannot_be_batched_trains_and_is_evaluated(tiny_task: Task, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be batched over learners")
        found = train(
            dataclasses.replace(tiny_task, loss_fn=_branching_loss), CONFIGS["dpsgd"], tmp_path / "a", quiet=True
        )
    plain = train(tiny_task, CONFIGS["dpsgd"], tmp_path / "b", quiet=True)
    torch.testing.assert_close(found.learners(17).weights, plain.learners(17).weights)
    np.testing.assert_allclose(found.metrics["train_loss"], plain.metrics["train_loss"], rtol=1e-4)


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tiny_task: Task, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, int]]:
    """An uninterrupted run of a config, and how often it evaluated its loss."""

    @functools.cache
    def make(name: str) -> tuple[Run, int]:
        counting = Stopping()
        task = dataclasses.replace(tiny_task, loss_fn=counting)
        return train(task, CONFIGS[name], tmp_path_factory.mktemp(name) / "whole", quiet=True), counting.calls

    return make


@pytest.mark.parametrize(
    ("name", "share"),
    [*itertools.product(CONFIGS, [0.4, 0.85]), *(("dpsgd", share) for share in (0.0, 0.1, 0.55, 0.97, 1.0))],
)
def test_resuming_after_a_cut_is_bit_identical(
    tiny_task: Task, tmp_path: Path, whole_run: Callable[[str], tuple[Run, int]], name: str, share: float
) -> None:
    """Cut off in the first evaluation, somewhere between, and in the last one, of the metrics after the last step."""
    whole, calls = whole_run(name)
    task = dataclasses.replace(
        tiny_task, loss_fn=Stopping(1 + round(share * (calls - 2)))
    )  # the first: do the data fit
    with pytest.raises(Stop):
        train(task, CONFIGS[name], tmp_path / "cut", quiet=True)
    assert open_run(tmp_path / "cut").status == "running"
    task = dataclasses.replace(tiny_task, loss_fn=Stopping())
    assert_same_training(train(task, CONFIGS[name], tmp_path / "cut", resume=True, quiet=True), whole)


def test_resuming_over_and_over_is_bit_identical(tiny_task: Task, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["dpsgd"], checkpoint_every=1)
    whole = train(dataclasses.replace(tiny_task, loss_fn=Stopping()), config, tmp_path / "whole", quiet=True)
    for after in (9, 14, 5, 4, 20):
        with pytest.raises(Stop):
            train(
                dataclasses.replace(tiny_task, loss_fn=Stopping(after)),
                config,
                tmp_path / "cut",
                resume=True,
                quiet=True,
            )
    found = train(dataclasses.replace(tiny_task, loss_fn=Stopping()), config, tmp_path / "cut", resume=True, quiet=True)
    assert_same_training(found, whole)


def _normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3))


def test_batch_norm_and_dropout_resume_bit_identically(tiny_task: Task, tmp_path: Path) -> None:
    def task(limit: float = math.inf) -> Task:
        return dataclasses.replace(tiny_task, build_model=_normalised, loss_fn=Stopping(limit))

    whole = train(task(), CONFIGS["dpsgd"], tmp_path / "whole", quiet=True)
    with pytest.raises(Stop):
        train(task(50), CONFIGS["dpsgd"], tmp_path / "cut", quiet=True)
    found = train(task(), CONFIGS["dpsgd"], tmp_path / "cut", resume=True, quiet=True)
    assert int(found.learners(17).buffers["1.num_batches_tracked"][0]) == 17
    assert_same_training(found, whole)


def test_a_complete_run_is_returned_as_it_is(tiny_task: Task, tmp_path: Path) -> None:
    train(tiny_task, CONFIGS["dpsgd"], tmp_path / "run", quiet=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run = train(tiny_task, CONFIGS["dpsgd"], tmp_path / "run", resume=True, quiet=True)
    assert run.status == "complete"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_resuming_what_was_not_begun_begins_it(tiny_task: Task, tmp_path: Path) -> None:
    assert train(tiny_task, CONFIGS["ssgd"], tmp_path / "run", resume=True, quiet=True).status == "complete"


@pytest.mark.parametrize("left", [[], ["checkpoints/"], ["checkpoints/", ".writing-run.json"]])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_left_by_a_run_killed_at_its_start_is_begun_again(
    tiny_task: Task, tmp_path: Path, left: list[str], resume: bool
) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        if name.endswith("/"):
            (tmp_path / "run" / name).mkdir()
        else:
            (tmp_path / "run" / name).write_text("{")
    assert train(tiny_task, CONFIGS["ssgd"], tmp_path / "run", resume=resume, quiet=True).status == "complete"


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 0.3}, "learning_rate: 0.2 in the run, 0.3 now"),
    ({"num_steps": 40, "seed": 9}, "num_steps: 17 in the run, 40 now; seed: 2 in the run, 9 now"),
    ({"topology": "ring"}, "topology: 'random-pairing' in the run, 'ring' now"),
    ({"nesterov": False}, "nesterov: True in the run, False now"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[m.split(":")[0] for _, m in CHANGES])
def test_another_configuration_is_refused_and_its_fields_named(
    tiny_task: Task, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(Stop):
        train(dataclasses.replace(tiny_task, loss_fn=Stopping(40)), CONFIGS["dpsgd"], tmp_path / "run", quiet=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=re.escape(message)):
        train(tiny_task, dataclasses.replace(CONFIGS["dpsgd"], **change), tmp_path / "run", resume=True, quiet=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_another_task_or_other_data_is_refused(tiny_task: Task, tiny_data: TensorData, tmp_path: Path) -> None:
    train(tiny_task, CONFIGS["ssgd"], tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="task: 'tiny' in the run, 'other' now"):
        train(dataclasses.replace(tiny_task, name="other"), CONFIGS["ssgd"], tmp_path / "run", resume=True, quiet=True)
    shifted = TensorData(tiny_data.inputs + 1e-9, tiny_data.targets)
    with pytest.raises(ValueError, match="data: not the examples that the run was trained on"):
        train(dataclasses.replace(tiny_task, load_data=lambda root: (shifted, shifted)), CONFIGS["ssgd"], tmp_path / "run",
              resume=True, quiet=True)  # fmt: skip


# Where a run may be written ------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_unasked(tiny_task: Task, tmp_path: Path) -> None:
    train(tiny_task, CONFIGS["ssgd"], tmp_path / "run", quiet=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        ValueError, match="already holds a run; continue it with --resume, or replace it with --overwrite"
    ):
        train(tiny_task, CONFIGS["dpsgd"], tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="--resume and --overwrite exclude each other"):
        train(tiny_task, CONFIGS["dpsgd"], tmp_path / "run", resume=True, overwrite=True, quiet=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_overwriting_replaces_the_whole_run(tiny_task: Task, tmp_path: Path) -> None:
    train(tiny_task, CONFIGS["ssgd"], tmp_path / "run", quiet=True)
    (tmp_path / "run" / "measurements.nc").write_text("of the old run")
    run = train(tiny_task, CONFIGS["dpsgd-float64"], tmp_path / "run", overwrite=True, quiet=True)
    assert run.config == CONFIGS["dpsgd-float64"]
    assert not (tmp_path / "run" / "measurements.nc").exists()
    assert run.metrics["step"].tolist() == list(range(18))


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_run_is_never_touched(tiny_task: Task, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another directory"):
        train(tiny_task, CONFIGS["ssgd"], tmp_path / "thesis", overwrite=overwrite, quiet=True)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="is a file, not a directory"):
        train(tiny_task, CONFIGS["ssgd"], tmp_path / "file", overwrite=overwrite, quiet=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_mistake_is_told_before_anything_is_written(tiny_task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="local_batch_size 500 is larger than the data"):
        train(tiny_task, dataclasses.replace(CONFIGS["ssgd"], local_batch_size=500), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="no such topology: rings"):
        train(tiny_task, dataclasses.replace(CONFIGS["dpsgd"], topology="rings"), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="no such task: tinny; there are mnist-mlp"):
        train("tinny", CONFIGS["ssgd"], tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# How runs end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssgd", "dpsgd"])
def test_a_diverged_run_says_so_and_keeps_its_last_finite_weights(tiny_task: Task, tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], learning_rate=1e30, schedule="constant")
    task = dataclasses.replace(tiny_task, build_model=partial(mlp, (6, 5, 5, 3), "relu"))
    run = train(task, config, tmp_path / "run", quiet=True)
    assert run.status == "diverged"
    step = run.record["diverged_at"]
    assert run.record["outcome"] == {"outcome": "non-finite", "step": step}
    assert run.steps[-1] == step < 17
    assert run.learners(step).is_finite
    assert lines(run)[-1]["finite"] is False
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert train(task, config, tmp_path / "run", resume=True, quiet=True).status == "diverged"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_outcomes() -> None:
    falling, high, nan = np.linspace(2, 0.1, 50), np.full(50, 1.09), np.full(50, np.nan)
    slow = np.full(50, 0.9)
    losses = np.stack([falling, falling * 0.5, high, slow, nan, falling * 0.5], 1)
    expected = ["slow", "converged", "stuck", "slow", "non-finite", "non-finite"]
    alive = np.array([True, True, True, True, True, False])
    assert outcome(losses, threshold=0.7, constant_loss=math.log(3), alive=alive) == expected
    assert outcome(losses[:, :5], threshold=0.7, constant_loss=math.log(3)) == expected[:5]


def test_the_noise_of_ssgd_star_can_follow_a_recorded_run(tiny_task: Task, tmp_path: Path) -> None:
    run = train(
        tiny_task, dataclasses.replace(CONFIGS["dpsgd"], num_steps=70, log_every=10), tmp_path / "dpsgd", quiet=True
    )
    levels = matched_sigma0(str(run.path), 70)
    known = run.metrics.set_index("step")["sigma_w"]
    assert levels.shape == (70,)
    assert levels[0] == known[0] == 0
    assert levels[60] == known[60]
    assert levels[5] == pytest.approx((known[0] + known[10]) / 2)
    star = train(
        tiny_task, dataclasses.replace(CONFIGS["ssgd-star"], sigma0=str(run.path)), tmp_path / "star", quiet=True
    )
    assert star.status == "complete"
    with pytest.raises(ValueError, match=r"holds no run"):
        train(
            tiny_task, dataclasses.replace(CONFIGS["ssgd-star"], sigma0=str(tmp_path)), tmp_path / "other", quiet=True
        )


# Interruptions from outside ------------------------------------------------------------------------------------------


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with Interruptible() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


USER_TASK = '''
    """A task of a user's own: a small network, slowed down where SLOW is set."""

    import math, os, time

    import torch
    from torch import nn

    from landscape.data.dataset import TensorData
    from landscape.tasks import Task


    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x):
            time.sleep(float(os.environ.get("SLOW", 0)))
            return self.layers(x)


    def make():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(40, 6, generator=generator)
        data = TensorData(inputs, inputs.argmax(1) % 3, "user's")
        return Task("user_task:make", "of a user", Network, nn.functional.cross_entropy, lambda root: (data, data), 0.7, math.log(3))
'''
CONFIG = TrainConfig("dpsgd", 0.2, num_learners=3, local_batch_size=5, num_steps=40, topology="random-pairing", momentum=0.9,
                     checkpoint_every=1, log_every=3)  # fmt: skip


def user_environment(tmp_path: Path, **more: str) -> dict[str, str]:
    (tmp_path / "user_task.py").write_text(textwrap.dedent(USER_TASK))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
def test_an_interrupted_process_ends_after_a_checkpoint_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, num_steps=25, checkpoint_every=5)
    environment = user_environment(tmp_path, SLOW="0.03")
    script = f"from landscape.experiments.train import train; from landscape.training import TrainConfig; " \
             f"train('user_task:make', TrainConfig(**{config.to_json()!r}), 'run')"  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"  # step 6 is logged: between two checkpoints
    wait_for(lambda: metrics.exists() and '"step": 6,' in metrics.read_text(), process)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode != 0
    run = open_run(tmp_path / "run")
    assert run.status == "interrupted"
    stopped = run.steps[-1]
    assert 7 <= stopped < config.num_steps
    assert f"Stopped: stopped at step {stopped}; continue with --resume" in stderr
    monkeypatch.syspath_prepend(tmp_path)
    whole = train("user_task:make", config, tmp_path / "whole", quiet=True)
    resumed = train("user_task:make", config, tmp_path / "run", resume=True, quiet=True)
    assert_same_training(resumed, whole, extra_steps={stopped})


KILLING = """
    import dataclasses, json, os, random, signal, sys, time, traceback
    from pathlib import Path

    import torch

    from landscape.checkpoints.format import STEP_PATTERN
    from landscape.experiments.train import train
    from landscape.training import TrainConfig

    torch.set_num_threads(1)
    config, kills = TrainConfig(**json.loads(sys.argv[1])), int(sys.argv[2])


    train("user_task:make", dataclasses.replace(config, num_steps=2), "warm", quiet=True)  # whatever torch loads at first use


    def begin(out):  # a process of its own
        process = os.fork()
        if process == 0:
            try:
                train("user_task:make", config, out, resume=True, quiet=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return process


    def last_step(out):
        folder = Path(out, "checkpoints")
        found = [STEP_PATTERN.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
        return max([int(m.group(1)) for m in found if m], default=-1)


    def end(process):
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


    assert end(begin("whole")) == 0
    chance, codes = random.Random(0), []
    for k in range(kills):
        target = last_step("killed") + chance.randint(1, 6)
        process = begin("killed")
        if k % 4:  # while it trains; else at its start
            while last_step("killed") < target and os.waitpid(process, os.WNOHANG) == (0, 0):
                time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02 if k % 4 else 0.1))
        os.kill(process, signal.SIGKILL)
        codes.append(end(process))
    print(json.dumps({"codes": codes, "reached": last_step("killed"), "last": end(begin("killed"))}))
"""


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_if_it_never_was(tmp_path: Path) -> None:
    kills, config = 20, dataclasses.replace(CONFIG, num_steps=120)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLING), json.dumps(config.to_json()), str(kills)], cwd=tmp_path,
                          env=user_environment(tmp_path), capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["codes"] == [-signal.SIGKILL] * kills, done.stderr
    assert report["last"] == 0, done.stderr
    assert 15 <= report["reached"] < config.num_steps, "the kills came while it trained"
    whole, killed = open_run(tmp_path / "whole"), open_run(tmp_path / "killed")
    assert whole.steps == list(range(121))
    assert_same_training(killed, whole)
    assert not list((tmp_path / "killed").rglob(".writing-*"))


# What a checkpoint tells of the step that follows --------------------------------------------------------------------


def test_facts_tell_where_the_next_step_takes_its_gradients(tiny_task: Task, tmp_path: Path) -> None:
    cta = dataclasses.replace(CONFIGS["dpsgd-float64"], gamma=0.5, gamma_schedule="step:10:0.5")
    run = train(tiny_task, cta, tmp_path / "cta", quiet=True)
    for step in run.steps:
        damped = topology("one-peer-exponential", 4).damped(0.5 if step < 10 else 0.25)
        assert run.learners(step).facts["mixing"] == damped.matrix(2, step).tolist()
    star = train(tiny_task, CONFIGS["ssgd-star"], tmp_path / "star", quiet=True)
    assert [star.learners(s).facts["sigma0"] for s in star.steps] == [0.05] * 5
    source = train(tiny_task, dataclasses.replace(cta, order="awc"), tmp_path / "awc", quiet=True)
    matching = dataclasses.replace(CONFIGS["ssgd-star"], sigma0=str(source.path))
    matched = train(tiny_task, matching, tmp_path / "matched", quiet=True)
    levels = matched_sigma0(str(source.path), 18)
    assert [matched.learners(s).facts["sigma0"] for s in matched.steps] == levels[matched.steps].tolist()
    for name in ("ssgd", "dpsgd"):
        other = train(tiny_task, CONFIGS[name], tmp_path / name, quiet=True)
        assert not {"mixing", "sigma0"} & set(other.learners(5).facts)


def test_noise_is_matched_only_to_what_has_it(tiny_task: Task, tmp_path: Path) -> None:
    def star(source: Path) -> TrainConfig:
        return dataclasses.replace(CONFIGS["ssgd-star"], sigma0=str(source))

    cta = train(tiny_task, dataclasses.replace(CONFIGS["dpsgd-float64"], order="cta"), tmp_path / "cta", quiet=True)
    ssgd = train(tiny_task, CONFIGS["ssgd"], tmp_path / "ssgd", quiet=True)
    for source, reason in ((cta, "ran under CTA"), (ssgd, "no DPSGD run of several learners")):
        with pytest.raises(ValueError, match=reason):
            train(tiny_task, star(source.path), tmp_path / "star", quiet=True)
    with pytest.raises(ValueError, match="cannot have its noise matched to itself"):
        train(tiny_task, star(ssgd.path), ssgd.path, overwrite=True, quiet=True)
    assert (ssgd.path / "run.json").exists()  # nothing was deleted


def test_thresholds_are_those_of_the_damped_mixing(
    tiny_task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig("dpsgd", 0.2, **{**BASE, "num_steps": 1}, gamma=0.5)
    run = train(tiny_task, config, tmp_path / "run")
    assert "gamma 0.5" in capsys.readouterr().err
    assert run.record["topology"]["thresholds"] == pytest.approx({"mean": 2, "disagreement": 2 - 0.5 * 4 / 3})
    np.testing.assert_array_equal(np.asarray(run.record["topology"]["matrices"]), topology("ring", 4).matrices)
    with pytest.raises(ValueError, match=r"topology ring is damped by gamma 0\.5; give gamma in the configuration"):
        train(tiny_task, config, tmp_path / "other", topology=topology("ring", 4).damped(0.5), quiet=True)
