"""The measures of one checkpoint: labelled numbers each, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import xarray as xr

from landscape.curvature.gradient_moments import gradient_covariance
from landscape.curvature.lanczos import top_eigenpairs
from landscape.curvature.low_rank import LowRankOperator, SampleCovarianceOperator
from landscape.curvature.operators import SymmetricOperator
from landscape.experiments.checkpoint import Checkpoint
from landscape.noise.covariance import covariance_spectrum, gradient_covariance_spectrum
from landscape.noise.tails import tail_index
from landscape.theory.alignment import alignment_by_layer, noise_curvature_alignment
from landscape.theory.disagreement import disagreement_spectrum
from landscape.theory.ledger import one_step_ledger
from landscape.theory.modes import disagreement_modes
from landscape.theory.smoothed_loss import second_order_rate_ratio, second_order_rate_ratio_autodiff
from landscape.theory.smoothing import KERNELS, smoothness_bounds
from landscape.theory.smoothing_length import smoothing_length
from landscape.theory.stability import coupled_stability
from landscape.theory.stationary import predicted_consensus

RATE_NAMES = ("alpha_e_ratio", "alignment", "gradient_norm_squared")
"""What of the decomposition is about the rate; the rest is about the noise."""


def _effective_learning_rate(at: Checkpoint) -> xr.Dataset:
    found = at.decomposition[[n for n in at.decomposition if str(n).startswith(RATE_NAMES) and n != "alpha_e_ratio_exact"]
                             + [n for n in ("identity_error", "gradient_is_significant") if n in at.decomposition]]  # fmt: skip
    names, values, errors = [], [], []

    def predict(name: str, value: float, error: float) -> None:
        names.append(name)
        values.append(value)
        errors.append(error)

    exact = at.decomposition.get("alpha_e_ratio_exact")
    predict("exact", float(exact) if exact is not None else math.nan, 0.0 if exact is not None else math.nan)
    still = not callable(at.points) and at.standing.consensus_distance == 0
    for kernel in ("isotropic", "covariance"):
        if still:
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
        known = not callable(at.points)
        predict(name, 1.0 if still else ratio(at.objective, at.standing, at.gradient) if known else math.nan, 0.0)
    return found.assign(
        alpha_e_ratio_predicted=("prediction", np.asarray(values), {"long_name": "E alpha_e/alpha as predicted"}),
        alpha_e_ratio_predicted_stderr=("prediction", np.asarray(errors)),
    ).assign_coords(prediction=names)


def _noise(at: Checkpoint) -> xr.Dataset:
    found = at.decomposition.drop_vars([n for n in at.decomposition.data_vars if str(n).startswith(RATE_NAMES)])
    found["gradient_norm_squared"] = at.decomposition["gradient_norm_squared"]
    alpha, n, batch = at.learning_rate, len(at.learners), at.local_batch_size
    c = at.covariance
    predicted = math.nan
    if at.config.algorithm == "dpsgd" and not at.config.num_faulty:
        try:
            predicted = predicted_consensus(
                at.topology,
                at.rule,
                alpha,
                at.eigenpairs.values,
                c.along / batch,
                c.trace / batch,
                weight_decay=at.config.weight_decay,
            )
        except ValueError:
            predicted = math.nan  # graph modes that do not separate
    elif at.config.algorithm in ("ssgd", "ssgd-star") and not at.sigma0:
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
    lowest = top_eigenpairs(
        at.hessian, 1, "SA", tol=0.02, max_matvecs=s.max_matvecs, seed=at.seed, miss_probability=1.0
    )
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
    if not at.kernels:
        nothing = {
            name: ("kernel", np.full(len(KERNELS), math.nan))
            for name in ("smoothness", "lambda_max_stderr", "loss_change")
        }
        reason = "calibrated noise that is no kernel of these"
        made = xr.Dataset(
            {**nothing, "bound": ("bound_kind", [math.nan])}, coords={"kernel": list(KERNELS), "bound_kind": ["paper"]}
        )
        return made.assign_attrs(kernels_left_out=reason)
    parts = [at.smoothed[kernel].to_xarray() for kernel in KERNELS if kernel in at.smoothed]
    missing = [k for k in KERNELS if k not in at.smoothed]
    made = (
        xr.concat(parts, "kernel")
        .assign_coords(kernel=[k for k in KERNELS if k in at.smoothed])
        .reindex(kernel=list(KERNELS))
    )
    for name, text in (
        ("loss_change", "L~(w_a) - L(w_a), the average-direction sharpness under the kernel, in nats"),
        ("gradient_ratio", "|grad L~|^2/|g|^2 at w_a"),
    ):
        numbers = [getattr(at.smoothed_losses[k], name) if k in at.smoothed_losses else None for k in KERNELS]
        made[name] = ("kernel", [math.nan if v is None else v.value for v in numbers], {"long_name": text})
        made[f"{name}_stderr"] = ("kernel", [math.nan if v is None else v.stderr for v in numbers])
    largest = max([c.largest_gradient for c in at.smoothed.values()] + [float(at.gradient.norm())])
    curvature = max(
        [*at.learner_lambda_max, float(at.eigenpairs.values[0]), *(c.smoothness for c in at.smoothed.values())]
    )
    sigma = at.sigma0 or math.sqrt(at.standing.weight_variance)
    bounds = smoothness_bounds(largest, sigma, curvature)
    if "isotropic" in at.smoothed:
        bounds["local"] = math.sqrt(at.smoothed["isotropic"].gradient_covariance_top) / sigma
    else:
        bounds["local"] = math.inf
    return made.assign(
        bound=("bound_kind", np.asarray(list(bounds.values())), {"long_name": "estimated bound on the smoothness of L~, isotropic kernel"}),
        lipschitz_constant=((), largest, {"long_name": "largest gradient norm met: an estimate of G"}),
    ).assign_coords(bound_kind=list(bounds)).assign_attrs(kernels_left_out=", ".join(missing))  # fmt: skip


def _smoothing_length(at: Checkpoint) -> xr.Dataset:
    s = at.settings
    if not at.kernels:
        return xr.Dataset(
            {"target": ((), 2 / at.learning_rate)},
            attrs={"kernels_left_out": "calibrated noise that is no kernel of these"},
        )
    parts = [
        smoothing_length(at.objective, at.standing, 2 / at.learning_rate, kernel=k, num_samples=s.num_smoothing_samples,
                         max_matvecs=s.smoothing_matvecs, seed=at.seed, sigma=at.sigma0).to_xarray()
        for k in at.kernels
    ]  # fmt: skip
    parts = [
        part.assign_coords(scale_index=np.arange(part.sizes["scale_index"])) for part in parts
    ]  # of different lengths
    return xr.concat(parts, "kernel", join="outer").assign_coords(kernel=list(at.kernels)).reindex(kernel=list(KERNELS))


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
    for name, value in at.thresholds.items():
        made[f"threshold_{name}"] = (
            (),
            value,
            {"long_name": f"largest stable alpha lambda of the {name}, on a quadratic"},
        )
    if at.config.algorithm == "dpsgd" and not at.config.num_faulty and len(at.learner_hessians) == len(at.learners) > 1:
        decay = at.config.weight_decay
        hessians = [h.shift(decay) for h in at.learner_hessians] if decay else at.learner_hessians
        coupled = coupled_stability(hessians, at.mixing, at.rule, alpha, [v + decay for v in at.learner_lambda_max],
                                    max_matvecs=at.settings.max_matvecs, seed=at.seed)  # fmt: skip
        for name, value in asdict(coupled).items():
            made[f"coupled_{name}"] = ((), value)
    return made


def _ledger(at: Checkpoint) -> xr.Dataset:
    return one_step_ledger(at.objective, at.mean, at.gradient, at.draws, at.hessian, at.learning_rate).drop_attrs()


def _covariance(at: Checkpoint) -> xr.Dataset:
    s, alpha = at.settings, at.learning_rate
    own = gradient_covariance_spectrum(
        at.objective, at.mean, num_examples=s.num_covariance_examples, seed=at.seed, centre=at.gradient, memory_budget=at.share(1)
    )  # fmt: skip
    steps = {name: covariance_spectrum(rows, scale=alpha) for name, rows in at.step_noise.items()}
    beside = xr.concat([found.to_xarray().isel(block=0, drop=True) for found in steps.values()], "step_noise")
    beside = beside.assign_coords(step_noise=list(steps)).reindex(step_noise=list(STEP_NOISES))
    parts = [
        found.rename({str(name): f"{prefix}_{name}" for name in [*found.data_vars, "eigen_index"]}).drop_attrs(deep=False)
        for found, prefix in ((own.to_xarray(), "gradient"), (beside, "step"))
    ]  # fmt: skip
    made = xr.merge(parts)
    norms = at.noise_norms
    if len(norms) >= MIN_NORMS:
        tail = tail_index(norms)
        made["tail_index"] = ((), tail.index, {"long_name": "exponent of the tail of |g_i - g| over examples (Hill)"})
        made["tail_index_stderr"] = ((), tail.stderr, {"long_name": "standard error of tail_index, if the tail is a power law"})  # fmt: skip
        made["tail_verdict"] = ((), tail.verdict, {"long_name": "heavy, light or undecided"})
    return made.assign_attrs(num_covariance_examples=own.num_samples)


def _alignment(at: Checkpoint) -> xr.Dataset:
    s = at.settings
    noise: dict[str, SymmetricOperator] = {
        "gradient": gradient_covariance(at.objective, at.mean, memory_budget=at.share(1))
    }
    fits = not at.draws.point_rows.spilled  # else the landscape noise is left out: its rows are needed whole
    if float(at.decomposition["Delta_2_mean"]) > 0 and s.num_draws >= MIN_DRAWS and fits:
        noise["landscape"] = SampleCovarianceOperator(at.draws.landscape_rows.tensor())
    if at.learners.consensus_distance > 0:
        noise["consensus"] = LowRankOperator(at.learners.deviations.to(at.mean))
    found = noise_curvature_alignment(at.hessian, at.eigenpairs, noise, num_probes=s.num_probes, max_matvecs=s.max_matvecs, seed=at.seed)  # fmt: skip
    blank = {name: "" for name in found.data_vars if found[name].dtype.kind in "UO"}
    return found.reindex(
        noise=list(NOISE_KINDS), fill_value={n: blank.get(str(n), np.nan) for n in found.data_vars}
    ).drop_attrs(deep=False)


def _alignment_by_layer(at: Checkpoint) -> xr.Dataset:
    s = at.settings
    return alignment_by_layer(at.objective, at.mean, num_eigenpairs=s.num_eigenpairs, max_matvecs=s.max_matvecs, seed=at.seed)  # fmt: skip


def _disagreement(at: Checkpoint) -> xr.Dataset:
    reason = ""
    if at.learners.consensus_distance == 0:
        reason = "there is one learner or all are equal, and nothing to resolve"
    elif at.config.algorithm != "dpsgd" or at.config.num_faulty:
        reason = "the modes are those of DPSGD with honest learners"
    else:
        try:
            disagreement_modes(at.topology)
        except ValueError as error:  # graph modes that do not separate
            reason = str(error)
    if reason:
        said = xr.Dataset({"consensus_trace": ((), at.learners.consensus_distance**2, {"long_name": "Tr Sigma_w"})})
        return said.assign_attrs(unresolved=reason)
    c, drawn = at.covariance, range(max(0, at.step - HISTORY), at.step)
    gammas = {at.config.gamma_at(t) for t in drawn}
    varying = len(drawn) > 0 and (not at.topology.is_static or len(gammas) > 1)
    history = np.stack([at.topology_at(t).matrix(at.config.seed, t) for t in drawn]) if varying else None
    return disagreement_spectrum(
        at.learners.deviations.to(at.mean), at.eigenpairs, at.topology, at.rule, learning_rate=at.learning_rate,
        noise_along=c.along / at.local_batch_size, noise_trace=c.trace / at.local_batch_size, history=history,
        weight_decay=at.config.weight_decay,
    ).drop_attrs(deep=False)  # fmt: skip


STEP_NOISES = ("ssgd", "ssgd-star", "dpsgd", "landscape")
"""Steps whose noise covariances stand side by side: with gradients at w_a, at w_a + isotropic noise of the same spread, at the learners' points;
and the landscape-dependent part of the last."""

MIN_NORMS = 40
"""Norms that a tail index needs."""

HISTORY = 500
"""Steps back from a checkpoint whose matrices M(t), where they vary, condition the prediction of the disagreement."""

NOISE_KINDS = ("gradient", "landscape", "consensus")
MIN_DRAWS = 6
"""Draws that a covariance of the landscape noise needs for what is quadratic in it."""

MEASURES: dict[str, Callable[[Checkpoint], xr.Dataset]] = {
    "effective-learning-rate": _effective_learning_rate,
    "noise": _noise,
    "curvature": _curvature,
    "smoothing": _smoothing,
    "stability": _stability,
    "ledger": _ledger,
    "covariance": _covariance,
    "alignment": _alignment,
    "alignment-by-layer": _alignment_by_layer,
    "disagreement": _disagreement,
    "smoothing-length": _smoothing_length,
}
"""Measures by name; each gives labelled numbers for one checkpoint."""

DEFAULT_MEASURES = tuple(name for name in MEASURES if name != "smoothing-length")
"""What is measured unasked: all but the dearest."""
