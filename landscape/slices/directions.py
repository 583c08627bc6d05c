"""Directions in weight space: random filter-normalised ones, and principal axes of points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape import streams
from landscape.functional import ParameterLayout

CHUNK = 1 << 18
"""Coordinates that are converted to float64 at once."""

Vectors = Literal["zero", "tensor"]
"""What a filter-normalised direction is on biases and on BatchNorm's parameters: zero, or scaled as one tensor."""


def filter_normalised(
    direction: Float[Tensor, " d"],
    weights: Float[Tensor, " d"],
    layout: ParameterLayout,
    *,
    vectors: Vectors = "zero",
) -> Float[Tensor, " d"]:
    r"""A direction with each filter scaled to the length of the weights' own filter.

    $$d_{i} \leftarrow \frac{d_{i}}{|d_{i}|} |w_{i}|$$

    A filter is a row along the first axis of a parameter of two or more axes: what feeds one output of a linear layer or one output
    channel of a convolution (one token of an embedding; one input channel of a transposed convolution, whose axes are the other way
    round). Biases and BatchNorm's parameters have one axis or none: "zero" leaves them where they are, as Li et al. do; "tensor" scales each
    as a whole. Where the weights' filter, or the direction's, is zero, so is the result.

    Args:
        direction: (d,), any.
        weights: (d,), those that the slice goes through.
        layout: of both.
        vectors: see above.

    Source: Li, Xu, Taylor, Studer & Goldstein, arXiv 1712.09913 (2018), sec. 4.

    >>> layout = ParameterLayout(("weight", "bias"), (torch.Size([2, 2]), torch.Size([2])))
    >>> filter_normalised(torch.tensor([3., 4., 0., 2., 1., 1.]), torch.tensor([1., 0., 0., 6., 5., 5.]), layout).tolist()
    [0.6000000238418579, 0.800000011920929, 0.0, 6.0, 0.0, 0.0]
    """
    if vectors not in ("zero", "tensor"):
        raise ValueError(f"vectors {vectors!r}; use 'zero' or 'tensor'")
    own = layout.split(weights)
    scaled = {}
    for name, part in layout.split(direction).items():
        if part.ndim < 2 and vectors == "zero":
            scaled[name] = torch.zeros_like(part)
            continue
        rows = part.reshape(len(part) if part.ndim > 1 else 1, -1).double()
        lengths = own[name].reshape(rows.shape).double().norm(dim=1)
        norms = rows.norm(dim=1)
        factors = torch.where(norms > 0, lengths / torch.where(norms > 0, norms, 1.0), 0.0)
        scaled[name] = (rows * factors[:, None]).reshape(part.shape).to(part.dtype)
    return layout.join(scaled)


def random_direction(
    weights: Float[Tensor, " d"],
    layout: ParameterLayout,
    *,
    seed: int = 0,
    index: int = 0,
    vectors: Vectors = "zero",
) -> Float[Tensor, " d"]:
    """A filter-normalised direction of independent normal numbers, a pure function of (seed, index) and the weights."""
    generator = streams.torch_generator("slice direction", seed, index)
    drawn = torch.randn(len(weights), generator=generator).to(weights)
    return filter_normalised(drawn, weights, layout, vectors=vectors)


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal axes of points about an origin.

    Attributes:
        axes: (k, d) orthonormal, the most important first; the point farthest along an axis is on its positive side.
        shares: (k,) of the summed squared distance to the origin that lies along each.
    """

    axes: Float[Tensor, "k d"]
    shares: np.ndarray


def principal_axes(points: Float[Tensor, "m d"], origin: Float[Tensor, " d"], count: int = 2) -> PrincipalAxes:
    """The orthonormal directions through the origin that leave out least of the points' squared distance to it.

    Deviations are taken from the origin and not from the points' own mean, which the two agree on only where the origin is that mean
    (w_a of its learners). The m x m Gram matrix is formed in float64 and never a d x d one.

    Args:
        points: (m, d).
        origin: (d,).
        count: k.

    Raises:
        ValueError: the deviations span fewer than k directions, or are not finite.
    """
    gram = torch.zeros(len(points), len(points), dtype=torch.float64, device=points.device)
    for part in _parts(points.shape[1]):
        rows = points[:, part].double() - origin[part].to(points.device).double()
        gram += rows @ rows.T
    if not torch.isfinite(gram).all():
        raise ValueError("the points, or the origin, hold weights that are not finite")
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(gram))
    rank = int((values > len(points) * 1e-15 * values[0].clamp(min=0)).sum()) if len(points) else 0
    if rank < count:
        raise ValueError(f"{len(points)} points span {rank} direction(s) about the origin, and {count} are asked for: give points that differ more")  # fmt: skip
    top = vectors[:, :count]
    far = (top * values[:count].sqrt()).abs().argmax(0)
    top = top * torch.sign(top[far, torch.arange(count, device=top.device)])
    axes = torch.empty(count, points.shape[1], dtype=points.dtype, device=points.device)
    for part in _parts(points.shape[1]):
        rows = points[:, part].double() - origin[part].to(points.device).double()
        axes[:, part] = ((top.T @ rows) / values[:count].sqrt()[:, None]).to(axes)
    return PrincipalAxes(axes, (values[:count] / values.clamp(min=0).sum()).cpu().numpy())


def _parts(dimension: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, dimension, CHUNK)]
