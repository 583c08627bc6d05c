"""Fixtures that several test processes share: written by the first that asks, removed by the last that ends."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[3]


@functools.cache
def written(module: str) -> Path:
    """The folder into which `python -m module FOLDER` wrote, once a run of the tests."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    folder = Path(tempfile.gettempdir()) / f"{module.rpartition('.')[2]}-{run}"
    using = open(f"{folder}.using", "w")  # noqa: SIM115 - held until the process ends
    fcntl.flock(using, fcntl.LOCK_SH)
    with open(f"{folder}.writing", "w") as writing:  # another lock: one that all hold would never be anybody's alone
        fcntl.flock(writing, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            (folder / "errors").write_text(_launch(module, folder))
    atexit.register(_remove, folder, using)
    errors = (folder / "errors").read_text()
    assert not errors, errors
    return folder


def _launch(module: str, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", module, str(folder)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return "" if ended.returncode == 0 else ended.stderr[-4000:] or f"exit {ended.returncode}"


def _remove(folder: Path, using: IO[str]) -> None:
    with contextlib.suppress(BlockingIOError):  # another process still reads them
        fcntl.flock(using, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        for suffix in ("using", "writing"):
            Path(f"{folder}.{suffix}").unlink(missing_ok=True)
