"""Views of image files, decoded in threads: the one that is measured, and random ones to train on."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landscape.data.image_check import how_to_check
from landscape.data.image_files import ImageFiles, UnreadableImageError, num_threads, read_image

AREA = (0.08, 1.0)
"""Share of an image's area that a random crop takes."""
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
"""Logarithm of its width by its height."""
CROP_SHARE = 256 / 224
"""Short side of the whole image, as the evaluation view has it, by that of the view."""
NUM_UNIFORMS = 5


def crop_box(width: int, height: int, uniforms: Sequence[float | int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop, in pixels, as torchvision's RandomResizedCrop draws it at its first attempt.

    The crop has a share u0 of the way through [0.08, 1] of the image's area, and log(width / height) so far u1 through [log 3/4, log 4/3];
    its place is uniform among those possible (u2 down, u3 across). torchvision draws up to ten times until the crop fits, then takes the
    middle of the image; here there is one attempt, and a crop that is wider or higher than the image is cut to it. That happens to 14 % of
    the crops of a square image and 26 % of those of a 4:3 one.

    >>> crop_box(400, 300, (1, 0.5, 0, 0))  # all of the area as a square: cut to the height
    (0, 0, 346, 300)
    """
    area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * uniforms[0])
    root_ratio = math.exp((LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * uniforms[1]) / 2)
    across = min(max(round(math.sqrt(area) * root_ratio), 1), width)
    down = min(max(round(math.sqrt(area) / root_ratio), 1), height)
    return int(uniforms[3] * (width - across + 1)), int(uniforms[2] * (height - down + 1)), across, down


def random_view(image: Any, size: int, uniforms: Sequence[float | int]) -> Any:
    """A random crop made size x size, and mirrored where u4 < 1/2."""
    from PIL import Image

    left, top, across, down = crop_box(image.width, image.height, uniforms)
    view = image.crop((left, top, left + across, top + down)).resize((size, size), Image.Resampling.BILINEAR)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if uniforms[4] < 0.5 else view


def evaluation_view(image: Any, size: int) -> Any:
    """The middle size x size of the image with its short side at size * 256 / 224 (rounded): torchvision's Resize and CenterCrop."""
    from PIL import Image

    width, height = image.size
    short, least = round(size * CROP_SHARE), min(width, height)
    width, height = int(short * width / least), int(short * height / least)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


Key = tuple[tuple[int, ...], bytes | None, bool]


@dataclass(frozen=True)
class _Started:
    """Views that are being decoded.

    Attributes:
        key: what was asked for: numbers of the files, uniforms, whether in pinned memory.
        pixels: (B, 3, size, size), uint8; filled when all jobs are done.
        jobs: one a view, of those that were not kept.
    """

    key: Key
    pixels: Tensor
    jobs: list[Future[None]]

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    def wait(self) -> Tensor:
        try:
            for job in self.jobs:
                job.result()
        except BaseException:
            self.cancel()
            raise
        return self.pixels


class ViewReader:
    """Decodes views in threads, keeps evaluation views in memory, and reads one minibatch ahead.

    Evaluation views that were read stay in memory, up to `cache_bytes`; the first read are kept, for measures pass over the same examples in
    the same order again and again, which would push each out of a cache of the latest before it is asked for again.
    Threads start when first needed, end with `close` or with the program, and start anew when needed again, also in a copy of the reader
    (pickled or after a fork), which begins with nothing kept. May be used by several threads.

    Args:
        files: the files.
        size: side of the views.
        cache_bytes: for evaluation views, 3 size^2 bytes each.
    """

    def __init__(self, files: ImageFiles, size: int, cache_bytes: int) -> None:
        self.files, self.size, self.cache_bytes = files, size, cache_bytes
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._expected: _Started | None = None
        self._kept: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "size": self.size, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def bytes_kept(self) -> int:
        """Of evaluation views in memory."""
        return len(self._kept) * 3 * self.size**2

    def read(self, numbers: Sequence[int], uniforms: np.ndarray | None, *, pinned: bool = False) -> Tensor:
        """Views (B, 3, size, size), uint8 on the CPU: random ones of uniforms (B, 5), or evaluation views.

        Those of the last `expect` with equal arguments are taken, and waited for if need be. Another reading in between leaves them.
        """
        self._begin_after_fork()
        with self._lock:
            expected = self._expected
            if expected is not None and expected.key == _key(numbers, uniforms, pinned):
                self._expected = None
            else:
                expected = None
        return (expected or self._start(numbers, uniforms, pinned)).wait()

    def expect(self, numbers: Sequence[int], uniforms: np.ndarray | None, *, pinned: bool = False) -> None:
        """Begin to decode what will be read next; what was expected before and not read is dropped."""
        self._begin_after_fork()
        with self._lock:
            before, self._expected = self._expected, None
        if before is not None:
            before.cancel()
        started = self._start(numbers, uniforms, pinned)
        with self._lock:
            self._expected = started

    def close(self) -> None:
        """End the threads, and drop what is expected."""
        self._begin_after_fork()
        with self._lock:
            pool, self._pool, self._expected = self._pool, None, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin_after_fork(self) -> None:
        if self._process != os.getpid():  # threads are not forked
            self._begin()

    def _start(self, numbers: Sequence[int], uniforms: np.ndarray | None, pinned: bool) -> _Started:
        pixels = torch.empty((len(numbers), 3, self.size, self.size), dtype=torch.uint8, pin_memory=pinned)
        rows = pixels.numpy()
        jobs = []
        for i, number in enumerate(numbers):
            kept = self._kept.get(number) if uniforms is None else None
            if kept is not None:
                rows[i] = kept
            else:
                jobs.append(self._submit(rows[i], number, None if uniforms is None else uniforms[i].tolist()))
        return _Started(_key(numbers, uniforms, pinned), pixels, jobs)

    def _submit(self, place: np.ndarray, number: int, uniforms: list[float] | None) -> Future[None]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(num_threads(), thread_name_prefix="images")
            return self._pool.submit(self._decode, place, number, uniforms)

    def _decode(self, place: np.ndarray, number: int, uniforms: list[float] | None) -> None:
        path = self.files.path(number)
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            raise ValueError(f"{error}; {how_to_check(Path(self.files.folder).parent)}") from error
        view = evaluation_view(image, self.size) if uniforms is None else random_view(image, self.size, uniforms)
        np.copyto(place, np.asarray(view).transpose(2, 0, 1))
        if uniforms is None:
            self._keep(number, place)

    def _keep(self, number: int, view: np.ndarray) -> None:
        with self._lock:
            if self.bytes_kept + view.nbytes <= self.cache_bytes:
                self._kept[number] = view.copy()


def _key(numbers: Sequence[int], uniforms: np.ndarray | None, pinned: bool) -> Key:
    return tuple(numbers), None if uniforms is None else uniforms.tobytes(), pinned
