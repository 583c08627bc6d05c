"""The figures show the data's own numbers, mark what is infinite, and leave the user's settings alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer

from landscape.plotting import alignment, dynamics, maps, noise, smoothing, spectra, stability
from landscape.plotting.sections import measured
from landscape.plotting.style import LOOKS, WIDTHS, log_scale, looks, new_figure, save, style
from landscape.plotting.view import RunView, distinct, load_view
from landscape.statistics import Z95, wilson_interval
from tests.plotting.made import made_view
from tests.plotting.test_colours import GRAPHICS_CONTRAST, contrast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from landscape.tasks import Task

OF_ONE = [dynamics.effective_learning_rate, dynamics.one_step_ledger, noise.noise_split, smoothing.kink_part,
          smoothing.smoothness_bounds, smoothing.difference_plateau, stability.stability_margin,
          alignment.noise_law, alignment.layer_exponents, alignment.disagreement_modes, alignment.rate_by_layer,
          alignment.step_noise_spectra, spectra.top_eigenvalues]  # fmt: skip
OF_MANY = [dynamics.training_loss, dynamics.held_out_accuracy, dynamics.weight_variance, noise.systematic_share, stability.coupled_growth]  # fmt: skip
OF_MAPS = [maps.convergence_probability, maps.outcome_map, maps.threshold_sensitivity, maps.time_to_threshold]


def axes() -> Axes:
    with style():
        return new_figure().subplots()


def bars(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Heights and half lengths of the error bars of a series."""
    found = next(c for c in ax.containers if isinstance(c, ErrorbarContainer) and c.get_label() == label)
    line, _, (segments,) = found.lines
    ends = np.asarray([s[:, 1] for s in segments.get_segments()])
    return np.asarray(line.get_ydata()), np.diff(ends, axis=1).ravel() / 2


def marked(ax: Axes, gid: str) -> list:
    return [a for a in [*ax.get_lines(), *ax.texts] if a.get_gid() == gid]


def with_group(view: RunView, name: str, **changed: np.ndarray) -> RunView:
    group = view.groups[name].copy(deep=True)
    for variable, values in changed.items():
        group[variable] = (group[variable].dims, values)
    return replace(view, groups={**view.groups, name: group})


def test_loss_is_the_log_of_the_run(views: list[RunView]) -> None:
    ax = dynamics.training_loss(views, axes())
    for view, line in zip(views, ax.get_lines(), strict=False):
        logged = view.run.metrics.dropna(subset=["train_loss"])
        np.testing.assert_array_equal(line.get_xdata(), logged["step"])
        np.testing.assert_array_equal(line.get_ydata(), logged["train_loss"])
    heights = [float(np.ravel(line.get_ydata())[0]) for line in ax.get_lines()[len(views) :]]
    assert heights == [views[0].run.record["threshold"], views[0].run.record["constant_loss"]]


def test_non_finite_run_ends_in_a_cross(known_task: Task, tmp_path: Path) -> None:
    from landscape.experiments.train import train
    from landscape.training.config import TrainConfig

    config = TrainConfig("ssgd", 1e38, num_learners=2, local_batch_size=8, num_steps=40, log_every=1)
    run = train(known_task, config, tmp_path / "run", quiet=True)
    assert run.status == "diverged"
    cross = marked(dynamics.training_loss([load_view(run.path)], axes()), "non-finite")
    assert [int(c.get_xdata()[0]) for c in cross] == [run.record["diverged_at"]]


def test_accuracy_band_spans_the_learners(dpsgd: RunView) -> None:
    ax = dynamics.held_out_accuracy([dpsgd], axes())
    each = np.asarray(dpsgd.series("learner_test_accuracy").tolist())
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == each.min()
    assert band.max() == each.max()


def test_effective_learning_rate_shows_the_measurement_and_every_prediction(dpsgd: RunView) -> None:
    ax = dynamics.effective_learning_rate(dpsgd, axes())
    at = dpsgd.groups["effective-learning-rate"]
    value, half = bars(ax, "measured")
    np.testing.assert_array_equal(value, at["alpha_e_ratio_mean"])
    np.testing.assert_allclose(half, Z95 * at["alpha_e_ratio_stderr"], rtol=1e-6)
    for name, label in dynamics.PREDICTION_NAMES.items():
        value, half = bars(ax, label)
        np.testing.assert_array_equal(value, at["alpha_e_ratio_predicted"].sel(prediction=name))
        np.testing.assert_allclose(
            half, Z95 * at["alpha_e_ratio_predicted_stderr"].sel(prediction=name), rtol=1e-6, atol=1e-12
        )


