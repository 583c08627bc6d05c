"""The table of rates: up to which learning rate each algorithm converges, by task and total batch size, with what a few seeds say about it.

    python -m paper_figs.table_rates [--data DIR] --out DIR

Writes DIR/table_rates.md (everything), and as .tex (booktabs) and .csv (numbers): table_rates (edges, differences, accuracies, and the paper's
tasks that were not run), table_rates_counts (converged seeds at every rate), table_rates_thresholds (edges, were convergence another level).
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landscape.statistics import estimate
from landscape.tasks.paper import PAPER
from paper_figs.shared import NAMES, main_of
from paper_figs.studies.edges import Difference, Edges, MedianInterval, difference, median_interval
from paper_figs.studies.stored import Stored

SHARES = (0.3, 0.5, 0.7, 0.9)
"""Other levels of convergence, as shares of the loss of constant output."""
NOT_RUN = "not run"
BASELINE = "ssgd"


@dataclass(frozen=True)
class Table:
    """A table to be read, and its numbers.

    Attributes:
        caption: what it holds.
        columns: headings.
        rows: cells as text.
        numbers: the same as values, by column of the .csv.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: list[dict[str, Any]]


def rates_table(studies: Sequence[Stored]) -> Table:
    """Edges, differences from SSGD and accuracies; then the paper's tasks at their own scale, which were not run."""
    rows: list[tuple[str, ...]] = []
    numbers: list[dict[str, Any]] = []
    for study in studies:
        for batch, total in enumerate(study.map["total_batch"].values):
            baseline, best = study.edges(batch, BASELINE), {}
            for name in (str(v) for v in study.map["variant"].values):
                edge = study.edges(batch, name)
                between = median_interval(edge.low, edge.high)
                over = None if name == BASELINE else difference(edge, baseline)
                best[name] = _best(study, batch, name)
                rate, accuracies = best[name]
                mean = estimate(accuracies)
                gain = None if name == BASELINE else estimate(accuracies - best[BASELINE][1])
                rows.append((
                    study.name, str(total), NAMES.get(name, name), bracket(*edge.median), interval(between), _below(edge),
                    "" if over is None else _ratio(over), f"{rate:.3g}", _percent(mean.value, mean.stderr),
                    "" if gain is None else _percent(gain.value, gain.stderr, sign=True),
                ))  # fmt: skip
                numbers.append({
                    "study": study.name, "task": study.task, "total_batch": int(total), "algorithm": name, "status": "run at a smaller scale",
                    "num_seeds": len(edge.low), "edge_low": edge.median[0], "edge_high": edge.median[1], "interval_low": between.low,
                    "interval_high": between.high, "interval_coverage": between.coverage, "num_failures_below_edge": int(edge.num_below.sum()),
                    **({} if over is None else {
                        "seeds_edge_above_ssgd": over.num_larger, "seeds_edge_same": over.num_equal, "seeds_edge_below_ssgd": over.num_smaller,
                        "sign_test_p": over.p_value, "ratio_low": over.median[0], "ratio_high": over.median[1],
                        "ratio_interval_low": over.interval.low, "ratio_interval_high": over.interval.high,
                        "ratio_interval_coverage": over.interval.coverage,
                    }),
                    "best_rate": rate, "test_accuracy": mean.value, "test_accuracy_stderr": mean.stderr,
                    **({} if gain is None else {"test_accuracy_over_ssgd": gain.value, "test_accuracy_over_ssgd_stderr": gain.stderr}),
                    "scale": study.scale,
                })  # fmt: skip
    for name in PAPER:
        standing = [study.name for study in studies if study.declared.get("stands_for") == name]
        note = f"{NOT_RUN} (scaled: {', '.join(standing)})" if standing else NOT_RUN
        rows.append((f"{name}, at the paper's scale", note, *[""] * 8))
        numbers.append(
            {"study": name, "task": name, "status": f"{NOT_RUN} at the paper's scale", "scale": ", ".join(standing)}
        )
    columns = ("study", "total batch", "algorithm", "edge (median)", "interval of the median", "failures below", "edge over SSGD's, by seed",
               "best rate", "test accuracy", "over SSGD")  # fmt: skip
    return Table(
        "Edge: between the largest learning rate that converged and the next that was tried; median over seeds. Interval: order statistics of the "
        "seeds' brackets, with the coverage that so many seeds allow. Failures below: runs that failed at rates under their own seed's edge. Edge "
        "over SSGD's: seeds above / same bracket / below, paired by initial weights and data order, p of the two-sided sign test, and the bracket "
        "of the median ratio with its interval. Best rate: of the lowest median final training loss. Test accuracy: there, mean ± standard error "
        "over seeds, on the same held-out examples for all; over SSGD: paired by seed, each at its own best rate.",
        columns, rows, numbers,
    )  # fmt: skip


