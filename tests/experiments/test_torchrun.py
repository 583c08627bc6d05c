"""Runs on several processes: what they compute, and what is left of them when a process, a disk or a file fails.

"No hang beyond a stated timeout, one clear message from one rank, nothing lost."
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from landscape.checkpoints import Run, open_run

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
DPSGD = ["--algorithm", "dpsgd", "--topology", "random-pairing", "--momentum", "0.9", "--nesterov", "--schedule", "warmup:5+cosine"]  # fmt: skip
COMMON = [
    "train", "--task", "faulty_task:make", "--learning-rate", "0.2", "--num-learners", "5", "--local-batch-size", "4", "--num-steps", "16",
    "--checkpoint-every", "4", "--log-every", "3", "--dtype", "float64", "--timeout", "30",
]  # fmt: skip
REPRODUCIBLE = [*DPSGD, "--reproducible"]


@dataclass(frozen=True)
class Ended:
    """What a launch left behind.

    Attributes:
        statuses: exit statuses, of torchrun or of the processes started without it; None for what hung and had to be killed.
        stdout: of all.
        stderr: of all.
    """

    statuses: list[int | None]
    stdout: str
    stderr: str

    @property
    def said(self) -> list[str]:
        """The program's own last words."""
        return [line for line in self.stderr.splitlines() if line.startswith("landscape: ")]

    @property
    def traces(self) -> int:
        """How many tracebacks there are, torchrun's own aside, which it puts its name before."""
        return self.stderr.count("\nTraceback") + self.stderr.startswith("Traceback")

    @property
    def rank_statuses(self) -> set[int]:
        """What torchrun's table says of the ranks that failed: their statuses, or minus the number of the signal."""
        return {int(s) for s in re.findall(r"exitcode *: (-?\d+)", self.stderr)}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


Launch = Callable[..., Ended]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "torchrun_nursery.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def launch(nursery: subprocess.Popen[str], tmp_path: Path) -> Launch:
    """launch(2, *flags): under torchrun on two ranks; launch(None, ...): one process without it."""

    def run(
        ranks: int | None, *arguments: str, out: str = "run", fault: str = "none:0:0", restarts: int = 0, timeout: float = 60, **more: Any
    ) -> Ended:  # fmt: skip
        for name in ("stdout", "stderr"):
            (tmp_path / name).unlink(missing_ok=True)
        command = list(arguments) if arguments[0] in ("tasks", "measure") else [*COMMON, "--out", out, *arguments]
        environment = {"FAULT": fault, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        flags = ["--nproc-per-node", str(ranks), "--master-port", str(free_port()), "--max-restarts", str(restarts)]
        request = {"folder": str(tmp_path), "arguments": command, "environment": environment, "timeout": timeout} | more
        if ranks is not None and "size" not in more:
            request["torchrun"] = flags
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        nursery.stdin.write(json.dumps(request) + "\n")
        nursery.stdin.flush()
        statuses = json.loads(nursery.stdout.readline())
        return Ended(statuses, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text())

    return run


def finished(ended: Ended) -> None:
    assert ended.statuses == [0], ended.stderr
    assert not ended.said


def refused(ended: Ended, message: str, *, ranks: int = 2) -> None:
    """One line that says why, on whichever rank; status 2 of all."""
    assert len(ended.said) == 1, ended.stderr
    assert re.search(message, ended.said[0]), ended.said
    assert not ended.traces, ended.stderr
    assert ended.statuses == [1]
    assert ended.rank_statuses == {2}
    assert ended.stderr.count("exitcode") <= ranks


def content(run: Run) -> dict[str, Any]:
    """All that a run recorded, but for times and what started it: files of checkpoints by name, lines of metrics, the outcome."""
    found: dict[str, Any] = {"status": run.status, "outcome": run.record.get("outcome")}
    for path in sorted((run.path / "checkpoints").rglob("*")):
        if path.suffix == ".safetensors":
            found[str(path.relative_to(run.path))] = path.read_bytes()
        elif path.name == "state.json":
            found[str(path.relative_to(run.path))] = {
                k: v for k, v in json.loads(path.read_text()).items() if k != "files"
            }
    entries = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in entry.items() if k != "elapsed"} for entry in entries]
    return found


