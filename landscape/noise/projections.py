"""Lengths, projections and combinations of per-example gradients, without forming gradients where inputs and slopes will do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from landscape.functional import chunks, clone_buffers
from landscape.noise.capture import (
    NUM_TRIALS,
    Flow,
    Layer,
    capture,
    formed,
    leaves,
    num_positions,
    positions,
    trusted_layers,
    vector_gradients,
    weight_gradients,
    weight_projections,
)
from landscape.noise.examples import Examples
from landscape.noise.gram import default_budget, example_scale
from landscape.objective import Objective, Weights


def example_projections(
    objective: Objective, weights: Weights, directions: Float[Tensor, "d k"], *, chunk: int = 256
) -> Iterator[tuple[Float[Tensor, " b"], Float[Tensor, "b k"]]]:
    """|g_i|^2 and g_i . v of all examples of this rank, float64, g_i as in `landscape.noise.gram.example_gram`.

    In a group the ranks together have each example once, in order; one that has none gives nothing. All ranks wait for each other here at
    first, and no longer while they iterate, which belongs inside `Peers.agree`.

    Args:
        objective: L; its loss must give one number per example.
        weights: w.
        directions: (d, k).
        chunk: examples taken at once, at most; fewer where they would not fit the default memory budget.

    Cost: one gradient, k more forward passes of linear and convolution layers, and per-example gradients of the other parameters.
    """
    return _projections(objective, Examples(objective, own=True), objective.flat(weights), directions, chunk, example_scale(objective))  # fmt: skip


def _projections(
    objective: Objective, examples: Examples, flat: Tensor, directions: Tensor, chunk: int, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    layout = objective.model.layout
    known = trusted_layers(objective, flat, *examples.few(NUM_TRIALS))
    layers = list({layer.name: layer for layer, _, _ in known.values()}.values())
    along = dict(zip(layout.names, directions.to(flat).split(layout.sizes), strict=True))
    others = [name for name in layout.names if name not in known]
    rest = objective.subset(others, flat).model if others else None
    own = None if rest is None else rest.initial_weights()[0]
    held = leaves(objective, flat)
    each = objective.bytes_per_example + (0 if own is None else 4 * len(own) * flat.dtype.itemsize)
    size = min(chunk, default_budget(objective.device) // int(each + 1))
    for _, inputs, targets in examples.chunks(max(1, size)):
        flows, count = capture(objective, held, layers, inputs, targets)
        squares = torch.zeros(count, dtype=torch.float64, device=flat.device)
        projected = torch.zeros(count, directions.shape[1], dtype=torch.float64, device=flat.device)
        for name, (layer, _, delta) in known.items():
            if layer.name not in flows:
                raise ValueError(f"layer {layer.name or 'of the network'} was not called once with one row an example for some examples, as it was for others")  # fmt: skip
            flow = flows[layer.name]
            if layer.has_matrix(name):
                squares += _squares(layer, flow, num_positions(layer, delta))
                projected += weight_projections(layer, flow, along[name].T.reshape(-1, *layer.module.weight.shape))
            else:
                gradients = vector_gradients(layer, flow, name)
                squares += _lengths(gradients)
                projected += gradients.double() @ along[name].double()
        if rest is not None and own is not None:
            for name, gradients in formed(objective, rest, own, inputs, targets).items():
                squares += _lengths(gradients.reshape(count, -1))
                projected += (gradients.reshape(count, -1) @ along[name]).double()
        yield squares.mul_(scale**2), projected.mul_(scale)


def example_combinations(
    objective: Objective,
    weights: Weights,
    coefficients: Float[Tensor, "m k"],
    indices: Int64[Tensor, " m"] | None = None,
) -> Float[Tensor, "d k"]:
    """sum_i c_i g_i of per-example gradients (scaled as in `example_gram`), for k sets of coefficients.

    Args:
        objective: L; its loss must give one number per example.
        weights: w.
        coefficients: (m, k).
        indices: which examples; None for all.

    Cost: one forward and k backward passes over the examples, which ranks share.
    """
    objective.needs_all_data()
    examples, flat = Examples(objective, indices, own=True), objective.flat(weights)
    if len(coefficients) != len(examples):
        raise ValueError(f"{len(coefficients)} rows of coefficients, for {len(examples)} examples")
    total = torch.zeros(coefficients.shape[1], len(flat), dtype=torch.float64, device=flat.device)
    factors = coefficients.to(flat)
    held = leaves(objective, flat)
    with objective.peers.agree():
        for part, inputs, targets in examples.chunks(objective.chunk):
            contributions = _contributions(objective, held, inputs, targets)
            for j in range(len(total)):
                found = torch.autograd.grad(contributions, list(held.values()), factors[part, j], retain_graph=True, materialize_grads=True)  # fmt: skip
                total[j] += torch.cat([g.flatten() for g in found])
    return (objective.peers.sum(total).mul_(example_scale(objective))).to(flat.dtype).T


def _contributions(objective: Objective, held: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
    with torch.enable_grad(), objective.frozen(0):
        output = objective.model.forward(held, clone_buffers(objective.buffers), inputs)
        return objective.model.parted(output, targets)[0]


def _squares(layer: Layer, flow: Flow, length: int) -> Tensor:
    """|sum_t delta_t a_t^T|^2 (b,), float64."""
    weight = layer.module.weight
    rows, fan_in = weight.shape[0], weight[0].numel()
    if length == 1 or (layer.groups == 1 and length * (rows + fan_in) < rows * fan_in):
        a, delta = (t.flatten(1, 2) for t in positions(layer, flow))
        if length == 1 and layer.groups == 1:
            return _lengths(a.flatten(1)) * _lengths(delta.flatten(1))
        if layer.groups == 1:
            return ((a @ a.mT).mul_(delta @ delta.mT)).flatten(1).sum(1, dtype=torch.float64)
    squares = torch.zeros(len(flow.inputs), dtype=torch.float64, device=flow.inputs.device)
    for part in chunks(rows, max(1, (1 << 24) // (len(squares) * fan_in))):
        squares += _lengths(weight_gradients(layer, flow, part))
    return squares


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).double().square()
