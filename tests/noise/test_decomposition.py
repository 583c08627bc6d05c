import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape.checkpoints import Learners
from landscape.noise.covariance import gradient_covariance_summary
from landscape.noise.decomposition import decompose, measure_noise
from landscape.noise.draws import draw_gradients, points_of, weight_noise_points
from landscape.noise.reference import ReferenceGradient, reference_gradient
from landscape.noise.rows import Rows
from landscape.objective import Objective


class Point(nn.Module):
    """A weight vector and nothing else: the data choose the loss."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w - x


def quadratic(curvature: Tensor, examples: int = 200, seed: int = 0) -> tuple[Objective, Tensor]:
    """l_i(w) = (1/2) (w - x_i)^T A (w - x_i): gradient A (w - mean x), covariance A Cov(x) A, exactly known."""
    x = torch.randn(examples, len(curvature), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def loss(residual: Tensor, target: Tensor) -> Tensor:
        return 0.5 * torch.einsum("bi,ij,bj->b", residual, curvature, residual)

    return Objective(Point(len(curvature)), loss, (x, torch.zeros(examples))), x


def network(activation: type[nn.Module] = nn.Tanh) -> tuple[Objective, Learners]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)).double()
        x, y = torch.randn(60, 5).double(), torch.randint(3, (60,))
        objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
        weights = objective.model.initial_weights()[0] + 0.3 * torch.randn(4, objective.num_parameters).double()
    return objective, Learners(0, weights, objective.model.layout)


CURVATURE = torch.diag(torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64))


def test_identities_hold_to_rounding() -> None:
    objective, learners = network()
    found = measure_noise(objective, learners, learning_rate=0.7, local_batch_size=8, num_draws=16)
    assert float(found["identity_error"]) < 1e-12
    np.testing.assert_allclose(found["Delta_S"] + found["Delta_2"] + found["cross"], found["xi_squared"], rtol=1e-10)
    excess = (found["alpha_e_ratio"] - 1) ** 2 * 0.7**2 * float(found["gradient_norm_squared"])
    np.testing.assert_allclose(found["Delta"] + excess, found["xi_squared"], rtol=1e-10)


def test_expected_effective_rate_is_the_exact_prediction() -> None:
    objective, learners = network()
    found = measure_noise(objective, learners, learning_rate=0.7, local_batch_size=8, num_draws=400)
    assert abs(float(found["alpha_e_ratio_exact"]) - 1) > 4 * float(
        found["alpha_e_ratio_stderr"]
    )  # DPSGD's rate differs, visibly
    assert abs(float(found["alpha_e_ratio_mean"]) - float(found["alpha_e_ratio_exact"])) < 4 * float(
        found["alpha_e_ratio_stderr"]
    )


def test_ssgd_has_no_landscape_noise_and_keeps_its_rate() -> None:
    objective, learners = network()
    equal = Learners(0, learners.mean.expand(4, -1).clone(), learners.layout)
    found = measure_noise(objective, equal, learning_rate=0.7, local_batch_size=8, num_draws=400)
    assert float(found["Delta_2_mean"]) == 0
    assert float(found["alpha_e_ratio_exact"]) == pytest.approx(1, abs=1e-12)
    assert abs(float(found["alpha_e_ratio_mean"]) - 1) < 4 * float(found["alpha_e_ratio_stderr"])


def test_minibatch_noise_has_its_closed_form() -> None:
    objective, x = quadratic(CURVATURE)
    n, batch, alpha = 5, 10, 0.3
    learners = Learners(0, torch.ones(n, 3, dtype=torch.float64), objective.model.layout)
    found = measure_noise(objective, learners, learning_rate=alpha, local_batch_size=batch, num_draws=600)
    covariance = CURVATURE @ torch.cov(x.T, correction=0) @ CURVATURE
    expected = alpha**2 * float(covariance.trace()) / (n * batch)
    assert abs(float(found["Delta_S_mean"]) - expected) < 4 * float(found["Delta_S_stderr"])


def test_landscape_noise_vanishes_on_a_quadratic_with_shared_curvature() -> None:
    objective, _ = quadratic(CURVATURE)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = measure_noise(
        objective, Learners(0, weights, objective.model.layout), learning_rate=0.3, local_batch_size=10, num_draws=8
    )
    # (1/n) sum_j A (w_j - w_a) = 0: every minibatch has the same Hessian, and the deviations cancel
    assert float(found["Delta_2_mean"]) < 1e-28


def test_drift_on_a_quartic_is_the_gradient_of_the_averaged_sharpness() -> None:
    """l(w) = w^4/4: (1/n) sum (w_a + d_j)^3 - w_a^3 = 3 w_a mean d^2 + mean d^3, and (1/2) d/dw (3 w^2 Sigma) = 3 w Sigma."""
    objective = Objective(
        Point(1), lambda r, _: 0.25 * r[:, 0] ** 4, (torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4))
    )
    learners = Learners(0, torch.tensor([[1.5], [0.5], [1.0]], dtype=torch.float64), objective.model.layout)
    found = measure_noise(objective, learners, learning_rate=0.1, local_batch_size=2, num_draws=4)
    sigma = np.mean([0.25, 0.25, 0.0])
    assert float(found["alpha_e_ratio_exact"]) == pytest.approx(1 + 3 * sigma, rel=1e-12)
    assert float(found["systematic_share"]) == pytest.approx(1.0, rel=1e-12)  # no minibatch noise in this data


def test_systematic_share_against_its_definition() -> None:
    objective, learners = network()
    found = measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=300)
    drift = objective.stacked_gradients(learners.weights).mean(0) - objective.gradient(learners.mean)
    draws = draw_gradients(
        objective, learners.mean, learners.weights, num_learners=4, local_batch_size=8, num_draws=800, seed=1
    )
    xi_d = draws.at_points - draws.at_mean
    unbiased = (float(xi_d.mean(0).square().sum()) - float(xi_d.var(0).sum()) / 800) / float(
        xi_d.square().sum(1).mean()
    )
    exact = float(drift @ drift) / float(xi_d.square().sum(1).mean())
    assert float(found["systematic_share_exact"]) == pytest.approx(exact, rel=0.1)
    assert float(found["systematic_share_exact"]) == pytest.approx(unbiased, rel=0.1)
    gap = abs(float(found["systematic_share"]) - float(found["systematic_share_exact"]))
    assert gap < 4 * float(found["systematic_share_stderr"]) < 0.2


def test_points_move_the_gradients_only() -> None:
    objective, learners = network()
    moved = learners.weights * 1.1
    found = measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=4, points=moved)
    as_function = measure_noise(
        objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=4, points=lambda draw: moved
    )
    np.testing.assert_array_equal(found["Delta_2"], as_function["Delta_2"])
    assert "alpha_e_ratio_exact" not in as_function
    plain = measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=4)
    np.testing.assert_allclose(plain["Delta_S"], found["Delta_S"], rtol=1e-12)
    assert not np.allclose(plain["Delta_2"], found["Delta_2"])


def test_covariance_summary_is_the_dense_covariance() -> None:
    objective, learners = network()
    stacked = torch.cat([g for g, _ in objective.example_gradients(learners.mean)])
    dense = torch.cov(stacked.T, correction=0)
    directions, _ = torch.linalg.qr(
        torch.randn(objective.num_parameters, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    found = gradient_covariance_summary(objective, learners.mean, directions, chunk=7)
    assert found.trace == pytest.approx(float(dense.trace()), rel=1e-12)
    np.testing.assert_allclose(found.along, torch.diagonal(directions.T @ dense @ directions).numpy(), rtol=1e-10)
    assert found.noise_scale == pytest.approx(found.trace / float(objective.gradient(learners.mean).square().sum()))


def test_bad_input() -> None:
    objective, learners = network()
    with pytest.raises(ValueError, match="local_batch_size"):
        measure_noise(objective, learners, learning_rate=1.0, local_batch_size=61, num_draws=4)
    with pytest.raises(ValueError, match="num_draws"):
        measure_noise(objective, learners, learning_rate=1.0, local_batch_size=8, num_draws=1)
    broken = Learners(7, torch.full_like(learners.weights, math.nan), learners.layout)
    with pytest.raises(ValueError, match="step 7 holds weights that are not finite"):
        measure_noise(objective, broken, learning_rate=1.0, local_batch_size=8)
    draws = draw_gradients(objective, learners.mean, learners.weights, num_learners=4, local_batch_size=8, num_draws=2)
    with pytest.raises(ValueError, match="vanishes"):
        decompose(
            draws,
            ReferenceGradient(torch.zeros(1, objective.num_parameters).double(), 60, 60),
            1.0,
            objective.model.layout,
        )
    unknown = Learners(3, learners.weights, learners.layout)
    with pytest.raises(ValueError, match="step 3 does not record its learning_rate; give learning_rate="):
        measure_noise(objective, unknown, local_batch_size=8)
    with pytest.raises(ValueError, match="local_batch_size must be a positive number, not 0"):
        measure_noise(objective, unknown, learning_rate=1.0, local_batch_size=0)
    with pytest.raises(ValueError, match="num_gradient_examples must be at least 16"):
        measure_noise(objective, unknown, learning_rate=1.0, local_batch_size=8, num_gradient_examples=10)


def test_layers_add_up_to_the_whole() -> None:
    objective, learners = network()
    found = measure_noise(objective, learners, learning_rate=0.7, local_batch_size=8, num_draws=6)
    assert found["layer"].values.tolist() == ["0", "2"]
    for name in ("Delta_S", "Delta_2", "cross", "xi_squared", "alignment"):
        np.testing.assert_allclose(found[f"{name}_by_layer"].sum("layer"), found[name], rtol=1e-10, atol=1e-14)
    alone = measure_noise(
        objective.subset("2.*", learners.mean),
        Learners(0, learners.mean[None, 48:].expand(4, -1).clone(), objective.subset("2.*", learners.mean).model.layout),
        learning_rate=0.7, local_batch_size=8, num_draws=6,
    )  # fmt: skip
    part = found.sel(layer="2")  # SSGD's part of the last layer is that of a network whose other layers are held
    np.testing.assert_allclose(part["Delta_S_by_layer"], alone["Delta_S"], rtol=1e-9)
    assert float(part["gradient_norm_squared_by_layer"]) == pytest.approx(float(alone["gradient_norm_squared"]))


@pytest.mark.parametrize("dead", [False, True])
def test_an_estimated_full_gradient_is_debiased(dead: bool) -> None:
    """Over choices of the m examples every mean is unbiased, its error honest; the plain plug-in is visibly not."""
    objective, learners = network()
    if dead:  # a network far out, where g is small against its noise
        learners = Learners(0, learners.weights * 0.2, learners.layout)
    exact = measure_noise(objective, learners, learning_rate=0.7, local_batch_size=8, num_draws=200)
    names = ("Delta_S", "Delta_2", "cross", "xi_squared", "alignment")
    scores: dict[str, list[float]] = {name: [] for name in (*names, "gradient_norm_squared")}
    norms, plain = [], []
    for seed in range(60):
        found = measure_noise(
            objective, learners, learning_rate=0.7, local_batch_size=8, num_draws=40, num_gradient_examples=32, seed=seed + 1
        )  # fmt: skip
        for name in names:
            gap = float(found[f"{name}_mean"] - exact[f"{name}_mean"])
            scores[name].append(gap / math.hypot(float(found[f"{name}_stderr"]), float(exact[f"{name}_stderr"])))
        norms.append(float(found["gradient_norm_squared"]))
        scores["gradient_norm_squared"].append(
            (norms[-1] - float(exact["gradient_norm_squared"])) / float(found["gradient_norm_squared_stderr"])
        )
        plain.append(
            float(reference_gradient(objective, learners.mean, 32, seed=seed + 1).groups.mean(0).square().sum())
        )
    truth = float(exact["gradient_norm_squared"])
    error = np.std(norms, ddof=1) / math.sqrt(len(norms))
    assert abs(np.mean(norms) - truth) < 4 * error
    assert np.mean(plain) - truth > 4 * np.std(plain, ddof=1) / math.sqrt(len(plain))
    for name, values in scores.items():
        assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values)) + 0.35, (
            name
        )  # errors correlate with values
        assert 0.6 < np.sqrt(np.mean(np.square(values))) < 1.5, name


def test_all_examples_make_the_reference_exact_and_quadratic_forms_are_unbiased() -> None:
    objective, learners = network()
    exact = reference_gradient(objective, learners.mean)
    assert exact.is_exact
    assert exact.unsampled == 0
    assert reference_gradient(objective, learners.mean, 60).is_exact
    direction = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    truth = float(exact.groups[0] @ direction) ** 2
    found = []
    for seed in range(400):
        estimated = reference_gradient(objective, learners.mean, 48, num_groups=4, seed=seed)
        along = (estimated.groups @ direction).numpy()
        found.append(float(estimated.forms(np.outer(along, along), np.arange(4))))
    assert abs(np.mean(found) - truth) < 4 * np.std(found, ddof=1) / math.sqrt(len(found))


def test_weighted_examples_refuse_an_estimated_gradient() -> None:
    net = nn.Linear(5, 3).double()
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(60) % 3
    objective = Objective(net, nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double()), (x, y))
    with pytest.raises(ValueError, match="examples weigh the same"):
        reference_gradient(objective, dict(net.named_parameters()), 32)


@pytest.mark.parametrize("loss", ["plain", "weighted", "ignoring", "sum", "opaque"])
def test_averaged_gradients_are_the_mean_over_learners(loss: str) -> None:
    net = nn.Linear(5, 3).double()
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(60) % 3
    functions = {
        "plain": nn.CrossEntropyLoss(), "weighted": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]).double()),
        "ignoring": nn.CrossEntropyLoss(ignore_index=0), "sum": nn.CrossEntropyLoss(reduction="sum"),
        "opaque": lambda out, target: nn.functional.cross_entropy(out, target),
    }  # fmt: skip
    objective = Objective(net, functions[loss], (x, y), reduction="mean" if loss == "opaque" else None, chunk=10)
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, 60, (5, 4, 6), generator=generator)
    points = torch.randn(5, 4, objective.num_parameters, generator=generator, dtype=torch.float64)
    plain = torch.stack([objective.minibatch_gradients(p, i).mean(0) for p, i in zip(points, indices, strict=True)])
    torch.testing.assert_close(objective.averaged_gradients(points, indices), plain)
    shared = torch.stack([objective.minibatch_gradients(points[0], i).mean(0) for i in indices])
    torch.testing.assert_close(objective.averaged_gradients(points[0], indices), shared)
    alike = points[0, :1].expand(4, -1)
    one = torch.stack([objective.minibatch_gradients(alike, i).mean(0) for i in indices])
    torch.testing.assert_close(objective.averaged_gradients(points[0, 0], indices), one)


def test_a_scratch_file_changes_nothing() -> None:
    objective, learners = network()
    options = {"learning_rate": 0.7, "local_batch_size": 8, "num_draws": 5}
    held, spilled = (measure_noise(objective, learners, memory_budget=b, **options) for b in (None, 1000))  # type: ignore[arg-type]
    for name in held.data_vars:
        np.testing.assert_array_equal(held[name], spilled[name])


def test_rows_in_a_file_read_back_by_rows_and_columns() -> None:
    numbers = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    held, spilled = Rows((7, 11), numbers), Rows((7, 11), numbers, 100)
    assert (held.spilled, spilled.spilled) == (False, True)
    for rows in (held, spilled):
        rows.put(3, numbers[3:])
        rows.put(0, numbers[:3])
        assert torch.equal(rows.tensor(), numbers)
        assert torch.equal(rows.get(slice(2, 4)), numbers[2:4])
        assert torch.equal(torch.cat([part for _, part in rows.columns(4)], 1), numbers)


def test_gradient_points_follow_the_algorithm_that_made_the_checkpoint() -> None:
    objective, plain = network()
    mixing = (torch.full((4, 4), 0.1) + 0.6 * torch.eye(4)).double()

    def with_facts(**facts: object) -> Learners:
        return Learners(0, plain.weights, plain.layout, facts={"learning_rate": 0.7, "local_batch_size": 8, **facts})

    assert torch.equal(points_of(with_facts(algorithm="dpsgd", order="atc")), plain.weights)  # type: ignore[arg-type]
    cta = with_facts(algorithm="dpsgd", order="cta", mixing=mixing.tolist())
    found = measure_noise(objective, cta, num_draws=4)
    given = measure_noise(objective, cta, num_draws=4, points=mixing @ plain.weights)
    np.testing.assert_array_equal(found["Delta_2"], given["Delta_2"])
    star = with_facts(algorithm="ssgd-star", sigma0=0.1)
    noisy = measure_noise(objective, star, num_draws=4)
    same = measure_noise(objective, star, num_draws=4, points=weight_noise_points(star, 0.1))
    np.testing.assert_array_equal(noisy["Delta_2"], same["Delta_2"])
    assert float(noisy["Delta_2_mean"]) > 0
    for facts, missing in (
        ({"algorithm": "dpsgd", "order": "cta"}, "points=M"),
        ({"algorithm": "ssgd-star"}, "sigma0"),
    ):
        with pytest.raises(ValueError, match=missing):
            measure_noise(objective, with_facts(**facts), num_draws=4)


def test_one_learner_has_no_disagreement() -> None:
    objective, learners = network()
    one = Learners(0, learners.weights[:1], learners.layout)
    found = measure_noise(objective, one, learning_rate=0.7, local_batch_size=8, num_draws=4)
    assert float(found["Delta_2_mean"]) == 0
    assert math.isnan(float(found["systematic_share"]))


def test_groups_larger_than_a_chunk_are_taken_in_parts() -> None:
    objective, learners = network()
    small = Objective(
        objective.model.module, nn.CrossEntropyLoss(), (objective.data.inputs, objective.data.targets), chunk=3
    )  # type: ignore[union-attr]
    whole, parts = (reference_gradient(o, learners.mean, 48, num_groups=4) for o in (objective, small))
    torch.testing.assert_close(whole.groups, parts.groups)
    plain, chunked = (
        measure_noise(o, learners, learning_rate=0.7, local_batch_size=8, num_draws=3) for o in (objective, small)
    )
    np.testing.assert_allclose(plain["Delta"], chunked["Delta"], rtol=1e-10)


def test_rows_of_bfloat16_go_through_a_file() -> None:
    numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    spilled = Rows((3, 5), numbers, 10)
    spilled.put(0, numbers)
    assert torch.equal(spilled.tensor(), numbers)
