"""Every snippet of the README and of the docstrings runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import landscape

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
MODULES = [m.name for m in pkgutil.walk_packages(landscape.__path__, "landscape.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_some_docstrings_have_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [
        t
        for m in ("landscape.statistics", "landscape.curvature.operators", "landscape.theory.smoothing")
        for t in finder.find(importlib.import_module(m))
        if t.examples
    ]
    assert len(found) >= 3


def test_readme_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) >= 2
    namespace: dict[str, object] = {}
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"README snippet {number}", "exec"), namespace)
        assert capsys.readouterr().out.strip()


def test_the_text_speaks_of_no_absolute_path() -> None:
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("landscape/**/*.py"),
        *ROOT.glob("landscape/**/*.md"),
        *ROOT.glob("notebooks/*"),
        *ROOT.glob("paper_figs/*.py"),
    ]:
        if path.is_file():
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", path.read_text()), path
