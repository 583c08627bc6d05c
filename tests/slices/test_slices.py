"""Losses along lines and over planes against closed forms, and errors over examples against their scatter."""

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from landscape.objective import Objective
from landscape.results import load_groups, save_groups
from landscape.slices import (
    Line,
    Plane,
    SmoothingKernel,
    line_between,
    line_slice,
    plane_slice,
    quadratic_model,
    random_plane,
)
from landscape.slices.surfaces import PlaneSlice
from tests.slices.quadratics import Quadratic, mirrored_minima, network, quadratic, vectors

GRID = np.linspace(-1, 1.5, 6)


def points_of(plane: Plane, first: np.ndarray, second: np.ndarray) -> torch.Tensor:
    a, b = (torch.from_numpy(g)[..., None] for g in np.meshgrid(first, second, indexing="ij"))
    return plane.origin + a * plane.first + b * plane.second


def learners_kernel(count: int, dimension: int) -> SmoothingKernel:
    rows = vectors(count, dimension, seed=11)
    return SmoothingKernel("learners", rows - rows.mean(0), antithetic=False)


@pytest.mark.parametrize("chunk", [None, 7, 64])
def test_plane_and_line_of_a_quadratic(chunk: int | None) -> None:
    problem = quadratic()
    plane = Plane(*vectors(3, 6))
    found = plane_slice(problem.objective(chunk=chunk), plane, GRID, GRID[:4])
    np.testing.assert_allclose(found.loss, problem.loss(points_of(plane, GRID, GRID[:4])), rtol=1e-12)
    np.testing.assert_allclose(found.change, found.loss - float(problem.loss(plane.origin)), atol=1e-12)
    assert found.origin_loss == pytest.approx(float(problem.loss(plane.origin)))
    assert found.evaluated.all()
    assert not found.loss_stderr.any()
    assert not found.change_stderr.any()
    line = Line(plane.origin, plane.first)
    along = line_slice(problem.objective(chunk=chunk), line, GRID)
    np.testing.assert_allclose(
        along.loss, problem.loss(plane.origin + torch.from_numpy(GRID)[:, None] * plane.first), rtol=1e-12
    )
    assert not along.covariance.any()


def test_loss_smoothed_by_the_learners_is_the_loss_and_half_the_trace() -> None:
    problem = quadratic()
    plane, kernel = Plane(*vectors(3, 6)), learners_kernel(5, 6)
    half_trace = float(((kernel.deviations @ problem.hessian) * kernel.deviations).sum(1).mean()) / 2
    for chunk in (None, 3):
        found = plane_slice(problem.objective(chunk=chunk), plane, GRID, GRID, kernel=kernel)
        np.testing.assert_allclose(found.loss, problem.loss(points_of(plane, GRID, GRID)) + half_trace, rtol=1e-12)
        assert found.origin_loss == pytest.approx(float(problem.loss(plane.origin)) + half_trace)
        assert not found.smoothing_stderr.any()
        assert found.to_xarray().attrs["kernel"] == "learners"
    line = line_slice(problem.objective(), Line(plane.origin, plane.first), GRID, kernel=kernel)
    np.testing.assert_allclose(
        line.loss, plane_slice(problem.objective(), plane, GRID, np.zeros(1), kernel=kernel).loss[:, 0]
    )


def test_many_deviations_are_taken_a_few_at_a_time() -> None:
    net, x, y = network()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), memory_budget=3 * 51 * 8 * 4)
    plane = random_plane(objective, dict(net.named_parameters()))
    kernel = learners_kernel(11, objective.num_parameters)
    found = plane_slice(objective, plane, GRID[:2], GRID[:2], kernel=kernel)
    direct = [
        [np.mean([objective.value(w + d) for d in kernel.deviations]) for w in row]
        for row in points_of(plane, GRID[:2], GRID[:2])
    ]
    np.testing.assert_allclose(found.loss, direct, rtol=1e-12)


