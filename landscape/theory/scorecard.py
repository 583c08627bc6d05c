"""Predictions held against measurements, with a verdict each (theory.md sec. 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from landscape.display import grid, text
from landscape.statistics import Estimate, Verdict, agreement, bound_verdict, ratio

TOLERANCE = 0.2
COLUMNS = [
    "step",
    "quantity",
    "prediction",
    "measured",
    "measured_stderr",
    "predicted",
    "predicted_stderr",
    "ratio",
    "ratio_stderr",
    "z",
    "verdict",
]
RATE = "E alpha_e / alpha"
EXPONENT_RANGE = (1.0, 2.0)
"""Exponents of the law of noise against curvature that arXiv 2602.05600 finds."""


MARKS = {"agrees": "✓", "holds": "✓", "disagrees": "✗", "violated": "✗", "inconclusive": "?", "not applicable": "–"}
"""Before each verdict in Jupyter, so that none is told by colour."""


class Scorecard(pd.DataFrame):
    """A table with COLUMNS that shows numbers and their errors together, in a terminal and in Jupyter; otherwise a DataFrame."""

    @property
    def _constructor(self) -> type[Scorecard]:
        return Scorecard  # rows of a scorecard are one; what lacks its columns shows itself as any table

    def __repr__(self) -> str:
        if not self._is_whole:
            return super().__repr__()
        rows = [self._heads(), *self._cells("")]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _repr_html_(self) -> str | None:
        if not self._is_whole:
            return pd.DataFrame(self)._repr_html_()  # type: ignore[operator]
        return grid("Scorecard", self._heads(), self._cells("mark"), notes=[
            "± standard errors; a ratio is measured over predicted, of a bound the bound over measured; z in standard errors of both"
        ])  # fmt: skip

    @property
    def _is_whole(self) -> bool:
        return list(self.columns) == COLUMNS

    @staticmethod
    def _heads() -> list[str]:
        return ["step", "quantity", "prediction", "measured", "predicted", "ratio", "z", "verdict"]

    def _cells(self, marked: str) -> list[list[str]]:
        return [
            [
                text(row["step"]), str(row["quantity"]), str(row["prediction"]),
                *(_said(row[name], row[f"{name}_stderr"]) for name in ("measured", "predicted", "ratio")),
                f"{row['z']:+.1f}".replace("-", "−") if math.isfinite(row["z"]) else "",
                f"{MARKS.get(row['verdict'], '')} {row['verdict']}".strip() if marked else str(row["verdict"]),
            ]
            for row in self.to_dict("records")
        ]  # fmt: skip


def _said(value: float, stderr: float) -> str:
    return text(Estimate(float(value), float(stderr) if math.isfinite(stderr) else 0.0))


def scorecard(groups: Mapping[str, xr.Dataset], tolerance: float = TOLERANCE) -> Scorecard:
    """Every prediction that the measurements allow to be checked, one row each.

    Args:
        groups: of `landscape.experiments.measure.measure`.
        tolerance: of "agrees"; see `landscape.statistics.agreement`.

    Returns:
        a DataFrame with COLUMNS; ratio is measured over predicted, or bound over measured (its tightness) for bounds; z is measured less
        predicted over the error of both (nan where neither has one, and for bounds). `scorecard_dataset` gives the same labelled. Rates of a
        checkpoint where all learners are equal, as at step 0, are "not applicable" in a run whose learners spread: every prediction is 1 there.
    """
    rows: list[dict[str, Any]] = []
    for name, add in (
        ("effective-learning-rate", _rates),
        ("noise", _noise),
        ("smoothing", _bounds),
        ("stability", _stability),
        ("ledger", _ledger),
        ("alignment", _exponents),
    ):
        if name in groups:
            for step in groups[name]["step"].values:
                add(rows, groups[name].sel(step=step), int(step), tolerance)
    found = Scorecard(rows, columns=COLUMNS).sort_values(["step"], kind="stable", ignore_index=True)
    trivial = _is_trivial(found)
    kept = {name: found[name].mask(trivial) for name in ("ratio", "ratio_stderr", "z")}
    return found.assign(**kept, verdict=found["verdict"].mask(trivial, "not applicable"))


def _is_trivial(table: pd.DataFrame) -> pd.Series:
    """Which rates were predicted where all learners are equal, in a run where they are not so elsewhere.

    A sampled kernel that predicts 1 without an error has no width.
    """
    rates = table["quantity"] == RATE
    sampled = rates & table["prediction"].isin(["isotropic", "covariance"])
    equal = set(table["step"][sampled & (table["predicted"] == 1) & (table["predicted_stderr"] == 0)])
    spread = set(table["step"][sampled]) - equal
    return rates & table["step"].isin(equal if spread else set())


def scorecard_dataset(groups: Mapping[str, xr.Dataset], tolerance: float = TOLERANCE) -> xr.Dataset:
    """The scorecard over (comparison, step), a comparison being "quantity: prediction"; nan and "" where a step has none."""
    table = scorecard(groups, tolerance)
    table = table.assign(comparison=table["quantity"] + ": " + table["prediction"]).set_index(["comparison", "step"])
    labelled = table.drop(columns=["quantity", "prediction"]).to_xarray()
    return labelled.assign(verdict=labelled["verdict"].fillna("").astype(str)).assign_attrs(tolerance=tolerance)


def run_scorecard(table: pd.DataFrame) -> pd.DataFrame:
    """The scorecard of a run: for each prediction how often it got each verdict over the checkpoints, and what that comes to.

    The verdict of the run is that of its decisive checkpoints where they are of one mind, "mixed" where not, and "inconclusive" where there is none.

    Returns:
        a table by (quantity, prediction): a count for each verdict that occurs, median_ratio, num_checkpoints, verdict.
    """
    rows = table.replace([np.inf, -np.inf], np.nan).groupby(["quantity", "prediction"], sort=False)
    counts = table.groupby(["quantity", "prediction", "verdict"], sort=False).size().unstack(fill_value=0)
    return counts.assign(
        median_ratio=rows["ratio"].median(), num_checkpoints=rows.size(), verdict=rows["verdict"].agg(_of_one_mind)
    )


def _of_one_mind(verdicts: pd.Series) -> str:
    decisive = set(verdicts) - {"inconclusive", "not applicable"}
    return decisive.pop() if len(decisive) == 1 else "mixed" if decisive else "inconclusive"


def _row(
    step: int,
    quantity: str,
    prediction: str,
    measured: Estimate,
    predicted: Estimate,
    compared: Estimate,
    verdict: Verdict,
    *,
    paired_stderr: float | None = None,
) -> dict[str, Any]:
    error = math.hypot(measured.stderr, predicted.stderr) if paired_stderr is None else paired_stderr
    compares = verdict in ("agrees", "disagrees", "inconclusive") and error > 0 and math.isfinite(predicted.value)
    z = (measured.value - predicted.value) / error if compares else math.nan
    return dict(zip(COLUMNS, (step, quantity, prediction, measured.value, measured.stderr, predicted.value, predicted.stderr,
                              compared.value, compared.stderr, z, verdict), strict=True))  # fmt: skip


def _agreement_row(
    step: int, quantity: str, prediction: str, measured: Estimate, predicted: Estimate, tolerance: float
) -> dict[str, Any]:
    compared = _signed_ratio(measured, predicted)
    return _row(step, quantity, prediction, measured, predicted, compared, agreement(measured, predicted, tolerance))


def _signed_ratio(measured: Estimate, predicted: Estimate) -> Estimate:
    if math.isinf(predicted.value):
        return Estimate(0.0, 0.0, measured.count)
    if predicted.value < 0:  # errors do not change under a common sign
        return ratio(Estimate(-measured.value, measured.stderr), Estimate(-predicted.value, predicted.stderr))
    return ratio(measured, predicted)


def _number(at: xr.Dataset, name: str, error: str | None = None) -> Estimate:
    return Estimate(float(at[name]), float(at[error]) if error else 0.0)


def _rates(rows: list[dict[str, Any]], at: xr.Dataset, step: int, tolerance: float) -> None:
    measured = _number(at, "alpha_e_ratio_mean", "alpha_e_ratio_stderr")
    for name in at["prediction"].values:
        part = at.sel(prediction=name)
        predicted = _number(part, "alpha_e_ratio_predicted", "alpha_e_ratio_predicted_stderr")
        if math.isfinite(predicted.value):
            rows.append(_agreement_row(step, RATE, str(name), measured, predicted, tolerance))


def _noise(rows: list[dict[str, Any]], at: xr.Dataset, step: int, tolerance: float) -> None:
    measured = _number(at, "Delta_S_mean", "Delta_S_stderr")
    rows.append(
        _agreement_row(step, "Delta_S", "alpha^2 Tr(C)/(n B)", measured, _number(at, "Delta_S_predicted"), tolerance)
    )
    spread, predicted = _number(at, "consensus_trace"), _number(at, "consensus_trace_predicted")
    if spread.value > 0 and not math.isnan(predicted.value):
        rows.append(_agreement_row(step, "Tr Sigma_w", "minibatch noise alone", spread, predicted, tolerance))


def _bounds(rows: list[dict[str, Any]], at: xr.Dataset, step: int, tolerance: float) -> None:
    here = at.sel(kernel="isotropic")
    if not math.isfinite(float(here["smoothness"])):
        return
    measured = _number(here, "smoothness", "lambda_max_stderr")
    for kind in at["bound_kind"].values:
        bound = float(at["bound"].sel(bound_kind=kind))
        if math.isfinite(bound):
            tightness = Estimate(bound / measured.value if measured.value > 0 else math.inf)
            rows.append(
                _row(
                    step,
                    "smoothness of L~",
                    f"bound: {kind}",
                    measured,
                    Estimate(bound),
                    tightness,
                    bound_verdict(measured, bound),
                )
            )


def _stability(rows: list[dict[str, Any]], at: xr.Dataset, step: int, tolerance: float) -> None:
    if "coupled_disagreement" in at and math.isfinite(float(at["coupled_disagreement"])):
        growth = _number(at, "coupled_disagreement")
        verdict: Verdict = (
            bound_verdict(growth, 1.0) if bool(at["coupled_converged"]) or growth.value > 1 else "inconclusive"
        )
        rows.append(
            _row(
                step,
                "growth of disagreement",
                "stable: below 1",
                growth,
                Estimate(1.0),
                Estimate(1 / growth.value),
                verdict,
            )
        )


def _ledger(rows: list[dict[str, Any]], at: xr.Dataset, step: int, tolerance: float) -> None:
    measured = _number(at, "realised_mean", "realised_stderr")
    predicted = Estimate(float(at["predicted_mean"]), 0.0)
    # the draws are paired: the error of the difference is the remainder's own
    paired = Estimate(measured.value, float(at["remainder_stderr"]))
    rows.append(_row(step, "one-step change of L", "ledger", measured, _number(at, "predicted_mean", "predicted_stderr"),
                     _signed_ratio(paired, predicted), agreement(paired, predicted, tolerance), paired_stderr=paired.stderr))  # fmt: skip


def _exponents(rows: list[dict[str, Any]], at: xr.Dataset, step: int, tolerance: float) -> None:
    """Of minibatch noise, which the prediction is of; its interval within the range, outside it, or neither."""
    low, high = EXPONENT_RANGE
    part = at.sel(noise="gradient")
    measured = _number(part, "exponent", "exponent_stderr")
    if not math.isfinite(measured.value):
        return
    ends = float(part["exponent_low"]), float(part["exponent_high"])
    verdict: Verdict = "inconclusive"
    if str(part["exponent_verdict"].values) == "measured":
        inside, outside = low <= ends[0] and ends[1] <= high, ends[1] < low or ends[0] > high
        verdict = "agrees" if inside else "disagrees" if outside else "inconclusive"
    nearest = Estimate(min(max(measured.value, low), high))
    rows.append(_row(step, "exponent of minibatch noise on curvature", f"{low:g} to {high:g}", measured, nearest,
                     ratio(measured, nearest), verdict))  # fmt: skip
