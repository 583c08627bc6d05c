r"""The full gradient that draws are compared with: exact, or estimated without bias from some of the examples (theory.md sec. 3).

Where only m of the N examples are affordable, they are drawn without replacement and split into G groups of s = m/G. With g_b the gradient of
group b and S^2 = (N/(N-1)) Tr C, any quadratic form behaves as

$$E\, g_b \cdot g_c = |g|^2 - S^2/N \quad (b \neq c), \qquad E |g_b|^2 = E\, g_b \cdot g_c + S^2/s,$$

so that s (mean |g_b|^2 - mean g_b . g_c) estimates S^2 and the sum of the off-diagonal mean and S^2/N estimates |g|^2, both without bias
(all pairs of the "two independent halves"). The same holds for (v . g)^2 with S^2 in the direction v. Errors come from leaving out one
group at a time, with the finite-population factor 1 - m/N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape import streams
from landscape.noise.rows import Rows
from landscape.objective import Objective, Weights

NUM_GROUPS = 16


@dataclass(frozen=True)
class ReferenceGradient:
    """g, exactly (one group) or estimated.

    Attributes:
        groups: (G, d), the gradients of the groups; their mean estimates g.
        group_size: s, examples a group.
        population: N.
    """

    groups: Float[Tensor, "G d"]
    group_size: int
    population: int

    @property
    def is_exact(self) -> bool:
        """Whether there is one group of all examples."""
        return len(self.groups) == 1

    @property
    def unsampled(self) -> float:
        """1 - m/N: the share of the examples that was not looked at."""
        return 1 - len(self.groups) * self.group_size / self.population

    def forms(self, products: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Unbiased a^T (g g^T) a from products over pairs of groups (..., G, G), using the groups `kept`."""
        products = products[..., kept, :][..., :, kept]
        count = products.shape[-1]
        if self.is_exact:
            return np.asarray(products[..., 0, 0])
        diagonal = np.trace(products, axis1=-2, axis2=-1)
        apart = (products.sum((-2, -1)) - diagonal) / (count * (count - 1))
        return np.asarray(apart + self.group_size * (diagonal / count - apart) / self.population)

    def left_out(self) -> Iterator[np.ndarray]:
        """The groups without one of them, for each in turn."""
        everyone = np.arange(len(self.groups))
        for b in everyone:
            yield np.delete(everyone, b)


def reference_gradient(
    objective: Objective,
    weights: Weights,
    num_examples: int | None = None,
    *,
    num_groups: int = NUM_GROUPS,
    seed: int = 0,
) -> ReferenceGradient:
    """g at some weights, over all examples or estimated from some of them.

    Args:
        objective: a mean-reduced loss whose examples weigh the same, if `num_examples` is given.
        weights: w_a.
        num_examples: m, rounded down to a multiple of the groups; None, or as many as there are, for all.
        num_groups: G.
        seed: of the choice of examples; independent of the draws'.

    Cost: one full gradient, or m/N of one, the groups shared by ranks that share the data; memory (G, d).

    Raises:
        ValueError: fewer than two examples a group, or examples that do not weigh the same.
    """
    total = objective.num_examples
    if num_examples is None or num_examples >= total:
        return ReferenceGradient(objective.gradient(weights)[None], total, total)
    size = num_examples // num_groups
    if size < 1:
        raise ValueError(f"num_gradient_examples must be at least {num_groups} (one a group), not {num_examples}")
    objective.needs_all_data()
    if objective.model.loss.reduction != "mean" or not objective.has_equal_weights:
        raise ValueError(
            "an estimated full gradient needs a mean-reduced loss whose examples weigh the same; leave num_gradient_examples out"
        )
    order = streams.permutation(streams.philox("reference gradient", seed), total)[: num_groups * size]
    flat = objective.flat(weights)
    groups = Rows((num_groups, len(flat)), flat)
    members = torch.from_numpy(order.copy()).split(size)
    with objective.peers.agree():
        for b in objective.peers.share(num_groups):
            gradient = torch.zeros_like(flat)
            for part in members[b].split(objective.chunk):  # all weigh the same
                gradient += objective.averaged_gradients(flat, part[None, None])[0] * (len(part) / size)
            groups.put(b, gradient[None])
    groups.hand_round(objective.peers)
    return ReferenceGradient(groups.tensor(), size, total)
