"""What autograd needs to differentiate a network twice, and to do it fast.

Two derivatives are asked of operations that were written for one. Some then refuse (fused attention, cuDNN's and oneDNN's recurrent
layers), and some take a slow road: torch's double backward of a convolution convolves with kernels the size of the image. Inside
`twice_differentiable()` such calls of any module are replaced, with the same values:

    convolution              its two backward passes by the kernels made for them
    batch_norm in eval mode  the affine map that it is
    attention                the math backend
    LSTM, GRU, RNN           the native implementation
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@contextlib.contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """Within, operations on `device` can be differentiated twice; autocast is off, so that a Hessian has one type."""
    with _Replacements(), sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False):
        yield


class _Replacements(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _CONVOLUTIONS:
            return _convolution(func, *args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if name in _RECURRENT:
            with torch.backends.cudnn.flags(enabled=False), _without_onednn():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _without_onednn() -> Iterator[
    None
]:  # torch.backends.mkldnn.flags also sets TF32, which warns where there is no such GPU
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else weight * scale
    offset = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (-1,) + (1,) * (input.ndim - 2)
    return torch.addcmul(offset.view(shape), input, scale.view(shape))


# Convolutions ----------------------------------------------------------------------------------------------------
# C(x, w) is bilinear. With its adjoints Cx(u, w) = dC/dx^T u and Cw(u, x) = dC/dw^T u, the backward pass (Cx, Cw) at (u, x, w) has
# itself the derivative, against (a, b):  du: C(a, w) + C(x, b),  dx: Cx(u, b),  dw: Cw(u, a).

_CONVOLUTIONS = {
    "conv1d": (1, False), "conv2d": (2, False), "conv3d": (3, False),
    "conv_transpose1d": (1, True), "conv_transpose2d": (2, True), "conv_transpose3d": (3, True),
}  # fmt: skip


def _each(value: int | Sequence[int], count: int) -> list[int]:
    found = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return found * count if len(found) == 1 else found


def _convolution(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    axes, transposed = _CONVOLUTIONS[func.__name__]
    order = ("stride", "padding", "output_padding", "groups", "dilation") if transposed else ("stride", "padding", "dilation", "groups")  # fmt: skip
    given = {**dict(zip(order, args, strict=False)), **kwargs}
    padding = given.get("padding", 0)
    if isinstance(padding, str) or input.ndim != axes + 2:  # "same" padding, or one example without its axis
        return func(input, weight, bias, *args, **kwargs)
    geometry = (
        _each(given.get("stride", 1), axes), _each(padding, axes), _each(given.get("dilation", 1), axes),
        transposed, _each(given.get("output_padding", 0), axes), int(given.get("groups", 1)),
    )  # fmt: skip
    output = _Convolution.apply(input, weight, geometry)
    return output if bias is None else output + bias.view(-1, *[1] * axes)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return torch.ops.aten.convolution(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return *_ConvolutionBackward.apply(*upstream, *ctx.saved_tensors, ctx.geometry, *ctx.needs_input_grad[:2]), None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], to_x: bool, to_weight: bool) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(upstream, x, weight)
        ctx.geometry = geometry
        return _adjoints(upstream, x, weight, geometry, to_x, to_weight)

    @staticmethod
    def backward(ctx: Any, *against: Tensor | None) -> Any:
        a, b = against
        upstream, x, weight = ctx.saved_tensors
        forward = torch.ops.aten.convolution
        du = dx = dw = None
        if ctx.needs_input_grad[0]:
            if a is not None:
                du = forward(a, weight, None, *ctx.geometry)
            if b is not None:
                other = forward(x, b, None, *ctx.geometry)
                du = other if du is None else du + other
        if ctx.needs_input_grad[1] and b is not None:
            dx = _adjoints(upstream, x, b, ctx.geometry, True, False)[0]
        if ctx.needs_input_grad[2] and a is not None:
            dw = _adjoints(upstream, a, weight, ctx.geometry, False, True)[1]
        return du, dx, dw, None, None, None


def _adjoints(upstream: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], to_x: bool, to_weight: bool) -> Any:  # fmt: skip
    mask = [to_x, to_weight, False]
    return torch.ops.aten.convolution_backward(upstream, x, weight, None, *geometry, mask)[:2]


# Memory ----------------------------------------------------------------------------------------------------------


def graph_bytes(roots: Sequence[Tensor], *, without: Sequence[Tensor] = ()) -> int:
    """Bytes that the autograd graph of some tensors keeps alive, each storage once, leaving out those of `without`."""
    skipped = {t.untyped_storage().data_ptr() for t in without}
    storages: dict[int, int] = {}
    seen: set[Any] = set()
    stack = [root.grad_fn for root in roots]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in skipped:
                storages[storage.data_ptr()] = storage.nbytes()
        stack.extend(following for following, _ in node.next_functions)
    return sum(storages.values())


def _saved(node: Any) -> Iterator[Tensor]:
    names = [n for n in dir(node) if n.startswith("_saved_")]
    found: list[Any] = []
    with contextlib.suppress(RuntimeError, AttributeError):
        found.extend(getattr(node, "saved_tensors", None) or ())
    for name in names:
        with contextlib.suppress(RuntimeError):
            value = getattr(node, name)
            found.extend(value if isinstance(value, list | tuple) else [value])
    return (t for t in found if isinstance(t, Tensor))


# Modules as users have them --------------------------------------------------------------------------------------


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile's wrapper.

    Raises:
        ValueError: for FSDP, whose parameters are shards.
    """
    while True:
        kind = type(module).__name__
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif kind == "OptimizedModule":
            module = module._orig_mod  # type: ignore[assignment]
        elif kind == "FullyShardedDataParallel" or any(hasattr(p, "placements") for p in module.parameters()):
            raise ValueError(
                "the parameters of an FSDP module are shards; measure the whole network: build it without FSDP and load the full "
                "state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
            )
        else:
            return module


def explain(error: BaseException) -> str | None:
    """What to do about an error of a second derivative; None for one that is not known."""
    text = str(error)
    known: list[tuple[Callable[[str], bool], str]] = [
        (lambda s: "scaled_dot_product" in s or "flash_attention" in s, "a fused attention kernel has no second derivative; call torch's F.scaled_dot_product_attention, whose math backend is chosen here, instead of a fused kernel of its own"),
        (lambda s: "cudnn" in s.lower() and "rnn" in s.lower(), "cuDNN's recurrent layers have no second derivative; run the module under torch.backends.cudnn.flags(enabled=False)"),
        (lambda s: "once_differentiable" in s, "a custom autograd function is marked once_differentiable; write its backward in differentiable operations and take the mark away"),
        (lambda s: "Checkpointing is not compatible" in s or "checkpoint" in s.lower(), "activation checkpointing hides the graph; use checkpoint(..., use_reentrant=False) or switch it off for measuring"),
        (lambda s: "modified by an inplace operation" in s, "an operation in place overwrites what the second derivative needs; use its out-of-place form"),
        (lambda s: "is not implemented" in s and "derivative" in s, "an operation of the network has no second derivative; replace it by one composed of differentiable operations"),
        (lambda s: "does not require grad" in s, "the loss does not depend on the weights through differentiable operations"),
    ]  # fmt: skip
    return next((advice for fits, advice in known if fits(text)), None)
