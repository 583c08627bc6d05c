"""Stationary variances on a quadratic with additive noise (theory.md sec. 6)."""

from __future__ import annotations

import numpy as np

from landscape.theory.modes import LocalRule, disagreement_modes, growth, second_moment_map, share_of_one
from landscape.training.topology import Topology

EDGE = 1 - 1e-12
"""Growth from which a mode counts as unstable: at 1 its variance is infinite, and rounding must not make it huge or negative."""


def stationary_variance(mu: np.ndarray, x: np.ndarray, noise: np.ndarray, rule: LocalRule) -> np.ndarray:
    """Stationary variance of w in modes (mu, x = alpha lambda).

    Args:
        mu: graph modes, real or complex.
        x: alpha lambda, broadcast against mu.
        noise: alpha^2 c, the variance of alpha times the gradient noise along the mode.
        rule: order, momentum, dampening, Nesterov.

    Returns:
        variances, infinite outside stability.

    >>> mu, x, noise = np.array([0.5]), np.array([0.3]), np.array([1.0])
    >>> stationary_variance(mu, x, noise, LocalRule("awc")).round(6).tolist()  # 1/(1 - (mu - x)^2)
    [1.041667]
    """
    a, b = rule.matrices(mu, x)
    maps = np.einsum("...ij,...kl->...ikjl", a, np.conj(a)).reshape(*a.shape[:-2], 4, 4)
    return _solve(maps, _outer(b), noise, np.abs(np.linalg.eigvals(a)).max(-1) < EDGE)


def _outer(b: np.ndarray) -> np.ndarray:
    """b b^H (..., 4) of vectors (..., 2)."""
    return np.einsum("...i,...k->...ik", b, np.conj(b)).reshape(*b.shape[:-1], 4)


def _solve(maps: np.ndarray, source: np.ndarray, noise: np.ndarray, stable: np.ndarray) -> np.ndarray:
    safe = np.where(stable[..., None, None], maps, 0.0)
    moments = np.linalg.solve(np.eye(4) - safe, source[..., None])[..., 0]
    return np.where(stable, np.maximum(moments[..., 0].real, 0.0) * noise, np.inf)


def disagreement_variance(topology: Topology, rule: LocalRule, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Stationary variance of every disagreement mode at every x = alpha lambda, (n - 1, k).

    Args:
        topology: M(t); periodic ones are averaged over their period.
        rule: order, momentum, dampening, Nesterov.
        x: (k,) alpha lambda.
        noise: (k,) alpha^2 c.
    """
    modes = disagreement_modes(topology)
    if topology.kind == "random-pairing":
        mubar, gamma = modes[0, :1], topology.gamma
        maps = second_moment_map(mubar, x, rule, gamma)
        # ATC's noise is mixed by the same matrix: E b b^T is the mean of its two ends (theory.modes.second_moment_map), elsewhere equal
        ends = [_outer(rule.matrices(np.asarray(m), x)[1]) for m in (1.0 - gamma, 1.0)]
        source = ends[0] + share_of_one(mubar, gamma)[:, None] * (ends[1] - ends[0])
        variance = _solve(maps, source, noise, growth(topology, rule, x) < EDGE)
        return np.broadcast_to(variance, (modes.shape[1], len(x))).copy()
    if len(modes) == 1:
        return stationary_variance(modes[0][:, None], x[None, :], noise[None, :], rule)
    return _periodic(modes, x, noise, rule)


def _periodic(modes: np.ndarray, x: np.ndarray, noise: np.ndarray, rule: LocalRule) -> np.ndarray:
    """Modes (period, n - 1): fixed point over one period, then the mean over its steps."""
    shape = (modes.shape[1], len(x))
    total_map: np.ndarray = np.broadcast_to(np.eye(4, dtype=complex), (*shape, 4, 4))
    total_source = np.zeros((*shape, 4), dtype=complex)
    maps, sources = [], []
    for mu in modes:
        a, b = rule.matrices(mu[:, None], x[None, :])
        maps.append(np.einsum("...ij,...kl->...ikjl", a, np.conj(a)).reshape(*shape, 4, 4))
        sources.append(_outer(b))
        total_map = maps[-1] @ total_map
        total_source = (maps[-1] @ total_source[..., None])[..., 0] + sources[-1]
    stable = np.abs(np.linalg.eigvals(total_map)).max(-1) < EDGE
    moments = np.linalg.solve(np.eye(4) - np.where(stable[..., None, None], total_map, 0), total_source[..., None])[
        ..., 0
    ]
    mean = np.zeros(shape)
    for m, s in zip(maps, sources, strict=True):
        moments = (m @ moments[..., None])[..., 0] + s
        mean += moments[..., 0].real / len(modes)
    return np.where(stable, np.maximum(mean, 0.0) * noise, np.inf)


def predicted_consensus(
    topology: Topology,
    rule: LocalRule,
    learning_rate: float,
    eigenvalues: np.ndarray,
    noise_along: np.ndarray,
    noise_trace: float,
    *,
    weight_decay: float | int = 0.0,
) -> float:
    """Tr Sigma_w that minibatch noise alone would sustain on the quadratic at hand.

    Args:
        topology: M(t).
        rule: order, momentum, dampening, Nesterov.
        learning_rate: alpha.
        eigenvalues: (k,) lambda_i of the computed eigenpairs of H.
        noise_along: (k,) c_i = u_i^T C u_i / B.
        noise_trace: Tr C / B; what is outside the computed eigenspace enters at lambda = 0.
        weight_decay: adds to every lambda.

    Returns:
        (1/n) sum over disagreement modes and Hessian modes; infinite where a mode is unstable.
    """
    if topology.num_learners == 1:
        return 0.0
    x = learning_rate * (np.append(np.asarray(eigenvalues, dtype=np.float64), 0.0) + weight_decay)
    c = np.append(noise_along, max(0.0, noise_trace - float(np.sum(noise_along))))
    variance = disagreement_variance(topology, rule, x, learning_rate**2 * c)
    with np.errstate(invalid="ignore"):
        return float(np.nansum(np.where(c > 0, variance, 0.0)) / topology.num_learners)
