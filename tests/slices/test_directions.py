"""Directions and planes: lengths of filters, principal axes, projections and what they leave out."""

import numpy as np
import pytest
import torch
from torch import nn

from landscape.checkpoints import Learners
from landscape.functional import ParameterLayout
from landscape.objective import Objective
from landscape.slices import (
    Line,
    Plane,
    disagreement_plane,
    filter_normalised,
    line_between,
    plane_through,
    principal_axes,
    random_direction,
    random_line,
    random_plane,
    trajectory_plane,
)
from tests.slices.quadratics import network, vectors


@pytest.mark.parametrize("vector_rule", ["zero", "tensor"])
def test_every_filter_gets_the_length_of_the_weights_filter(vector_rule: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4)).double()
    layout = ParameterLayout.of(net)
    weights = layout.join(dict(net.named_parameters())).detach()
    drawn = vectors(1, len(weights))[0]
    found = layout.split(filter_normalised(drawn, weights, layout, vectors=vector_rule))
    own, before = layout.split(weights), layout.split(drawn)
    for name, part in found.items():
        if part.ndim == 1 and vector_rule == "zero":
            assert not part.any()
            continue
        rows = part.flatten(1) if part.ndim > 1 else part[None]
        theirs, raw = own[name].reshape(rows.shape), before[name].reshape(rows.shape)
        torch.testing.assert_close(rows.norm(dim=1), theirs.norm(dim=1), rtol=1e-14, atol=1e-15)
        cosine = (rows * raw).sum(1) / rows.norm(dim=1) / raw.norm(dim=1)
        if theirs.any():  # BatchNorm's shift starts at zero, and so does its filter
            torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-14, atol=0)


def test_zero_filters_stay_zero_and_unknown_rules_are_refused() -> None:
    layout = ParameterLayout(("a", "b"), (torch.Size([3, 2]), torch.Size([])))
    weights = torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 2.0])
    found = filter_normalised(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, -5.0]), weights, layout, vectors="tensor")
    assert found[2:6].tolist() == [0.0] * 4
    assert found[6] == -2.0
    with pytest.raises(ValueError, match="'zero' or 'tensor'"):
        filter_normalised.__wrapped__(weights, weights, layout, vectors="all")


def test_random_directions_are_a_function_of_seed_and_index() -> None:
    net, x, y = network()
    objective = Objective(net, nn.CrossEntropyLoss(), (x, y))
    origin = objective.flat(dict(net.named_parameters()))
    state = torch.get_rng_state()
    plane, again, other = (random_plane(objective, origin, seed=s) for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(plane.axes, again.axes)
    assert not torch.equal(plane.first, other.first)
    assert torch.equal(plane.first, random_line(objective, dict(net.named_parameters()), seed=3).direction)
    assert torch.equal(plane.second, random_direction(origin, objective.model.layout, seed=3, index=1))
    assert plane.attributes["seed"] == 3


def test_principal_axes_of_a_constructed_trajectory() -> None:
    basis = torch.linalg.qr(vectors(9, 9))[0]
    time = torch.linspace(1, 0, 30, dtype=torch.float64)
    away = torch.stack([5 * time, 2 * torch.sin(7 * time), 0.1 * torch.cos(11 * time) - 0.1], 1)
    origin = vectors(1, 9, seed=8)[0]
    trajectory = origin + away @ basis[:3]
    truth = np.linalg.svd(away.numpy() - away[-1].numpy())
    found = principal_axes(trajectory, trajectory[-1], 3)
    torch.testing.assert_close(found.axes @ found.axes.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.shares, truth[1] ** 2 / (truth[1] ** 2).sum(), rtol=1e-8)
    expected = torch.from_numpy(truth[2]) @ basis[:3]
    np.testing.assert_allclose((expected * found.axes).sum(1).abs().numpy(), 1, rtol=1e-10)
    along = (trajectory - trajectory[-1]) @ found.axes.T
    assert (along.gather(0, along.abs().argmax(0)[None]) > 0).all()
    plane = trajectory_plane(trajectory)
    projection = plane.project(trajectory)
    np.testing.assert_allclose(projection.left_out, np.abs((away - away[-1]).numpy() @ truth[2][2]), atol=1e-12)
    assert sum(plane.shares) == pytest.approx(1 - (projection.left_out**2).sum() / (projection.distance**2).sum(), abs=1e-12)  # fmt: skip


def test_a_random_walk_has_the_shares_that_brownian_motion_says() -> None:
    walk = torch.randn(300, 4000, generator=torch.Generator().manual_seed(0)).cumsum(0)
    np.testing.assert_allclose(trajectory_plane(walk).shares, 8 / np.pi**2 / np.array([1, 9]), rtol=0.05)


def test_principal_axes_need_points_that_differ_in_so_many_directions() -> None:
    line = torch.outer(torch.arange(5.0), torch.ones(4))
    assert principal_axes(line, line[0], 1).axes[0].tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="span 1 direction"):
        trajectory_plane(line)
    with pytest.raises(ValueError, match="span 0 direction"):
        principal_axes(line[:1], line[0], 1)
    with pytest.raises(ValueError, match="not finite"):
        principal_axes(line * torch.inf, line[0], 1)