@pytest.mark.parametrize("loss", ["mean", "weighted", "sum"])
def test_batched_evaluation_equals_a_loop(loss: str) -> None:
    net, x, y = network()
    options = {"weighted": {"weight": torch.tensor([0.2, 1.0, 3.0]).double()}, "sum": {"reduction": "sum"}}.get(
        loss, {}
    )
    objective = Objective(net, nn.CrossEntropyLoss(**options), (x, y), chunk=100)
    plane = random_plane(objective, dict(net.named_parameters()), seed=1, vectors="tensor")
    found = plane_slice(objective, plane, GRID, GRID)
    looped = [[objective.value(w) for w in row] for row in points_of(plane, GRID, GRID)]
    np.testing.assert_allclose(found.loss, looped, rtol=1e-13)
    line = line_slice(objective, Line(plane.origin, plane.second), GRID)
    np.testing.assert_allclose(line.loss, [objective.value(plane.origin + t * plane.second) for t in GRID], rtol=1e-13)


# Errors over examples ------------------------------------------------------------------------------------------------


def test_standard_errors_are_those_of_the_examples_losses() -> None:
    problem = quadratic(num_examples=30)
    plane, population = Plane(*vectors(3, 6)), 100
    losses = problem.example_losses(points_of(plane, GRID, GRID)).numpy()
    here = problem.example_losses(plane.origin).numpy()
    shrink = math.sqrt((1 - 30 / population) / 30)
    found = plane_slice(problem.objective(chunk=20), plane, GRID, GRID, population=population)
    np.testing.assert_allclose(found.loss_stderr, losses.std(-1, ddof=1) * shrink, rtol=1e-10)
    np.testing.assert_allclose(found.change_stderr, (losses - here).std(-1, ddof=1) * shrink, rtol=1e-10, atol=1e-15)
    line = line_slice(problem.objective(chunk=20), Line(plane.origin, plane.first), GRID, population=math.inf)
    along = problem.example_losses(plane.origin + torch.from_numpy(GRID)[:, None] * plane.first).numpy()
    np.testing.assert_allclose(line.covariance, np.cov(along) / 30, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(line.loss_stderr, along.std(-1, ddof=1) / math.sqrt(30), rtol=1e-10)
    gap = line.difference(4, 1)
    assert gap.value == pytest.approx((along[4] - along[1]).mean())
    assert gap.stderr == pytest.approx((along[4] - along[1]).std(ddof=1) / math.sqrt(30))
    assert gap.stderr < np.hypot(line.loss_stderr[4], line.loss_stderr[1])
    exact = plane_slice(problem.objective(), plane, GRID[:2], GRID[:2], population=30)
    assert not exact.loss_stderr.any()


def test_errors_of_a_smoothed_loss_are_those_of_the_examples_smoothed_losses() -> None:
    problem, kernel = quadratic(num_examples=30), learners_kernel(4, 6)
    plane = Plane(*vectors(3, 6))
    found = plane_slice(problem.objective(chunk=20), plane, GRID[:2], GRID[:3], kernel=kernel, population=math.inf)
    points = points_of(plane, GRID[:2], GRID[:3])
    losses = problem.example_losses(points[..., None, :] + kernel.deviations).mean(-2).numpy()
    np.testing.assert_allclose(found.loss_stderr, losses.std(-1, ddof=1) / math.sqrt(30), rtol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_scatter_over_choices_of_examples_is_what_the_errors_say(weighted: bool) -> None:
    """Z-scores of losses, changes and differences over 200 choices of 80 among 400 examples have an rms near 1."""
    net, x, y = network(num_examples=400)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]).double() if weighted else None)
    whole = Objective(net, loss, (x, y))
    origin = whole.flat(dict(net.named_parameters()))
    line = Line(origin, vectors(1, len(origin))[0])
    plane = Plane(origin, *vectors(2, len(origin)))
    at, grid = np.array([0.0, 0.5, 1.0]), np.array([0.1, 1.0])
    truth_line, truth = line_slice(whole, line, at), plane_slice(whole, plane, grid, grid)
    scores: dict[str, list] = {"loss": [], "change": [], "difference": [], "line": []}
    for seed in range(200):
        chosen = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:80]
        part = Objective(net, loss, (x[chosen], y[chosen]))
        found = plane_slice(part, plane, grid, grid, population=400)
        scores["loss"].append((found.loss - truth.loss) / found.loss_stderr)
        scores["change"].append((found.change - truth.change) / found.change_stderr)
        along = line_slice(part, line, at, population=400)
        gap = along.difference(2, 1)
        scores["difference"].append((gap.value - truth_line.difference(2, 1).value) / gap.stderr)
        scores["line"].append((along.loss - truth_line.loss) / along.loss_stderr)
    for name, z in scores.items():
        rms = np.sqrt(np.mean(np.square(z), axis=0))
        assert np.all((rms > 0.8) & (rms < 1.2)), (name, rms)
        assert np.all(np.abs(np.mean(z, axis=0)) < 4 / math.sqrt(200) + 0.1), name


