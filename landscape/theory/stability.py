"""When a step is stable: thresholds on alpha lambda, and the coupled operator on all learners (theory.md sec. 5 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from landscape import streams
from landscape.curvature.coupled import CoupledOperator
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.operators import SymmetricOperator
from landscape.display import Displayed, Shown
from landscape.theory.modes import LocalRule, growth
from landscape.training.topology import Topology


def mean_threshold(rule: LocalRule) -> float:
    """The largest stable alpha lambda of the mean w_a (all that SSGD has).

    2 (1 + beta) for heavy ball, divided by 1 - dampening; 2 (1 + beta)/(1 + 2 beta) for Nesterov.

    >>> mean_threshold(LocalRule("ssgd", momentum=0.9)), round(mean_threshold(LocalRule("ssgd", momentum=0.9, nesterov=True)), 4)
    (3.8, 1.3571)
    """
    beta = rule.momentum
    if rule.nesterov:
        return 2 * (1 + beta) / (1 + 2 * beta)
    return 2 * (1 + beta) / ((1 - rule.dampening) if beta else 1)


def disagreement_threshold(topology: Topology, rule: LocalRule) -> float:
    """The largest stable alpha lambda of the disagreement between learners, on a quadratic shared by all.

    By bisection on the growth of the fastest mode: every order, momentum and topology alike. theory.md's closed forms, such as
    (1 + beta)(1 + mu_min) for AWC, are held against it in the tests. Infinite for one learner.
    """
    if topology.num_learners == 1:
        return float("inf")
    for reach in (8.0, 100.0, 10000.0):  # strong mixing under ATC and CTA is stable far beyond the mean's threshold
        grid = np.linspace(1e-4, reach * (1 + rule.momentum) / (1 - rule.dampening), 4001)
        unstable = growth(topology, rule, grid) >= 1
        if unstable.any():
            break
    if unstable[0]:
        return 0.0
    if not unstable.any():
        return float("inf")
    first = int(unstable.argmax())
    low, high = grid[first - 1], grid[first]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if growth(topology, rule, np.array([middle]))[0] >= 1 else (middle, high)
    return float(low)


def learning_rate_thresholds(
    topology: Topology,
    algorithm: str,
    order: str,
    momentum: float = 0.0,
    dampening: float = 0.0,
    *,
    nesterov: bool = False,
    gammas: Sequence[float] = (1.0,),
) -> dict[str, float]:
    """Thresholds on alpha lambda_max that a run meets, by name: "mean", and "disagreement" for DPSGD.

    Learners that are all alike step as SGD does under every rule, so "mean" is necessary for all; it is all that is said of local SGD,
    adjacent-leader and UBAR, whose mixing depends on the learners or on the step.

    Args:
        topology: M(t).
        algorithm: as in `TrainConfig`.
        order: DPSGD's order.
        momentum: beta.
        dampening: of the momentum.
        nesterov: Nesterov momentum.
        gammas: of controlled disagreement; of a gamma that varies, the ends of its range, at one of which the threshold is smallest.
    """
    rule = LocalRule(order, momentum, dampening, nesterov)
    thresholds = {"mean": mean_threshold(rule)}
    if algorithm == "dpsgd" and topology.num_learners > 1:
        thresholds["disagreement"] = min(
            disagreement_threshold(topology.damped(gamma), rule) for gamma in sorted(set(gammas))
        )
    return thresholds


@dataclass(frozen=True, repr=False)
class CoupledStability(Displayed):
    """The linearised step on all learners at once, at a checkpoint.

    Attributes:
        smallest: smallest eigenvalue of A on the whole n d space; below -1 is unstable (nan where A is not symmetric).
        largest: largest, likewise. Consensus has exactly 1 along flat directions and above 1 along negative curvature, so this alone
            does not tell instability.
        disagreement: growth per step of the fastest disagreement, |eigenvalue| of P A P; above 1 it is driven by instability.
        converged: whether the eigenvalue solver converged.
        necessary: largest alpha lambda_max(H(w_j)) / (1 + M_jj) over learners; AWC needs it below 1 (nan for other orders).
        num_matvecs: Hessian products on the n d space.
    """

    smallest: float
    largest: float
    disagreement: float
    converged: bool
    necessary: float
    num_matvecs: int

    def shown(self) -> Shown:
        """The extreme eigenvalues, and the growth of the disagreement."""
        return Shown(
            "CoupledStability",
            [
                ("smallest eigenvalue", self.smallest, "per step"),
                ("largest eigenvalue", self.largest, "per step"),
                ("growth of disagreement", self.disagreement, "per step"),
                ("alpha lambda_max/(1 + M_jj)", self.necessary, ""),
                ("converged", self.converged, ""),
                ("products", self.num_matvecs, ""),
            ],
            ["stable while the growth of disagreement is below 1"],
        )


def coupled_stability(
    hessians: Sequence[SymmetricOperator],
    mixing: Tensor,
    rule: LocalRule,
    learning_rate: float,
    learner_lambda_max: Sequence[float],
    *,
    tol: float = 0.01,
    max_matvecs: int = 40,
    seed: int = 0,
) -> CoupledStability:
    """Extreme eigenvalues of the coupled step A (theory.md sec. 5).

    AWC without momentum and with symmetric M is symmetric: Lanczos, on the whole space and on the disagreement. Everything else
    (ATC, CTA, momentum, directed M) is not: Arnoldi (ARPACK) on the disagreement, including the momentum buffers.

    Args:
        hessians: H(w_j) at each learner's gradient point.
        mixing: M (n, n).
        rule: order, momentum, dampening, Nesterov.
        learning_rate: alpha.
        learner_lambda_max: lambda_max(H(w_j)).
        tol: relative residual of the eigenvalues.
        max_matvecs: bound on products of each run.
        seed: of the starting vector.
    """
    n = len(hessians)
    symmetric = rule.order == "awc" and rule.momentum == 0 and bool(torch.allclose(mixing, mixing.T, atol=1e-6))
    if not symmetric:
        growth_rate, converged, used = _arnoldi(hessians, mixing, rule, learning_rate, tol, max_matvecs, seed)
        return CoupledStability(math.nan, math.nan, growth_rate, converged, math.nan, used)
    whole = top_eigenpairs(
        CoupledOperator(mixing, hessians, learning_rate), which="BE", tol=tol, max_matvecs=max_matvecs, seed=seed,
        miss_probability=1.0,
    )  # fmt: skip
    inner = CoupledOperator(mixing, hessians, learning_rate, disagreement=True)
    apart = (
        top_eigenpairs(inner, which="BE", tol=tol, max_matvecs=max_matvecs, seed=seed, miss_probability=1.0)
        if n > 1
        else None
    )
    needed = max(learning_rate * v / (1 + float(mixing[j, j])) for j, v in enumerate(learner_lambda_max))
    return CoupledStability(
        smallest=float(whole.values[-1]),
        largest=float(whole.values[0]),
        disagreement=float(np.abs(apart.values).max()) if apart is not None else 0.0,
        converged=bool(whole.converged.all() and (apart is None or apart.converged.all())),
        necessary=needed,
        num_matvecs=whole.num_matvecs + (apart.num_matvecs if apart is not None else 0),
    )


def _arnoldi(
    hessians: Sequence[SymmetricOperator],
    mixing: Tensor,
    rule: LocalRule,
    learning_rate: float,
    tol: float,
    max_matvecs: int,
    seed: int,
) -> tuple[float, bool, int]:
    """Largest modulus of the step on the disagreement (and its momentum buffers), whether it converged, and products used."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs

    n, d = len(hessians), hessians[0].dimension
    mixing = mixing.to(hessians[0].device, hessians[0].dtype)
    with_momentum = rule.momentum > 0
    size = n * d * (2 if with_momentum else 1)
    used = 0

    def apart(block: Tensor) -> Tensor:
        return block - block.mean(0)

    def advance(vector: np.ndarray) -> np.ndarray:
        nonlocal used
        used += 1
        state = torch.from_numpy(np.ascontiguousarray(vector.ravel())).to(mixing).view(-1, n, d)
        weights = apart(state[0])
        start = mixing @ weights if rule.order == "cta" else weights
        force = learning_rate * torch.stack([h.matvec(v) for h, v in zip(hessians, start, strict=True)])
        if with_momentum:
            buffer = rule.momentum * apart(state[1]) + (1 - rule.dampening) * force
            direction = force + rule.momentum * buffer if rule.nesterov else buffer
        else:
            buffer, direction = None, force
        after = (
            mixing @ (weights - direction)
            if rule.order == "atc"
            else (start if rule.order == "cta" else mixing @ weights) - direction
        )
        blocks = [apart(after)] + ([] if buffer is None else [apart(buffer)])
        return torch.stack(blocks).flatten().double().cpu().numpy()

    generator = streams.torch_generator("arnoldi", seed)
    begin = torch.randn(size, generator=generator, dtype=torch.float64).numpy()
    operator = LinearOperator((size, size), matvec=advance, dtype=np.float64)
    basis = max(6, min(20, max_matvecs // 2))
    try:
        values = eigs(
            operator,
            k=1,
            which="LM",
            tol=tol,
            ncv=basis,
            maxiter=max(1, max_matvecs // basis),
            v0=begin,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence:
        for _ in range(5):  # a power iteration's estimate, marked as not converged
            begin = advance(begin)
            begin /= np.linalg.norm(begin)
        return float(np.linalg.norm(advance(begin))), False, used
    return float(np.abs(values).max()), True, used