def test_disagreement_plane_of_three_learners_leaves_nothing_out() -> None:
    weights = vectors(3, 50)
    layout = ParameterLayout(("w",), (torch.Size([50]),))
    plane = disagreement_plane(Learners(0, weights, layout))
    projection = plane.project(weights)
    np.testing.assert_allclose(projection.left_out, 0, atol=1e-13)
    assert sum(plane.shares) == pytest.approx(1)
    np.testing.assert_allclose(projection.coordinates.sum(0), 0, atol=1e-13)  # about w_a
    with pytest.raises(ValueError, match="span 1 direction"):
        disagreement_plane(Learners(0, weights[:2], layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_obeys_pythagoras_on_skewed_axes(dtype: torch.dtype) -> None:
    origin, first, second, *rest = vectors(8, 300_000).to(dtype)  # longer than a chunk
    second = first * 3 + 0.01 * second
    plane = Plane(origin, first, second)
    inside = origin.double() + 2 * first.double() - 0.5 * second.double()
    points = torch.stack([origin, inside.to(dtype), *rest])
    found = plane.project(points)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    np.testing.assert_allclose(found.coordinates[:2], [[0, 0], [2, -0.5]], atol=tolerance)
    np.testing.assert_allclose((found.lengths**2).sum(1) + found.left_out**2, found.distance**2, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.lengths, plane.lengths(found.coordinates), rtol=1e-12)
    assert found.left_out[1] < tolerance
    dense = torch.stack([first, second]).double()
    best = torch.linalg.lstsq(dense.T, (points - origin).double().T).solution.T
    residual = ((points - origin).double() - best @ dense).norm(dim=1)
    np.testing.assert_allclose(found.left_out[2:], residual[2:], rtol=1e-9)
    dataset = found.to_xarray()
    assert dict(dataset.sizes) == {"point": 7, "axis": 2}
    assert dataset["left_out"].attrs["units"] == "weights"


def test_lines_and_planes_between_given_weights() -> None:
    a, b, c = vectors(3, 20)
    line = line_between(a, b)
    assert line.length == pytest.approx(float((b - a).norm()))
    np.testing.assert_allclose(
        line.project(torch.stack([a, b, (a + b) / 2])).coordinates[:, 0], [0, 1, 0.5], atol=1e-14
    )
    plane = plane_through(a, b, c)
    np.testing.assert_allclose(plane.project(torch.stack([a, b, c])).coordinates, [[0, 0], [1, 0], [0, 1]], atol=1e-13)
    np.testing.assert_allclose(plane.project(c[None]).left_out, 0, atol=1e-13)
    t = plane.triangle
    np.testing.assert_allclose(t @ t.T, (plane.axes @ plane.axes.T).numpy(), rtol=1e-12)
    with pytest.raises(ValueError, match="zero or not finite"):
        line_between(a, a)
    with pytest.raises(ValueError, match="parallel"):
        Plane(a, b, -2 * b)
    with pytest.raises(ValueError, match="zero or not finite"):
        Line(a, b * torch.nan)
