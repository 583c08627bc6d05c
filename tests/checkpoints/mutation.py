"""Damaged and hostile variants of checkpoints, made from whole ones by a random generator.

Files are cut, flipped, spliced, swapped, emptied, made overlong, replaced by links, pipes and folders; numbers and strings in JSON and in
pickles (also those inside zip archives, whose checksums are then right again) become huge, negative, hostile; members of archives are
compressed, doubled, made to expand. Nothing is written outside the folder given.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
from pathlib import Path

NUMBERS = [0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, -(2**31), 2**32, 2**40, 2**63 - 1, -(2**63), 10**30]
STRINGS = [
    "", ".", "..", "../../outside", "/etc/passwd", "/dev/zero", "a\0b", "x" * 5000, "\udcff".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    "__0_0.distcp", "model.safetensors", "weight", "storage", "cuda:0", "meta", "0", "99999999999999999999", "nan", "../latest",
]  # fmt: skip


def mutate(folder: Path, rng: random.Random, marker: Path) -> str:
    """Change one to three things in a folder; says what. `marker` is the file that hostile pickles would make."""
    return "; ".join(_once(folder, rng, marker) for _ in range(rng.choice([1, 1, 1, 2, 3])))


def _once(folder: Path, rng: random.Random, marker: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if not files:
        return "nothing left"
    path = rng.choice(files)
    kinds = [_bytes] * 4 + [_place]
    start = path.read_bytes()[:4]
    if start == b"PK\x03\x04":
        kinds += [_archive] * 6
    elif start[:1] == b"\x80":
        kinds += [_pickled] * 6
    elif start[:1] in (b"{", b"["):
        kinds += [_json] * 5
    elif path.suffix == ".safetensors":
        kinds += [_header] * 6
    kind = rng.choice(kinds)
    return f"{path.relative_to(folder)}: {kind(path, rng, marker)}"


# Bytes -----------------------------------------------------------------------------------------------------------------


def _bytes(path: Path, rng: random.Random, _: Path) -> str:
    content = bytearray(path.read_bytes())
    size = len(content)
    a, b = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
    kind = rng.choice(["cut", "flip", "flip", "noise", "delete", "double", "swap", "zero", "append", "empty", "front"])
    if kind == "cut":
        del content[a:]
    elif kind == "flip" and size:
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "noise":
        content[a : a + 16] = rng.randbytes(len(content[a : a + 16]))
    elif kind == "delete":
        del content[a:b]
    elif kind == "double":
        content[a:a] = content[a:b]
    elif kind == "swap":
        content = content[b:] + content[a:b] + content[:a]
    elif kind == "zero":
        content[a:b] = bytes(b - a)
    elif kind == "append":
        content += rng.randbytes(rng.randrange(1, 200))
    elif kind == "empty":
        content = bytearray()
    elif kind == "front":
        content[:8] = struct.pack(
            "<Q", rng.choice([0, 1, size, size + 1, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2**16)])
        )
    path.write_bytes(bytes(content))
    return f"{kind} {a}:{b}"


def _place(path: Path, rng: random.Random, _: Path) -> str:
    """Something else in the place of a file."""
    kind = rng.choice(
        ["gone", "link out", "link to itself", "dangling", "folder", "pipe", "renamed", "copied", "other's"]
    )
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and not p.is_symlink() and p != path)
    if kind == "copied":
        (
            path.parent / rng.choice(["copy.pt", "model_rank7.pt", "step-7.pt", "__9_0.distcp", f"x{path.name}"])
        ).write_bytes(path.read_bytes())
        return kind
    if kind == "other's" and others:
        path.write_bytes(rng.choice(others).read_bytes())
        return kind
    if kind == "renamed":
        path.rename(
            path.with_name(
                rng.choice(["model_rank7.pt", "weights", "x.safetensors", "-1-of-0.safetensors", "step-.pt"])
            )
        )
        return kind
    path.unlink()
    if kind == "link out":
        path.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", "/dev/random", "/proc/self/mem", "../../../"]))
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    return kind


# JSON ------------------------------------------------------------------------------------------------------------------


def _json(path: Path, rng: random.Random, _: Path) -> str:
    path.write_text(edit_json(path.read_text(errors="replace"), rng))
    return "json"


def edit_json(text: str, rng: random.Random) -> str:
    """A JSON text with one value changed, or no JSON any more."""
    kind = rng.choice(["value", "value", "value", "key", "deep", "nan", "doubled"])
    if kind == "deep":
        return "[" * 100_000 + "]" * rng.choice([0, 100_000])
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text[: len(text) // 2]
    spots: list[tuple[object, object]] = []
    todo = [value]
    while todo:
        at = todo.pop()
        for key, held in at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ():
            spots.append((at, key))
            todo.append(held)
    if not spots:
        return text
    at, key = rng.choice(spots)
    new = rng.choice([*NUMBERS, *STRINGS, None, True, [], {}, [[]], {"a": [1]}, 0.5, [0, 2**60], [-1, 4]])
    if kind == "key" and isinstance(at, dict):
        at[rng.choice(STRINGS)] = at.pop(key)
    elif kind == "nan":
        at[key] = float("nan")  # type: ignore[index]
    elif kind == "doubled":
        return text[:-1] + "," + text[1:]
    else:
        at[key] = new  # type: ignore[index]
    return json.dumps(value)


def _header(path: Path, rng: random.Random, _: Path) -> str:
    """A safetensors file with another header and the same data."""
    content = path.read_bytes()
    if len(content) < 8:
        return "too short"
    size = min(struct.unpack("<Q", content[:8])[0], len(content) - 8)
    header = edit_json(content[8 : 8 + size].decode(errors="replace"), rng).encode(errors="replace")
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    return "header"


# Pickles and archives ----------------------------------------------------------------------------------------------------


def _pickled(path: Path, rng: random.Random, marker: Path) -> str:
    path.write_bytes(edit_pickle(path.read_bytes(), rng, marker))
    return "pickle"


def edit_pickle(content: bytes, rng: random.Random, marker: Path) -> bytes:
    """A pickle with one of its operations changed, left out, doubled, swapped with another, or made hostile."""
    try:
        operations = [
            (code, argument, place) for code, argument, place in pickletools.genops(content) if place is not None
        ]
    except Exception:
        return content[: len(content) // 2]
    ends = [place for _, _, place in operations[1:]] + [operations[-1][2] + 1]
    i = rng.randrange(len(operations))
    kind = rng.choice(["number", "number", "string", "string", "drop", "double", "swap", "hostile", "bomb", "self"])
    code, argument, place = operations[i]
    if kind in ("number", "string"):
        wanted = [
            j
            for j, (_, a, _) in enumerate(operations)
            if (isinstance(a, int) if kind == "number" else isinstance(a, str))
        ]
        if not wanted:
            return content
        i = rng.choice(wanted)
        code, argument, place = operations[i]
        new = b""
        if (
            kind == "number"
            and "PUT" not in code.name
            and "GET" not in code.name
            and code.name not in ("PROTO", "FRAME")
        ):
            number = rng.choice([*NUMBERS, argument + 1, argument - 1, 2 * argument])
            new = pickle.dumps(number, 2)[2:-1]
        elif kind == "string" and "UNICODE" in code.name:
            new = pickle.dumps(rng.choice([*STRINGS, *(a for _, a, _ in operations if isinstance(a, str))]), 2)[2:-3]
        if new:
            return content[:place] + new + content[ends[i] :]
        return content
    if kind == "drop":
        return content[:place] + content[ends[i] :]
    if kind == "double":
        return content[: ends[i]] + content[place:]
    if kind == "swap":
        j = min(i + 1, len(operations) - 1)
        return content[:place] + content[operations[j][2] : ends[j]] + content[place : ends[i]] + content[ends[j] :]
    insert = {
        "hostile": b"cos\nsystem\n(X" + struct.pack("<I", len(str(marker)) + 6) + f"touch {marker}".encode() + b"tR0",
        "bomb": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R0",
        "self": b"]\x94h\x00a0",
    }[kind]
    start = ends[1] if len(ends) > 1 and operations[1][0].name == "FRAME" else ends[0]
    return content[:start] + insert + content[start:]


def _archive(path: Path, rng: random.Random, marker: Path) -> str:
    """A zip archive with one member changed and right checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    except Exception:
        return _bytes(path, rng, marker)
    kind = rng.choice(
        ["pickle", "pickle", "pickle", "compressed", "bomb", "doubled", "renamed", "gone", "shorter", "order"]
    )
    i = rng.randrange(len(members))
    structure = next((j for j, (name, _) in enumerate(members) if name.endswith("data.pkl")), i)
    method = zipfile.ZIP_STORED
    if kind == "pickle":
        members[structure] = (members[structure][0], edit_pickle(members[structure][1], rng, marker))
    elif kind == "compressed":
        method = zipfile.ZIP_DEFLATED
    elif kind == "bomb":
        members[i], method = (members[i][0], bytes(8 << 20)), zipfile.ZIP_DEFLATED
    elif kind == "doubled":
        members.append((members[i][0], b"\0" * 64))
    elif kind == "renamed":
        members[i] = (
            rng.choice(["../../outside", "/abs", "archive/data.pkl", "x/constants.pkl", "archive/data/9"]),
            members[i][1],
        )
    elif kind == "gone":
        del members[i]
    elif kind == "shorter":
        members[i] = (members[i][0], members[i][1][: len(members[i][1]) // 2])
    elif kind == "order":
        rng.shuffle(members)
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name or "x"), content, compress_type=method, compresslevel=1)
    path.write_bytes(made.getvalue())
    return f"archive, {kind}"
