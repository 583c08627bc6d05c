from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape import streams
from landscape.training.loop import sum_to_zero
from landscape.training.noise import SHAPES, NoiseProfile, drift_apart, noise_factors

LAYERS = (5, 1, 6)
D = sum(LAYERS)


def spiked(kind: str, k: int = 4) -> Tensor:
    rows = torch.randn(k, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if kind == "one direction":
        rows = rows[:1] * torch.tensor([1e3, -2.0, 0.5, 0.0])[:k, None]
    elif kind == "badly scaled":
        rows = rows * torch.logspace(-9, 6, D, dtype=torch.float64)
    elif kind == "one coordinate":
        rows[:, 1:] = 0
    elif kind == "zero":
        rows = 0 * rows
    elif kind == "one row":
        rows = rows[:1]
    return rows


def profile(rows: Tensor, shape: str, steps: tuple[int, ...] = (0,), **more: Any) -> NoiseProfile:
    factors = noise_factors(rows, shape, LAYERS)  # type: ignore[arg-type]
    return NoiseProfile(steps, "weights", shape, factors[None].expand(len(steps), *factors.shape), LAYERS, **more)  # type: ignore[arg-type]


def samples(made: NoiseProfile, count: int, step: int = 0) -> np.ndarray:
    return torch.stack([made.sample(step, streams.torch_generator("test", i)) for i in range(count)]).double().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["general", "one direction", "badly scaled", "one coordinate", "zero", "one row"])
def test_all_shapes_have_the_same_total_variance(kind: str, dtype: torch.dtype) -> None:
    rows = spiked(kind).to(dtype)
    exact = float(rows.double().square().sum())
    for shape in SHAPES:
        found = profile(rows, shape).total_variance
        assert found.shape == (1,)
        assert found[0] == pytest.approx(exact, rel=4e-7 if dtype == torch.float32 else 1e-14)


def test_what_each_shape_keeps() -> None:
    rows = spiked("general")
    variance = rows.square().sum(0)
    assert noise_factors(rows, "isotropic", LAYERS).square().tolist() == pytest.approx([float(variance.mean())])
    layers = [float(part.mean()) for part in variance.split(LAYERS)]
    assert noise_factors(rows, "layer", LAYERS).square().tolist() == pytest.approx(layers)
    torch.testing.assert_close(noise_factors(rows, "diagonal", LAYERS).square(), variance)
    assert torch.equal(noise_factors(rows, "low-rank", LAYERS), rows)


@pytest.mark.parametrize("kind", ["general", "one direction", "one row"])
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_have_the_covariance_of_the_shape(shape: str, kind: str) -> None:
    """Every entry of the empirical covariance within four standard errors, Var = (S_ii S_jj + S_ij^2)/m for Gaussians."""
    rows = spiked(kind)
    expected = {
        "isotropic": float(rows.square().sum()) / D * np.eye(D),
        "layer": np.diag(np.repeat([float(p.square().sum()) / p.shape[1] for p in rows.split(LAYERS, 1)], LAYERS)),
        "diagonal": np.diag(rows.square().sum(0).numpy()),
        "low-rank": (rows.T @ rows).numpy(),
    }[shape]
    drawn = samples(profile(rows, shape), 3000)
    found = drawn.T @ drawn / len(drawn)
    error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / len(drawn))
    assert (np.abs(found - expected) <= 4 * error + 1e-12).all()
    assert np.linalg.matrix_rank(drawn, tol=1e-9 * np.abs(drawn).max()) == (len(rows) if shape == "low-rank" and kind != "one direction" else 1 if shape == "low-rank" else D)  # fmt: skip


def test_the_last_profile_at_or_before_a_step_holds() -> None:
    factors = torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64)
    made = NoiseProfile((3, 10, 20), "gradient", "isotropic", factors, LAYERS)
    assert [made.index(t) for t in (0, 2, 3, 9, 10, 19, 20, 1000)] == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert samples(made, 1, 2).tolist() == np.zeros((1, D)).tolist()
    np.testing.assert_allclose(samples(made, 2, 10), 2 * samples(made, 2, 9))
    assert not samples(made, 1, 25).any()


