"""Networks with a fraction of their channels."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from torch import nn

from landscape.models import CIFAR10, IMAGENET, blstm, imagenet, mlp, narrow
from landscape.models.blocks import SqueezeExcitation
from tests.models.networks import CONVOLUTIONAL, WIDTHS, full, needs_torchvision


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_a_narrow_resnet_by_hand() -> None:
    """ResNet-18 at 1/8: channels 8, 16, 32, 64, so 3x3 convolutions of 9 c c', BatchNorms of 2 c', projections of c c' + 2 c'."""

    def block(c: int, d: int) -> int:
        return 9 * c * d + 9 * d * d + 4 * d + (c * d + 2 * d if c != d else 0)

    stem, head = 27 * 8 + 16, 64 * 10 + 10
    stages = sum(block(c, d) + block(d, d) for c, d in ((8, 8), (8, 16), (16, 32), (32, 64)))
    assert count(narrow(full("resnet18"), Fraction(1, 8))) == stem + stages + head == 176_402


def test_parameters_of_a_narrow_lstm_by_hand() -> None:
    """128 cells a direction, a bottleneck of 64: 2 * 512 (f + 128 + 2) of each layer, f = 260, then 256."""
    with torch.device("meta"):
        network = blstm()
    layers = 2 * 512 * (260 + 130) + 5 * 2 * 512 * (256 + 130)
    assert count(narrow(network, 1 / 4)) == layers + (256 + 1) * 64 + (64 + 1) * 32_000


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_inputs_and_outputs_stay_and_all_else_shrinks(name: str) -> None:
    network = full(name)
    share = WIDTHS.get(name, Fraction(1, 4))
    small = narrow(network, share)
    squeezed = {id(p) for m in network.modules() if isinstance(m, SqueezeExcitation) for p in (m.squeeze, m.excite)}
    pairs = [
        (a, b)
        for (n, a), (k, b) in zip(network.named_modules(), small.named_modules(), strict=True)
        if n == k and isinstance(a, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    ]
    for place, (wide, thin) in enumerate(pairs):
        assert type(wide) is type(thin)
        if isinstance(wide, nn.BatchNorm2d):
            assert thin.num_features == wide.num_features * share
            continue
        if id(wide) in squeezed:
            continue
        (i, o), (j, p) = (
            (m.in_channels, m.out_channels) if isinstance(m, nn.Conv2d) else (m.in_features, m.out_features)
            for m in (wide, thin)
        )
        assert j == (i if place == 0 else i * share)
        assert p == (o if place == len(pairs) - 1 else o * share)
        if isinstance(wide, nn.Conv2d):
            same = ("kernel_size", "stride", "padding", "dilation")
            assert [getattr(wide, s) for s in same] == [getattr(thin, s) for s in same]
            assert (wide.bias is None) == (thin.bias is None)
    depthwise = [
        sum(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in n.modules()) for n in (network, small)
    ]
    assert depthwise[0] == depthwise[1]
    assert not any(p.is_meta for p in small.parameters())


@pytest.mark.parametrize("name", ["senet18", "efficientnet-b0"])
def test_squeezed_channels_round_up(name: str) -> None:
    network = full(name)
    for wide, thin in zip(network.modules(), narrow(network, 1 / 8).modules(), strict=True):
        if isinstance(wide, SqueezeExcitation) and isinstance(thin, SqueezeExcitation):
            squeezed = math.ceil(wide.squeeze.out_channels / 8)
            assert thin.squeeze.out_channels == thin.excite.in_channels == squeezed
            assert thin.squeeze.in_channels == thin.excite.out_channels == wide.squeeze.in_channels // 8


@needs_torchvision
@pytest.mark.parametrize(("name", "width", "groups"), [
    ("resnext29", Fraction(1, 2), 2), ("resnext29", Fraction(1, 8), 2), ("resnext50", Fraction(1, 2), 16), ("resnext50", Fraction(1, 8), 4),
])  # fmt: skip
def test_groups_of_one_size_are_fewer_but_two_stay_two(name: str, width: Fraction, groups: int) -> None:
    found = Counter(m.groups for m in narrow(full(name), width).modules() if isinstance(m, nn.Conv2d))
    assert set(found) == {1, groups}


@pytest.mark.parametrize("name", CIFAR10)
def test_the_widths_an_error_offers_are_those_that_work(name: str) -> None:
    network = full(name)
    with pytest.raises(
        ValueError, match=r"a width of 2/7 does not divide the \d+ channels of [\w.]+; use a multiple of 1/\d+"
    ) as error:
        narrow(network, Fraction(2, 7))
    step = int(str(error.value).split("multiple of 1/")[1].split(",")[0])
    offered = Fraction(str(error.value).split("such as ")[1])
    assert offered.denominator == step or step % offered.denominator == 0
    assert offered <= Fraction(2, 7) or offered == Fraction(1, step)
    narrow(network, offered)
    with pytest.raises(ValueError, match="does not divide"):
        narrow(network, Fraction(1, 2 * step))


@needs_torchvision
def test_too_few_channels_for_the_groups() -> None:
    with pytest.raises(
        ValueError, match=r"a width of 1/64 leaves 2 channels for the 32 groups of layer1.0.conv2, too few"
    ):
        narrow(full("resnext50"), Fraction(1, 64))


@pytest.mark.parametrize("width", [0, -0.5, 1.5, Fraction(3, 2)])
def test_a_width_is_a_fraction(width: Fraction | float | int) -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        narrow(mlp(), width)


@pytest.mark.parametrize("module", [
    nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), nn.LSTM(4, 4, proj_size=2), nn.Sequential(nn.Conv1d(4, 4, 1)),
])  # fmt: skip
def test_other_layers_with_weights_are_named(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"is of type (LayerNorm|LSTM|Conv1d), which cannot be made narrower"):
        narrow(module, 1 / 2)


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer"):
        narrow(nn.Sequential(nn.ReLU()), 1 / 2)


def test_options_type_and_mode_are_kept_and_the_original_is_untouched() -> None:
    wide = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2, bias=False, padding_mode="reflect"),
        nn.BatchNorm2d(8, eps=0.1, momentum=0.2),
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(8, 2, bias=False),
    ).double()
    wide[1].eval()
    before = {n: t.clone() for n, t in wide.state_dict().items()}
    thin = narrow(wide, 0.25)
    assert thin[0].weight.shape == (2, 3, 3, 3)
    assert (thin[0].stride, thin[0].padding, thin[0].dilation) == ((2, 2), (1, 1), (2, 2))
    assert thin[0].padding_mode == "reflect"
    assert thin[0].bias is None
    assert (thin[1].eps, thin[1].momentum, thin[1].num_features) == (0.1, 0.2, 2)
    assert not thin[2].track_running_stats
    assert thin[4].weight.shape == (2, 2)
    assert [layer.training for layer in thin] == [True, False, True, True, True]
    assert {p.dtype for p in thin.parameters()} == {torch.float64}
    assert all(torch.equal(t, before[n]) for n, t in wide.state_dict().items())
    assert wide[0].out_channels == 8


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.Linear(4, 4)
    thin = narrow(nn.Sequential(nn.Linear(3, 4), shared, nn.ReLU(), shared, nn.Linear(4, 2)), 1 / 2)
    assert thin[1] is thin[3]
    assert thin[1].weight.shape == (2, 2)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "efficientnet-b0",
        pytest.param("resnet50", marks=needs_torchvision),
        pytest.param("densenet161", marks=needs_torchvision),
    ],
)
def test_weights_are_drawn_as_the_network_draws_its_own(name: str) -> None:
    """At width 1, each layer's deviation is that of a fresh network, and what is constant is the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = CIFAR10[name]() if name in CIFAR10 else imagenet(name)
        again = narrow(full(name), 1)
    for (n, a), (k, b) in zip(fresh.named_parameters(), again.named_parameters(), strict=True):
        assert (n, a.shape) == (k, b.shape)
        if a.std(correction=0) == 0:
            assert torch.equal(a, b)
        elif a.numel() > 2000:
            assert not torch.equal(a, b)
            torch.testing.assert_close(
                a.std(), b.std(), rtol=0.1, atol=0.0
            )  # 4 standard errors of a normal's deviation


