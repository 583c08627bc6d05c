"""How learners' deviations along one Hessian mode vary together, on a quadratic with additive noise (theory.md sec. 6)."""

from __future__ import annotations

import math

import numpy as np

from landscape.theory.modes import LocalRule, disagreement_modes
from landscape.theory.stationary import disagreement_variance
from landscape.training.topology import Topology

NOTHING = 1e-13
"""Variance per unit of noise below which a mode is empty: ATC with mu = 0, up to rounding."""


def disagreement_vectors(topology: Topology) -> np.ndarray:
    """Orthonormal graph modes v_a, columns (n, n - 1) orthogonal to the vector of ones, in the order of `disagreement_modes`.

    Real eigenvectors of one symmetric M; joint unitary ones, complex, of directed or periodic normal M that commute. Random pairing has all
    modes alike, and any orthonormal basis serves.

    Raises:
        ValueError: matrices that are not normal and commuting.

    >>> from landscape.training.topology import topology
    >>> ring = topology("ring", 6)
    >>> v = disagreement_vectors(ring)
    >>> bool(np.allclose(ring.matrices[0] @ v, v * disagreement_modes(ring)[0]))
    True
    """
    n = topology.num_learners
    basis = np.linalg.qr(np.concatenate([np.ones((n, 1)), np.eye(n)[:, :-1]], 1))[0][:, 1:]
    if n == 1 or topology.kind == "random-pairing":
        return np.asarray(basis)
    modes = disagreement_modes(topology)
    apart = basis.T @ topology.matrices @ basis
    # joint eigenvectors of a combination with coefficients of no meaning, which tells apart what differs; then into the modes' order
    even, odd = np.random.default_rng(0).uniform(0.5, 1.5, (2, len(apart), 1, 1))
    swapped = apart.transpose(0, 2, 1)
    if topology.is_symmetric:
        vectors = np.linalg.eigh((even * apart).sum(0))[1].astype(np.result_type(apart, modes))
    else:
        vectors = np.linalg.eigh((even * (apart + swapped) + 1j * odd * (apart - swapped)).sum(0))[1]
    found = np.einsum("ia,tij,ja->ta", vectors.conj(), apart, vectors)
    left, order = list(range(n - 1)), []
    for mode in modes.T:
        nearest = min(left, key=lambda a: float(np.abs(found[:, a] - mode).sum()))
        left.remove(nearest)
        order.append(nearest)
    assert np.allclose(found[:, order], modes, atol=1e-7)
    return np.asarray(basis @ vectors[:, order])


def learner_covariance(
    topology: Topology, rule: LocalRule, x: np.ndarray, history: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Covariance of the deviations delta_j . u over learners, per unit of alpha^2 c, along modes of x = alpha lambda.

    Stationary, sum_a s_a v_a v_a^H, averaged over matchings or over a period; or, with a history, given the matrices that were drawn, from
    deviations of zero before it.

    Args:
        topology: M(t).
        rule: order, momentum, dampening, Nesterov.
        x: (k,).
        history: (T, n, n) matrices of the T steps before, the last one last.

    Returns:
        variances (n - 1, k) of the graph modes v_a, infinite where a mode is unstable; and covariances (k, n, n), real, nan for an
        x with an unstable mode.
    """
    x = np.asarray(x, dtype=np.float64)
    vectors = disagreement_vectors(topology)
    variances = disagreement_variance(topology, rule, x, np.ones_like(x))
    stable = np.isfinite(variances).all(0)
    n = topology.num_learners
    covariances = np.full((len(x), n, n), math.nan)
    if history is None:
        covariances[stable] = np.einsum("ia,ak,ja->kij", vectors, variances[:, stable], vectors.conj()).real
    else:
        covariances[stable] = _given(history, rule, x[stable])
        along = np.einsum("ia,kij,ja->ak", vectors.conj(), covariances, vectors).real
        variances = np.where(np.isinf(variances), math.inf, np.where(stable, along, variances))
    variances[variances < NOTHING] = 0.0
    return variances, covariances


def _given(history: np.ndarray, rule: LocalRule, x: np.ndarray) -> np.ndarray:
    """The recursion S <- A S A^T + B B^T over the matrices drawn, on (w, m) of all learners; A and B are affine in M."""
    n = history.shape[-1]
    (a0, b0), (a1, b1) = (rule.matrices(np.asarray(mu), x) for mu in (0.0, 1.0))
    state = np.zeros((len(x), 2 * n, 2 * n))
    eye = np.eye(n)
    for matrix in history:
        a = np.einsum("kij,lm->kiljm", a0, eye) + np.einsum("kij,lm->kiljm", a1 - a0, matrix)
        b = np.einsum("ki,lm->kilm", b0, eye) + np.einsum("ki,lm->kilm", b1 - b0, matrix)
        a, b = a.reshape(-1, 2 * n, 2 * n), b.reshape(-1, 2 * n, n)
        state = a @ state @ a.transpose(0, 2, 1) + b @ b.transpose(0, 2, 1)
    apart = eye - 1 / n
    return np.asarray(apart @ state[:, :n, :n] @ apart)