def counts_table(studies: Sequence[Stored]) -> Table:
    """Converged seeds at every learning rate, with the other outcomes."""
    rows, numbers = [], []
    for study in studies:
        seeds = study.map.sizes["seed"]
        for batch, total in enumerate(study.map["total_batch"].values):
            for name in (str(v) for v in study.map["variant"].values):
                at = study.map.isel(total_batch=batch).sel(variant=name)
                converged = study.converged(batch, name).sum(1)
                cells = []
                for i, rate in enumerate(study.rates(batch)):
                    here = at.isel(rate=i)
                    ended = [str(o) for o in here["outcome"].values]
                    others = {kind: ended.count(kind) for kind in ("slow", "stuck", "non-finite")}
                    loss = float(np.median(here["final_loss"].values))
                    cells.append(f"{rate:.3g}: {converged[i]}/{seeds}")
                    mean = estimate(here["test_accuracy"].values)
                    numbers.append({
                        "study": study.name, "total_batch": int(total), "algorithm": name, "learning_rate": float(rate), "num_seeds": seeds,
                        "num_converged": int(converged[i]), **{f"num_{k.replace('-', '_')}": v for k, v in others.items()},
                        "median_final_loss": loss, "test_accuracy": mean.value, "test_accuracy_stderr": mean.stderr,
                    })  # fmt: skip
                rows.append((study.name, str(total), NAMES.get(name, name), "; ".join(cells)))
    return Table(
        "Converged seeds of those run, at every learning rate.",
        ("study", "total batch", "algorithm", "learning rate: converged"), rows, numbers,
    )  # fmt: skip


def thresholds_table(studies: Sequence[Stored], shares: Sequence[float] = SHARES) -> Table:
    """Median edges, were convergence a final training loss below another share of the loss of constant output."""
    rows, numbers = [], []
    for study in studies:
        for batch, total in enumerate(study.map["total_batch"].values):
            for name in (str(v) for v in study.map["variant"].values):
                found = [study.edges(batch, name, share) for share in shares]
                own = study.threshold / study.constant_loss
                rows.append(
                    (study.name, str(total), NAMES.get(name, name), f"{own:.2g}", *(bracket(*e.median) for e in found))
                )
                numbers += [
                    {"study": study.name, "total_batch": int(total), "algorithm": name, "share": share, "edge_low": e.median[0], "edge_high": e.median[1]}
                    for share, e in zip(shares, found, strict=True)
                ]  # fmt: skip
    columns = ("study", "total batch", "algorithm", "the study's level", *(f"below {share:g}" for share in shares))
    return Table(
        "Median edges at other levels of convergence, in shares of the loss of constant output.", columns, rows, numbers
    )


def tally(studies: Sequence[Stored], name: str = "dpsgd") -> str:
    """How an algorithm's edges lie to SSGD's over all studies and batch sizes, seed by seed, in a sentence.

    No test is made of it: the same seeds begin alike at every batch size, so the counts are not independent.
    """
    found = [
        difference(s.edges(b, name), s.edges(b, BASELINE)) for s in studies for b in range(s.map.sizes["total_batch"])
    ]
    larger, equal, smaller = (
        sum(getattr(d, part) for d in found) for part in ("num_larger", "num_equal", "num_smaller")
    )
    return f"{NAMES.get(name, name)} against SSGD over all studies, batch sizes and seeds: edge above {larger}, in the same bracket {equal}, below {smaller}."