def test_infinite_predictions_are_marked_and_finite_ones_drawn(dpsgd: RunView) -> None:
    numbers = np.array([np.inf, 4e-3, np.inf])
    ax = dynamics.weight_variance([with_group(dpsgd, "noise", consensus_trace_predicted=numbers)], axes())
    (arrows,) = marked(ax, "infinite-prediction")
    np.testing.assert_array_equal(arrows.get_xdata(), [20, 60])
    (drawn,) = marked(ax, "prediction")
    np.testing.assert_allclose(drawn.get_ydata(), [4e-3 / dpsgd.num_parameters])
    assert any("no stationary value" in text.get_text() for text in ax.texts)
    finite = dynamics.weight_variance([with_group(dpsgd, "noise", consensus_trace_predicted=np.full(3, 4e-3))], axes())
    assert not marked(finite, "infinite-prediction")


def test_weight_variance_is_the_logged_spread_squared_and_zero_is_named(views: list[RunView], dpsgd: RunView) -> None:
    ax = dynamics.weight_variance(views, axes())
    line = next(x for x in ax.get_lines() if x.get_label() == "DPSGD")
    spread = dpsgd.series("sigma_w")
    np.testing.assert_array_equal(line.get_ydata(), spread[spread > 0] ** 2)
    assert "SSGD: exactly 0" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_noise_parts_keep_their_size_and_sign(dpsgd: RunView, ssgd: RunView) -> None:
    at = dpsgd.groups["noise"]
    ax = noise.noise_split(dpsgd, axes())
    for name, (label, _) in noise.PARTS.items():
        np.testing.assert_allclose(bars(ax, label)[0], np.abs(at[f"{name}_mean"]))
    negative = int((at["cross_mean"] < 0).sum())
    assert sum(len(m.get_xdata()) for m in marked(ax, "negative")) == negative
    texts = [t.get_text() for t in noise.noise_split(ssgd, axes()).get_legend().get_texts()]
    assert any(t.endswith("= 0") and "Delta_2" in t for t in texts)


def test_margin_draws_the_limits_that_the_run_recorded(dpsgd: RunView) -> None:
    ax = stability.stability_margin(dpsgd, axes())
    limits = dpsgd.run.record["topology"]["thresholds"]
    drawn = [float(np.ravel(x.get_ydata())[0]) for x in ax.get_lines() if str(x.get_label()).startswith("limit")]
    np.testing.assert_allclose(drawn, [limits["mean"] / 2, limits["disagreement"] / 2])
    values = dpsgd.groups["stability"]["alpha_lambda_half"].values
    for row, (_, label) in enumerate(stability.FUNCTIONS):
        np.testing.assert_array_equal(bars(ax, label)[0], values[:, row])


def test_coupled_growth_opens_what_did_not_converge(dpsgd: RunView) -> None:
    loose = with_group(dpsgd, "stability", coupled_converged=np.array([True, False, True]))
    ax = stability.coupled_growth([loose], axes())
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), dpsgd.groups["stability"]["coupled_disagreement"])
    (open_one,) = marked(ax, "not-converged")
    assert open_one.get_label() == "DPSGD: eigenvalue not converged"
    assert open_one.get_ydata()[0] == float(dpsgd.groups["stability"]["coupled_disagreement"][1])


def test_bounds_give_their_ratio_and_mark_the_infinite(dpsgd: RunView, ssgd: RunView) -> None:
    ax = smoothing.smoothness_bounds(dpsgd, axes())
    at = dpsgd.groups["smoothing"]
    measured = at["smoothness"].sel(kernel="isotropic")
    ratio = float((at["bound"].sel(bound_kind="paper") / measured).median())
    assert any(f"×{ratio:.3g}" in str(x.get_label()) for x in ax.get_lines())
    assert ax.get_yscale() == "log"
    assert not marked(ax, "infinite-bound")
    arrows = marked(smoothing.smoothness_bounds(ssgd, axes()), "infinite-bound")
    assert len(arrows) == int(np.isinf(ssgd.groups["smoothing"]["bound"]).any("step").sum()) > 0


