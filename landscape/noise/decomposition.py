"""Effective learning rate and the two parts of the noise (theory.md sec. 3; the paper's central quantities)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from landscape import streams
from landscape.functional import ParameterLayout
from landscape.noise.draws import Draws, Points, draw_gradients, points_of
from landscape.noise.reference import ReferenceGradient, reference_gradient
from landscape.noise.rows import pieces, products_by_part
from landscape.objective import Objective
from landscape.statistics import Estimate, estimate

if TYPE_CHECKING:
    from landscape.checkpoints import Learners

PER_DRAW = {
    "alpha_e_ratio": ("effective over nominal learning rate, alpha_e/alpha", "1"),
    "Delta": ("strength |eta|^2 of the noise orthogonal to g", "weights^2"),
    "Delta_S": ("minibatch noise alpha^2 |xi_S|^2", "weights^2"),
    "Delta_2": ("landscape-dependent noise alpha^2 |xi_D|^2", "weights^2"),
    "cross": ("2 alpha^2 xi_S . xi_D", "weights^2"),
    "xi_squared": ("whole deviation alpha^2 |g_a - g|^2", "weights^2"),
}
LAYER_SUFFIX = "_by_layer"


def measure_noise(
    objective: Objective,
    learners: Learners,
    *,
    learning_rate: float | int | None = None,
    local_batch_size: int | None = None,
    num_draws: int = 32,
    points: Points | None = None,
    num_gradient_examples: int | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Effective learning rate and noise decomposition at a checkpoint, whole and layer by layer.

    Args:
        objective: L over the training data.
        learners: {w_j}, held fixed.
        learning_rate: alpha; by default what the checkpoint recorded.
        local_batch_size: B; likewise.
        num_draws: K fresh minibatch assignments.
        points: where the run takes its gradients: (n, d), or a function of the draw; by default as the checkpoint's algorithm and order
            say (`landscape.noise.draws.points_of`): w_j, (M w)_j under CTA, w_a + fresh noise for SSGD*.
        num_gradient_examples: m, if the full gradient g is too dear: it is then estimated from m examples drawn once, and every
            quantity is debiased (`landscape.noise.reference`).
        seed: of the draws, which differ from step to step of a run.
        memory_budget: bytes for the draws, (2 K, d) numbers; beyond it they lie in a scratch file.

    Returns:
        over `draw`: alpha_e_ratio, Delta, Delta_S, Delta_2, cross, xi_squared (units of weights squared), and the same over
        (layer, draw) as NAME_by_layer, with alpha_e, g and eta of the layer alone; the mean of each as NAME_mean and its standard error NAME_stderr,
        over draws at fixed learners and, if g was estimated, over its examples; alignment = g_a . g, the numerator of the ratio, likewise;
        gradient_norm_squared = |g|^2 with its error, and whether it is significantly positive; alpha_e_ratio_exact = g . mean_j g(x_j)/|g|^2
        (fixed points, exact g); systematic_share = |E xi_D|^2/E|xi_D|^2 from pairs of draws, and systematic_share_exact
        from the full gradients; identity_error, the largest relative violation of the identities of theory.md sec. 3
        over the draws, from vectors formed one by one (exact g). A ratio is nan where |g|^2 is estimated as not positive. With one learner there is
        no disagreement: Delta_2 and cross are zero, and the systematic share is nan.

    Cost: 2 n K minibatch gradients, one full gradient (or m/N of one), and n for the exact prediction.

    Source: Zhang et al., arXiv 2112.01433; exact prediction, debiasing and systematic share are landscape's own.
    """
    if not learners.is_finite:
        raise ValueError(f"the checkpoint of step {learners.step} holds weights that are not finite")
    alpha = float(_recorded(learners, "learning_rate", learning_rate))
    batch = int(_recorded(learners, "local_batch_size", local_batch_size))
    seed = streams.at_step(seed, learners.step)
    chosen = points_of(learners, seed) if points is None else points
    mean = learners.mean.to(objective.device, objective.dtype)
    reference = reference_gradient(objective, mean, num_gradient_examples, seed=seed)
    draws = draw_gradients(
        objective, mean, chosen, num_learners=len(learners), local_batch_size=batch, num_draws=num_draws, seed=seed,
        memory_budget=memory_budget,
    )  # fmt: skip
    known = reference.is_exact and not callable(chosen)
    smoothed = smoothed_by_points(objective, chosen, mean, reference.groups[0]) if known else None  # type: ignore[arg-type]
    return decompose(draws, reference, alpha, objective.model.layout, smoothed)


