"""Gradients of single examples from what flows through a layer in one ordinary pass over a batch.

A linear layer y = W a gives example i the weight gradient sum_t delta_it a_it^T over its positions t, delta the gradient of the loss with
respect to y; a convolution does so with the patches of its input in the place of a. So the inputs a and the slopes delta of a batch hold
all its per-example gradients, and forward hooks with one backward pass give both. Whether they do for a network as it stands (a
weight that is used twice or tied, a module that sees other than one row an example, a hook that changes its output) is not argued but tried:
`trusted_layers` keeps the parameters whose gradients, rebuilt so, are those of single examples.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from landscape.functional import FunctionalModel, clone_buffers
from landscape.noise.examples import take
from landscape.objective import Objective

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}

NUM_TRIALS = 8
"""Examples on which a layer is tried."""


@dataclass(frozen=True)
class Layer:
    """A linear, convolution or normalisation layer.

    Attributes:
        name: of the module.
        module: in the objective's own copy of the network.
        parameters: their names in the network -> "weight" or "bias"; those that are weights of the objective, and used nowhere else.
    """

    name: str
    module: Any
    parameters: dict[str, str]

    @property
    def is_linear(self) -> bool:
        """Whether it is nn.Linear."""
        return isinstance(self.module, nn.Linear)

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return 1 if self.is_linear else int(self.module.groups)

    def has_matrix(self, parameter: str) -> bool:
        """Whether a parameter is the weight of a linear or convolution layer, not one number a feature."""
        return self.parameters[parameter] == "weight" and isinstance(self.module, MATRICES)


@dataclass(frozen=True)
class Flow:
    """What flows through a layer for a batch.

    Attributes:
        inputs: (b, ...).
        slopes: (b, ...) gradients of the summed contributions over the outputs.
        statistics: the layer's buffers: BatchNorm's running mean and variance.
    """

    inputs: Tensor
    slopes: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, part: slice) -> Flow:
        return Flow(self.inputs[part], self.slopes[part], self.statistics)


# Rebuilding gradients --------------------------------------------------------------------------------------------


def num_positions(layer: Layer, slopes: torch.Size) -> int:
    """T: rows of a linear layer's input, or output pixels of a convolution, that one example with slopes of this shape has."""
    return math.prod(slopes[:-1] if layer.is_linear else slopes[1:])