def test_smoothing_errors_are_over_antithetic_pairs() -> None:
    """On a quadratic a pair's mean is L + delta^T H delta/2 exactly, so the change with position has no error at all."""
    problem, plane = quadratic(), Plane(*vectors(3, 6))
    truth = problem.loss(points_of(plane, GRID, GRID)).numpy() + float(problem.hessian.trace()) / 2
    scores = []
    for seed in range(100):
        half = vectors(40, 6, seed=100 + seed)
        kernel = SmoothingKernel("isotropic", torch.cat([half, -half]), antithetic=True)
        found = plane_slice(problem.objective(), plane, GRID[:2], GRID[:2], kernel=kernel)
        pairs = ((half @ problem.hessian) * half).sum(1).numpy() / 2
        np.testing.assert_allclose(found.smoothing_stderr, pairs.std(ddof=1) / math.sqrt(40), rtol=1e-9)
        np.testing.assert_allclose(found.smoothing_change_stderr, 0, atol=1e-12)
        scores.append((found.loss[0, 0] - truth[0, 0]) / found.smoothing_stderr[0, 0])
    assert 0.75 < np.sqrt(np.mean(np.square(scores))) < 1.3
    with pytest.raises(ValueError, match="sign changed"):
        SmoothingKernel("isotropic", half, antithetic=True)
    with pytest.raises(ValueError, match="needs deviations"):
        SmoothingKernel("none", half[:0], antithetic=False)
    one = SmoothingKernel("isotropic", torch.stack([half[0], -half[0]]), antithetic=True)
    assert np.isnan(plane_slice(problem.objective(), plane, GRID[:2], GRID[:2], kernel=one).smoothing_stderr).all()


# Barriers ------------------------------------------------------------------------------------------------------------


def test_barrier_between_two_minima_that_differ_by_a_permutation() -> None:
    objective, weights, other = mirrored_minima()
    t = np.linspace(0, 1, 21)
    found = line_slice(objective, line_between(weights, other), t, population=math.inf)
    assert found.loss[0] == pytest.approx(found.loss[-1], rel=1e-12)
    barrier = found.barrier()
    assert barrier.height.value > 0.1
    assert barrier.height.value == pytest.approx(found.loss.max() - found.loss[0])
    top = int(found.loss.argmax())
    ((inputs, targets),) = [(x, y) for _, x, y in objective.batches()]
    assert barrier.position == t[top]
    with torch.no_grad():
        each = [nn.functional.cross_entropy(objective.model.output(w, {}, inputs), targets, reduction="none").numpy()
                for w in (weights + t[top] * (other - weights), weights, other)]  # fmt: skip
    excess = each[0] - (1 - t[top]) * each[1] - t[top] * each[2]
    assert barrier.height.value == pytest.approx(excess.mean())
    assert barrier.height.stderr == pytest.approx(excess.std(ddof=1) / math.sqrt(50), rel=1e-9)


def test_a_convex_loss_has_no_barrier_and_a_barrier_needs_both_ends() -> None:
    problem = quadratic()
    a, b = vectors(2, 6)
    barrier = line_slice(problem.objective(), line_between(a, b), np.linspace(-0.5, 1.5, 21)).barrier()
    assert barrier.height.value == 0
    assert barrier.position in (0.0, 1.0)
    with pytest.raises(ValueError, match="have both among the positions"):
        line_slice(problem.objective(), line_between(a, b), np.linspace(0, 0.9, 5)).barrier()


# What is not finite, and what is refused -----------------------------------------------------------------------------


def test_losses_that_overflow_stay_infinite_without_errors() -> None:
    problem = quadratic()
    plane = Plane(*vectors(3, 6))
    wide = np.array([-1e160, 0.0, 1.0])
    found = plane_slice(problem.objective(), plane, wide, wide, population=math.inf)
    assert np.isinf(found.loss[0, 1])
    assert np.isnan(found.loss_stderr[0, 1])
    assert np.isfinite(found.loss[1:, 1:]).all()
    assert np.isfinite(found.loss_stderr[1:, 1:]).all()
    line = line_slice(
        problem.objective(dtype=torch.float32), Line(plane.origin, 1e25 * plane.first), np.array([0.0, 0.5, 1.0])
    )
    assert line.barrier().height.value == math.inf
    assert line.barrier().position == 0.5
    bad = Quadratic(torch.full_like(problem.inputs, torch.nan), problem.targets)
    with pytest.raises(ValueError, match="nan or infinity"):
        plane_slice(bad.objective(), plane, GRID, GRID)


