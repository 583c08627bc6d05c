"""Random streams that are pure functions of what they are for.

Every draw of a run is addressed by (purpose, seed, who, when) instead of by the history of a generator. A resumed run,
another rank count and another backend therefore draw the same numbers, and there is no generator state to checkpoint.
Only Philox's raw 64-bit stream is used, which numpy keeps stable across versions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def philox(purpose: str, *identity: int, counter: int = 0) -> np.random.Philox:
    """The bit generator for `purpose` and an identity such as (seed, learner), started at `counter`."""
    entropy = [zlib.crc32(purpose.encode()), *(int(i) for i in identity)]
    key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    return np.random.Philox(key=key, counter=[0, counter, 0, 0])


def at_step(seed: int, step: int) -> int:
    """A seed for what is drawn at a step, so that errors at different checkpoints are independent.

    >>> at_step(0, 20), at_step(1, 20)
    (20, 4294967316)
    """
    return (seed << 32) + step


def uniform(bits: np.random.Philox, *shape: int) -> np.ndarray:
    """Uniform float64 in [0, 1) of `shape`, 53 random bits each."""
    raw = bits.random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def permutation(bits: np.random.Philox, count: int) -> np.ndarray:
    """A uniformly random permutation of range(count)."""
    return np.argsort(bits.random_raw(count), kind="stable")


def torch_generator(purpose: str, *identity: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator on `device`, seeded from `purpose` and identity; the same device gives the same draws."""
    entropy = [zlib.crc32(purpose.encode()), *(int(i) for i in identity)]
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device=device).manual_seed(seed)


@contextmanager
def seeded(purpose: str, *identity: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within, what draws from torch's global state (dropout) draws from purpose and identity; then the state is put back."""
    device = torch.device(device)
    seed = torch_generator(purpose, *identity).initial_seed()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
