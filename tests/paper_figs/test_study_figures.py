"""Figures and tables of studies show the stored numbers, mark what diverged, name what was not run, and say what they cannot draw."""

from __future__ import annotations

import csv
import doctest
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from matplotlib.text import Text

from landscape.plotting.style import save
from landscape.tasks.paper import PAPER
from paper_figs import __main__ as driver
from paper_figs import fig_convergence, fig_edges, fig_smoothness, table_rates
from paper_figs.studies import Stored, Study, read_all
from paper_figs.studies.stored import write_study

if TYPE_CHECKING:
    import xarray as xr

    from landscape.plotting.view import RunView

OUTCOMES = {
    "ssgd": [["ccc", "ccs", "sxx"], ["ccc", "sss", "xxx"]],
    "ssgd-star-matched": [["ccc", "ccc", "sss"], ["ccc", "sss", "kkk"]],
    "dpsgd": [["ccc", "ccc", "css"], ["ccc", "ccc", "sss"]],
}
NOTHING = {name: [["sss", "kkk"]] for name in OUTCOMES}


@pytest.fixture(scope="module")
def folder(
    made_up: Callable[..., tuple[Study, xr.Dataset]],
    made_up_along: Callable[..., xr.Dataset],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two studies' files, one without stage 2 and with nothing converged."""
    out = tmp_path_factory.mktemp("data")
    write_study(
        *made_up(OUTCOMES, "first", stands_for="cifar10-vgg19"), made_up_along(("both", "differ")), out / "first.nc"
    )
    write_study(*made_up(NOTHING, "second"), None, out / "second.nc")
    return out


@pytest.fixture
def studies(folder: Path) -> list[Stored]:
    return read_all(folder)


def test_losses_are_the_stored_ones(studies: list[Stored]) -> None:
    figure = fig_convergence.draw_rates(studies[0])
    panels = figure.axes
    assert len(panels) == 3 * 2
    first = [line for line in panels[0].get_lines() if line.get_gid() == "seed"]
    assert len(first) == 3 * 3
    at = studies[0].map.isel(total_batch=0, rate=0).sel(variant="ssgd")
    np.testing.assert_allclose(first[0].get_ydata(), at["train_loss"].isel(seed=0), rtol=1e-6)
    np.testing.assert_allclose(first[0].get_xdata(), at["step"] * 16 / 480)
    medians = [line for line in panels[0].get_lines() if line.get_gid() == "median"]
    assert len({(m.get_color(), m.get_linestyle()) for m in medians}) == 3


def test_diverged_runs_are_marked_and_kept_out(studies: list[Stored]) -> None:
    figure = fig_convergence.draw_rates(studies[0])
    crosses = [[line for line in panel.get_lines() if line.get_gid() == "diverged"] for panel in figure.axes]
    assert [len(c) for c in crosses] == [0, 0, 0, 0, 2, 3]
    last = figure.axes[4]
    median = next(line for line in last.get_lines() if line.get_gid() == "median")
    assert np.isnan(median.get_ydata()[-1])  # two of three seeds are infinite
    assert all(line.get_xdata()[0] <= 5 for line in crosses[4])
    drawn = [y for line in last.get_lines() if line.get_gid() == "seed" for y in line.get_ydata() if np.isfinite(y)]
    assert max(drawn) <= last.get_ylim()[1]


def test_the_overview_takes_the_largest_rate_at_which_something_converges(studies: list[Stored]) -> None:
    assert fig_convergence.telling_rate(studies[0], 0) == 1
    assert fig_convergence.telling_rate(studies[0], 1) == 1
    assert fig_convergence.telling_rate(studies[1], 0) == 0  # nothing does
    figure = fig_convergence.draw(studies)
    assert [panel.get_visible() for panel in figure.axes] == [True, True, True, False]
    assert figure.get_supxlabel().count("not the paper's scale") == 2
    with pytest.raises(ValueError, match="at least one study"):
        fig_convergence.draw([])


def test_smoothness_shows_the_measured_numbers(studies: list[Stored]) -> None:
    figure = fig_smoothness.draw(studies[0])
    assert len(figure.axes) == 2 * 3
    along = studies[0].along
    assert along is not None
    rates = [c for c in figure.axes[0].containers if c.get_label() is not None]
    assert len(rates) == 3
    ssgd = along.isel(run=np.flatnonzero((along["kind"] == "both") & (along["variant"] == "ssgd"))[0])
    np.testing.assert_array_equal(rates[0].lines[0].get_ydata(), ssgd["alpha_e_ratio_mean"])
    curvatures = figure.axes[1].containers
    assert len(curvatures) == 2 * 3
    with pytest.raises(ValueError, match=r"nothing measured along training.*python -m paper_figs\.studies second"):
        fig_smoothness.draw(studies[1])
    assert list(fig_smoothness.figures(studies)) == ["fig_smoothness_first"]


def test_nothing_lies_outside_the_page(studies: list[Stored]) -> None:
    for figure in (
        *fig_convergence.figures(studies).values(),
        fig_edges.draw(studies),
        fig_smoothness.draw(studies[0]),
    ):
        figure.draw_without_rendering()
        page = figure.bbox
        for legend in figure.legends:
            assert legend.get_window_extent().x1 <= page.x1 + 1
        small = next(text for text in figure.findobj(Text) if "not the paper's scale" in text.get_text())
        box = small.get_window_extent()
        assert box.x1 <= page.x1 + 1
        for panel in figure.axes:
            assert panel.get_window_extent().y0 >= box.y1
            assert panel.get_position().height > 0.08


def test_edges_in_the_table(studies: list[Stored]) -> None:
    table = table_rates.rates_table(studies)
    rows = {(r["study"], r.get("total_batch"), r.get("algorithm")): r for r in table.numbers}
    ssgd, dpsgd = rows["first", 16, "ssgd"], rows["first", 16, "dpsgd"]
    assert (ssgd["edge_low"], ssgd["edge_high"]) == (0.2, 0.4)
    assert (ssgd["interval_low"], ssgd["interval_high"], ssgd["interval_coverage"]) == (0.1, 0.4, 0.75)
    assert (dpsgd["seeds_edge_above_ssgd"], dpsgd["seeds_edge_same"], dpsgd["seeds_edge_below_ssgd"]) == (2, 1, 0)
    assert rows["first", 32, "dpsgd"]["sign_test_p"] == 0.25
    assert rows["first", 32, "dpsgd"]["ratio_low"] == 1.0
    assert ssgd["test_accuracy"] == pytest.approx(0.91, abs=1e-6)
    assert ssgd["test_accuracy_stderr"] == pytest.approx(0.01 / np.sqrt(3), abs=1e-6)
    assert dpsgd["test_accuracy_over_ssgd"] == pytest.approx(0, abs=1e-6)
    assert rows["second", 16, "ssgd"]["edge_low"] == 0
    assert "edge above 5, in the same bracket 4, below 0" in table_rates.tally(studies)


def test_the_papers_tasks_are_named_as_not_run(studies: list[Stored]) -> None:
    table = table_rates.rates_table(studies)
    said = {row[0].removesuffix(", at the paper's scale"): row[1] for row in table.rows if row[1].startswith("not run")}
    assert list(said) == list(PAPER)
    assert len(said) == 18
    assert said.pop("cifar10-vgg19") == "not run (scaled: first)"
    assert set(said.values()) == {"not run"}
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_counts_and_thresholds(studies: list[Stored]) -> None:
    counts = table_rates.counts_table(studies)
    assert counts.rows[0] == ("first", "16", "SSGD", "0.1: 3/3; 0.2: 2/3; 0.4: 0/3")
    here = next(n for n in counts.numbers if n["algorithm"] == "ssgd" and n["learning_rate"] == 0.4)
    assert (here["num_slow"], here["num_stuck"], here["num_non_finite"]) == (1, 0, 2)
    loose = table_rates.thresholds_table(studies[:1], (0.3, 0.7))
    assert loose.rows[0][4:] == ("0.2–0.4", "0.2–0.4")
    assert loose.rows[1][4:] == ("0.2–0.4", "above 0.4")  # slow runs of SSGD* count where less is asked


def test_tables_are_written_in_three_forms(studies: list[Stored], tmp_path: Path) -> None:
    files = table_rates.write(studies, tmp_path)
    assert all(path.exists() for path in files)
    page = (tmp_path / "table_rates.md").read_text()
    assert "| first | 16 | SSGD | 0.2–0.4 | [0.1, 0.4], 75% |" in page
    assert page.count("| not run") == 18
    assert "not the paper's scale" in page
    latex = (tmp_path / "table_rates.tex").read_text()
    assert r"\toprule" in latex
    assert "SSGD* (matched $\\sigma$$_0$)" in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {9}
    assert all(ord(letter) < 128 for line in body for letter in line)
    with (tmp_path / "table_rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 + 3 + 18
    assert rows[0]["edge_low"] == "0.2"
    assert {row["status"] for row in rows} == {"run at a smaller scale", "not run at the paper's scale"}
    assert doctest.testmod(table_rates).failed == 0


def test_the_driver_makes_everything(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for script in (fig_convergence, fig_edges, fig_smoothness):
        monkeypatch.setattr(script, "save", partial(save, formats=("png",)))
    assert driver.main(["--data", str(folder), "--out", str(tmp_path)]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {Path(line).name for line in capsys.readouterr().out.split()}
    stems = {name.removesuffix(".png") for name in written if name.endswith(".png")}
    assert stems == {
        "fig_convergence",
        "fig_convergence_first",
        "fig_convergence_second",
        "fig_edges",
        "fig_smoothness_first",
    }
    assert {"table_rates.md", "table_rates.tex", "table_rates.csv"} <= written


@pytest.mark.slow
def test_the_driver_draws_measured_runs(folder: Path, tmp_path: Path, views: list[RunView]) -> None:
    runs = [str(v.run.path) for v in views]
    assert driver.main(["--data", str(folder), "--out", str(tmp_path), "--runs", *runs]) == 0
    assert len({path.name for path in tmp_path.glob("fig_*")}) == 3 * 6


def test_edges_are_drawn_at_their_brackets(studies: list[Stored]) -> None:
    figure = fig_edges.draw(studies)
    first, second = figure.axes
    bars = [line.get_ydata() for line in first.get_lines() if line.get_gid() == "median"]
    np.testing.assert_allclose(bars, [[0.2, 0.4], [0.2, 0.4], [0.2, 0.4], [0.2, 0.4], [0.2, 0.4], [0.4, 0.8]])
    arrows = [line for line in second.get_lines() if line.get_gid() == "beyond"]
    assert len(arrows) == 3  # nothing converges
    assert {str(a.get_marker()) for a in arrows} == {r"$\downarrow$"}
    with pytest.raises(ValueError, match="at least one study"):
        fig_edges.draw([])


def test_mistakes_are_said_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (driver.main, fig_convergence.main, fig_edges.main, fig_smoothness.main, table_rates.main):
        assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        assert "holds no study" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_as_commands(folder: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-m", "paper_figs.table_rates", "--data", str(folder), "--out", str(tmp_path)], cwd=root,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "table_rates.md" in done.stdout
