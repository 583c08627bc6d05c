"""The convolutional networks: sizes, shapes, gradients, second derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from landscape.functional import FunctionalModel
from landscape.linearisation import gauss_newton_map, hessian_map
from landscape.models import CIFAR10
from landscape.models.blocks import DropPath
from landscape.models.mobile import Shuffle
from tests.models.networks import CONVOLUTIONAL, batch, full, gradient, needs_torchvision, settled, small, smooth

PARAMETERS = {
    "resnet18": 11_173_962,
    "vgg19": 20_040_522,
    "densenet121": 6_956_298,
    "mobilenet": 3_217_226,
    "mobilenetv2": 2_296_922,
    "senet18": 11_260_354,
    "googlenet": 6_166_250,
    "resnext29": 9_128_778,
    "efficientnet-b0": 3_599_686,
    "shufflenetv2": 1_263_854,
    "alexnet": 61_100_840,
    "vgg11": 132_863_336,
    "vgg11-bn": 132_868_840,
    "resnet50": 25_557_032,
    "resnext50": 25_028_904,
    "densenet161": 28_681_000,
}
"""Of the public 32x32 forms, and as torchvision states them."""
LAST_MAPS = {
    "resnet18": (512, 4),
    "vgg19": (512, 1),
    "densenet121": (1024, 4),
    "mobilenet": (1024, 2),
    "mobilenetv2": (1280, 4),
    "senet18": (512, 4),
    "googlenet": (1024, 8),
    "resnext29": (1024, 8),
    "efficientnet-b0": (320, 2),
    "shufflenetv2": (1024, 4),
}
"""Channels, and side in pixels, of what the mean is taken of."""


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_number_of_parameters_is_the_known_one(name: str) -> None:
    assert sum(p.numel() for p in full(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", CIFAR10)
def test_the_last_maps_of_a_32x32_image_have_the_known_size(name: str) -> None:
    network = full(name)
    body, head = list(network)[:-1], network.get_submodule("head")
    images = torch.zeros(2, 3, 32, 32, device="meta")
    channels, side = LAST_MAPS[name]
    maps = nn.Sequential(*body)(images)
    assert maps.shape == (2, channels, side, side)
    assert head(maps).shape == network(images).shape == (2, 10)


@pytest.mark.parametrize("name", CIFAR10)
def test_images_of_other_sizes_go_through_and_the_number_of_classes_is_an_argument(name: str) -> None:
    with torch.device("meta"):
        images = torch.zeros(2, 3, 32, 64) if name == "vgg19" else torch.zeros(2, 3, 40, 8)
        assert CIFAR10[name](num_classes=7)(images).shape == (2, 7)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_outputs_and_gradients_are_finite_and_the_input_is_left_alone(name: str) -> None:
    network = small(name)
    images, targets = batch(name, dtype=torch.float32)
    before = images.clone()
    scores = network(images)
    cross_entropy(scores, targets).backward()
    assert scores.shape == (4, 10)
    assert scores.isfinite().all()
    assert torch.equal(images, before)
    without = {n for n, p in network.named_parameters() if p.grad is None}
    assert without == ({n for n in network.state_dict() if ".held." in n and "running" not in n and "num_" not in n})
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_activations_are_not_in_place(name: str) -> None:
    assert not any(getattr(layer, "inplace", False) for layer in full(name).modules())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_gradients_in_float32_are_those_of_float64(name: str, train: bool) -> None:
    """Without kinks: a rounding that takes one activation across zero is not small any more."""
    images, targets = batch(name)
    network = smooth(small(name))
    network = network if train else settled(network, images.float())
    found = []
    for dtype in (torch.float32, torch.float64):
        model = FunctionalModel(network, cross_entropy).to("cpu", dtype)
        found.append(gradient(model, *model.initial_weights(), images.to(dtype), targets).double())
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_hessian_vector_products_are_differences_of_gradients(name: str, train: bool) -> None:
    images, targets = batch(name)
    network = smooth(small(name)).double()
    model = FunctionalModel(network if train else settled(network, images), cross_entropy)
    weights, buffers = model.initial_weights()
    direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction /= direction.norm()
    step = 1e-6
    ahead, behind = (gradient(model, weights + s * direction, buffers, images, targets) for s in (step, -step))
    difference = (ahead - behind) / (2 * step)
    product = hessian_map(model, weights, buffers, images, targets)(direction[None])[0]
    assert (product - difference).norm() < 1e-5 * product.norm()


@pytest.mark.parametrize("name", ["vgg19", "googlenet", pytest.param("alexnet", marks=needs_torchvision)])
def test_second_derivatives_of_networks_with_maxima_and_kinks_are_symmetric(name: str) -> None:
    images, targets = batch(name)
    model = FunctionalModel(small(name).double(), cross_entropy)
    point = model.initial_weights()
    generator = torch.Generator().manual_seed(3)
    u, v = torch.randn(2, model.layout.num_parameters, generator=generator, dtype=torch.float64)
    for made in (hessian_map, gauss_newton_map):
        Hu, Hv = made(model, *point, images, targets)(torch.stack([u, v]))
        torch.testing.assert_close(u @ Hv, v @ Hu, rtol=1e-8, atol=1e-8 * float(u.norm() * Hv.norm()))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_several_weight_vectors_go_through_as_one_batch(name: str) -> None:
    """Without the warning that they cannot; warnings are errors here."""
    network = small(name).double()
    model = FunctionalModel(network, cross_entropy)
    weights, buffers = model.initial_weights()
    stacked = torch.stack([weights, 0.99 * weights])
    lead = {n: torch.stack([b, b]) for n, b in buffers.items()}
    images, targets = batch(name, 2)
    together = model.minibatch_gradients(stacked, lead, images, targets)
    alone = FunctionalModel(network, cross_entropy, batched=False).minibatch_gradients(stacked, lead, images, targets)
    assert (together[1] - alone[1]).norm() < 1e-9 * alone[1].norm()
    for n, b in alone[2].items():
        torch.testing.assert_close(together[2][n], b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_state_dict_goes_round(name: str) -> None:
    images, _ = batch(name, dtype=torch.float32)
    one, other = small(name, seed=1), small(name, seed=2)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one.eval()(images), other.eval()(images))


def test_networks_that_shuffle_alternate_the_halves() -> None:
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert Shuffle()(channels).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_dropped_paths_leave_out_whole_examples_at_their_rate_and_keep_the_mean() -> None:
    images = torch.ones(4000, 2, 3, 3)
    layer = DropPath(0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = layer(images)
    kept = dropped.flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 1.25}
    assert torch.equal(kept.amin(1), kept.amax(1))
    share = float((kept[:, 0] == 0).double().mean())
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    assert torch.equal(layer.eval()(images), images)


def test_efficientnet_leaves_out_blocks_at_rising_rates_and_draws_from_the_global_generator() -> None:
    network = full("efficientnet-b0")
    rates = [layer.rate for layer in network.modules() if isinstance(layer, DropPath)]
    blocks = [2, 4, 6, 7, 9, 10, 12, 13, 14]  # of 16, those whose input and output have one shape
    assert rates == [0.2 * block / 16 for block in blocks]
    network = small("efficientnet-b0").train()
    images, _ = batch("efficientnet-b0", dtype=torch.float32)

    def drawn(seed: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return copy.deepcopy(network)(images)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_learners_batched_together_drop_paths_of_their_own() -> None:
    model = FunctionalModel(small("efficientnet-b0").train(), cross_entropy)
    weights, buffers = model.initial_weights()
    images, targets = batch("efficientnet-b0", dtype=torch.float32)
    pair = [{n: torch.stack([b, b]) for n, b in buffers.items()}, *(torch.stack([t, t]) for t in (images, targets))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses, gradients, _ = model.minibatch_gradients(torch.stack([weights, weights]), *pair)
    assert losses[0] != losses[1]
    assert not torch.equal(gradients[0], gradients[1])
