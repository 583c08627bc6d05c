"""Captions say what the numbers do to a claim; the manifest holds the numbers of the data that are kept with the code."""

from __future__ import annotations

import doctest
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from landscape.checkpoints import Learners
from landscape.objective import Objective
from landscape.plotting.style import style
from landscape.results import load_groups, save_groups
from landscape.statistics import Estimate
from paper_figs import __main__ as driver
from paper_figs import (
    claims,
    digits,
    fig_rescue,
    fig_scorecard,
    fig_self_adjusting,
    fig_slices,
    manifest,
    overview,
    panels,
)
from paper_figs.claims import Headline, caption, count, finding, headline
from paper_figs.recorded import Recorded, read_recorded, write_recorded
from paper_figs.scales import SCALES
from paper_figs.studies.stored import DATA, read_all, write_study
from paper_figs.study_claims import STUDY_CLAIMS

NAMES = sorted(n for n, script in driver.CLAIMS.items() if all((DATA / name).exists() for name in script.INPUTS))
"""Figures whose data are kept."""


@cache
def read(name: str) -> Any:
    """The data of a figure, read once for all tests, since figures share them."""
    same = next(n for n in NAMES if driver.CLAIMS[n].read == driver.CLAIMS[name].read)
    return driver.CLAIMS[name].read(DATA) if same == name else read(same)


@pytest.fixture(scope="module")
def kept() -> Recorded:
    data: Recorded = read("fig_self_adjusting")
    return data


def test_doctests() -> None:
    for module in (claims, panels):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_holds_the_kept_data(name: str) -> None:
    """Inputs by their hashes, the claim and what became of it, and every number: the data are fixed, so nearly to the last digit."""
    script, stored = driver.CLAIMS[name], manifest.read_manifest()[name]
    numbers = script.headlines(read(name))
    found = manifest.entry(script.CLAIM, script.INPUTS, DATA, numbers)
    assert manifest.differences(found, stored) == []
    assert found["claim"] == stored["claim"]
    assert found["headlines"].keys() == stored["headlines"].keys()
    for key, number in found["headlines"].items():
        before = stored["headlines"][key]
        assert number["value"] == pytest.approx(before["value"], rel=1e-6, abs=1e-12), key
        assert (number["text"], number["bearing"]) == (before["text"], before["bearing"])
        assert 0 <= number["tolerance"] == pytest.approx(before["tolerance"], rel=1e-6)


def test_the_manifest_is_of_these_figures_alone() -> None:
    """Every figure of one claim is in it; those of the studies are once their data are kept."""
    found = set(manifest.read_manifest())
    assert set(NAMES) <= found <= {*NAMES, *driver.STUDIES}
    assert set(driver.CLAIMS) - set(NAMES) <= {"fig_rescue"}  # whose data may be made later


@pytest.mark.parametrize("name", sorted(driver.STUDIES))
def test_the_manifest_holds_the_kept_studies(name: str) -> None:
    stored = manifest.read_manifest().get(name)
    if stored is None:
        assert not sorted(DATA.glob("*.nc")), "write the manifest again: studies were added"
        return
    studies, about = read_all(DATA), STUDY_CLAIMS[name]
    found = manifest.entry(about.claim, tuple(f"{s.name}.nc" for s in studies), DATA, about.headlines(studies))
    assert manifest.differences(found, stored) == []
    assert found["inputs"].keys() == stored["inputs"].keys()


OUTCOMES = {
    "ssgd": [["ccc", "ccs", "sxx"], ["ccc", "sss", "xxx"]],
    "ssgd-star-matched": [["ccc", "ccc", "sss"], ["ccc", "sss", "kkk"]],
    "dpsgd": [["ccc", "ccc", "css"], ["ccc", "ccc", "sss"]],
}


