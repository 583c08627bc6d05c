from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.curvature.gradient_moments import gradient_covariance
from landscape.curvature.hessian import hessian
from landscape.curvature.lanczos import Eigenpairs, top_eigenpairs
from landscape.curvature.low_rank import LowRankOperator, SampleCovarianceOperator
from landscape.curvature.operators import DenseOperator, SymmetricOperator
from landscape.objective import Objective
from landscape.theory.alignment import alignment_by_layer, noise_curvature_alignment, noise_law
from landscape.theory.product_norms import NORMS, product_norms

D = 120


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(dimension: int = D, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(dimension, dimension, seed=seed)).Q


def matrix(values: np.ndarray, vectors: Tensor) -> DenseOperator:
    full = vectors * torch.as_tensor(values) @ vectors.T
    return DenseOperator((full + full.T) / 2)


def exact_pairs(operator: DenseOperator, k: int) -> Eigenpairs:
    values, vectors = torch.linalg.eigh(operator.matrix)
    top = values.flip(0)[:k].numpy()
    return Eigenpairs(top, vectors.flip(1)[:, :k], np.zeros(len(top)), top == top, 0, 0, 1.0, {})


Q, TURNED, OTHER = basis(), torch.linalg.qr(basis() + 0.3 * draw(D, D, seed=3) / math.sqrt(D)).Q, basis(seed=5)
SPIKED = np.concatenate([[100, 50, 25, 12, 6], np.linspace(-1, 1, D - 5)])
FALLING = 1 / np.arange(1, D + 1)
HESSIAN = matrix(SPIKED, Q)
NOISES = {
    "H itself": HESSIAN,
    "a power of H": matrix(np.abs(SPIKED) ** 1.5, Q),
    "turned": matrix(np.abs(SPIKED), TURNED),
    "elsewhere": matrix(FALLING, OTHER),
    "isotropic": DenseOperator(torch.eye(D, dtype=torch.float64)),
    "rank one": DenseOperator(draw(D, 1) @ draw(D, 1).T),
    "tiny": matrix(1e-20 * FALLING, TURNED),
    "deviations": LowRankOperator(draw(8, D) - draw(8, D).mean(0)),
    "two learners": LowRankOperator(torch.cat([draw(1, D), -draw(1, D)])),
}


def dense(operator: SymmetricOperator) -> Tensor:
    return operator.to_dense().double()


def truth(h: Tensor, c: Tensor, vectors: Tensor) -> dict[str, np.ndarray | float]:
    """Everything from dense matrices, as the definitions say."""
    along = ((c @ vectors) * vectors).sum(0)
    commutator = float((c @ h - h @ c).norm() / (math.sqrt(2) * c.norm() * h.norm()))
    return {
        "noise_trace": float(c.trace()),
        "noise_frobenius": float(c.norm()),
        "hessian_frobenius": float(h.norm()),
        "trace_product": float((c @ h).trace()),
        "trace_alignment": float((c @ h).trace() / (c.norm() * h.norm())),
        "commutator": commutator,
        "commutator_squared": commutator**2,
        "noise_along": along.numpy(),
        "energy_share": (along.cumsum(0) / c.trace())[[k - 1 for k in (1, 2, 5) if k <= len(along)]].numpy(),
    }