def test_kinks_and_plateaus_are_the_measured_ones(dpsgd: RunView) -> None:
    ax = smoothing.kink_part(dpsgd, axes())
    at = dpsgd.groups["smoothing"]
    for kernel, label in smoothing.KERNEL_NAMES.items():
        np.testing.assert_array_equal(bars(ax, label)[0], at["kink_part"].sel(kernel=kernel))
    lines = smoothing.difference_plateau(dpsgd, ax=axes()).get_lines()
    np.testing.assert_array_equal([x.get_ydata() for x in lines], at["plateau_values"].sel(kernel="learners"))


def test_ledger_parts_stack_to_the_prediction(dpsgd: RunView) -> None:
    at = dpsgd.groups["ledger"]
    ax = dynamics.one_step_ledger(dpsgd, axes())
    heights = np.asarray(
        [[bar.get_height() for bar in c] for c in ax.containers if not isinstance(c, ErrorbarContainer)]
    )
    np.testing.assert_allclose(heights.sum(0), at["predicted_mean"])
    np.testing.assert_array_equal(bars(ax, "realised change")[0], at["realised_mean"])


def test_a_ledger_of_very_different_checkpoints_shows_the_small_ones(dpsgd: RunView) -> None:
    parts = {f"{name}_mean": dpsgd.groups["ledger"][f"{name}_mean"].values for name in dynamics.LEDGER_PARTS}
    top, low = (sum(np.maximum(s * v, 0) for v in parts.values()) for s in (1, -1))
    size = np.maximum(top, low)
    for ratio, scale in ((25, "linear"), (40, "asinh")):
        wanted = np.array([1.0, 2.0, ratio]) / size
        changed = with_group(dpsgd, "ledger", **{name: values * wanted for name, values in parts.items()})
        ax = dynamics.one_step_ledger(changed, axes())
        assert ax.get_yscale() == scale
        labels = [t.get_text() for t in ax.get_yticklabels()]
        assert len(set(labels)) == len(labels) >= 3
        assert ax.get_ylim()[0] < -float((low * wanted).max()) <= float((top * wanted).max()) < ax.get_ylim()[1]


@pytest.mark.parametrize("limits", [(1e-4, 1.0), (1e-3, 10.0), (3e-4, 2e-3), (0.5, 2e4), (0.02, 0.3), (5e-4, 0.02)])
def test_labels_of_a_logarithmic_axis_are_of_one_kind(limits: tuple[float, float]) -> None:
    ax = axes()
    log_scale(ax)
    ax.set_ylim(*limits)
    ax.get_figure(root=True).draw_without_rendering()
    places = [*ax.yaxis.get_ticklabels(), *ax.yaxis.get_ticklabels(minor=True)]
    labels = [t.get_text() for t in places if t.get_text() and limits[0] <= t.get_position()[1] <= limits[1]]
    assert labels
    assert len({"$" in text for text in labels}) == 1
    assert ("$" in labels[0]) == (limits in [(1e-4, 1.0), (3e-4, 2e-3), (0.5, 2e4)])


def test_greys_stand_out_from_white(dpsgd: RunView) -> None:
    for line in smoothing.difference_plateau(dpsgd, ax=axes()).get_lines():
        assert contrast(to_hex(line.get_color()), "#ffffff") >= GRAPHICS_CONTRAST


def test_counts_have_whole_ticks(mapped: xr.Dataset, dpsgd: RunView) -> None:
    few = mapped.isel(seed=[0], learning_rate=[0], variant=[0])
    counts = maps.threshold_sensitivity(few, ax=axes())
    modes = alignment.step_noise_spectra(dpsgd, axes())
    for ticks in (counts.get_yticks(), modes.get_xticks()):
        np.testing.assert_array_equal(ticks, np.round(ticks))


def test_without_smoothing_no_kernel_is_named(ssgd: RunView, dpsgd: RunView) -> None:
    titles = [smoothing.difference_plateau(v, ax=axes()).get_legend().get_title().get_text() for v in (ssgd, dpsgd)]
    assert titles == ["SSGD, no smoothing", "DPSGD, the learners' own kernel"]
    said = {s.identifier: [p.caption for p in s.pictures] for s in measured([ssgd, dpsgd])}["kinks"]
    assert ["the learners' own kernel is exact" in text for text in said[:2]] == [False, True]


def test_map_counts_and_intervals_leave_out_what_was_not_run(mapped: xr.Dataset) -> None:
    ax = maps.convergence_probability(mapped, axes())
    ended = mapped["outcome"].sel(variant="dpsgd").transpose("learning_rate", "seed").values
    hits = (ended == "converged").sum(1)
    value, half = bars(ax, "DPSGD")
    np.testing.assert_allclose(value, hits / 4)
    np.testing.assert_allclose(2 * half, [np.diff(wilson_interval(int(k), 4))[0] for k in hits])
    assert len(bars(ax, "SSGD* (σ₀ = 0.05)")[0]) == 1
    assert {0, 4} <= set(hits.tolist())  # the rates reach from all to none, or this test shows little


