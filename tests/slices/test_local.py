"""Gradient fields and quadratic models against the derivatives of quadratics."""

import numpy as np
import pytest
import torch
from torch import nn

from landscape.curvature import hessian
from landscape.objective import Objective
from landscape.slices import Line, Plane, SmoothingKernel, gradient_field, plane_slice, quadratic_model, random_plane
from tests.slices.quadratics import network, quadratic, vectors

GRID = np.linspace(-1, 2, 4)


def test_quadratic_model_is_the_loss_of_a_quadratic() -> None:
    problem, plane = quadratic(), Plane(*vectors(3, 6))
    objective = problem.objective(chunk=16)
    model = quadratic_model(objective, plane)
    axes = plane.axes
    np.testing.assert_allclose(model.curvature, axes @ problem.hessian @ axes.T, rtol=1e-12)
    np.testing.assert_allclose(model.slope, axes @ problem.gradient(plane.origin), rtol=1e-12)
    found = plane_slice(objective, plane, GRID, GRID)
    grid = np.stack(np.meshgrid(GRID, GRID, indexing="ij"), -1)
    np.testing.assert_allclose(model.at(grid), found.loss, rtol=1e-12)
    lengths = plane.lengths(grid)
    turned = model.loss + lengths @ model.lengths_slope + ((lengths @ model.lengths_curvature) * lengths).sum(-1) / 2
    np.testing.assert_allclose(turned, found.loss, rtol=1e-11)
    assert model.asymmetry < 1e-14
    line = Line(plane.origin, plane.second)
    np.testing.assert_allclose(quadratic_model(objective, line).curvature, model.curvature[1:, 1:], rtol=1e-12)
    assert dict(model.to_xarray().sizes) == {"axis": 2, "other_axis": 2}


def test_own_products_are_those_of_the_curvature_package() -> None:
    net, x, y = network()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y), chunk=20)
    plane = random_plane(objective, dict(net.named_parameters()), vectors="tensor")
    own = quadratic_model(objective, plane)
    given = quadratic_model(objective, plane, hvp=hessian(objective, plane.origin).matvec)
    np.testing.assert_allclose(own.curvature, given.curvature, rtol=1e-10)
    step = 1e-3
    near = plane_slice(objective, plane, np.array([-step, step]), np.array([-step, step]))
    grid = np.stack(np.meshgrid([-step, step], [-step, step], indexing="ij"), -1)
    np.testing.assert_allclose(own.at(grid), near.loss, rtol=0, atol=100 * step**3)
    assert np.abs(own.at(grid) - near.loss).max() < 0.05 * np.abs(near.change).max()


@pytest.mark.parametrize("smoothed", [False, True])
def test_gradient_field_of_a_quadratic(smoothed: bool) -> None:
    problem, plane = quadratic(), Plane(*vectors(3, 6))
    deviations = vectors(9, 6, seed=2)  # of a mean that is not zero
    kernel = SmoothingKernel("own", deviations, antithetic=False) if smoothed else None
    found = gradient_field(problem.objective(), plane, GRID, GRID[:2], kernel=kernel)
    shift = deviations.mean(0) if smoothed else torch.zeros(6, dtype=torch.float64)
    for i, a in enumerate(GRID):
        for j, b in enumerate(GRID[:2]):
            g = problem.gradient(plane.origin + a * plane.first + b * plane.second + shift)
            np.testing.assert_allclose(found.slope[i, j], plane.axes @ g, rtol=1e-11)
            q = torch.linalg.qr(plane.axes.T)[0]
            np.testing.assert_allclose(np.linalg.norm(found.lengths_slope[i, j]), (q.T @ g).norm(), rtol=1e-11)
            assert found.norm[i, j] == pytest.approx(float(g.norm()))
    assert np.all(np.linalg.norm(found.lengths_slope, axis=-1) <= found.norm * (1 + 1e-12))
    dataset = found.to_xarray()
    assert dataset["slope"].dims == ("first", "second", "axis")
    assert dataset.attrs["kernel"] == ("own" if smoothed else "none")


def test_slopes_of_a_sampled_kernel_have_their_error_over_pairs() -> None:
    """Antithetic deviations cancel in the gradient of a quadratic; of a network they do not, and the pairs' spread is the error."""
    half = 0.5 * vectors(6, 6, seed=3)
    kernel = SmoothingKernel("isotropic", torch.cat([half, -half]), antithetic=True)
    exact = gradient_field(quadratic().objective(), Plane(*vectors(3, 6)), GRID[:2], GRID[:2], kernel=kernel)
    np.testing.assert_allclose(exact.slope_stderr, 0, atol=1e-14)
    net, x, y = network()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    half = 0.5 * vectors(6, objective.num_parameters, seed=3)
    kernel = SmoothingKernel("isotropic", torch.cat([half, -half]), antithetic=True)
    plane = random_plane(objective, dict(net.named_parameters()))
    found = gradient_field(objective, plane, GRID[:2], GRID[:2], kernel=kernel)
    at = plane.origin + GRID[1] * plane.first + GRID[0] * plane.second
    pairs = torch.stack([(objective.gradient(at + d) + objective.gradient(at - d)) / 2 for d in half]) @ plane.axes.T
    np.testing.assert_allclose(found.slope[1, 0], pairs.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.slope_stderr[1, 0], pairs.std(0) / 6**0.5, rtol=1e-10)


def test_slopes_are_the_differences_of_the_surface() -> None:
    net, x, y = network(norm=True)
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    plane = random_plane(objective, dict(net.named_parameters()))
    step = 1e-5
    found = gradient_field(objective, plane, np.array([0.3]), np.array([-0.2]), batch_norm="frozen")
    around = plane_slice(
        objective, plane, 0.3 + np.array([-step, 0, step]), -0.2 + np.array([-step, 0, step]), batch_norm="frozen"
    )
    differences = [around.loss[2, 1] - around.loss[0, 1], around.loss[1, 2] - around.loss[1, 0]]
    np.testing.assert_allclose(found.slope[0, 0], np.array(differences) / (2 * step), rtol=1e-6, atol=1e-8)


def test_statistics_that_move_with_the_weights_have_no_derivative_here() -> None:
    net, x, y = network(norm=True)
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    plane = random_plane(objective, dict(net.named_parameters()))
    with pytest.raises(ValueError, match="statistics move"):
        gradient_field(objective, plane, GRID, GRID, batch_norm="recalibrated")
    with pytest.raises(ValueError, match="statistics move"):
        quadratic_model(objective, plane, batch_norm="recalibrated")
