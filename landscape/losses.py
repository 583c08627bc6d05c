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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class ExampleLoss:
    """A loss as per-example contributions and weights.

    Attributes:
        contributions: (output, target) -> tensor (B,), the weighted loss of each example.
        weights: (target) -> tensor (B,), the weight of each example in the mean.
        reduction: "mean" (divide by the summed weights) or "sum".
        per_example: False for an opaque loss, which gives one number for the whole batch: contributions and weights are (1,) then.
        fisher: (output, target, change) -> the Fisher information of the distribution whose negative log likelihood the loss
            is, over the output, times a change of the output; weighted as the contributions are. None where there is none.
    """

    contributions: Callable[[Any, Any], Tensor]
    weights: Callable[[Any], Tensor]
    reduction: str = "mean"
    per_example: bool = True
    fisher: Callable[[Tensor, Any, Tensor], Tensor] | None = None

    def __call__(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Contributions (B,) and weights (B,); weights are in the contributions' dtype."""
        contributions = self.contributions(output, target)
        return contributions, self.weights(target).to(contributions.dtype)


def per_example(values: Tensor) -> Tensor:
    """Mean over everything but the leading example axis: (B, ...) -> (B,); a single number stays one."""
    return values if values.ndim <= 1 else values.flatten(1).mean(1)


def _unit_weights(target: Any) -> Tensor:
    first = _first(target)
    return torch.ones(len(first), device=first.device)


def _first(target: Any) -> Tensor:
    return next(t for t in tree_leaves(target) if isinstance(t, Tensor))


def scores(output: Any) -> Any:
    """What a torch loss takes of a network's output: its logits, where it is a structure that has them (Hugging Face's do)."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _classes_second(output: Any, target: Any) -> Any:
    """Scores (B, C, ...) as torch's class losses take them, from (B, ..., C) where only that fits the targets (B, ...)."""
    found = scores(output)
    if not isinstance(found, Tensor) or target.is_floating_point() or found.ndim != target.ndim + 1 or found.ndim < 3:
        return found
    last_fits = found.shape[:-1] == target.shape
    second_fits = found.shape[:1] + found.shape[2:] == target.shape
    return found.movedim(-1, 1) if last_fits and (not second_fits or found is not output) else found


def _class_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    kept = target != ignore_index
    if weight is None:
        return kept
    return torch.where(kept, weight.to(target.device)[torch.where(kept, target, 0)], 0.0)


def _summed(values: Tensor) -> Tensor:
    return values if values.ndim <= 1 else values.flatten(1).sum(1)


def _class_loss(
    unreduced: LossFunction, reduction: str, weight: Tensor | None, ignore_index: int, log_probabilities: bool
) -> ExampleLoss:
    """Cross entropy and negative log likelihood: targets may be (B,) or (B, ...), some of them ignored."""

    def weights(target: Tensor) -> Tensor:
        if target.is_floating_point():  # class probabilities (B, C, ...): torch divides by the count, weights or not
            return torch.full((len(target),), float(target[0, 0].numel()), device=target.device)
        return _summed(_class_weights(target, weight, ignore_index).to(torch.float64))

    def contributions(output: Any, target: Any) -> Tensor:
        return _summed(unreduced(_classes_second(output, target), target))

    def fisher(output: Any, target: Tensor, change: Tensor) -> Tensor:
        found, moved = _classes_second(output, target), _classes_second(change, target)
        if target.is_floating_point():
            if weight is not None:
                raise ValueError(
                    "class weights with class probabilities as targets are no log likelihood; there is no Fisher information"
                )
            each = torch.ones_like(found[:, :1])
        else:
            each = _class_weights(target, weight, ignore_index).to(found.dtype).unsqueeze(1)
        product = each * softmax_fisher(found, moved)
        return product.movedim(1, -1) if found.shape != scores(output).shape else product

    def softmax_fisher(found: Tensor, moved: Tensor) -> Tensor:
        if log_probabilities:  # the loss is linear in them: E[(one-hot)(one-hot)^T]
            return found.exp() * moved
        p = found.softmax(1)
        return p * (moved - (p * moved).sum(1, keepdim=True))

    return ExampleLoss(contributions, weights, reduction, fisher=fisher)


def as_example_loss(loss_fn: ExampleLoss | LossFunction, reduction: str | None = None) -> ExampleLoss:
    """Take a loss apart.

    Args:
        loss_fn: a torch loss module (reduction "mean", "sum" or "none"), one of torch.nn.functional's losses or a
            functools.partial of one, or any callable that returns one loss per example, (B,) or (B, ...), or (with `reduction`) one
            number. Torch's losses take the logits of an output that is a structure, and token scores (B, T, C) as well as (B, C, T).
        reduction: for a callable that returns one number for a batch: "mean", and it is weighted by the batch's number of examples
            (which is exact only if each example weighs alike), or "sum".

    Raises:
        ValueError: for a reduction that is not one. A callable that returns one number without `reduction` is found out
            where it is first evaluated (`functional.FunctionalModel`).
    """
    if isinstance(loss_fn, ExampleLoss):
        return loss_fn
    if reduction is not None:
        return _opaque(loss_fn, reduction)
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        module: Any = copy.deepcopy(loss_fn)
        reduction, module.reduction = _reduction(loss_fn, module.reduction), "none"

        def unreduced(output: Any, target: Any) -> Any:
            if isinstance(output, Tensor):  # class weights follow the output's device and type
                module.to(output.device, output.dtype)
            return module(output, target)

        if isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss):
            return _class_loss(
                unreduced, reduction, loss_fn.weight, loss_fn.ignore_index, isinstance(loss_fn, nn.NLLLoss)
            )
        return _plain(lambda output, target: unreduced(scores(output), target), reduction, _output_fisher(loss_fn, {}))
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
            ignored = options.get("ignore_index", -100)
            return _class_loss(unreduced, reduction, options.get("weight"), ignored, function is F.nll_loss)
        return _plain(
            lambda output, target: unreduced(scores(output), target), reduction, _output_fisher(function, options)
        )
    return _plain(loss_fn, "mean")


