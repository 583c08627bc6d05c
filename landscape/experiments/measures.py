"""The measures of one checkpoint: labelled numbers each, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import xarray as xr

from landscape.curvature.lanczos import top_eigenpairs
from landscape.experiments.checkpoint import Checkpoint
from landscape.theory.ledger import one_step_ledger
from landscape.theory.smoothed_loss import second_order_rate_ratio, second_order_rate_ratio_autodiff
from landscape.theory.smoothing import KERNELS, smoothness_bounds
from landscape.theory.stability import coupled_stability
from landscape.theory.stationary import predicted_consensus


def _effective_learning_rate(at: Checkpoint) -> xr.Dataset:
    kept = ["alpha_e_ratio", "alignment", "gradient_norm_squared"]
    found = at.decomposition[[n for n in at.decomposition if str(n).startswith(tuple(kept)) and n != "alpha_e_ratio_exact"]
                             + [n for n in ("identity_error", "gradient_is_significant") if n in at.decomposition]]  # fmt: skip
    names, values, errors = [], [], []

    def predict(name: str, value: float, error: float) -> None:
        names.append(name)
        values.append(value)
        errors.append(error)

    exact = at.decomposition.get("alpha_e_ratio_exact")
    predict("exact", float(exact) if exact is not None else math.nan, 0.0 if exact is not None else math.nan)
    spread = at.learners.consensus_distance > 0
    for kernel in ("isotropic", "covariance"):
        if not spread and not at.sigma0:
            predict(kernel, 1.0, 0.0)
        elif kernel in at.smoothed_losses:
            number = at.smoothed_losses[kernel].rate_ratio
            predict(kernel, number.value, number.stderr)
        else:
            predict(kernel, math.nan, math.nan)
    for name, ratio in (
        ("second-order", second_order_rate_ratio),
        ("second-order-autodiff", second_order_rate_ratio_autodiff),
    ):
        predict(
            name, ratio(at.objective, at.learners, at.gradient) if spread else (math.nan if at.sigma0 else 1.0), 0.0
        )
    return found.assign(
        alpha_e_ratio_predicted=("prediction", np.asarray(values), {"long_name": "E alpha_e/alpha as predicted"}),
        alpha_e_ratio_predicted_stderr=("prediction", np.asarray(errors)),
    ).assign_coords(prediction=names)


def _noise(at: Checkpoint) -> xr.Dataset:
    drop = ["alpha_e_ratio", "alpha_e_ratio_mean", "alpha_e_ratio_stderr", "alpha_e_ratio_exact"]
    found = at.decomposition.drop_vars([n for n in drop if n in at.decomposition])
    alpha, n, batch = at.learning_rate, len(at.learners), at.config.local_batch_size
    c = at.covariance
    predicted = math.nan
    if at.config.algorithm == "dpsgd":
        try:
            predicted = predicted_consensus(
                at.topology, at.rule, alpha, at.eigenpairs.values, c.along / batch, c.trace / batch
            )
        except ValueError:
            predicted = math.nan  # graph modes that do not separate
    elif not at.sigma0:
        predicted = 0.0
    more = {
        "Delta_S_predicted": (alpha**2 * c.trace / (n * batch), "alpha^2 Tr(C)/(n B)"),
        "gradient_covariance_trace": (c.trace, "Tr C, over the whole training set"),
        "noise_scale": (c.noise_scale, "Tr(C)/|g|^2"),
        "consensus_distance": (at.learners.consensus_distance, "sqrt(Tr Sigma_w)"),
        "sigma_w": (math.sqrt(at.learners.weight_variance), "per-parameter spread sqrt(Tr Sigma_w/d)"),
        "consensus_trace": (at.learners.consensus_distance**2, "Tr Sigma_w"),
        "consensus_trace_predicted": (
            predicted,
            "Tr Sigma_w sustained by minibatch noise alone on the local quadratic; infinite where that is unstable",
        ),
    }
    return found.assign({name: ((), value, {"long_name": text}) for name, (value, text) in more.items()})


def _curvature(at: Checkpoint) -> xr.Dataset:
    s = at.settings
    lowest = top_eigenpairs(at.hessian, 1, "SA", tol=0.02, max_matvecs=s.max_matvecs, seed=s.seed, miss_probability=1.0)
    found = at.eigenpairs.to_xarray().drop_attrs()
    return found.assign(
        lambda_max=((), float(at.eigenpairs.values[0]), {"long_name": "largest eigenvalue of H(w_a)"}),
        lambda_max_residual=((), float(at.eigenpairs.residuals[0])),
        lambda_min=((), float(lowest.values[0]), {"long_name": "smallest eigenvalue of H(w_a)"}),
        learner_lambda_max=(
            "learner",
            np.asarray(at.learner_lambda_max),
            {"long_name": "largest eigenvalue of H(w_j)"},
        ),
        noise_along=("eigen_index", at.covariance.along, {"long_name": "u_i^T C u_i"}),
    )


def _smoothing(at: Checkpoint) -> xr.Dataset:
    parts = []
    for kernel in KERNELS:
        if kernel in at.smoothed:
            parts.append(at.smoothed[kernel].to_xarray())
    missing = [k for k in KERNELS if k not in at.smoothed]
    made = (
        xr.concat(parts, "kernel")
        .assign_coords(kernel=[k for k in KERNELS if k in at.smoothed])
        .reindex(kernel=list(KERNELS))
    )
    largest = max([c.largest_gradient for c in at.smoothed.values()] + [float(at.gradient.norm())])
    curvature = max(
        [*at.learner_lambda_max, float(at.eigenpairs.values[0]), *(c.smoothness for c in at.smoothed.values())]
    )
    sigma = at.sigma0 or math.sqrt(at.learners.weight_variance)
    bounds = smoothness_bounds(largest, sigma, curvature)
    if "isotropic" in at.smoothed:
        bounds["local"] = math.sqrt(at.smoothed["isotropic"].gradient_covariance_top) / sigma
    else:
        bounds["local"] = math.inf
    return made.assign(
        bound=("bound_kind", np.asarray(list(bounds.values())), {"long_name": "estimated bound on the smoothness of L~, isotropic kernel"}),
        lipschitz_constant=((), largest, {"long_name": "largest gradient norm met: an estimate of G"}),
    ).assign_coords(bound_kind=list(bounds)).assign_attrs(kernels_left_out=", ".join(missing))  # fmt: skip


def _stability(at: Checkpoint) -> xr.Dataset:
    alpha = at.learning_rate
    half = alpha / 2
    names = ["w_a", "sharpest-learner", *KERNELS]
    values = [half * float(at.eigenpairs.values[0]), half * max(at.learner_lambda_max)]
    values += [half * at.smoothed[k].lambda_max if k in at.smoothed else math.nan for k in KERNELS]
    errors = [half * float(at.eigenpairs.residuals[0]), math.nan]
    errors += [half * at.smoothed[k].lambda_max_stderr if k in at.smoothed else math.nan for k in KERNELS]
    made = xr.Dataset(
        {
            "alpha_lambda_half": (
                "function",
                np.asarray(values),
                {"long_name": "alpha lambda_max / 2; above 1 a plain gradient step is unstable"},
            ),
            "alpha_lambda_half_stderr": (
                "function",
                np.asarray(errors),
                {"long_name": "standard error over deviations; the residual for w_a"},
            ),
        },
        coords={"function": names},
    )
    for name, value in at.run.record["topology"]["thresholds"].items():
        made[f"threshold_{name}"] = (
            (),
            value,
            {"long_name": f"largest stable alpha lambda of the {name}, on a quadratic"},
        )
    if at.config.algorithm == "dpsgd" and len(at.learner_hessians) == len(at.learners) > 1:
        coupled = coupled_stability(at.learner_hessians, at.mixing, at.rule, alpha, at.learner_lambda_max,
                                    max_matvecs=at.settings.max_matvecs, seed=at.settings.seed)  # fmt: skip
        for name, value in asdict(coupled).items():
            made[f"coupled_{name}"] = ((), value)
    return made


def _ledger(at: Checkpoint) -> xr.Dataset:
    return one_step_ledger(at.objective, at.mean, at.gradient, at.draws, at.hessian, at.learning_rate).drop_attrs()


MEASURES: dict[str, Callable[[Checkpoint], xr.Dataset]] = {
    "effective-learning-rate": _effective_learning_rate,
    "noise": _noise,
    "curvature": _curvature,
    "smoothing": _smoothing,
    "stability": _stability,
    "ledger": _ledger,
}
"""Measures by name; each gives labelled numbers for one checkpoint."""
