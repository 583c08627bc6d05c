"""Kaldi's tables of features and alignments: an scp file that says where in which ark files an utterance's numbers are.

Read here, not by a library: kaldiio and kaldi_io run the commands that an scp file may name ("cat a.ark |"), kaldiio unpickles what an ark
file may hold and is licensed for evaluation alone, and kaldi_native_io trusts the sizes that a damaged file gives. The binary format is small
and old (kaldi-matrix.cc, compressed-matrix.h and io-funcs-inl.h of github.com/kaldi-asr/kaldi). Nothing that a file names is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IVECTOR_PERIOD = 10
"""Frames between the i-vectors of an utterance, as Kaldi's extract_ivectors_online.sh writes them."""
PLACE = re.compile(r"(.+):([0-9]+)")
"""FILE:OFFSET"""
COPY = "copy-feats scp:IN.scp ark,scp:OUT.ark,OUT.scp"
GLOBAL_HEADER = np.dtype([("min", "<f4"), ("range", "<f4"), ("rows", "<i4"), ("columns", "<i4")])
LARGEST = float(np.finfo(np.float32).max)
INTEGER = np.dtype([("bytes", "u1"), ("value", "<i4")])


class Table:
    """An scp file, read by utterance.

    A line is "UTTERANCE FILE:OFFSET". A relative FILE is looked for beside the scp file, and then from the current folder, as Kaldi does.
    Commands ("... |"), streams ("-") and ranges of rows ("[0:51]") are refused.

    Args:
        path: of the scp file.

    Raises:
        ValueError: for a line that is not of this form, an utterance given twice, a missing file, or a file without lines.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._places: dict[str, tuple[Path, int]] = {}
        self._held: tuple[Path, np.ndarray] | None = None
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} cannot be read as a Kaldi scp file: {error}") from error
        files: dict[str, Path] = {}
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._add(line, f"{self.path}, line {number}", files)
        if not self._places:
            raise ValueError(f"{self.path} is empty: it names no utterance")

    def _add(self, line: str, where: str, files: dict[str, Path]) -> None:
        name, *rest = line.split(maxsplit=1)
        place = rest[0].strip() if rest else ""
        if "|" in place or place == "-":
            raise ValueError(f"{where}: {place!r} is a command or a stream, which is not run; write what it gives to a file: {COPY}")  # fmt: skip
        if place.endswith("]"):
            raise ValueError(f"{where}: {place!r} is a range of rows, which is not read; write the rows to a file: {COPY}")  # fmt: skip
        match = PLACE.fullmatch(place)
        if match is None:
            raise ValueError(f"{where}: {line.strip()!r} is not of the form UTTERANCE FILE:OFFSET")
        if name in self._places:
            raise ValueError(f"{where}: utterance {name} comes a second time")
        file = match[1]
        if file not in files:
            beside = self.path.parent / file
            files[file] = beside if beside.is_file() else Path(file)
            if not files[file].is_file():
                raise ValueError(f"{where}: there is no file {file}, neither from the scp file's folder nor from the current one, which Kaldi's relative paths are from")  # fmt: skip
        self._places[name] = files[file], int(match[2])

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> np.ndarray:
        """The matrix (rows, columns) or vector of an utterance, float32 or float64 as it is stored (float32, if compressed), or integers, int32.

        Raises:
            ValueError: for what is no binary Kaldi object, or a damaged or truncated one.
        """
        return read_object(self._open(name))

    def count(self, name: str) -> int:
        """How many integers an utterance's vector of integers has."""
        return _integer_count(self._open(name))

    def _open(self, name: str) -> Cursor:
        file, offset = self._places[name]
        if self._held is None or self._held[0] != file:  # those of one file mostly follow each other
            buffer = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
            self._held = file, buffer
        return Cursor(self._held[1], offset, f"{file}, utterance {name}")


