import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from landscape.autodiff import explain, graph_bytes, twice_differentiable, unwrap

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "strided, dilated, grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2), nn.Tanh(), nn.Conv2d(4, 2, 1, padding="same")
        ),
        (2, 3, 9, 9),
    ),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Conv2d(6, 6, 3, groups=6, bias=False)), (2, 3, 7, 7)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), nn.Tanh(), nn.ConvTranspose2d(4, 4, 2, groups=2, bias=False)),
        (2, 3, 5, 5),
    ),
    "one axis, circular": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, 2, 1, padding_mode="circular"), nn.Tanh(), nn.Conv1d(4, 4, 3)), (2, 3, 9)),
    "three axes": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Tanh(), nn.Conv3d(3, 2, 2)), (2, 2, 4, 4, 4)),
    "one example without its axis": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)), (3, 6, 6)),
    "batch norm, evaluation": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5, affine=False)).eval(), (6, 4)),
    "batch norm, training": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()), (6, 4)),
}  # fmt: skip


def product(net: nn.Module, x: Tensor, replaced: bool) -> tuple[list[Tensor], Tensor]:
    """Hessian of a smooth function of the output, of weights and input, times a fixed vector; and the value."""
    leaves = [*net.parameters(), x.requires_grad_()]
    with twice_differentiable(x.device) if replaced else contextlib.nullcontext():
        output = net(x)
        value = (output.tanh() + output**2).sum()
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    vector = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in leaves]
    return list(torch.autograd.grad(gradients, leaves, vector)), value.detach()


@pytest.mark.parametrize("name", NETWORKS)
def test_replaced_operations_have_the_same_values_and_second_derivatives(name: str) -> None:
    build, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = build().double(), torch.randn(shape).double()
    state = {n: b.clone() for n, b in net.named_buffers()}
    expected, value = product(net, x, False)
    net.load_state_dict(state, strict=False)
    found, same = product(net, x, True)
    torch.testing.assert_close(same, value)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_convolutions_pass_the_numerical_check_of_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def convolved(x: Tensor, w: Tensor) -> Tensor:
        with twice_differentiable(x.device):
            return torch.conv2d(x, w, None, 1, 1)

    assert torch.autograd.gradgradcheck(convolved, (x, w))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_float32_have_second_derivatives(layer: type[nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = layer(3, 4, batch_first=True), torch.randn(2, 5, 3)
    enabled = torch.backends.mkldnn.enabled

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    found, _ = product(First(), x, True)
    expected, _ = product(First().double(), x.double().detach(), False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)
    assert torch.backends.mkldnn.enabled == enabled


def test_graph_bytes_counts_each_storage_once() -> None:
    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    y = torch.randn(10, dtype=torch.float64)
    assert graph_bytes([x * y]) == 80  # y; the gradient of y is not asked for, so x is not kept
    assert graph_bytes([x * y + x * y[:5].repeat(2)]) == 160
    assert graph_bytes([x * y], without=[y]) == 0
    assert graph_bytes([x.exp()]) == 80
    assert graph_bytes([y]) == 0


def test_wrappers_are_taken_off_and_shards_refused() -> None:
    net = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(nn.DataParallel(net))) is net

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ValueError, match="parameters of an FSDP module are shards"):
        unwrap(FullyShardedDataParallel())


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented", "attention"),
        ("the derivative for '_cudnn_rnn_backward' is not implemented", "cuDNN"),
        ("trying to differentiate twice a function that was marked with @once_differentiable", "once_differentiable"),
        ("Checkpointing is not compatible with .grad()", "use_reentrant=False"),
        ("one of the variables needed has been modified by an inplace operation", "out-of-place"),
        ("derivative for aten::thing_backward is not implemented", "no second derivative"),
    ],
)
def test_errors_are_explained(message: str, advice: str) -> None:
    found = explain(RuntimeError(message))
    assert found is not None
    assert advice in found
    assert explain(RuntimeError("something else")) is None
