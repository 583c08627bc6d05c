r"""Noise against curvature: how a noise covariance C lies relative to the Hessian H (theory.md sec. 4).

C is any `SymmetricOperator`: the covariance of per-example gradients (`gradient_covariance`), the landscape noise's over draws
(`SampleCovarianceOperator`), or the consensus covariance Sigma_w of the learners (`LowRankOperator`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from landscape.curvature.blocks import diagonal_blocks
from landscape.curvature.gradient_moments import gradient_covariance
from landscape.curvature.lanczos import Eigenpairs, top_eigenpairs
from landscape.curvature.low_rank import LowRankOperator
from landscape.curvature.operators import SymmetricOperator
from landscape.curvature.samplers import forms
from landscape.curvature.vectors import inner
from landscape.objective import Objective, Weights
from landscape.theory.power_law import PowerLaw, power_law
from landscape.theory.product_norms import NORMS, product_norms

RESOLVED = 0.1
"""Largest residual, as a share of the eigenvalue, of a pair that enters a law."""

DESCRIPTIONS = {
    "noise_trace": ("Tr C", "units of C"),
    "noise_frobenius": ("|C|_F", "units of C"),
    "noise_along": ("u_i^T C u_i", "units of C"),
    "eigenvalue": ("top eigenvalues of H", "nats/weight^2"),
    "residual": ("|H u_i - lambda_i u_i|", "nats/weight^2"),
    "hessian_frobenius": ("|H|_F", "nats/weight^2"),
    "trace_product": ("Tr(C H)", "units of C times nats/weight^2"),
    "trace_alignment": ("Tr(C H)/(|C|_F |H|_F)", "1"),
    "commutator": ("|C H - H C|_F/(sqrt(2) |C|_F |H|_F)", "1"),
    "commutator_squared": ("|C H - H C|_F^2/(2 |C|_F^2 |H|_F^2)", "1"),
    "energy_share": ("share of Tr C in the top eigenspace of H", "1"),
    "energy_over_chance": ("energy share over k/d", "1"),
    "subspace_overlap": ("|U_k^T V_k|_F^2/k of the top eigenspaces of H and C", "1"),
    "chance": ("k/d, of overlaps and energy shares", "1"),
    "num_parameters": ("parameters", "1"),
    "num_hessian_products": ("products with H", "1"),
    "num_noise_products": ("products with C", "1"),
}


def noise_curvature_alignment(
    hessian: SymmetricOperator,
    eigenpairs: Eigenpairs,
    noise: Mapping[str, SymmetricOperator],
    *,
    num_probes: int = 20,
    subspace_sizes: Sequence[int] = (1, 2, 5, 10),
    max_matvecs: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    r"""Alignment of noise covariances with the Hessian, all of them over the same products with H.

    - trace alignment $\mathrm{Tr}(CH)/(|C|_F |H|_F)$, in [-1, 1]: 1 where C is a multiple of H. Its level for a C that knows nothing of
      H is $\mathrm{Tr}\, C\, \mathrm{Tr}\, H/(d |C|_F |H|_F)$, which is not 0.
    - relative commutator $|CH - HC|_F/(\sqrt 2 |C|_F |H|_F)$, in [0, 1] (Boettcher & Wenzel 2008): 0 where eigenvectors are shared.
      Its square is estimated; the root is nan where the square is not told from 0 by two standard errors.
    - the law $u_i^T C u_i \sim \lambda_i^\gamma$ over positive eigenpairs with residual at most RESOLVED of their value: see `power_law`
      for the interval and for when it is inconclusive.
    - overlap $|U_k^T V_k|_F^2/k$ of the top-k eigenspaces of H and C, whose chance level is k/d; nan where C has no k resolved
      eigenvalues. Where the k-th and next eigenvalue nearly coincide the space itself is ill-defined.
    - energy share $\mathrm{Tr}(U_k^T C U_k)/\mathrm{Tr}\, C$, with the same chance level: for Sigma_w, the energy of the learners'
      deviations in H's top eigenspace (theory.md sec. 4).

    Traces and squared norms are sums over the leading eigenvectors of H and C, of true products, plus Hutchinson probes of the complement
    shared by all operators: unbiased however accurate the eigenpairs are. The ratios and roots are those of the sums, with the
    jackknife's standard errors over probes; their bias is of the order of the squared relative error, below a quarter of the
    standard error in the tests. Since the probes are shared, the trace alignment cannot leave [-1, 1], and is 1 for C = H.

    A `LowRankOperator` is taken as it is: Tr(CH), |C|_F and CH - HC are exact, by a product of H with each of its rows, and the errors are those of
    |H|_F alone. A `SampleCovarianceOperator` stands for the covariance of a draw: what is quadratic in it is estimated
    without bias (5 draws or more; nan where the estimate of |C|_F^2 is not positive), and errors and bias include the jackknife's over
    draws. It matters: for draws of effective rank r the sample's own |C|_F is too large by about (1 + r/K)^(1/2). Below some 30 draws the
    errors of u_i^T C u_i and of what hangs on few directions are too small: a variance from few draws is skewed.

    Args:
        hessian: H, (d, d).
        eigenpairs: its top k eigenpairs ("LA").
        noise: covariances by name, such as "gradient", "landscape", "consensus".
        num_probes: probes of the complement, at least 2. Where k + num_probes >= d the sums are exact, by d products each.
        subspace_sizes: k of the overlaps and energies; those beyond the number of eigenpairs are left out.
        max_matvecs: bound on the products of each C for its own eigenpairs.
        seed: of the probes.

    Returns:
        over `noise`, each NAME with NAME_stderr: noise_trace, noise_frobenius, trace_product = Tr(CH), trace_alignment,
        commutator_squared, commutator;
        over `subspace_size` too: energy_share, energy_over_chance, subspace_overlap; over `eigen_index`: eigenvalue,
        noise_along = u_i^T C u_i; the law as `PowerLaw.to_xarray` has it; hessian_frobenius; chance; products taken.

    Raises:
        ValueError: operators of other dimensions than H, fewer than two probes, or no noise.

    Cost: q = k (1 + g) + num_probes at most, g the number of noises that are no LowRankOperator: (1 + g) q products with H, and one a
    row of those that are; 2 q + k + max_matvecs products with each of the g.
    """
    k, d = eigenpairs.vectors.shape[1], hessian.dimension
    _check(hessian, eigenpairs, noise, num_probes)
    vectors = eigenpairs.vectors.to(hessian.device, hessian.dtype)
    sizes = np.array([size for size in subspace_sizes if 1 <= size <= k], dtype=np.int64)
    own = {name: _leading(c, int(sizes.max(initial=1)), max_matvecs, seed) for name, c in noise.items()}
    more = [own[name][0].vectors for name, c in noise.items() if not isinstance(c, LowRankOperator)]
    norms, shared = product_norms(hessian, vectors, noise, num_probes=num_probes, more=more, seed=seed)
    parts = []
    for name, operator in noise.items():
        found, part = norms[name], xr.Dataset()
        for key, function in NORMS.items():
            value, stderr = found.estimate(function)
            dims: tuple[str, ...] = ("eigen_index",) if value.ndim else ()
            if key == "energy_share":
                value, stderr, dims = value[sizes - 1], stderr[sizes - 1], ("subspace_size",)
            part[key], part[f"{key}_stderr"] = (dims, value), (dims, stderr)
        part = part.merge(_commutator(*found.estimate(NORMS["commutator_squared"])))
        leading, products = own[name]
        part["subspace_overlap"] = ("subspace_size", _overlaps(eigenpairs, leading, sizes.tolist()))
        law = _law(eigenpairs, part["noise_along"].values, operator)
        parts.append(
            part.merge(law.to_xarray()).assign(
                num_hessian_products=((), found.num_hessian_products),
                num_noise_products=((), found.num_noise_products + products),
            )
        )
    made = xr.concat(parts, "noise").assign_coords(noise=list(noise), subspace_size=sizes)
    for key in ("hessian_frobenius", "hessian_frobenius_stderr"):  # the same for all
        made[key] = made[key].isel(noise=0)
    made["chance"] = ("subspace_size", sizes / d)
    for suffix in ("", "_stderr"):
        made[f"energy_over_chance{suffix}"] = made[f"energy_share{suffix}"] / made["chance"]
    made["eigenvalue"] = ("eigen_index", eigenpairs.values)
    return _described(made).assign_attrs(num_probes=num_probes, num_parameters=d, num_shared_products=shared, seed=seed)


def alignment_by_layer(
    objective: Objective,
    weights: Weights,
    *,
    num_eigenpairs: int = 10,
    max_matvecs: int = 60,
    tol: float = 0.01,
    seed: int = 0,
) -> xr.Dataset:
    """The law u_i^T C u_i ~ lambda_i^gamma in each layer: diagonal blocks of H against those of the gradient covariance C.

    Layers of at most `max_matvecs` parameters are diagonalised densely, others by Lanczos without a certificate of completeness. Pairs
    that did not converge to a residual of RESOLVED of their value are left out of the law, and so is what is not positive; where too
    little remains the law is inconclusive and says why.

    Args:
        objective: L.
        weights: w.
        num_eigenpairs: of each block of H.
        max_matvecs: bound on the Hessian products of a layer.
        tol: relative residual of the eigenpairs.
        seed: of the starting vectors.

    Returns:
        over `layer` (the module that owns the parameters): the law as `PowerLaw.to_xarray` has it, num_parameters,
        num_hessian_products; and over `eigen_index`: eigenvalue, residual, noise_along, nan where there is none.

    Cost: a layer, at most max_matvecs + num_eigenpairs products with H and num_eigenpairs with C, each differentiating the layer alone
    (a pass through what comes after it).
    """
    if num_eigenpairs < 1:
        raise ValueError(f"num_eigenpairs must be at least 1, not {num_eigenpairs}")
    hessians = diagonal_blocks(objective, weights, "layer")
    covariances = diagonal_blocks(objective, weights, "layer", gradient_covariance)
    parts, names = [], list(hessians)
    for name in names:
        block, covariance = hessians.pop(name), covariances.pop(name)  # kept graphs go with them
        pairs, products = _leading(block, num_eigenpairs, max_matvecs, seed, tol)
        along = _along(covariance, pairs.vectors)
        padded = np.full((3, num_eigenpairs), math.nan)
        padded[:, : len(along)] = pairs.values, pairs.residuals, along
        part = _law(pairs, along, covariance).to_xarray()
        for key, row in zip(("eigenvalue", "residual", "noise_along"), padded, strict=True):
            part[key] = ("eigen_index", row)
        part["num_parameters"], part["num_hessian_products"] = ((), block.dimension), ((), products)
        parts.append(part)
    return _described(xr.concat(parts, "layer").assign_coords(layer=names))


def noise_law(eigenpairs: Eigenpairs, noise: SymmetricOperator) -> PowerLaw:
    """The law u_i^T C u_i ~ lambda_i^gamma over the resolved positive eigenpairs of H. Cost: one product with C a pair."""
    return _law(eigenpairs, _along(noise, eigenpairs.vectors), noise)


def _law(eigenpairs: Eigenpairs, along: np.ndarray, noise: SymmetricOperator) -> PowerLaw:
    """The law over resolved positive eigenpairs; a u_i^T C u_i that drowns in rounding counts as 0."""
    resolved = (eigenpairs.values > 0) & (eigenpairs.residuals <= RESOLVED * eigenpairs.values)
    level = 10 * torch.finfo(noise.dtype).eps
    # a sum of squares loses nothing by cancellation; a product u.(C u) is exact to eps |C|
    rounding = level**2 * noise.trace if isinstance(noise, LowRankOperator) else level * along.max(initial=0.0)
    return power_law(eigenpairs.values[resolved], np.where(along > rounding, along, 0.0)[resolved])


def _along(operator: SymmetricOperator, vectors: Tensor) -> np.ndarray:
    """u_i^T C u_i (k,)."""
    vectors = vectors.to(operator.device, operator.dtype)
    if isinstance(operator, LowRankOperator):
        return operator.quadratic_forms(vectors)
    return forms(vectors.T, (operator @ vectors).T)


def _leading(
    operator: SymmetricOperator, k: int, max_matvecs: int, seed: int, tol: float = 0.01
) -> tuple[Eigenpairs, int]:
    """The top k eigenpairs, and products taken for them: exact where the operator allows it or d products are no more than Lanczos may take."""
    d = operator.dimension
    if isinstance(operator, LowRankOperator):
        return operator.eigenpairs(k), 0
    if d > max_matvecs:
        found = top_eigenpairs(operator, k, tol=tol, max_matvecs=max_matvecs, seed=seed, miss_probability=1.0)
        return found, found.num_matvecs
    dense = operator.to_dense().double()
    values, vectors = torch.linalg.eigh((dense + dense.T) / 2)
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    rounding = 10 * torch.finfo(operator.dtype).eps * float(values.abs().max())
    top = values.cpu().numpy()
    residuals = np.full(len(top), rounding)
    return Eigenpairs(top, vectors.to(operator.dtype), residuals, top == top, d, seed, 0.0, operator.provenance), d


def _overlaps(eigenpairs: Eigenpairs, own: Eigenpairs, sizes: Sequence[int]) -> np.ndarray:
    """|U_k^T V_k|_F^2/k for every k in sizes; nan where C has no k resolved positive eigenvalues or H's k did not converge."""
    squares = inner(eigenpairs.vectors.T, own.vectors.T.to(eigenpairs.vectors)).square().cpu().numpy()
    sound = own.converged & (own.values > 0) & (own.residuals <= RESOLVED * np.abs(own.values))
    fits = [k <= len(sound) and bool(sound[:k].all() and eigenpairs.converged[:k].all()) for k in sizes]
    return np.array([squares[:k, :k].sum() / k if fit else math.nan for k, fit in zip(sizes, fits, strict=True)])