@dataclass
class Cursor:
    """A place in a file's bytes, which moves on.

    Attributes:
        buffer: uint8, the file.
        position: of the next byte.
        where: for messages.
    """

    buffer: np.ndarray
    position: int
    where: str

    def take(self, dtype: str | np.dtype, count: int = 1) -> np.ndarray:
        """The next `count` numbers, without a copy; checked against the size of the file before anything is read."""
        size = np.dtype(dtype).itemsize * count
        if count < 0 or self.position + size > len(self.buffer):
            raise ValueError(f"{self.where}: the file is truncated or damaged; {size} bytes should be at byte {self.position} of {len(self.buffer)}")  # fmt: skip
        found = self.buffer[self.position : self.position + size].view(dtype)
        self.position += size
        return found

    def word(self) -> str:
        """The next few letters up to a blank."""
        letters = bytes(self.buffer[self.position : self.position + 4]).partition(b" ")[0]
        self.position += len(letters) + 1
        return letters.decode("latin-1")

    def integer(self) -> int:
        """The next integer, which has its number of bytes before it."""
        bytes_, value = self.take(INTEGER)[0]
        if bytes_ != 4:
            raise ValueError(f"{self.where}: damaged; an integer of {bytes_} bytes before byte {self.position}")
        return int(value)


def read_object(cursor: Cursor) -> np.ndarray:
    """One binary Kaldi object: a matrix (plain, or compressed in any of the three ways), a vector, or integers."""
    _check_binary(cursor)
    if cursor.position < len(cursor.buffer) and cursor.buffer[cursor.position] == 4:
        numbers = cursor.take(INTEGER, cursor.integer())
        if len(numbers) and (numbers["bytes"] != 4).any():
            raise ValueError(f"{cursor.where}: damaged; integers of other than 4 bytes")
        return numbers["value"].copy()
    kind = cursor.word()
    if kind in ("FM", "DM"):
        rows, columns = cursor.integer(), cursor.integer()
        if rows < 0 or columns < 0:
            raise ValueError(f"{cursor.where}: damaged; a matrix of {rows} x {columns}")
        return cursor.take("<f4" if kind == "FM" else "<f8", rows * columns).reshape(rows, columns)
    if kind in ("FV", "DV"):
        return cursor.take("<f4" if kind == "FV" else "<f8", cursor.integer())
    if kind in ("CM", "CM2", "CM3"):
        return _compressed(cursor, kind)
    raise ValueError(f"{cursor.where}: {kind!r} is no matrix or vector of Kaldi's (FM, DM, CM, CM2, CM3, FV, DV or integers)")  # fmt: skip


def _integer_count(cursor: Cursor) -> int:
    _check_binary(cursor)
    if cursor.position < len(cursor.buffer) and cursor.buffer[cursor.position] != 4:
        raise ValueError(f"{cursor.where}: {cursor.word()!r} is not the integers of an alignment")
    count = cursor.integer()
    cursor.take(INTEGER, count)  # that so many are there; nothing is read
    return count


def _check_binary(cursor: Cursor) -> None:
    if bytes(cursor.take("u1", 2)) != b"\0B":
        raise ValueError(f"{cursor.where}: no binary Kaldi object at byte {cursor.position - 2}; either the offset in the scp file is wrong, or the archive is text, which {COPY} makes binary (copy-int-vector, of alignments)")  # fmt: skip


def _compressed(cursor: Cursor, kind: str) -> np.ndarray:
    """Kaldi's CompressedMatrix: one byte a number between each column's quartiles (CM), or two bytes (CM2) or one (CM3) between the extremes."""
    low, extent, rows, columns = (x.item() for x in cursor.take(GLOBAL_HEADER)[0])
    if rows < 0 or columns < 0:
        raise ValueError(f"{cursor.where}: damaged; a matrix of {rows} x {columns}")
    if not (abs(low) <= LARGEST and abs(low + extent) <= LARGEST):  # nan neither
        raise ValueError(f"{cursor.where}: damaged; numbers from {low} to {low + extent}")
    if kind != "CM":
        dtype, steps = ("<u2", 65535) if kind == "CM2" else ("u1", 255)
        codes = cursor.take(dtype, rows * columns).reshape(rows, columns)
        return np.float32(low) + np.float32(extent / steps) * codes.astype(np.float32)
    edges = cursor.take("<u2", 4 * columns).reshape(columns, 4).astype(np.float32)
    at0, at64, at192, at255 = (np.float32(low) + np.float32(extent / 65535) * edges).T[..., None]  # each (columns, 1)
    codes = cursor.take("u1", rows * columns).reshape(columns, rows).astype(np.float32)
    lower = at0 + (at64 - at0) * codes * np.float32(1 / 64)
    middle = at64 + (at192 - at64) * (codes - 64) * np.float32(1 / 128)
    upper = at192 + (at255 - at192) * (codes - 192) * np.float32(1 / 63)
    return np.where(codes <= 64, lower, np.where(codes <= 192, middle, upper)).T