def assert_same(found: Run, expected: Run, *, beside: int | None = None, logged_alike: bool = True) -> None:
    """To the bit.

    Args:
        beside: step of a further checkpoint, where `found` was stopped.
        logged_alike: whether the same number of ranks wrote all metrics, whose losses are sums over ranks and else agree to rounding.
    """
    mine, theirs = content(found), content(expected)
    if beside is not None and beside not in expected.steps:
        mine = {name: entry for name, entry in mine.items() if f"step-{beside:08d}" not in name}
    assert mine.keys() == theirs.keys()
    if not logged_alike:
        assert_logged_close(mine.pop("metrics"), theirs.pop("metrics"))
        assert_logged_close([mine.pop("outcome")], [theirs.pop("outcome")])
    assert [name for name in theirs if mine[name] != theirs[name]] == []
    assert not list(found.path.rglob(".writing-*"))


def assert_logged_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 1e-12) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            near = (
                value if value is None or isinstance(value, str) else pytest.approx(value, rel=tolerance, abs=tolerance)
            )
            assert mine[name] == near, name


def assert_close(found: Run, expected: Run) -> None:
    """Weights, momentum and buffers to 1e-10, and numbers in metrics.jsonl of the same names."""
    assert found.steps == expected.steps
    for step in expected.steps:
        a, b = found.learners(step), expected.learners(step)
        np.testing.assert_allclose(a.weights, b.weights, rtol=0, atol=1e-10)
        if b.momentum is not None:
            np.testing.assert_allclose(a.momentum, b.momentum, rtol=0, atol=1e-10)
        for name, buffer in b.buffers.items():
            np.testing.assert_allclose(a.buffers[name], buffer, rtol=0, atol=1e-10)
        assert a.facts == pytest.approx(b.facts)
    assert_logged_close(content(found)["metrics"], content(expected)["metrics"], 1e-9)


