"""The recorder: what it writes, on how many processes ever, and what is left when one of them dies at any point."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import landscape as ls
from landscape.checkpoints import marks, open_run, read_checkpoint
from landscape.checkpoints.format import digest_of, seal, unseal
from landscape.checkpoints.recorder import save_learner
from landscape.checkpoints.writer import LearnerTensors, RunWriter, write_learner
from landscape.tasks import get_task
from tests.checkpoints.measured import assert_measured_alike, flat

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of one process: exit status or minus the signal, what it returned, what it raised, its warnings, operations on files."""

    status: int
    returned: Any
    raised: str | None
    warned: list[str]
    operations: int


Jobs = Callable[..., list[Ended]]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """jobs("save", 2, out=..., ...): that job of recorder_jobs on two processes."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "recorder_jobs.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip

    def run(job: str, size: int, *, ranks: list[int] | None = None, faults: dict[int, Any] | None = None, together: bool = False,
            seconds: float | None = None, **arguments: Any) -> list[Ended]:  # fmt: skip
        request = {"job": job, "size": size, "ranks": list(range(size)) if ranks is None else ranks, "faults": faults or {}, "together": together,
                   "arguments": {name: str(a) if isinstance(a, Path) else a for name, a in arguments.items()}}  # fmt: skip
        if seconds is not None:
            request["seconds"] = seconds
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return [Ended(*each) for each in json.loads(process.stdout.readline())]

    with process:
        yield run
        assert process.stdin is not None
        process.stdin.close()


def finished(ended: list[Ended]) -> None:
    assert [each.status for each in ended] == [0] * len(ended), ended


def values(out: Path, step: int) -> list[int]:
    """The one number of each learner; every file is read and its checksum compared."""
    learners = read_checkpoint(out / "checkpoints" / f"step-{step:08d}")
    assert bool((learners.weights == learners.weights[:, :1]).all())
    assert bool((learners.buffers["norm.running_mean"][:, 0] == learners.weights[:, 0]).all())
    return [int(v) for v in learners.weights[:, 0]]


def whole(attempt: int, step: int, size: int) -> list[int]:
    return [attempt * 10_000 + step * 10 + rank for rank in range(size)]


def hidden(out: Path) -> list[str]:
    """What is in checkpoints/ beside checkpoints."""
    return sorted(p.name for p in (out / "checkpoints").iterdir() if p.name.startswith("."))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:  # fmt: skip
    model = network()
    optimizer = optimizer_of(list(model.parameters()))
    for seed in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
    return model, optimizer


# Under torchrun ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's two runs on two processes of torchrun, and what torch.save kept of the same."""
    out = tmp_path_factory.mktemp("example")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "recorder_torchrun.py"), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "gossip"])
def test_the_example_under_torchrun_is_recorded_to_the_bit(kind: str, example: Path) -> None:
    run = open_run(example / kind)
    assert run.steps == [0, 10, 20]
    assert hidden(run.path) == []
    for step in run.steps:
        learners = run.learners(step)
        assert len(learners) == 2
        for rank in (0, 1):
            truth = torch.load(example / "truth" / f"{kind}-{step}-{rank}.pt", weights_only=True)
            assert truth["model"].keys() == learners.parameters(rank).keys()
            for name, tensor in learners.parameters(rank).items():
                assert torch.equal(tensor, truth["model"][name])
            momenta = [truth["optimizer"]["state"].get(i, {}).get("momentum_buffer") for i in range(len(truth["model"]))]  # fmt: skip
            if step == 0:
                assert learners.momentum is None
            else:
                assert learners.momentum is not None
                expected = torch.cat([m.flatten() for m in momenta])
                assert torch.equal(learners.momentum[rank], expected)
        assert learners.facts["learning_rate"] == 0.1
        assert learners.facts["local_batch_size"] == 50
        assert (learners.consensus_distance == 0) == (kind == "ddp" or step == 0)
    c = run.config
    assert (run.task, run.status, c.num_learners, c.momentum, c.learning_rate) == ("mnist-mlp", "recorded", 2, 0.5, 0.1)
    assert c.algorithm == ("ssgd" if kind == "ddp" else "dpsgd")
    assert run.record["num_processes"] == 2


