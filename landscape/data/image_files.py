"""Image files in class folders: found, and read with PIL."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What an image file's name ends with, in small or capital letters; torchvision's."""
MOST_THREADS = 16


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The image files of a folder of class folders, in torchvision's order: by class, folder and name.

    Attributes:
        folder: it.
        names: (N) paths in it, CLASS/NAME or CLASS/.../NAME.
        sizes: (N,) bytes.
        targets: (N,) class numbers, int64.
        classes: names of the classes, sorted.
    """

    folder: Path
    names: tuple[str, ...]
    sizes: np.ndarray
    targets: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, number: int) -> str:
        """Of a file."""
        return os.path.join(self.folder, self.names[number])

    def without(self, left_out: Sequence[str]) -> ImageFiles:
        """Without these names."""
        out = frozenset(left_out)
        kept = [i for i, name in enumerate(self.names) if name not in out]
        names = tuple(self.names[i] for i in kept)
        return ImageFiles(self.folder, names, self.sizes[kept], self.targets[kept], self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes in bytes and classes. What the files hold is not read: ImageNet's are 150 GB."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        digest.update("\0".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.sizes, "<i8").data)
        digest.update(np.ascontiguousarray(self.targets.numpy(), "<i8").data)
        return digest.hexdigest()


class UnreadableImageError(ValueError):
    """A file that is no image, or not a whole one.

    Args:
        path: of the file.
        reason: why it cannot be read.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} cannot be read as an image: {self.reason}"


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the classes: the folders in it, sorted."""
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror or error}") from error
    classes = tuple(sorted(name for name, is_folder in found.items() if is_folder))
    if not classes:
        loose = sum(name.lower().endswith(SUFFIXES) for name in found)
        raise ValueError(
            f"{folder} holds no class folders; images belong into {folder}/CLASS/*.JPEG, one folder a class. "
            + (f"It holds {loose:,} image files directly: sort them into folders of their classes" if loose else "")
            + (", as torchvision.datasets.ImageNet does with ImageNet's validation archive" if loose else "")
        )
    return classes


def find_images(folder: Path, classes: Sequence[str]) -> ImageFiles:
    """The image files in the class folders, also in folders within these; links are followed, other files are passed over.

    One pass, class folders in parallel (a file's size asks the file system, which may be slow); ten seconds or so for ImageNet's 1.28 million
    files on a local disk, and about 150 bytes of memory a file.

    Raises:
        ValueError: a folder cannot be read, a class has no image, or what is named like an image is no file.
    """
    with ThreadPoolExecutor(num_threads()) as pool:
        found = list(pool.map(partial(_images_in, folder), classes))
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        raise ValueError(
            f"{folder}: no image in {len(empty)} of {len(classes)} class folders ({some(empty)}); complete the data, or remove the "
            f"folders from train and val. Files count as images by their names: {', '.join('*' + s for s in SUFFIXES)}"
        )
    files = [file for of_class in found for file in of_class]
    return ImageFiles(
        folder,
        tuple(name for name, _ in files),
        np.array([size for _, size in files], np.int64),
        torch.arange(len(classes)).repeat_interleave(torch.tensor([len(f) for f in found])),
        tuple(classes),
    )


def _images_in(folder: Path, class_name: str) -> list[tuple[str, int]]:
    """(path in `folder`, bytes) of a class folder's images."""
    found: list[tuple[str, str, int]] = []

    def enter(within: str, above: frozenset[tuple[int, int]]) -> None:
        inner = []
        with os.scandir(folder / within) as entries:
            for entry in entries:
                if entry.is_dir():
                    inner.append(entry)
                elif entry.name.lower().endswith(SUFFIXES):
                    if not entry.is_file():
                        raise ValueError(f"{entry.path} is no file, or a link that leads nowhere; remove or mend it")
                    found.append((within, entry.name, entry.stat().st_size))
        for entry in inner:
            status = entry.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                raise ValueError(f"{entry.path} is a link to a folder that it lies in; remove it")
            enter(f"{within}/{entry.name}", above | {here})

    try:
        status = os.stat(folder / class_name)
        enter(class_name, frozenset([(status.st_dev, status.st_ino)]))
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder / class_name} cannot be read: {error.strerror or error}"
        ) from error
    return [(f"{within}/{name}", size) for within, name, size in sorted(found)]


def read_image(path: str) -> Any:
    """A file's image as a PIL image in RGB.

    As torchvision reads it: grey, palette, CMYK and 16-bit images are converted by PIL, an alpha channel is dropped, of an animation the
    first picture is taken, and a rotation that EXIF data ask for is not carried out. What PIL decodes without an error is taken to be whole.

    Raises:
        UnreadableImageError: the file is empty, cut short or no image, or cannot be opened.
        ValueError: PIL is set to fill what is missing of an image.
    """
    from PIL import Image, ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, by some other module: images that are cut short would be filled with grey and nobody "
            "told; set it to False"
        )
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            if image.mode != "RGB":
                return image.convert("RGB")
            image.load()
            return image
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise UnreadableImageError(path, _reason(path, error)) from error


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if os.path.getsize(path) == 0:
        return "it is empty, 0 bytes"
    if type(error).__name__ == "UnidentifiedImageError":
        return "its contents are of no image format"
    return str(error) or type(error).__name__


def split_folders(root: Path) -> tuple[str, str]:
    """("train", "val"), if they are there."""
    missing = [part for part in ("train", "val") if not os.path.isdir(root / part)]
    if missing:
        try:
            there = some(sorted(os.listdir(root))) or "nothing"
        except OSError as error:
            raise ValueError(
                f"{root} cannot be read: {error.strerror or error}; put the folders train and val there, each with a folder of images a class "
                "(ImageNet-1K: image-net.org; torchvision.datasets.ImageNet unpacks its archives; ten of its classes: Imagenette of fast.ai)"
            ) from error
        raise ValueError(
            f"{root} must hold the folders train and val, each with a folder of images a class; missing: {', '.join(missing)}; there is: {there}"
        )
    return "train", "val"


def some(names: Sequence[str]) -> str:
    """The first few names.

    >>> some(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e, ...'
    """
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def num_threads() -> int:
    """The processors of this process, shared with torchrun's others on this machine; at most 16."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
