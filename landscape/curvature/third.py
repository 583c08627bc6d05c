"""The second derivative of the gradient along a direction: the third derivative of L with two of its arguments filled."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from landscape.functional import clone_buffers
from landscape.objective import Objective, Weights


def curved_gradient(objective: Objective, weights: Weights, directions: Float[Tensor, "k d"]) -> Float[Tensor, " d"]:
    r"""The mean over directions v of d^2/dt^2 g(w + t v) at t = 0, by reverse differentiation.

    $$\frac{1}{k} \sum_j D^3 L(w)[v_j, v_j, \cdot] = \nabla_w \mathrm{Tr}\Big(H(w)\, \frac{1}{k} \sum_j v_j v_j^T\Big)$$

    Half of it is the second-order drift of the gradient under deviations v_j (theory.md sec. 3). Where the network has kinks (ReLU, max-pool) it is
    the derivative between them, which is not what a finite deviation meets.

    Args:
        objective: L.
        weights: w.
        directions: v_j, as rows.

    Cost: about 1 + 6 k gradients; three times a gradient's graph in memory.

    >>> import torch
    >>> net = torch.nn.Linear(1, 1, bias=False).double()  # L = w^4 has L''' = 24 w
    >>> cubic = Objective(net, lambda out, y: out[:, 0] ** 4, (torch.ones(1, 1).double(), torch.zeros(1)))
    >>> curved_gradient(cubic, torch.tensor([2.0]).double(), torch.tensor([[1.0], [3.0]]).double()).item()
    240.0
    """
    flat = objective.flat(weights)
    total = torch.zeros_like(flat)
    norm = 0.0
    with objective.peers.agree():
        for index, inputs, targets in objective.batches():
            with objective.frozen(index), sdpa_kernel(SDPBackend.MATH):
                part, weight = _of_batch(objective, flat, directions, inputs, targets)
            total += part
            norm += weight
    objective.settle_norm(norm)
    return objective.sum_over_ranks(total) / (objective.norm * len(directions))


def _of_batch(
    objective: Objective, flat: Tensor, directions: Tensor, inputs: Any, targets: Any
) -> tuple[Tensor, float]:
    model = objective.model
    leaf = flat.detach().requires_grad_()
    contributions, example_weights = model.example_losses(leaf, clone_buffers(objective.buffers), inputs, targets)
    (gradient,) = torch.autograd.grad(contributions.sum(), leaf, create_graph=True)
    total = torch.zeros_like(flat)
    for direction in directions.to(flat):
        slope = gradient @ direction
        if not slope.requires_grad:
            continue  # L is linear in w
        (product,) = torch.autograd.grad(slope, leaf, create_graph=True, retain_graph=True)
        bend = product @ direction
        if bend.requires_grad:
            (found,) = torch.autograd.grad(bend, leaf, retain_graph=True, allow_unused=True)
            total += 0 if found is None else found
    return total, float(example_weights.sum())
