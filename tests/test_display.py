"""What results show of themselves: well-formed, escaped, with the numbers that they hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from landscape.checkpoints import Learners, Run
from landscape.curvature.density import spectral_density
from landscape.curvature.lanczos import Eigenpairs, top_eigenpairs
from landscape.curvature.operators import DenseOperator
from landscape.curvature.preflight import Preflight
from landscape.curvature.trace import diagonal, trace
from landscape.display import BLOCKS, Displayed, Shown, estimates, grid, sparkline, text
from landscape.functional import ParameterLayout
from landscape.noise.covariance import CovarianceSummary
from landscape.noise.rows_covariance import ReplicaCovariance
from landscape.noise.spectrum import CovarianceSpectrum
from landscape.noise.tails import NoiseScale, TailIndex, tail_index
from landscape.slices import Barrier, GradientField, Line, LineSlice, Plane, PlaneSlice, Projection, QuadraticModel
from landscape.statistics import Estimate
from landscape.theory.flatness import VarianceFlatness
from landscape.theory.power_law import PowerLaw, power_law
from landscape.theory.scorecard import COLUMNS, Scorecard
from landscape.theory.smoothed_loss import SmoothedLoss
from landscape.theory.smoothing import SmoothedCurvature
from landscape.theory.smoothing_length import SmoothingLength
from landscape.theory.stability import CoupledStability

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def parsed(page: str) -> ElementTree.Element:
    """The page as XML: raises where tags do not match or something is not escaped."""
    assert "<script" not in page
    return ElementTree.fromstring(page)


def cells(page: str) -> list[list[str]]:
    return [[cell.text or "" for cell in row] for row in parsed(page).iter("tr")]


def learners(**more: object) -> Learners:
    layout = ParameterLayout(("weight",), (torch.Size([2, 2]),))
    return Learners(7, torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]), layout, **more)  # type: ignore[arg-type]


def results() -> list[Displayed]:
    """One of each kind, with numbers that are missing where they can be."""
    nan, inf = math.nan, math.inf
    law = power_law(np.geomspace(1, 100, 8), np.geomspace(1, 1e4, 8))
    none = PowerLaw(nan, nan, nan, nan, nan, nan, nan, nan, 0, "inconclusive", f"no points: {HOSTILE}")
    matrix = DenseOperator(torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64)))
    some = np.array([3.0, nan, 1.0])
    return [
        law, none, top_eigenpairs(matrix, 2), trace(matrix, num_probes=3), trace(matrix, num_probes=1), diagonal(matrix, num_probes=3),
        spectral_density(matrix, num_probes=1, num_steps=5), spectral_density(matrix, num_probes=3, num_steps=5),
        Eigenpairs(np.array([]), torch.zeros(3, 0), np.array([]), np.array([], dtype=bool), 0, 0, 1.0, {}),
        Eigenpairs(np.array([nan] * 20), torch.zeros(3, 20), np.array([nan] * 20), np.zeros(20, dtype=bool), 0, 0, 1.0, {}),
        Preflight((HOSTILE,), ("a note",), nan, nan, nan, 0, 0, 0),
        CovarianceSummary(1.0, np.zeros(0), 0.0, 5),
        CovarianceSpectrum(("all", HOSTILE), np.array([4, 2]), np.array([[3.0, 0.0], [nan, nan]]), some[:2], some[:2], some[:2], some[:2], some[:2], some[:2], 5, None, "mean"),
        ReplicaCovariance(Estimate(1.0, 0.1), Estimate(-0.1, nan), Estimate(0.9, 0.2), np.zeros(4), 2, 2),
        NoiseScale(Estimate(2.0, 0.1, 9), Estimate(-0.1, 0.2, 9), nan, nan, 0.0, inf, False, 1, 8),
        tail_index(np.geomspace(1, 100, 200)), TailIndex(inf, nan, 10, 20, np.array([10]), np.array([inf]), np.array([nan]), (10, 10), nan, nan, nan, "undecided"),
        VarianceFlatness(some, some, some, some, some, np.array([True, False, True]), none, torch.zeros(2, 3), 1.0, 0.5, 1.0, 3),
        SmoothedLoss("isotropic", 2, Estimate(0.1, nan), Estimate(0.9, 0.01), Estimate(0.8, 0.02)),
        SmoothedCurvature("learners", 0.1, 3, 2.5, 0.0, -1.0, 0.1, 2.0, 0.01, (0.003, 0.01, 0.03), (nan, 2.5, 2.4), 1.0, 0.0, 9),
        SmoothingLength("isotropic", 2.0, "not reached", nan, nan, nan, (0.25, 1.0), (5.0, inf), (0.1, nan), 4),
        CoupledStability(nan, nan, 1.02, False, nan, 40),
        *slices(),
    ]  # fmt: skip


def slices() -> list[Displayed]:
    """Slices with losses that are not finite, along axes of a name from outside."""
    unit = torch.eye(2, dtype=torch.float64)
    line, plane = Line(unit[0], unit[1], name=HOSTILE), Plane(unit[0], unit[0], unit[1], names=(HOSTILE, "second"))
    loss = np.array([[1.0, math.nan], [math.inf, 2.0]])
    errors = [loss] * 5
    about: dict[str, Any] = {
        "kernel": "none",
        "batch_norm": "frozen",
        "population": None,
        "num_examples": 1000,
        "description": {},
    }
    two = np.array([0.0, 1.0])
    return [
        Barrier(Estimate(0.25, 0.01), 0.5), Barrier(Estimate(math.inf, math.nan), 0.5),
        LineSlice(line, two, loss[0], two, two, loss, **about), LineSlice(line, two, two, two, two, loss, **about),
        PlaneSlice(plane, two, two, loss, np.isfinite(loss), *errors, 0.5, None, **about),
        QuadraticModel(0.5, two, np.eye(2), two, np.diag([3.0, 4.0]), 0.0), QuadraticModel(0.5, two, loss, two, loss, math.nan),
        Projection(np.ones((3, 2)), np.ones((3, 2)), np.array([0.0, 3.0, 1.0]), np.array([0.0, 5.0, 2.0])),
        GradientField(plane, two, two, np.ones((2, 2, 2)), np.ones((2, 2, 2)), np.zeros((2, 2, 2)), np.zeros((2, 2)), "none"),
    ]  # fmt: skip


def test_slices_show_the_numbers_they_hold() -> None:
    shown = {
        type(s).__name__: {str(name): text(value) for name, value, _ in s.shown().rows} for s in reversed(slices())
    }
    assert shown["Barrier"] == {"height": "0.250 ± 0.010", "position": "0.5"}
    assert (shown["LineSlice"]["loss"], shown["LineSlice"]["not finite"], shown["LineSlice"]["along"]) == (
        "1 to 1",
        "1",
        HOSTILE,
    )
    assert (shown["PlaneSlice"]["grid"], shown["PlaneSlice"]["loss"], shown["PlaneSlice"]["evaluated"]) == (
        "2 × 2",
        "1 to 2",
        "50%",
    )
    assert shown["QuadraticModel"]["curvature met"] == "4, 3"
    assert (shown["Projection"]["left out"], shown["Projection"]["share left out"]) == ("0 to 3", "0.5 to 0.6")
    assert repr(slices()[0]) == "Barrier(height=0.250 ± 0.010 nats, position=0.5)"


@pytest.mark.parametrize("result", results(), ids=lambda r: type(r).__name__)
def test_results_show_themselves_shortly(result: Displayed) -> None:
    page = result._repr_html_()
    table = cells(page)
    assert len(table) >= 2 or isinstance(result, Eigenpairs)
    assert len({len(row) for row in table}) == 1  # as many cells in every row
    assert len(page) < 8000
    line = repr(result)
    assert line.startswith(f"{type(result).__name__}(")
    assert "\n" not in line
    assert len(line) < 330
    assert "tensor(" not in line
    assert "nan" not in "".join(parsed(page).itertext()).replace("nan.", "")


def test_numbers_shown_are_those_held() -> None:
    found = top_eigenpairs(DenseOperator(torch.diag(torch.tensor([5.0, 2.0, 1.0]))), 2)
    rows = cells(found._repr_html_())
    assert [row[:2] for row in rows] == [["", "eigenvalue"], ["1", "5"], ["2", "2"]]
    assert "eigenvalues=5, 2, largest" in repr(found)
    smoothed = SmoothedLoss("isotropic", 8, Estimate(0.1234, 0.0056), Estimate(0.91, 0.01), Estimate(0.8, 0.02))
    assert ["L~ - L", "0.1234 ± 0.0056", "loss"] in cells(smoothed._repr_html_())
    assert "L~ - L=0.1234 ± 0.0056 loss" in repr(smoothed)


def test_what_comes_from_outside_is_escaped(tmp_path: Path) -> None:
    config = {"algorithm": "dpsgd", "learning_rate": 0.5, "topology": HOSTILE}
    record = {"task": HOSTILE, "status": "recorded", "config": config, "assumed": [HOSTILE]}
    run = Run(tmp_path / "<b>run<b>", record)
    shown = "".join(parsed(run._repr_html_()).itertext())
    assert shown.count(HOSTILE) == 3
    assert "Run <b>run<b>" in shown
    assert str(tmp_path) not in shown
    assert "0.5" in shown
    assert HOSTILE in "".join(parsed(grid(HOSTILE, [HOSTILE], [[HOSTILE]], notes=[HOSTILE])).itertext())
    chart, below = parsed(f"<p>{sparkline([1.0, 2.0], HOSTILE)}</p>")
    assert (chart.get("aria-label"), below.text) == (HOSTILE, HOSTILE)


def test_learners_show_their_spread_and_origin() -> None:
    found = learners(facts={"learning_rate": 0.5}, origin={"format": "torch.save", "kind": "learners", "reasons": ["why"], "notes": []})  # fmt: skip
    rows = dict(row[:2] for row in cells(found._repr_html_()))
    assert (rows["step"], rows["learners"], rows["consensus distance"], rows["learning rate"]) == ("7", "2", "1", "0.5")
    assert rows["read from"] == "torch.save (learners)"
    broken = Learners(0, torch.full((2, 4), math.nan), found.layout)
    assert "not finite" in broken._repr_html_()
    assert repr(found).startswith("Learners(step=7")


@pytest.mark.parametrize("values", [[], [1.0], [math.nan] * 5, [math.inf, -math.inf], [0.0, 0.0]])
def test_nothing_is_drawn_of_nothing(values: list[float]) -> None:
    assert sparkline(values, "empty", logarithmic=True) == ""


@pytest.mark.parametrize("options", [{}, {"logarithmic": True}, {"from_zero": True}, {"from_zero": True, "logarithmic": True}])  # fmt: skip
@pytest.mark.parametrize("values", [[1.0, 1.0], [1.0, math.nan, 3.0, -1.0, 2.0, 0.5], [1e-300, 1e300], [5.0, math.inf, 1.0, math.nan, 4.0], [-1e308, 1e308]])  # fmt: skip
def test_sparklines_have_a_block_for_each_value(values: list[float], options: dict[str, bool]) -> None:
    drawn = sparkline(values, "some", **options)
    heights = np.array(values)
    known = np.isfinite(heights) & ((heights > 0) if "logarithmic" in options else True)
    if known.sum() < 2:
        assert drawn == ""
        return
    chart = ElementTree.fromstring(f"<p>{drawn}</p>")[0].text or ""
    assert [c != " " for c in chart] == known.tolist()
    levels = np.array([BLOCKS.index(c) for c in chart if c != " "])
    order = np.argsort(heights[known])
    assert (np.diff(levels[order]) >= 0).all()
    assert levels.min() >= 0


def test_sparklines_show_peaks_of_many_values_and_heights_from_zero() -> None:
    many = np.zeros(1000)
    many[500] = 1.0
    assert sparkline(many, "peak").count("█") == 1
    assert "▇█" in sparkline([10.0, 11.0], "both high", from_zero=True)
    assert "▁█" in sparkline([10.0, 11.0], "apart")


def scores() -> Scorecard:
    rows = [
        (20, "E alpha_e / alpha", "exact", 0.7421, 0.0131, 0.75, 0.0, 0.9895, 0.0175, -0.6, "agrees"),
        (20, "Tr Sigma_w", HOSTILE, 1.0, math.nan, math.inf, 0.0, 0.0, 0.0, math.nan, "disagrees"),
    ]
    return Scorecard(rows, columns=COLUMNS)


def test_scorecard_shows_numbers_with_their_errors() -> None:
    card = scores()
    table = cells(card._repr_html_() or "")
    assert table[1] == [
        "20",
        "E alpha_e / alpha",
        "exact",
        "0.742 ± 0.013",
        "0.75",
        "0.990 ± 0.018",
        "−0.6",
        "✓ agrees",
    ]
    assert table[2][2] == HOSTILE
    assert table[2][4:] == ["∞", "0", "", "✗ disagrees"]
    assert len(repr(card).splitlines()) == 3
    assert max(map(len, repr(card).splitlines())) < 160


def test_scorecard_is_a_data_frame_in_all_else() -> None:
    card = scores()
    assert isinstance(card[card["verdict"] == "agrees"], Scorecard)
    assert isinstance(card, pd.DataFrame)
    some = card[["step", "verdict"]]
    assert "<table" in (some._repr_html_() or "")
    assert "verdict" in repr(some)
    assert repr(card.iloc[:0]).splitlines() != []
    assert card.set_index("quantity").loc["Tr Sigma_w", "verdict"] == "disagrees"
    assert pd.concat([card, card]).groupby("verdict").size().to_dict() == {"agrees": 2, "disagrees": 2}


def test_single_numbers_of_a_labelled_result() -> None:
    made = xr.Dataset(
        {
            "Delta_mean": ((), 2.5e-4, {"long_name": "noise across g", "units": "weights^2"}),
            "Delta_stderr": 1.2e-5,
            "significant": ((), True),
            "rate": ("draw", [1.0, 2.0]),
            "kind": ((), "exact"),
        },
        attrs={"errors": "over draws"},
    )
    shown = estimates(made)
    assert shown.rows[0] == ("noise across g", Estimate(2.5e-4, 1.2e-5), "weights^2")
    assert cells(shown._repr_html_())[1:] == [["noise across g", "(2.50 ± 0.12)×10⁻⁴", "weights^2"], ["significant", "yes", ""], ["kind", "exact", ""]]  # fmt: skip
    assert "over draws" in shown.html()
    with pytest.raises(ValueError, match=r"\.sel\(step="):
        estimates(made[["rate"]])


def test_values_as_text() -> None:
    assert text(None) == "–"
    assert text(np.int64(12000)) == "12,000"
    assert text([]) == "–"
    assert repr(Shown("Name", [("a", 1.5, "s")])) == "Name(a=1.5 s)"