@pytest.mark.slow
def test_the_example_measures_as_in_memory(example: Path) -> None:
    task, modules = get_task("mnist-mlp"), []
    for rank in (0, 1):
        modules.append(task.initial_model(0))
        truth = torch.load(example / "truth" / f"gossip-20-{rank}.pt", weights_only=True)
        modules[rank].load_state_dict(truth["model"])
    train, _ = task.load_data(None)
    assert_measured_alike(open_run(example / "gossip").learners(20), modules, (train.inputs[:60], train.targets[:60]))


def test_what_is_recorded_with_its_task_is_measured_without_further_ado(tmp_path: Path, tiny_task: ls.Task) -> None:
    """Also of learners that one process has."""
    models = [tiny_task.initial_model(0) for _ in range(3)]
    for rank, model in enumerate(models):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(rank))
        final = save_learner(tmp_path / "run", step=7, model=model, rank=rank, world_size=3, task="tiny", algorithm="dpsgd", order="awc",
                             topology="ring", local_batch_size=4, learning_rate=1)  # fmt: skip
    run = open_run(tmp_path / "run")
    assert (run.steps, hidden(run.path)) == ([7], [])
    assert torch.equal(read_checkpoint(final).weights, torch.stack([flat(m) for m in models]))
    found = ls.measure(run, ["effective-learning-rate"], task=tiny_task, settings=ls.MeasureConfig(num_draws=4), quiet=True)  # fmt: skip
    result = found["effective-learning-rate"]
    assert (result.attrs["learning_rate"], result.attrs["num_learners"], result.attrs["topology"]) == (1, 3, "ring")
    assert math.isfinite(float(result["alpha_e_ratio_mean"][0]))


# Whole or not at all -------------------------------------------------------------------------------------------------