# Exact where it can be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [5, 7])
def test_with_as_many_probes_as_dimensions_everything_is_exact(k: int) -> None:
    pairs = exact_pairs(HESSIAN, k)
    found = noise_curvature_alignment(HESSIAN, pairs, NOISES, num_probes=D, subspace_sizes=(1, 2, 5, 60))
    assert found["subspace_size"].values.tolist() == [1, 2, 5]
    for name, operator in NOISES.items():
        here = found.sel(noise=name)
        for key, value in truth(HESSIAN.matrix, dense(operator), pairs.vectors).items():
            np.testing.assert_allclose(
                here[key],
                value,
                rtol=1e-9,
                atol=1e-10 if "commut" in key or "align" in key else 1e-30,
                err_msg=f"{name}: {key}",
            )
            np.testing.assert_allclose(here[f"{key}_stderr"], 0, atol=1e-9)
    assert float(found["trace_alignment"].sel(noise="H itself")) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found["energy_over_chance"].sel(noise="isotropic"), 1, rtol=1e-12)
    np.testing.assert_allclose(found["chance"], np.array([1, 2, 5]) / D)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_fewer_dimensions_than_pairs_and_probes(dimension: int) -> None:
    h, rows = draw(dimension, dimension), draw(3, dimension, seed=1)
    h = h + h.T
    pairs = exact_pairs(DenseOperator(h), 10)
    noise = {"dense": DenseOperator(rows.T @ rows), "rows": LowRankOperator(rows, 1.0)}
    found = noise_curvature_alignment(DenseOperator(h), pairs, noise)
    for key, value in truth(h, rows.T @ rows, pairs.vectors).items():
        for name in noise:
            here = found[key].sel(noise=name) if "noise" in found[key].dims else found[key]
            np.testing.assert_allclose(here, value, rtol=1e-10, atol=1e-7)
    assert set(found["exponent_verdict"].values) == {"inconclusive"}


def test_what_the_rows_of_a_low_rank_noise_give_needs_no_probes() -> None:
    noise = {name: c for name, c in NOISES.items() if isinstance(c, LowRankOperator)}
    pairs = exact_pairs(HESSIAN, 5)
    found = noise_curvature_alignment(HESSIAN, pairs, noise, num_probes=3)
    for name, operator in noise.items():
        expected = truth(HESSIAN.matrix, dense(operator), pairs.vectors)
        for key in ("noise_trace", "noise_frobenius", "trace_product", "noise_along", "energy_share"):
            here = found[key].sel(noise=name)
            np.testing.assert_allclose(here, expected[key], rtol=1e-10)
            assert not found[f"{key}_stderr"].sel(noise=name).any()
        # |H|_F is in the ratios
        for key in ("trace_alignment", "commutator"):
            gap = abs(float(found[key].sel(noise=name)) - float(expected[key]))
            assert gap < 6 * float(found[f"{key}_stderr"].sel(noise=name)) < 0.01
    assert found["num_hessian_products"].values.tolist() == [8, 2]
    assert found["num_noise_products"].values.tolist() == [0, 0]
    assert found.attrs["num_shared_products"] == 5 + 3


# Probes --------------------------------------------------------------------------------------------------------------

KEYS = ["trace_alignment", "commutator_squared", "noise_trace", "noise_frobenius", "trace_product", "hessian_frobenius"]


@pytest.mark.parametrize("name", ["a power of H", "turned", "elsewhere", "isotropic", "tiny"])
def test_the_truth_lies_within_four_standard_errors(name: str) -> None:
    pairs = exact_pairs(HESSIAN, 5)
    found = noise_curvature_alignment(HESSIAN, pairs, {name: NOISES[name]}, num_probes=25).isel(noise=0)
    expected = truth(HESSIAN.matrix, dense(NOISES[name]), pairs.vectors)
    for key in [*KEYS, "commutator", "noise_along"]:
        if key == "commutator" and name in ("a power of H", "isotropic"):
            continue  # zero: rounding
        gap = np.abs(found[key] - expected[key])
        assert (gap <= 4 * found[f"{key}_stderr"] + 1e-11 * np.abs(expected[key]) + 1e-14 * (name != "tiny")).all(), key


@pytest.mark.parametrize("name", ["turned", "elsewhere"])
@pytest.mark.parametrize("spectrum", ["spiked", "flat"])
def test_standard_errors_are_calibrated(name: str, spectrum: str) -> None:
    h = HESSIAN if spectrum == "spiked" else matrix(np.linspace(-1, 1.2, D), Q)
    pairs, own = exact_pairs(h, 5), exact_pairs(NOISES[name], 5).vectors
    expected = truth(h.matrix, dense(NOISES[name]), pairs.vectors)
    z = []
    for seed in range(100):
        norms, _ = product_norms(h, pairs.vectors, {"c": NOISES[name]}, num_probes=20, more=[own], seed=seed)
        found = [norms["c"].estimate(NORMS[key]) for key in KEYS]
        z.append([(float(v) - expected[key]) / float(e) for key, (v, e) in zip(KEYS, found, strict=True)])
    rms = np.sqrt((np.array(z) ** 2).mean(0))
    assert (rms > 0.7).all(), rms
    assert (rms < 1.3).all(), rms


