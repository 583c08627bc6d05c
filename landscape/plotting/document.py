"""All that a report says, before it is laid out as HTML or Markdown."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from landscape.plotting.tables import Table


@dataclass(frozen=True)
class Picture:
    """A figure in the report: its SVG, its alternative text and its caption."""

    svg: bytes
    alternative: str
    caption: str
    wide: bool = False

    @property
    def source(self) -> str:
        """The SVG as an address that loads nothing."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode('ascii')}"


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    identifier: str
    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """All that a report says, before it is laid out.

    Attributes:
        title: of the report.
        conclusions: plain sentences, shown first.
        summary: a row for each run.
        sections: figures and tables by measure.
        score_pictures: the scorecard of each run that has one, as a figure.
        scores: the verdicts of each such run, and every one of its checkpoints.
        unmeasured: names of the runs without measurements.
        provenance: of each run, and of its measurements.
        map_provenance: of each stability map.
        how_to_reproduce: shell commands.
        made: what wrote the report.
    """

    title: str
    conclusions: list[str]
    summary: Table
    sections: list[Section]
    score_pictures: list[Picture]
    scores: list[tuple[Table, Table]]
    unmeasured: list[str]
    provenance: list[tuple[Table, Table | None]]
    map_provenance: list[Table]
    how_to_reproduce: str
    made: dict[str, Any]
