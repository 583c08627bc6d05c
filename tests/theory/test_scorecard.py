import math

import numpy as np
import pytest
import xarray as xr

from landscape.statistics import wilson_interval
from landscape.theory.conclusions import choose_rate, conclusions
from landscape.theory.edges import convergence, stability_edge
from landscape.theory.scorecard import run_scorecard, scorecard, scorecard_dataset


def rates(measured: float, stderr: float, **predicted: tuple[float, float]) -> xr.Dataset:
    return xr.Dataset(
        {
            "alpha_e_ratio_mean": ("step", [measured]),
            "alpha_e_ratio_stderr": ("step", [stderr]),
            "alpha_e_ratio_predicted": (("step", "prediction"), [[v for v, _ in predicted.values()]]),
            "alpha_e_ratio_predicted_stderr": (("step", "prediction"), [[e for _, e in predicted.values()]]),
        },
        coords={"step": [10], "prediction": list(predicted)},
    )


def test_rows_verdicts_and_ratios() -> None:
    table = scorecard(
        {
            "effective-learning-rate": rates(
                -0.87, 0.01, exact=(-0.88, 0.0), isotropic=(0.99, 0.01), covariance=(-0.9, 0.6), absent=(math.nan, 0.0)
            )
        }
    )
    by_name = table.set_index("prediction")
    assert by_name["verdict"].to_dict() == {"exact": "agrees", "isotropic": "disagrees", "covariance": "inconclusive"}
    assert by_name.loc["exact", "ratio"] == pytest.approx(0.87 / 0.88)
    assert by_name.loc["isotropic", "ratio"] == pytest.approx(-0.87 / 0.99)


def test_an_infinite_prediction_is_shown_and_disagrees() -> None:
    noise = xr.Dataset(
        {
            "Delta_S_mean": ("step", [1.0]), "Delta_S_stderr": ("step", [0.01]), "Delta_S_predicted": ("step", [1.02]),
            "consensus_trace": ("step", [3.0]), "consensus_trace_predicted": ("step", [math.inf]),
        },
        coords={"step": [50]},
    )  # fmt: skip
    table = scorecard({"noise": noise}).set_index("quantity")
    assert table.loc["Tr Sigma_w", "verdict"] == "disagrees"
    assert table.loc["Tr Sigma_w", "predicted"] == math.inf
    assert table.loc["Tr Sigma_w", "ratio"] == 0
    assert table.loc["Delta_S", "verdict"] == "agrees"


def test_vacuous_bounds_keep_their_ratio() -> None:
    smoothing = xr.Dataset(
        {
            "smoothness": (("step", "kernel"), [[2.0]]), "lambda_max_stderr": (("step", "kernel"), [[0.1]]),
            "bound": (("step", "bound_kind"), [[6000.0, 1.0]]),
        },
        coords={"step": [50], "kernel": ["isotropic"], "bound_kind": ["paper", "smooth"]},
    )  # fmt: skip
    table = scorecard({"smoothing": smoothing}).set_index("prediction")
    assert table.loc["bound: paper", "ratio"] == 3000
    assert table.loc["bound: paper", "verdict"] == "holds"
    assert table.loc["bound: smooth", "verdict"] == "violated"


def test_counts_and_labelled_form() -> None:
    groups = {"effective-learning-rate": rates(1.0, 0.01, exact=(1.0, 0.0), isotropic=(2.0, 0.0))}
    table = scorecard(groups)
    counts = run_scorecard(table)
    assert counts.loc[("E alpha_e / alpha", "exact"), "agrees"] == 1
    assert counts.loc[("E alpha_e / alpha", "isotropic"), "disagrees"] == 1
    assert counts["verdict"].tolist() == ["agrees", "disagrees"]
    labelled = scorecard_dataset(groups)
    assert float(labelled["ratio"].sel(comparison="E alpha_e / alpha: isotropic", step=10)) == 0.5
    assert str(labelled["verdict"].sel(comparison="E alpha_e / alpha: exact", step=10).values) == "agrees"
    assert float(labelled["z"].sel(comparison="E alpha_e / alpha: isotropic", step=10)) == pytest.approx(-100)


