from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from landscape.data.features import (
    ENERGY_FLOOR,
    LOWEST_HZ,
    deltas,
    log_mel,
    mel,
    mel_filters,
    power_spectra,
    with_deltas,
)

RATE, WINDOW, SHIFT, FFT = 8000, 200, 80, 256


def peaks(rate: int = RATE, bands: int = 40) -> np.ndarray:
    """Centres of the bands in Hz, by the inverse of the mel formula."""
    points = np.linspace(mel(LOWEST_HZ), mel(rate / 2), bands + 2)[1:-1]
    return 700 * (10 ** (points / 2595) - 1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_pure_tone_peaks_in_the_band_around_it() -> None:
    centres = peaks()
    time = torch.arange(1600, dtype=torch.float64) / RATE
    for band in range(4, 40):  # below, bands are narrower than the Fourier transform's resolution
        energies = log_mel(0.5 * torch.sin(2 * math.pi * centres[band] * time), RATE)
        assert set(energies.argmax(1).tolist()) == {band}, band
        far = [b for b in range(40) if abs(b - band) > 8]
        assert float((energies[:, band, None] - energies[:, far]).min()) > math.log(1e3)


@pytest.mark.parametrize(("fft", "rate", "bands"), [(256, 8000, 40), (512, 16000, 40), (1024, 16000, 80)])
def test_the_filters_are_triangles_in_mel_that_sum_to_one_between_their_peaks(fft: int, rate: int, bands: int) -> None:
    filters = mel_filters(fft, rate, bands).double()
    hertz = np.arange(fft // 2 + 1) * rate / fft
    edges = np.linspace(mel(20.0), mel(rate / 2), bands + 2)
    at = np.array([mel(f) for f in hertz])
    expected = np.stack([np.interp(at, edges[i : i + 3], [0, 1, 0]) for i in range(bands)], axis=1)
    torch.testing.assert_close(filters, torch.from_numpy(expected), atol=1e-6, rtol=0)
    inside = (at >= edges[1]) & (at <= edges[-2])
    torch.testing.assert_close(filters.sum(1)[inside], torch.ones(int(inside.sum()), dtype=torch.float64), atol=1e-6, rtol=0)  # fmt: skip
    assert float(filters[0].sum()) == 0  # below 20 Hz
    assert bool((filters.sum(0) > 0).all())


def test_more_bands_than_frequencies_are_refused() -> None:
    with pytest.raises(
        ValueError, match="200 mel bands are too many for a Fourier transform of 256 samples at 8000 Hz"
    ):
        mel_filters(256, 8000, 200)


@pytest.mark.parametrize("rate", [8000, 11025, 16000])
def test_the_power_spectrum_holds_the_windowed_energy(rate: int) -> None:
    signal = noise(2000)
    window, shift = round(0.025 * rate), round(0.01 * rate)
    power = power_spectra(signal, rate)
    fft = 2 * (power.shape[1] - 1)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(window, dtype=torch.float64) / window)
    pieces = signal.unfold(0, window, shift) * hann
    assert len(power) == len(pieces) == 1 + (2000 - window) // shift
    both_sides = power.sum(1) + power[:, 1:-1].sum(1)
    torch.testing.assert_close(both_sides / fft, pieces.square().sum(1))  # Parseval
    spectrum = np.abs(np.fft.rfft(pieces.numpy(), fft)) ** 2
    torch.testing.assert_close(power, torch.from_numpy(spectrum))


def test_white_noise_fills_the_bands_by_their_widths() -> None:
    power = power_spectra(noise(400_000), RATE)
    hann_square = 3 / 8 * WINDOW
    energies = (power @ mel_filters(FFT, RATE).double()).mean(0)
    expected = 0.01 * hann_square * mel_filters(FFT, RATE).double().sum(0)
    # frames 80 samples apart overlap: at least a third of them are independent; a band holds a bin or more of exponential energy
    standard_error = (expected / math.sqrt(len(power) / 3)).max() / expected.min()
    torch.testing.assert_close(energies / expected, torch.ones(40).double(), rtol=0, atol=4 * float(standard_error))


def test_loudness_is_a_sum_and_silence_is_at_the_floor() -> None:
    signal = noise(2000)
    torch.testing.assert_close(log_mel(2 * signal, RATE), log_mel(signal, RATE) + math.log(4))
    torch.testing.assert_close(log_mel(torch.zeros(200), RATE), torch.full((1, 40), math.log(ENERGY_FLOOR)))
    rounded = (32768 * 0.3 * noise(40_000)).round() / 32768 - 0.3 * noise(40_000)  # the error of 16 bits alone
    energies = power_spectra(rounded, RATE).mean(0) @ mel_filters(FFT, RATE).double()
    assert 0.1 * ENERGY_FLOOR < float(energies.min()) < float(energies.max()) < 10 * ENERGY_FLOOR


def test_frames_lie_within_the_signal_whatever_the_batch() -> None:
    signal = noise(2, 3, 1000).float()
    found = log_mel(signal, RATE)
    assert (found.shape, found.dtype) == ((2, 3, 11, 40), torch.float32)
    torch.testing.assert_close(found[1, 2], log_mel(signal[1, 2], RATE))
    torch.testing.assert_close(found[0, 1, 4:5], log_mel(signal[0, 1, 4 * SHIFT : 4 * SHIFT + WINDOW], RATE), atol=1e-4, rtol=1e-4)  # fmt: skip
    assert len(log_mel(signal[0, 0, :279], RATE)) == 1
    with pytest.raises(ValueError, match=r"a signal of 199 samples is shorter than a window of 200 \(25 ms\)"):
        log_mel(signal[0, 0, :199], RATE)


def test_deltas_are_slopes() -> None:
    t = torch.arange(9, dtype=torch.float64)
    ramp = torch.stack([3 * t - 5, torch.full_like(t, 7), -0.25 * t, t.square()], dim=1)
    first = deltas(ramp)
    assert torch.equal(first[2:-2, :3], torch.tensor([3, 0, -0.25]).double().expand(5, 3))
    assert torch.equal(first[:, 1], torch.zeros(9).double())
    torch.testing.assert_close(first[2:-2, 3], 2 * t[2:-2])
    torch.testing.assert_close(deltas(first)[4:-4, 3], torch.full((1,), 2.0, dtype=torch.float64))
    edge = (1 * (ramp[1] - ramp[0]) + 2 * (ramp[2] - ramp[0])) / 10
    torch.testing.assert_close(first[0], edge)


def test_deltas_of_less_frames_than_they_reach_and_of_batches() -> None:
    assert torch.equal(deltas(torch.ones(1, 4)), torch.zeros(1, 4))
    torch.testing.assert_close(deltas(torch.tensor([[0.0], [1.0]])), torch.tensor([[0.3], [0.3]]))
    batch = noise(2, 3, 7, 5)
    found = with_deltas(batch)
    assert found.shape == (2, 3, 7, 15)
    torch.testing.assert_close(found[1, 2], torch.cat([batch[1, 2], deltas(batch[1, 2]), deltas(deltas(batch[1, 2]))], 1))  # fmt: skip
