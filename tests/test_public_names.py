"""What `landscape` offers is documented: every public name, its methods and its arguments."""

from __future__ import annotations

import inspect
import re

import pytest

import landscape

NAMES = landscape.__all__


def test_what_is_imported_is_public() -> None:
    imported = {n for n, thing in vars(landscape).items() if not n.startswith("_") and not inspect.ismodule(thing)}
    assert imported == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(landscape, name)
    assert len(inspect.getdoc(thing) or "") > 20
    if inspect.isclass(thing):
        bare = [
            part
            for part, found in vars(thing).items()
            if not part.startswith("_")
            and (callable(found) or isinstance(found, property | staticmethod))
            and not inspect.getdoc(found)
        ]
        assert bare == []


@pytest.mark.parametrize("name", [n for n in NAMES if inspect.isfunction(getattr(landscape, n))])
def test_arguments_are_explained_here_or_where_it_says(name: str) -> None:
    function = getattr(landscape, name)
    text = inspect.getdoc(function) or ""
    arguments = [p for p in inspect.signature(inspect.unwrap(function)).parameters if p != "self"]
    if len(arguments) > 2 and not re.search(r"[Ss]ee `\w", text):
        unexplained = [a for a in arguments if a not in text]
        assert unexplained == []
