"""Frames of speech in files that are larger than memory.

    FOLDER/features-00000-of-00004.safetensors
        features  (N, F) float16 or float32, the frames of whole utterances, one after another
        states    (N,) int32
        ends      (U,) int64, where each utterance ends: the number of frames of this file in it and before it
        names     uint8, the utterances' names in UTF-8, one a line
        mean      (F,) float64 over the frames of this file, and squares (F,) float64, the sum of squared differences from it
        counts    (S,) int64, how often each state occurs
    metadata: format, and sha256 of all the tensors

`convert` makes them of Kaldi's tables. They are memory-mapped: a batch reads its windows alone, and checks what it reads. `check_shards` reads all
and holds it to the hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from landscape.data.frames import Moments, moments
from landscape.data.kaldi import Corpus

FORMAT = "landscape frames 1"
FILE_NAME = re.compile(r"features-([0-9]{5})-of-([0-9]{5})\.safetensors")
FRAMES_PER_SHARD = 1 << 20
"""About 3 hours; half a gigabyte of 260 features in float16."""
TENSORS = {
    "features": ((torch.float16, torch.float32), 2),
    "states": ((torch.int32,), 1),
    "ends": ((torch.int64,), 1),
    "names": ((torch.uint8,), 1),
    "mean": ((torch.float64,), 1),
    "squares": ((torch.float64,), 1),
    "counts": ((torch.int64,), 1),
}
"""Types and numbers of dimensions."""
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Shard:
    """One file.

    Attributes:
        path: of the file.
        tensors: by name, see the module; memory-mapped.
        digest: sha256 of the contents, as taken when they were written.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    digest: str

    @property
    def moments(self) -> Moments:
        """Of its features."""
        return Moments(len(self.tensors["states"]), self.tensors["mean"], self.tensors["squares"])

    def utterance_of(self, frame: int) -> str:
        """The name of the utterance that a frame is of."""
        names = bytes(self.tensors["names"].tolist()).decode().split("\n")
        return names[int(torch.searchsorted(self.tensors["ends"], frame, right=True))]


def open_shards(folder: Path) -> list[Shard]:
    """All shards in a folder.

    Raises:
        ValueError: for a shard that is missing, damaged, or of another number or type of features than the first.
    """
    found = sorted(p for p in folder.glob("features-*.safetensors") if FILE_NAME.fullmatch(p.name))
    totals = {match[2] for p in found if (match := FILE_NAME.fullmatch(p.name))}
    if len(totals) != 1:
        raise ValueError(f"{folder}: no shards features-00000-of-0000N.safetensors, or of several sets: {', '.join(sorted(p.name for p in found)) or 'none'}")  # fmt: skip
    total = totals.pop()
    missing = sorted({shard_name(i, int(total)) for i in range(int(total))} - {p.name for p in found})
    if missing or len(found) != int(total):
        raise ValueError(f"{folder}: {len(found)} of {int(total)} shards; missing: {', '.join(missing) or 'none'}. Copy them, or convert again")  # fmt: skip
    shards = [_open(path) for path in found]
    for shard in shards[1:]:
        kinds = [(s.tensors["features"].shape[1], s.tensors["features"].dtype) for s in (shard, shards[0])]
        if kinds[0] != kinds[1]:
            told = [f"{size} features of {dtype}" for size, dtype in kinds]
            raise ValueError(f"{shard.path}: {told[0]}, but {told[1]} in {shards[0].path.name}")
    return shards


def shard_name(index: int, total: int) -> str:
    """The file name of a shard.

    >>> shard_name(0, 4)
    'features-00000-of-00004.safetensors'
    """
    return f"features-{index:05d}-of-{total:05d}.safetensors"


def _open(path: Path) -> Shard:
    try:
        with safe_open(path, framework="pt") as file:  # maps the file, and checks its size against the header
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in TENSORS}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy or convert it again") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no shard of frames: its metadata has format {metadata.get('format')!r} instead of {FORMAT!r}; landscape.data.shards.convert makes them")  # fmt: skip
    for name, (types, dimensions) in TENSORS.items():
        if name not in tensors or tensors[name].dtype not in types or tensors[name].ndim != dimensions:
            found = f"{tensors[name].dtype} of {tuple(tensors[name].shape)}" if name in tensors else "missing"
            raise ValueError(f"{path}: tensor {name} is {found}; needed are {dimensions} dimension(s) of {' or '.join(map(str, types))}")  # fmt: skip
    frames, size = tensors["features"].shape
    lengths = tensors["ends"].diff(prepend=torch.zeros(1, dtype=torch.int64))
    fits = len(tensors["states"]) == frames == int(lengths.sum()) and bool((lengths > 0).all()) and frames > 0
    told = tensors["mean"].isfinite().all() and tensors["squares"].isfinite().all() and (tensors["counts"] >= 0).all() and int(tensors["counts"].sum()) == frames  # fmt: skip
    if not fits or not told or not len(tensors["mean"]) == len(tensors["squares"]) == size:
        sizes = {name: tuple(t.shape) for name, t in tensors.items()}
        raise ValueError(f"{path}: tensors that do not fit together ({sizes}); convert it again")
    return Shard(path, tensors, metadata.get("sha256", ""))