class Corpus:
    """Utterances under a folder: feats.scp, or several feats*.scp whose features are put side by side in the order of their names, and ali.scp.

    The features of a stream are (T, D), one row a frame; or (ceil(T / 10), D), such as online i-vectors, each repeated for 10 frames; or (D,),
    such as an i-vector of the utterance, repeated for all. T is the number of states in the alignment. All tables must name the same
    utterances; utterances are in the order of the first.

    Args:
        folder: that of the scp files.
        features: their number, that of all streams together.
        states: their number; those of an alignment are 0 to states - 1.

    Raises:
        ValueError: for missing tables, or such as name different utterances.
    """

    def __init__(self, folder: str | Path, *, features: int, states: int) -> None:
        self.folder, self.features, self.states = Path(folder), features, states
        paths = sorted(self.folder.glob("feats*.scp"))
        missing = [name for name, there in (("feats.scp", bool(paths)), ("ali.scp", (self.folder / "ali.scp").is_file())) if not there]  # fmt: skip
        if missing:
            raise ValueError(f"{self.folder}: no {' and no '.join(missing)}; {RECIPE}")
        self.streams = [Table(path) for path in paths]
        self.alignment = Table(self.folder / "ali.scp")
        self.names = list(self.streams[0])
        known = set(self.names)
        for other in (*self.streams[1:], self.alignment):
            for have, lack, keys in ((self.streams[0], other, known - set(other)), (other, self.streams[0], set(other) - known)):  # fmt: skip
                if keys:
                    raise ValueError(f"{len(keys)} utterance(s) of {have.path} are not in {lack.path}, the first {min(keys)}; leave them out with: utils/filter_scp.pl {lack.path} {have.path} > NEW.scp")  # fmt: skip

    def count(self, name: str) -> int:
        """T, the number of states in an utterance's alignment; the states themselves are not read."""
        return self.alignment.count(name)

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Features (T, F) float32 and states (T,) int32 of an utterance.

        Raises:
            ValueError: naming the utterance, for lengths that differ, another number of features, nan or infinity, and states out of range.
        """
        states = self._states(name)
        parts = [self._stream(stream, name, len(states)) for stream in self.streams]
        found = np.concatenate(parts, axis=1)
        if found.shape[1] != self.features:
            each = ", ".join(f"{p.shape[1]} of {s.path.name}" for p, s in zip(parts, self.streams, strict=True))
            raise ValueError(f"{self.folder}, utterance {name}: {found.shape[1]} features ({each}) instead of {self.features}")  # fmt: skip
        return found, states

    def _states(self, name: str) -> np.ndarray:
        states = self.alignment.read(name)
        where = f"{self.alignment.path}, utterance {name}"
        if states.dtype != np.int32:
            raise ValueError(f"{where}: a matrix or vector of {states.dtype}, not the integers of an alignment")
        if len(states) == 0:
            raise ValueError(f"{where}: an alignment of no frame")
        if states.min() < 0 or states.max() >= self.states:
            raise ValueError(f"{where}: states {states.min()} to {states.max()}, but there are {self.states} (0 to {self.states - 1}); of an alignment that counts transitions, ali-to-pdf makes states")  # fmt: skip
        return states

    def _stream(self, stream: Table, name: str, count: int) -> np.ndarray:
        found = stream.read(name)
        where = f"{stream.path}, utterance {name}"
        if found.dtype == np.int32:
            raise ValueError(f"{where}: integers instead of features")
        with np.errstate(over="ignore"):  # told below
            found = found.astype(np.float32)
        if not np.isfinite(found).all():
            raise ValueError(f"{where}: features that are nan or infinite")
        if found.ndim == 1:
            return np.broadcast_to(found, (count, len(found)))
        if len(found) == count:
            return found
        if len(found) == -(-count // IVECTOR_PERIOD):
            return found.repeat(IVECTOR_PERIOD, axis=0)[:count]
        raise ValueError(f"{where}: {len(found)} frames, but {count} states in {self.alignment.path.name}; features need a row for each (or one for every {IVECTOR_PERIOD}, or one vector)")  # fmt: skip


RECIPE = (
    "Kaldi's recipe egs/swbd/s5c makes both of Switchboard-1 (LDC97S62; for 2,000 hours also Fisher, LDC2004S13 and LDC2005S13): "
    'features by its steps, states by ali-to-pdf final.mdl "ark:gunzip -c ali.*.gz |" ark,scp:ali.ark,ali.scp'
)
