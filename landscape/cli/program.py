"""The program: which command, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Union

import tyro

from landscape.cli.experiments import Edge, Replay, Reproduce, Rescue, Sweep
from landscape.cli.runs import Import, Inspect, Measure, RecipeFlags, Report, Tasks, Train
from landscape.printable import printable
from landscape.ranks import AgreedError, launched, tells

DEBUG_VARIABLE = "LANDSCAPE_DEBUG"

LINGER = 5.0
"""Seconds that a process with nothing to tell waits for the one that has."""

Command = Union[  # noqa: UP007 - tyro reads the annotations
    Annotated[Reproduce, tyro.conf.subcommand("reproduce")],
    Annotated[Train, tyro.conf.subcommand("train")],
    Annotated[Measure, tyro.conf.subcommand("measure")],
    Annotated[Sweep, tyro.conf.subcommand("sweep")],
    Annotated[Replay, tyro.conf.subcommand("replay")],
    Annotated[Edge, tyro.conf.subcommand("edge")],
    Annotated[Rescue, tyro.conf.subcommand("rescue")],
    Annotated[Report, tyro.conf.subcommand("report")],
    Annotated[Inspect, tyro.conf.subcommand("inspect")],
    Annotated[Import, tyro.conf.subcommand("import")],
    Annotated[Tasks, tyro.conf.subcommand("tasks")],
    Annotated[RecipeFlags, tyro.conf.subcommand("recipe")],
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 0, 2 for a user's mistake or a lost process, 130 after Ctrl-C, 143 after SIGTERM."""
    ranks = launched()
    with contextlib.ExitStack() as silence:
        if not ranks.leads:  # help, or what is wrong with the flags, is told once
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            command = tyro.cli(
                Command,  # type: ignore[arg-type]
                prog="landscape",
                description="Why a multi-GPU training run converged or blew up: noise, curvature and effective learning rate, held against theory.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except SystemExit:
            if not ranks.leads:
                _linger()
            raise
    try:
        if ranks.size > 1 and not isinstance(command, Train | Measure):
            raise AgreedError("only train and measure run on several processes; start this command without torchrun")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            command.run()
    except KeyboardInterrupt as interrupt:
        if tells(interrupt):
            print(f"landscape: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return getattr(interrupt, "status", 130)
    except BrokenPipeError:
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if tells(error):
            print(f"landscape: error: {printable(str(error), lines=True)}", file=sys.stderr)
        else:
            _linger()
        return 2
    return 0


def _linger() -> None:
    """Let the process that has something to tell do so: torchrun ends all of them as soon as one has ended, with SIGTERM."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    signal.signal(signal.SIGTERM, end)
    with contextlib.suppress(TimeoutError):
        time.sleep(LINGER)
