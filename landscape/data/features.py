"""Log-mel filterbank features of speech, with deltas."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

WINDOW_SECONDS, SHIFT_SECONDS = 0.025, 0.010
NUM_BANDS = 40
LOWEST_HZ = 20.0
ENERGY_FLOOR = 1e-8
"""Of a band, for samples in [-1, 1): about the energy that rounding to 16 bits adds, so that digital silence is no outlier."""
REACH = 2
"""Frames on either side that a delta is a regression over."""


def mel(hertz: float | int) -> float:
    """HTK's mel scale, 2595 log10(1 + f / 700).

    >>> round(mel(1000.0), 2)
    999.99
    """
    return 2595 * math.log10(1 + hertz / 700)


def mel_filters(fft_size: int, sample_rate: int, num_bands: int = NUM_BANDS) -> Float[Tensor, "bins bands"]:
    """Triangular filters that are linear in mel, as HTK and Kaldi have them.

    The edges are num_bands + 2 points at equal distances in mel from 20 Hz to half the sample rate. Filter i rises from 0 at point i to 1 at
    point i + 1 and falls to 0 at point i + 2, so that the filters sum to 1 between the first and the last peak. They are not normalised by
    their widths.

    Args:
        fft_size: of the Fourier transform, whose fft_size // 2 + 1 bins the filters weigh.
        sample_rate: of the signal, in Hz.
        num_bands: number of filters.

    Raises:
        ValueError: if there is a filter without a bin, because the bands are too many for the Fourier transform's resolution.
    """
    low, high = mel(LOWEST_HZ), mel(sample_rate / 2)
    step = (high - low) / (num_bands + 1)
    bins = 2595 * torch.log10(1 + torch.arange(fft_size // 2 + 1, dtype=torch.float64) * sample_rate / fft_size / 700)
    peaks = low + step * torch.arange(1, num_bands + 1, dtype=torch.float64)
    filters = (1 - (bins[:, None] - peaks).abs() / step).clamp(min=0)
    if not bool((filters > 0).any(0).all()):
        raise ValueError(
            f"{num_bands} mel bands are too many for a Fourier transform of {fft_size} samples at {sample_rate} Hz: some hold no frequency"
        )
    return filters.to(torch.float32)


def power_spectra(signal: Float[Tensor, "*batch samples"], sample_rate: int) -> Float[Tensor, "*batch frames bins"]:
    """|Fourier transform|^2 of windows of 25 ms every 10 ms, weighted by Hann's (periodic) window.

    Frame t starts at sample t * shift and lies within the signal: T = 1 + (samples - window) // shift frames, as Kaldi's snip-edges. The
    Fourier transform is not normalised; its size is the power of two that holds a window, filled up with zeros.

    Raises:
        ValueError: for a signal shorter than a window.
    """
    window, shift = round(WINDOW_SECONDS * sample_rate), round(SHIFT_SECONDS * sample_rate)
    if signal.shape[-1] < window:
        raise ValueError(f"a signal of {signal.shape[-1]} samples is shorter than a window of {window} ({WINDOW_SECONDS * 1000:g} ms)")  # fmt: skip
    fft_size = 1 << (window - 1).bit_length()
    before = (fft_size - window) // 2  # torch centres the window in what it transforms
    spectra = torch.stft(
        pad(signal.reshape(-1, signal.shape[-1]), (before, fft_size - window - before)), fft_size, shift, window,
        torch.hann_window(window, dtype=signal.dtype, device=signal.device), center=False, return_complex=True,
    )  # fmt: skip
    power = torch.view_as_real(spectra).square().sum(-1).mT
    return power.reshape(*signal.shape[:-1], *power.shape[1:])


def log_mel(signal: Float[Tensor, "*batch samples"], sample_rate: int, num_bands: int = NUM_BANDS) -> Float[Tensor, "*batch frames bands"]:  # fmt: skip
    """Natural logarithm of the energies in mel bands, floored at 1e-8.

    Args:
        signal: samples in [-1, 1).
        sample_rate: in Hz.
        num_bands: mel bands.

    Raises:
        ValueError: for a signal shorter than 25 ms.
    """
    power = power_spectra(signal, sample_rate)
    filters = mel_filters(2 * (power.shape[-1] - 1), sample_rate, num_bands)
    return (power @ filters.to(power)).clamp(min=ENERGY_FLOOR).log()


def deltas(features: Float[Tensor, "*batch frames size"]) -> Float[Tensor, "*batch frames size"]:
    """The slope in time, by a regression over two frames on either side; the first and the last frame are repeated beyond the ends.

    d_t = sum_{n=1}^{2} n (c_{t+n} - c_{t-n}) / (2 sum_{n=1}^{2} n^2)

    >>> deltas(3 * torch.arange(6.0)[:, None]).flatten().tolist()
    [1.5, 2.4000000953674316, 3.0, 3.0, 2.4000000953674316, 1.5]
    """
    count = features.shape[-2]
    times = torch.arange(count, device=features.device)
    total = torch.zeros_like(features)
    for n in range(1, REACH + 1):
        later, earlier = (times + n).clamp(max=count - 1), (times - n).clamp(min=0)
        total += n * (features.index_select(-2, later) - features.index_select(-2, earlier))
    return total / (2 * sum(n * n for n in range(1, REACH + 1)))


def with_deltas(features: Float[Tensor, "*batch frames size"]) -> Float[Tensor, "*batch frames 3*size"]:
    """Features, their deltas, and the deltas of these, side by side."""
    first = deltas(features)
    return torch.cat([features, first, deltas(first)], dim=-1)
