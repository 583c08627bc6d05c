"""The density as drawn integrates to one, its band is that of the estimate, and exact eigenvalues stand where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.collections import FillBetweenPolyCollection

from landscape.curvature.density import SpectralDensity, spectral_density
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.operators import DenseOperator
from landscape.plotting import spectra
from landscape.plotting.style import LOOKS, new_figure, style
from landscape.statistics import Z95
from tests.plotting.made import made_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTLIERS = (9.0, 6.0)
D = 60


def axes() -> Axes:
    with style():
        return new_figure().subplots()


@pytest.fixture(scope="module")
def operator() -> DenseOperator:
    """A bulk from -1 to 1 and two outliers, in a random basis."""
    values = torch.cat([torch.tensor(OUTLIERS), torch.linspace(-1, 1, D - 2)]).double()
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    return DenseOperator(basis @ torch.diag(values) @ basis.T)


@pytest.fixture(scope="module", params=["linear", "symlog"])
def found(operator: DenseOperator, request: pytest.FixtureRequest) -> SpectralDensity:
    pairs = top_eigenpairs(operator, k=2, which="LA")
    return spectral_density(
        operator, num_probes=6, num_steps=20, eigenpairs=pairs, axis=request.param, kernel_width=0.02
    )


def only(ax: Axes, gid: str) -> object:
    (line,) = [line for line in ax.get_lines() if line.get_gid() == gid]
    return line


def test_the_curve_and_its_band_are_the_estimates(found: SpectralDensity) -> None:
    ax = spectra.spectral_density(found, axes())
    curve = ax.get_lines()[0]
    seen = np.isfinite(curve.get_ydata())
    np.testing.assert_array_equal(curve.get_xdata(), found.grid)
    np.testing.assert_array_equal(curve.get_ydata()[seen], found.density[seen])
    floor = ax.get_ylim()[0]
    assert (found.density[~seen] <= floor).all()
    (band,) = [c for c in ax.collections if isinstance(c, FillBetweenPolyCollection)]
    corners = band.get_paths()[0].vertices
    at = int(np.argmax(found.density))
    edges = corners[np.isclose(corners[:, 0], found.grid[at], rtol=1e-12), 1]
    assert edges.max() == pytest.approx(found.density[at] + Z95 * found.stderr[at])
    assert edges.min() == pytest.approx(max(found.density[at] - Z95 * found.stderr[at], floor))


def test_what_is_drawn_integrates_to_one_on_the_axis(found: SpectralDensity) -> None:
    """Over the transformed axis; on a symlog axis places are proportional to asinh(eigenvalue/threshold)."""
    ax = spectra.spectral_density(found, axes())
    curve = ax.get_lines()[0]
    places = ax.xaxis.get_transform().transform(np.asarray(curve.get_xdata()))
    scale = found.linear_threshold if found.axis == "symlog" else 1.0
    assert np.trapezoid(np.nan_to_num(curve.get_ydata()), places / scale) == pytest.approx(1, abs=0.01)


def test_exact_eigenvalues_are_ticks_and_one_alone_reaches_the_dotted_line(found: SpectralDensity) -> None:
    ax = spectra.spectral_density(found, axes())
    np.testing.assert_allclose(only(ax, "outlier").get_xdata(), OUTLIERS, rtol=1e-6)
    (height,) = set(only(ax, "one eigenvalue").get_ydata())
    near = np.abs(found.grid - OUTLIERS[0]).argmin()
    places = np.arcsinh(np.array(OUTLIERS) / found.linear_threshold) if found.axis == "symlog" else np.array(OUTLIERS)
    overlap = np.exp(-(np.diff(places)[0] ** 2) / (2 * found.kernel_width**2))  # of the other one's peak
    assert found.density[near] == pytest.approx(height * (1 + overlap), rel=0.02)
    assert "2 exact eigenvalues" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_a_stored_density_is_drawn_alike_and_two_share_axes(found: SpectralDensity) -> None:
    one, ax = spectra.spectral_density(found, axes()), axes()
    spectra.spectral_density(found.to_xarray(), ax, label="H")
    np.testing.assert_array_equal(one.get_lines()[0].get_ydata(), ax.get_lines()[0].get_ydata())
    spectra.spectral_density(found, ax, label="G", look=LOOKS["ssgd"])
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert {"H", "G"} <= set(labels)
    assert labels.count("peak of one eigenvalue") == 1
    assert len({line.get_ydata()[0] for line in ax.get_lines() if line.get_gid() == "outlier"}) == 2


@pytest.mark.parametrize("make", [lambda d: torch.zeros(d, d), lambda d: torch.eye(d), lambda d: 1e-9 * torch.eye(d)])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_degenerate_spectra_are_drawn(make: Callable[[int], torch.Tensor], num_probes: int) -> None:
    ax = spectra.spectral_density(spectral_density(DenseOperator(make(10).double()), num_probes=num_probes), axes())
    ax.get_figure(root=True).draw_without_rendering()
    assert np.isfinite(ax.get_ylim()).all()


def test_eigenvalues_over_training(tmp_path: Path) -> None:
    values = np.array([[3.0, 2.0, 1.0], [4.0, 1.0, 0.5]])
    converged = np.array([[1, 1, 0], [1, 1, 1]])
    group = xr.Dataset(
        {"eigenvalue": (("step", "eigen_index"), values), "converged": (("step", "eigen_index"), converged), "lambda_min": ("step", [-0.5, 0.1]),
         "learner_lambda_max": (("step", "learner"), np.array([[5.0, 6.0], [7.0, np.nan]]))},
        coords={"step": [10, 20]},
    )  # fmt: skip
    ax = spectra.top_eigenvalues(made_view(tmp_path, groups={"curvature": group}), axes())
    assert {line.get_color() for line in ax.get_lines() if "$w_a$" in line.get_label()} == {LOOKS["dpsgd"].colour}
    shown = {line.get_label(): np.asarray(line.get_ydata()) for line in ax.get_lines()}
    np.testing.assert_array_equal(shown["largest at $w_a$"], [3, 4])
    np.testing.assert_array_equal(shown["next 2"], [2, 1])
    np.testing.assert_array_equal(shown["most negative"], [-0.5, 0.1])
    np.testing.assert_array_equal(only(ax, "not-converged").get_ydata(), [1.0])
    assert ax.get_yscale() == "linear"
    alone = spectra.top_eigenvalues(
        made_view(tmp_path, algorithm="ssgd", groups={"curvature": group.isel(eigen_index=[0])}), axes()
    )
    assert {line.get_color() for line in alone.get_lines() if "$w_a$" in line.get_label()} == {LOOKS["ssgd"].colour}
    assert "largest of each learner" not in [t.get_text() for t in alone.get_legend().get_texts()]