def test_the_ledger_is_judged_by_the_error_of_paired_draws() -> None:
    numbers = {
        "realised_mean": -0.10,
        "realised_stderr": 0.02,
        "predicted_mean": -0.09,
        "predicted_stderr": 0.02,
        "remainder_stderr": 0.001,
    }
    ledger = xr.Dataset({name: ("step", [value]) for name, value in numbers.items()}, coords={"step": [10]})
    row = scorecard({"ledger": ledger}).iloc[0]
    assert row["z"] == pytest.approx(-10)
    assert row["verdict"] == "agrees"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.1, 1.6, "agrees"), (0.5, 0.9, "disagrees"), (0.8, 1.2, "inconclusive")]
)
def test_an_exponent_is_held_against_the_published_range(low: float, high: float, verdict: str) -> None:
    middle = (low + high) / 2
    values = {"exponent": middle, "exponent_stderr": 0.1, "exponent_low": low, "exponent_high": high}
    at = xr.Dataset(
        {n: (("step", "noise"), [[v]]) for n, v in values.items()}, coords={"step": [10], "noise": ["gradient"]}
    )
    at["exponent_verdict"] = (("step", "noise"), [["measured"]])
    row = scorecard({"alignment": at}).iloc[0]
    assert row["verdict"] == verdict
    assert row["z"] == pytest.approx(min(0.0, middle - 1) / 0.1)
    at["exponent_verdict"] = (("step", "noise"), [["inconclusive"]])
    assert scorecard({"alignment": at}).iloc[0]["verdict"] == "inconclusive"


def test_a_run_is_of_one_mind_mixed_or_undecided() -> None:
    first = rates(1.0, 0.01, exact=(1.0, 0.0))
    both = xr.concat([first, first.assign_coords(step=[20])], "step")
    other = xr.concat([first, rates(1.0, 0.01, exact=(2.0, 0.0)).assign_coords(step=[20])], "step")
    wide = xr.concat([first, rates(1.0, 3.0, exact=(2.0, 0.0)).assign_coords(step=[20])], "step")
    unknown = rates(1.0, 3.0, exact=(2.0, 0.0))
    found = [
        run_scorecard(scorecard({"effective-learning-rate": g}))["verdict"].item() for g in (both, other, wide, unknown)
    ]
    assert found == ["agrees", "mixed", "agrees", "inconclusive"]


EQUAL = {"exact": (1.0, 0.0), "isotropic": (1.0, 0.0), "covariance": (1.0, 0.0), "second-order": (1.0, 0.0)}
SPREAD = {"exact": (0.8, 0.0), "isotropic": (1.2, 0.01), "covariance": (0.9, 0.01), "second-order": (0.7, 0.0)}


def test_equal_learners_are_no_evidence_where_learners_spread() -> None:
    """At step 0 every kernel predicts 1: that counts for none of them, but it does where learners are never apart."""
    first = rates(1.0, 0.01, **EQUAL).assign_coords(step=[0])
    card = scorecard({"effective-learning-rate": xr.concat([first, rates(0.8, 0.01, **SPREAD)], "step")})
    assert set(card[card["step"] == 0]["verdict"]) == {"not applicable"}
    assert card[card["step"] == 0][["ratio", "ratio_stderr", "z"]].isna().all(axis=None)
    of_the_run = run_scorecard(card).loc["E alpha_e / alpha"]
    assert of_the_run["verdict"].to_dict() == {
        "exact": "agrees", "isotropic": "disagrees", "covariance": "agrees", "second-order": "agrees"
    }  # fmt: skip
    assert of_the_run.loc["exact", "median_ratio"] == pytest.approx(1.0)
    assert of_the_run.loc["isotropic", "median_ratio"] == pytest.approx(0.8 / 1.2)
    still = xr.concat([first, first.assign_coords(step=[20])], "step")
    assert set(scorecard({"effective-learning-rate": still})["verdict"]) == {"agrees"}