def _recorded(learners: Learners, name: str, given: float | int | None) -> float | int:
    value = learners.facts.get(name) if given is None else given
    if value is None:
        raise ValueError(f"the checkpoint of step {learners.step} does not record its {name}; give {name}=")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, not {value}")
    return value


def smoothed_by_points(
    objective: Objective,
    points: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"],
    gradient: Float[Tensor, " d"],
) -> Float[Tensor, " d"]:
    """(1/n) sum_j g(x_j), the gradient smoothed by the learners' own deviations; g itself where all are at w_a."""
    points = points.to(mean)
    if torch.equal(points, mean.expand_as(points)):
        return gradient
    total = torch.zeros_like(mean)
    for point in points.split(max(1, objective.memory_budget // (4 * len(mean) * mean.dtype.itemsize))):
        total += objective.stacked_gradients(point).sum(0)
    return total / len(points)


def decompose(
    draws: Draws,
    reference: ReferenceGradient,
    learning_rate: float,
    layout: ParameterLayout,
    smoothed: Float[Tensor, " d"] | None = None,
) -> xr.Dataset:
    """The quantities of theory.md sec. 3 from draws, the full gradient and, where known, E g_a. See `measure_noise`."""
    products = _Products.of(draws, reference, layout)
    everyone = np.arange(len(reference.groups))
    squared = products.squared_gradient(reference, everyone)
    if reference.is_exact and not squared[0] > 0:
        raise ValueError("the full gradient vanishes at w_a, so the effective learning rate is not defined")
    values = products.per_draw(reference, everyone, learning_rate)
    partial = (
        [products.per_draw(reference, kept, learning_rate) for kept in reference.left_out()]
        if not reference.is_exact
        else []
    )
    result = xr.Dataset(
        coords={"layer": products.layers},
        attrs={
            "learning_rate": learning_rate, "num_learners": draws.num_learners, "local_batch_size": draws.local_batch_size,
            "num_draws": len(draws), "draw_seed": draws.seed,
            "errors": "standard errors over draws of minibatches at fixed learners" + ("" if reference.is_exact else " and over the examples of the estimated full gradient"),
            "full_gradient": "exact" if reference.is_exact else f"estimated from {len(reference.groups) * reference.group_size} of {reference.population} examples",
        },
    )  # fmt: skip
    for name, (text, unit) in {**PER_DRAW, "alignment": ("g_a . g", "1/weights^2")}.items():
        described = {"long_name": text, "units": unit}
        centre, error = _mean_and_error(values[name], [p[name] for p in partial], reference.unsampled)
        result[name] = ("draw", values[name][:, 0], described)
        result[f"{name}_mean"] = ((), centre[0], described)
        result[f"{name}_stderr"] = ((), error[0], {"long_name": f"standard error of {name}"})
        result[f"{name}{LAYER_SUFFIX}"] = (("layer", "draw"), values[name][:, 1:].T, described)
        result[f"{name}{LAYER_SUFFIX}_mean"] = ("layer", centre[1:], described)
        result[f"{name}{LAYER_SUFFIX}_stderr"] = ("layer", error[1:], {"long_name": f"standard error of {name}"})
    _put_norms(result, products, reference, squared)
    _put_shares(result, draws, products)
    if reference.is_exact:
        result["identity_error"] = ((), _identity_error(draws, reference.groups[0], learning_rate, values),
                                    {"long_name": "largest relative violation of the identities"})  # fmt: skip
    if smoothed is not None:
        _put_exact(result, smoothed.double(), reference.groups[0].double(), products.landscape[:, 0])
    return result


class _Products:
    """Inner products of every draw, (K, 1 + layers): the whole first, then each layer.

    a = g_a, s = the same at w_a, x = a - s = xi_D, g_b the groups of the reference gradient.
    """

    def __init__(self, layers: list[str], products: np.ndarray, groups: np.ndarray, num_groups: int) -> None:
        self.layers = layers
        self.points, self.mean, self.landscape = products[..., 0, 0], products[..., 1, 1], products[..., 2, 2]
        self.mean_landscape = products[..., 1, 2]
        self.points_groups, self.mean_groups = products[..., 0, 3:], products[..., 1, 3:]  # (K, 1 + layers, G)
        self.groups = groups  # (1 + layers, G, G)
        assert groups.shape[-1] == num_groups

    @staticmethod
    def of(draws: Draws, reference: ReferenceGradient, layout: ParameterLayout) -> _Products:
        layers, gather = _layers(layout)
        groups = reference.groups
        found = [np.zeros((0, len(layout.sizes), 3, 3 + len(groups)))]
        for at_points, at_mean in draws.some(draws.peers.share(len(draws))):
            total = torch.zeros(len(layout.sizes), 3, 3 + len(groups), dtype=torch.float64, device=groups.device)
            for index, where in pieces(layout.sizes):
                a, s = at_points[where].double(), at_mean[where].double()
                rows = torch.stack([a, s, a - s])
                total[index] += rows @ torch.cat([rows, groups[:, where].double()]).T
            found.append(total.cpu().numpy()[None])
        by_parameter = np.concatenate(draws.peers.collect(np.concatenate(found)))
        summed = np.einsum("kpij,lp->klij", by_parameter, gather)
        return _Products(
            layers,
            summed,
            np.einsum("pij,lp->lij", products_by_part(groups, groups, layout.sizes), gather),
            len(groups),
        )

    def squared_gradient(self, reference: ReferenceGradient, kept: np.ndarray) -> np.ndarray:
        """|g|^2 of the whole and of each layer, (1 + layers,)."""
        return reference.forms(self.groups, kept)

    def per_draw(self, reference: ReferenceGradient, kept: np.ndarray, alpha: float) -> dict[str, np.ndarray]:
        """Each quantity (K, 1 + layers), without bias but for the ratios, from the groups kept."""
        squared = self.squared_gradient(reference, kept)
        points, mean = self.points_groups[..., kept].mean(-1), self.mean_groups[..., kept].mean(-1)
        pairs = self.points_groups[..., :, None] * self.points_groups[..., None, :]
        positive = np.where(squared > 0, squared, np.nan)
        a2 = alpha**2
        return {
            "alpha_e_ratio": points / positive,
            "Delta": a2 * (self.points - reference.forms(pairs, kept) / positive),
            "Delta_S": a2 * (self.mean - 2 * mean + squared),
            "Delta_2": a2 * self.landscape,
            "cross": 2 * a2 * (self.mean_landscape - (points - mean)),
            "xi_squared": a2 * (self.points - 2 * points + squared),
            "alignment": points,
        }


def _layers(layout: ParameterLayout) -> tuple[list[str], np.ndarray]:
    """Names of the layers, and which parameters make the whole (row 0) and each of them, (1 + layers, parameters)."""
    owners = [name.rpartition(".")[0] or name for name in layout.names]
    layers = list(dict.fromkeys(owners))
    gather = np.array([[1.0] * len(owners)] + [[float(o == layer) for o in owners] for layer in layers])
    return layers, gather


def _mean_and_error(values: np.ndarray, partial: list[np.ndarray], unsampled: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean over draws (K, p) and its error; with the jackknife over groups added, and its correction of a ratio's bias."""
    count = len(values)
    mean, variance = values.mean(0), values.var(0, ddof=1) / count
    if partial:
        means = np.stack([p.mean(0) for p in partial])
        groups = len(means)
        variance = variance + unsampled * (groups - 1) / groups * ((means - means.mean(0)) ** 2).sum(0)
        mean = mean - unsampled * (groups - 1) * (means.mean(0) - mean)
    return mean, np.sqrt(variance)


def _put_norms(result: xr.Dataset, products: _Products, reference: ReferenceGradient, squared: np.ndarray) -> None:
    error = np.zeros_like(squared)
    if not reference.is_exact:
        partial = np.stack([products.squared_gradient(reference, kept) for kept in reference.left_out()])
        groups = len(partial)
        error = np.sqrt(reference.unsampled * (groups - 1) / groups * ((partial - partial.mean(0)) ** 2).sum(0))
    result["gradient_norm_squared"] = ((), squared[0], {"long_name": "|g|^2 at w_a"})
    result["gradient_norm_squared_stderr"] = ((), error[0])
    result[f"gradient_norm_squared{LAYER_SUFFIX}"] = ("layer", squared[1:], {"long_name": "|g|^2 at w_a"})
    result[f"gradient_norm_squared{LAYER_SUFFIX}_stderr"] = ("layer", error[1:])
    result["gradient_is_significant"] = ((), bool(squared[0] > 2 * error[0]), {"long_name": "|g|^2 lies more than two standard errors above zero; if not, ratios to it mean nothing"})  # fmt: skip


def _put_shares(result: xr.Dataset, draws: Draws, products: _Products) -> None:
    """|E xi_D|^2/E|xi_D|^2 by the mean over pairs of draws, its error by leaving out one draw at a time."""
    strength = products.landscape[:, 0]
    count = len(strength)
    share = Estimate(math.nan, math.nan, count)
    if strength.sum() > 0:
        rows = draws.landscape_rows
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for k in range(count):
            total += rows.get(slice(k, k + 1))[0]
        along = np.array([float(rows.get(slice(k, k + 1))[0].double() @ total) for k in range(count)])
        whole = float(total @ total)
        pairs = whole - strength.sum()  # sum over pairs of draws
        systematic = pairs / (count * (count - 1))
        value = systematic / strength.mean()
        if count > 2:
            rest = (pairs - 2 * (along - strength)) / ((count - 1) * (count - 2))
            others = rest / ((strength.sum() - strength) / (count - 1))
            error = math.sqrt((count - 1) / count * float(((others - others.mean()) ** 2).sum()))
        else:
            error = math.nan
        share = Estimate(value, error, count)
    described = {"long_name": "|E xi_D|^2 / E|xi_D|^2 from pairs of draws", "units": "1"}
    result["systematic_share"] = ((), share.value, described)
    result["systematic_share_stderr"] = ((), share.stderr, {"long_name": "standard error of systematic_share"})


def _put_exact(result: xr.Dataset, smoothed: Tensor, gradient: Tensor, strength: np.ndarray) -> None:
    ratio = float(smoothed @ gradient / (gradient @ gradient))
    text = "E alpha_e/alpha from the full gradients at the learners"
    result["alpha_e_ratio_exact"] = ((), ratio, {"long_name": text})
    whole, drift = estimate(strength), smoothed - gradient
    share = float(drift @ drift) / whole.value if whole.value > 0 else math.nan
    error = share / whole.value * whole.stderr if whole.value > 0 else math.nan
    text = "|E xi_D|^2 / E|xi_D|^2, the numerator from the full gradients"
    result["systematic_share_exact"] = ((), share, {"long_name": text, "units": "1"})
    result["systematic_share_exact_stderr"] = ((), error)


def _identity_error(draws: Draws, gradient: Tensor, alpha: float, values: dict[str, np.ndarray]) -> float:
    """Largest relative violation of alpha^2 |g_a|^2 = alpha_e^2 |g|^2 + Delta and of Delta_S + Delta_2 + cross = alpha^2 |xi|^2 = Delta +
    (alpha_e - alpha)^2 |g|^2, each vector formed by itself."""
    squared = _inner(gradient, gradient)
    worst = 0.0
    own = draws.peers.share(len(draws))
    for k, (at_points, at_mean) in zip(own, draws.some(own), strict=True):
        share = _inner(at_points, gradient) / squared
        sums = np.zeros(7)
        for _, where in pieces([len(gradient)]):
            g, g_a, s = (v[where].double() for v in (gradient, at_points, at_mean))
            eta, xi, xi_s, xi_d = share * g - g_a, g_a - g, s - g, g_a - s
            pairs = ((g_a, g_a), (eta, eta), (xi, xi), (xi_s, xi_s), (xi_d, xi_d), (xi_s, xi_d), (eta, g))
            sums += [float(a @ b) for a, b in pairs]
        step, delta, whole, minibatch, landscape, cross, along = alpha**2 * sums
        parts = minibatch + landscape + 2 * cross
        gaps = [
            (step - (alpha * share) ** 2 * squared - delta) / step,
            (delta - values["Delta"][k, 0]) / step,
            along / step,
        ]
        if whole > 0:
            gaps += [(parts - whole) / whole, (delta + (alpha * (share - 1)) ** 2 * squared - whole) / whole]
        worst = max(worst, *map(abs, gaps))
    return max(draws.peers.collect(worst))


def _inner(a: Tensor, b: Tensor) -> float:
    return float(products_by_part(a[None], b[None], [len(a)])[0, 0, 0])
