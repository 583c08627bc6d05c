"""Colours that can be told apart: on white, in grey, by readers with colour-blindness, and in the report's dark mode."""

from __future__ import annotations

import re
from importlib import resources
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from landscape.plotting import alignment, noise, scorecard, smoothing
from landscape.plotting.style import (
    LOOKS,
    MEASURED,
    PREDICTION_LOOKS,
    SPARE,
    STAR_COLOURS,
    WIDTHS,
    Look,
    new_figure,
    save,
)

TEXT_CONTRAST, GRAPHICS_CONTRAST = 4.5, 3.0
"""WCAG 2.2, success criteria 1.4.3 and 1.4.11."""
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What is seen, on linear RGB: Machado, Oliveira & Fernandes (2009), IEEE TVCG 15, 1291, severity 1."""
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    """Linear RGB of #rgb or #rrggbb."""
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    values = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    low, high = sorted(float(TO_XYZ[1] @ linear(c)) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB, white point D65."""
    ratios = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(1)
    f = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_contrast_is_wcags() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#fff") == pytest.approx(4.54, abs=0.005)  # WebAIM's example of a grey that just passes


@pytest.mark.parametrize("name", LOOKS)
def test_lines_stand_out_from_white(name: str) -> None:
    assert contrast(LOOKS[name].colour, "#ffffff") >= GRAPHICS_CONTRAST


def test_all_other_lines_stand_out_from_white_too() -> None:
    tables = (PREDICTION_LOOKS, scorecard.VERDICT_LOOKS)
    named = [look for table in tables for look in table.values()] + [MEASURED, *SPARE]
    named += [look for table in (noise.PARTS, alignment.NOISES, alignment.STEP_NOISES, smoothing.BOUNDS) for _, look in table.values()]  # fmt: skip
    for colour in {look.colour for look in named} | set(STAR_COLOURS):
        assert contrast(colour, "#ffffff") >= GRAPHICS_CONTRAST, colour


def test_algorithms_differ_in_grey_and_by_line_and_marker() -> None:
    """Lightness differs by more than the 2.3 that is just noticeable; what print loses, lines and markers keep."""
    for one, other in combinations(LOOKS.values(), 2):
        assert abs(lab(linear(one.colour))[0] - lab(linear(other.colour))[0]) > 3
        assert one.line != other.line
        assert one.marker != other.marker


@pytest.mark.parametrize("kind", BLINDNESS)
def test_algorithms_differ_without_a_kind_of_cone(kind: str) -> None:
    """A distance of 5 in L*a*b*, twice what is just noticeable, between any two: enough beside line and marker, not without."""
    seen = {name: lab(np.array(BLINDNESS[kind]) @ linear(look.colour)) for name, look in LOOKS.items()}
    apart = {(a, b): float(np.linalg.norm(seen[a] - seen[b])) for a, b in combinations(seen, 2)}
    assert min(apart.values()) > 5, apart


@pytest.mark.parametrize(
    "looks", [PREDICTION_LOOKS, scorecard.VERDICT_LOOKS, {k: v for k, (_, v) in noise.PARTS.items()},
              {k: v for k, (_, v) in alignment.STEP_NOISES.items()}, {k: v for k, (_, v) in smoothing.BOUNDS.items()}],
    ids=["predictions", "verdicts", "noise", "spectra", "bounds"],
)  # fmt: skip
def test_series_of_one_figure_differ_in_marker(looks: dict[str, Look]) -> None:
    different = {name: look for name, look in looks.items() if name != "learners"}  # the same kernel as "exact"
    assert len({look.marker for look in different.values()}) == len(different)


def palettes() -> dict[str, dict[str, str]]:
    """The report's colours by mode: light, dark, print."""
    source = resources.files("landscape.plotting").joinpath("report.html").read_text(encoding="utf-8")
    blocks = [
        dict(re.findall(r"--([\w-]+):\s*(#[0-9a-fA-F]{3,6})", b)) for b in re.findall(r":root \{([^}]*)\}", source)
    ]
    return dict(zip(("light", "dark", "print"), blocks, strict=True))


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_text_of_the_report_can_be_read(mode: str) -> None:
    colours = palettes()[mode]
    pairs = [(ink, paper) for ink in ("text", "soft", "link") for paper in ("page", "panel")]
    pairs += [(word, f"{word}-bg") for word in ("good", "bad", "open", "none")]
    for ink, paper in pairs:
        assert contrast(colours[ink], colours[paper]) >= TEXT_CONTRAST, (ink, paper)


def test_every_mode_sets_every_colour() -> None:
    light, dark, printed = (set(p) for p in palettes().values())
    assert light == dark == printed


def test_a_pdf_embeds_truetype_fonts_and_an_svg_needs_none(tmp_path: Path) -> None:
    figure = new_figure("one-column")
    figure.subplots().set_xlabel("step")
    pdf, svg = save(figure, tmp_path / "figure", ("pdf", "svg"))
    assert b"/FontFile2" in pdf.read_bytes()  # a TrueType font, embedded
    assert b"/Type3" not in pdf.read_bytes()
    assert b"<text" not in svg.read_bytes()
    assert b"font-family" not in svg.read_bytes()
    assert f'width="{72 * WIDTHS["one-column"]:g}pt"'.encode() in svg.read_bytes()