def test_numbers_of_studies(made_up: Callable[..., Any], made_up_along: Callable[..., Any], tmp_path: Path) -> None:
    """Counted by hand: of 6 edges 5 are surely above SSGD's and 4 above SSGD*'s, which a sign test does not tell from chance."""
    write_study(*made_up(OUTCOMES, "first"), made_up_along(("both", "differ")), tmp_path / "first.nc")
    studies = read_all(tmp_path)
    edges = STUDY_CLAIMS["fig_edges"].headlines(studies)
    assert {name: (h.value, h.bearing) for name, h in edges.items()} == {
        "first_ssgd": (5.0, "undecided"),
        "first_ssgd-star-matched": (4.0, "undecided"),
    }
    share = STUDY_CLAIMS["fig_convergence"].headlines(studies)["first"]
    assert share.value == pytest.approx(13 / 18 - 8 / 18)
    assert "13 of 18" in share.text
    assert "8 of 18" in share.text
    along = studies[0].along
    assert along is not None
    rates = STUDY_CLAIMS["fig_smoothness"].headlines(studies)
    assert list(rates) == ["first_both", "first_differ"]
    assert rates["first_both"].value == float(along["alpha_e_ratio_mean"].values[0, 0])
    assert STUDY_CLAIMS.keys() == driver.STUDIES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_figures_of_the_kept_data_stay_on_the_page(name: str) -> None:
    """Every panel has data, legends and captions are inside the page, and the caption tells the claim and the finding."""
    script = driver.CLAIMS[name]
    data = read(name)
    figure = script.draw(data)
    with style():
        figure.draw_without_rendering()
    page = figure.bbox
    for panel in figure.axes:
        assert panel.has_data() or panel.texts
        box = panel.get_tightbbox()
        assert box is not None
        assert box.x0 >= page.x0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y1 <= page.y1 + 1
        assert panel.get_position().height > 0.08
    label = figure._supxlabel  # type: ignore[attr-defined]
    assert label.get_window_extent().x1 <= page.x1
    said = " ".join(label.get_text().split())
    assert panels.symbols(" ".join(script.CLAIM.split()))[:60] in said
    assert f"By these numbers: {finding(script.headlines(data))}" in said


def test_a_number_against_the_claim_is_said() -> None:
    pro = headline(Estimate(0.5, 0.01), "the ratio", "supports")
    contra = count(3, 4, "checkpoints", "contradicts")
    lines = caption("It is so.", {"a": pro, "b": contra}, "small")
    assert lines[0] == "Claim: It is so."
    assert (
        lines[1]
        == "By these numbers: supported in part, contradicted in part. the ratio: 0.5 ± 0.01 [+]; checkpoints, of 4: 3 [−]."
    )
    assert finding({"b": contra}) == "contradicted"
    assert finding({"a": replace(pro, bearing="undecided")}) == "undecided"
    assert finding({"a": pro, "b": replace(pro, bearing="undecided")}) == "supported in part, the rest undecided"


def test_bearings_follow_the_numbers(kept: Recorded) -> None:
    """A self-adjusting rate that is made to stay at 1, or to stay low, contradicts the claim where it said so."""

    def with_ratio(label: str, values: float | int) -> Recorded:
        view = kept.views[label]
        group = view.groups["effective-learning-rate"]
        changed = group.assign(
            alpha_e_ratio_mean=xr_full(group["alpha_e_ratio_mean"], values), alpha_e_ratio_stderr=xr_full(group["alpha_e_ratio_stderr"], 0.001)
        )  # fmt: skip
        return replace(
            kept, views={**kept.views, label: replace(view, groups={**view.groups, "effective-learning-rate": changed})}
        )

    def xr_full(like: Any, value: float | int) -> Any:
        return like.copy(data=np.full(like.shape, float(value)))

    still = fig_self_adjusting.headlines(with_ratio("dpsgd", 1.1))
    assert (still["dpsgd_first"].bearing, still["dpsgd_last"].bearing) == ("contradicts", "supports")
    low = fig_self_adjusting.headlines(with_ratio("dpsgd", 0.2))
    assert (low["dpsgd_first"].bearing, low["dpsgd_last"].bearing) == ("supports", "contradicts")
    assert fig_self_adjusting.headlines(with_ratio("ssgd", 0.5))["ssgd"].bearing == "contradicts"


def test_differences_are_named() -> None:
    number = {"text": "", "value": 1.0, "stderr": None, "tolerance": 0.5, "bearing": "told"}
    kept = {"claim": "", "finding": "supported", "inputs": {"a.nc": "1"}, "headlines": {"x": number, "y": number}}
    near = {**kept, "headlines": {"x": {**number, "value": 1.4}, "y": number}}
    assert manifest.differences(near, kept) == []
    far = {
        "claim": "",
        "finding": "contradicted",
        "inputs": {"a.nc": "2"},
        "headlines": {"x": {**number, "value": math.nan}, "z": number},
    }
    said = "; ".join(manifest.differences(far, kept))
    assert said == (
        "a.nc is not the file of the manifest; x is nan, in the manifest 1 ± 0.5; z is not in the manifest; y is missing; "
        "the claim is contradicted, in the manifest supported"
    )


def test_the_manifest_is_written_beside_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    manifest.write_manifest({"a": {"x": 1}}, path)
    manifest.write_manifest({"b": {"x": 2}}, path)
    assert manifest.read_manifest(path) == {"a": {"x": 1}, "b": {"x": 2}}
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        manifest.read_manifest(path)


