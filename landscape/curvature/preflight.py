"""Before hours are spent: does this network have second derivatives, are they right, and what will they cost?"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from landscape import streams
from landscape.curvature.products import room
from landscape.data.dataset import move, num_examples
from landscape.display import Displayed, Shown
from landscape.functional import clone_buffers
from landscape.objective import Objective, Weights

WORKING_VECTORS = 6
"""Of the weights' size, within a product: gradient and product by parameter, what their graphs hold, and both as one vector."""


@dataclass(frozen=True, repr=False)
class Preflight(Displayed):
    """What a trial of second derivatives on a few examples, and of their cost on one batch, found.

    Attributes:
        problems: what makes the results wrong or impossible, each with what to do; empty if all is well.
        notes: what was decided or mended on the way.
        seconds_per_gradient: of one gradient over all data (in a group, this rank's part of it, without the sum), extrapolated from one batch; nan where problems forbid it.
        seconds_to_linearise: of building the graphs of all batches once.
        seconds_per_product: of one Hessian-vector product; graphs that do not fit the budget are built anew each time.
        kept_bytes: memory of the graphs that are kept between products.
        peak_bytes: the same with what one batch takes while it is worked on, and the vectors of a product; without weights, data and a method's own
            vectors.
        num_batches: batches a product goes through.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    seconds_per_gradient: float
    seconds_to_linearise: float
    seconds_per_product: float
    kept_bytes: int
    peak_bytes: int
    num_batches: int

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def seconds(self, num_products: int) -> float:
        """Predicted time of an algorithm that takes so many products."""
        return self.seconds_to_linearise + num_products * self.seconds_per_product

    def shown(self) -> Shown:
        """Whether all is well, and what it will cost."""
        return Shown(
            "Preflight",
            [
                ("problems", len(self.problems), ""),
                ("gradient over all data", self.seconds_per_gradient, "s"),
                ("Hessian-vector product", self.seconds_per_product, "s"),
                ("graphs, once", self.seconds_to_linearise, "s"),
                ("memory", self.peak_bytes / 2**20, "MiB"),
            ],
            [*(f"problem: {p}" for p in self.problems), *(f"note: {n}" for n in self.notes)],
        )

    def __str__(self) -> str:
        lines = [f"problem: {p}" for p in self.problems] + [f"note: {n}" for n in self.notes]
        if math.isfinite(self.seconds_per_product):
            lines.append(
                f"a gradient takes about {self.seconds_per_gradient:.3g} s, a Hessian-vector product {self.seconds_per_product:.3g} s, after "
                f"{self.seconds_to_linearise:.3g} s once; memory {self.peak_bytes / 2**20:.0f} MiB, {self.num_batches} batch(es)"
            )
        return "\n".join(lines)


def preflight(objective: Objective, params: Weights, *, memory_budget: int | None = None, seed: int = 0) -> Preflight:
    """Try one Hessian-vector product on two examples, check it, and time one batch.

    Checked: that every operation can be differentiated twice; that the product is symmetric and agrees with central differences of the
    gradient in float64 (a custom autograd function may be silently wrong); that two evaluations agree; that loss and gradient are
    finite; the floating-point type. Time and memory are extrapolated linearly in the examples.

    Args:
        objective: L.
        params: w.
        memory_budget: of the operator that will be used, see `hessian`.
        seed: of the directions.
    """
    notes = _notes(objective)
    problems: list[str] = []
    weights = objective.flat(params)
    if objective.dtype in (torch.float16, torch.bfloat16):
        problems.append(f"the weights are {str(objective.dtype)[6:]}, in which second derivatives drown in rounding; give Objective(..., dtype=torch.float32)")  # fmt: skip
    devices = [objective.device] if objective.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        problems += _trial(objective, weights, notes, seed)
        if problems:
            return Preflight(tuple(problems), tuple(notes), math.nan, math.nan, math.nan, 0, 0, 0)
        return _priced(objective, weights, notes, memory_budget, seed)


def _notes(objective: Objective) -> list[str]:
    modules = list(objective.model.module.modules())
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
    drops = sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in modules)
    notes = []
    if norms:
        policy = "their running statistics" if objective.batch_norm == "running" else "the statistics of fixed batches"
        notes.append(f"{norms} BatchNorm layer(s) use {policy}")
    if drops:
        notes.append(f"{drops} dropout layer(s) " + ("are off" if objective.dropout_seed is None else "keep one mask a batch"))  # fmt: skip
    if any(isinstance(m, nn.RNNBase) for m in modules):
        notes.append("recurrent layers run in their native form, cuDNN's and oneDNN's having no second derivative")
    if any(isinstance(m, nn.MultiheadAttention) for m in modules):
        notes.append("attention runs on the math backend, the fused ones having no second derivative")
    frozen = [n for n, p in objective.model.module.named_parameters() if not p.requires_grad]
    if frozen:
        notes.append(f"{len(frozen)} parameter(s) are held fixed: {', '.join(frozen[:3])}{' ...' if len(frozen) > 3 else ''}")  # fmt: skip
    kinks = {type(m).__name__ for m in modules if isinstance(m, nn.ReLU | nn.LeakyReLU | nn.ReLU6 | nn.MaxPool2d | nn.Hardtanh)}  # fmt: skip
    if kinks:
        notes.append(f"{', '.join(sorted(kinks))} have kinks, whose curvature autodiff leaves out; GradientDifferenceOperator has it")  # fmt: skip
    return notes


def _trial(objective: Objective, weights: Tensor, notes: list[str], seed: int) -> list[str]:
    inputs, targets = objective.few(2)
    directions = streams.torch_generator("preflight", seed)
    u, v = torch.randn(2, len(weights), generator=directions, dtype=torch.float64).to(weights)
    u, v = u / u.norm(), v / v.norm()

    try:
        linear = objective.linearise(weights, 0, inputs, targets, "hessian")
        hu, hv = linear(torch.stack([u, v]))
        again = objective.linearise(weights, 0, inputs, targets, "hessian")
        hv_again = again(v[None])[0]
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return [str(error).strip().splitlines()[0]]
    scale = float(torch.maximum(hu.norm(), hv.norm()))
    tolerance = 1e-3 if objective.dtype != torch.float64 else 1e-8
    if not math.isfinite(scale):
        return [
            "the Hessian-vector product of the first two examples is not finite (a square root or a logarithm at 0?)"
        ]
    if float((hv - hv_again).norm()) > tolerance * scale:
        return ["two evaluations of the same product differ: the network draws random numbers, or an operation is not deterministic; "
                "put it in eval mode, make its noise a module that follows the mode, or use torch.use_deterministic_algorithms"]  # fmt: skip
    problems = []
    if abs(float(u @ hv - v @ hu)) > tolerance * scale:
        problems.append("the product is not symmetric: the backward of some custom autograd function is marked once_differentiable, or is not differentiable as written")  # fmt: skip
    untouched = [name for name, g in _slopes(objective, weights, inputs, targets).items() if g is None]
    if untouched:
        notes.append(f"no gradient reaches {', '.join(untouched[:3])}{' ...' if len(untouched) > 3 else ''}: zero rows of the Hessian")  # fmt: skip
    if not problems and not objective.has_fixed_batches:
        gap, apart = _against_differences(objective, weights, inputs, targets, v)
        if gap > 1e-2 and apart > gap / 2:
            notes.append("the gradient jumps at these weights (activations that lie at a kink, as of channels that are constant): the product leaves "
                         "jumps out, and could not be checked against differences of the gradient; GradientDifferenceOperator has them")  # fmt: skip
        elif gap > 1e-2:
            problems.append(f"the product differs from central differences of the gradient by {gap:.0%}: some custom autograd function has "
                            "a backward whose own derivative is wrong or cut off (detach, no_grad, numpy inside)")  # fmt: skip
    return problems


def _slopes(objective: Objective, weights: Tensor, inputs: Any, targets: Any) -> dict[str, Tensor | None]:
    """The gradient by parameter, by plain autograd; None where none arrives."""
    parameters = {n: p.detach().requires_grad_() for n, p in objective.model.layout.split(weights).items()}
    buffers = clone_buffers(objective.buffers)
    contributions, _ = objective.model.parted(objective.model.forward(parameters, buffers, inputs), targets)
    found = torch.autograd.grad(contributions.sum(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _against_differences(objective: Objective, weights: Tensor, inputs: Any, targets: Any, v: Tensor) -> tuple[float, float]:  # fmt: skip
    """How far Hv is from central differences of the gradient, and how far those of two steps are from each other, in float64.

    Where the second is no smaller than the first, the gradient has jumps or bends within the step, and nothing is known of the product.

    Returns:
        |Hv - D| and |D - D'| over the larger of |Hv| and |D|; (0, 0) where the network does not run in float64.
    """
    fine = copy.copy(objective)
    fine.model = objective.model.to(objective.device, torch.float64)
    fine.dtype = torch.float64
    fine.buffers = {n: b.double() if b.is_floating_point() else b for n, b in objective.buffers.items()}
    x, y = move((inputs, targets), objective.device, torch.float64)
    w, direction = weights.double(), v.double()

    def slope(at: Tensor) -> Tensor:
        found = _slopes(fine, at, x, y)
        parts = zip(found.values(), fine.model.layout.split(at).values(), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts])

    try:
        exact = fine.linearise(w, 0, x, y, "hessian")(direction[None])[0]
        step = 1e-5 * max(1.0, float(w.norm())) / math.sqrt(len(w))
        differences, coarser = (
            (slope(w + h * direction) - slope(w - h * direction)) / (2 * h) for h in (step, 8 * step)
        )
    except (ValueError, RuntimeError):
        return 0.0, 0.0
    noise = 1e-9 * float(slope(w).norm()) / step
    length = max(float(exact.norm()), float(differences.norm()), noise, 1e-30)
    return float((exact - differences).norm()) / length, float((coarser - differences).norm()) / length


def _priced(objective: Objective, weights: Tensor, notes: list[str], memory_budget: int | None, seed: int) -> Preflight:
    def clock(call: Callable[[], Any]) -> tuple[float, Any]:
        if objective.device.type == "cuda":
            torch.cuda.synchronize(objective.device)
        start = time.perf_counter()
        result = call()
        if objective.device.type == "cuda":
            torch.cuda.synchronize(objective.device)
        return time.perf_counter() - start, result

    read, found = clock(lambda: next(iter(objective.batches()), None))
    index, inputs, targets = found or (0, *objective.few(1))  # a rank without examples of its own
    count = num_examples(targets)
    share = objective.num_own_examples / count
    vector = streams.torch_generator("preflight", seed, 1)
    row = torch.randn(1, len(weights), generator=vector).to(weights)
    buffers = {n: b[None] for n, b in objective.buffers.items()}
    linear = objective.linearise(weights, index, inputs, targets, "hessian")
    linear(row)  # the first calls of their kind set things up
    built, linear = min((clock(lambda: objective.linearise(weights, index, inputs, targets, "hessian")) for _ in range(2)), key=lambda t: t[0])  # fmt: skip
    product = min(clock(lambda: linear(row))[0] for _ in range(2))
    gradient = min(clock(lambda: objective.model.summed_gradients(weights[None], buffers, inputs, targets, shared=True))[0] for _ in range(2))  # fmt: skip
    size = linear.num_bytes(without=[weights, *objective.lasting(index, (inputs, targets))])
    budget = max(0, room(objective.device)) if memory_budget is None else memory_budget
    whole = int(size * share)
    kept = min(whole, budget // max(1, size) * size)
    recomputed = 1 - kept / max(1, whole)
    if recomputed > 0:
        notes.append(f"the graphs of {1 - recomputed:.0%} of the batches fit the budget of {budget / 2**30:.1f} GiB; the rest is built anew for each product")  # fmt: skip
    return Preflight(
        (),
        tuple(notes),
        share * (gradient + read),
        share * (built + read),
        share * (product + recomputed * (built + read)),
        kept,
        kept + 2 * size + WORKING_VECTORS * weights.nbytes,
        math.ceil(share),
    )
