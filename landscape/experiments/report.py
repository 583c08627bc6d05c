"""One report of any runs: measured or not, finished or not, trained here or imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def report_runs(
    paths: Sequence[str | Path], out: str | Path | None = None, form: Literal["html", "md"] | None = None
) -> Path:
    """Write one report of runs; its summary is what their numbers decide.

    Args:
        paths: run directories; what was measured of each is drawn, and what was not is said.
        out: the file; by default report.html (or report.md) in the directory of a run alone, and in the current directory for several.
        form: html, or md for Markdown with its figures in a folder beside; by default what `out` ends in, else html.

    Returns:
        the file.

    Raises:
        ValueError: there is no run, a path holds none, or out is a directory.
    """
    from landscape.plotting.report import write_report
    from landscape.plotting.view import distinct, load_view
    from landscape.plotting.words import summarise

    if not paths:
        raise ValueError("name at least one run")
    if form is None:
        form = "md" if out is not None and Path(out).suffix.lower() in (".md", ".markdown") else "html"
    if out is None:
        out = (Path(paths[0]) if len(paths) == 1 else Path()) / f"report.{form}"
    views = distinct([load_view(Path(p)) for p in paths])
    tasks = list(dict.fromkeys(v.run.task for v in views if v.run.task))
    title = "Landscape report" + (f": {', '.join(tasks)}" if tasks else "")
    return write_report(Path(out), views, title=title, conclusions=summarise(views), form=form)
