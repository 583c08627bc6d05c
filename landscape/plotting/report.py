"""The report: one self-contained HTML file, readable anywhere, that says what was run, measured and predicted; or the same in Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import jinja2
import xarray as xr
from markupsafe import Markup, escape

from landscape.plotting import tables
from landscape.plotting.commands import reproduce_commands
from landscape.plotting.document import Document
from landscape.plotting.markdown import as_markdown
from landscape.plotting.sections import map_section, measured, scores, training
from landscape.plotting.style import display_name, style
from landscape.plotting.view import RunView, distinct
from landscape.provenance import provenance
from landscape.theory.scorecard import scorecard

Form = Literal["html", "md"]
NEUTRAL = "No conclusions were drawn for this report: the figures and tables below say what was measured."


def write_report(
    path: Path,
    views: Sequence[RunView],
    stability_map: xr.Dataset | Mapping[str, xr.Dataset] | None = None,
    *,
    title: str,
    conclusions: Sequence[str] = (),
    how_to_reproduce: str = "",
    form: Form = "html",
) -> Path:
    """Write the report of runs, and of a stability map where there is one.

    Args:
        path: the file; replaced if it is there. Beside a Markdown file NAME.md its figures stand in the folder NAME-figures.
        views: at least one run; what was not measured is left out.
        stability_map: of `landscape.experiments.sweep.stability_map`, or several by title.
        title: of the report.
        conclusions: plain sentences, shown first.
        how_to_reproduce: the commands; by default those that the runs recorded of themselves.
        form: one self-contained HTML file that loads nothing, or Markdown.

    Returns:
        path.
    """
    if not views:
        raise ValueError("a report needs at least one run")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name an HTML file in it")
    document = compose(
        views, stability_map, title=title, conclusions=conclusions, how_to_reproduce=how_to_reproduce, name=path.name
    )
    if form == "html":
        _replace(path, as_html(document).encode("utf-8"))
        return path
    folder = path.with_name(f"{path.stem}-figures")
    text, figures = as_markdown(document, folder.name)
    for name, svg in figures.items():
        _replace(folder / name, svg)
    _replace(path, text.encode("utf-8"))
    return path


def compose(
    views: Sequence[RunView],
    stability_map: xr.Dataset | Mapping[str, xr.Dataset] | None = None,
    *,
    title: str,
    conclusions: Sequence[str] = (),
    how_to_reproduce: str = "",
    name: str = "report.html",
) -> Document:
    """What a report of these runs says; arguments as of `write_report`, `name` being the file's."""
    views = distinct(views)
    several = {"": stability_map} if isinstance(stability_map, xr.Dataset) else dict(stability_map or {})
    with style():
        sections = [map_section(i, label, result) for i, (label, result) in enumerate(several.items())]
        sections += [s for s in (training(views), *measured(views)) if s.pictures or s.tables]
        score_pictures = scores(views)
    scored = [v for v in views if len(scorecard(v.groups))]
    return Document(
        title,
        list(conclusions) or [NEUTRAL],
        tables.summary(views),
        sections,
        score_pictures,
        [(tables.verdict_table(v), tables.scorecard_table(v)) for v in scored],
        [display_name(v.label) for v in views if not v.groups],
        [(tables.run_provenance(v), tables.measurement_provenance(v) if v.groups else None) for v in views],
        [tables.map_provenance(m) for m in several.values()],
        how_to_reproduce or reproduce_commands(views, name),
        provenance(),
    )


def as_html(document: Document) -> str:
    """The document as one HTML page that loads nothing."""
    source = resources.files("landscape.plotting").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"subscripts": _subscripts, "unbroken": _unbroken}
    return environment.from_string(source).render(**vars(document), verdicts=tables.VERDICTS)


def _subscripts(text: str) -> Markup:
    """Text in which w_a, α_e and the like have subscripts; names of settings and files keep their underscores.

    >>> print(_subscripts("w_a < λ_max, num_draws, a_b.py, L(w_a)"))
    w<sub>a</sub> &lt; λ<sub>max</sub>, num_draws, a_b.py, L(w<sub>a</sub>)
    """
    return Markup(tables.SYMBOL.sub(r"\1<sub>\2</sub>", str(escape(text))))


def _unbroken(text: str) -> Markup:
    """Commands whose flags are kept on one line each: browsers would break them after a hyphen.

    >>> print(_unbroken("landscape measure a --num-draws 6"))
    landscape measure a <span>--num-draws</span> 6
    """
    return Markup(re.sub(r"(?<!\S)--[\w-]+", r"<span>\g<0></span>", str(escape(text))))


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
