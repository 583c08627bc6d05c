"""Text that may hold names from files, made fit for a terminal."""

from __future__ import annotations

import re

LONGEST_WORD = 300
"""Characters of a word, such as a name or a path, beyond which its middle is left out."""

_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text without control characters, lone surrogates and marks that turn the direction of writing, and without very long words.

    Args:
        text: anything.
        lines: whether ends of lines are the text's own, and stay.

    >>> printable("a\x1b[2Jb\udc80\u202e\n")
    'a\\x1b[2Jb\\udc80\\u202e\\n'
    >>> len(printable("x" * 10_000))
    300
    """
    escaped = "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text
    )
    return _LONG.sub(_shortened, escaped)


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][: LONGEST_WORD - 103]}...{word[0][-100:]}"