def test_recorded_runs_come_back_as_they_were(kept: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "again.nc"
    write_recorded(kept.views, kept.stability_map, kept.separation, path, scale="s", made_by="m")
    again = read_recorded(path)
    assert again.separation == kept.separation
    assert again.views.keys() == kept.views.keys() == {"ssgd", "ssgd-star", "dpsgd", "dpsgd-atc"}
    for label, view in kept.views.items():
        assert again.views[label].run.config == view.run.config
        np.testing.assert_array_equal(again.views[label].series("train_loss"), view.series("train_loss"))
        assert again.views[label].groups.keys() == view.groups.keys()
        for name, group in view.groups.items():
            assert again.views[label].groups[name].identical(group)
    with pytest.raises(ValueError, match=r"lack nobody; there are ssgd"):
        kept.some("nobody")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*digits\.nc; make it with"):
        digits.read(tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*rescue\.nc; make it with"):
        fig_rescue.read(tmp_path)
    groups = load_groups(DATA / digits.INPUT)
    for name, reader in ((digits.INPUT, digits.read), (fig_rescue.INPUTS[0], fig_rescue.read)):
        save_groups({"/": groups["map"]}, tmp_path / name)
        with pytest.raises(ValueError, match="holds no"):
            reader(tmp_path)


def test_kept_data_are_small_name_no_folder_and_hold_no_weights() -> None:
    files = sorted((DATA / "recorded").glob("*.nc"))
    assert {"digits.nc"} <= {f.name for f in files} <= {"digits.nc", "rescue.nc", "slices.nc"}
    assert all(f.stat().st_size < 1_000_000 for f in files)
    for file in files:
        for group in load_groups(file).values():
            assert all("/tmp" not in str(v) and "/home" not in str(v) for v in group.attrs.values())
            assert all(array.size < 20_000 for array in group.data_vars.values())
    told = load_groups(DATA / digits.INPUT)["/"].attrs
    assert told["made_by"] == "python -m paper_figs --recompute --scale laptop"
    assert told["scale"] == SCALES["laptop"].words


def test_scorecard_cells_are_the_verdicts(kept: Recorded) -> None:
    card = fig_scorecard.table(kept)
    letters = [t.get_text() for t in fig_scorecard.draw(kept).axes[0].texts if t.get_gid() == "verdict"]
    known = card[card["verdict"].isin(fig_scorecard.LOOKS)]
    assert sorted(letters) == sorted(fig_scorecard.LOOKS[v][1] for v in known["verdict"])
    assert set(card["comparison"]) <= set(fig_scorecard.WORDS)


def test_rescue_bearings() -> None:
    """Covariance-matched noise must beat SSGD; isotropic noise of the same strength must not."""
    import xarray as xr

    def part(ssgd_low: float, dpsgd_high: float) -> xr.Dataset:
        return xr.Dataset({"difference_ssgd_low": ((), ssgd_low), "difference_dpsgd_high": ((), dpsgd_high)})

    rescued, failed, open_ = part(0.2, 0.5), part(-0.5, -0.2), part(-0.1, 0.1)
    matched, isotropic = "ssgd-star-weights-low-rank", "ssgd-star-gradient-isotropic"
    assert [fig_rescue._bearing(matched, p) for p in (rescued, failed, open_)] == [
        "supports",
        "contradicts",
        "undecided",
    ]
    assert [fig_rescue._bearing(isotropic, p) for p in (rescued, failed, open_)] == [
        "contradicts",
        "supports",
        "undecided",
    ]
    assert fig_rescue._bearing("ssgd-star-gradient-drift-alone", rescued) == "told"


def test_every_scale_names_variants_and_presets() -> None:
    for scale in SCALES.values():
        names = [v.name for v in fig_rescue.variants(scale)]
        assert names[:2] == ["ssgd", "dpsgd"]
        assert len(set(names)) == len(names)
        assert min(scale.rescue_seeds) > 5  # seeds 0 to 5 chose rates


def _stub(numbers: dict[str, Headline], calls: list[str]) -> ModuleType:
    """A script whose data are a text file."""
    script = ModuleType("paper_figs.fig_stub")

    def compute(work: Path, scale: Any, folder: Path) -> Path:
        calls.append(scale.name)
        (folder / "stub.txt").write_text("made")
        return folder / "stub.txt"

    def read(folder: Path) -> str:
        if not (folder / "stub.txt").exists():
            raise ValueError("there is no stub")
        return (folder / "stub.txt").read_text()

    from matplotlib.figure import Figure

    made: dict[str, Any] = {
        "CLAIM": "It is so.", "INPUTS": ("stub.txt",), "compute": compute, "read": read, "headlines": lambda data: numbers,
        "draw": lambda data: Figure(figsize=(1, 1)),
    }  # fmt: skip
    script.__dict__.update(made)
    return script


def test_the_driver_recomputes_draws_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    numbers = {"x": headline(Estimate(1.0), "x", "supports", tolerance=0.5)}
    script = _stub(numbers, calls)
    monkeypatch.setattr(driver, "CLAIMS", {"fig_stub": script, "fig_twin": script})
    path = tmp_path / "manifest.json"
    monkeypatch.setattr(driver, "read_manifest", lambda: manifest.read_manifest(path))
    monkeypatch.setattr(driver, "write_manifest", lambda entries: manifest.write_manifest(entries, path))
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]

    assert driver.main(["--only", "fig_stub", *where]) == 2
    assert "not drawn: fig_stub: there is no stub" in capsys.readouterr().err
    assert (
        driver.main(["--only", "fig_stub", "fig_twin", "--recompute", "--scale", "gpu", "--write-manifest", *where])
        == 0
    )
    assert calls == ["gpu"]  # figures that share their data make them once
    assert len(list((tmp_path / "out").iterdir())) == 6
    assert json.loads(path.read_text())["fig_stub"]["headlines"]["x"]["value"] == 1.0
    numbers["x"] = replace(numbers["x"], value=2.0)
    capsys.readouterr()
    assert driver.main(["--only", "fig_stub", "--recompute", *where]) == 1
    assert "fig_stub: x is 2, in the manifest 1 ± 0.5" in capsys.readouterr().err
    assert calls == ["gpu", "laptop"]
    with pytest.raises(SystemExit):
        driver.main(["--only", "fig_nothing", *where])


@pytest.mark.slow
def test_the_driver_draws_every_claim_in_three_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--only", *NAMES, "--out", str(tmp_path)]) == 0
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {f"{name}.{kind}" for name in NAMES for kind in ("pdf", "svg", "png")}
    assert capsys.readouterr().err == ""


def test_slices_say_what_their_numbers_are() -> None:
    """By other ways: the smoothed loss at the origin is the mean of the learners' losses, and the model's rise is that of its own curvature."""
    data = read("fig_slices")
    for at in data.at.values():
        plain, smoothed = at.lines[0], next(line for line in at.lines if line.kernel == "learners")
        centre = len(plain.positions) // 2
        assert plain.positions[centre] == pytest.approx(0, abs=1e-12)
        assert smoothed.loss[centre] - plain.loss[centre] == pytest.approx(at.rise, rel=1e-3)
        seen = (at.learners.lengths @ at.model.lengths_curvature * at.learners.lengths).sum(1).mean() / 2
        assert seen < at.model_rise * 1.001 or at.model.lengths_curvature.min() < 0  # the plane has a part of the whole
        assert at.barriers.shape == (15,)
        assert (at.barriers >= 0).all()
    early, late = (data.at[step] for step in fig_slices.STEPS)
    assert fig_slices.headlines(data)["rise_ratio_20"].value == early.rise / early.model_rise
    assert early.rise > late.rise


def test_slices_of_a_quadratic_rise_as_its_model_says(tmp_path: Path) -> None:
    """Linear regression: the ratio is 1, and nothing rises between learners."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(40, k, generator=generator, dtype=torch.float64) for k in (4, 2))
    objective = Objective(nn.Linear(4, 2).double(), nn.functional.mse_loss, (inputs, targets))
    weights = torch.randn(6, objective.num_parameters, generator=generator, dtype=torch.float64)
    groups = fig_slices.slices(objective, Learners(3, weights, objective.model.layout))
    save_groups({f"step-3/{name}": part for name, part in groups.items()}, tmp_path / "slices.nc")
    at = fig_slices._at(load_groups(tmp_path / "slices.nc"), "step-3")
    assert at.rise == pytest.approx(at.model_rise, rel=1e-9)
    assert at.barriers.max() < 1e-9
    np.testing.assert_allclose(at.plane.loss, at.model.at(np.stack(np.meshgrid(at.plane.first, at.plane.second, indexing="ij"), -1)), rtol=1e-9)  # fmt: skip


def test_the_overview_of_the_readme_is_drawn_from_the_kept_data() -> None:
    figure = overview.draw()
    figure.draw_without_rendering()
    assert [bool(panel.has_data()) for panel in figure.axes] == [True] * 3
    assert overview.OUT.with_suffix(".png").exists()
