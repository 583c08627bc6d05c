"""The report is one file that loads nothing, says everything in words too, and hides nothing."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from landscape.plotting import tables
from landscape.plotting.report import NEUTRAL, write_report
from landscape.plotting.view import RunView
from landscape.theory.scorecard import scorecard
from tests.plotting.made import made_view

if TYPE_CHECKING:
    import xarray as xr


class Page(HTMLParser):
    """Tags with their attributes, text without style sheets, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def report(views: list[RunView], mapped: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    said = ["First <finding> & its reason.", "Second finding."]
    return write_report(
        path, views, mapped, title="A <title>", conclusions=said, how_to_reproduce="landscape reproduce --out DIR"
    )


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def test_it_loads_nothing_and_names_no_directory(report: Path, page: Page, views: list[RunView]) -> None:
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"https?://|[\"'=(]//[a-z]|@import|url\(", text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert str(views[0].run.path.parent) not in text
    assert page.open == []


def test_pictures_are_vector_and_have_words(page: Page, views: list[RunView]) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    measured = sum(len(v.groups) for v in views)
    assert all(attributes.get("aria-label") for _, attributes in page.tags if attributes.get("role") == "region")
    assert sum(
        attributes.get("class") == "card" and attributes.get("tabindex") == "0" for _, attributes in page.tags
    ) == len(pictures)
    assert len(pictures) >= 4 + 3 + measured
    for picture in pictures:
        assert len(picture["alt"] or "") > 30
        kind, _, data = (picture["src"] or "").partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)[:2000]
    assert len({picture["alt"] for picture in pictures}) == len(pictures)


def test_alternative_texts_tell_the_numbers(page: Page, dpsgd: RunView) -> None:
    told = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    (rate,) = [
        text for text in told if text.startswith("Effective over nominal learning rate with its predictions, DPSGD,")
    ]
    means = dpsgd.groups["effective-learning-rate"]["alpha_e_ratio_mean"].values
    assert f"from {tables.number(float(means[0]))} to {tables.number(float(means[-1]))}" in rate
    assert f"smallest {tables.number(float(means.min()))} at step" in rate
    (card,) = [text for text in told if text.startswith("Scorecard of DPSGD:")]
    verdicts = scorecard(dpsgd.groups)["verdict"]
    assert all(f"{word} {int((verdicts == word).sum())} times" in card for word in set(verdicts) - {"not applicable"})


def test_every_heading_is_reached_from_the_contents(page: Page) -> None:
    targets = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    sections = {f"#{attributes['id']}" for tag, attributes in page.tags if tag == "section" and "id" in attributes}
    assert targets == sections
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")] == ["h1"] + ["h2"] * len(sections)


def test_a_measure_of_an_older_version_leaves_out_the_figure_it_has_no_numbers_for(
    dpsgd: RunView, tmp_path: Path
) -> None:
    old = dpsgd.groups["effective-learning-rate"].drop_dims("layer")
    text = write_report(
        tmp_path / "r.html", [replace(dpsgd, groups={"effective-learning-rate": old})], title="Old"
    ).read_text()
    assert "with its predictions, DPSGD" in text
    assert "of each layer" not in text


def test_markdown_says_the_same_with_its_figures_beside(
    views: list[RunView], dpsgd: RunView, page: Page, tmp_path: Path
) -> None:
    said = ["One *finding*:\nfirst <one>\nsecond"]
    path = write_report(
        tmp_path / "out" / "my report.md", [dpsgd, views[0]], title="A | B", conclusions=said, form="md"
    )
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# A \\| B\n\n- One \\*finding\\*:\n  - first &lt;one&gt;\n  - second\n")
    links = re.findall(r"!\[([^\n]*)\]\(my%20report-figures/([^)]*)\)", text)
    files = {f.name for f in (tmp_path / "out" / "my report-figures").iterdir()}
    assert {name for _, name in links} == files
    assert len(files) == len(links) > 10
    assert all(len(alternative) > 30 for alternative, _ in links)
    assert all(
        (tmp_path / "out" / "my report-figures" / name).read_bytes().lstrip().startswith(b"<?xml") for name in files
    )
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads[-3:] == ["## Predictions and verdicts", "## Provenance", "## How to reproduce"]
    assert dpsgd.run.record["data"]["fingerprint"]["train"] in text
    assert "landscape measure dpsgd" in text
    rows = [
        [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]
        for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    ]
    assert rows
    assert all(len(set(widths)) == 1 for widths in rows)


