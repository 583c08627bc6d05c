"""What a script of a figure says: its claim, the numbers that decide it, and the words under the figure that they choose.

A script is a module with

    CLAIM                           a sentence that numbers can contradict
    INPUTS                          names of files under the data folder
    read(folder) -> data            those files
    compute(work, scale, folder)    runs under `work` -> the files; returns the path of the one written
    headlines(data)                 the numbers, see `Headline`
    draw(data) -> Figure
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from landscape.statistics import Z95, Estimate, agreement
from paper_figs.scales import Scale

Bearing = Literal["supports", "contradicts", "undecided", "told"]
"""What a number does to the claim; "told" for one that is context."""
MARKS: dict[Bearing, str] = {"supports": "[+]", "contradicts": "[−]", "undecided": "[?]", "told": "[·]"}
SPREAD = 0.25
"""Share of a number by which it may differ when everything is run again elsewhere: other machines add in another order, and training at
the edge of stability amplifies that."""


@dataclass(frozen=True)
class Headline:
    """A number of a figure.

    Attributes:
        value: the number.
        stderr: its standard error over what `text` says, nan where it has none.
        tolerance: by how much a recomputation at the same scale may differ before it counts as another result.
        text: what it is, with its unit.
        bearing: on the claim.
    """

    value: float
    stderr: float
    tolerance: float
    text: str
    bearing: Bearing = "told"

    def __str__(self) -> str:
        error = f" ± {plain(self.stderr, 2)}" if math.isfinite(self.stderr) and self.stderr > 0 else ""
        return f"{self.text}: {plain(self.value, 3)}{error} {MARKS[self.bearing]}"


def plain(value: float | int, digits: int) -> str:
    """A number to so many digits, without an exponent where it has five places or fewer before the point.

    >>> plain(1363.4, 3), plain(129.7, 2), plain(-0.7251, 3), plain(0.0000123, 2)
    ('1,360', '130', '−0.725', '1.2e−05')
    """
    text = f"{value:.{digits}g}"
    if 10**digits <= abs(value) < 1e6:
        text = f"{float(text):,.0f}"
    return text.replace("-", "−")


class Script(Protocol):
    """A module that draws one figure."""

    CLAIM: str
    INPUTS: tuple[str, ...]

    def read(self, folder: Path) -> Any: ...
    def compute(self, work: Path, scale: Scale, folder: Path) -> Path: ...
    def headlines(self, data: Any) -> dict[str, Headline]: ...
    def draw(self, data: Any) -> Figure: ...


def headline(
    found: Estimate, text: str, bearing: Bearing = "told", *, tolerance: float | int | None = None
) -> Headline:
    """A measured number; by default it may differ by SPREAD of itself and four standard errors.

    >>> str(headline(Estimate(0.5, 0.01), "share", "supports"))
    'share: 0.5 ± 0.01 [+]'
    """
    error = found.stderr if math.isfinite(found.stderr) else 0.0
    allowed = 4 * error + SPREAD * abs(found.value) if tolerance is None else float(tolerance)
    return Headline(float(found.value), float(found.stderr), allowed, text, bearing)


def count(hits: int, of: int, text: str, bearing: Bearing = "told") -> Headline:
    """So many of so many, which may differ by a quarter of them, one at least."""
    return Headline(float(hits), math.nan, float(max(1, math.ceil(of / 4))), f"{text}, of {of}", bearing)


def above(found: Estimate, limit: float | int) -> Bearing:
    """Whether a number is above a limit beyond its 95% interval.

    >>> above(Estimate(1.0, 0.1), 0.5), above(Estimate(1.0, 0.1), 0.9), above(Estimate(1.0, 0.1), 2)
    ('supports', 'undecided', 'contradicts')
    """
    return _sided(found.value - limit, found.stderr)


def below(found: Estimate, limit: float | int) -> Bearing:
    """Whether a number is below a limit beyond its 95% interval."""
    return _sided(limit - found.value, found.stderr)


def near(found: Estimate, predicted: Estimate) -> Bearing:
    """Whether a number agrees with a prediction within 20%, see `landscape.statistics.agreement`."""
    verdict = agreement(found, predicted)
    return "supports" if verdict == "agrees" else "contradicts" if verdict == "disagrees" else "undecided"


def whether(holds: bool) -> Bearing:
    """Of something that has no error: a count, or an identity."""
    return "supports" if holds else "contradicts"


def _sided(excess: float, stderr: float) -> Bearing:
    half = Z95 * stderr
    if not (math.isfinite(excess) and math.isfinite(half)):
        return "undecided"
    return "supports" if excess > half else "contradicts" if excess < -half else "undecided"


def at(group: xr.Dataset, name: str, index: int) -> Estimate:
    """NAME_mean and NAME_stderr of a measure at one of its checkpoints, by place."""
    part = group.isel(step=index)
    return Estimate(float(part[f"{name}_mean"]), float(part[f"{name}_stderr"]))


def mean_of(values: np.ndarray, errors: np.ndarray) -> Estimate:
    """Mean of independent estimates, with the error that theirs give it."""
    values, errors = np.asarray(values, dtype=float), np.asarray(errors, dtype=float)
    return Estimate(float(values.mean()), float(np.sqrt((errors**2).sum())) / len(values), len(values))


def finding(numbers: Mapping[str, Headline]) -> str:
    """What the numbers do to the claim.

    >>> one = Headline(1, math.nan, 0, "", "supports")
    >>> finding({"a": one}), finding({"a": one, "b": Headline(1, math.nan, 0, "", "contradicts")}), finding({})
    ('supported', 'supported in part, contradicted in part', 'undecided')
    """
    bearings = [n.bearing for n in numbers.values() if n.bearing != "told"]
    pro, contra, open_ = (bearings.count(b) for b in ("supports", "contradicts", "undecided"))
    if pro and contra:
        return "supported in part, contradicted in part"
    if contra:
        return "contradicted"
    if pro:
        return "supported" if not open_ else "supported in part, the rest undecided"
    return "undecided"


def caption(claim: str, numbers: Mapping[str, Headline], scale: str) -> list[str]:
    """Lines under a figure: the claim, what became of it, the numbers with their bearing, the scale."""
    return [
        f"Claim: {claim}",
        f"By these numbers: {finding(numbers)}. " + "; ".join(str(n) for n in numbers.values()) + ".",
        f"Scale: {scale}. Numbers ± one standard error, bars and bands 95% intervals; [+] supports, [−] contradicts the claim, [?] leaves it open, [·] context.",
    ]
