"""Many weight vectors of one network at once: the only place that batches over weights, with its fallback.

A network is a pure function of a flat weight vector. Weight vectors are stacked along a leading axis,

    weights (L, d), buffers {name: (L, ...)}, batches (L, B, ...)  ->  losses (L, B), gradients (L, d), new buffers,

so that all learners of all replicas advance as one batched program. Training steps, noise draws, full gradients and
landscape slices all come through here. Where a network cannot be batched (data-dependent control flow, an operation
without a batching rule) the same functions take one weight vector at a time and say so once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from landscape.autodiff import unwrap
from landscape.losses import ExampleLoss, LossFunction, as_example_loss

Buffers = dict[str, Tensor]
"""BatchNorm statistics and the like, {name: (L, ...)}."""

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
LARGEST_STREAMED_TOGETHER = 1 << 20
"""Parameters of a network up to which a CPU takes several weight vectors' streamed gradients as one batch; above, the batched products of
the backward pass cost more than what batching saves (2.7 times as much at 5.8 million parameters and 32 examples, 1.4 at 256)."""


@dataclass(frozen=True)
class ParameterLayout:
    """Where each parameter lies in a flat weight vector, in named_parameters order (tied weights once)."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def of(module: nn.Module) -> ParameterLayout:
        """The layout of a module's parameters that require a gradient."""
        kept = [(name, p.shape) for name, p in module.named_parameters() if p.requires_grad]
        if not kept:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
        return ParameterLayout(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [shape.numel() for shape in self.shapes]

    @property
    def num_parameters(self) -> int:
        """d, the length of a flat weight vector."""
        return sum(self.sizes)

    def split(self, flat: Float[Tensor, "*L d"]) -> dict[str, Tensor]:
        """Views (..., *shape) of a flat tensor (..., d), by name."""
        if flat.shape[-1] != self.num_parameters:
            raise ValueError(
                f"a weight vector of {flat.shape[-1]} numbers, for a model of {self.num_parameters} parameters"
            )
        pieces = flat.split(self.sizes, dim=-1)
        return {
            n: p.unflatten(-1, s) if s else p.squeeze(-1)
            for n, s, p in zip(self.names, self.shapes, pieces, strict=True)
        }

    def join(self, parameters: Mapping[str, Tensor], lead: int = 0) -> Tensor:
        """The flat tensor (..., d) of parameters with `lead` leading axes; extra names are left out."""
        missing = [name for name in self.names if name not in parameters]
        if missing:
            raise ValueError(f"parameters missing: {', '.join(missing)}")
        return torch.cat([parameters[name].flatten(lead) if parameters[name].ndim > lead else parameters[name].unsqueeze(-1)
                          for name in self.names], dim=-1)  # fmt: skip


class FunctionalModel:
    """A module and a loss as pure functions of stacked flat weights.

    The module given is copied and never touched. Parameters that do not require a gradient stay at their values.

    Args:
        module: any nn.Module; its train or eval mode is kept (BatchNorm and dropout follow it).
        loss_fn: see `landscape.losses.as_example_loss`.
        batched: False takes one weight vector at a time even where vmap would work.
        randomness: vmap's: whether weight vectors draw "different" dropout masks or the "same".
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: ExampleLoss | LossFunction,
        *,
        batched: bool = True,
        randomness: str = "different",
    ) -> None:
        self.module = copy.deepcopy(unwrap(module))
        self.layout = ParameterLayout.of(self.module)
        self.loss = as_example_loss(loss_fn)
        self.randomness = randomness
        self._recurrent = [m for m in self.module.modules() if isinstance(m, nn.RNNBase)]
        self.batched = batched and not self._recurrent  # no batching rule
        self._fixed = {n: p.detach() for n, p in self.module.named_parameters() if not p.requires_grad}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FunctionalModel:
        """A copy on another device and in another floating-point type."""
        return self.of(copy.deepcopy(self.module).to(device, dtype))

    def evaluation(self) -> FunctionalModel:
        """A copy in eval mode: dropout off, BatchNorm at its running statistics."""
        return self.of(copy.deepcopy(self.module).eval())

    def of(self, module: nn.Module) -> FunctionalModel:
        """Another module under the same loss and options."""
        return FunctionalModel(module, self.loss, batched=self.batched, randomness=self.randomness)

    def initial_weights(self) -> tuple[Float[Tensor, " d"], Buffers]:
        """The module's own weights (d,), and its buffers."""
        weights = self.layout.join(dict(self.module.named_parameters())).detach().clone()
        return weights, {name: b.detach().clone() for name, b in self.module.named_buffers()}

    def state_dict(self, weights: Float[Tensor, " d"], buffers: Buffers) -> dict[str, Tensor]:
        """Exactly the names of the module's state_dict, tied weights and shared buffers under each of theirs."""
        held = {**self._fixed, **self.layout.split(weights), **buffers}
        first = {id(t): n for n, t in (*self.module.named_parameters(), *self.module.named_buffers())}
        full = self.module.state_dict(keep_vars=True)
        return {name: held[name] if name in held else held[first[id(t)]] for name, t in full.items()}

    # One weight vector -------------------------------------------------------------------------------------------

    def output(self, weights: Tensor, buffers: Buffers, inputs: Any) -> Any:
        """The network's output at one flat weight vector (d,); buffers that the module updates are updated in place.

        A dictionary of inputs is passed as keyword arguments, a tuple as positional ones.
        """
        return self.forward(self.layout.split(weights), buffers, inputs)

    def forward(self, parameters: Mapping[str, Tensor], buffers: Buffers, inputs: Any) -> Any:
        """The same at parameters by name."""
        state = {**self._fixed, **parameters, **buffers}
        with self._recurrence(next(iter(parameters.values())).device):
            if isinstance(inputs, dict):
                return functional_call(self.module, state, (), inputs)
            return functional_call(self.module, state, inputs if isinstance(inputs, tuple) else (inputs,))

    def _recurrence(self, device: torch.device) -> AbstractContextManager[Any]:
        """Within, recurrent layers in eval mode can be differentiated, for which cuDNN's must be in train mode."""
        if device.type == "cuda" and any(not m.training for m in self._recurrent):
            return torch.backends.cudnn.flags(enabled=False)
        return nullcontext()

    def example_losses(self, weights: Tensor, buffers: Buffers, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Contributions (B,) and weights (B,) of the examples at one flat weight vector (d,)."""
        return self.parted(self.output(weights, buffers, inputs), targets)

    def parted(self, output: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Contributions and weights of the examples from the network's output, in full precision after autocast."""
        if isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16):
            output = output.float()
        contributions, example_weights = self.loss(output, targets)
        if contributions.ndim != 1:
            raise ValueError(
                f"the loss returned a tensor of shape {tuple(contributions.shape)}, not one number per example; return per-example "
                "losses (reduction='none'), use one of torch's losses, or say what the one number is: Objective(..., reduction='mean')"
            )
        return contributions, example_weights

    # Stacked weight vectors --------------------------------------------------------------------------------------

    def losses(
        self, weights: Float[Tensor, "L d"], buffers: Buffers, inputs: Any, targets: Any, *, shared: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Contributions and example weights, each (L, B), without gradients.

        Args:
            weights: stacked flat weights.
            buffers: stacked buffers {name: (L, ...)}.
            inputs: (L, B, ...), or (B, ...) for all weight vectors alike when `shared`.
            targets: as inputs.
            shared: whether the batch is one for all.
        """

        def run(w: Tensor, b: Buffers, x: Any, y: Any) -> tuple[Tensor, Tensor]:
            return self.example_losses(w, clone_buffers(b), x, y)

        with torch.no_grad():
            return self._map(run, run, weights, buffers, inputs, targets, _axes(shared))

    def outputs(self, weights: Float[Tensor, "L d"], buffers: Buffers, inputs: Any, *, shared: bool = False) -> Tensor:
        """The network's outputs (L, B, ...), without gradients; arguments as for `losses`."""

        def run(w: Tensor, b: Buffers, x: Any, _: Any) -> tuple[Tensor]:
            return (self.output(w, clone_buffers(b), x),)

        with torch.no_grad():
            return self._map(run, run, weights, buffers, inputs, None, _axes(shared))[0]

    def summed_gradients(
        self, weights: Float[Tensor, "L d"], buffers: Buffers, inputs: Any, targets: Any, *, shared: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Buffers]:
        """Gradients of the summed contributions, for streaming over a data set.

        Returns:
            summed contributions (L,), summed example weights (L,), gradients of the first (L, d), and the new buffers.
            A mean-reduced loss and its gradient are the first and third divided by the second.
        """
        batched, single = self._gradient_functions()
        summed, norm, gradients, fresh = self._map(batched, single, weights, buffers, inputs, targets, _axes(shared))
        return summed, norm, self.layout.join(gradients, lead=1), fresh

    def minibatch_gradients(
        self, weights: Float[Tensor, "L d"], buffers: Buffers, inputs: Any, targets: Any, *, parts: int = 1
    ) -> tuple[Tensor, Tensor, Buffers]:
        """Each weight vector's loss on its own minibatch, as its reduction says: losses (L,), gradients (L, d), new buffers.

        With `parts` a minibatch is so many minibatches of one size after another, and the loss the mean of theirs.
        """
        batched, single = self._gradient_functions(parts=parts)
        losses, _, gradients, fresh = self._map(batched, single, weights, buffers, inputs, targets, _axes(False))
        return losses, self.layout.join(gradients, lead=1), fresh

    def streamed_gradients(
        self,
        weights: Float[Tensor, "L d"],
        buffers: Buffers,
        inputs: Any,
        targets: Any,
        take: Callable[[str, Tensor], None],
        norms: Float[Tensor, " L"] | None = None,
    ) -> tuple[Tensor, Buffers]:
        """As `minibatch_gradients`, but each parameter's gradients (l, *shape) go to `take` while the backward pass goes on.

        `take` is called in the order of the backward pass, once a parameter for all weight vectors together (l = L) or for each of them
        (l = 1, also where the network is large). A parameter that the loss does not depend on is left out. `norms` divide the summed
        contributions instead of the minibatches' own weights, for minibatches that are parts of larger ones.
        """

        def loss(parameters: dict[str, Tensor], b: Buffers, x: Any, y: Any) -> tuple[Tensor, Buffers]:
            fresh = clone_buffers(b)
            contributions, example_weights = self.parted(self.forward(parameters, fresh, x), y)
            total = contributions.sum()
            if norms is not None:
                return total, fresh
            return (total / example_weights.sum() if self.loss.reduction == "mean" else total), fresh

        losses, updated = [], []
        small = self.layout.num_parameters <= LARGEST_STREAMED_TOGETHER or weights.device.type != "cpu"
        for part in chunks(len(weights), len(weights) if self.batched and small else 1):
            several = part.stop - part.start > 1
            w, held, x, y = tree_map(
                lambda t, k=part if several else part.start: t[k] if isinstance(t, Tensor) else t,
                (weights, buffers, inputs, targets),
            )
            leaves = {n: p.detach().requires_grad_() for n, p in self.layout.split(w).items()}
            found, fresh = (
                self._map(loss, loss, leaves, held, x, y, _axes(False)) if several else loss(leaves, held, x, y)
            )
            for name, leaf in leaves.items():
                leaf.register_post_accumulate_grad_hook(_handing_over(name, take, several=several))
            found = found.reshape(-1) if norms is None else found.reshape(-1) / norms[part]
            found.sum().backward(inputs=list(leaves.values()))
            losses.append(found.detach())
            updated.append({name: b.detach() if several else b.detach()[None] for name, b in fresh.items()})
        return torch.cat(losses), {name: torch.cat([b[name] for b in updated]) for name in buffers}

    def example_gradients(
        self, weights: Float[Tensor, " d"], buffers: Buffers, inputs: Any, targets: Any
    ) -> tuple[Tensor, Tensor]:
        """Per-example gradients (B, d) of the contributions at one weight vector, and the example weights (B,).

        Each example is a batch of its own, so a network with batch statistics must be in eval mode.
        """
        inputs, targets = tree_map(lambda t: t.unsqueeze(1), (inputs, targets))
        batched, single = self._gradient_functions()
        _, norm, gradients, _ = self._map(batched, single, weights, buffers, inputs, targets, axes=(None, 0))
        return self.layout.join(gradients, lead=1), norm

    def _gradient_functions(self, *, parts: int = 0) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(loss, summed weights, gradients by name, new buffers) of one weight vector, for vmap and alone.

        The loss is the sum of the contributions, or with `parts` the mean over so many minibatches of what the loss's own
        reduction makes of each.
        """

        def total(
            parameters: dict[str, Tensor], b: Buffers, x: Any, y: Any
        ) -> tuple[Tensor, tuple[Tensor, Tensor, Buffers]]:
            fresh = clone_buffers(b)
            contributions, example_weights = self.parted(self.forward(parameters, fresh, x), y)
            norm = example_weights.sum()
            loss = contributions.sum()
            if parts > 1:
                sums = contributions.unflatten(0, (parts, -1)).sum(1)
                norms = example_weights.unflatten(0, (parts, -1)).sum(1)
                loss = (sums / norms if self.loss.reduction == "mean" else sums).mean()
            elif parts and self.loss.reduction == "mean":
                loss = loss / norm
            return loss, (loss.detach(), norm, fresh)

        def batched(w: Tensor, b: Buffers, x: Any, y: Any) -> tuple[Tensor, Tensor, dict[str, Tensor], Buffers]:
            gradients, (value, norm, fresh) = torch.func.grad(total, has_aux=True)(self.layout.split(w), b, x, y)
            return value, norm, gradients, fresh

        def single(w: Tensor, b: Buffers, x: Any, y: Any) -> tuple[Tensor, Tensor, dict[str, Tensor], Buffers]:
            parameters = {n: p.detach().requires_grad_() for n, p in self.layout.split(w).items()}
            loss, (value, norm, fresh) = total(parameters, b, x, y)
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            return (
                value,
                norm,
                dict(zip(parameters, gradients, strict=True)),
                {n: t.detach() for n, t in fresh.items()},
            )

        return batched, single

    def _map(self, batched: Callable[..., Any], single: Callable[..., Any], weights: Any, buffers: Buffers, inputs: Any,
             targets: Any, axes: tuple[int | None, int | None]) -> Any:  # fmt: skip
        """Map over the leading axis of the weights (flat or by name), the data or both, batched where that works and there are several; `axes` are vmap's in_dims."""
        weight_axis, data_axis = axes
        if self.batched and not (weight_axis == 0 and _length(weights) == 1):
            dims = (weight_axis, dict.fromkeys(buffers, weight_axis), data_axis, None if targets is None else data_axis)
            try:
                with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
                    return torch.vmap(batched, in_dims=dims, randomness=self.randomness)(
                        weights, buffers, inputs, targets
                    )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                results = self._loop(single, weights, buffers, inputs, targets, axes)  # a real mistake raises here too
                self.batched = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"{type(self.module).__name__} cannot be batched over learners ({reason}); taking one at a time from now on",
                    stacklevel=4,
                )
                return results
        return self._loop(single, weights, buffers, inputs, targets, axes)

    @staticmethod
    def _loop(single: Callable[..., Any], weights: Any, buffers: Buffers, inputs: Any, targets: Any,
              axes: tuple[int | None, int | None]) -> Any:  # fmt: skip
        weight_axis, data_axis = axes

        def one(i: int) -> Any:
            w, b = (weights, buffers) if weight_axis is None else tree_map(lambda t: t[i], (weights, buffers))
            x, y = (
                (inputs, targets)
                if data_axis is None
                else tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, (inputs, targets))
            )
            return single(w, b, x, y)

        count = _length(weights if weight_axis is not None else inputs)
        return _stack([one(i) for i in range(count)])


def chunks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(count)."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + max(1, size), count))


def _length(tensors: Any) -> int:
    return len(tree_leaves(tensors)[0])


def _handing_over(name: str, take: Callable[[str, Tensor], None], *, several: bool) -> Callable[[Tensor], None]:
    """A hook that gives a leaf's gradient away, with a leading axis where the leaf has none."""

    def hook(leaf: Tensor) -> None:
        assert leaf.grad is not None
        take(name, leaf.grad if several else leaf.grad[None])
        leaf.grad = None

    return hook


def _axes(shared: bool) -> tuple[int | None, int | None]:
    return (0, None) if shared else (0, 0)


def measured_norms(module: nn.Module) -> list[Any]:
    """BatchNorm layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]


def clone_buffers(buffers: Buffers) -> Buffers:
    """Copies, for a module that updates them in place."""
    return {name: b.clone() for name, b in buffers.items()}


def _stack(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results) if len(results) > 1 else first[None]
    if isinstance(first, dict):
        return {name: _stack([r[name] for r in results]) for name in first}
    return tuple(_stack([r[i] for r in results]) for i in range(len(first)))