@dataclass(frozen=True, eq=False)
class ShardFrames:
    """The frames of all shards, one after another; see `landscape.data.frames.Frames`.

    A batch is gathered by the CPU from memory-mapped files, and moved to the device then.

    Attributes:
        shards: the files.
        device: where gathered frames go.
    """

    shards: Sequence[Shard]
    device: torch.device = CPU

    @cached_property
    def _starts(self) -> Tensor:
        """(S + 1,) number of the first frame of each shard, and of all frames."""
        return torch.tensor([0, *(len(s.tensors["states"]) for s in self.shards)]).cumsum(0)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Frames`."""
        return int(self._starts[-1]), self.shards[0].tensors["features"].shape[1]

    @property
    def ends(self) -> Tensor:
        """(U,) where utterances end, among the frames of all shards."""
        return torch.cat([s.tensors["ends"] + start for s, start in zip(self.shards, self._starts[:-1], strict=True)])

    def gather(self, rows: Tensor) -> Tensor:
        """See `Frames`; damaged ones, with nan or infinity, are refused."""
        found = self._gather("features", rows)
        sound = torch.isfinite(found).all(1)
        if not sound.all():
            self._refuse(rows.cpu()[~sound][0], "features that are nan or infinite")
        return found.to(self.device)

    def gather_states(self, rows: Tensor) -> Tensor:
        """See `Frames`; damaged ones, out of range, are refused."""
        found, states = self._gather("states", rows), len(self.shards[0].tensors["counts"])
        sound = (found >= 0) & (found < states)
        if not sound.all():
            self._refuse(rows.cpu()[~sound][0], f"state {int(found[~sound][0])}, but there are {states} (0 to {states - 1})")  # fmt: skip
        return found.to(self.device, torch.int64)

    def _refuse(self, row: Tensor, what: str) -> NoReturn:
        number = int(torch.searchsorted(self._starts, row, right=True)) - 1
        shard, frame = self.shards[number], int(row - self._starts[number])
        raise ValueError(f"{shard.path}, utterance {shard.utterance_of(frame)}: {what}; the file is damaged, copy or convert it again")  # fmt: skip

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        wanted = rows.cpu()
        first = self.shards[0].tensors[name]
        found = torch.empty(len(wanted), *first.shape[1:], dtype=first.dtype)
        holders = torch.searchsorted(self._starts, wanted, right=True) - 1
        for number in holders.unique().tolist():
            positions = (holders == number).nonzero().flatten()
            local = wanted[positions] - self._starts[number]
            found[positions] = self.shards[number].tensors[name].index_select(0, local)
        return found

    def to(self, device: torch.device | str) -> ShardFrames:
        """See `Frames`."""
        return ShardFrames(self.shards, torch.device(device))

    def fingerprint(self) -> str:
        """A short hash of the shards' names and of the hashes of their contents that were taken when they were written; see `check_shards`."""
        told = "\n".join(f"{s.path.name} {s.digest}" for s in self.shards)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def convert(
    source: str | Path, out: str | Path, *, features: int = 260, states: int = 32_000, dtype: torch.dtype = torch.float16,
    frames_per_shard: int = FRAMES_PER_SHARD,
) -> list[Path]:  # fmt: skip
    """Write Kaldi's tables as shards.

        python -c "from landscape.data.shards import convert; convert('kaldi/train', 'data/swb300/train')"

    Everything is checked that `landscape.data.kaldi.Corpus` checks. Memory: a shard. A shard appears under its name when it is whole.

    Args:
        source: a folder with feats*.scp and ali.scp, see `Corpus`.
        out: a folder, made if need be, without shards.
        features: how many there are of a frame.
        states: how many there are.
        dtype: float16, or float32 for twice the space; float16 rounds by up to a part in 2,000.
        frames_per_shard: a shard is closed when the next utterance would make it larger.

    Returns:
        the files.
    """
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"frames are stored as torch.float16 or torch.float32, not {dtype}")
    folder = Path(out)
    if list(folder.glob("features-*")):
        raise ValueError(f"{folder} holds features-* files already; convert to another folder, or delete them")
    corpus = Corpus(source, features=features, states=states)
    parts: list[list[str]] = [[]]
    size = 0
    for name in corpus.names:
        count = corpus.count(name)
        if parts[-1] and size + count > frames_per_shard:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += count
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / shard_name(i, len(parts)), corpus, names, dtype) for i, names in enumerate(parts)]


def _write(path: Path, corpus: Corpus, names: Sequence[str], dtype: torch.dtype) -> Path:
    read = [corpus.read(name) for name in names]
    frames = torch.cat([torch.from_numpy(x.copy()).to(dtype) for x, _ in read])
    labels = torch.from_numpy(np.concatenate([y for _, y in read]))
    ends = torch.tensor([len(y) for _, y in read]).cumsum(0)
    if not torch.isfinite(frames).all():
        bad = int((~torch.isfinite(frames)).any(1).nonzero()[0])
        utterance = names[int(torch.searchsorted(ends, bad, right=True))]
        raise ValueError(f"{corpus.folder}, utterance {utterance}: features beyond the range of {dtype}; convert with dtype=torch.float32")  # fmt: skip
    found = moments(frames)
    tensors = {
        "features": frames, "states": labels, "ends": ends, "names": torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8),
        "mean": found.mean, "squares": found.squares, "counts": torch.bincount(labels, minlength=corpus.states),
    }  # fmt: skip
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"format": FORMAT, "sha256": _digest(tensors)})
    partial.replace(path)
    return path


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()


def check_shards(folder: str | Path) -> int:
    """Read all shards of a folder and compare them with the hashes that were taken when they were written; once after a copy is enough.

    Returns:
        the number of shards.

    Raises:
        ValueError: for those that differ, or what `open_shards` refuses.
    """
    shards = open_shards(Path(folder))
    differ = [s.path.name for s in shards if _digest(s.tensors) != s.digest]
    if differ:
        raise ValueError(f"{folder}: {len(differ)} of {len(shards)} shards do not hold what was written ({', '.join(differ)}); copy or convert them again")  # fmt: skip
    return len(shards)
