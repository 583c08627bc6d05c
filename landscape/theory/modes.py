"""The linearised step of one mode: a graph mode mu times a Hessian mode lambda (theory.md sec. 6).

On a quadratic with additive gradient noise every algorithm acts on a mode (mu, lambda) of (w, m), m the momentum buffer
times alpha, as

    z <- A z + b eps,        z = (w, m),  x = alpha lambda,  eps = alpha times the gradient noise.

One small matrix serves all orders, momentum, dampening and Nesterov; thresholds are where its spectral radius reaches 1, stationary
variances solve a 2 x 2 Lyapunov equation. theory.md's closed forms are special cases, and the tests hold them against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from landscape.training.topology import Topology


@dataclass(frozen=True)
class LocalRule:
    """What of the optimiser matters to a mode; order "ssgd" is the mean mode under all-reduce."""

    order: str = "awc"
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def matrices(self, mu: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A (..., 2, 2) and b (..., 2) for broadcast modes mu and x = alpha lambda."""
        mu, x = np.broadcast_arrays(mu, x)
        beta, keep = self.momentum, 1 - self.dampening
        start = mu if self.order == "cta" else np.ones_like(mu)  # the gradient point, per unit of w
        # buffer: m' = beta m + keep (x start w + eps);  direction: u = m', or g + beta m' with Nesterov
        if beta == 0:
            m_w, m_m, m_e = x * start, np.zeros_like(mu), np.ones_like(mu)
            u_w, u_m, u_e = m_w, m_m, m_e
        else:
            m_w, m_m, m_e = keep * x * start, np.full_like(mu, beta), np.full_like(mu, keep)
            g = 1.0 if self.nesterov else 0.0
            scale = beta if self.nesterov else 1.0
            u_w, u_m, u_e = g * x * start + scale * m_w, scale * m_m, g + scale * m_e
        outside = mu if self.order == "atc" else np.ones_like(mu)  # ATC mixes the update too
        w_w = mu - outside * u_w
        a = np.stack([np.stack([w_w, -outside * u_m], -1), np.stack([m_w, m_m], -1)], -2)
        b = np.stack([-outside * u_e, m_e], -1)
        return a, b


def _radius(matrices: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(np.linalg.eigvals(matrices)).max(-1))


def disagreement_modes(topology: Topology) -> np.ndarray:
    """Graph modes orthogonal to the vector of ones, (period, n - 1): the joint eigenvalues of the matrices of a period.

    Random pairing has one mode, its mean mubar = (n - 2)/(2 (n - 1)) for even n, (1, n - 1). Damping by gamma (`Topology.damped`)
    makes 1 - gamma (1 - mu) of every mode, and of the mean.
    """
    n = topology.num_learners
    if n == 1:
        return np.empty((1, 0))
    if topology.kind == "random-pairing":
        return np.full((1, n - 1), topology.mean_matrix[0, 0] - topology.mean_matrix[0, 1])
    apart = _on_disagreement(topology)
    if topology.is_symmetric and topology.is_static:
        return np.linalg.eigvalsh(apart)
    # a Hermitian combination with coefficients of no meaning: its eigenvectors are those of each matrix, if they have them in common
    even, odd = np.random.default_rng(0).uniform(0.5, 1.5, (2, len(apart), 1, 1))
    swapped = apart.transpose(0, 2, 1)
    _, unitary = np.linalg.eigh((even * (apart + swapped) + 1j * odd * (apart - swapped)).sum(0))
    rotated = unitary.conj().T @ apart @ unitary
    modes = np.diagonal(rotated, axis1=1, axis2=2)
    if not np.allclose(rotated, modes[:, :, None] * np.eye(n - 1), atol=1e-8):
        raise ValueError(
            f"topology {topology.name}: its matrices are not normal and commuting, so graph modes do not separate"
        )
    return np.array(modes)


def _on_disagreement(topology: Topology) -> np.ndarray:
    """The matrices of a period on the vectors orthogonal to ones, in an orthonormal basis, (period, n - 1, n - 1)."""
    n = topology.num_learners
    basis = np.linalg.qr(np.concatenate([np.ones((n, 1)), np.eye(n)[:, :-1]], 1))[0][:, 1:]
    return np.asarray(basis.T @ topology.matrices @ basis)


def growth(topology: Topology, rule: LocalRule, x: np.ndarray) -> np.ndarray:
    """Growth per step of the fastest disagreement mode, for each x = alpha lambda; below 1 is stable.

    For random pairing it is the root of the mean-square growth. One matrix need not be normal: its eigenvalues decide.
    """
    x = np.atleast_1d(np.asarray(x, dtype=np.float64))
    if topology.num_learners == 1:
        return np.zeros_like(x)
    modes = np.linalg.eigvals(_on_disagreement(topology)) if topology.is_static else disagreement_modes(topology)
    if topology.kind == "random-pairing":
        return np.sqrt(_radius(second_moment_map(modes[:1, 0], x, rule, topology.gamma)))
    product: np.ndarray = np.broadcast_to(np.eye(2), (len(x), modes.shape[1], 2, 2))
    for mu in modes:
        product = rule.matrices(mu[None, :], x[:, None])[0] @ product
    return np.asarray(_radius(product).max(-1) ** (1 / len(modes)))


def second_moment_map(mubar: np.ndarray, x: np.ndarray, rule: LocalRule, gamma: float = 1.0) -> np.ndarray:
    """E[A kron A] (..., 4, 4) under random pairing.

    Each matching's matrix is a projection P, so damped by gamma M = (1 - gamma) I + gamma P acts as mu = 1 - gamma or mu = 1, and A is
    affine in M: the mean is that of the two ends, weighted by how often each is met. By exchangeability of the learners the isotropic
    part of the disagreement's covariance maps to itself, and it holds the largest growth.

    Args:
        mubar: mean of mu, damping included: 1 - gamma (1 - share), share the mean of P on the disagreement.
        x: alpha lambda.
        rule: order, momentum, dampening, Nesterov.
        gamma: of the damping.
    """
    at = [rule.matrices(np.asarray(m, dtype=np.float64), x)[0] for m in (1.0 - gamma, 1.0)]
    constant, slope = at[0], at[1] - at[0]
    mean = _kron(constant, constant) + share_of_one(mubar, gamma)[..., None, None] * (
        _kron(constant, slope) + _kron(slope, constant) + _kron(slope, slope)
    )
    return np.asarray(mean)


def share_of_one(mubar: np.ndarray, gamma: float) -> np.ndarray:
    """How often a damped pairing acts as mu = 1 rather than mu = 1 - gamma, for a mean mode of mubar."""
    return np.asarray(1 - (1 - mubar) / gamma if gamma > 0 else np.ones_like(mubar))


def _kron(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...ij,...kl->...ikjl", a, b).reshape(*a.shape[:-2], 4, 4)