def test_conclusions_come_first_as_given(page: Page) -> None:
    assert (
        page.text.index("First <finding> & its reason.") < page.text.index("Second finding.") < page.text.index("Runs")
    )
    assert "A <title>" in page.text


def test_every_verdict_is_a_word_and_every_count_is_the_scorecards(page: Page, views: list[RunView]) -> None:
    assert all(word in page.text for word in tables.VERDICTS)
    for view in views:
        card = scorecard(view.groups)
        table = tables.verdict_table(view)
        for word in tables.VERDICTS:
            told = sum(count for row in table.rows for verdict, count in row[3] if verdict == word)
            assert told == int((card["verdict"] == word).sum())
        assert len(tables.scorecard_table(view).rows) == len(card)
    given = {v for view in views for v in scorecard(view.groups)["verdict"]}
    assert given <= set(tables.VERDICTS)


def test_bounds_are_called_estimates_with_their_ratio(dpsgd: RunView, page: Page) -> None:
    at = dpsgd.groups["smoothing"]
    ratio = float((at["bound"].sel(bound_kind="paper") / at["smoothness"].sel(kernel="isotropic")).median())
    row = next(r for r in tables.verdict_table(dpsgd).rows if "2G/σ" in r[2])
    assert row[2].startswith("estimated bound")
    assert row[4] == f"{tables.number(ratio)} bound / measured"
    assert row[2] in page.text


def test_infinite_predictions_are_told_not_averaged(dpsgd: RunView) -> None:
    group = dpsgd.groups["noise"].copy(deep=True)
    measured = group["consensus_trace"].values
    group["consensus_trace_predicted"] = ("step", [np.inf, measured[1] / 3, np.inf])
    row = next(r for r in tables.verdict_table(replace(dpsgd, groups={"noise": group})).rows if r[0] == "Tr Σ_w")
    assert row[4] == "3 where finite; predicted ∞ at 2 of 3"


def test_counts_of_the_map_leave_out_what_was_not_run(mapped: xr.Dataset, page: Page) -> None:
    table = tables.convergence_table(mapped)
    star = next(r for r in table.rows if r[0].startswith("SSGD*"))
    assert [c == "not run" for c in star[1:4]] == [True, False, True]
    ended = mapped["outcome"].sel(variant="dpsgd", learning_rate=1e38).values
    assert "4 non-finite" in next(r for r in table.rows if r[0] == "DPSGD")[3]
    assert (ended == "non-finite").all()
    assert "not run" in page.text


def test_provenance_names_seed_versions_commit_and_data(page: Page, dpsgd: RunView) -> None:
    record = dpsgd.run.record
    for text in (record["data"]["fingerprint"]["train"], record["provenance"]["git_commit"], record["provenance"]["torch"],
                 dpsgd.groups["ledger"].attrs["provenance_time"], "num_draws 6"):  # fmt: skip
        assert text in page.text


def test_one_run_without_a_map_and_one_that_was_not_measured(dpsgd: RunView, tmp_path: Path) -> None:
    alone = Page(write_report(tmp_path / "one.html", [dpsgd], title="One").read_text(encoding="utf-8"))
    assert NEUTRAL in alone.text
    assert "Who converges" not in alone.text
    bare = Page(
        write_report(tmp_path / "bare.html", [replace(dpsgd, groups={})], title="Bare").read_text(encoding="utf-8")
    )
    assert "Not measured, so without predictions: DPSGD" in bare.text
    assert len([t for t, _ in bare.tags if t == "img"]) == 3
    assert "landscape train --task tiny --algorithm dpsgd" in bare.text
    assert not list(tmp_path.glob(".writing*"))