def test_probes_need_no_exact_eigenpairs() -> None:
    wrong = Eigenpairs(np.ones(4), basis(seed=9)[:, :4], np.ones(4), np.zeros(4, bool), 0, 0, 1.0, {})
    found = noise_curvature_alignment(HESSIAN, wrong, {"c": NOISES["turned"]}, num_probes=60, subspace_sizes=(4,)).isel(
        noise=0
    )
    expected = truth(HESSIAN.matrix, dense(NOISES["turned"]), wrong.vectors)
    for key in KEYS:
        assert abs(float(found[key]) - float(expected[key])) < 4 * float(found[f"{key}_stderr"])
    assert np.isnan(found["subspace_overlap"]).all()
    assert str(found["exponent_verdict"].values) == "inconclusive"  # no pair is resolved


def test_shared_probes_keep_the_alignment_within_its_bounds() -> None:
    pairs = exact_pairs(HESSIAN, 2)
    noise = {"same": HESSIAN, "opposite": -1.0 * HESSIAN, "elsewhere": NOISES["elsewhere"]}
    found = noise_curvature_alignment(HESSIAN, pairs, noise, num_probes=2)
    np.testing.assert_allclose(found["trace_alignment"][:2], [1, -1], rtol=1e-12)
    np.testing.assert_allclose(found["trace_alignment_stderr"][:2], 0, atol=1e-12)
    assert abs(found["trace_alignment"]).max() <= 1 + 1e-12


def test_the_commutator_reaches_its_bound() -> None:
    """Boettcher & Wenzel's bound is met by [[0, 1], [1, 0]] and diag(1, -1)."""
    swap = DenseOperator(torch.tensor([[0.0, 1], [1, 0]]).double())
    sign = DenseOperator(torch.tensor([[1.0, 0], [0, -1]]).double())
    found = noise_curvature_alignment(sign, exact_pairs(sign, 1), {"c": swap})
    assert float(found["commutator"].isel(noise=0)) == pytest.approx(1, abs=1e-12)


def test_float32() -> None:
    h, c = DenseOperator(HESSIAN.matrix.float()), DenseOperator(NOISES["turned"].to_dense().float())
    pairs = exact_pairs(HESSIAN, 5)
    noise = {"c": c, "rows": LowRankOperator(draw(8, D).float())}
    found = noise_curvature_alignment(h, pairs, noise, num_probes=25)
    for name, operator in noise.items():
        expected = truth(HESSIAN.matrix, dense(operator), pairs.vectors)
        for key in KEYS:
            here = found.sel(noise=name)
            assert abs(float(here[key]) - float(expected[key])) < 4 * float(here[f"{key}_stderr"]) + 1e-5 * abs(
                float(expected[key])
            ), (name, key)


class Counted(SymmetricOperator):
    """An operator that counts its products."""

    def __init__(self, inside: DenseOperator) -> None:
        self.inside, self.count = inside, 0
        self._like(inside)

    def matvec(self, vector: Tensor) -> Tensor:
        self.count += 1
        return self.inside.matvec(vector)


def test_products_are_counted_and_the_hessians_shared() -> None:
    h = Counted(HESSIAN)
    noise = {name: Counted(NOISES[name]) for name in ("turned", "elsewhere")}
    rows = {"rows": LowRankOperator(draw(6, D))}
    found = noise_curvature_alignment(h, exact_pairs(HESSIAN, 5), {**noise, **rows}, num_probes=10, max_matvecs=40)
    assert h.count == found.attrs["num_shared_products"] + int(found["num_hessian_products"].sum())
    assert found.attrs["num_shared_products"] <= 3 * 5 + 10
    assert found["num_hessian_products"].values.tolist()[2] == 6
    for name, operator in noise.items():
        assert operator.count == int(found["num_noise_products"].sel(noise=name))


