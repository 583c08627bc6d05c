"""A process that has imported everything, and forks torchrun's agent and its workers from itself: seconds saved at every launch.

Reads one JSON request a line and answers with one line, the exit statuses, null for what had to be killed. A request has "folder",
"arguments", "environment", "timeout", and "torchrun", its flags; or for processes without it "size", "alone" (which ranks) and "hung" (how
many are not waited for); or none of these, for one process.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import torch
import torch._dynamo  # what torch loads at first use
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

import landscape.experiments.train  # noqa: F401 - the most of it
from landscape.cli import main


def worker(*arguments: str) -> None:
    """What `python -m landscape` does."""
    sys.exit(main(arguments))


def torchrun(flags: list[str], arguments: list[str]) -> int:
    """What torchrun does, but that its workers are forked."""
    config, _, _ = run.config_from_args(run.parse_args([*flags, "unused"]))
    config.start_method = "fork"
    try:
        elastic_launch(config=config, entrypoint=worker)(*arguments)
    except (ChildFailedError, SignalException) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def fork(request: dict[str, Any], environment: dict[str, str]) -> int:
    """Run the request in a child, in a process group of its own."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        os.environ.update(request["environment"] | environment)
        sys.path.insert(0, request["folder"])
        arguments = request["arguments"]
        status = torchrun(request["torchrun"], arguments) if "torchrun" in request else main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(request: dict[str, Any]) -> list[int | None]:
    """Exit statuses."""
    size = request.get("size")
    ranks = [{}] if size is None else [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size)} for r in request["alone"]]  # fmt: skip
    children = [fork(request, environment) for environment in ranks]
    statuses: dict[int, int | None] = {}
    end = time.monotonic() + request["timeout"]
    while len(statuses) < len(children) - request.get("hung", 0) and time.monotonic() < end:
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG)) != (0, 0):
                statuses[child] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.01)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if child not in statuses:
            os.waitpid(child, 0)
    return [statuses.get(child) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