def mapped(ssgd: list[list[float]], dpsgd: list[list[float]], rates: list[float]) -> xr.Dataset:
    losses = np.array([ssgd, dpsgd])
    return xr.Dataset(
        {
            "median_last_loss": (("variant", "learning_rate", "seed"), losses),
            "outcome": (("variant", "learning_rate", "seed"), np.where(losses < 0.7, "converged", "slow")),
        },
        coords={"variant": ["ssgd", "dpsgd"], "learning_rate": rates, "seed": list(range(losses.shape[2]))},
        attrs={"threshold": 0.7},
    )


GOOD, BAD = 0.1, 2.0
SEPARATING = mapped([[GOOD] * 6, [BAD] * 6, [BAD] * 6], [[GOOD] * 6, [GOOD] * 6, [BAD] * 6], [0.5, 1.0, 2.0])


def test_convergence_and_edge() -> None:
    table = convergence(SEPARATING)
    assert table["num_converged"].sel(variant="dpsgd").values.tolist() == [6, 6, 0]
    assert (
        float(table["low"].sel(variant="ssgd", learning_rate=0.5)),
        float(table["high"].sel(variant="ssgd", learning_rate=0.5)),
    ) == wilson_interval(6, 6)
    edges = {v: stability_edge(table, v)[0] for v in ("ssgd", "dpsgd")}
    assert edges["ssgd"] == pytest.approx(math.sqrt(0.5 * 1.0))  # half way in the logarithm
    assert edges["dpsgd"] == pytest.approx(math.sqrt(1.0 * 2.0))
    assert stability_edge(convergence(SEPARATING.isel(learning_rate=[0])), "ssgd")[0] == math.inf
    assert stability_edge(convergence(SEPARATING.isel(learning_rate=[2])), "ssgd")[0] == -math.inf


def test_the_rate_is_chosen_on_some_seeds_and_claimed_on_others() -> None:
    chosen = choose_rate(SEPARATING, 2)
    assert (chosen.learning_rate, chosen.choice_seeds, chosen.claim_seeds) == (1.0, (0, 1), (2, 3, 4, 5))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (SEPARATING, "so the paper's finding is reproduced"),
        (mapped([[GOOD] * 6], [[BAD] * 6], [1.0]), "against the paper's finding"),
        (mapped([[GOOD] * 3 + [BAD] * 3], [[GOOD] * 4 + [BAD] * 2], [1.0]), "inconclusive"),
    ],
)
def test_the_numbers_choose_the_words(result: xr.Dataset, words: str) -> None:
    assert words in conclusions(result, choose_rate(result, 2), {}, {})[0]


@pytest.mark.parametrize(
    ("means", "words"),
    [
        ([-0.8, 0.5, 0.99], "back within 20%"),
        ([-0.8, 0.5, 0.6], "has not come back"),
        ([1.0, 1.1, 1.0], "not lowered at any checkpoint"),
    ],
)
def test_words_on_the_effective_rate(means: list[float], words: str) -> None:
    at = xr.Dataset(
        {
            "alpha_e_ratio_mean": ("step", means), "alpha_e_ratio_stderr": ("step", [0.01] * 3),
            "alpha_e_ratio_predicted": (("step", "prediction"), [[m] for m in means]),
            "alpha_e_ratio_predicted_stderr": (("step", "prediction"), [[0.0]] * 3),
        },
        coords={"step": [10, 50, 100], "prediction": ["exact"]},
    )  # fmt: skip
    assert words in conclusions(None, None, {"dpsgd": {"effective-learning-rate": at}}, {})[0]


def test_rates_that_were_not_run_count_neither_as_success_nor_as_failure() -> None:
    partial = SEPARATING.copy(deep=True)
    partial["median_last_loss"].loc[{"variant": "dpsgd", "learning_rate": 2.0}] = np.nan
    table = convergence(partial)
    assert table["num_seeds"].sel(variant="dpsgd").values.tolist() == [6, 6, 0]
    assert np.isnan(table["probability"].sel(variant="dpsgd", learning_rate=2.0))
    assert stability_edge(table, "dpsgd")[0] == math.inf  # every rate that was run converged