# Sample covariances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draws", [16, 32])
def test_the_noise_of_draws_stands_for_its_population(num_draws: int) -> None:
    """Effective rank 90: the sample's own alignment is less than half the population's."""
    h = matrix(np.linspace(-1, 1.2, D), Q)
    values = np.linspace(0.1, 2, D)
    population = matrix(values, TURNED)
    root = matrix(np.sqrt(values), TURNED).matrix
    pairs = exact_pairs(h, 5)
    expected = truth(h.matrix, population.matrix, pairs.vectors)
    z, own = [], []
    for seed in range(100):
        operator = SampleCovarianceOperator(draw(num_draws, D, seed=seed) @ root + 3)
        norms, _ = product_norms(h, pairs.vectors, {"c": operator}, num_probes=20, seed=seed)
        found = [norms["c"].estimate(NORMS[key]) for key in KEYS]
        z.append([(float(v) - expected[key]) / float(e) for key, (v, e) in zip(KEYS, found, strict=True)])
        own.append(truth(h.matrix, dense(operator), pairs.vectors)["trace_alignment"])
    rms = np.sqrt((np.array(z) ** 2).mean(0))
    assert (rms > 0.65).all(), rms
    assert (rms < 1.3).all(), rms
    assert np.mean(own) < 0.5 * expected["trace_alignment"]


