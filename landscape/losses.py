"""Losses, evaluated one example at a time and recombined exactly over any batching.

A training loss is usually handed over as "a function that returns one number". Averaging such numbers over ragged
batches, class weights or ignored targets is wrong; so a loss is taken apart here into

    l_i  the contribution of example i (already times its weight),  and  m_i  its weight,

and put together again as sum_i l_i / sum_i m_i (mean reduction) or sum_i l_i (sum reduction) over whatever set of
examples is asked for.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class ExampleLoss:
    """A loss as per-example contributions and weights.

    Attributes:
        contributions: (output, target) -> tensor (B,), the weighted loss of each example.
        weights: (target) -> tensor (B,), the weight of each example in the mean.
        reduction: "mean" (divide by the summed weights) or "sum".
    """

    contributions: Callable[[Any, Any], Tensor]
    weights: Callable[[Any], Tensor]
    reduction: str = "mean"

    def __call__(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Contributions (B,) and weights (B,); weights are in the contributions' dtype."""
        contributions = self.contributions(output, target)
        return contributions, self.weights(target).to(contributions.dtype)


def per_example(values: Tensor) -> Tensor:
    """Mean over everything but the leading example axis: (B, ...) -> (B,); a single number stays one."""
    return values if values.ndim <= 1 else values.flatten(1).mean(1)


def _unit_weights(target: Any) -> Tensor:
    return torch.ones(len(target), device=target.device)


def _class_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    kept = target != ignore_index
    if weight is None:
        return kept
    return torch.where(kept, weight.to(target.device)[torch.where(kept, target, 0)], 0.0)


def _summed(values: Tensor) -> Tensor:
    return values if values.ndim <= 1 else values.flatten(1).sum(1)


def _class_loss(unreduced: LossFunction, reduction: str, weight: Tensor | None, ignore_index: int) -> ExampleLoss:
    """Cross entropy and negative log likelihood: targets may be (B,) or (B, ...), some of them ignored."""

    def weights(target: Tensor) -> Tensor:
        if target.is_floating_point():  # class probabilities (B, C, ...): torch divides by the count, weights or not
            return torch.full((len(target),), float(target[0, 0].numel()), device=target.device)
        return _summed(_class_weights(target, weight, ignore_index).to(torch.float64))

    return ExampleLoss(lambda output, target: _summed(unreduced(output, target)), weights, reduction)


def as_example_loss(loss_fn: ExampleLoss | LossFunction) -> ExampleLoss:
    """Take a loss apart.

    Args:
        loss_fn: a torch loss module (reduction "mean", "sum" or "none"), one of torch.nn.functional's losses or a
            functools.partial of one, or any callable that returns one loss per example, (B,) or (B, ...).

    Raises:
        ValueError: for a reduction that is none of the three. A callable that returns one number is found out
            where it is first evaluated (`functional.FunctionalModel`).
    """
    if isinstance(loss_fn, ExampleLoss):
        return loss_fn
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        module: Any = copy.deepcopy(loss_fn)
        reduction, module.reduction = _reduction(loss_fn, module.reduction), "none"

        def unreduced(output: Any, target: Any) -> Any:
            if isinstance(output, Tensor):  # class weights follow the output's device and type
                module.to(output.device, output.dtype)
            return module(output, target)

        if isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss):
            return _class_loss(unreduced, reduction, loss_fn.weight, loss_fn.ignore_index)
        return _plain(unreduced, reduction)
    function, options = (
        (loss_fn.func, dict(loss_fn.keywords)) if isinstance(loss_fn, functools.partial) else (loss_fn, {})
    )
    if getattr(function, "__module__", "") == F.__name__ and "reduction" in inspect.signature(function).parameters:
        reduction = _reduction(loss_fn, options.get("reduction", "mean"))
        weights = {k: v for k, v in options.items() if isinstance(v, Tensor) and v.is_floating_point()}

        def unreduced(output: Any, target: Any) -> Any:
            moved = {name: weight.to(output.device, output.dtype) for name, weight in weights.items()}
            return loss_fn(output, target, **moved, reduction="none")

        if function in (F.cross_entropy, F.nll_loss):
            return _class_loss(unreduced, reduction, options.get("weight"), options.get("ignore_index", -100))
        return _plain(unreduced, reduction)
    return _plain(loss_fn, "mean")


def _reduction(loss_fn: Any, given: str) -> str:
    if given not in ("mean", "sum", "none"):
        raise ValueError(f"loss {loss_fn} has reduction {given!r}; use 'mean', 'sum' or 'none'")
    return "sum" if given == "sum" else "mean"


def _plain(unreduced: LossFunction, reduction: str) -> ExampleLoss:
    combine = per_example if reduction == "mean" else _summed
    return ExampleLoss(lambda output, target: combine(unreduced(output, target)), _unit_weights, reduction)
