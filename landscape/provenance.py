"""Where a number came from: versions, commit, machine and time, stamped on every run and result."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """Version of landscape, and its git commit where it runs from a checkout ("+changes" if edited since)."""
    try:
        version = metadata.version("landscape")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        version = "unknown"
    return {"landscape": version, "git_commit": _git_commit() or "none"}


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        if Path(top) != folder.parent:  # installed inside somebody else's checkout
            return None
        return _git(folder, "rev-parse", "HEAD") + (
            "+changes" if _git(folder, "status", "--porcelain", "--", str(folder)) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine and time, as a flat dictionary of strings and numbers."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        **code_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