def test_leaving_a_draw_out_is_what_it_says() -> None:
    samples, h = draw(6, 9), draw(9, 9)
    h = h + h.T
    vectors = basis(9)[:, :2]
    norms, _ = product_norms(DenseOperator(h), vectors, {"c": SampleCovarianceOperator(samples)}, num_probes=9)
    for i in range(6):
        fewer = SampleCovarianceOperator(torch.cat([samples[:i], samples[i + 1 :]]))
        without, _ = product_norms(DenseOperator(h), vectors, {"c": fewer}, num_probes=9)
        np.testing.assert_allclose(norms["c"].without_draw[i], without["c"].sums[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_draws", [2, 3, 4])
def test_too_few_draws_for_squares_give_nan(num_draws: int) -> None:
    operator = SampleCovarianceOperator(draw(num_draws, D))
    found = noise_curvature_alignment(HESSIAN, exact_pairs(HESSIAN, 5), {"c": operator}).isel(noise=0)
    assert np.isnan(found["trace_alignment_stderr"])
    assert np.isnan(found["trace_alignment"]) == (num_draws < 4 or operator.frobenius_squared <= 0)
    assert np.isnan(found["trace_product_stderr"]) == (num_draws < 3)
    assert float(found["trace_product"]) == pytest.approx(float((dense(operator) @ HESSIAN.matrix).trace()))


# Subspaces and laws --------------------------------------------------------------------------------------------------


def test_overlaps_of_known_subspaces() -> None:
    """C shares its two leading eigenvectors with H, in the other order, and none of the next three."""
    values = np.zeros(D)
    values[[1, 0, 10, 11, 12]] = [9, 8, 3, 2, 1]
    noise = {
        "dense": matrix(values, Q),
        "rows": LowRankOperator((Q * torch.as_tensor(values).sqrt()).T, 1.0),
        "two": LowRankOperator(Q[:, :2].T.contiguous()),
    }
    found = noise_curvature_alignment(HESSIAN, exact_pairs(HESSIAN, 5), noise, subspace_sizes=(1, 2, 4, 5, 6))
    assert found["subspace_size"].values.tolist() == [1, 2, 4, 5]
    for name in ("dense", "rows"):
        np.testing.assert_allclose(found["subspace_overlap"].sel(noise=name), [0, 1, 0.5, 0.4], atol=1e-6)
    np.testing.assert_allclose(found["subspace_overlap"].sel(noise="two")[1:], [1, np.nan, np.nan], atol=1e-6)


def test_the_overlap_of_a_random_subspace_is_at_chance() -> None:
    pairs = exact_pairs(HESSIAN, 5)
    overlaps, shares = [], []
    for seed in range(30):
        noise = {"c": LowRankOperator(draw(8, D, seed=seed))}
        found = noise_curvature_alignment(HESSIAN, pairs, noise, num_probes=2).isel(noise=0)
        overlaps.append(found["subspace_overlap"].values[-1])
        shares.append(found["energy_over_chance"].values[-1])
    for values, level in ((overlaps, 5 / D), (shares, 1.0)):
        assert abs(np.mean(values) - level) < 4 * np.std(values) / math.sqrt(30)
        assert np.std(values) / math.sqrt(30) < 0.1 * level


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_the_exponent_of_a_power_of_the_hessian(gamma: float) -> None:
    h = matrix(np.concatenate([np.logspace(2, 0, 10), np.linspace(-1, 0.9, D - 10)]), Q)
    c = matrix(np.concatenate([np.logspace(2, 0, 10) ** gamma, np.ones(D - 10)]), Q)
    rows = LowRankOperator(torch.linalg.cholesky(c.matrix).T, 1.0)
    found = noise_curvature_alignment(h, exact_pairs(h, 10), {"dense": c, "rows": rows})
    np.testing.assert_allclose(found["exponent"], gamma, atol=1e-9)
    assert set(found["exponent_verdict"].values) == {"measured"}
    assert noise_law(exact_pairs(h, 10), c).exponent == pytest.approx(gamma, abs=1e-9)


def test_pairs_that_are_not_positive_or_not_resolved_are_left_out() -> None:
    h = matrix(np.concatenate([np.logspace(1, -1, 8), np.full(D - 8, -0.5)]), Q)
    pairs = exact_pairs(h, 10)  # two negative
    assert noise_law(pairs, h).num_points == 8
    vague = Eigenpairs(
        pairs.values, pairs.vectors, np.where(np.arange(10) == 7, 0.5 * pairs.values, 0), pairs.converged, 0, 0, 1.0, {}
    )
    assert noise_law(vague, h).num_points == 7


def test_directions_without_noise_make_the_law_inconclusive() -> None:
    h = matrix(np.concatenate([np.logspace(2, 0, 10), np.zeros(D - 10)]), Q)
    values = np.concatenate([np.logspace(2, 0, 10), np.zeros(D - 10)])
    values[4] = 0
    for c in (matrix(values, Q), LowRankOperator((Q * torch.as_tensor(values).sqrt()).T)):
        law = noise_law(exact_pairs(h, 10), c)
        assert law.verdict == "inconclusive"
        assert "1 of 10 values are not positive" in law.reason


def test_no_noise_at_all() -> None:
    noise = {
        "dense": DenseOperator(torch.zeros(D, D).double()),
        "rows": LowRankOperator(torch.zeros(1, D).double()),
        "draws": SampleCovarianceOperator(torch.zeros(8, D).double()),
    }
    found = noise_curvature_alignment(HESSIAN, exact_pairs(HESSIAN, 5), noise)
    assert not found["noise_trace"].any()
    for key in ("trace_alignment", "commutator", "subspace_overlap", "energy_share", "exponent"):
        assert np.isnan(found[key]).all(), key
    assert set(found["exponent_verdict"].values) == {"inconclusive"}


def test_labels_and_refusals() -> None:
    pairs = exact_pairs(HESSIAN, 5)
    found = noise_curvature_alignment(HESSIAN, pairs, {"gradient": NOISES["turned"]})
    assert found["noise"].values.tolist() == ["gradient"]
    assert all("long_name" in found[key].attrs and "units" in found[key].attrs for key in found)
    for arguments, word in (
        ((HESSIAN, pairs, {}), "no noise"),
        ((HESSIAN, pairs, {"c": DenseOperator(torch.eye(3))}), "the c covariance"),
        ((DenseOperator(torch.eye(3)), pairs, {"c": DenseOperator(torch.eye(3))}), "eigenvectors"),
    ):
        with pytest.raises(ValueError, match=word):
            noise_curvature_alignment(*arguments)
    with pytest.raises(ValueError, match="num_probes"):
        noise_curvature_alignment(HESSIAN, pairs, {"c": HESSIAN}, num_probes=1)
    again = noise_curvature_alignment(HESSIAN, pairs, {"gradient": NOISES["turned"]})
    assert again.identical(found)


# Networks ------------------------------------------------------------------------------------------------------------


def classifier(sizes: Sequence[int], count: int = 4000) -> tuple[Objective, Tensor]:
    """A network whose labels are drawn from its own probabilities: E C = Fisher = Gauss-Newton = E H there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        net = nn.Sequential(*layers[:-1]).double()
        inputs = torch.randn(count, sizes[0]).double() * torch.logspace(0, -1.5, sizes[0]).double()
        labels = torch.distributions.Categorical(logits=3 * net(inputs)).sample()
        with torch.no_grad():
            list(net)[-1].weight.mul_(3)
            list(net)[-1].bias.mul_(3)
    return Objective(net, nn.functional.cross_entropy, (inputs, labels)), torch.cat(
        [p.detach().flatten() for p in net.parameters()]
    )


def test_the_gradient_noise_of_a_well_specified_classifier_follows_the_hessian() -> None:
    objective, weights = classifier((8, 6, 4))
    h, c = hessian(objective, weights), gradient_covariance(objective, weights)
    pairs = top_eigenpairs(h, 12, tol=1e-6)
    found = noise_curvature_alignment(h, pairs, {"gradient": c}, num_probes=20).isel(noise=0)
    assert str(found["exponent_verdict"].values) == "measured"
    assert abs(float(found["exponent"]) - 1) < 0.1
    assert float(found["trace_alignment"]) > 0.98
    assert float(found["commutator"]) < 0.1
    assert float(found["subspace_overlap"].values[-1]) > 0.9
    expected = truth(dense(h), dense(c), pairs.vectors)
    for key in KEYS:
        assert abs(float(found[key]) - float(expected[key])) < 4 * float(found[f"{key}_stderr"]) + 1e-9


def test_each_layer_has_its_law() -> None:
    objective, weights = classifier((8, 6, 2, 4), 1500)
    found = alignment_by_layer(objective, weights, num_eigenpairs=10, max_matvecs=40)
    assert found["layer"].values.tolist() == ["0", "2", "4"]
    assert found["num_parameters"].values.tolist() == [54, 14, 12]
    h, c = dense(hessian(objective, weights)), dense(gradient_covariance(objective, weights))
    start = 0
    for layer, size in zip(("0", "2", "4"), (54, 14, 12), strict=True):
        part = slice(start, start + size)
        here = found.sel(layer=layer)
        values, vectors = torch.linalg.eigh(h[part, part])
        along = ((c[part, part] @ vectors) * vectors).sum(0).flip(0)[:10].numpy()
        sound = here["residual"].values < 1e-2 * here["eigenvalue"].values
        assert sound[:5].all()
        np.testing.assert_allclose(here["eigenvalue"][sound], values.flip(0)[:10].numpy()[sound], rtol=1e-3)
        np.testing.assert_allclose(here["noise_along"][:5], along[:5], rtol=0.05)
        start += size
    assert (found["num_hessian_products"] <= 50).all()
    first = found.sel(layer="0")
    assert float(first["exponent_low"]) < 1.2
    assert float(first["exponent_high"]) > 0.8


def test_layers_that_carry_no_law_say_why() -> None:
    net = nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)).double()
    data = (draw(30, 3), torch.arange(30) % 2)
    objective = Objective(net, nn.functional.cross_entropy, data)
    found = alignment_by_layer(objective, dict(net.named_parameters()))
    assert found["exponent_verdict"].values.tolist() == ["inconclusive"] * 2
    assert all("fewer than 6" in str(reason) for reason in found["exponent_reason"].values)
    assert np.isnan(found["noise_along"].values[:, 4:]).all()
    with pytest.raises(ValueError, match="num_eigenpairs"):
        alignment_by_layer(objective, dict(net.named_parameters()), num_eigenpairs=0)
