from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape import streams
from landscape.data.images import ImageData, check_labels, normalised, padded_crops, resized
from landscape.optional import import_torchvision

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision; not installed"
)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def make(count: int = 6, side: int = 16, channels: int = 3, **changes: Any) -> ImageData:
    """Random images, two classes."""
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return ImageData(
        pixels,
        torch.arange(count) % 2,
        MEAN[:channels],
        STD[:channels],
        **{"name": "few", "augmented": True, **changes},
    )


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(streams.uniform(streams.philox("test crops", seed), *shape, 3))


def torchvision_view(pixels: Tensor, u: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """One image as torchvision's functional forms make it from the same crop and flip."""
    F = import_torchvision("torchvision.transforms.functional")
    side = pixels.shape[-1]
    p = side // 8
    image = F.pad(F.to_pil_image(pixels), p)
    image = F.crop(image, math.floor(float(u[0]) * (2 * p + 1)), math.floor(float(u[1]) * (2 * p + 1)), side, side)
    if u[2] < 0.5:
        image = F.hflip(image)
    return F.normalize(F.to_tensor(image), mean, std)


@needs_torchvision
@pytest.mark.parametrize("side", [8, 16, 32, 37])
def test_draws_are_torchvisions_crops_and_flips_exactly(side: int) -> None:
    data, indices, u = make(side=side), torch.tensor([0, 3, 3, 5, 1, 2, 4]), uniforms(7)
    u[0], u[1] = 0, 1 - 2**-53  # the corners
    drawn, targets = data.draw(indices, u)
    expected = torch.stack([torchvision_view(data.pixels[i], row) for i, row in zip(indices, u, strict=True)])
    assert torch.equal(drawn, expected)
    assert torch.equal(targets, data.targets[indices])


@needs_torchvision
@pytest.mark.parametrize("indices", [torch.tensor([3, 0, 3]), torch.tensor([[5, 1], [1, 1]]), torch.tensor([[[4]]])])
def test_batches_and_rows_are_torchvisions_to_tensor_and_normalize(indices: Tensor) -> None:
    F = import_torchvision("torchvision.transforms.functional")
    data = make()
    expected = torch.stack([F.normalize(F.to_tensor(F.to_pil_image(p)), MEAN, STD) for p in data.pixels])
    inputs, targets = data.batch(indices)
    assert torch.equal(inputs, expected[indices])
    assert torch.equal(targets, data.targets[indices])
    assert torch.equal(data.targets_at(indices), targets)
    rows, row_targets = data.rows(slice(1, 4))
    assert torch.equal(rows, expected[1:4])
    assert torch.equal(row_targets, data.targets[1:4])


def test_stacked_learners_draw_what_each_would_alone() -> None:
    data, indices, u = (
        make(),
        torch.randint(0, 6, (2, 3, 4), generator=torch.Generator().manual_seed(0)),
        uniforms(2, 3, 4),
    )
    stacked, targets = data.draw(indices, u)
    assert stacked.shape == (2, 3, 4, 3, 16, 16)
    assert torch.equal(data.draw(indices, u)[0], stacked)
    for place in np.ndindex(2, 3):
        alone, alone_targets = data.draw(indices[place], u[place])
        assert torch.equal(alone, stacked[place])
        assert torch.equal(alone_targets, targets[place])


def test_without_augmentation_draws_are_batches() -> None:
    data = make(augmented=False)
    indices = torch.tensor([[1, 2]])
    assert (data.num_random, make().num_random) == (0, 3)
    assert torch.equal(data.draw(indices, torch.empty(1, 2, 0, dtype=torch.float64))[0], data.batch(indices)[0])


def test_crops_and_flips_are_uniform_and_independent() -> None:
    """Of an image whose pixels are their own numbers; 81 places by 2 flips. chi2 has variance 2 dof."""
    image = torch.arange(1, 257, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 1, 16, 16)
    count, p = 20_000, 2
    crops = padded_crops(image.expand(count, -1, -1, -1), uniforms(count, seed=5))
    views = {}
    for top in range(2 * p + 1):
        for left in range(2 * p + 1):
            for flip in (0.0, 0.9):
                u = torch.tensor([[(top + 0.5) / (2 * p + 1), (left + 0.5) / (2 * p + 1), flip]], dtype=torch.float64)
                views[padded_crops(image, u).numpy().tobytes()] = 0
    assert len(views) == 50
    for crop in crops:
        views[crop.numpy().tobytes()] += 1
    expected = count / 50
    chi2 = sum((seen - expected) ** 2 / expected for seen in views.values())
    assert abs(chi2 - 49) < 4 * math.sqrt(2 * 49)


def test_images_smaller_than_8_are_only_flipped() -> None:
    data = make(side=4)
    drawn, _ = data.draw(torch.tensor([0, 0]), torch.tensor([[0.9, 0.9, 0.4], [0.0, 0.0, 0.5]], dtype=torch.float64))
    plain = data.batch(torch.tensor([0]))[0][0]
    assert torch.equal(drawn, torch.stack([plain.flip(-1), plain]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_to_keeps_bytes_and_gives_inputs_of_the_type(dtype: torch.dtype) -> None:
    data = make()
    moved = data.to("cpu", dtype)
    inputs, targets = moved.draw(torch.tensor([0, 1]), uniforms(2))
    exact = data.to("cpu", torch.float64).draw(torch.tensor([0, 1]), uniforms(2))[0]
    assert (moved.pixels.dtype, moved.dtype, inputs.dtype, targets.dtype) == (torch.uint8, dtype, dtype, torch.int64)
    assert (inputs.double() - exact).abs().max() <= 2 * exact.abs().max() * torch.finfo(dtype).eps
    assert moved.to("cpu").dtype == dtype
    assert data.dtype == torch.float32


def test_the_normalisation_is_of_pixels_in_the_unit_interval() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = normalised(pixels, [0.25], [0.5], torch.float64).flatten()
    torch.testing.assert_close(found, (torch.arange(256, dtype=torch.float64) / 255 - 0.25) / 0.5, rtol=0, atol=1e-15)


def test_the_fingerprint_is_of_the_contents_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    print_ = data.fingerprint()
    assert len(print_) == 16
    assert make(name="other").to("cpu", torch.float64).fingerprint() == print_
    changed = data.pixels.clone()
    changed[-1, -1, -1, -1] ^= 1
    others = [
        replace(data, pixels=changed), replace(data, targets=1 - data.targets), replace(data, mean=(0.49, 0.48, 0.46)),
        replace(data, std=(0.25, 0.24, 0.27)), replace(data, augmented=False),
    ]  # fmt: skip
    assert len({print_, *(d.fingerprint() for d in others)}) == 6
    monkeypatch.setattr("landscape.data.images.fingerprint_of", lambda *_: pytest.fail("computed again"))
    assert data.fingerprint() == print_
    assert data.to("cpu", torch.float64).fingerprint() == print_


def test_smaller_images_are_means_of_squares() -> None:
    data = make(side=32, count=3)
    for size in (16, 8, 1):
        small = resized(data, size)
        exact = torch.nn.functional.avg_pool2d(data.pixels.double(), 32 // size)
        assert small.pixels.dtype == torch.uint8
        assert torch.equal(small.pixels, (exact + 0.5).floor().to(torch.uint8))
        assert (small.name, small.augmented) == (f"few, {size}x{size}", True)
        assert small.fingerprint() != data.fingerprint()
    assert resized(data, 32) is data


@pytest.mark.parametrize("value", [0, 127, 255])
def test_smaller_images_of_one_colour_keep_it(value: int) -> None:
    pixels = torch.full((5000, 1, 4, 4), value, dtype=torch.uint8)  # more than a chunk
    small = resized(ImageData(pixels, torch.zeros(5000, dtype=torch.int64), [0.5], [0.5]), 2)
    assert small.pixels.shape == (5000, 1, 2, 2)
    assert small.pixels.unique().tolist() == [value]


@pytest.mark.parametrize("size", [0, -1, 3, 64, 12])
def test_sides_that_do_not_divide_are_refused_with_those_that_do(size: int) -> None:
    with pytest.raises(ValueError, match=rf"few: 32x32 images .* side of {size}; choose one of 1, 2, 4, 8, 16, 32"):
        resized(make(side=32), size)


def test_images_that_are_not_square_are_not_resized() -> None:
    data = ImageData(torch.zeros(2, 1, 4, 6, dtype=torch.uint8), torch.tensor([0, 1]), [0.5], [0.5])
    with pytest.raises(ValueError, match="4x6 are not square"):
        resized(data, 2)
    assert data.batch(torch.tensor([1]))[0].shape == (1, 1, 4, 6)
    wide = replace(data, pixels=torch.zeros(2, 1, 8, 24, dtype=torch.uint8), augmented=True)
    assert wide.draw(torch.tensor([1]), uniforms(1))[0].shape == (1, 1, 8, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: replace(d, pixels=d.pixels.float()), r"uint8 of shape \(N, C, H, W\), not torch.float32"),
        (lambda d: replace(d, pixels=d.pixels[0]), r"not torch.uint8 of \(3, 16, 16\)"),
        (lambda d: replace(d, targets=d.targets.int()), "int64"),
        (lambda d: replace(d, targets=d.targets[:, None]), r"of shape \(N,\), not torch.int64 of \(6, 1\)"),
        (lambda d: replace(d, targets=d.targets[:5]), "6 images, but 5 targets"),
        (lambda d: replace(d, pixels=d.pixels[:0], targets=d.targets[:0]), "no images"),
        (lambda d: replace(d, pixels=d.pixels[:, :, :0]), "none with a pixel"),
        (lambda d: replace(d, mean=(0.5,)), "3 channels, but 1 means and 3 deviations"),
        (lambda d: replace(d, std=(0.5, 0.0, 0.5)), "must be positive: 0.5, 0.0, 0.5"),
        (lambda d: replace(d, std=(0.5, math.nan, 0.5)), "must be positive"),
    ],
)
def test_what_is_no_image_data_is_refused(change: Callable[[ImageData], ImageData], message: str) -> None:
    with pytest.raises(ValueError, match=f"few: .*{message}"):
        change(make())


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (3,), (1, 3, 3)])
def test_uniforms_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"few: 3 uniforms an example make a shape of \(3, 3\), not"):
        make().draw(torch.tensor([0, 1, 2]), torch.zeros(shape, dtype=torch.float64))


