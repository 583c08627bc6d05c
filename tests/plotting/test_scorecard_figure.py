"""The scorecard's figure shows every comparison with the verdict that its interval has by eye."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from landscape.plotting.scorecard import (
    LIMITS,
    ROW_HEIGHT,
    VERDICT_LOOKS,
    ratio_with_half_width,
    rows_of,
    scorecard_figure,
)
from landscape.plotting.style import new_figure, style
from landscape.plotting.view import RunView
from landscape.theory.scorecard import TOLERANCE, scorecard
from tests.plotting.made import made_view, rates, steepness

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes(rows: int = 4) -> Axes:
    with style():
        return new_figure("two-column", height=0.75 + ROW_HEIGHT * rows).subplots()


def drawn(ax: Axes, gid: str) -> list[float]:
    return [float(x) for line in ax.get_lines() if line.get_gid() == gid for x in line.get_xdata()]


def test_points_are_ratios_by_verdict_and_what_is_off_the_scale_is_an_arrow(tmp_path: Path) -> None:
    groups = {
        "effective-learning-rate": rates([1.0, 1.5, 1.19, -2.0, 0.001]),
        "stability": steepness([1, 1], [1, 1], [0.5, 4.0]),
    }
    ax = scorecard_figure(made_view(tmp_path, groups=groups), axes())
    assert drawn(ax, "agrees") == [1.0]
    assert drawn(ax, "disagrees") == [1.5]
    assert drawn(ax, "inconclusive") == [1.19]
    assert drawn(ax, "holds") == [0.5]
    assert drawn(ax, "violated") == [4.0]
    assert len(drawn(ax, "off-scale")) == 2
    assert max(drawn(ax, "off-scale")) < 2 * LIMITS[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(VERDICT_LOOKS)


def test_an_interval_in_the_band_is_what_agrees() -> None:
    """The verdict can be read off the figure: the interval drawn lies in the band exactly where the scorecard says agrees."""
    generator = np.random.default_rng(0)
    means, errors = generator.uniform(0.5, 1.6, 60), generator.uniform(0.001, 0.2, 60)
    card = scorecard({"effective-learning-rate": rates(list(means), list(errors))})
    for row in card.to_dict("records"):
        value, half = ratio_with_half_width(row)
        inside = abs(value - 1) + half <= TOLERANCE
        outside = abs(value - 1) - half > TOLERANCE
        assert row["verdict"] == ("agrees" if inside else "disagrees" if outside else "inconclusive")
    assert set(card["verdict"]) == {"agrees", "disagrees", "inconclusive"}


def test_an_infinite_prediction_is_a_ratio_of_zero() -> None:
    row = {"measured": 2.0, "predicted": np.inf, "measured_stderr": 0.1, "predicted_stderr": 0.0, "z": np.nan}
    assert ratio_with_half_width(row) == (0.0, 0.0)
    value, half = ratio_with_half_width({**row, "predicted": 0.0})
    assert np.isnan(value)
    assert half == 0


def test_every_comparison_of_a_run_is_on_the_figure(views: list[RunView]) -> None:
    for view in views:
        card = scorecard(view.groups)
        rows = rows_of(card)
        ax = scorecard_figure(view, axes(len(rows)))
        figure = ax.get_figure(root=True)
        with style():
            figure.draw_without_rendering()
        assert len(ax.get_yticklabels()) == len(rows)
        shown = sum(len(drawn(ax, word)) for word in VERDICT_LOOKS) + len(drawn(ax, "off-scale"))
        assert shown == int((card["verdict"] != "not applicable").sum())
        for text in [*ax.get_yticklabels(), ax.get_legend()]:
            box = text.get_window_extent()
            assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no measurements with predictions; make them with: landscape measure"):
        scorecard_figure(made_view(tmp_path), axes())