@needs_torchvision
def test_weights_of_narrow_torchvision_networks_by_family() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg, resnet, densenet, alexnet = (
            narrow(full(n), 1 / 4) for n in ("vgg11", "resnet50", "densenet161", "alexnet")
        )

    def close(found: torch.Tensor, deviation: float) -> None:
        assert abs(float(found.detach().std()) / deviation - 1) < 4 / math.sqrt(2 * found.numel())

    close(vgg.features[8].weight, math.sqrt(2 / (9 * 64)))  # 64 -> 64, fan out 9 * 64
    assert not any(m.bias.any() for m in vgg.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    close(vgg.classifier[3].weight, 0.01)
    close(resnet.layer1[0].conv3.weight, math.sqrt(2 / 64))  # 16 -> 64
    assert resnet.fc.bias.any()
    close(resnet.fc.weight, math.sqrt(1 / (3 * 512)))  # torch's uniform
    close(densenet.features.denseblock1.denselayer2.conv1.weight, math.sqrt(2 / 36))  # 36 -> 48
    assert not densenet.classifier.bias.any()
    close(alexnet.classifier[4].weight, math.sqrt(1 / (3 * 1024)))


def test_a_seed_gives_one_network() -> None:
    def drawn(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return narrow(mlp((6, 8, 3)), 1 / 2)[1].weight

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_the_tables_name_sixteen_networks() -> None:
    assert len(CIFAR10) == 10
    assert len(IMAGENET) == 6