def positions(layer: Layer, flow: Flow) -> tuple[Tensor, Tensor]:
    """a (b, G, T, in/G) and delta (b, G, T, out/G), position by position, of G groups."""
    b, groups = len(flow.inputs), layer.groups
    if layer.is_linear:
        return (
            flow.inputs.reshape(b, 1, -1, flow.inputs.shape[-1]),
            flow.slopes.reshape(b, 1, -1, flow.slopes.shape[-1]),
        )
    a = _patches(layer.module, flow.inputs, flow.slopes.shape[2:])
    return a.unflatten(1, (groups, -1)).mT, flow.slopes.reshape(b, groups, flow.slopes.shape[1] // groups, -1).mT


def _patches(module: Any, x: Tensor, size: torch.Size) -> Tensor:
    """The patches (b, C k, T) of an input (b, C, ...) that a convolution meets, of outputs of `size`."""
    x = _padded(module, x).contiguous()
    along = x.stride()[2:]
    windows = x.as_strided(
        (*x.shape[:2], *module.kernel_size, *size),
        (*x.stride()[:2],
         *(s * step for s, step in zip(along, module.dilation, strict=True)),
         *(s * step for s, step in zip(along, module.stride, strict=True))),
    )  # fmt: skip
    return windows.reshape(len(x), x.shape[1] * math.prod(module.kernel_size), size.numel())


def _padded(module: Any, x: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def weight_gradients(layer: Layer, flow: Flow, rows: slice) -> Tensor:
    """Per-example gradients (b, num_rows fan_in) of some rows of the weight (out, fan_in)."""
    a, delta = positions(layer, flow)
    per_group = delta.shape[-1]
    first, last = rows.start // per_group, -(-rows.stop // per_group)
    within = slice(rows.start - first * per_group, rows.stop - first * per_group)
    if last == first + 1:  # one group
        found = delta[:, first, :, within].mT @ a[:, first]
    else:
        found = (delta[:, first:last].mT @ a[:, first:last]).flatten(1, 2)[:, within]
    return found.flatten(1)


def vector_gradients(layer: Layer, flow: Flow, parameter: str) -> Tensor:
    """Per-example gradients (b, features) of a bias, or of the weight of a normalisation layer."""
    module, slopes = layer.module, flow.slopes
    if layer.parameters[parameter] == "weight":
        slopes = slopes * _normalised(module, flow)
    if isinstance(module, nn.Linear | nn.LayerNorm):
        features = module.out_features if isinstance(module, nn.Linear) else math.prod(module.normalized_shape)
        return slopes.reshape(len(slopes), -1, features).sum(1)
    return slopes.reshape(*slopes.shape[:2], -1).sum(2)


def _normalised(module: Any, flow: Flow) -> Tensor:
    """What a normalisation layer makes of its inputs before its own weight and bias."""
    x = flow.inputs
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    mean, variance = flow.statistics.get("running_mean"), flow.statistics.get("running_var")
    return F.batch_norm(x, mean, variance, None, None, mean is None, 0.0, module.eps)


def weight_projections(layer: Layer, flow: Flow, directions: Tensor) -> Tensor:
    """g_i . v (b, k), float64, of directions (k, *shape) of the weight: delta_i against the layer's answer to a_i with v as its weight."""
    module, x = layer.module, flow.inputs if layer.is_linear else _padded(layer.module, flow.inputs)
    found = torch.zeros(len(x), len(directions), dtype=torch.float64, device=x.device)
    for j, v in enumerate(directions):
        if isinstance(module, nn.Linear):
            answer = F.linear(x, v)
        else:
            answer = _CONVOLUTIONS[x.ndim](x, v, None, module.stride, 0, module.dilation, module.groups)
        found[:, j] = answer.mul_(flow.slopes).flatten(1).sum(1, dtype=torch.float64)
    return found


# Capturing -------------------------------------------------------------------------------------------------------


def capture(
    objective: Objective, parameters: dict[str, Tensor], layers: list[Layer], inputs: Any, targets: Any
) -> tuple[dict[str, Flow], int]:
    """The flow through layers for a batch, by name, and the number of examples; layers not called just once with one row an example are left out.

    Args:
        objective: L.
        parameters: leaves that require a gradient, by name.
        layers: of the objective's network.
        inputs: of the batch.
        targets: of the batch.

    Cost: one forward and one backward pass of the batch.
    """
    with torch.enable_grad(), objective.frozen(0), _watched(layers) as calls:
        output = objective.model.forward(parameters, clone_buffers(objective.buffers), inputs)
        contributions, _ = objective.model.parted(output, targets)
    once = {name: found[0] for name, found in calls.items() if len(found) == 1 and found[0] is not None}
    if not once or not contributions.requires_grad:
        return {}, len(contributions)
    with objective.frozen(0):
        slopes = torch.autograd.grad(contributions.sum(), [edge for *_, edge in once.values()], allow_unused=True)
    flows = {}
    for (name, (a, shape, statistics, _)), delta in zip(once.items(), slopes, strict=True):
        if len(a) == shape[0] == len(contributions):
            flows[name] = Flow(a, a.new_zeros(shape) if delta is None else delta, statistics)
    return flows, len(contributions)


_Call = tuple[Tensor, torch.Size, dict[str, Tensor], GradientEdge]


@contextlib.contextmanager
def _watched(layers: list[Layer]) -> Iterator[dict[str, list[_Call | None]]]:
    """Within, calls of layers are noted: the input, the output's shape, and where in the graph it is; None for one of an unusual kind."""
    calls: dict[str, list[_Call | None]] = {layer.name: [] for layer in layers}
    handles = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = args[0] if len(args) == 1 else None
            if (
                not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad)
                or x.ndim != output.ndim
                or x.ndim < 2
                or x.dtype != output.dtype
            ):
                calls[name].append(None)
            else:
                statistics = {n: b for n, b in module._buffers.items() if b is not None}
                calls[name].append((x.detach(), output.shape, statistics, get_gradient_edge(output)))

        return hook

    try:
        for layer in layers:  # before hooks of the user's, which may change the output
            handles.append(layer.module.register_forward_hook(note(layer.name), prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def formed(
    objective: Objective, model: FunctionalModel, weights: Tensor, inputs: Any, targets: Any
) -> dict[str, Tensor]:
    """Per-example gradients (b, *shape) by name of the contributions, formed by vmap, of the network as a function of some parameters alone."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # which transformers take where none of their own parameters is free; it has no batching rule
    try:
        with objective.frozen(0):
            joined, _ = model.example_gradients(weights, objective.buffers, inputs, targets)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return model.layout.split(joined)


# Trust -----------------------------------------------------------------------------------------------------------


def leaves(objective: Objective, weights: Tensor) -> dict[str, Tensor]:
    """The parameters by name, as leaves that require a gradient."""
    return {n: p.detach().requires_grad_() for n, p in objective.model.layout.split(weights).items()}


def candidates(objective: Objective) -> list[Layer]:
    """Linear and convolution layers, with those of their parameters that belong to no other module."""
    module = objective.model.module
    uses = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
    free = set(objective.model.layout.names)
    names = {id(p): name for name, p in module.named_parameters() if name in free}
    found = []
    for name, part in module.named_modules():
        if type(part) in (*MATRICES, *NORMS):  # a subclass may compute anything
            own = {names[id(p)]: key for key, p in part._parameters.items() if id(p) in names and uses[id(p)] == 1}
            if own:
                found.append(Layer(name, part, own))
    return found


def trusted_layers(
    objective: Objective, weights: Tensor, inputs: Any, targets: Any
) -> dict[str, tuple[Layer, torch.Size, torch.Size]]:
    """Layers whose per-example gradients can be rebuilt, by parameter, with the shapes of one example's inputs and slopes.

    Every gradient of each of the examples given, rebuilt from a pass over all of them, must be that of a pass over the example alone, to
    1e-3 (1e-6 in float64) of the largest; a parameter to which none of them has a gradient is not trusted.

    Args:
        objective: L.
        weights: w.
        inputs: of the examples to try.
        targets: of the examples to try.

    Cost: one gradient for each example.
    """
    found = candidates(objective)
    held = leaves(objective, weights)
    flows, count = capture(objective, held, found, inputs, targets)
    found = [layer for layer in found if layer.name in flows]
    names = [name for layer in found for name in layer.parameters]
    sizes, errors = torch.zeros(len(names), count), torch.zeros(len(names), count)
    for i in range(count if names else 0):
        x, y = take((inputs, targets), slice(i, i + 1), count)
        with torch.enable_grad(), objective.frozen(0):
            output = objective.model.forward(held, clone_buffers(objective.buffers), x)
            alone = objective.model.parted(output, y)[0].sum()
            gradients = iter(torch.autograd.grad(alone, [held[n] for n in names], materialize_grads=True))
        row = 0
        for layer in found:
            for name in layer.parameters:
                exact, one = next(gradients).flatten(), flows[layer.name][i : i + 1]
                if layer.has_matrix(name):
                    rebuilt = weight_gradients(layer, one, slice(0, len(layer.module.weight)))
                else:
                    rebuilt = vector_gradients(layer, one, name)
                sizes[row, i], errors[row, i] = exact.norm(), (rebuilt.flatten() - exact).norm()
                row += 1
    largest = sizes.amax(1) if count else sizes.sum(1)
    tolerance = 1e-6 if objective.dtype == torch.float64 else 1e-3
    right = (largest > 0) & (errors <= tolerance * largest[:, None]).all(1)
    trusted = {name for name, ok in zip(names, right.tolist(), strict=True) if ok}
    return {
        name: (layer, flows[layer.name].inputs.shape[1:], flows[layer.name].slopes.shape[1:])
        for layer in found
        for name in layer.parameters
        if name in trusted
    }
