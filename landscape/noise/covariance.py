"""The covariance C of per-example gradients: its spectrum, traces, eigenvectors, and its part along given directions (theory.md sec. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from landscape import streams
from landscape.data.dataset import BatchList
from landscape.display import Displayed, Shown
from landscape.noise.gram import Grouping, example_gram
from landscape.noise.projections import example_combinations, example_projections
from landscape.noise.rows_covariance import ReplicaCovariance as ReplicaCovariance
from landscape.noise.rows_covariance import column_blocks as column_blocks
from landscape.noise.rows_covariance import covariance_spectrum as covariance_spectrum
from landscape.noise.rows_covariance import leading_eigenvectors as leading_eigenvectors
from landscape.noise.rows_covariance import replica_covariance as replica_covariance
from landscape.noise.spectrum import CovarianceSpectrum, block_spectrum, centred, collect
from landscape.objective import Objective, Weights

Centre = Literal["mean", "gradient"] | Tensor
"""What gradients are taken from: their own mean, the exact g (computed), or a given g."""


@dataclass(frozen=True, repr=False)
class CovarianceSummary(Displayed):
    """C over the whole data set, centred at the exact g and divided by the count: no sampling error.

    Attributes:
        trace: Tr C.
        along: (k,) u_i^T C u_i for the directions asked for.
        gradient_norm_squared: |g|^2.
        num_examples: N.
    """

    trace: float
    along: np.ndarray
    gradient_norm_squared: float
    num_examples: int

    def shown(self) -> Shown:
        """All of it; there are no errors."""
        return Shown(
            "CovarianceSummary",
            [
                ("Tr C", self.trace, "gradient^2"),
                ("|g|^2", self.gradient_norm_squared, "gradient^2"),
                ("noise scale", self.noise_scale if self.gradient_norm_squared > 0 else math.nan, "examples"),
                ("examples", self.num_examples, ""),
            ],
        )

    @property
    def noise_scale(self) -> float:
        """B_simple = Tr C/|g|^2 (McCandlish et al. 2018), exact here."""
        return self.trace / self.gradient_norm_squared


def gradient_covariance_summary(
    objective: Objective, weights: Weights, directions: Float[Tensor, "d k"] | None = None, *, chunk: int = 256
) -> CovarianceSummary:
    """Trace of C and its quadratic form along directions, over all the data (of all ranks).

    Args:
        objective: a loss that gives one number per example. Examples of unequal weight count as in `landscape.noise.gram.example_gram`.
        weights: w.
        directions: (d, k), orthonormal columns.
        chunk: examples taken at once, at most.

    Cost: two gradients, k forward passes, and per-example gradients of parameters that are not of linear, convolution or normalisation layers.
    """
    columns = torch.empty(objective.num_parameters, 0) if directions is None else directions
    gradient = objective.gradient(weights).double()
    sums = torch.zeros(2 + 2 * columns.shape[1], dtype=torch.float64, device=objective.device)
    found = example_projections(objective, weights, columns, chunk=chunk)
    with objective.peers.agree():
        for squares, projected in found:
            sums += torch.cat([squares.sum()[None], sums.new_tensor([len(squares)]), projected.sum(0), projected.square().sum(0)])  # fmt: skip
    sums = objective.peers.sum(sums)
    count, norm = float(sums[1]), float(gradient @ gradient)
    first, second = (sums[2:] / count).chunk(2)
    along = (second - first**2).cpu().numpy()
    return CovarianceSummary(float(sums[0]) / count - norm, along, norm, int(count))


def draw_examples(objective: Objective, num_examples: int | None, seed: int = 0) -> Int64[Tensor, " m"] | None:
    """Numbers of examples drawn without replacement, in order; None where all are taken.

    Args:
        objective: L.
        num_examples: m; None for all.
        seed: of the draw.
    """
    total = objective.num_examples
    if num_examples is None or num_examples >= total:
        return None
    objective.needs_all_data()
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, not {num_examples}")
    if isinstance(objective.data, BatchList):
        raise ValueError(
            f"{num_examples} of {total} examples cannot be drawn from a list of batches; give num_examples=None for all of them, or a "
            "map-style data set or tensors"
        )
    drawn = streams.permutation(streams.philox("covariance examples", seed), total)[:num_examples]
    return torch.from_numpy(np.sort(drawn))


def gradient_covariance_spectrum(
    objective: Objective,
    weights: Weights,
    *,
    num_examples: int | None = 2000,
    seed: int = 0,
    by: Grouping = "layer",
    centre: Centre = "mean",
    memory_budget: int | None = None,
) -> CovarianceSpectrum:
    """The spectrum and the traces of C = (1/N) sum_i (g_i - g)(g_i - g)^T, as a whole and by layers, from the Gram matrix of a sample.

    g_i is the gradient of example i's contribution, scaled so that the mean over all N is g whatever the examples' weights. A minibatch of B
    drawn with replacement has the noise covariance C/B.

    m examples are drawn without replacement. Their covariance about their own mean, divided by m - 1, has the expectation N/(N - 1) C, which is divided
    out; about the exact g, divided by m, it has the expectation C. Traces are unbiased for C itself, errors shrink by 1 - m/N (see
    `landscape.noise.spectrum`), and with all N examples everything is exact. The eigenvalues are those of the sample.

    Args:
        objective: L; its loss must give one number per example.
        weights: w.
        num_examples: m; None, or as many as there are, for all (which is all that a list of batches can give).
        seed: of the sample.
        by: blocks beside the whole: "layer", "parameter", the first so many parts of the names, or "whole" for none.
        centre: "mean" of the sample, at no cost; "gradient" for the exact g, one full gradient; or g itself (d,).
        memory_budget: see `landscape.noise.gram.example_gram`.

    Returns:
        `CovarianceSpectrum`, gradients in the loss's units per weight.

    Cost: see `example_gram`; and m^3 flops a block for its eigenvalues. Memory: four (m, m) matrices of float64 beside the budget.

    >>> x = torch.tensor([[1.0], [-1.0], [3.0]]).double()  # l = (w x - 1)^2 at w = 0: gradients -2 x, of variance 4 * 8/3
    >>> net = torch.nn.Linear(1, 1, bias=False).double()
    >>> found = gradient_covariance_spectrum(Objective(net, torch.nn.MSELoss(), (x, torch.ones(3, 1))), torch.zeros(1).double())
    >>> print(f"{found.estimate('trace'):.4f}")
    10.6667
    """
    indices = draw_examples(objective, num_examples, seed)
    flat = objective.flat(weights)
    population = objective.num_examples
    gradient = _centre(objective, flat, centre) if indices is not None else None
    squares = {} if gradient is None else _squares(gradient, column_blocks(objective, by))
    whole: Tensor | None = None
    blocks = []
    grams = example_gram(
        objective,
        flat,
        indices,
        by=by,
        directions=None if gradient is None else gradient[:, None],
        memory_budget=memory_budget,
    )
    for part in grams:
        along = None if gradient is None else part.along[:, 0]
        gram = centred(part.gram, along, squares.get(part.name, 0.0))
        if by != "whole":
            whole = gram.clone() if whole is None else whole.add_(gram)
        blocks.append(block_spectrum(part.name, part.num_parameters, gram, population=population, at_mean=gradient is None))  # fmt: skip
        del part, gram
    if whole is not None:
        blocks.insert(0, block_spectrum("all", len(flat), whole, population=population, at_mean=gradient is None))
    attributes = {key: str(value) if isinstance(value, bool) else value for key, value in objective.description.items()}
    exact = gradient is not None or indices is None
    return collect(blocks, population, "exact" if exact else "mean", {**attributes, "seed": seed})


def gradient_covariance_eigenvectors(
    objective: Objective,
    weights: Weights,
    k: int,
    *,
    num_examples: int | None = 2000,
    seed: int = 0,
    centre: Centre = "mean",
    memory_budget: int | None = None,
) -> tuple[np.ndarray, Float[Tensor, "d k"]]:
    """The k leading eigenpairs of the sample covariance that `gradient_covariance_spectrum` has the spectrum of: (k,) and (d, k), orthonormal.

    An eigenvector of the m x m matrix is one of C's in terms of the centred gradients, u = sum_i v_i c_i/|.|, whose sum takes one backward pass of the
    weighted examples. Eigenvectors of a sample of m lean away from those of C, the more the less their eigenvalue exceeds Tr(C)/m.

    Args: as for `gradient_covariance_spectrum`; k: how many, at most the rank.

    Cost: beside the Gram matrix, one forward and k backward passes over the m examples.
    """
    indices, flat = draw_examples(objective, num_examples, seed), objective.flat(weights)
    gradient = _centre(objective, flat, centre) if indices is not None else None
    directions = None if gradient is None else gradient[:, None]
    (part,) = example_gram(objective, flat, indices, by="whole", directions=directions, memory_budget=memory_budget)
    norm = 0.0 if gradient is None else float(gradient.double() @ gradient.double())
    gram = centred(part.gram, None if gradient is None else part.along[:, 0], norm)
    found = block_spectrum("all", len(flat), gram, population=objective.num_examples, at_mean=gradient is None)
    if not 0 < k <= int((found.eigenvalues > 0).sum()):
        raise ValueError(
            f"the sample covariance has {int((found.eigenvalues > 0).sum())} eigenvalues that are not zero; k={k}"
        )
    vectors = torch.linalg.eigh(gram).eigenvectors
    chosen = vectors[:, -k:].flip(1)
    combined = example_combinations(objective, flat, chosen, indices).double()
    if gradient is not None:
        combined -= gradient.double()[:, None] * chosen.sum(0)
    unit = combined / combined.norm(dim=0)
    return found.eigenvalues[:k], unit.to(flat.dtype)


def _centre(objective: Objective, flat: Tensor, centre: Centre) -> Tensor | None:
    if isinstance(centre, Tensor):
        return objective.flat(centre)
    if centre not in ("mean", "gradient"):
        raise ValueError(f"centre must be 'mean', 'gradient' or the exact gradient, not {centre!r}")
    return objective.gradient(flat) if centre == "gradient" else None


def _squares(gradient: Tensor, blocks: dict[str, list[slice]]) -> dict[str, float]:
    return {name: sum(float(gradient[part].double().square().sum()) for part in parts) for name, parts in blocks.items()}  # fmt: skip
