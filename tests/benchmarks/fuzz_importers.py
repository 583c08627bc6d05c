"""Many damaged and hostile checkpoints of each format: how many were refused, read, and how long the slowest took.

    python -m tests.benchmarks.fuzz_importers [--tries 10000] [--formats plain DCP ...]

Every format runs in processes of their own with bounded address space, so that a crash is seen and counted, and the tries go on after it.
Formats are stored one by one, and those not named keep their rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from landscape.provenance import code_version
from tests.benchmarks.timing import RESULTS, store
from tests.checkpoints.corpus import CORPUS
from tests.checkpoints.fuzzing import LONGEST, ROOM, fuzz

AT_ONCE = 2500
"""Tries of one process."""


def run_format(name: str, tries: int) -> dict[str, Any]:
    """All tries of one format."""
    total: dict[str, Any] = {"tries": 0, "refused": 0, "read": 0, "slowest_s": 0.0, "crashes": 0, "failures": []}
    begun = time.monotonic()
    for start in range(0, tries, AT_ONCE):
        stop = min(start + AT_ONCE, tries)
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.fuzz_importers",
                "--one",
                name,
                str(start),
                str(stop),
                folder,
            ]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=AT_ONCE * LONGEST)
        if ended.returncode != 0:
            total["crashes"] += 1
            total["failures"].append([f"{start} to {stop}", f"exit {ended.returncode}", ended.stderr[-500:]])
            continue
        tally = json.loads(ended.stdout.splitlines()[-1])
        for key in ("tries", "refused", "read"):
            total[key] += tally[key]
        total["slowest_s"] = max(total["slowest_s"], tally["slowest"])
        total["failures"] += tally["failures"]
    return {**total, "seconds": time.monotonic() - begun, "made": code_version()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--formats", nargs="*", default=list(CORPUS))
    parser.add_argument("--one", nargs=4, metavar=("FORMAT", "START", "STOP", "FOLDER"))
    options = parser.parse_args()
    if options.one:
        name, start, stop, folder = options.one
        print(json.dumps(asdict(fuzz(name, range(int(start), int(stop)), Path(folder) / "fuzz", bounded=True))))
        return
    path = RESULTS / "fuzz_importers.json"
    found = json.loads(path.read_text())["formats"] if path.exists() else {}
    for name in options.formats:
        found[name] = run_format(name, options.tries)
        shown = {k: v for k, v in found[name].items() if k != "failures"}
        print(name, shown, found[name]["failures"][:5], flush=True)
        kept = {layout: found[layout] for layout in CORPUS if layout in found}
        store("fuzz_importers", {"longest_allowed_s": LONGEST, "address_space_allowed_bytes": ROOM, "formats": kept})


if __name__ == "__main__":
    main()