def test_uniforms_of_single_precision_are_refused_because_they_may_round_to_1() -> None:
    with pytest.raises(ValueError, match="few: uniforms must be float64, not"):
        make().draw(torch.tensor([0]), torch.rand(1, 3))


def test_labels_out_of_range_and_classes_without_examples_are_told() -> None:
    check_labels("few", torch.tensor([0, 1, 2, 1]), 3)
    with pytest.raises(ValueError, match="few: labels must be 0 to 2; 2 are not, the first 3 at example 1"):
        check_labels("few", torch.tensor([0, 3, -1, 2]), 3)
    with pytest.raises(ValueError, match=r"few: no example of 2 of 4 classes \(1, 3\)"):
        check_labels("few", torch.tensor([0, 2, 2]), 4)
    with pytest.raises(ValueError, match=r"no example of 14 of 15 classes \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\)"):
        check_labels("few", torch.tensor([0]), 15)


@pytest.mark.gpu
def test_draws_on_a_gpu_are_those_on_the_cpu() -> None:
    data, indices, u = make(side=32), torch.tensor([[0, 5], [3, 3]]), uniforms(2, 2)
    drawn, targets = data.to("cuda").draw(indices, u)
    assert drawn.is_cuda
    assert targets.is_cuda
    torch.testing.assert_close(drawn.cpu(), data.draw(indices, u)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        data.to("cuda").batch(indices.cuda())[0].cpu(), data.batch(indices)[0], rtol=1e-6, atol=1e-6
    )
