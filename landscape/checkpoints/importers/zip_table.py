"""The table of contents of a zip archive as torch.save writes it: members stored as they are, one after the other, no comment.

zipfile reads far more than that (prefixes, comments, compression, names in old code pages) and takes 0.2 ms for the seven members of a tensor, more
than the tensor itself; a sharded checkpoint has thousands of such archives in one file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from landscape.checkpoints.format import CheckpointError

LARGEST_TABLE = 64 << 20
"""Bytes of a table beyond which it is refused."""

END, END_64, LOCATOR, ENTRY, HEADER = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
"""What the parts of an archive begin with."""

Bytes = Callable[[int, int], bytes]
"""(position in the archive, count) -> bytes, fewer at its end."""


def members(read: Bytes, length: int, source: str) -> dict[str, tuple[int, int]]:
    """Names of the members, and of each where its entry begins and how many bytes it has.

    Args:
        read: gives bytes of the archive.
        length: of the archive.
        source: names it in messages.

    Raises:
        CheckpointError: it is damaged, or has members that are compressed, encrypted, or end beyond it.
    """
    try:
        found = {name: (begin, size) for name, begin, size in _entries(read, length, source)}
    except (struct.error, UnicodeDecodeError):
        raise CheckpointError(
            f"{source} is damaged, or no archive of torch.save: its table of contents is not whole"
        ) from None
    return found


def _entries(read: Bytes, length: int, source: str) -> Iterator[tuple[str, int, int]]:
    end = read(max(0, length - 22), 22)
    if not end.startswith(END) or len(end) < 22:
        raise CheckpointError(
            f"{source} is damaged, cut short, or no archive of torch.save: it has no table of contents at its end"
        )
    count, size, begin = struct.unpack("<HII", end[10:20])
    if count == 0xFFFF or size == 0xFFFFFFFF or begin == 0xFFFFFFFF:
        count, size, begin = _end_64(read, length)
    if begin + size > length or size > LARGEST_TABLE or count > size:
        raise CheckpointError(
            f"{source} is damaged: its table of contents has {size} bytes at {begin}, the archive has {length}"
        )
    table, at = read(begin, size), 0
    for _ in range(count):
        if table[at : at + 4] != ENTRY:
            raise CheckpointError(f"{source} is damaged: its table of contents is not whole")
        flags, method = struct.unpack_from("<HH", table, at + 8)
        packed, full, named, extra, comment = struct.unpack_from("<IIHHH", table, at + 20)
        (entry,) = struct.unpack_from("<I", table, at + 42)
        name = table[at + 46 : at + 46 + named].decode("utf-8")
        after = at + 46 + named + extra
        if after + comment > size:
            raise CheckpointError(f"{source} is damaged: its table of contents is not whole")
        packed, full, entry = _wide(table[after - extra : after], packed, full, entry)
        if method != 0 or packed != full or flags & 1:
            raise CheckpointError(
                f"{source}: {name[:100]!r} is compressed or encrypted, as torch.save never does; it is not read"
            )
        if entry + full > length:
            raise CheckpointError(f"{source} is cut short: {name[:100]!r} ends beyond its end")
        yield name, entry, full
        at = after + comment


def _end_64(read: Bytes, length: int) -> tuple[int, int, int]:
    """Number of entries, bytes and place of the table of a large archive."""
    locator = read(max(0, length - 42), 20)
    at = struct.unpack("<Q", locator[8:16])[0] if locator.startswith(LOCATOR) else length
    end = read(at, 56) if at < length else b""
    if not end.startswith(END_64):
        raise struct.error
    found: tuple[int, int, int] = struct.unpack("<QQQ", end[32:56])
    return found


def _wide(extra: bytes, packed: int, full: int, entry: int) -> tuple[int, int, int]:
    """Sizes and place of an entry, where 32 bits do not do from its extra field, which lists those in the order full, packed, entry."""
    at = 0
    while at + 4 <= len(extra) and 0xFFFFFFFF in (packed, full, entry):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(size // 8, 3)}Q", extra, at + 4))
            full, packed, entry = (
                next(wide, value) if value == 0xFFFFFFFF else value for value in (full, packed, entry)
            )
        at += 4 + size
    return packed, full, entry


def content_begins(header: bytes, source: str, name: str) -> int:
    """How far behind the beginning of a member's entry its content is, from the first 30 bytes there."""
    if len(header) < 30 or not header.startswith(HEADER):
        raise CheckpointError(f"{source} is damaged: {name[:100]!r} does not begin where its table says")
    return 30 + sum(struct.unpack("<HH", header[26:30]))
