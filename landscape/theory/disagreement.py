"""The disagreement spectrum: learners' deviations resolved into graph modes times Hessian modes (theory.md sec. 6)."""

from __future__ import annotations

import math

import numpy as np
import torch
import xarray as xr
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import t as student
from torch import Tensor

from landscape.curvature.lanczos import Eigenpairs
from landscape.curvature.vectors import inner
from landscape.statistics import Z95, Verdict
from landscape.theory.learner_covariance import NOTHING, disagreement_vectors, learner_covariance
from landscape.theory.modes import LocalRule, disagreement_modes
from landscape.training.topology import Topology


def disagreement_spectrum(
    deviations: Tensor,
    eigenpairs: Eigenpairs,
    topology: Topology,
    rule: LocalRule,
    *,
    learning_rate: float | int,
    noise_along: np.ndarray,
    noise_trace: float | int,
    history: np.ndarray | None = None,
    tolerance: float = 0.2,
    weight_decay: float | int = 0.0,
) -> xr.Dataset:
    r"""Energies |v_a^H delta u_i|^2 of the learners' deviations, against the stationary variances of the local quadratic.

    Deviations are those of the weights w_j at a checkpoint, for CTA too (there the prediction at w is meant, not the one at
    v = M w; theory.md sec. 6). Summed over all modes the energies are n Tr Sigma_w.

    What one checkpoint can tell. Along a Hessian mode the learners' noise is independent and alike, so on the quadratic the n - 1
    energies are independent s_a chi^2_1 about their variances s_a (a pair of conjugate modes of a directed M shares one s_a chi^2_2:
    the sum is the same). If the true variances are rho s_a, their sum E over a and over S independent samples obeys
    E/rho ~ sum_a s_a chi^2_S, and [E/q_0.975, E/q_0.025] is the 95% interval of rho, q its quantiles (`ratio_interval`). Its coverage on
    simulated training is 94 to 96%.

    Where M varies with t, all this holds given the matrices that were drawn: pass them as `history`, reaching back as far as the
    slowest mode remembers, or to where the learners were equal. Without, the prediction is the average over matchings or
    over a period while the measurement is one instance; the intervals are then too narrow, little under AWC and CTA (coverage
    90 to 95%), much under ATC (70 to 83%), which has just averaged some learners into one.

    The verdict of a mode: "agrees" only if this interval of measured over predicted lies within 1 +- tolerance, "disagrees" if it lies
    outside that band, or if the prediction is infinite (unstable) while what is measured is not; else "inconclusive": with
    n = 8 learners the interval of one checkpoint is [0.44, 4.1]. Without noise, "not applicable".

    Outside the computed eigenspace lambda counts as 0. Of r directions of equal noise the energies there are sums of r chi-squares
    each. The effective r = Tr(C)^2/|C|_F^2 of that noise is estimated from the deviations themselves: divided by the roots of the s_a
    they are independent and alike, of squared length Tr C and squared inner products |C|_F^2 on average, in units of rho.

    Args:
        deviations: delta (n, d) of one checkpoint; (S, n, d) of several that count as independent samples of one stationary state
            (replicas, or checkpoints further apart than the slowest mode remembers).
        eigenpairs: top k eigenpairs of H.
        topology: M(t).
        rule: order, momentum, dampening, Nesterov.
        learning_rate: alpha.
        weight_decay: adds to every lambda.
        noise_along: (k,) c_i = u_i^T C u_i/B.
        noise_trace: Tr C/B.
        history: (T, n, n) matrices of the T steps before the checkpoint, the last one last.
        tolerance: of "agrees".

    Returns:
        over (`graph_mode`, `eigen_index`): energy, energy_predicted (mean over samples, weights^2); over `eigen_index`: mode_energy =
        (1/n) sum over graph modes, mode_energy_predicted, energy_ratio with energy_ratio_low, energy_ratio_high, verdict, and
        consensus_share, the mode's share of Tr Sigma_w; over `graph_mode`: graph_mode_real, graph_mode_imag, outside_energy,
        outside_energy_predicted; outside_ratio, _low, _high, outside_verdict and outside_rank r (1 where two learners leave it
        unknown); consensus_trace = Tr Sigma_w, consensus_trace_predicted.

    Raises:
        ValueError: one learner, shapes that do not fit, or graph modes that do not separate.
    """
    samples = deviations[None] if deviations.ndim == 2 else deviations
    vectors, k = eigenpairs.vectors, len(eigenpairs.values)
    n = topology.num_learners
    noise_along = np.asarray(noise_along, dtype=np.float64)
    if n == 1:
        raise ValueError("one learner has no disagreement")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("the deviations hold nan or infinity")
    if samples.ndim != 3 or samples.shape[1:] != (n, vectors.shape[0]) or len(samples) == 0:
        raise ValueError(
            f"deviations of shape {tuple(deviations.shape)}, for {n} learners of {vectors.shape[0]} parameters; "
            "give (n, d) or (S, n, d)"
        )
    if history is not None and history.shape[1:] != (n, n):
        raise ValueError(f"history of shape {history.shape}, for {n} learners; give (T, n, n)")
    if noise_along.shape != (k,):
        raise ValueError(f"noise_along has shape {noise_along.shape}, for {k} eigenpairs")
    graph = disagreement_vectors(topology)
    along, gram = _projected(samples, vectors)
    energy = np.abs(np.einsum("ja,sjk->sak", graph.conj(), along)) ** 2
    rest = gram - along @ along.transpose(0, 2, 1)  # inner products of what is outside the eigenspace
    outside = np.einsum("ja,sjl,la->sa", graph.conj(), rest, graph).real

    alpha = float(learning_rate)
    values, noise = np.append(eigenpairs.values, 0.0), np.append(noise_along, max(0.0, noise_trace - noise_along.sum()))
    variance, covariance = learner_covariance(topology, rule, alpha * (values + weight_decay), history)
    level = np.where(noise > 0, alpha**2 * noise, 0.0)
    with np.errstate(invalid="ignore"):  # an unstable mode without noise stays where it is
        predicted = np.where(level > 0, variance * level, 0.0)
    mode, mode_predicted = energy.mean(0).sum(0), predicted[:, :k].sum(0)
    columns = zip(mode, mode_predicted, covariance[:k], strict=True)
    ratio, low, high = np.array([_interval(*column, len(samples)) for column in columns]).reshape(-1, 3).T
    trace = float(np.einsum("sjj->", gram - gram.mean(1, keepdims=True))) / len(samples) / n
    rank = _effective_rank(rest, covariance[k])
    # the rank itself is known from few numbers: widen the interval as Student's t widens the normal one
    degrees = max(1, len(samples) * (n * (n - 1) // 2 - 1))
    sure = max(1.0, rank * (Z95 / float(student.ppf(0.975, degrees))) ** 2)
    beyond = _interval(outside.mean(0).sum(), predicted[:, -1].sum(), covariance[k], sure * len(samples))
    mu = disagreement_modes(topology).mean(0)
    made = xr.Dataset(
        {
            "eigenvalue": ("eigen_index", eigenpairs.values, {"long_name": "top eigenvalues of H", "units": "nats/weight^2"}),
            "graph_mode_real": ("graph_mode", mu.real, {"long_name": "graph mode mu, averaged over a period", "units": "1"}),
            "graph_mode_imag": ("graph_mode", mu.imag, {"long_name": "its imaginary part", "units": "1"}),
            "energy": (("graph_mode", "eigen_index"), energy.mean(0), {"long_name": "|v_a^H delta u_i|^2"}),
            "energy_predicted": (("graph_mode", "eigen_index"), predicted[:, :k], {"long_name": "stationary variance of the mode"}),
            "mode_energy": ("eigen_index", mode / n, {"long_name": "u_i^T Sigma_w u_i"}),
            "mode_energy_predicted": ("eigen_index", mode_predicted / n, {"long_name": "its stationary mean"}),
            "outside_energy": ("graph_mode", outside.mean(0), {"long_name": "energy outside the eigenspace"}),
            "outside_energy_predicted": ("graph_mode", predicted[:, -1], {"long_name": "its stationary mean at lambda = 0"}),
            "consensus_trace": ((), trace, {"long_name": "Tr Sigma_w"}),
            "consensus_trace_predicted": ((), float(predicted.sum()) / n, {"long_name": "Tr Sigma_w of minibatch noise alone"}),
            "energy_ratio": ("eigen_index", ratio, {"long_name": "measured over predicted energy"}),
            "energy_ratio_low": ("eigen_index", low, {"long_name": "lower end of its 95% interval"}),
            "energy_ratio_high": ("eigen_index", high, {"long_name": "upper end of its 95% interval"}),
            "consensus_share": ("eigen_index", mode / n / trace if trace else np.full(k, math.nan), {"long_name": "share of Tr Sigma_w"}),
            "outside_ratio": ((), beyond[0], {"long_name": "measured over predicted energy outside the eigenspace"}),
            "outside_ratio_low": ((), beyond[1], {"long_name": "lower end of its 95% interval"}),
            "outside_ratio_high": ((), beyond[2], {"long_name": "upper end of its 95% interval"}),
            "outside_rank": ((), rank, {"long_name": "effective rank of the noise outside the eigenspace", "units": "1"}),
        },
        attrs={"num_samples": len(samples), "num_learners": n, "order": rule.order, "tolerance": tolerance},
    )  # fmt: skip
    for name, variable in made.data_vars.items():
        ratio_like = "ratio" in str(name) or "share" in str(name)
        variable.attrs.setdefault("units", "1" if ratio_like else "weights^2")
    bands = zip(ratio, low, high, mode_predicted, strict=True)
    made["verdict"] = ("eigen_index", np.array([_verdict(*band, tolerance) for band in bands], dtype=str))
    made["outside_verdict"] = ((), _verdict(*beyond, float(predicted[:, -1].sum()), tolerance))
    return made


def ratio_interval(variances: np.ndarray, count: float | int = 1) -> tuple[float, float]:
    r"""95% interval of true over predicted variance, per unit of measured over predicted energy: [1/q_0.975, 1/q_0.025].

    q_p are the quantiles of $Q = \sum_a w_a \chi^2_S/S$, w_a = s_a/sum s, by the saddlepoint formula of Lugannani & Rice (1980; for such
    sums Kuonen 1999): with the cumulant function $\kappa(t) = -\frac{S}{2} \sum_a \log(1 - 2 w_a t/S)$,

    $$P[Q \le \kappa'(t)] = \Phi(r) + \varphi(r) (1/r - 1/v), \quad r = \mathrm{sign}(t) \sqrt{2 (t \kappa'(t) - \kappa(t))}, \quad
      v = t \sqrt{\kappa''(t)},$$

    solved for t. Against exact and simulated distributions the lower 2.5% are 2.2 to 2.5%, the upper ones 2.4 to 2.6%.

    Args:
        variances: (m,) s_a, not negative, not all 0.
        count: S independent samples of each; need not be whole.

    >>> low, high = ratio_interval(np.ones(7))
    >>> round(low, 2), round(high, 2)  # 7/chi^2 with 7 degrees of freedom: 0.44 and 4.14
    (0.44, 4.15)
    """
    weights = variances / variances.sum() / count
    limit = 1 / (2 * weights.max())

    def at(t: float) -> tuple[float, float]:
        """The quantile kappa'(t) and its probability."""
        spare = 1 - 2 * weights * t
        slope, bend = (scale * ((weights / spare) ** r).sum() for scale, r in ((count, 1), (2 * count, 2)))
        v = t * math.sqrt(bend)
        if abs(v) < 1e-4:  # the limit at the mean
            skewness = 8 * count * ((weights / spare) ** 3).sum() / bend**1.5
            return float(slope), 0.5 + float(skewness) / (6 * math.sqrt(2 * math.pi))
        root = math.copysign(math.sqrt(2 * t * slope + count * np.log(spare).sum()), t)
        return float(slope), float(ndtr(root) + math.exp(-(root**2) / 2) / math.sqrt(2 * math.pi) * (1 / root - 1 / v))

    def quantile(probability: float) -> float:
        u = brentq(lambda u: at(limit * -math.expm1(-u))[1] - probability, -20.0, 20.0)
        return at(limit * -math.expm1(-u))[0]

    return 1 / quantile(0.975), 1 / quantile(0.025)


def _projected(samples: Tensor, vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """delta u_i (S, n, k) and delta delta^T (S, n, n), float64."""
    along = torch.stack([inner(delta, vectors.T.to(delta)) for delta in samples])
    gram = torch.stack([inner(delta, delta) for delta in samples])
    return along.cpu().numpy(), gram.cpu().numpy()


def _interval(
    measured: float, predicted: float, covariance: np.ndarray, count: float | int
) -> tuple[float, float, float]:
    """Measured over predicted energy and its 95% interval; 0 where the prediction is infinite, nan where it is 0."""
    if not 0 < predicted < math.inf:
        return (0.0, 0.0, 0.0) if predicted > 0 else (math.nan, math.nan, math.nan)
    low, high = ratio_interval(np.linalg.eigvalsh(covariance)[1:].clip(0), count)
    return float(measured / predicted), float(measured / predicted) * low, float(measured / predicted) * high


def _effective_rank(rest: np.ndarray, covariance: np.ndarray) -> float:
    """Tr(C)^2/|C|_F^2 of the noise outside the eigenspace, from inner products of deviations (S, n, n); at least 1."""
    if not np.isfinite(covariance).all():
        return 1.0
    variances, vectors = np.linalg.eigh(covariance)
    kept = variances > max(NOTHING, 1e-10 * variances[-1])
    m = int(kept.sum())
    if m < 2:
        return 1.0
    whiten = vectors[:, kept] / np.sqrt(variances[kept])
    products = whiten.T @ rest @ whiten
    lengths = np.einsum("saa->sa", products)
    # of independent N(0, C): products of two have mean square |C|_F^2, squared lengths a variance of 2 |C|_F^2
    pairs = (products**2).sum() - (lengths**2).sum()
    spread = ((lengths - lengths.mean(1, keepdims=True)) ** 2).sum()
    squares = float(pairs + spread) / (len(rest) * (m * (m - 1) + 2 * (m - 1)))
    return max(1.0, float(lengths.mean() ** 2 / squares)) if squares > 0 else 1.0


def _verdict(ratio: float, low: float, high: float, predicted: float, tolerance: float) -> Verdict:
    if math.isnan(ratio):
        return "not applicable"
    if math.isinf(predicted):
        return "disagrees"
    if low >= 1 - tolerance and high <= 1 + tolerance:
        return "agrees"
    return "disagrees" if high < 1 - tolerance or low > 1 + tolerance else "inconclusive"
