from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from landscape.theory.edges import convergence, edge_bracket, edge_interval, stability_edge


def result(hits: dict[float, list[bool | None]]) -> xr.Dataset:
    """A map of one variant: whether each seed converged at each rate, None where it was not run."""
    losses = [[math.nan if h is None else 0.1 if h else 2.0 for h in row] for row in hits.values()]
    spread = np.arange(len(hits), dtype=float)[None, :, None, None] * np.ones((1, 1, len(losses[0]), 3))
    return xr.Dataset(
        {
            "median_last_loss": (("variant", "learning_rate", "seed"), np.asarray(losses)[None]),
            "outcome": (("variant", "learning_rate", "seed"), np.full((1, *np.shape(losses)), "slow")),
            "sigma_w": (("variant", "learning_rate", "seed", "step"), spread),
        },
        coords={"variant": ["dpsgd"], "learning_rate": list(hits), "seed": np.arange(len(losses[0]))},
        attrs={"threshold": 0.7},
    )


def row(converged: int, of: int) -> list[bool | None]:
    return [True] * converged + [False] * (of - converged)


def test_a_sharp_edge_lies_in_its_bracket_and_its_interval() -> None:
    table = convergence(result({0.1: row(8, 8), 0.2: row(8, 8), 0.4: row(0, 8), 0.8: row(0, 8)}))
    assert edge_bracket(table, "dpsgd") == (0.2, 0.4)
    assert edge_interval(table, "dpsgd") == (0.2, 0.4)
    assert stability_edge(table, "dpsgd")[0] == pytest.approx(math.sqrt(0.08))


def test_the_interval_is_where_no_rate_is_told_from_one_half() -> None:
    """5 of 8 and 3 of 8 are not; 8 of 8 and 0 of 8 are."""
    table = convergence(result({0.1: row(8, 8), 0.2: row(5, 8), 0.3: row(3, 8), 0.4: row(0, 8)}))
    assert edge_bracket(table, "dpsgd") == (0.2, 0.3)
    assert edge_interval(table, "dpsgd") == (0.1, 0.4)


def test_few_seeds_leave_it_open() -> None:
    for seeds, expected in ((3, (0.0, math.inf)), (4, (0.1, 0.2))):
        table = convergence(result({0.1: row(seeds, seeds), 0.2: row(0, seeds)}))
        assert edge_bracket(table, "dpsgd") == (0.1, 0.2)
        assert edge_interval(table, "dpsgd") == expected


def test_an_edge_outside_the_rates_tried() -> None:
    above = convergence(result({0.1: row(8, 8), 0.2: row(8, 8)}))
    assert edge_bracket(above, "dpsgd") == (0.2, math.inf)
    assert edge_interval(above, "dpsgd") == (0.2, math.inf)
    below = convergence(result({0.1: row(0, 8), 0.2: row(0, 8)}))
    assert edge_bracket(below, "dpsgd") == (0.0, 0.1)
    assert edge_interval(below, "dpsgd") == (0.0, 0.1)


def test_convergence_that_comes_back_keeps_the_interval_wide() -> None:
    table = convergence(result({0.1: row(8, 8), 0.2: row(0, 8), 0.3: row(8, 8), 0.4: row(0, 8)}))
    assert edge_bracket(table, "dpsgd") == (0.3, 0.4)
    assert edge_interval(table, "dpsgd") == (0.1, 0.4)


def test_rates_that_were_not_run_do_not_count_and_order_does_not_matter() -> None:
    table = convergence(result({0.4: row(0, 8), 0.1: row(8, 8), 0.2: [None] * 8}))
    assert edge_bracket(table, "dpsgd") == (0.1, 0.4)
    assert edge_interval(table, "dpsgd") == (0.1, 0.4)


def test_a_bound_on_the_spread_counts_too() -> None:
    """The spread of the k-th rate is k here."""
    found = result({0.1: row(4, 4), 0.2: row(4, 4), 0.4: row(4, 4)})
    assert convergence(found)["num_converged"].values.tolist() == [[4, 4, 4]]
    bounded = convergence(found, max_sigma_w=1.0)
    assert bounded["num_converged"].values.tolist() == [[4, 4, 0]]
    assert bounded.attrs["max_sigma_w"] == 1.0


def test_the_interval_covers_the_edge_as_often_as_it_says() -> None:
    """Seeds with edges of their own, log-normal about 1, each run at the same rates: the median is covered in 95% or more of trials."""
    rates, rng, trials = np.geomspace(0.25, 4, 33), np.random.default_rng(0), 400
    covered, widths = 0, []
    for _ in range(trials):
        edges = np.exp(0.4 * rng.standard_normal(12))
        table = convergence(result({float(r): [bool(e > r) for e in edges] for r in rates}))
        low, high = edge_interval(table, "dpsgd")
        covered += low <= 1 <= high
        widths.append(math.log(high / low))
    assert covered / trials > 0.95 - 2 * math.sqrt(0.95 * 0.05 / trials)
    assert np.median(widths) < 1.0  # and is no idle one: the seeds alone spread over 1.6
