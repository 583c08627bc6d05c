from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import landscape as ls
from landscape.experiments.import_run import ImportConfig, import_run
from landscape.tasks import Task
from tests.checkpoints.corpus import CORPUS

KNOWN = ImportConfig(learning_rate=0.5, local_batch_size=8)


def state_of(task: Task, seed: int) -> dict[str, torch.Tensor]:
    return {f"module.{n}": t for n, t in task.initial_model(seed).double().state_dict().items()}


def save_ranks(folder: Path, task: Task, step: int, ranks: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        torch.save({"model": state_of(task, 10 * step + rank), "step": step}, folder / f"step{step}_rank{rank}.pt")


def weights_of(task: Task, seed: int) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in task.initial_model(seed).double().parameters()])


def test_a_series_of_learners_becomes_a_run_that_is_measured_as_its_weights_in_memory(
    tmp_path: Path, tiny_task: Task
) -> None:
    for step in (5, 10):
        save_ranks(tmp_path / "theirs", tiny_task, step)
    run = import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, config=KNOWN, quiet=True)
    assert (run.steps, run.status, run.config.algorithm, run.config.num_learners) == ([5, 10], "imported", "dpsgd", 3)
    for step in run.steps:
        learners = run.learners(step)
        assert torch.equal(learners.weights, torch.stack([weights_of(tiny_task, 10 * step + r) for r in range(3)]))
        assert learners.facts["learning_rate"] == 0.5
        assert learners.origin["kind"] == "learners"
    groups = ls.measure(run, ("effective-learning-rate",), steps=[10], task=tiny_task, quiet=True)
    train, _ = tiny_task.load_data(None)
    objective = ls.Objective(tiny_task.initial_model(0), tiny_task.loss_fn, train, dtype=torch.float64)
    in_memory = ls.Learners(10, torch.stack([weights_of(tiny_task, 100 + r) for r in range(3)]), objective.model.layout)
    noise = ls.measure_noise(objective, in_memory, learning_rate=0.5, local_batch_size=8)
    found = groups["effective-learning-rate"]["alpha_e_ratio_mean"].sel(step=10)
    assert float(found) == pytest.approx(float(noise["alpha_e_ratio_mean"]), rel=1e-12)


def test_every_measure_works_on_an_imported_run_and_a_report_is_made(tmp_path: Path, tiny_task: Task) -> None:
    from landscape.experiments.report import report_runs

    save_ranks(tmp_path / "theirs", tiny_task, 5)
    run = import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, config=KNOWN, quiet=True)
    settings = ls.MeasureConfig(
        num_draws=4, num_smoothing_samples=2, num_eigenpairs=3, num_covariance_examples=20, num_probes=2
    )
    groups = ls.measure(run, task=tiny_task, settings=settings, quiet=True)
    assert len(groups) == 10
    assert "imported" in report_runs([run.path], tmp_path / "report.html").read_text()


def test_what_nobody_told_is_listed_as_assumed_and_asked_for(tmp_path: Path, tiny_task: Task) -> None:
    save_ranks(tmp_path / "theirs", tiny_task, 5)
    run = import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, quiet=True)
    assert {"learning_rate", "local_batch_size", "topology"} <= set(run.record["assumed"])
    with pytest.raises(
        ValueError, match="learning_rate and local_batch_size; give --learning-rate and --local-batch-size"
    ):
        ls.measure(run, ("effective-learning-rate",), task=tiny_task, quiet=True)
    settings = ls.MeasureConfig(num_draws=2, learning_rate=0.5, local_batch_size=8)
    assert ls.measure(run, ("effective-learning-rate",), task=tiny_task, settings=settings, quiet=True)


def test_without_a_task_a_run_is_read_but_not_measured_until_it_is_completed(
    tmp_path: Path, tiny_task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    save_ranks(tmp_path / "theirs", tiny_task, 5)
    run = import_run(tmp_path / "theirs", tmp_path / "run", config=KNOWN)
    assert "can be read but not measured" in capsys.readouterr().err
    assert torch.equal(run.learners(5).weights[1], weights_of(tiny_task, 51))
    with pytest.raises(ValueError, match="--task TASK"):
        ls.measure(run, ("effective-learning-rate",), quiet=True)
    completed = import_run(run.path, tmp_path / "complete", task=tiny_task, quiet=True)
    assert (completed.config.learning_rate, completed.config.local_batch_size) == (0.5, 8)
    assert completed.steps == [5]
    assert ls.measure(
        completed, ("effective-learning-rate",), task=tiny_task, settings=ls.MeasureConfig(num_draws=2), quiet=True
    )


def test_an_average_is_one_model(tmp_path: Path, tiny_task: Task) -> None:
    save_ranks(tmp_path / "theirs", tiny_task, 5)
    run = import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, average=True, quiet=True)
    assert (run.config.algorithm, run.config.num_learners) == ("ssgd", 1)
    mean = torch.stack([weights_of(tiny_task, 50 + r) for r in range(3)]).mean(0)
    torch.testing.assert_close(run.learners(5).weights[0], mean, rtol=1e-15, atol=1e-16)
    assert run.learners(5).origin["kind"] == "average"


