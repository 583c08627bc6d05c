"""Images of one size that lie in memory, cropped and flipped at random on the device they are on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from landscape.data.dataset import Examples, fingerprint_of

PADDING_SHARE = 8
"""The random crop pads each side by so small a part of the image: 4 pixels at 32, 2 at 16, 1 at 8."""
CHUNK = 4096
"""Images that `resized` takes at once."""


@dataclass(frozen=True, eq=False)
class ImageData(Examples):
    """Images kept as bytes; inputs are (pixels / 255 - mean) / std, as torchvision's ToTensor and Normalize make them.

    `draw` augments, if `augmented`, as CIFAR-10 is trained on: padded with black (zeros before the normalisation) by H // 8 pixels above and
    below and W // 8 on either side, cropped to the old size at random and flipped in half the cases. An example's three uniforms are
    (top, left, flip): offsets floor(u (2p + 1)) of the crop in the padded image, and a flip where u < 1/2. It is torchvision's
    RandomCrop(size, padding=p) and RandomHorizontalFlip, but a pure function of the uniforms and of all images at once, on any device.

    Attributes:
        pixels: (N, C, H, W), uint8.
        targets: (N,) class indices, int64.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel.
        name: what it is, for messages and provenance.
        augmented: whether `draw` augments.
        dtype: floating-point type of the inputs.
    """

    pixels: Tensor
    targets: Tensor
    mean: Sequence[float | int]
    std: Sequence[float | int]
    name: str = "images"
    augmented: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise ValueError(
                f"{self.name}: images must be uint8 of shape (N, C, H, W), not {self.pixels.dtype} of {tuple(self.pixels.shape)}"
            )
        if self.targets.dtype != torch.int64 or self.targets.ndim != 1:
            raise ValueError(
                f"{self.name}: targets must be int64 of shape (N,), not {self.targets.dtype} of {tuple(self.targets.shape)}"
            )
        if len(self.pixels) != len(self.targets):
            raise ValueError(f"{self.name}: {len(self.pixels)} images, but {len(self.targets)} targets")
        if self.pixels.numel() == 0:
            raise ValueError(f"{self.name}: no images, or none with a pixel: {tuple(self.pixels.shape)}")
        check_normalisation(self.name, self.pixels.shape[1], self.mean, self.std)

    @property
    def device(self) -> torch.device:
        """See `Examples`."""
        return self.pixels.device

    @property
    def num_random(self) -> int:
        """3 with augmentation: top, left, flip."""
        return 3 if self.augmented else 0

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`."""
        chosen = self.pixels.index_select(0, indices.flatten().to(self.device))
        return self._floats(chosen).unflatten(0, indices.shape), self.targets_at(indices)

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """Consecutive examples."""
        return self._floats(self.pixels[part]), self.targets[part]

    def targets_at(self, indices: Tensor) -> Tensor:
        """See `Examples`."""
        return self.targets.index_select(0, indices.flatten().to(self.device)).unflatten(0, indices.shape)

    def draw(self, indices: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`; the crops of one byte each are gathered, then made floats."""
        if not self.augmented:
            return self.batch(indices)
        check_uniforms(self.name, indices, uniforms, self.num_random)
        chosen = self.pixels.index_select(0, indices.flatten().to(self.device))
        cropped = padded_crops(chosen, uniforms.reshape(-1, 3))
        return self._floats(cropped).unflatten(0, indices.shape), self.targets_at(indices)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ImageData:
        """On another device; inputs in `dtype`. Pixels stay bytes."""
        moved = replace(self, pixels=self.pixels.to(device), targets=self.targets.to(device), dtype=dtype or self.dtype)
        if "_contents" in vars(self):
            vars(moved)["_contents"] = self._contents
        return moved

    def fingerprint(self) -> str:
        """A short hash of pixels, targets, normalisation and augmentation; computed once, about 0.1 s for CIFAR-10."""
        return self._contents

    @cached_property
    def _contents(self) -> str:
        numbers = [[float(x) for x in values] for values in (self.mean, self.std)]
        return fingerprint_of(self.pixels, self.targets, f"{numbers} augmented={self.augmented}".encode())

    def _floats(self, pixels: Tensor) -> Tensor:
        return normalised(pixels, self.mean, self.std, self.dtype)


def normalised(pixels: Tensor, mean: Sequence[float | int], std: Sequence[float | int], dtype: torch.dtype) -> Tensor:
    """(pixels / 255 - mean) / std of bytes (B, C, H, W), in `dtype`; computed in float32 at least.

    >>> normalised(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), [0.5], [0.25], torch.float64).flatten().tolist()
    [-2.0, 2.0]
    """
    wide = torch.promote_types(dtype, torch.float32)
    centre, scale = (torch.tensor(values, dtype=wide).view(-1, 1, 1).to(pixels.device) for values in (mean, std))
    return pixels.to(wide).div_(255).sub_(centre).div_(scale).to(dtype)


def padded_crops(pixels: Tensor, uniforms: Tensor) -> Tensor:
    """Each image padded with zeros, cropped to its old size at random, and flipped or not; see `ImageData`.

    Args:
        pixels: (B, C, H, W).
        uniforms: (B, 3): top, left, flip.
    """
    count, _, height, width = pixels.shape
    up, side = height // PADDING_SHARE, width // PADDING_SHARE
    top, left = (uniforms[:, 0] * (2 * up + 1)).long(), (uniforms[:, 1] * (2 * side + 1)).long()
    rows, columns = torch.arange(height), torch.arange(width)
    columns = torch.where((uniforms[:, 2] < 0.5)[:, None], columns.flip(0), columns) + left[:, None]
    places = (rows + top[:, None])[:, :, None] * (width + 2 * side) + columns[:, None, :]
    places = places.view(count, 1, -1).to(pixels.device).expand(-1, pixels.shape[1], -1)
    padded = pad(pixels, (side, side, up, up))
    return padded.flatten(2).gather(2, places).view_as(pixels)


def resized(data: ImageData, size: int) -> ImageData:
    """The same images at a smaller side: means over squares of pixels, rounded to bytes (halves up).

    Mean and std of the normalisation stay those of the full size: the channels' means hardly change, their deviations fall a little.

    Args:
        data: square images.
        size: the new side, a divisor of the old one.

    >>> four = ImageData(torch.tensor([[[[0, 1], [2, 255]]]], dtype=torch.uint8), torch.tensor([0]), [0.0], [1.0])
    >>> resized(four, 1).pixels.item()
    65
    """
    _, _, height, width = data.pixels.shape
    if height != width:
        raise ValueError(f"{data.name}: images of {height}x{width} are not square, so cannot be made {size}x{size}")
    if not 0 < size <= height or height % size:
        sides = ", ".join(str(s) for s in range(1, height + 1) if height % s == 0)
        raise ValueError(
            f"{data.name}: {height}x{height} images cannot be averaged to a side of {size}; choose one of {sides}"
        )
    if size == height:
        return data
    ratio = height // size
    squares = data.pixels.unflatten(3, (size, ratio)).unflatten(2, (size, ratio))
    means = [
        (chunk.sum((3, 5), dtype=torch.int32).add_(ratio**2 // 2) // ratio**2).to(torch.uint8)
        for chunk in squares.split(CHUNK)
    ]
    return replace(data, pixels=torch.cat(means), name=f"{data.name}, {size}x{size}")


def check_labels(name: str, targets: Tensor, num_classes: int) -> None:
    """Raise unless the targets are of 0 to num_classes - 1 and each class has an example."""
    outside = ((targets < 0) | (targets >= num_classes)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"{name}: labels must be 0 to {num_classes - 1}; {len(outside)} are not, the first {int(targets[first])} at example {first}"
        )
    empty = (torch.bincount(targets, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{name}: no example of {len(empty)} of {num_classes} classes ({', '.join(map(str, empty[:10]))}"
            f"{', ...' if len(empty) > 10 else ''}); the data are incomplete, or the task has fewer classes"
        )


def check_normalisation(name: str, channels: int, mean: Sequence[float | int], std: Sequence[float | int]) -> None:
    """Raise unless there is a mean and a positive std for each channel."""
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"{name}: images of {channels} channels, but {len(mean)} means and {len(std)} deviations")
    if not all(s > 0 for s in std):
        raise ValueError(f"{name}: standard deviations must be positive: {', '.join(map(str, std))}")


def check_uniforms(name: str, indices: Tensor, uniforms: Tensor, count: int) -> None:
    """Raise unless there are `count` uniforms, float64, for each index."""
    if uniforms.shape != (*indices.shape, count):
        raise ValueError(
            f"{name}: {count} uniforms an example make a shape of {(*indices.shape, count)}, not {tuple(uniforms.shape)}"
        )
    if uniforms.dtype != torch.float64:
        raise ValueError(f"{name}: uniforms must be float64, not {uniforms.dtype}, which may round to 1")