def test_outcome_map_colours_every_run_and_no_other(mapped: xr.Dataset) -> None:
    mesh = maps.outcome_map(mapped, axes()).collections[0].get_array()
    ended = mapped["outcome"].transpose("variant", "learning_rate", "seed").values.reshape(3, -1)
    kinds = list(maps.OUTCOMES)
    for kind in {str(k) for k in ended.ravel()} - {""}:
        np.testing.assert_array_equal(mesh.filled(-1).reshape(ended.shape) == kinds.index(kind), ended == kind)
    np.testing.assert_array_equal(np.ma.getmaskarray(mesh).reshape(ended.shape), ended == "")


def test_threshold_sensitivity_counts_again_at_each_threshold(mapped: xr.Dataset) -> None:
    ax = maps.threshold_sensitivity(mapped, ax=axes())
    finals = mapped["median_last_loss"].sel(variant="ssgd").values.ravel()
    x, y = ax.get_lines()[0].get_data()
    np.testing.assert_array_equal(y, [(finals < level).sum() for level in x])


def test_time_to_threshold_counts_those_that_never_get_there(mapped: xr.Dataset) -> None:
    ax = maps.time_to_threshold(mapped, axes())
    loss = mapped["train_loss"].transpose("variant", "learning_rate", "seed", "step").values
    ran = (mapped["outcome"].transpose("variant", "learning_rate", "seed") != "").values
    never = ((~(loss < mapped.attrs["threshold"]).any(-1)) & ran).sum(-1)
    assert sorted(int(t.get_text()) for t in marked(ax, "never")) == sorted(never[never > 0].tolist())


def test_edge_is_not_taken_from_cells_that_were_not_run(mapped: xr.Dataset) -> None:
    assert maps.rates_run(mapped, "ssgd-star-0.05").tolist() == [0.5]
    assert np.isnan(maps.edge_of(mapped, "ssgd-star-0.05")).all()
    assert np.isfinite(maps.edge_of(mapped, "dpsgd")[0])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("draw", [*OF_ONE, *OF_MANY, *OF_MAPS], ids=lambda f: f.__name__)
def test_every_figure_is_labelled_and_its_legend_inside_the_page(
    draw, width: str, views: list[RunView], dpsgd: RunView, mapped: xr.Dataset
) -> None:
    figure = new_figure(width)
    with style():
        ax = draw(dpsgd if draw in OF_ONE else views if draw in OF_MANY else mapped, ax=figure.subplots())
        figure.draw_without_rendering()
    assert ax.get_xlabel()
    assert ax.get_ylabel() or draw is maps.outcome_map
    box, page = ax.get_legend().get_window_extent(), figure.bbox
    assert page.x0 - 1 <= box.x0 <= box.x1 <= page.x1 + 1
    assert page.y0 - 1 <= box.y0 <= box.y1 <= page.y1 + 1
    assert ax.get_position().width > 0.5
    assert box.y0 >= ax.get_window_extent().y1 - 1  # over the data, not on it


def test_the_users_settings_and_figures_are_left_alone(dpsgd: RunView) -> None:
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    from matplotlib import pyplot as plt

    open_figures = plt.get_fignums()
    dynamics.effective_learning_rate(dpsgd, axes())
    assert plt.get_fignums() == open_figures
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_without_axes_a_figure_is_made(dpsgd: RunView) -> None:
    from matplotlib import pyplot as plt

    ax = dynamics.training_loss([dpsgd])
    assert ax.get_figure().number in plt.get_fignums()
    plt.close(ax.get_figure())


def test_variants_differ_in_colour_line_and_marker() -> None:
    for a, b in combinations(LOOKS.values(), 2):
        assert a.colour != b.colour
        assert a.line != b.line
        assert a.marker != b.marker
    many = looks(["ssgd", "ssgd", "dpsgd", "dpsgd", "ssgd-star-matched", "ssgd-star-0.01", "ssgd-star-0.02", "mine"])
    assert len(many) == len(set(many)) == 8


