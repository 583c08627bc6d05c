"""Two measured runs, made as for the plotting tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from landscape.plotting.view import RunView
    from landscape.tasks import Task

_spec = importlib.util.spec_from_file_location(
    "plotting_fixtures", Path(__file__).parents[1] / "plotting" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_plotting = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_plotting)
known_task = _plotting.known_task


@pytest.fixture(scope="session")
def views(known_task: Task, tmp_path_factory: pytest.TempPathFactory) -> list[RunView]:
    """DPSGD and DPSGD (ATC) with what the dynamics figure shows."""
    names = ("dpsgd", "dpsgd-atc")
    return _plotting.make_views(
        known_task, tmp_path_factory.mktemp("runs"), dict.fromkeys(names, _plotting.RATE_AND_NOISE)
    )