def bracket(low: float, high: float) -> str:
    """A bracket as text.

    >>> bracket(0.1, 0.2), bracket(0.0, 0.1), bracket(0.4, float("inf"))
    ('0.1–0.2', 'below 0.1', 'above 0.4')
    """
    if low == 0:
        return "below " + f"{high:.3g}" if math.isfinite(high) else "unknown"
    return f"{low:.3g}–{high:.3g}" if math.isfinite(high) else f"above {low:.3g}"


def interval(found: MedianInterval) -> str:
    """An interval with its coverage."""
    if found.coverage == 0:
        return "one seed"
    high = f"{found.high:.3g}]" if math.isfinite(found.high) else "∞)"
    return f"[{found.low:.3g}, {high}, {100 * found.coverage:.0f}%"


def markdown(table: Table) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, ["---"] * len(table.columns), *table.rows)]
    return "\n".join([*lines, "", table.caption, ""])


def latex(table: Table) -> str:
    """The table in LaTeX, with booktabs."""
    body = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in table.rows]
    head = " & ".join(_escaped(cell) for cell in table.columns) + r" \\"
    form = "l" * len(table.columns)
    return "\n".join([
        f"% {table.caption}", rf"\begin{{tabular}}{{{form}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def comma_separated(table: Table) -> str:
    """The numbers as CSV."""
    columns = list(dict.fromkeys(key for row in table.numbers for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.numbers)
    return text.getvalue()


def write(studies: Sequence[Stored], out: Path) -> list[Path]:
    """Write all tables."""
    tables = {
        "table_rates": rates_table(studies), "table_rates_counts": counts_table(studies), "table_rates_thresholds": thresholds_table(studies),
    }  # fmt: skip
    scales = "\n".join(f"- {s.name}: {s.scale}; converged: median training loss of w_a in the last fifth of the run (three losses or more) below {s.threshold:.3g} nats" for s in studies)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "table_rates.md": "\n".join(
            [
                *(markdown(t) for t in tables.values()),
                tally(studies, "dpsgd"),
                tally(studies, "ssgd-star-matched"),
                "",
                "Scale:",
                "",
                scales,
                "",
            ]
        )
    }
    for name, table in tables.items():
        files |= {f"{name}.tex": latex(table), f"{name}.csv": comma_separated(table)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def _best(study: Stored, batch: int, name: str) -> tuple[float, np.ndarray]:
    """The rate of the lowest median final training loss, and the test accuracies of the seeds there."""
    at = study.map.isel(total_batch=batch).sel(variant=name).transpose("rate", "seed", ...)
    best = int(np.argmin(np.median(at["final_loss"].values, axis=1)))
    return float(study.rates(batch)[best]), at["test_accuracy"].values[best].astype(float)


def _ratio(over: Difference) -> str:
    counts = f"{over.num_larger}/{over.num_equal}/{over.num_smaller}, p = {over.p_value:.2g}"
    low, high = over.median
    if low == 0 and math.isinf(high):
        return counts
    text = f"{low:.2g}–{high:.2g}" if math.isfinite(high) else f"above {low:.2g}"
    return f"{counts}; ×{text} {interval(over.interval)}"


def _below(edge: Edges) -> str:
    return str(int(edge.num_below.sum()))


def _percent(value: float, stderr: float, *, sign: bool = False) -> str:
    text = f"{round(100 * value, 1) + 0.0:{'+' if sign else ''}.1f}"  # no -0.0
    return f"{text} ± {100 * stderr:.1f}%" if math.isfinite(stderr) else f"{text}%"


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "×": r"$\times$", "–": "--", "∞": r"$\infty$",
         "σ": r"$\sigma$", "₀": "$_0$", "α": r"$\alpha$"}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a user's mistake, which is printed."""
    return main_of("table_rates", __doc__, write, argv)


if __name__ == "__main__":
    sys.exit(main())
