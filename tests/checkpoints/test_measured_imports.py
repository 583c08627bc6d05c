"""Checkpoints that the real libraries wrote, imported as runs: alpha_e and lambda_max are those of modules in memory with the weights that were saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from landscape.experiments.import_run import import_run
from landscape.tasks import Task
from tests.checkpoints.importers import fixtures_c as hugging
from tests.checkpoints.importers import fixtures_sharded as sharded
from tests.checkpoints.importers import fixtures_torch as plain
from tests.checkpoints.measured import assert_measured_alike


@dataclass(frozen=True)
class Case:
    """A checkpoint that a library wrote.

    Attributes:
        path: where it is.
        make: makes the network.
        saved: what was in memory, one state_dict a learner; gathered by the library where it was sharded.
        shape: of the network's inputs and outputs.
        steps: which of a series.
        prefix: of the names in `saved`.
    """

    path: Callable[[], Path]
    make: Callable[[], nn.Module]
    saved: Callable[[], Sequence[dict[str, Tensor]]]
    shape: tuple[int, int]
    steps: Sequence[int] | None = None
    prefix: str = ""

    def modules(self) -> list[nn.Module]:
        """The networks that were saved."""
        made = []
        for state in self.saved():
            module = self.make()
            module.load_state_dict({name.removeprefix(self.prefix): t for name, t in state.items() if "/" not in name})
            made.append(module)
        return made

    def examples(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        generator = torch.Generator().manual_seed(1)
        inputs, classes = self.shape
        return torch.randn(24, inputs, generator=generator), torch.randint(classes, (24,), generator=generator)


def frozen_at_the_end() -> nn.Module:
    """The network whose last bias DeepSpeed's stage 0 was not given to train."""
    made = hugging.network()
    made[3].bias.requires_grad_(False)
    return made


def of_torch(path: str, name: str, ranks: int = 1, make: Callable[[], nn.Module] = plain.Untied, **more: Any) -> Case:
    saved = lambda: [plain.expected(name, rank) for rank in range(ranks)]  # noqa: E731
    return Case(lambda: plain.written() / path, make, saved, (4, 2), **more)


def of_hugging(name: str, make: Callable[[], nn.Module] = hugging.network) -> Case:
    return Case(lambda: hugging.written() / name, make, lambda: [hugging.expected(name)["weights"]], (3, 2))


def of_two(path: str, name: str, *, normalised: bool = True, **more: Any) -> Case:
    saved = lambda: [sharded.expected(sharded.two(), name)]  # noqa: E731
    return Case(lambda: sharded.two() / path, partial(sharded.network, 0, normalised), saved, (6, 3), **more)


def of_learners(path: str) -> Case:
    saved = lambda: [load_file(sharded.two() / f"learners.{rank}.expected.safetensors") for rank in range(2)]  # noqa: E731
    return Case(lambda: sharded.two() / path, partial(sharded.network, 0), saved, (6, 3))


CASES = {
    "DDP": of_torch("ddp.pt", "ddp", make=plain.Network),
    "torch.compile": of_torch("compiled.pt", "ddp", make=plain.Network),
    "DDP, a file a rank": of_torch("ddp-ranks", "ddp", 2, make=plain.Network),
    "gossip": of_torch("gossip", "gossip", 2),
    "decent-dp, SGD": of_torch("decent-sgd/ckpt_rank*", "decent-sgd", 2),
    "decent-dp, Adam": of_torch("decent-adam/ckpt_rank*", "decent-adam", 2),
    "Lightning, DDP": of_torch("lightning-ddp", "lightning-ddp", steps=[8], prefix="net."),
    "Lightning": of_torch("lightning", "lightning", prefix="net."),
    "Accelerate": of_hugging("accelerate"),
    "Accelerate, torch.save": of_hugging("accelerate-bin"),
    "DeepSpeed, ZeRO-0": of_hugging("deepspeed-0", frozen_at_the_end),
    "DeepSpeed, ZeRO-1": of_hugging("deepspeed-1"),
    "DeepSpeed, ZeRO-2": of_hugging("deepspeed-2"),
    "DCP's Hugging Face writer, learners": Case(
        lambda: hugging.written() / "writer-learners",
        hugging.network,
        lambda: [hugging.network(rank).state_dict() for rank in range(2)],
        (3, 2),
    ),
    "DCP, DDP": of_two("ddp", "ddp", prefix="module."),
    "DCP, learners": of_learners("learners"),
    "DCP, a stack": of_learners("stack"),
    "FSDP2": of_two("fsdp2", "fsdp2"),
    "FSDP1": of_two("fsdp1", "fsdp1"),
    "FSDP2, files of ranks": of_two("whole_rank_*", "fsdp2"),
    "FSDP2 by Accelerate": of_two("accelerate", "accelerate", normalised=False),
    "FSDP2 by Lightning": of_two("lightning", "lightning", normalised=False, prefix="net."),
    "HSDP": Case(
        lambda: sharded.four() / "hsdp",
        partial(sharded.network, 0, False),
        lambda: [load_file(sharded.four() / "hsdp.0.expected.safetensors")],
        (6, 3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_library_wrote_is_measured_as_what_was_in_memory(tmp_path: Path, tiny_task: Task, name: str) -> None:
    case = CASES[name]
    modules = case.modules()
    task = replace(tiny_task, build_model=case.make)
    run = import_run(case.path(), tmp_path / "run", task=task, steps=case.steps, quiet=True)
    (step,) = run.steps
    learners = run.learners(step)
    if len(modules) == 1:  # one model that several processes trained stands for each of them
        modules *= len(learners)
    assert_measured_alike(learners, modules, case.examples())