def test_a_sample_is_a_pure_function_of_its_generator() -> None:
    for shape in SHAPES:
        made = profile(spiked("general"), shape)
        first, again, other = (made.sample(0, streams.torch_generator("n", 0, j, 7)) for j in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


# The drift -----------------------------------------------------------------------------------------------------------


def test_what_becomes_of_the_drift() -> None:
    rows, mean = spiked("general"), torch.linspace(-1, 1, D, dtype=torch.float64)
    second, none = drift_apart(rows, mean, "as-noise")
    torch.testing.assert_close(second.T @ second, rows.T @ rows / len(rows))
    assert none is None
    for mode in ("removed", "added"):
        centred, drift = drift_apart(rows, mean, mode)
        torch.testing.assert_close(centred.T @ centred, (rows - mean).T @ (rows - mean) / len(rows))
        assert (drift is None) == (mode == "removed")
    nothing, drift = drift_apart(rows, mean, "alone")
    assert drift is not None
    assert torch.equal(drift, mean)
    assert not nothing.any()


def test_both_second_moments_are_unbiased_and_differ_by_the_drift() -> None:
    """Over 400 sets of 4 draws of known mean and covariance, with the exact mean at hand."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.linspace(-1, 1, D, dtype=torch.float64), torch.linspace(0.1, 2, D, dtype=torch.float64)
    energies: dict[str, list[float]] = {"as-noise": [], "removed": []}
    for _ in range(400):
        rows = mean + spread * torch.randn(4, D, generator=generator, dtype=torch.float64)
        for mode, held in energies.items():
            held.append(float(drift_apart(rows, mean, mode)[0].square().sum()))  # type: ignore[arg-type]
    for mode, exact in (("as-noise", float((mean**2 + spread**2).sum())), ("removed", float((spread**2).sum()))):
        stderr = np.std(energies[mode], ddof=1) / math.sqrt(400)
        assert abs(np.mean(energies[mode]) - exact) < 4 * stderr


def test_the_drift_is_added_to_every_sample() -> None:
    rows, drift = spiked("zero"), torch.ones(1, D, dtype=torch.float64)
    assert samples(profile(rows, "layer", drift=drift), 2).tolist() == np.ones((2, D)).tolist()
    noisy = samples(profile(spiked("general"), "diagonal", drift=drift), 2000)
    stderr = noisy.std(0) / math.sqrt(2000)
    assert (np.abs(noisy.mean(0) - 1) < 4 * stderr).all()


# Noises that sum to zero ---------------------------------------------------------------------------------------------


def test_noises_that_sum_to_zero_keep_their_covariance() -> None:
    """Three learners: each of variance 1, any two correlated by -1/2."""
    independent = torch.randn(3 * 20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sum_to_zero(independent, 3).view(-1, 3)
    assert float(found.sum(1).abs().max()) < 1e-12
    covariance = (found.T @ found / len(found)).numpy()
    expected = 1.5 * np.eye(3) - 0.5
    error = np.sqrt((1 + expected**2) / len(found))
    assert (np.abs(covariance - expected) < 4 * error).all()


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (3, 3)}, "needs rising steps, not 3, 3"),
        ({"steps": ()}, "needs rising steps, not none"),
        (
            {"factors": torch.ones(2, 3)},
            r"factors of shape \(2, 3\) do not make isotropic noise at 2 steps in 12 coordinates",
        ),
        ({"shape": "low-rank"}, "do not make low-rank noise"),
        ({"drift": torch.ones(2, 5)}, "do not make isotropic noise"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {"steps": (0, 5), "place": "weights", "shape": "isotropic", "factors": torch.ones(2, 1), "layers": LAYERS}
    with pytest.raises(ValueError, match=message):
        NoiseProfile(**{**good, **changes})
