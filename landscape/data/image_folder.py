"""ImageNet, or any images in class folders: decoded when needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape.data.dataset import Examples, fingerprint_of
from landscape.data.image_check import LIST_NAME, how_to_check, leave_out
from landscape.data.image_check import ImageCheck as ImageCheck
from landscape.data.image_check import check_images as check_images
from landscape.data.image_files import ImageFiles, class_folders, find_images, some, split_folders
from landscape.data.image_views import NUM_UNIFORMS, ViewReader
from landscape.data.images import check_normalisation, check_uniforms, normalised

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels over ImageNet's training images; torchvision's models take these."""
CACHE_BYTES = 2 * 1024**3
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class ImageFolderData(Examples):
    """Images of class folders; decoded and cut to size x size by threads on the CPU, moved as bytes, normalised on the device.

    `batch` and `rows` give the evaluation view (`image_views.evaluation_view`), which stays in memory up to `cache_bytes`. `draw` gives, if
    `augmented`, a random crop made size x size and mirrored in half the cases, a pure function of five uniforms an example
    (`image_views.crop_box`); it decodes anew each time. `expect` begins to decode the minibatch that is drawn next, one at most.
    JPEGs are decoded in full (PIL's draft mode, faster for small views, would change the pixels), so that views are torchvision's.

    Attributes:
        files: the files.
        size: side of the images, in pixels.
        reader: what decodes them.
        name: what it is, for messages and provenance.
        augmented: whether `draw` augments.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel.
        device: where batches are.
        dtype: floating-point type of the inputs.
    """

    files: ImageFiles
    size: int
    reader: ViewReader
    name: str = "images"
    augmented: bool = False
    mean: Sequence[float | int] = IMAGENET_MEAN
    std: Sequence[float | int] = IMAGENET_STD
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_normalisation(self.name, 3, self.mean, self.std)

    @classmethod
    def of(
        cls, files: ImageFiles, size: int, name: str, *, augmented: bool = False, cache_bytes: int = CACHE_BYTES
    ) -> ImageFolderData:
        """The data of files; see the class."""
        if size < 1:
            raise ValueError(f"{name}: images need a side of at least 1 pixel, not {size}")
        return cls(files, size, ViewReader(files, size, cache_bytes), name, augmented)

    @property
    def num_random(self) -> int:
        """5 with augmentation: area, ratio, top, left, flip."""
        return NUM_UNIFORMS if self.augmented else 0

    @property
    def reads_ahead(self) -> bool:
        """See `Examples`."""
        return True

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`."""
        return self._floats(indices, None), self.targets_at(indices)

    def targets_at(self, indices: Tensor) -> Tensor:
        """See `Examples`; no image is read."""
        chosen = self.files.targets.index_select(0, indices.flatten().cpu())
        return chosen.unflatten(0, indices.shape).to(self.device)

    def draw(self, indices: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`."""
        return self._floats(indices, self._random(indices, uniforms)), self.targets_at(indices)

    def expect(self, indices: Tensor, uniforms: Tensor) -> None:
        """Begin to decode what `draw` of the same arguments will take; another draw is simply decoded then."""
        self.reader.expect(self._numbers(indices), self._random(indices, uniforms), pinned=self._pinned)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ImageFolderData:
        """On another device; inputs in `dtype`. Both read, and keep, the same views."""
        return replace(self, device=torch.device(device), dtype=dtype or self.dtype)

    def fingerprint(self) -> str:
        """A short hash of the files' names and sizes (not of what they hold), of the size of the images, normalisation and augmentation."""
        numbers = [[float(x) for x in values] for values in (self.mean, self.std)]
        return fingerprint_of(f"{self.files.fingerprint} {self.size} {numbers} augmented={self.augmented}".encode())

    def close(self) -> None:
        """End the threads that decode; they start again when needed."""
        self.reader.close()

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _numbers(self, indices: Tensor) -> list[int]:
        numbers: list[int] = indices.flatten().tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise IndexError(f"{self.name}: examples are numbered 0 to {len(self) - 1}")
        return numbers

    def _random(self, indices: Tensor, uniforms: Tensor) -> np.ndarray | None:
        if not self.augmented:
            return None
        check_uniforms(self.name, indices, uniforms, NUM_UNIFORMS)
        return uniforms.reshape(-1, NUM_UNIFORMS).numpy().copy()

    def _floats(self, indices: Tensor, uniforms: np.ndarray | None) -> Tensor:
        views = self.reader.read(self._numbers(indices), uniforms, pinned=self._pinned)
        views = views.to(self.device, non_blocking=True)
        return normalised(views, self.mean, self.std, self.dtype).unflatten(0, indices.shape)


def image_folder(
    root: str | Path, *, size: int = 224, num_classes: int | None = None, corrupt: str = "refuse", list_file: str | Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[ImageFolderData, ImageFolderData]:  # fmt: skip
    """Training and held-out images of root/train/CLASS/* and root/val/CLASS/*, as ImageNet is laid out; training images are augmented.

    A file that cannot be read as an image is an error that names it; it is never replaced by another. Empty files are found at once, others
    when they are decoded. With corrupt="skip" those that `check_images` found are left out from the start, with a warning, so that an index
    means the same image in every process and every run; one that is not on its list is an error still.

    Args:
        root: the folder of train and val.
        size: side of the images, in pixels.
        num_classes: how many classes there must be; as many as there are by default.
        corrupt: "refuse" or "skip".
        list_file: the list of a check; root/unreadable-images.json by default.
        cache_bytes: for evaluation views kept in memory, of training and of held-out images each, in each process.
    """
    if corrupt not in ("refuse", "skip"):
        raise ValueError(f'corrupt must be "refuse" or "skip", not {corrupt!r}')
    root = Path(root).expanduser()
    train, val = (class_folders(root / part) for part in split_folders(root))
    _check_classes(root, train, val, num_classes)
    parts = [find_images(root / part, train) for part in ("train", "val")]
    if corrupt == "skip":
        parts = leave_out(root, parts, root / LIST_NAME if list_file is None else Path(list_file).expanduser())
    for files in parts:
        empty = [files.names[i] for i in np.flatnonzero(files.sizes == 0)]
        if empty:
            raise ValueError(
                f"{files.folder}: {len(empty):,} image files are empty, 0 bytes ({some(empty)}); {how_to_check(root)}"
            )
    train_data, val_data = (
        ImageFolderData.of(
            files, size, str(files.folder), augmented=files.folder.name == "train", cache_bytes=cache_bytes
        )
        for files in parts
    )
    return train_data, val_data


def _check_classes(root: Path, train: tuple[str, ...], val: tuple[str, ...], num_classes: int | None) -> None:
    if train != val:
        only = [sorted(set(a) - set(b)) for a, b in ((train, val), (val, train))]
        raise ValueError(
            f"{root}: train and val must have the same class folders; only in train: {some(only[0]) or 'none'} ({len(only[0])}); "
            f"only in val: {some(only[1]) or 'none'} ({len(only[1])})"
        )
    if num_classes is not None and len(train) != num_classes:
        raise ValueError(
            f"{root}: {num_classes:,} classes are expected, and there are {len(train):,} class folders ({some(train)}); complete the data, "
            "or take a task for so many classes"
        )