def test_one_model_of_synchronous_learners(tmp_path: Path, tiny_task: Task) -> None:
    torch.save(state_of(tiny_task, 3), tmp_path / "model.pt")
    run = import_run(
        tmp_path / "model.pt", tmp_path / "run", task=tiny_task, config=replace(KNOWN, num_learners=4), quiet=True
    )
    assert (run.config.algorithm, run.steps, len(run.learners(0))) == ("ssgd", [0], 4)
    assert torch.equal(run.learners(0).weights, weights_of(tiny_task, 3).expand(4, -1))
    groups = ls.measure(
        run, ("noise",), task=tiny_task, settings=ls.MeasureConfig(num_draws=2, num_eigenpairs=2), quiet=True
    )
    assert groups


def test_the_number_of_synchronous_learners_is_taken_from_what_was_recorded(tmp_path: Path) -> None:
    CORPUS["DeepSpeed"](tmp_path)
    run = import_run(tmp_path, tmp_path / "out" / "run", quiet=True)
    assert (run.steps, run.config.num_learners, run.config.local_batch_size, len(run.learners(7))) == ([7], 2, 4, 2)
    assert (run.learners(7).weights[0] == run.learners(7).weights[1]).all()


def test_names_by_rule_and_steps_by_choice(tmp_path: Path, tiny_task: Task) -> None:
    for step in (5, 10):
        state = {n.removeprefix("module.").replace("1.", "first."): t for n, t in state_of(tiny_task, step).items()}
        assert any(n.startswith("first.") for n in state)
        torch.save(state, tmp_path / f"model_step{step}.pt")
    run = import_run(
        tmp_path / "*.pt", tmp_path / "run", task=tiny_task, rename=["first.*=1.*"], steps=[10], quiet=True
    )
    assert run.steps == [10]


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm, self.last = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.frozen(x)).tanh())


def test_frozen_parameters_are_those_of_the_checkpoint(tmp_path: Path, tiny_task: Task) -> None:
    task = replace(tiny_task, build_model=Statistics)
    trained = task.initial_model(7)
    with torch.no_grad():
        trained.frozen.weight.mul_(3)
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    run = import_run(tmp_path / "model.pt", tmp_path / "run", task=task, config=KNOWN, quiet=True)
    assert torch.equal(run.frozen["frozen.weight"], trained.frozen.weight)
    groups = ls.measure(run, ("curvature",), task=task, settings=ls.MeasureConfig(num_eigenpairs=2), quiet=True)
    train, _ = task.load_data(None)
    objective = ls.Objective(trained, task.loss_fn, train, dtype=torch.float32)
    params = dict(trained.named_parameters())
    weights = torch.cat([p.detach().flatten() for p in params.values() if p.requires_grad])
    top = ls.top_eigenpairs(ls.hessian(objective.recalibrated(weights), weights), k=1).values[0]
    values = (
        groups["curvature"]["lambda_max"].values
        if "lambda_max" in groups["curvature"]
        else groups["curvature"]["eigenvalue"].values
    )
    assert float(values.ravel()[0]) == pytest.approx(float(top), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": ImportConfig(num_learners=5)}, "holds 3 learners, not 5"),
        ({"steps": [7]}, "no checkpoint of step 7"),
        ({"rename": ["nothing.*=x"]}, "fits no tensor"),
        ({"rename": ["a"]}, "OLD=NEW"),
        ({"config": ImportConfig(topology="heptagram")}, "heptagram"),
        ({"config": ImportConfig(learning_rate=-1)}, "learning_rate must be a positive number"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, tiny_task: Task, change: dict[str, Any], message: str
) -> None:
    save_ranks(tmp_path / "theirs", tiny_task, 5)
    with pytest.raises(ValueError, match=message):
        import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, quiet=True, **change)
    assert not (tmp_path / "run").exists()


def test_a_gossiping_algorithm_needs_learners(tmp_path: Path, tiny_task: Task) -> None:
    torch.save(state_of(tiny_task, 3), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="there is one model; import it as ssgd"):
        import_run(
            tmp_path / "model.pt", tmp_path / "run", task=tiny_task, config=ImportConfig(algorithm="dpsgd"), quiet=True
        )


