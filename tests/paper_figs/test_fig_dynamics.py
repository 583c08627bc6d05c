"""The dynamics figure draws the runs it is given, in three formats, and says what it cannot draw."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from landscape.plotting.view import RunView

SCRIPT = Path(__file__).parents[2] / "paper_figs" / "fig_dynamics.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fig_dynamics", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_panels_show_the_runs_numbers(script: ModuleType, views: list[RunView]) -> None:
    figure = script.draw(views)
    panels = figure.axes
    assert len(panels) == 2 + 2 * len(views)
    for line, view in zip(panels[0].get_lines(), views, strict=False):
        np.testing.assert_array_equal(line.get_ydata(), view.series("train_loss"))
    for panel, view in zip(panels[2::2], views, strict=True):
        measured = panel.containers[0].lines[0].get_ydata()
        np.testing.assert_array_equal(measured, view.groups["effective-learning-rate"]["alpha_e_ratio_mean"])
    figure.draw_without_rendering()
    page = figure.bbox
    for panel in panels:
        assert panel.get_position().width > 0.3
        assert panel.get_legend().get_window_extent().x1 <= page.x1 + 1


@pytest.mark.slow
def test_the_command_writes_three_formats(views: list[RunView], tmp_path: Path) -> None:
    runs = [str(v.run.path) for v in views]
    done = subprocess.run([sys.executable, str(SCRIPT), *runs, "--out", str(tmp_path / "figures")], capture_output=True, text=True, check=True)  # fmt: skip
    written = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert written == ["fig_dynamics.pdf", "fig_dynamics.png", "fig_dynamics.svg"]
    assert [Path(line).name for line in done.stdout.split()] == [
        "fig_dynamics.pdf",
        "fig_dynamics.svg",
        "fig_dynamics.png",
    ]


def test_mistakes_are_said_without_a_traceback(
    script: ModuleType, views: list[RunView], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no measurements of noise.*landscape measure"):
        script.draw([replace(views[0], groups={k: v for k, v in views[0].groups.items() if k != "noise"})])
    with pytest.raises(ValueError, match="at least one run"):
        script.draw([])
    assert not (tmp_path / "out").exists()
