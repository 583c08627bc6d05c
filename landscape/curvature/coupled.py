"""The linearised DPSGD step on all learners at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from landscape.curvature.operators import SymmetricOperator, most_peers


class CoupledOperator(SymmetricOperator):
    r"""The linearised DPSGD step (AWC) on all learners at once, on the n d space (theory.md sec. 5).

    $$A = M \otimes I - \alpha \, \mathrm{blockdiag}(H(w_1), \ldots, H(w_n))$$

    Symmetric for symmetric M. With `disagreement` it is restricted to what is orthogonal to consensus, P A P with
    P = (I - 11^T/n) x I: there flat directions sit at the graph's mu_2 and not at exactly 1, where consensus has them.
    """

    def __init__(
        self, mixing: Tensor, hessians: Sequence[SymmetricOperator], learning_rate: float, *, disagreement: bool = False
    ) -> None:
        """Args: mixing M (n, n), symmetric; hessians H(w_j); learning_rate alpha; disagreement: restrict to P A P."""
        first = hessians[0]
        self.hessians, self.learning_rate, self.disagreement = list(hessians), learning_rate, disagreement
        self.device, self.dtype, self.peers = first.device, first.dtype, most_peers(self.hessians)
        self.mixing = mixing.to(self.device, self.dtype)
        if not torch.allclose(self.mixing, self.mixing.T, atol=1e-6):
            raise ValueError("the coupled operator is symmetric only for a symmetric mixing matrix")
        self.dimension = len(self.hessians) * first.dimension

    def matvec(self, vector: Tensor) -> Tensor:
        """A v, v = (v_1 ... v_n) concatenated; n Hessian-vector products."""
        stacked = vector.reshape(len(self.hessians), -1)
        if self.disagreement:
            stacked = stacked - stacked.mean(0)
        curved = torch.stack([h.matvec(v) for h, v in zip(self.hessians, stacked, strict=True)])
        product = self.mixing @ stacked - self.learning_rate * curved
        if self.disagreement:
            product = product - product.mean(0)
        return product.flatten()