def test_steps_of_different_networks_are_no_run(tmp_path: Path, tiny_task: Task) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model_step1.pt")
    torch.save({"w": torch.ones(3)}, tmp_path / "model_step2.pt")
    with pytest.raises(
        ValueError, match=r"not of one run:\n  step 1: 1 learners of 2 parameters, float32\n  step 2: 1 learners of 3"
    ):
        import_run(tmp_path, tmp_path / "out" / "run", quiet=True)


def test_a_task_that_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_task.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    ls.save_learner(tmp_path / "recorded", step=1, model=nn.Linear(2, 2), rank=0, world_size=1, task="evil_task:go")
    run = import_run(tmp_path / "recorded", tmp_path / "run", quiet=True)
    assert run.task == ""
    assert not (tmp_path / "ran").exists()


def test_what_is_imported_is_not_overwritten(tmp_path: Path) -> None:
    for step in (1, 2):
        ls.save_learner(tmp_path / "run", step=step, model=nn.Linear(2, 2), rank=0, world_size=1)
    for path in (tmp_path / "ru*" / "checkpoints" / "step-00000001", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoints" / "step-00000002")
        with pytest.raises(ValueError, match="holds what is to be imported"):
            import_run(path, tmp_path / "run", overwrite=True, quiet=True)
    assert ls.open_run(tmp_path / "run").steps == [1, 2]


def test_weights_of_another_network_than_the_task_s_are_not_measured(tmp_path: Path, tiny_task: Task) -> None:
    reordered = nn.Module()
    for name, child in reversed(list(tiny_task.initial_model(0).double().named_children())):
        reordered.add_module(name, child)
    ls.save_learner(tmp_path, step=1, model=reordered, rank=0, world_size=1, learning_rate=0.1, local_batch_size=8)
    with pytest.raises(ValueError, match=r"are not those of task tiny in name, shape and order .*landscape import"):
        ls.measure(tmp_path, ("curvature",), task=tiny_task, quiet=True)


@pytest.mark.parametrize(("fact", "message"), [({"world_size": 10**9}, "--num-learners"), ({"world_size": 4000}, "")])
def test_a_file_does_not_ask_for_any_number_of_learners(tmp_path: Path, fact: dict[str, Any], message: str) -> None:
    torch.save({"model": {"w": torch.ones(2)}, **fact}, tmp_path / "model.pt")
    if message:
        with pytest.raises(ValueError, match=message):
            import_run(tmp_path / "model.pt", tmp_path / "run", quiet=True)
    run = import_run(tmp_path / "model.pt", tmp_path / "run", config=ImportConfig(num_learners=2), quiet=True)
    assert run.config.num_learners == 2


def test_a_warm_up_begins_at_rate_zero(tmp_path: Path) -> None:
    for step, rate in ((0, 0.0), (10, 0.3)):
        network = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        torch.save(
            {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
            tmp_path / f"step_{step}.pt",
        )
    run = import_run(tmp_path / "step_*.pt", tmp_path / "run", quiet=True)
    assert run.config.learning_rate == 0.3
    assert [run.learners(s).facts["learning_rate"] for s in run.steps] == [0.0, 0.3]


def test_a_run_without_a_task_keeps_what_was_recorded_of_its_network(tmp_path: Path) -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    network[3].requires_grad_(False)
    ls.save_learner(tmp_path / "recorded", step=1, model=network, rank=0, world_size=1)
    run = import_run(tmp_path / "recorded", tmp_path / "run", quiet=True)
    a, b = ls.open_run(tmp_path / "recorded").learners(1), run.learners(1)
    assert a.layout == b.layout
    assert torch.equal(a.weights, b.weights)
    assert list(b.frozen) == ["3.bias", "3.weight"]


def test_an_imported_run_is_not_resumed(tmp_path: Path, tiny_task: Task) -> None:
    save_ranks(tmp_path / "theirs", tiny_task, 5)
    run = import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, quiet=True)
    with pytest.raises(ValueError, match="not trained by landscape, so it cannot be resumed"):
        ls.train(tiny_task, run.config, run.path, resume=True, quiet=True)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path, tiny_task: Task) -> None:
    save_ranks(tmp_path / "theirs", tiny_task, 5)
    import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, quiet=True)
    with pytest.raises(ValueError, match="already holds a run"):
        import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, quiet=True)
    import_run(tmp_path / "theirs", tmp_path / "run", task=tiny_task, overwrite=True, quiet=True)
    with pytest.raises(ValueError, match="choose another directory"):
        import_run(tmp_path / "run", tmp_path / "run", task=tiny_task, overwrite=True, quiet=True)