def _commutator(square: np.ndarray, stderr: np.ndarray) -> xr.Dataset:
    """The root of the squared commutator, to first order; nan where the square is within two standard errors of 0 or below."""
    told = square >= 2 * stderr
    value = np.sqrt(np.where(told, square, math.nan))
    error = np.where(stderr == 0, 0.0, stderr) / np.where(value > 0, 2 * value, 1.0)
    return xr.Dataset({"commutator": ((), value), "commutator_stderr": ((), np.where(told, error, math.nan))})


def _check(
    hessian: SymmetricOperator, eigenpairs: Eigenpairs, noise: Mapping[str, SymmetricOperator], num_probes: int
) -> None:
    if not noise:
        raise ValueError("no noise covariance was given")
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2 for a standard error, not {num_probes}")
    if eigenpairs.vectors.shape[0] != hessian.dimension or eigenpairs.vectors.shape[1] < 1:
        raise ValueError(
            f"eigenvectors of shape {tuple(eigenpairs.vectors.shape)} for a Hessian of dimension {hessian.dimension}"
        )
    for name, operator in noise.items():
        if operator.shape != hessian.shape:
            raise ValueError(f"the {name} covariance is {operator.shape}, but the Hessian {hessian.shape}")


def _described(made: xr.Dataset) -> xr.Dataset:
    for name, variable in made.variables.items():
        base = str(name).removesuffix("_stderr")
        if base in DESCRIPTIONS:
            text, units = DESCRIPTIONS[base]
            error = "standard error of " if base != name else ""
            variable.attrs = {"long_name": f"{error}{text}", "units": units}
    return made
