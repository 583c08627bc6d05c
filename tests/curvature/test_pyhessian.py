"""pyhessian's answers through our interface, and ours beside them."""

import numpy as np
import pytest
import torch
from torch import nn

from landscape.curvature.blocks import PreconditionedOperator
from landscape.curvature.density import spectral_density
from landscape.curvature.hessian import HessianOperator, hessian
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.operators import SymmetricOperator
from landscape.curvature.trace import trace
from landscape.objective import Objective

pytest.importorskip("pyhessian", reason="needs the package pyhessian")


@pytest.fixture(scope="module")
def operator() -> HessianOperator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        x, y = torch.randn(100, 6), torch.randint(3, (100,))
        x[y == 1] += 2
    weights = {n: 1.5 * p.detach() for n, p in net.named_parameters()}  # not the module's own
    return hessian(Objective(net, nn.CrossEntropyLoss(), (x, y), chunk=32), weights)  # ragged batches


def test_the_same_eigenvalues_trace_and_moments(operator: SymmetricOperator) -> None:
    state = torch.get_rng_state()
    exact = np.linalg.eigvalsh(operator.to_dense().double().numpy())
    theirs = top_eigenpairs(operator, 2, "LM", tol=1e-5, backend="pyhessian")
    ours = top_eigenpairs(operator, 2, "LM", tol=1e-5)
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-3)
    np.testing.assert_allclose(ours.values, exact[np.argsort(-np.abs(exact))][:2], rtol=1e-5)
    assert theirs.provenance["backend"] == "pyhessian"
    found = trace(operator, num_probes=100, relative_error=1e-9, backend="pyhessian")
    assert abs(found.value - exact.sum()) <= 4 * found.stderr
    density = spectral_density(operator, num_probes=20, num_steps=10, backend="pyhessian")
    mean = density.moment(1)
    assert abs(mean.value - exact.mean()) <= 4 * mean.stderr
    np.testing.assert_allclose(density.weights.sum(1), 1, atol=1e-5)
    assert torch.equal(state, torch.get_rng_state())
    assert not hasattr(torch, "eig") or torch.eig.__module__ != "landscape.curvature.pyhessian"


def test_its_running_mean_stalls_long_before_the_error_is_small(operator: SymmetricOperator) -> None:
    stopped = [trace(operator, num_probes=100, backend="pyhessian", seed=s) for s in range(5)]
    assert min(found.num_probes for found in stopped) < 100
    assert not any(found.converged for found in stopped)  # by their own standard error


def test_its_converged_pairs_have_the_residuals_they_have(operator: SymmetricOperator) -> None:
    found = top_eigenpairs(operator, 4, "LM", backend="pyhessian")
    images = operator @ found.vectors - found.vectors * torch.from_numpy(found.values).float()
    np.testing.assert_allclose(found.residuals, images.norm(dim=0).numpy(), rtol=1e-4)
    assert not found.converged.all()  # though each stopped at a relative change of 1e-3
    assert top_eigenpairs(operator, 4, "LM").converged.all()


def test_what_it_does_not_know_is_refused(operator: HessianOperator) -> None:
    with pytest.raises(ValueError, match='which="LM"'):
        top_eigenpairs(operator, backend="pyhessian")
    with pytest.raises(ValueError, match="not PreconditionedOperator"):
        trace(PreconditionedOperator(operator, torch.ones(operator.dimension)), backend="pyhessian")
    summed = Objective(
        nn.Linear(2, 2), nn.CrossEntropyLoss(reduction="sum"), (torch.zeros(3, 2), torch.zeros(3).long())
    )
    with pytest.raises(ValueError, match="mean-reduced"):
        trace(hessian(summed, torch.zeros(6)), num_probes=2, backend="pyhessian")
    with pytest.raises(ValueError, match="takes no outliers out"):
        spectral_density(operator, eigenpairs=top_eigenpairs(operator, 1), backend="pyhessian")
