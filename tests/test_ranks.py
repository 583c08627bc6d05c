from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from landscape import ranks as module
from landscape.experiments import run_directory
from landscape.experiments.run_directory import LAUNCH, check_alike, check_shared, is_restarted, launch_record
from landscape.ranks import AgreedError, LostRankError, Ranks, launch, launched, local_device, started, tells


@dataclass(frozen=True)
class Threaded(Ranks):
    """A rank that is a thread."""

    board: list[Any] = field(default_factory=list)
    gate: Any = None

    def collect(self, value: Any) -> list[Any]:
        self.gate.wait()
        self.board[self.rank] = value
        self.gate.wait()
        return list(self.board)


def together(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank returns or raises."""
    board, gate, found = [None] * size, threading.Barrier(size, timeout=10), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(Threaded(rank, size, board=board, gate=gate))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("count", "size"), [(7, 3), (3, 3), (5, 1), (2, 4)])
def test_shares_are_consecutive_even_and_everything(count: int, size: int) -> None:
    shares = Ranks(0, size).shares(count)
    assert [j for share in shares for j in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_ranks_mistake_is_everybodys() -> None:
    def work(ranks: Ranks) -> str:
        with ranks.agree():
            if ranks.rank == 1:
                raise FileNotFoundError("no such file")
        return "went on"

    for error in together(3, work):
        assert isinstance(error, AgreedError)
        assert str(error) == "no such file (rank 1 of 3)"


def test_a_mistake_of_all_is_told_without_ranks_and_several_are_told_together() -> None:
    def alike(ranks: Ranks) -> None:
        with ranks.agree():
            raise ValueError("too large")

    def unlike(ranks: Ranks) -> None:
        with ranks.agree():
            if ranks.rank:
                raise ValueError(f"bad {ranks.rank}")

    assert {str(error) for error in together(2, alike)} == {"too large"}
    assert {str(error) for error in together(3, unlike)} == {"bad 1; bad 2 (rank 1, 2 of 3)"}


def test_one_process_raises_its_own_error() -> None:
    with pytest.raises(FileNotFoundError), Ranks().agree():
        raise FileNotFoundError("no such file")


def test_who_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert tells(AgreedError("by all")) == (rank == 0)
        assert tells(LostRankError("first"))
        later = LostRankError("second")
        later.add_note(module._TOLD)
        assert not tells(later)


def test_the_first_to_fail_is_one_and_a_store_that_is_gone_keeps_nobody_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def add(self, key: str, count: int) -> int:
            raise RuntimeError("Broken pipe")

    class Hangs:
        def add(self, key: str, count: int) -> int:
            threading.Event().wait()
            return 0

    store = dist.HashStore()
    assert [module._is_first_to_fail(store) for _ in range(3)] == [True, False, False]
    assert module._is_first_to_fail(Gone())
    monkeypatch.setattr(module, "_ANSWER_TIME", 0.05)
    assert module._is_first_to_fail(Hangs())


def test_groups_that_share_a_store_do_not_share_a_name() -> None:
    """Whatever the processes left in it that were there before: those of the other size, or that died half-way."""
    store, names = dist.HashStore(), set()
    store.set("landscape/asks/1", "of-one-that-died")
    store.set("landscape/asks/2", "of-another")
    for size in (2, 3, 3, 2):
        found = together(size, lambda ranks: module._name_of_group(store, ranks, 5.0))
        assert len(set(found)) == 1
        assert found[0] not in names
        names.add(found[0])
    missing = together(1, lambda ranks: module._name_of_group(store, Ranks(0, 2), 0.05))
    assert isinstance(missing[0], TimeoutError)


def test_torchrun_is_known_again_and_told_from_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch() is None
    assert launch_record(Ranks()) is None
    assert not is_restarted(tmp_path, None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/torchelastic_a/none_b/attempt_0/1/error.json")
    first = launch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/torchelastic_a/none_b/attempt_1/0/error.json")
    assert launch() == first
    mine = launch_record(Ranks())
    assert mine is not None
    assert not is_restarted(tmp_path, mine)
    from landscape.checkpoints.writer import RunWriter

    RunWriter(tmp_path, {}).write_record(**{LAUNCH: mine})
    assert not is_restarted(tmp_path, mine), "the same process asks again"
    assert is_restarted(tmp_path, {**mine, "process": mine["process"] + 1})
    assert is_restarted(tmp_path, {"torchruns": ["of-a-new-machine", first], "process": 1})
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "logs/torchelastic_c/none_d/attempt_0/0/error.json")
    other = launch_record(Ranks())
    assert other is not None
    assert not is_restarted(tmp_path, {**other, "process": 1})
    RunWriter(tmp_path, {}).write_record()
    assert not is_restarted(tmp_path, {**mine, "process": 1}), "a run of no torchrun"


def test_ranks_that_differ_are_refused() -> None:
    check_alike(Ranks(), data="whatever")
    assert together(3, lambda ranks: check_alike(ranks, task="a", data={"x": 1})) == [None] * 3
    for error in together(3, lambda ranks: check_alike(ranks, task="a", initial_model=ranks.rank > 0)):
        assert isinstance(error, AgreedError)
        assert str(error).startswith(
            "rank 1, 2 of 3 has another initial model than rank 0; start all processes with the same flags"
        )


def test_a_run_directory_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "VISIBLE_WITHIN", 0.2)
    for folder, content in (("a", "of rank 0"), ("b", "left by another run"), ("c", None)):
        (tmp_path / folder).mkdir()
        if content is not None:
            (tmp_path / folder / "run.json").write_text(content)
    assert together(2, lambda ranks: check_shared(tmp_path / "a", ranks)) == [None, None]
    for other in "bc":
        for error in together(2, lambda ranks, other=other: check_shared(tmp_path / "a" if ranks.leads else tmp_path / other, ranks)):  # fmt: skip
            assert isinstance(error, AgreedError)
            assert "put the run on a file system that all machines share (rank 1 of 2)" in str(error)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:3", "cuda:1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="give device cuda, not cuda:1"):
        module._take_gpu("cuda:1")
    with pytest.raises(ValueError, match="torch sees 2 GPUs for more processes on this machine"):
        module._take_gpu("cuda")
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    module._take_gpu("cuda")
    module._take_gpu("cpu")
    assert taken == [1]
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="LOCAL_RANK is not set"):
        module._take_gpu("cuda")


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() == Ranks()
    with started("cpu") as ranks:
        assert ranks == Ranks()
        assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for timeout in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AgreedError, match="timeout must be a positive number of seconds"), started("cpu", timeout):
            pass
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConnectionError, match=r"rank 0 of 2 could not meet the others at .*RANK expected, but not set"), started():  # fmt: skip
        pass