@pytest.fixture(scope="module")
def undisturbed(nursery: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The reproducible run of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finished(launch.__wrapped__(nursery, folder)(2, *REPRODUCIBLE))  # type: ignore[attr-defined]
    return open_run(folder / "run")


# The numbers ---------------------------------------------------------------------------------------------------------


def test_any_number_of_processes_makes_the_same_run(launch: Launch, tmp_path: Path, undisturbed: Run) -> None:
    for ranks in (None, 2, 3):
        finished(launch(ranks, *DPSGD, out=f"plain-{ranks}"))
        finished(launch(ranks, *REPRODUCIBLE, out=f"exact-{ranks}"))
        run = open_run(tmp_path / f"exact-{ranks}")
        assert_same(run, undisturbed, logged_alike=ranks == 2)
        assert run.record["num_processes"] == (ranks or 1)
        assert_close(open_run(tmp_path / f"plain-{ranks}"), open_run(tmp_path / "plain-None"))
        files = [sorted(str(p.relative_to(r)) for p in r.rglob("*")) for r in (run.path, undisturbed.path)]
        assert files[0] == files[1]


STAR = [
    "--algorithm",
    "ssgd-star",
    "--momentum",
    "0.5",
    "--noise-place",
    "gradient",
    "--noise-shape",
    "low-rank",
    "--noise-every",
    "4",
]
KINDS = {
    "dpsgd": DPSGD,
    "ssgd": ["--algorithm", "ssgd", "--momentum", "0.9", "--diagnose-every", "3"],
    "ssgd-star": [*STAR, "--sigma0", "{source}"],
    "local-sgd": ["--algorithm", "local-sgd", "--local-steps", "3", "--momentum", "0.9"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_with_any_number_of_ranks(
    kind: str, launch: Launch, tmp_path: Path, undisturbed: Run
) -> None:
    flags = [flag.format(source=undisturbed.path) for flag in KINDS[kind]]
    for exact in (True, False) if kind == "dpsgd" else (True,):
        more = ["--reproducible"] if exact else []
        finished(launch(2, *flags, *more, out=f"whole-{exact}"))
        whole, out = open_run(tmp_path / f"whole-{exact}"), f"stopped-{exact}"
        launch(2, *flags, *more, out=out, fault="SIGTERM:1:2")
        run = open_run(tmp_path / out)
        assert run.status == "interrupted"
        assert run.steps == [0, 4], "it stops behind the step after the one that was under way"
        shutil.copytree(run.path, tmp_path / f"same-{exact}")
        finished(launch(2, *flags, *more, "--resume", out=f"same-{exact}"))
        assert_same(open_run(tmp_path / f"same-{exact}"), whole)
        stopped = launch(None, *flags, *more, "--resume", out=out, fault="SIGTERM:0:9")
        assert stopped.statuses == [128 + signal.SIGTERM]
        assert open_run(tmp_path / out).steps == [0, 4, 8, 11]
        finished(launch(3, *flags, *more, "--resume", out=out))
        run = open_run(tmp_path / out)
        if exact:
            assert_same(run, whole, beside=11, logged_alike=False)
        else:
            shutil.rmtree(run.path / "checkpoints" / "step-00000011")
            assert_close(run, whole)


# Stopped, killed, hung -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["SIGTERM:1:5", "SIGINT:1:5", "agent-SIGTERM:1:5", "agent-SIGINT:0:5"])
def test_a_signal_to_one_or_all_stops_all_behind_a_checkpoint(
    fault: str, launch: Launch, tmp_path: Path, undisturbed: Run
) -> None:
    ended = launch(2, *REPRODUCIBLE, fault=fault)
    run = open_run(tmp_path / "run")
    assert run.status == "interrupted"
    stopped = run.steps[-1]
    assert stopped in (6, 7)
    assert ended.said == [f"landscape: stopped at step {stopped}; continue with --resume"]
    assert not ended.traces, ended.stderr
    assert ended.statuses == [1]
    if not fault.startswith("agent"):  # which prints no table then
        expected = {128 + signal.SIGTERM, 128 + signal.SIGINT} if "INT" in fault else {128 + signal.SIGTERM}
        assert ended.rank_statuses <= expected
    finished(launch(2, *REPRODUCIBLE, "--resume"))
    assert_same(open_run(run.path), undisturbed, beside=stopped)


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_killed_rank_and_nothing_shows(
    rank: int, launch: Launch, tmp_path: Path, undisturbed: Run
) -> None:
    ended = launch(2, *REPRODUCIBLE, fault=f"SIGKILL:{rank}:10", restarts=1)
    assert ended.statuses == [0]
    assert "resumed at step 8" in ended.stderr
    assert len(ended.said) == 1
    assert "another process is gone or does not answer" in ended.said[0]
    assert not ended.traces, ended.stderr
    assert_same(open_run(tmp_path / "run"), undisturbed)


@pytest.mark.parametrize(("rank", "ranks"), [(1, 2), (0, 3)])
def test_without_restarts_a_killed_rank_ends_the_run_and_loses_nothing(
    rank: int, ranks: int, launch: Launch, tmp_path: Path, undisturbed: Run
) -> None:
    ended = launch(ranks, *REPRODUCIBLE, fault=f"SIGKILL:{rank}:10")
    assert ended.statuses == [1]
    assert len(ended.said) == 1, ended.stderr
    assert "another process is gone or does not answer" in ended.said[0]
    assert "continue with --resume" in ended.said[0]
    assert ended.rank_statuses <= {-signal.SIGKILL, 2}
    assert open_run(tmp_path / "run").steps == [0, 4, 8]
    finished(launch(2, *REPRODUCIBLE, "--resume"))
    assert_same(open_run(tmp_path / "run"), undisturbed, logged_alike=ranks == 2)


@pytest.mark.parametrize("rank", [1])
def test_a_job_killed_while_it_writes_leaves_whole_checkpoints_only(
    rank: int, launch: Launch, tmp_path: Path, undisturbed: Run
) -> None:
    ended = launch(2, *REPRODUCIBLE, fault=f"all-SIGKILL-writing:{rank}:8")
    assert ended.statuses == [-signal.SIGKILL]
    run = open_run(tmp_path / "run")
    assert run.steps == [0, 4]
    assert list((run.path / "checkpoints").glob(".writing-*"))
    for step in run.steps:
        run.learners(step)
    finished(launch(2, *REPRODUCIBLE, "--resume"))
    assert_same(open_run(run.path), undisturbed)


@pytest.mark.parametrize("hung", [0, 1])
def test_ranks_give_up_on_one_that_hangs_after_the_timeout(
    hung: int, launch: Launch, tmp_path: Path, undisturbed: Run
) -> None:
    ended = launch(3, *REPRODUCIBLE, "--timeout", "3", fault=f"hangs:{hung}:10")
    assert ended.statuses == [1]
    assert len(ended.said) == 1
    assert "another process is gone or does not answer" in ended.said[0]
    assert not ended.traces
    finished(launch(2, *REPRODUCIBLE, "--resume"))
    assert_same(open_run(tmp_path / "run"), undisturbed, logged_alike=False)


@pytest.mark.parametrize("stopped", [0, 1])
def test_without_torchrun_ranks_also_give_up_on_one_that_is_stopped(
    stopped: int, launch: Launch, tmp_path: Path
) -> None:
    """Also where rank 0 is stopped, which has the store of processes without torchrun."""
    ended = launch(2, *REPRODUCIBLE, "--timeout", "3", fault=f"SIGSTOP:{stopped}:10", size=2, alone=[0, 1], hung=1)
    assert ended.statuses[stopped] is None
    assert ended.statuses[1 - stopped] == 2
    assert len(ended.said) == 1
    assert "another process is gone or does not answer" in ended.said[0]
    assert open_run(tmp_path / "run").steps == [0, 4, 8]


# Disks and files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_stops_all(rank: int, launch: Launch, tmp_path: Path, undisturbed: Run) -> None:
    ended = launch(2, *REPRODUCIBLE, fault=f"full:{rank}:8")
    refused(ended, rf"checkpoint of step 8 could not be written \(No space left on device\).*rank {rank} of 2")
    run = open_run(tmp_path / "run")
    assert run.steps == [0, 4]
    assert not list(run.path.rglob(".writing-*"))
    finished(launch(3, *REPRODUCIBLE, "--resume"))
    assert_same(open_run(run.path), undisturbed, logged_alike=False)


def test_a_full_disk_for_the_metrics_stops_all(launch: Launch, tmp_path: Path, undisturbed: Run) -> None:
    refused(launch(2, *REPRODUCIBLE, fault="full-metrics:0:9"), "metrics of step 9 could not be written")
    finished(launch(2, *REPRODUCIBLE, "--resume"))
    assert_same(open_run(tmp_path / "run"), undisturbed)


def test_a_damaged_file_of_one_rank_is_told_once(launch: Launch, tmp_path: Path, undisturbed: Run) -> None:
    shutil.copytree(undisturbed.path, tmp_path / "run")
    launch(2, *REPRODUCIBLE, "--overwrite", fault="SIGTERM:1:9")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000011" / "learner-00004-of-00005.safetensors"
    whole = damaged.read_bytes()
    for bad, message in (
        (whole[:-3], "is cut short"),
        (whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], "is damaged: its checksum"),
        (None, "is missing"),
    ):
        damaged.unlink() if bad is None else damaged.write_bytes(bad)
        refused(launch(2, *REPRODUCIBLE, "--resume"), rf"{damaged.name} {message}.*delete .*rank 1 of 2")
    shutil.rmtree(damaged.parent)
    finished(launch(2, *REPRODUCIBLE, "--resume"))
    assert_same(open_run(tmp_path / "run"), undisturbed)


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "fault", "message"),
    [
        ([*DPSGD, "--num-learners", "1"], "", "2 processes for 1 learners: every process must hold at least one; start at most 1"),
        ([*DPSGD, "--learning-rate", "nan"], "", r"error: learning_rate must be a positive number, not nan$"),
        ([*DPSGD, "--task", "tinny"], "", r"no such task: tinny; there are"),
        ([*DPSGD, "--device", "abacus"], "", "no such device: abacus"),
        ([*DPSGD, "--timeout", "-1"], "", "timeout must be a positive number of seconds, not -1"),
        (DPSGD, "data:1:0", r"/data/images.*\(rank 1 of 2\)"),
        (DPSGD, "other-data:1:0", "rank 1 of 2 has another data than rank 0"),
        (DPSGD, "other-model:1:0", "rank 1 of 2 has another initial model than rank 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_once(flags: list[str], fault: str, message: str, launch: Launch, tmp_path: Path) -> None:
    refused(launch(2, *flags, fault=fault or "none:0:0"), message)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_is_neither_overwritten_nor_continued_unasked(launch: Launch, tmp_path: Path, undisturbed: Run) -> None:
    launch(2, *REPRODUCIBLE, fault="SIGTERM:1:9")
    before = content(run := open_run(tmp_path / "run"))
    ended = launch(2, *REPRODUCIBLE, restarts=1)  # nor at the second attempt
    assert len(ended.said) == 2
    assert all("already holds a run; continue it with --resume, or replace it" in line for line in ended.said)
    assert content(run) == before
    ended = launch(
        2, *REPRODUCIBLE, "--overwrite", fault="SIGKILL:1:2", restarts=1
    )  # the second attempt goes on with the new run
    assert ended.statuses == [0]
    assert "resumed at step 0" in ended.stderr
    assert_same(open_run(run.path), undisturbed)
    ended = launch(2, *REPRODUCIBLE, "--resume")
    assert ended.stdout.splitlines()[0] == "run is complete (16 steps); nothing to do"


def test_other_commands_are_refused_and_help_is_told_once(launch: Launch) -> None:
    refused(launch(2, "measure", "nowhere"), "nowhere holds no run")
    refused(launch(2, "tasks"), "only train and measure run on several processes; start this command without torchrun")
    ended = launch(2, *DPSGD, "--warp", "9")
    assert ended.stderr.count("--warp") == 1
    assert ended.rank_statuses == {2}


def test_processes_that_do_not_come_are_waited_for_no_longer_than_the_timeout(launch: Launch) -> None:
    for ranks in ([0, 1], [1]):
        ended = launch(3, *DPSGD, "--timeout", "2", size=3, alone=ranks, timeout=15)
        assert ended.statuses == [2] * len(ranks)
        assert len(ended.said) == 1, ended.stderr
        assert re.search(rf"rank {ranks[0]} of 3 could not meet the others at 127.0.0.1:\d+: not all 3 processes came within 2 s", ended.said[0])  # fmt: skip


def test_a_port_in_use_is_told(launch: Launch, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = {"FAULT": "none:0:0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = launch(2, *DPSGD, "--timeout", "2", size=2, alone=[0], timeout=20, environment=environment)
    assert ended.statuses == [2]
    assert len(ended.said) == 1
    assert (
        f"127.0.0.1:{port}: the port is in use by another program; give torchrun another --master-port" in ended.said[0]
    )


# The command itself --------------------------------------------------------------------------------------------------


@contextmanager
def group(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Nothing of it stays behind."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers, which have sessions of their own
            process.communicate(timeout=60)


def test_the_torchrun_command_itself(tmp_path: Path, undisturbed: Run) -> None:
    """Killed once and started anew by itself; the rest of this file forks what this executes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "--max-restarts", "1",
               "-m", "landscape", *COMMON, "--out", "run", *REPRODUCIBLE]  # fmt: skip
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FAULT": "SIGKILL:0:10"}
    with group(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)) as process:  # fmt: skip
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert "resumed at step 8" in stderr
    assert_same(open_run(tmp_path / "run"), undisturbed)
    environment["FAULT"] = "agent-SIGTERM:1:5"
    with group(subprocess.Popen([*command, "--overwrite"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)) as process:  # fmt: skip
        stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    told = [line for line in stderr.splitlines() if line.startswith("landscape:")]
    assert len(told) == 1
    assert re.fullmatch(
        r"landscape: stopped at step \d+; continue with --resume", told[0]
    )  # the agent passes signals on when it can
    assert open_run(tmp_path / "run").status == "interrupted"
