"""The generalised Gauss-Newton matrix, and the Fisher information matrix of the network's own distribution."""

from __future__ import annotations

from torch import Tensor

from landscape.curvature.products import ObjectiveOperator
from landscape.objective import Objective, Weights


class GaussNewtonOperator(ObjectiveOperator):
    r"""The generalised Gauss-Newton matrix: the Hessian without the network's own curvature (Schraudolph 2002).

    $$G(w) = \frac{1}{\sum_i m_i} \sum_i J_i^T \, \nabla^2_z \ell_i(z_i) \, J_i, \qquad z_i = f(x_i; w), \quad J_i = \partial z_i/\partial w$$

    Positive semi-definite for a loss that is convex in the output. A product costs about 4/3 gradients with its graph kept.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1, bias=False).double()
    >>> G = GaussNewtonOperator(Objective(net, torch.nn.MSELoss(), (torch.eye(2).double(), torch.zeros(2, 1))), dict(net.named_parameters()))
    >>> G.to_dense().tolist()  # a linear network: equal to its Hessian
    [[1.0, 0.0], [0.0, 1.0]]
    """

    kind = "gauss-newton"

    def _finish(self, total: Tensor, rows: Tensor) -> Tensor:
        return total.div_(self.objective.norm)


class FisherOperator(GaussNewtonOperator):
    r"""The Fisher information matrix, exact ("type 2"): expected over the network's own predictions, not over the labels.

    $$F(w) = \frac{1}{\sum_i m_i} \sum_i J_i^T \; m_i \, E_{y \sim p(\cdot | z_i)} [\nabla_z \ell(z_i, y) \nabla_z \ell(z_i, y)^T] \; J_i$$

    For losses that are negative log likelihoods: cross entropy and NLL, squared error (normal, variance 1/2), binary cross entropy with
    logits, Poisson. Where the output is the natural parameter it equals the Gauss-Newton matrix (Martens 2020, sec. 9); under NLL, whose
    Hessian over the log probabilities is 0, it does not. Class weights m_i are those of the observed targets.
    """

    kind = "fisher"


def ggn(objective: Objective, params: Weights, *, memory_budget: int | None = None) -> GaussNewtonOperator:
    """The generalised Gauss-Newton matrix at weights. See `GaussNewtonOperator`."""
    return GaussNewtonOperator(objective, params, memory_budget=memory_budget)


def fisher(objective: Objective, params: Weights, *, memory_budget: int | None = None) -> FisherOperator:
    """The exact Fisher information matrix at weights. See `FisherOperator`."""
    return FisherOperator(objective, params, memory_budget=memory_budget)
