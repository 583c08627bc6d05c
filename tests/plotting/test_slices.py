"""Figures of slices show the numbers of the slices, what a plane leaves out, and what is not finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from scipy.interpolate import RegularGridInterpolator

from landscape.plotting import slices as draw
from landscape.plotting.style import new_figure, save, style
from landscape.slices import (
    LineSlice,
    Plane,
    PlaneSlice,
    SmoothingKernel,
    gradient_field,
    line_between,
    line_slice,
    plane_slice,
    quadratic_model,
)
from landscape.slices.planes import DISAGREEMENT
from tests.slices.quadratics import mirrored_minima, quadratic, vectors

GRID = np.linspace(-1, 1, 9)


def axes(**options: str) -> Axes:
    with style():
        return new_figure().add_subplot(**options)


def texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [t.get_text() for t in legend.get_texts()]


def marked(ax: Axes, gid: str) -> list:
    return [a for a in [*ax.get_lines(), *ax.patches, *ax.collections] if a.get_gid() == gid]


@pytest.fixture(scope="module")
def plane() -> Plane:
    origin, first, second = vectors(3, 6)
    return Plane(origin, first, first / 2 + second, shares=(0.7, 0.2))


@pytest.fixture(scope="module")
def found(plane: Plane) -> PlaneSlice:
    return plane_slice(quadratic().objective(), plane, GRID, GRID[::2])


@pytest.fixture(scope="module")
def lines() -> list[LineSlice]:
    line = line_between(*vectors(2, 6))
    half = vectors(4, 6, seed=9)
    kernels = [None, SmoothingKernel("isotropic", torch.cat([half, -half]), True), SmoothingKernel("own", half, False)]
    return [
        line_slice(quadratic().objective(), line, np.linspace(-0.5, 1.5, 9), kernel=k, population=100) for k in kernels
    ]


def test_overlays_stand_where_they_project_and_the_legend_says_what_is_left_out(
    plane: Plane, found: PlaneSlice
) -> None:
    seen = plane.project(plane.origin + 0.3 * vectors(4, 6, seed=3))
    path = plane.project(plane.origin + torch.linspace(0.5, 0, 6, dtype=torch.float64)[:, None] * plane.first)
    objective = quadratic().objective()
    model, field = quadratic_model(objective, plane), gradient_field(objective, plane, GRID[::4], GRID[::4])
    ax = draw.loss_contours(found, axes(), learners=seen, trajectory=path, model=model, field=field)
    np.testing.assert_allclose(np.column_stack(marked(ax, "learners")[0].get_data()), seen.lengths)
    np.testing.assert_allclose(np.column_stack(marked(ax, "trajectory")[0].get_data()), path.lengths)
    share = seen.left_out / seen.distance
    assert f"4 learners, {share.min():.0%} to {share.max():.0%} of the distance left out" in texts(ax)
    assert "trajectory, none of the distance left out" in texts(ax)
    assert {"quadratic model", "steepest descent in the plane", "origin"} <= set(texts(ax))
    assert ax.get_xlabel().startswith("first axis (weights)")
    assert "70%" in ax.get_xlabel()
    assert ax.get_xlim() == pytest.approx((found.lengths[..., 0].min(), found.lengths[..., 0].max()))
    far = plane.project(plane.origin + 50 * plane.first[None])
    assert any("1 outside" in t for t in texts(draw.loss_contours(found, axes(), learners=far)))


def test_the_middle_is_named_by_the_kind_of_the_plane(found: PlaneSlice) -> None:
    own = replace(found, plane=replace(found.plane, kind=DISAGREEMENT))
    assert "$w_a$" in texts(draw.loss_contours(own, axes()))
    assert "$w_a$" not in texts(draw.loss_contours(found, axes()))


def test_arrows_point_down_the_surface(plane: Plane, found: PlaneSlice) -> None:
    objective = quadratic().objective()
    field = gradient_field(objective, plane, GRID[::4], GRID[::4])
    (arrows,) = marked(draw.loss_contours(found, axes(), field=field), "field")
    down = -field.lengths_slope.reshape(-1, 2)
    drawn = np.column_stack([arrows.U, arrows.V])
    cosine = (down * drawn).sum(1) / np.linalg.norm(down, axis=1) / np.linalg.norm(drawn, axis=1)
    np.testing.assert_allclose(cosine, 1)
    with pytest.raises(ValueError, match="no field"):
        draw.loss_contours(found, axes(), field=gradient_field(objective, plane, GRID[:1], GRID))


def test_what_is_not_finite_is_hatched_and_what_is_interpolated_is_told(plane: Plane, found: PlaneSlice) -> None:
    assert not marked(draw.loss_contours(found, axes()), "non-finite")
    broken = found.loss.copy()
    broken[:3] = np.inf
    broken[0, 0] = np.nan
    ax = draw.loss_contours(replace(found, loss=broken), axes())
    assert len(marked(ax, "non-finite")) == 1
    assert "loss not finite" in texts(ax)
    nothing = draw.loss_contours(replace(found, loss=np.full_like(broken, np.nan)), axes())
    assert len(marked(nothing, "non-finite")) == 1
    refined = plane_slice(quadratic().objective(), plane, GRID, GRID, tolerance=0.3, coarse=4)
    (dots,) = marked(draw.loss_contours(refined, axes()), "evaluated")
    assert len(dots.get_xdata()) == refined.evaluated.sum()
    assert f"evaluated ({refined.evaluated.mean():.0%} of the grid)" in texts(draw.loss_contours(refined, axes()))


def test_constant_slices_are_drawn_and_single_rows_refused(plane: Plane, found: PlaneSlice) -> None:
    draw.loss_contours(replace(found, loss=np.ones_like(found.loss)), axes())
    draw.loss_surface(replace(found, loss=np.ones_like(found.loss)), axes(projection="3d"))
    with pytest.raises(ValueError, match="make a line_slice"):
        draw.loss_contours(plane_slice(quadratic().objective(), plane, GRID, GRID[:1]), axes())


@pytest.mark.parametrize("wide", [False, True])
def test_surface_has_the_heights_of_the_slice(plane: Plane, found: PlaneSlice, wide: bool) -> None:
    loss = np.exp(2 * found.loss) if wide else found.loss + 100
    ax = draw.loss_surface(replace(found, loss=loss), axes(projection="3d"), learners=plane.project(plane.origin[None] + 0.1),
                           trajectory=plane.project(vectors(3, 6)))  # fmt: skip
    height = np.log10(loss) if wide else loss
    low, high = ax.get_zlim()
    assert low < height.min() <= height.max() <= high + 1e-12
    assert ("log" in ax.get_zlabel()) == wide
    assert any(t.startswith("1 learner on the surface,") for t in texts(ax))
    (seen,) = marked(ax, "1 learner")
    at = plane.project(plane.origin[None] + 0.1).coordinates
    expected = RegularGridInterpolator((found.first, found.second), height)(at)
    np.testing.assert_allclose(seen.get_data_3d()[2], expected)
    assert seen.get_zorder() > ax.collections[0].get_zorder()
    assert not ax.computed_zorder
    far = draw.loss_surface(
        found, axes(projection="3d"), trajectory=plane.project(plane.origin + 50 * plane.first[None])
    )
    assert any(t.endswith("; 1 outside") for t in texts(far))
    with pytest.raises(ValueError, match="three dimensions"):
        draw.loss_surface(found, axes())


def test_lines_have_their_losses_and_intervals(lines: list[LineSlice]) -> None:
    line = lines[0].line
    model = quadratic_model(quadratic().objective(), line)
    seen = line.project(vectors(3, 6))
    ax = draw.loss_lines(lines, axes(), model=model, learners=seen)
    for one, drawn in zip(lines, ax.get_lines(), strict=False):
        np.testing.assert_allclose(drawn.get_xdata(), one.positions * line.length)
        np.testing.assert_allclose(drawn.get_ydata(), one.loss)
    assert {"loss", "smoothed, isotropic kernel", "smoothed, own", "quadratic model"} <= set(texts(ax))
    np.testing.assert_allclose(marked(ax, "learners")[0].get_xdata(), seen.lengths[:, 0])
    assert any(t.startswith("3 learners, ") for t in texts(ax))
    assert len(ax.collections) == 3  # a band each
    broken = replace(lines[0], loss=np.where(lines[0].positions > 1, np.inf, lines[0].loss))
    ax = draw.loss_lines(broken, axes())
    np.testing.assert_allclose(
        marked(ax, "non-finite")[0].get_xdata(), lines[0].positions[lines[0].positions > 1] * line.length
    )
    with pytest.raises(ValueError, match="of one line"):
        draw.loss_lines([lines[0], replace(lines[0], line=line_between(*vectors(2, 6, seed=1)))], axes())


def test_connectivity_shows_the_barrier() -> None:
    objective, weights, other = mirrored_minima()
    found = line_slice(objective, line_between(weights, other), np.linspace(0, 1, 11), population=1000)
    ax = draw.connectivity(found, axes(), label="two learners")
    (bar,) = marked(ax, "barrier")
    height = found.barrier().height
    assert np.ptp(bar.get_ydata()) == pytest.approx(height.value)
    assert f"barrier {height.value:.3g} ± {1.96 * height.stderr:.2g} nats" in texts(ax)
    flat = replace(found, loss=1.0 * found.positions, covariance=0 * found.covariance)
    assert "no barrier" in texts(draw.connectivity(flat, axes()))
    broken = replace(found, loss=np.where(found.positions == 0.5, np.nan, found.loss))
    assert "barrier infinite" in texts(draw.connectivity(broken, axes()))


def test_settings_stay_and_figures_are_the_same_bytes(
    plane: Plane, found: PlaneSlice, lines: list[LineSlice], tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("a", "b"):
        ax = draw.loss_contours(found, axes(), learners=plane.project(vectors(2, 6)))
        save(ax.get_figure(root=True), tmp_path / name, ("svg", "png"))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 5000
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"backend": "agg"}):
        plt.switch_backend("agg")
        for drawing in (
            draw.loss_contours(found),
            draw.loss_surface(found),
            draw.loss_lines(lines),
            draw.connectivity(lines[0]),
        ):
            plt.close(drawing.get_figure(root=True))
    after = dict(matplotlib.rcParams)
    assert {k: v for k, v in before.items() if k != "backend"} == {k: v for k, v in after.items() if k != "backend"}