def test_runs_of_other_programs_and_diverged_ones_have_a_report(tmp_path: Path) -> None:
    origin = {"imported": {"from": ["/home/someone/theirs"], "format": "DDP"}, "assumed": ["learning_rate"]}
    imported = made_view(tmp_path, "imported", status="imported", outcome=None, log=[], record=origin)
    alone = Page(write_report(tmp_path / "imported.html", [imported], title="Theirs").read_text(encoding="utf-8"))
    assert [t for t, _ in alone.tags if t == "img"] == []
    assert "landscape import theirs --task tiny --out imported" in alone.text
    died = {"status": "diverged", "outcome": {"outcome": "non-finite", "step": 0}, "record": {"diverged_at": 0}}
    at_once = made_view(tmp_path, "at once", log=[], **died)
    later = made_view(tmp_path, "later", log=[{"step": s, "train_loss": 10.0**s} for s in range(5)], **died)
    both = Page(
        write_report(tmp_path / "died.html", [at_once, later, imported], title="Died").read_text(encoding="utf-8")
    )
    assert "non-finite (at step 0)" in both.text
    pictures = [attributes["alt"] or "" for tag, attributes in both.tags if tag == "img"]
    assert "at once ends at nothing logged; later ends at 1.00×10⁴" in pictures[0]
    assert "imported" not in pictures[0]


def test_short_runs_are_not_judged_and_losses_say_their_examples(tmp_path: Path) -> None:
    some = made_view(
        tmp_path, "short", num_steps=20, log=[{"step": 0, "train_loss": 2.3}], record={"evaluation_examples": 2000}
    )
    (row,) = tables.summary([some]).rows
    assert "too short to judge" in row
    assert "too short to judge" not in tables.summary([made_view(tmp_path, "long", num_steps=50)]).rows[0]
    page = Page(write_report(tmp_path / "some.html", [some], title="Some").read_text(encoding="utf-8"))
    assert "Training loss of the average wa over 2,000 training examples, a fixed random choice." in page.text
    whole = made_view(tmp_path, "whole")
    page = Page(write_report(tmp_path / "both.html", [whole, some], title="Both").read_text(encoding="utf-8"))
    assert "over all training data or 2,000 training examples, a fixed random choice, by the run." in page.text


@pytest.mark.slow
def test_several_maps_each_have_a_section(dpsgd: RunView, mapped: xr.Dataset, tmp_path: Path) -> None:
    both = {"local batch 8": mapped, "local batch 16": mapped}
    text = Page(
        write_report(tmp_path / "r.html", [replace(dpsgd, groups={})], both, title="Two").read_text(encoding="utf-8")
    ).text
    assert "learning rate: local batch 8" in text
    assert "learning rate: local batch 16" in text


def test_mistakes_are_said(tmp_path: Path, dpsgd: RunView) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path / "r.html", [], title="None")
    with pytest.raises(ValueError, match="is a directory"):
        write_report(tmp_path, [dpsgd], title="Where")


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [(0.759813, 0.00467, "0.7598 ± 0.0047"), (1234.5, 67.8, "1234 ± 68"), (2.5168e-4, 2.28e-5, "(2.52 ± 0.23)×10⁻⁴"),
     (-0.5, 0.02, "−0.500 ± 0.020"), (1.0, 0.0, "1"), (float("inf"), 0.0, "∞"), (0.2, float("nan"), "0.2")],
)  # fmt: skip
def test_numbers_are_short_and_keep_their_errors(value: float, stderr: float, shown: str) -> None:
    assert tables.with_error(value, stderr) == shown


def test_paths_are_told_by_their_last_part_only(dpsgd: RunView) -> None:
    record = {**dpsgd.run.record, "config": {**dpsgd.run.record["config"], "sigma0": "/home/someone/runs/dpsgd"}}
    view = replace(dpsgd, run=replace(dpsgd.run, record=record))
    assert ["sigma0", "dpsgd"] in tables.run_provenance(view).rows
