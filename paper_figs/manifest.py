"""The manifest: for each figure its claim, what became of it, the SHA-256 of what it is drawn from, and its headline numbers.

paper_figs/manifest.json is written from the data that are kept with the code; the tests make the numbers again and hold them to it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from landscape.checkpoints.format import write_atomically
from paper_figs.claims import Headline, finding

MANIFEST = Path(__file__).with_name("manifest.json")


def entry(claim: str, inputs: tuple[str, ...], folder: Path, numbers: Mapping[str, Headline]) -> dict[str, Any]:
    """What the manifest says of one figure."""
    return {
        "claim": claim,
        "finding": finding(numbers),
        "inputs": {name: sha256(folder / name) for name in inputs},
        "headlines": {
            name: {
                "text": h.text,
                "value": h.value,
                "stderr": h.stderr if math.isfinite(h.stderr) else None,
                "tolerance": h.tolerance,
                "bearing": h.bearing,
            }
            for name, h in numbers.items()
        },
    }


def sha256(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(path: Path = MANIFEST) -> dict[str, Any]:
    """All entries by figure; empty if there is no manifest.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_manifest(entries: Mapping[str, Any], path: Path = MANIFEST) -> None:
    """Write entries, beside those of other figures that are there."""
    text = json.dumps({**read_manifest(path), **entries}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def differences(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """In what a figure's entry differs from the manifest's: other data, or a number beyond its tolerance; in words."""
    said = []
    for name, digest in found["inputs"].items():
        if kept["inputs"].get(name) != digest:
            said.append(f"{name} is not the file of the manifest")
    for name, number in found["headlines"].items():
        before = kept["headlines"].get(name)
        if before is None:
            said.append(f"{name} is not in the manifest")
        elif not abs(number["value"] - before["value"]) <= before["tolerance"]:
            said.append(
                f"{name} is {number['value']:.4g}, in the manifest {before['value']:.4g} ± {before['tolerance']:.2g}"
            )
    said += [f"{name} is missing" for name in kept["headlines"] if name not in found["headlines"]]
    if found["finding"] != kept["finding"]:
        said.append(f"the claim is {found['finding']}, in the manifest {kept['finding']}")
    return said
