"""Which parameters of a network are its weights, and what BatchNorm and dropout do in it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from landscape.data.dataset import num_examples
from landscape.functional import BATCH_NORMS, Buffers, FunctionalModel, measured_norms
from landscape.objective.peers import Peers

BatchNormPolicy = Literal["running", "ghost"]

DROPOUTS = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)


def set_modes(module: nn.Module, batch_norm: BatchNormPolicy, dropout_seed: int | None) -> None:
    """Eval mode, but for BatchNorm under ghost batches and for dropout with a seed."""
    module.eval()
    for part in module.modules():
        if batch_norm == "ghost" and isinstance(part, BATCH_NORMS):
            part.train()
        if dropout_seed is not None and isinstance(part, DROPOUTS):
            part.train()


def free(module: nn.Module, parameters: str | Sequence[str]) -> None:
    """Let only the parameters that fit a name or pattern require a gradient."""
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    fitting = {p: fnmatch.filter(names, p) for p in patterns}
    empty = [p for p, found in fitting.items() if not found]
    if empty or not patterns:
        raise ValueError(
            f"no parameter is named {', '.join(empty) or '(no pattern given)'}; there are {', '.join(names)}"
        )
    chosen = {name for found in fitting.values() for name in found}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)


def measured_statistics(
    model: FunctionalModel,
    weights: Tensor,
    batches: Iterable[tuple[int, Any, Any]],
    frozen: Callable[[int], AbstractContextManager[Any]],
    peers: Peers,
) -> Buffers:
    """The network's buffers with BatchNorm's statistics averaged over batches of all ranks, each weighted by its examples.

    Args:
        model: whose module's BatchNorm layers are set to be measured and are reset by this.
        weights: (d,).
        batches: this rank's (index, inputs, targets).
        frozen: what holds while batch `index` is evaluated.
        peers: the ranks.
    """
    norms = measured_norms(model.module)
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
    held, seen = dict(model.module.named_buffers()), 0
    with peers.agree(), torch.no_grad():
        for index, inputs, targets in batches:
            count = num_examples(targets)
            seen += count
            for norm in (m for m in model.module.modules() if isinstance(m, BATCH_NORMS)):
                norm.momentum = count / seen
            with frozen(index):
                model.output(weights, held, inputs)
    total = sum(peers.collect(seen))
    for norm in norms if peers.size > 1 else []:
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(peers.sum(statistic.double() * seen) / total)
        if norm.num_batches_tracked is not None:
            peers.sum(norm.num_batches_tracked)
    return {name: b.detach().clone() for name, b in held.items()}