def test_saved_files_embed_their_fonts_and_repeat(tmp_path: Path, dpsgd: RunView) -> None:
    content = []
    for name in ("a", "b"):
        ax = dynamics.effective_learning_rate(dpsgd, axes())
        files = save(ax.get_figure(), tmp_path / name / "figure")
        content.append([f.read_bytes() for f in files])
    pdf, svg, png = content[0]
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"<text" not in svg
    assert png.startswith(b"\x89PNG")
    assert content[0] == content[1]


def test_views_are_labelled_by_algorithm_and_kept_apart(views: list[RunView]) -> None:
    assert [v.label for v in views] == ["ssgd", "ssgd-star", "dpsgd", "dpsgd-atc"]
    assert load_view(views[0].run.path, "mine").label == "mine"
    twice = distinct([views[0], views[0], views[2]])
    assert len({v.label for v in twice}) == 3


def test_what_was_not_measured_is_said_with_the_remedy(dpsgd: RunView) -> None:
    with pytest.raises(ValueError, match=r"no measurements of ledger.*landscape measure"):
        dynamics.one_step_ledger(replace(dpsgd, groups={}), axes())
    with pytest.raises(ValueError, match="holds no run"):
        load_view(dpsgd.run.path / "checkpoints")


def test_the_law_of_noise_shows_the_shares_and_says_what_is_inconclusive(dpsgd: RunView) -> None:
    ax = alignment.noise_law(dpsgd, axes())
    at = dpsgd.groups["alignment"].isel(step=-1)
    points = [line for line in ax.get_lines() if line.get_marker() in "soD" and line.get_linestyle() == "None"]
    for line, name in zip(points, ("gradient", "landscape", "consensus"), strict=True):
        part = at.sel(noise=name)
        expected = part["noise_along"].values / float(part["noise_trace"])
        np.testing.assert_allclose(line.get_ydata(), expected[(expected > 0) & (at["eigenvalue"].values > 0)])
        assert ("inconclusive" in line.get_label()) == (str(part["exponent_verdict"].values) != "measured")


def test_unstable_modes_are_arrows_and_the_others_their_ratios(dpsgd: RunView) -> None:
    at = dpsgd.groups["disagreement"].isel(step=-1)
    count = at.sizes["eigen_index"]
    predicted, ratio = np.full(count, 1.0), np.linspace(1, 2, count)
    predicted[0], ratio[0] = np.inf, 0.0
    last = {n: dpsgd.groups["disagreement"][n].values.copy() for n in ("mode_energy_predicted", "energy_ratio", "energy_ratio_low", "energy_ratio_high")}  # fmt: skip
    for name, row in zip(last, (predicted, ratio, ratio / 2, ratio * 2), strict=True):
        last[name][-1] = row
    ax = alignment.disagreement_modes(with_group(dpsgd, "disagreement", **last), axes())
    (arrows,) = marked(ax, "unstable-mode")
    np.testing.assert_array_equal(arrows.get_xdata(), at["eigenvalue"].values[:1])
    (container,) = ax.containers
    np.testing.assert_allclose(container.lines[0].get_ydata(), ratio[1:])


def test_the_plateau_is_of_a_kernel_that_was_measured(tmp_path: Path) -> None:
    values = np.array(
        [[[np.nan] * 3] * 2, [[3.0, 3.1, 3.2], [2.0, 2.1, 2.2]]]
    )  # SSGD* has no kernel of its learners' own
    dims = ("kernel", "step", "plateau_index")
    group = xr.Dataset({"plateau_values": (dims, values), "plateau_steps": (dims, np.ones_like(values) * [1e-3, 1e-2, 1e-1]),
                        "sigma_w": (dims[:2], np.full((2, 2), 0.1))},
                       coords={"kernel": ["learners", "isotropic"], "step": [10, 20]})  # fmt: skip
    ax = smoothing.difference_plateau(made_view(tmp_path, groups={"smoothing": group}), ax=axes())
    for line, expected in zip(ax.get_lines(), values[1], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), expected)
    assert ax.get_legend().get_title().get_text() == "DPSGD, isotropic kernel"


def test_a_layer_without_an_exponent_is_open(dpsgd: RunView) -> None:
    group = dpsgd.groups["alignment-by-layer"]
    verdicts = np.array([["measured", "inconclusive"]] * group.sizes["step"])
    view = with_group(dpsgd, "alignment-by-layer", exponent_verdict=verdicts, exponent=np.ones(verdicts.shape))
    ax = alignment.layer_exponents(view, axes())
    assert [c.lines[0].get_markerfacecolor() for c in ax.containers] == ["#D55E00", "white"]
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(v) for v in group["layer"].values]