def test_what_makes_no_sense_is_refused() -> None:
    problem, plane = quadratic(), Plane(*vectors(3, 6))
    for grid in (np.array([1.0, 0.0]), np.array([]), np.array([0.0, np.nan]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="rising order"):
            plane_slice(problem.objective(), plane, grid, GRID)
    with pytest.raises(ValueError, match="cannot be a choice from 10"):
        plane_slice(problem.objective(), plane, GRID, GRID, population=10)
    net, x, y = network()
    opaque = Objective(net, lambda z, t: nn.functional.cross_entropy(z, t), (x, y), reduction="mean")
    flat = opaque.flat(dict(net.named_parameters()))
    plane = random_plane(opaque, flat)
    with pytest.raises(ValueError, match="single, independent examples"):
        plane_slice(opaque, plane, GRID, GRID, population=math.inf)
    found = plane_slice(opaque, plane, GRID[:2], GRID[:2])
    np.testing.assert_allclose(found.loss[0, 1], opaque.value(points_of(plane, GRID, GRID)[0, 1]), rtol=1e-12)
    single = quadratic(num_examples=1)
    alone = plane_slice(single.objective(), Plane(*vectors(3, 6)), GRID, GRID, population=math.inf)
    assert np.isnan(alone.loss_stderr).all()


# Refinement, BatchNorm and the labelled form -------------------------------------------------------------------------


def test_refined_slice_equals_the_full_one_where_it_was_evaluated() -> None:
    net, x, y = network()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    plane = random_plane(objective, dict(net.named_parameters()))
    grid = np.linspace(-3, 3, 41)
    full = plane_slice(objective, plane, grid, grid, population=math.inf)
    found = plane_slice(objective, plane, grid, grid, population=math.inf, tolerance=0.02, coarse=8)
    assert 0.05 < found.evaluated.mean() < 0.8
    for name in ("loss", "loss_stderr", "change", "change_stderr"):
        np.testing.assert_allclose(
            getattr(found, name)[found.evaluated], getattr(full, name)[found.evaluated], rtol=1e-11
        )
    assert np.abs(found.loss - full.loss).max() < 0.02
    assert np.isnan(found.loss_stderr[~found.evaluated]).all()
    np.testing.assert_allclose(found.change, found.loss - found.origin_loss, atol=1e-12)
    attributes = found.to_xarray().attrs
    assert (attributes["tolerance"], attributes["relative_tolerance"]) == (0.02, 0.0)


def norm_slice(policy: str | None, **options: object) -> tuple[PlaneSlice, Objective, torch.Tensor]:
    net, x, y = network(norm=True)
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), **options)
    plane = random_plane(objective, dict(net.named_parameters()))
    return plane_slice(objective, plane, GRID[:3], GRID[:3], batch_norm=policy), objective, points_of(plane, GRID[:3], GRID[:3])  # fmt: skip


def test_batch_norm_is_what_the_policy_says() -> None:
    found, objective, points = norm_slice("running")
    np.testing.assert_allclose(found.loss, [[objective.value(w) for w in row] for row in points], rtol=1e-12)
    found, objective, points = norm_slice("frozen")
    net, _, _ = network(norm=True)
    held = objective.recalibrated(dict(net.named_parameters()))
    np.testing.assert_allclose(found.loss, [[held.value(w) for w in row] for row in points], rtol=1e-12)
    found, objective, points = norm_slice("recalibrated")
    np.testing.assert_allclose(
        found.loss, [[objective.recalibrated(w).value(w) for w in row] for row in points], rtol=1e-12
    )
    found, objective, points = norm_slice("ghost", batch_norm="ghost", batch_size=10)
    np.testing.assert_allclose(found.loss, [[objective.value(w) for w in row] for row in points], rtol=1e-12)
    assert found.to_xarray().attrs["batch_norm"] == "ghost"
    assert found.batch_norm == "ghost"


