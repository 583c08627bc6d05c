"""Frames of speech, each with the state of a hidden Markov model, taken a window at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from landscape.data.dataset import Examples, fingerprint_of

WINDOW = 21
"""Frames of an example, as the paper's acoustic models are unrolled over."""
CHUNK = 1 << 16
"""Frames at once, where all are passed over."""


@runtime_checkable
class Frames(Protocol):
    """Where frames lie: in memory, or in files (`landscape.data.shards`)."""

    @property
    def device(self) -> torch.device:
        """Where gathered frames are."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of frames, and of features of each."""

    def gather(self, rows: Tensor) -> Tensor:
        """A copy of the frames (R, F) at rows (R,), in their own type."""

    def gather_states(self, rows: Tensor) -> Tensor:
        """Their states (R,), int64."""

    def to(self, device: torch.device | str) -> Frames:
        """On another device."""

    def fingerprint(self) -> str:
        """See `Examples`."""


@dataclass(frozen=True, eq=False)
class MemoryFrames:
    """Frames that lie in memory.

    Attributes:
        frames: (N, F), floating-point.
        states: (N,), integers.
    """

    frames: Tensor
    states: Tensor

    @property
    def device(self) -> torch.device:
        """See `Frames`."""
        return self.frames.device

    @property
    def shape(self) -> tuple[int, int]:
        """See `Frames`."""
        return self.frames.shape[0], self.frames.shape[1]

    def gather(self, rows: Tensor) -> Tensor:
        """See `Frames`."""
        return self.frames.index_select(0, rows)

    def gather_states(self, rows: Tensor) -> Tensor:
        """See `Frames`."""
        return self.states.index_select(0, rows).to(torch.int64)

    def to(self, device: torch.device | str) -> MemoryFrames:
        """See `Frames`."""
        return MemoryFrames(self.frames.to(device), self.states.to(device))

    def fingerprint(self) -> str:
        """A short hash of the contents."""
        return fingerprint_of(self.frames, self.states)