def _opaque(loss_fn: LossFunction, reduction: str) -> ExampleLoss:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} of a loss that returns one number; use 'mean' or 'sum'")

    def contributions(output: Any, target: Any) -> Tensor:
        value = loss_fn(output, target)
        if value.numel() != 1:
            raise ValueError(
                f"the loss returned a tensor of shape {tuple(value.shape)}; leave reduction out for per-example losses"
            )
        return value.reshape(1) * (len(_first(target)) if reduction == "mean" else 1)

    def weights(target: Any) -> Tensor:
        first = _first(target)
        return torch.full((1,), float(len(first)), device=first.device)

    return ExampleLoss(contributions, weights, reduction, per_example=False)


def _output_fisher(loss: Any, options: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """The diagonal Fisher information over the output, of one number of the output, of losses that are log likelihoods."""
    if isinstance(loss, nn.MSELoss) or loss is F.mse_loss:
        return lambda f: torch.full_like(f, 2.0)  # the normal distribution of variance 1/2
    if isinstance(loss, nn.BCEWithLogitsLoss) or loss is F.binary_cross_entropy_with_logits:
        weighted = getattr(loss, "pos_weight", None), getattr(loss, "weight", None), options.get("pos_weight"), options.get("weight")  # fmt: skip
        return None if any(w is not None for w in weighted) else lambda f: f.sigmoid() * (1 - f.sigmoid())
    log_input = getattr(loss, "log_input", options.get("log_input", True))
    if isinstance(loss, nn.PoissonNLLLoss) or loss is F.poisson_nll_loss:
        return (lambda f: f.exp()) if log_input else (lambda f: 1 / f)
    return None


def _reduction(loss_fn: Any, given: str) -> str:
    if given not in ("mean", "sum", "none"):
        raise ValueError(f"loss {loss_fn} has reduction {given!r}; use 'mean', 'sum' or 'none'")
    return "sum" if given == "sum" else "mean"


def _plain(
    unreduced: LossFunction, reduction: str, information: Callable[[Tensor], Tensor] | None = None
) -> ExampleLoss:
    combine = per_example if reduction == "mean" else _summed

    def contributions(output: Any, target: Any) -> Tensor:
        return combine(unreduced(output, target))

    def fisher(output: Any, target: Any, change: Tensor) -> Tensor:
        assert information is not None
        found = scores(output)
        share = found[0].numel() if reduction == "mean" else 1
        return information(found) * change / share

    return ExampleLoss(contributions, _unit_weights, reduction, fisher=fisher if information else None)