def test_processes_without_a_process_group_record_together(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished(jobs("save", 3, out=out, attempt=1, steps=[0, 5, 10]))
    run = open_run(out)
    assert run.steps == [0, 5, 10]
    assert [values(out, step) for step in run.steps] == [whole(1, step, 3) for step in run.steps]
    assert (run.config.num_learners, run.config.algorithm) == (3, "dpsgd")
    assert hidden(out) == []
    state = unseal(out / "checkpoints" / "step-00000005" / "state.json")
    assert state["num_learners"] == 3
    assert len({who["word"] for who in state["recorded_at"]["processes"]}) == 3


def test_many_processes_at_their_own_pace(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished(jobs("save_freely", 6, out=out, num_steps=20))
    assert open_run(out).steps == list(range(20))
    assert all(values(out, step) == whole(0, step, 6) for step in range(20))
    assert hidden(out) == []


def test_a_checkpoint_is_not_there_before_the_last_has_saved(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished(jobs("save", 3, ranks=[0, 2], out=out, attempt=1, steps=[0]))
    assert open_run(out).steps == []
    assert hidden(out) == [".writing-step-00000000-of-00003"]


@pytest.fixture(scope="module")
def begun(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two that has saved step 10, and a copy of it for each who asks."""
    out = tmp_path_factory.mktemp("begun") / "run"
    finished(jobs("save", 2, out=out, attempt=1, steps=[10]))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])
def test_killed_at_any_operation_on_files_and_started_anew(last: bool, jobs: Jobs, tmp_path: Path, begun: Path) -> None:
    """Of the process that completes the step or of another: it appears whole or not at all, the one before stays, and a restart's takes its place."""
    seen = []
    for number in range(1, 60):
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        ended = jobs("save", 2, out=out, attempt=2, steps=[20], last=int(last), patience=30 if last else 0.3, faults={1: ["kill", number]})  # fmt: skip
        assert ended[0].status == 0
        assert ended[1].status in (0, -signal.SIGKILL)
        steps = open_run(out).steps
        seen.append((ended[1].status != 0, steps))
        assert values(out, 10) == whole(1, 10, 2)
        if 20 in steps:
            assert values(out, 20) == whole(2, 20, 2)
        finished(jobs("save", 2, out=out, attempt=3, steps=[20]))
        assert values(out, 20) == whole(3, 20, 2)
        assert values(out, 10) == whole(1, 10, 2)
        assert hidden(out) == []
        shutil.rmtree(out)
        if ended[1].status == 0:
            break
    assert seen[-1] == (False, [10, 20])
    assert seen[0] == (True, [10])
    assert len(seen) > (25 if last else 12)
    order = [steps for _, steps in seen]
    if last:
        assert order == sorted(order)  # there is one instant at which it appears


@pytest.mark.slow
def test_jobs_killed_at_random_are_never_mixed(jobs: Jobs, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", list(range(1, 9))
    generator = np.random.default_rng(0)
    appeared = 0
    for attempt in range(1, 17):
        jobs("save", 3, out=out, attempt=attempt, steps=steps, seconds=float(generator.uniform(0.02, 0.6)))
        for step in open_run(out).steps if (out / "run.json").exists() else []:
            found = values(out, step)
            assert found == whole(found[0] // 10_000, step, 3)
            appeared += found[0] // 10_000 == attempt
    assert appeared > 5, appeared
    finished(jobs("save", 3, out=out, attempt=17, steps=steps))
    assert [values(out, step) for step in steps] == [whole(17, step, 3) for step in steps]
    assert hidden(out) == []


def test_marks_of_a_killed_job_do_not_count_and_do_not_last(jobs: Jobs, tmp_path: Path) -> None:
    """Rank 1 of the job before had saved the step, rank 0 had not. Now rank 0 saves first."""
    out = tmp_path / "run"
    finished(jobs("save", 2, ranks=[1], out=out, attempt=1, steps=[10]))
    finished(jobs("save", 2, ranks=[0], out=out, attempt=2, steps=[10]))
    assert open_run(out).steps == []
    pending = out / "checkpoints" / ".writing-step-00000010-of-00002"
    assert len(list(pending.glob("mark-*"))) == 2
    finished(jobs("save", 2, out=out, attempt=3, steps=[10]))
    assert values(out, 10) == whole(3, 10, 2)
    assert hidden(out) == []


def test_a_mark_from_the_future_counts_only_for_its_own_process_group(jobs: Jobs, tmp_path: Path) -> None:
    """The clock of another machine may be ahead: the word in the group's store tells jobs apart all the same."""
    out = tmp_path / "run"
    finished(jobs("save", 2, out=out, attempt=1, steps=[0], together=True))
    ended = jobs("save", 2, out=out, attempt=1, steps=[10], faults={0: ["kill", 8]})
    assert ended[0].status == -signal.SIGKILL
    for mark in (out / "checkpoints" / ".writing-step-00000010-of-00002").glob("mark-00001-*"):
        said = unseal(mark)
        mark.write_bytes(seal({**said, "job": "that of the job before"}))
        os.utime(mark, (time.time() + 3600,) * 2)
    finished(jobs("save", 2, out=out, attempt=2, steps=[10], together=True))
    assert values(out, 10) == whole(2, 10, 2)


def test_the_processes_of_a_group_share_a_word(jobs: Jobs, tmp_path: Path) -> None:
    found = [{each.returned for each in jobs("words", 3, together=together, out=tmp_path)} for together in (True, True, False)]  # fmt: skip
    assert [len(words) for words in found] == [1, 1, 1]
    assert found[0] != found[1]
    assert found[2] == {"None"}


def test_an_earlier_jobs_step_is_kept_if_it_is_the_same_and_else_replaced(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished(jobs("save", 2, out=out, attempt=1, steps=[10, 20]))
    before = (out / "checkpoints" / "step-00000010").stat()
    finished(jobs("save", 2, out=out, attempt=1, steps=[10]))
    after = (out / "checkpoints" / "step-00000010").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    ended = jobs("save", 2, out=out, attempt=2, steps=[10])
    finished(ended)
    assert [len(each.warned) for each in ended] in ([0, 1], [1, 0])
    assert "holds steps of an earlier job, which are replaced where" in "".join(ended[0].warned + ended[1].warned)
    assert values(out, 10) == whole(2, 10, 2)
    assert values(out, 20) == whole(1, 20, 2)
    assert hidden(out) == []


def test_a_step_moved_aside_by_a_job_that_was_killed_then_comes_back(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished(jobs("save", 2, out=out, attempt=1, steps=[10]))
    checkpoints = out / "checkpoints"
    (checkpoints / "step-00000010").rename(checkpoints / ".replaced-step-00000010")
    finished(jobs("save", 2, out=out, attempt=2, steps=[20]))
    assert open_run(out).steps == [10, 20]
    assert values(out, 10) == whole(1, 10, 2)
    assert hidden(out) == []


def test_unfinished_steps_go_when_a_later_one_appears(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished(jobs("save", 2, ranks=[1], out=out, attempt=1, steps=[5, 10, 30]))
    finished(jobs("save", 2, out=out, attempt=2, steps=[20]))
    assert hidden(out) == [".writing-step-00000030-of-00002"]
    assert open_run(out).steps == [20]


# Processes that do not fit together ----------------------------------------------------------------------------------


def raised(ended: list[Ended], *messages: str) -> None:
    """One of the messages, of some process, and nothing but such errors."""
    assert any(message in (each.raised or "") for each in ended for message in messages), ended
    assert all(each.raised is None or each.raised.startswith("ValueError") for each in ended), ended


@pytest.mark.parametrize(
    ("told", "messages"),
    [
        (
            {"width": 5},
            [
                "rank 1 has other parameters than rank 0 at step 0: [['first.weight', [5, 3]]",
                "run with num_parameters 39, and rank 1 has 48",
            ],
        ),
        ({"dtype": "float64"}, ["rank 1 has other types than rank 0 at step 0: [['first.weight', 'float64']"]),
    ],
)
def test_a_rank_with_another_network_is_named(told: dict[str, Any], messages: list[str], jobs: Jobs, tmp_path: Path) -> None:  # fmt: skip
    """By rank 0's record of the run, if that is there already, or by the marks."""
    out = tmp_path / "run"
    raised(jobs("save_each", 3, out=out, each=[{"steps": [0]}, {"steps": [0]} | told, {"steps": [0]}]), *messages)
    assert open_run(out).steps == []


def test_a_rank_that_saves_other_steps_is_named(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "later"
    ended = jobs("save_each", 2, out=out, each=[{"steps": [0, 10, 20]}, {"steps": [0, 20], "last": 1}])
    raised(ended, "rank 0 saved step 10, and rank 1, which is at step 20, did not; a checkpoint appears only when all")
    out = tmp_path / "before"
    ended = jobs("save_each", 2, out=out, each=[{"steps": [0, 10, 20], "last": 0}, {"steps": [0, 20]}])
    finished(ended)
    assert ended[0].warned == [f"no checkpoint of step 10 appears in {out}/checkpoints: rank 1 of 2 did not save it"]
    for out in (tmp_path / "later", tmp_path / "before"):
        assert open_run(out).steps == [0, 20]
        assert hidden(out) == []
    out = tmp_path / "never"
    ended = jobs("save_each", 2, out=out, each=[{"steps": [0, 10, 20]}, {"steps": [0, 11, 21], "last": 1}])
    raised(ended, "rank 0 saved step 10, and rank 1, which is at step 11, did not")
    assert open_run(out).steps == [0]


def test_processes_without_ranks_are_told(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    place = {"rank": 0, "world_size": 1}
    ended = jobs("save_each", 2, out=out, each=[{"steps": [0, 1, 2], "place": place}] * 2)
    assert any("both saved step" in (each.raised or "") and "as rank 0 of 1: start them with torchrun" in (each.raised or "") for each in ended), ended  # fmt: skip


def test_a_process_that_alone_saves_for_several_is_warned(tmp_path: Path) -> None:
    model = network()
    for step in (0, 1):
        save_learner(tmp_path / "run", step=step, model=model, rank=0, world_size=3)
    with pytest.warns(UserWarning, match=r"no checkpoint appears in .*, as rank 1, 2 of 3 does not save; .* rank=0, world_size=1"):  # fmt: skip
        save_learner(tmp_path / "run", step=2, model=model, rank=0, world_size=3)


def test_another_number_of_processes_or_another_run_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished(jobs("save", 2, out=out, attempt=1, steps=[0]))
    for rank, ended in enumerate(jobs("save", 3, out=out, attempt=2, steps=[10])):
        assert ended.raised is not None
        assert f"holds a run with num_learners 2, and rank {rank} has 3; give all" in ended.raised
    assert values(out, 0) == whole(1, 0, 2)
    model = network()
    save_learner(tmp_path / "mine", step=0, model=model, algorithm="ssgd")
    elsewhere = tmp_path / "other"
    shutil.copytree(tmp_path / "mine", elsewhere)
    with pytest.raises(ValueError, match="a run with algorithm ssgd, and rank 0 has dpsgd"):
        save_learner(elsewhere, step=1, model=model, algorithm="dpsgd")
    with pytest.raises(ValueError, match="a run with num_parameters 34, and rank 0 has 6"):
        save_learner(elsewhere, step=1, model=nn.Linear(2, 2))
    RunWriter(tmp_path / "own", {}).write_record(status="complete")
    with pytest.raises(ValueError, match="a run that landscape trained or imported"):
        save_learner(tmp_path / "own", step=1, model=model)


# Disks that fail -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_fails_at_any_operation(jobs: Jobs, tmp_path: Path) -> None:
    """An error that says so, or none; earlier checkpoints stay; the next save of the step by the same process succeeds."""
    said, begun = set(), tmp_path / "begun"
    finished(jobs("save", 1, out=begun, attempt=1, steps=[10]))
    for number in range(1, 60):
        out = tmp_path / str(number)
        shutil.copytree(begun, out)
        (ended,) = jobs("save", 1, out=out, attempt=2, steps=[20, 30], retry=True, faults={0: ["fail", number]})
        assert ended.status == 0, ended
        said.update(ended.returned)
        assert open_run(out).steps == [10, 20, 30]
        assert values(out, 10) == whole(1, 10, 1)
        assert values(out, 20) == whole(2, 20, 1)
        assert values(out, 30) == whole(2, 30, 1)
        shutil.rmtree(out)
    assert len(said) > 3
    assert all("could not be written (No space left on device); earlier checkpoints are untouched" in text for text in said)  # fmt: skip


@pytest.mark.parametrize("size", [0, 100, 600])
def test_a_full_disk(size: int, tmp_path: Path) -> None:
    model, out = network(), tmp_path / "run"
    save_learner(out, step=0, model=model)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match=r"the checkpoint of step 1 could not be written \(File too large\); earlier"):
            save_learner(out, step=1, model=model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    save_learner(out, step=1, model=model)
    assert open_run(out).steps == [0, 1]
    assert hidden(out) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(OSError, match=r"the checkpoint of step 1 could not be written \("):
            save_learner(folder, step=1, model=network())


# One process ---------------------------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), betas=(0.8, 0.99), eps=1e-6, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_recorded_to_the_bit_and_left_alone(name: str, tmp_path: Path) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    gradients = [p.grad for p in model.parameters()]
    final = save_learner(tmp_path / "run", step=3, model=model, optimizer=optimizer)
    for a, b in zip((*before[0].values(), before[2]), (*model.state_dict().values(), torch.get_rng_state()), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert str(before[1]) == str(optimizer.state_dict())
    learners = read_checkpoint(final)
    state = optimizer.state_dict()["state"]

    def joined(slot: str) -> torch.Tensor:
        return torch.cat([state[i][slot].flatten() for i in range(6)])

    assert (learners.momentum is not None) == (name == "momentum")
    if learners.momentum is not None:
        assert torch.equal(learners.momentum[0], joined("momentum_buffer"))
    assert set(learners.moments) == ({"exp_avg", "exp_avg_sq"} if "adam" in name else set())
    for slot, moment in learners.moments.items():
        assert torch.equal(moment[0], joined(slot))
    facts, group = learners.facts, optimizer.param_groups[0]
    assert facts["optimizer"] == type(optimizer).__name__
    assert facts["learning_rate"] == float(group["lr"])
    assert facts.get("betas") == (list(group["betas"]) if "betas" in group else None)
    assert facts.get("optimizer_step") == (None if "sgd" in name or name == "momentum" else 3)
    config = open_run(tmp_path / "run").config
    assert config.momentum == group.get("momentum", 0)
    assert config.weight_decay == group["weight_decay"]
    assert config.learning_rate == float(group["lr"])
    if "adam" in name:
        held = safetensors.torch.load_file(final / "optimizer-00000-of-00001.safetensors")
        assert set(held) == {f"{slot}/{n}" for slot in ("exp_avg", "exp_avg_sq") for n, _ in model.named_parameters()}
        assert unseal(final / "state.json")["moments"] == ["exp_avg", "exp_avg_sq"]


def test_groups_that_differ_and_a_warm_up_from_zero(tmp_path: Path) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    facts = read_checkpoint(save_learner(tmp_path / "run", step=0, model=model, optimizer=optimizer)).facts
    assert (facts["learning_rate"], facts["learning_rates"]) == (0.5, [0.5, 0.0])
    optimizer.param_groups[0]["lr"] = 0.0
    out = tmp_path / "warm-up"
    assert read_checkpoint(save_learner(out, step=0, model=model, optimizer=optimizer)).facts["learning_rate"] == 0
    assert "learning_rate" in open_run(out).record["assumed"]
    told = read_checkpoint(save_learner(out, step=1, model=model, optimizer=optimizer, learning_rate=0.25)).facts
    assert told["learning_rate"] == 0.25


def test_optimizers_whose_state_is_not_known_are_left_out_with_a_warning(jobs: Jobs, tmp_path: Path) -> None:
    model = network()
    with pytest.warns(UserWarning, match="SGD has none of the model's parameters; nothing of it is recorded"):
        save_learner(tmp_path / "a", step=0, model=model, optimizer=torch.optim.SGD(network().parameters(), lr=0.1))
    strange = SimpleNamespace(param_groups=[{"params": list(model.parameters()), "lr": 0.5}])
    with pytest.warns(UserWarning, match="the state of SimpleNamespace is not this process's alone"):
        final = save_learner(tmp_path / "b", step=0, model=model, optimizer=strange)
    assert read_checkpoint(final).facts == {"learning_rate": 0.5, "optimizer": "SimpleNamespace"}
    ended = jobs("save_with_parts", 2, out=tmp_path / "run", together=True)
    finished(ended)
    for each in ended:
        assert len(each.warned) == 1
        assert "the state of ZeroRedundancyOptimizer is not this process's alone" in each.warned[0]
    learners = open_run(tmp_path / "run").learners(1)
    assert (learners.facts["learning_rate"], learners.moments) == (0.25, {})


def test_networks_in_parts_are_refused(jobs: Jobs, tmp_path: Path) -> None:
    (ended,) = jobs("save_sharded", 1, out=tmp_path / "run", together=True)
    assert ended.raised is None, ended.raised
    assert len(ended.returned) == 8
    for text in ended.returned:
        assert text.startswith("its parameters are shards")
        assert "torch.distributed.checkpoint.save" in text
    assert not (tmp_path / "run").exists()


def test_frozen_tied_and_extra_tensors(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)
            self.register_buffer("passing", torch.ones(2), persistent=False)
            self.register_buffer("kept", torch.arange(3))
            self.scale = nn.Parameter(torch.tensor(2.0))

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

    model = Odd()
    final = save_learner(tmp_path / "run", step=0, model=torch.compile(model, backend="eager"))
    written = safetensors.torch.load_file(final / "learner-00000-of-00001.safetensors")
    assert set(written) == {"first.weight", "second.weight", "second.bias", "kept", "scale"}
    learners = read_checkpoint(final)
    assert [n for n, _ in unseal(final / "state.json")["parameters"]] == ["first.weight", "scale"] or learners.layout.names[0] == "scale"  # fmt: skip
    assert set(learners.frozen) == {"second.bias"}
    assert torch.equal(learners.buffers["kept"][0], model.kept)
    assert torch.equal(learners.parameters(0)["scale"], model.scale.detach())


def test_saving_a_step_again_in_the_same_process(tmp_path: Path) -> None:
    model, out = network(), tmp_path / "run"
    final = save_learner(out, step=3, model=model)
    before = final.stat().st_ino
    assert save_learner(out, step=3, model=model) == final
    assert final.stat().st_ino == before
    assert hidden(out) == []
    with pytest.raises(ValueError, match=r"this process has saved step 3 in .* already, with other weights"):
        save_learner(out, step=3, model=network(1))
    shutil.rmtree(out)
    save_learner(out, step=3, model=network(1))
    assert open_run(out).steps == [3]
    for model in (network(), network()):  # before the others have come
        save_learner(out.with_name("two"), step=3, model=model, rank=1, world_size=2)
    with pytest.raises(ValueError, match="already, with other weights"):
        save_learner(out.with_name("two"), step=3, model=network(1), rank=1, world_size=2)


def test_run_json_tells_what_was_given_and_what_is_assumed(tmp_path: Path) -> None:
    model, optimizer = trained(OPTIMIZERS["momentum"])
    save_learner(
        tmp_path / "run", step=0, model=model.double(), optimizer=optimizer, rank=0, world_size=4, task="digits:make", algorithm="dpsgd",
        order="cta", topology="one-peer-exponential", local_batch_size=32, seed=7,
    )  # fmt: skip
    record = open_run(tmp_path / "run").record
    assert record["recorded"]["given"] == {"task": "digits:make", "algorithm": "dpsgd", "order": "cta", "topology": "one-peer-exponential", "local_batch_size": 32, "seed": 7}  # fmt: skip
    assert record["recorded"]["optimizer"]["momentum"] == 0.9
    assert record["assumed"] == ["gamma"]
    assert (record["task"], record["topology"]["kind"], record["config"]["dtype"]) == ("digits:make", "periodic", "float64")  # fmt: skip
    assert record["config"]["nesterov"]
    assert record["num_parameters"] == 30 + 4
    bare = open_run(save_learner(tmp_path / "bare", step=0, model=network()).parents[1])
    assert set(bare.record["assumed"]) == {"algorithm", "order", "topology", "gamma", "learning_rate", "local_batch_size", "seed", "momentum", "dampening", "nesterov", "weight_decay"}  # fmt: skip
    assert (bare.task, bare.config.algorithm, bare.status) == ("", "ssgd", "recorded")
    assert "recorded" in repr(bare)
    assert ">recorded</td>" in bare._repr_html_()


def test_mixing_is_recorded_where_gradients_are_taken_at_what_was_received(jobs: Jobs, tmp_path: Path) -> None:
    place = {"order": "cta", "algorithm": "dpsgd", "topology": "one-peer-exponential"}
    finished(jobs("save", 2, out=tmp_path / "run", attempt=0, steps=[1], place=place))
    facts = open_run(tmp_path / "run").learners(1).facts
    assert facts["mixing"] == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"step": -1}, "step must not be negative, not -1"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2 processes"),
        ({"rank": 1}, "rank 1 is not one of 1 processes"),
        ({"local_batch_size": 0}, "local_batch_size must be at least 1, not 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, not nan"),
        ({"topology": "rang"}, "rang"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    told: dict[str, Any], message: str, jobs: Jobs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_learner(tmp_path / "run", **{"step": 0, "model": network(), **told})
    with pytest.raises(TypeError, match="batch_size"):
        save_learner(tmp_path / "run", step=0, model=network(), batch_size=3)  # type: ignore[call-arg]
    for ended in jobs("save", 2, out=tmp_path / "run", attempt=0, steps=[0], place={"algorithm": "sgd"}):
        assert "algorithm must be one of ssgd, " in (ended.raised or "")
    assert not (tmp_path / "run").exists()


def test_where_the_environment_is_silent_there_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_learner(tmp_path / "one", step=0, model=network())
    assert open_run(tmp_path / "one").config.num_learners == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    save_learner(tmp_path / "two", step=0, model=network())
    assert [p.name[:11] for p in marks.pending_folder(tmp_path / "two" / "checkpoints", 0, 2).glob("mark-*")] == ["mark-00001-"]  # fmt: skip


# The files -----------------------------------------------------------------------------------------------------------


def test_files_are_safetensors_of_any_type_and_layout(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8,
             torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {str(t): base.to(t) for t in types}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 3), "turned": base.T, "part": base[1:3, ::2], "same": base, "again": base,
                "conjugate": torch.tensor([1 + 2j]).conj(), "negative": torch.tensor([1 + 2j]).conj().imag, "leaf": nn.Parameter(base), "Ã¼": base}  # fmt: skip
    files = write_learner(
        tmp_path, 0, 1, LearnerTensors(tensors, moments={"exp_avg": {"a": base}, "exp_avg_sq": {"a": -base}})
    )
    assert set(files) == {"learner-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"}
    for name, entry in files.items():
        assert entry == {"bytes": (tmp_path / name).stat().st_size, "sha256": digest_of(tmp_path / name)}
    read = safetensors.torch.load_file(tmp_path / "learner-00000-of-00001.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        expected = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        assert read[name].reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()
    own = safetensors.torch.save({n: t.detach().clone().contiguous() for n, t in tensors.items() if not n.startswith(("conj", "neg"))})  # fmt: skip
    plain = {n: t for n, t in tensors.items() if not n.startswith(("conj", "neg"))}
    write_learner(tmp_path, 1, 2, LearnerTensors(plain))
    assert set(safetensors.torch.load(own)) == set(plain)
    assert abs(len(own) - (tmp_path / "learner-00001-of-00002.safetensors").stat().st_size) < 64
    held = safetensors.torch.load_file(tmp_path / "optimizer-00000-of-00001.safetensors")
    assert torch.equal(held["exp_avg_sq/a"], -held["exp_avg/a"])


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    for tensor, kind in ((torch.zeros(2, dtype=torch.complex128), "complex128"), (torch.eye(2).to_sparse(), "sparse_coo"), (torch.empty(2, device="meta"), "meta")):  # fmt: skip
        with pytest.raises(ValueError, match=f"weight is a tensor of .*{kind}.* which safetensors files cannot hold"):
            write_learner(tmp_path, 0, 1, LearnerTensors({"weight": tensor}))


@pytest.mark.slow
def test_saving_holds_no_copy(jobs: Jobs, tmp_path: Path) -> None:
    """256 MiB of weights under two names and as much momentum."""
    (ended,) = jobs("save_large", 1, out=tmp_path / "run", mebibytes=512)
    assert ended.raised is None, ended.raised
    assert ended.returned < 60
    assert sum(p.stat().st_size for p in (tmp_path / "run").rglob("*.safetensors")) > 3 * 256 << 20


@pytest.mark.gpu
def test_a_network_on_a_gpu_is_recorded_without_a_copy_of_all_of_it(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)
    model(torch.randn(4, 1024, device="cuda")).square().sum().backward()
    optimizer.step()
    state, random = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    learners = read_checkpoint(save_learner(tmp_path / "run", step=1, model=model, optimizer=optimizer))
    assert torch.cuda.memory_allocated() == state
    assert torch.equal(torch.cuda.get_rng_state(), random)
    for name, p in model.named_parameters():
        assert torch.equal(learners.parameters(0)[name], p.detach().cpu())
        assert torch.equal(learners.layout.split(learners.moments["exp_avg"][0])[name], optimizer.state[p]["exp_avg"].cpu())  # fmt: skip
    assert learners.facts["optimizer_step"] == 1