@dataclass(frozen=True, eq=False)
class FrameData(Examples):
    """Utterances, cut into windows of consecutive frames: inputs (..., window, F), targets (..., window).

    The windows of an utterance follow each other without overlap, ceil(T / window) of them; but the last one is shifted back to end at the
    last frame, and an utterance shorter than a window is filled up with its last frame and state. So every frame is in an example, some in
    two: of an utterance of T frames, ceil(T / window) * window - T are counted again. No target is ignored: all examples weigh alike, and a
    minibatch's mean loss is an unbiased estimate of the mean over all windows (theory.md sec. 1), which one over windows with different
    numbers of targets is not.

    Attributes:
        source: the frames of all utterances, one after another.
        ends: (U,) int64, where each utterance ends: the number of frames in it and before it.
        mean: (F,) float64, subtracted from the features.
        std: (F,) float64, that they are divided by then.
        name: what it is, for messages and provenance.
        window: frames of an example.
        dtype: floating-point type of the inputs.
    """

    source: Frames
    ends: Tensor
    mean: Tensor
    std: Tensor
    name: str = "speech"
    window: int = WINDOW
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        count, size = self.source.shape
        if self.window < 1:
            raise ValueError(f"{self.name}: a window must have at least 1 frame, not {self.window}")
        if len(self.ends) == 0:
            raise ValueError(f"{self.name}: no utterance")
        if int(self.ends[-1]) != count or int(self.ends.diff(prepend=self.ends.new_zeros(1)).min()) < 1:
            raise ValueError(f"{self.name}: {len(self.ends)} utterances, each of a frame or more, do not make {count} frames by their ends")  # fmt: skip
        if tuple(self.mean.shape) != (size,) or tuple(self.std.shape) != (size,):
            raise ValueError(f"{self.name}: {size} features, but a mean of {tuple(self.mean.shape)} and a deviation of {tuple(self.std.shape)}")  # fmt: skip

    @property
    def device(self) -> torch.device:
        """See `Examples`."""
        return self.source.device

    @property
    def num_frames(self) -> int:
        """Frames of all utterances, each once."""
        return self.source.shape[0]

    @cached_property
    def _window_ends(self) -> Tensor:
        """(U,), the number of windows of each utterance and of those before it."""
        lengths = self.ends.diff(prepend=self.ends.new_zeros(1))
        return ((lengths + self.window - 1) // self.window).cumsum(0)

    @cached_property
    def _count(self) -> int:
        return int(self._window_ends[-1])

    def __len__(self) -> int:
        return self._count

    def utterances_at(self, indices: Tensor) -> Tensor:
        """The number of the utterance that each example is of."""
        return torch.searchsorted(self._window_ends, indices.to(self.ends.device), right=True)

    def rows_at(self, indices: Int[Tensor, " B"]) -> Int[Tensor, "B window"]:
        """Numbers of the frames in some examples."""
        indices = indices.to(self.ends.device)
        utterances = self.utterances_at(indices)
        before = (utterances - 1).clamp(min=0)
        first = utterances == 0
        begin, end = self.ends[before].masked_fill(first, 0), self.ends[utterances]
        number = indices - self._window_ends[before].masked_fill(first, 0)
        start = torch.minimum(begin + self.window * number, (end - self.window).maximum(begin))
        frames = start[:, None] + torch.arange(self.window, device=start.device)
        return frames.minimum(end[:, None] - 1)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`."""
        rows = self.rows_at(indices.flatten()).flatten()
        exact = torch.promote_types(self.dtype, torch.float32)
        inputs = self.source.gather(rows).to(exact)
        inputs = inputs.sub_(self.mean.to(exact)).div_(self.std.to(exact)).to(self.dtype)
        shape = (*indices.shape, self.window)
        return inputs.unflatten(0, shape), self.source.gather_states(rows).unflatten(0, shape)

    def targets_at(self, indices: Tensor) -> Tensor:
        """See `Examples`."""
        rows = self.rows_at(indices.flatten()).flatten()
        return self.source.gather_states(rows).unflatten(0, (*indices.shape, self.window))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FrameData:
        """See `Examples`."""
        return replace(
            self, source=self.source.to(device), ends=self.ends.to(device), mean=self.mean.to(device), std=self.std.to(device),
            dtype=dtype or self.dtype,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """A short hash of the frames as they are stored, their normalisation and windows."""
        return fingerprint_of(self.source.fingerprint().encode(), self.ends, self.mean, self.std, f"{self.window}".encode())  # fmt: skip


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and deviations of features over some frames.

    Attributes:
        count: number of frames.
        mean: (F,) float64.
        squares: (F,) float64, the sum of the squared differences from the mean.
    """

    count: int
    mean: Float[Tensor, " F"]
    squares: Float[Tensor, " F"]

    @property
    def std(self) -> Float[Tensor, " F"]:
        """The deviation, (squares / count)^(1/2); 1 of a feature that is constant (within 1e-6 of its size), which is 0 then."""
        std = (self.squares / self.count).sqrt()
        return torch.where(std > 1e-6 * self.mean.abs(), std, 1.0)


def moments(frames: Float[Tensor, "N F"]) -> Moments:
    """Of frames in memory, in float64.

    >>> found = moments(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
    >>> found.mean.tolist(), found.std.tolist()
    ([2.0, 7.0], [1.0, 1.0])
    """
    parts = []
    for part in frames.split(CHUNK):
        exact = part.to(torch.float64)
        mean = exact.mean(0)
        parts.append(Moments(len(part), mean, (exact - mean).square().sum(0)))
    return pooled(parts)


def pooled(parts: Sequence[Moments]) -> Moments:
    """Moments of all frames from those of parts of them (Chan, Golub & LeVeque, Updating formulae, 1979)."""
    count = sum(p.count for p in parts)
    mean = torch.stack([p.count / count * p.mean for p in parts]).sum(0)
    squares = torch.stack([p.squares + p.count * (p.mean - mean).square() for p in parts]).sum(0)
    return Moments(count, mean, squares)
