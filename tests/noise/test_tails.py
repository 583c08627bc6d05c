"""Tail indices on exact power laws and on what only looks like one; noise scales on noise of known covariance."""

import math
from collections import Counter

import numpy as np
import pytest

from landscape.noise.tails import noise_scale_from_norms, tail_index

# Tail index ------------------------------------------------------------------------------------------------------


def student(rng: np.random.Generator, exponent: float, count: int, dimension: int = 10) -> np.ndarray:
    """Norms of Student vectors: P(X > x) ~ x^-exponent far out."""
    return np.linalg.norm(rng.standard_normal((count, dimension)), axis=1) / np.sqrt(rng.chisquare(exponent, count) / exponent)  # fmt: skip


@pytest.mark.parametrize("exponent", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("num_top", [10, 100, 500])
def test_exact_power_laws(exponent: float, num_top: int) -> None:
    """Unbiased, with the error it states: Pareto samples are a power law above any threshold."""
    rng = np.random.default_rng(num_top)
    found = [tail_index((1 - rng.random(1000)) ** (-1 / exponent), num_top) for _ in range(400)]
    values = np.array([f.index for f in found])
    assert abs(values.mean() - exponent) < 4 * values.std(ddof=1) / math.sqrt(400)
    assert values.std(ddof=1) == pytest.approx(np.sqrt(np.mean([f.stderr**2 for f in found])), rel=0.15)
    if num_top >= 100:
        z = np.array([(f.index - exponent) / f.stderr for f in found])
        assert 0.85 < math.sqrt((z**2).mean()) < 1.15


@pytest.mark.slow
def test_verdicts_over_many_samples() -> None:
    """What is called heavy is heavy, what is called light is light, and small samples mostly decide nothing."""
    rng = np.random.default_rng(0)
    draws = {
        "pareto": lambda m: rng.pareto(2.0, m) + 1,
        "student": lambda m: student(rng, 3.0, m),
        "exponential": lambda m: rng.exponential(size=m),
        "gaussian in the plane": lambda m: np.sqrt(rng.chisquare(2, m)),
        "gaussian in 1000 dimensions": lambda m: np.sqrt(rng.chisquare(1000, m)),
    }
    share = {
        (name, m): Counter(tail_index(draw(m)).verdict for _ in range(200)) for name, draw in draws.items() for m in (100, 8000)
    }  # fmt: skip
    for name in ("pareto", "student"):
        assert share[name, 8000]["heavy"] > 160
        assert share[name, 8000]["light"] == 0 == share[name, 100]["light"]
    for name in ("gaussian in the plane", "gaussian in 1000 dimensions"):
        assert share[name, 8000]["light"] > 160
        assert share[name, 8000]["heavy"] == 0
        assert share[name, 100]["undecided"] > 180
    assert share["exponential", 8000]["heavy"] + share["exponential", 8000]["light"] < 20


def test_light_tails_have_an_index_that_drifts() -> None:
    """Hill's estimate of a Gaussian norm is large, and larger the further out: no exponent."""
    found = tail_index(np.sqrt(np.random.default_rng(1).chisquare(50, 20_000)))
    assert found.verdict == "light"
    assert found.index > 10
    assert found.drift_z < -3
    assert found.tried_index[0] > 1.3 * found.tried_index[-1]
    assert found.plateau[1] - found.plateau[0] < 20_000 // 4 - 10  # not flat over all that was tried


def test_plateau_of_a_power_law_covers_what_was_tried() -> None:
    uniform = (np.arange(4000) + 0.5) / 4000
    found = tail_index(uniform ** (-1 / 3))
    assert found.plateau == (10, 1000)
    assert found.verdict == "heavy"
    np.testing.assert_allclose(found.tried_index, 3, rtol=0.12)


def test_scale_does_not_matter_and_origin_does_for_the_index_alone() -> None:
    norms = np.random.default_rng(0).pareto(3.0, 500) + 1
    plain, scaled, shifted = tail_index(norms), tail_index(1e-12 * norms), tail_index(norms + 10)
    assert scaled.index == pytest.approx(plain.index)
    assert scaled.verdict == plain.verdict
    assert shifted.excess_z == pytest.approx(plain.excess_z)
    assert shifted.index > 2 * plain.index


def test_equal_norms_have_no_tail() -> None:
    found = tail_index(np.full(100, 2.0))
    assert found.index == math.inf
    assert found.verdict == "light"
    found.to_xarray()


def test_tail_input() -> None:
    norms = np.random.default_rng(0).exponential(size=100)
    with pytest.raises(ValueError, match="at least 40 norms, not 39"):
        tail_index(norms[:39])
    for wrong in (9, 51):
        with pytest.raises(ValueError, match="num_top must be between 10 and half"):
            tail_index(norms, wrong)
    with pytest.raises(ValueError, match="without noise"):
        tail_index(np.zeros(100))
    with pytest.raises(ValueError, match="finite"):
        tail_index(np.r_[norms, np.nan])


def test_tail_dataset() -> None:
    found = tail_index(np.random.default_rng(0).exponential(size=400))
    made = found.to_xarray()
    assert float(made["tail_index"]) == found.index == found.estimate.value
    assert made.attrs["chosen_num_top"] == 40
    assert list(made["tried_index"].dims) == ["num_top"]


# Noise scale -----------------------------------------------------------------------------------------------------


def norms(
    rng: np.random.Generator,
    count: int,
    small: int,
    large: int,
    gradient: float,
    variances: np.ndarray,
    *,
    paired: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared norms of averages of Gaussian per-example gradients; the large batch is made of small ones where paired."""
    mean = np.zeros(len(variances))
    mean[0] = gradient
    parts = large // small
    batches = mean + rng.standard_normal((count, parts, len(variances))) * np.sqrt(variances / small)
    whole = batches.mean(1) if paired else mean + rng.standard_normal((count, len(variances))) * np.sqrt(variances / large)  # fmt: skip
    return (batches**2).sum(2).mean(1) if paired else (batches[:, 0] ** 2).sum(1), (whole**2).sum(1)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("variances", [np.ones(50), np.r_[100.0, np.ones(20)], np.array([3.0])])
def test_noise_scale_of_known_noise(paired: bool, variances: np.ndarray) -> None:
    rng = np.random.default_rng(7)
    gradient, small, large = 1.5, 4, 32
    found = [
        noise_scale_from_norms(*norms(rng, 60, small, large, gradient, variances, paired=paired), small_batch=small, large_batch=large, paired=paired)
        for _ in range(400)
    ]  # fmt: skip
    for name, true in (("trace", variances.sum()), ("gradient_norm_squared", gradient**2)):
        values = np.array([getattr(f, name).value for f in found])
        assert abs(values.mean() - true) < 4 * values.std(ddof=1) / math.sqrt(400)
        z = np.array([(getattr(f, name).value - true) / getattr(f, name).stderr for f in found])
        assert 0.85 < math.sqrt((z**2).mean()) < 1.2
    true = variances.sum() / gradient**2
    covered = np.mean([f.low <= true <= f.high for f in found])
    assert covered > 0.88  # squares of single Gaussians are skew
    sure = [f for f in found if f.significant]
    assert all(f.low <= max(0.0, f.value) <= f.high < math.inf for f in sure)


def test_a_vanishing_gradient_has_no_upper_end() -> None:
    """At a minimum the noise scale is infinite: the interval must say so, at its level, and never average ratios."""
    rng = np.random.default_rng(3)
    found = [
        noise_scale_from_norms(*norms(rng, 40, 2, 8, 0.0, np.ones(30), paired=False), small_batch=2, large_batch=8, paired=False)
        for _ in range(300)
    ]  # fmt: skip
    assert np.mean([f.high == math.inf for f in found]) > 0.93
    assert np.mean([f.significant for f in found]) < 0.06
    assert all(math.isnan(f.value) for f in found if f.gradient_norm_squared.value <= 0)
    assert all(f.low > 0 for f in found if f.trace.value > 3 * f.trace.stderr and f.gradient_norm_squared.value > -1.96 * f.gradient_norm_squared.stderr)  # fmt: skip


def test_batches_without_replacement() -> None:
    """phi_B = (N - B)/(B (N - 1)): the whole set has no noise at all."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((24, 5)) + 0.7
    mean = gradients.mean(0)
    trace = ((gradients - mean) ** 2).sum(1).mean()
    small = np.array([(gradients[rng.permutation(24)[:3]].mean(0) ** 2).sum() for _ in range(20_000)])
    large = np.full(20_000, (mean**2).sum())
    found = noise_scale_from_norms(small, large, small_batch=3, large_batch=24, paired=False, population=24)
    assert abs(found.trace.value - trace) < 4 * found.trace.stderr
    assert found.gradient_norm_squared.value == pytest.approx((mean**2).sum())
    assert found.value == pytest.approx(trace / (mean**2).sum(), rel=0.02)


def test_no_noise() -> None:
    found = noise_scale_from_norms(np.full(5, 4.0), np.full(5, 4.0), small_batch=1, large_batch=2, paired=True)
    assert (found.value, found.low, found.high, found.significant) == (0.0, 0.0, 0.0, True)
    made = found.to_xarray()
    assert float(made["gradient_norm_squared"]) == 4
    assert bool(made["significant"])


def test_noise_scale_input() -> None:
    ones = np.ones(4)
    with pytest.raises(ValueError, match="the first must be smaller"):
        noise_scale_from_norms(ones, ones, small_batch=8, large_batch=8, paired=False)
    with pytest.raises(ValueError, match="two draws"):
        noise_scale_from_norms(ones[:1], ones, small_batch=1, large_batch=8, paired=False)
    with pytest.raises(ValueError, match="as many of both"):
        noise_scale_from_norms(ones[:3], ones, small_batch=1, large_batch=8, paired=True)
    with pytest.raises(ValueError, match="without replacement"):
        noise_scale_from_norms(ones, ones, small_batch=1, large_batch=8, paired=False, population=4)