def test_batch_norm_must_be_decided_and_fit_the_objective() -> None:
    with pytest.raises(ValueError, match="say what its statistics are"):
        norm_slice(None)
    with pytest.raises(ValueError, match="made with batch_norm='running'"):
        norm_slice("ghost")
    with pytest.raises(ValueError, match="made with batch_norm='ghost'"):
        norm_slice("frozen", batch_norm="ghost", batch_size=10)
    net, x, y = network(norm=True)
    net[1] = nn.BatchNorm1d(6, track_running_stats=False).double()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    plane = random_plane(objective, dict(net.named_parameters()))
    with pytest.raises(ValueError, match="keeps no running statistics"):
        plane_slice(objective, plane, GRID, GRID, batch_norm="frozen")
    ghosts = Objective(network(norm=True)[0], nn.CrossEntropyLoss(), (x, y), batch_norm="ghost", batch_size=10)
    with pytest.raises(ValueError, match="independent examples"):
        plane_slice(ghosts, plane, GRID, GRID, batch_norm="ghost", population=math.inf)


def test_labelled_forms_say_where_they_come_from_and_can_be_stored(tmp_path: Path) -> None:
    net, x, y = network()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    plane = random_plane(objective, dict(net.named_parameters()), seed=7)
    dataset = plane_slice(objective, plane, GRID, GRID[:3], population=1000).to_xarray()
    assert dataset["loss"].dims == ("first", "second")
    assert dataset["loss"].attrs["units"] == "nats"
    assert dataset.attrs["plane_seed"] == 7
    assert "filter-normalised" in dataset.attrs["plane_kind"]
    assert (dataset.attrs["population"], dataset.attrs["num_examples"], dataset.attrs["batch_norm"]) == (
        1000,
        50,
        "no BatchNorm",
    )
    np.testing.assert_allclose(
        dataset["first_length"][:, 0] - dataset["first_length"][0, 0], (GRID - GRID[0]) * float(plane.first.norm())
    )
    line = line_slice(objective, Line(plane.origin, plane.first, seed=7), GRID).to_xarray()
    assert line["covariance"].dims == ("position", "other_position")
    assert (line.attrs["seed"], line.attrs["population"]) == (7, "all")
    save_groups({"plane": dataset, "line": line}, tmp_path / "slices.nc")
    stored = load_groups(tmp_path / "slices.nc")
    np.testing.assert_array_equal(stored["plane"]["loss"], dataset["loss"])
    assert stored["line"].attrs["seed"] == 7
    before = {n: p.clone() for n, p in net.state_dict().items()}
    assert net.training
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_what_was_stored_is_drawn_again(tolerance: float | None, tmp_path: Path) -> None:
    """All but the weights comes back from a file: numbers, axes with their lengths and angle, names, kernel, examples."""
    problem = quadratic()
    origin, first, second = vectors(3, 6)
    plane = Plane(origin, first, second, "chosen", ("one", "other"), seed=3, shares=(0.5, 0.25))
    objective, kernel = problem.objective(), learners_kernel(5, 6)
    surface = plane_slice(objective, plane, GRID, GRID[:4], kernel=kernel, population=1000, tolerance=tolerance)
    line = line_slice(objective, Line(origin, first, "chosen", "one", seed=3), GRID, population=math.inf)
    seen, model = plane.project(vectors(4, 6, seed=5)), quadratic_model(objective, plane)
    made = {"surface": surface, "line": line, "seen": seen, "model": model}
    save_groups({name: one.to_xarray() for name, one in made.items()}, tmp_path / "slices.nc")
    kept = load_groups(tmp_path / "slices.nc")
    for name, one in made.items():
        again = type(one).from_xarray(kept[name])
        for field in fields(one):
            before, after = getattr(one, field.name), getattr(again, field.name)
            if isinstance(before, Plane | Line):
                for key, value in before.attributes.items():
                    assert after.attributes[key] == (
                        value if isinstance(value, str) else pytest.approx(value, rel=1e-12)
                    )
            elif isinstance(before, np.ndarray):
                np.testing.assert_array_equal(after, before)
            elif field.name == "description":  # of which BatchNorm's is the slice's own
                assert {k: v for k, v in before.items() if k != "batch_norm"}.items() <= after.items()
            else:
                assert after == before, field.name
    again = PlaneSlice.from_xarray(kept["surface"])
    np.testing.assert_allclose(again.lengths, surface.lengths, rtol=1e-12, atol=1e-12)
    assert again.plane.names == ("one", "other")
