"""Second derivatives of one batch at one weight vector, as linear maps that are set up once and used many times.

The graph of the gradient (or of the output) is built when a map is made and kept by it; a product is then one backward pass through
it. In units of a gradient of a convolutional network: 2 for the Hessian (of 3 with a graph built anew), 4/3 for a Gauss-Newton
product; of a network whose first layer dominates: 1 and 1. Several directions go through one batched pass where that pays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from landscape.autodiff import explain, graph_bytes, twice_differentiable
from landscape.functional import Buffers, FunctionalModel, ParameterLayout, clone_buffers
from landscape.losses import scores

OutputCurvature = Literal["hessian", "fisher"]
"""What stands between the Jacobians of a Gauss-Newton matrix: the loss's Hessian over the output, or the Fisher information there."""


@dataclass(frozen=True)
class Linearised:
    """A symmetric map of directions in weight space, for the summed contributions of one batch.

    Attributes:
        layout: of the weights.
        multiply: directions by parameter, (k, *shape) each or without the first axis, and whether they have it -> the same of the product.
        total: the summed contributions; finite or not.
        norm: the summed example weights.
        roots: tensors whose autograd graph the map keeps.
        num_examples: B.
    """

    layout: ParameterLayout
    multiply: Callable[[list[Tensor], bool], list[Tensor]]
    total: Tensor
    norm: Tensor
    roots: tuple[Tensor, ...]
    num_examples: int

    def __call__(self, rows: Float[Tensor, "k d"], *, at_once: int = 1) -> Float[Tensor, "k d"]:
        """Products with k directions, at most `at_once` of them in one batched pass."""
        parts = []
        for start in range(0, len(rows), max(1, at_once)):
            some = rows[start : start + max(1, at_once)]
            batched = len(some) > 1
            directions = list(self.layout.split(some if batched else some[0]).values())
            product = self.multiply(directions, batched)
            parts.append(torch.cat([p.reshape(len(some), -1) for p in product], dim=1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def num_bytes(self, without: Sequence[Tensor] = ()) -> int:
        """Memory that the map keeps, but for the tensors given (weights, data)."""
        return graph_bytes(self.roots, without=without)


def hessian_map(
    model: FunctionalModel, weights: Float[Tensor, " d"], buffers: Buffers, inputs: Any, targets: Any
) -> Linearised:
    """The Hessian of the summed contributions."""
    leaves, contributions, norm = _contributions(model, weights, buffers, inputs, targets)
    total = contributions.sum()
    gradients = _gradients([total], list(leaves.values()), create_graph=True)
    kept = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]  # others enter at most linearly

    def multiply(directions: list[Tensor], batched: bool) -> list[Tensor]:
        held = list(leaves.values())
        if not kept:
            return [torch.zeros_like(v) for v in directions]
        roots = [g for i in kept if (g := gradients[i]) is not None]
        return _pull(roots, held, [directions[i] for i in kept], directions, batched)

    roots = tuple(g for i in kept if (g := gradients[i]) is not None)
    return Linearised(model.layout, multiply, total.detach(), norm, roots, _count(contributions, norm, model))


def gauss_newton_map(
    model: FunctionalModel,
    weights: Float[Tensor, " d"],
    buffers: Buffers,
    inputs: Any,
    targets: Any,
    curvature: OutputCurvature = "hessian",
) -> Linearised:
    """J^T F J of the summed contributions, J the output's Jacobian and F the loss's Hessian over the output (or the Fisher information)."""
    leaves = _leaves(model, weights)
    with twice_differentiable(weights.device):
        output = model.forward(leaves, clone_buffers(buffers), inputs)
        if curvature == "fisher" or not _differentiable(output):  # or a structure of a kind torch does not know
            output = scores(output)
        flat, structure = tree_flatten(output)
        chosen = [i for i, z in enumerate(flat) if isinstance(z, Tensor) and z.requires_grad]
        if not chosen:
            raise ValueError(
                f"the network's output, of type {type(output).__name__}, holds no tensor that depends on the weights"
            )
        points = [flat[i].detach().requires_grad_() for i in chosen]

        def rebuilt(values: list[Tensor]) -> Any:
            return tree_unflatten(
                [values[chosen.index(i)] if i in chosen else z for i, z in enumerate(flat)], structure
            )

        contributions, example_weights = model.parted(rebuilt(points), targets)
    total = contributions.sum()
    if curvature == "fisher" and model.loss.fisher is None:
        raise ValueError(
            "the Fisher information needs a loss that is a negative log likelihood: cross entropy, NLL, squared error, binary cross "
            "entropy with logits, Poisson"
        )
    outputs = [flat[i] for i in chosen]
    slopes = _gradients([total], points, create_graph=True) if curvature == "hessian" else []
    zeros = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    held = list(leaves.values())
    pulled = _gradients(outputs, held, zeros, create_graph=True)  # J^T u, linear in u: its derivative is J
    used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
    transposed = [g for i in used if (g := pulled[i]) is not None]

    def between(changes: list[Tensor], batched: bool) -> list[Tensor]:
        if curvature == "fisher":
            assert model.loss.fisher is not None
            (change,), found = changes, outputs[0].detach()
            if not batched:
                return [model.loss.fisher(found, targets, change)]
            return [torch.stack([model.loss.fisher(found, targets, one) for one in change])]
        curved = [i for i, g in enumerate(slopes) if g is not None and g.requires_grad]
        if not curved:
            return [torch.zeros_like(c) for c in changes]
        roots = [g for i in curved if (g := slopes[i]) is not None]
        return _pull(roots, points, [changes[i] for i in curved], changes, batched)

    def multiply(directions: list[Tensor], batched: bool) -> list[Tensor]:
        lead = directions[0].shape[:1] if batched else ()
        like = [z.new_zeros(()).expand(*lead, *z.shape) for z in outputs]
        changes = _pull(transposed, zeros, [directions[i] for i in used], like, batched)
        return _pull(outputs, held, between(changes, batched), directions, batched)

    roots = (*transposed, *outputs, *(g for g in slopes if g is not None))
    norm = example_weights.sum()
    return Linearised(model.layout, multiply, total.detach(), norm, roots, _count(contributions, norm, model))


def second_moment_map(
    model: FunctionalModel, weights: Float[Tensor, " d"], buffers: Buffers, inputs: Any, targets: Any
) -> Linearised:
    """sum_i c_i c_i^T of the gradients c_i of the examples' contributions."""
    if not model.loss.per_example:
        raise ValueError("per-example gradients need a loss that gives one number per example, not one for the batch")
    leaves, contributions, norm = _contributions(model, weights, buffers, inputs, targets)
    held = list(leaves.values())
    zeros = torch.zeros_like(contributions, requires_grad=True)
    pulled = _gradients([contributions], held, [zeros], create_graph=True)
    used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
    transposed = [g for i in used if (g := pulled[i]) is not None]

    def multiply(directions: list[Tensor], batched: bool) -> list[Tensor]:
        lead = directions[0].shape[:1] if batched else ()
        like = [zeros.new_zeros(()).expand(*lead, *zeros.shape)]
        slopes = _pull(transposed, [zeros], [directions[i] for i in used], like, batched)
        return _pull([contributions], held, slopes, directions, batched)

    total = contributions.sum().detach()
    return Linearised(model.layout, multiply, total, norm, (*transposed, contributions), len(contributions))


def _differentiable(output: Any) -> bool:
    return any(isinstance(z, Tensor) and z.requires_grad for z in tree_flatten(output)[0])


def _leaves(model: FunctionalModel, weights: Tensor) -> dict[str, Tensor]:
    return {n: p.detach().requires_grad_() for n, p in model.layout.split(weights).items()}


def _contributions(
    model: FunctionalModel, weights: Tensor, buffers: Buffers, inputs: Any, targets: Any
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    leaves = _leaves(model, weights)
    with twice_differentiable(weights.device):
        output = model.forward(leaves, clone_buffers(buffers), inputs)
        contributions, example_weights = model.parted(output, targets)
    return leaves, contributions, example_weights.sum()


def _count(contributions: Tensor, norm: Tensor, model: FunctionalModel) -> int:
    return len(contributions) if model.loss.per_example else int(norm)


def _gradients(
    roots: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None, *, create_graph: bool
) -> list[Tensor | None]:
    kept = [i for i, r in enumerate(roots) if r.requires_grad]
    if not kept:
        return [None] * len(leaves)
    given = None if cotangents is None else [cotangents[i] for i in kept]
    with _autograd(leaves[0].device):
        return list(
            torch.autograd.grad(
                [roots[i] for i in kept], leaves, given, create_graph=create_graph, allow_unused=True, retain_graph=True
            )
        )


def _pull(
    roots: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: list[Tensor], like: Sequence[Tensor], batched: bool
) -> list[Tensor]:
    """The vector-Jacobian products of kept graphs; zeros, shaped as `like`, where a leaf is not reached."""
    with _autograd(leaves[0].device):
        found = torch.autograd.grad(
            roots, leaves, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    return [torch.zeros_like(e) if f is None else f for f, e in zip(found, like, strict=True)]


@contextlib.contextmanager
def _autograd(device: torch.device) -> Iterator[None]:
    """Within, autocast is off, and what autograd says of a missing second derivative becomes advice."""
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        advice = explain(error)
        if advice is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"second derivatives are not to be had: {advice} ({reason})") from error
