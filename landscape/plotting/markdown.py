"""The report in Markdown, for repositories, issues and notebooks; figures are SVG files beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from urllib.parse import quote

from landscape.plotting.document import Document, Picture
from landscape.plotting.tables import VERDICTS, Cell, Table


def as_markdown(document: Document, folder: str) -> tuple[str, dict[str, bytes]]:
    """A document in GitHub's Markdown, and its figures by file name, to be written into `folder` beside it."""
    figures: dict[str, bytes] = {}

    def show(part: str, pictures: Sequence[Picture]) -> list[str]:
        lines = []
        for i, picture in enumerate(pictures, 1):
            name = f"{part}-{i}.svg"
            figures[name] = picture.svg
            lines += [f"![{_text(picture.alternative)}]({quote(folder)}/{name})", "", f"*{_text(picture.caption)}*", ""]
        return lines

    lines = [
        f"# {_text(document.title)}",
        "",
        *(f"- {_text(s)}".replace("\n", "\n  - ") for s in document.conclusions),
        "",
    ]
    lines += ["## Runs", "", *_table(document.summary)]
    for section in document.sections:
        lines += [f"## {_text(section.title)}", "", _text(section.text), ""]
        lines += [line for note in section.notes for line in (f"**{_text(note)}**", "")]
        lines += [line for table in section.tables for line in _table(table)]
        lines += show(section.identifier, section.pictures)
    lines += ["## Predictions and verdicts", "", "Each prediction beside its measurement at each checkpoint. Wide errors never agree.", ""]  # fmt: skip
    lines += [*(f"- **{word}**: {_text(meaning)}" for word, meaning in VERDICTS.items()), ""]
    lines += show("scorecard", document.score_pictures)
    for counts, full in document.scores:
        lines += [*_table(counts), *_folded(full)]
    if document.unmeasured:
        lines += [f"Not measured, so without predictions: {_text(', '.join(document.unmeasured))}.", ""]
    lines += ["## Provenance", ""]
    for table in document.map_provenance:
        lines += _folded(table)
    for run, measurements in document.provenance:
        lines += _folded(run) + (_folded(measurements) if measurements else [])
    lines += ["## How to reproduce", "", "```sh", *document.how_to_reproduce.splitlines(), "```", ""]
    made = document.made
    lines.append(f"Written by landscape {made['landscape']} (git {made['git_commit']}, torch {made['torch']}) at {made['time']}. Definitions: Zhang et al., arXiv 2112.01433.")  # fmt: skip
    return "\n".join(lines) + "\n", figures


def _table(table: Table, caption: bool = True) -> list[str]:
    head = [f"*{_text(table.caption)}*", ""] if caption else []
    rows = ["| " + " | ".join(_cell(c) for c in row) + " |" for row in [table.columns, *table.rows]]
    return [*head, rows[0], "|" + " --- |" * len(table.columns), *rows[1:], ""]


def _folded(table: Table) -> list[str]:
    """A table behind its caption, which GitHub and most other readers unfold."""
    return [
        f"<details><summary>{html.escape(table.caption)}</summary>",
        "",
        *_table(table, caption=False),
        "</details>",
        "",
    ]


def _cell(cell: Cell) -> str:
    text = cell if isinstance(cell, str) else ", ".join(f"{word} {count}×" if count else word for word, count in cell)
    return _text(text).replace("\n", "<br>")


def _text(text: str) -> str:
    r"""Text in which nothing is taken for markup.

    >>> print(_text("a <b> *c* d_e |f| [g](h)"))
    a &lt;b&gt; \*c\* d\_e \|f\| \[g\](h)
    """
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
