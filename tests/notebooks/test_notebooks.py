"""Notebooks run as they stand, and their kept outputs belong to the text beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
TEXTS = sorted(FOLDER.glob("*.py"))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_there_are_notebooks() -> None:
    assert FOLDER / "01_first_look.py" in TEXTS


@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.stem)
def test_kept_notebook_has_the_same_cells_and_its_figures(text: Path) -> None:
    kept = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(kept)
    assert cells(kept) == cells(jupytext.read(text))
    code = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))  # run once, from top to bottom
    assert pictures(kept) >= 4


@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.stem)
def test_kept_outputs_name_no_place_and_no_error(text: Path) -> None:
    kept = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    for cell in kept.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            told = json.dumps({k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}) + str(
                output.get("text", "")
            )
            assert not re.search(r"(?<![\w.])/(tmp|home|root|work|var|Users|mnt)\b", told)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_notebook_runs(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.delenv("LANDSCAPE_RUN", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = jupytext.read(text)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert pictures(notebook) == pictures(nbformat.read(text.with_suffix(".ipynb"), as_version=4))
    assert [p.name for p in tmp_path.iterdir() if p.name != "ipython"] == []  # nothing is left where it ran
