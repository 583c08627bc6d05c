from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from landscape.data.features import log_mel, with_deltas
from landscape.data.fsdd import fsdd, read_recording

LENGTHS = (360, 1239, 1799, 1800, 5000, 2600)
"""Samples of recordings 0 to 5: 3, 13, 20, 21, 61 and 31 frames."""


def write_recording(path: Path, samples: int, *, rate: int = 8000, channels: int = 1, width: int = 2) -> None:
    values = np.random.default_rng(samples).integers(-3000, 3000, samples * channels).astype(f"<i{width}")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six recordings of each digit by one speaker: five of the test set and one to train on."""
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for digit in range(10):
        for index, samples in enumerate(LENGTHS):
            write_recording(folder / f"{digit}_ada_{index}.wav", samples + 80 * digit)
    return tmp_path


def test_recordings_become_windows_with_flat_start_states(root: Path) -> None:
    train, test = fsdd(root)
    assert (len(train.ends), len(test.ends)) == (10, 50)
    assert train.name == "60 of the 3,000 recordings of the Free Spoken Digit Dataset, train"
    lengths = [1 + (LENGTHS[5] + 80 * digit - 200) // 80 for digit in range(10)]
    assert train.ends.tolist() == np.cumsum(lengths).tolist()
    assert len(train) == sum(-(-t // 21) for t in lengths)
    inputs, targets = train.rows(slice(0, len(train)))
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((len(train), 21, 120), torch.float32, torch.int64)
    t = np.arange(31)  # the zero's 31 frames: 11 of the first state, 10 of the others
    assert targets[0].tolist() == (3 * t // 31)[:21].tolist()
    assert targets[1].tolist() == (3 * t // 31)[10:].tolist()
    assert np.bincount(3 * t // 31).tolist() == [11, 10, 10]
    for data in (train, test):
        assert set(data.source.gather_states(torch.arange(data.num_frames)).tolist()) == set(range(30))


def test_the_training_frames_have_mean_zero_and_variance_one_and_the_test_frames_are_as_far(root: Path) -> None:
    train, test = fsdd(root)
    raw = train.source.gather(torch.arange(train.num_frames)).double()
    torch.testing.assert_close((raw - train.mean).mean(0) / train.std, torch.zeros(120).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(raw.std(0, correction=0), train.std)
    assert torch.equal(test.mean, train.mean)
    expected = with_deltas(log_mel(read_recording(root / "fsdd/recordings/3_ada_4.wav"), 8000))
    number = 3 * 5 + 4
    first = int(test.ends[number - 1])
    assert torch.equal(test.source.gather(torch.arange(first, int(test.ends[number]))), expected)


def test_short_recordings_are_filled_up_with_their_last_frame(root: Path) -> None:
    _, test = fsdd(root)
    inputs, targets = test.batch(torch.tensor([0]))  # the zero's recording 0, 3 frames
    assert targets[0].tolist() == [0, 1] + [2] * 19
    assert torch.equal(inputs[0, 2:], inputs[0, 2:3].expand(19, 120))


def test_the_same_files_have_the_same_fingerprint(root: Path) -> None:
    prints = {part.fingerprint() for _ in range(2) for part in fsdd(root)}
    assert len(prints) == 2
    write_recording(root / "fsdd/recordings/0_ada_5.wav", 2601)
    assert fsdd(root)[0].fingerprint() not in prints


def test_missing_recordings_are_named_with_their_source(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/fsdd/recordings holds no recordings .* github.com/Jakobovski/free-spoken-digit-dataset"):  # fmt: skip
        fsdd(tmp_path / "nowhere")
    for index in range(5):
        (root / f"fsdd/recordings/7_ada_{index}.wav").unlink()
    (root / "fsdd/recordings/4_ada_5.wav").unlink()
    said = r"6 of 60 recordings are missing, 0 to 5 of each digit by ada: 4_ada_5.wav, 7_ada_0.wav, .*7_ada_3.wav, ...; get all from github.com"
    with pytest.raises(ValueError, match=said):
        fsdd(root)


def test_a_part_of_the_data_set_is_not_taken_for_the_whole(root: Path) -> None:
    write_recording(root / "fsdd/recordings/3_bob_6.wav", 3000)
    with pytest.raises(ValueError, match=r"79 of 140 recordings are missing, 0 to 6 of each digit by ada, bob: 0_ada_6.wav, 0_bob_0.wav"):  # fmt: skip
        fsdd(root)


def test_recordings_of_the_test_set_alone_are_not_enough(root: Path) -> None:
    for path in (root / "fsdd/recordings").glob("*_5.wav"):
        path.unlink()
    with pytest.raises(ValueError, match="10 of 60 recordings are missing"):
        fsdd(root)


@pytest.mark.parametrize("name", ["seven_ada_1.wav", "10_ada_1.wav", "7_ada.wav", "7_ada_x.wav", "copy of 7_ada_1.wav"])
def test_a_file_of_another_name_is_refused(root: Path, name: str) -> None:
    write_recording(root / "fsdd/recordings" / name, 3000)
    with pytest.raises(ValueError, match=r"not named as {digit}_{speaker}_{index}.wav"):
        fsdd(root)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"rate": 16000}, r"16000 Hz, 1 channel\(s\) of 16 bits; needed are 8000 Hz"),
        ({"channels": 2}, r"8000 Hz, 2 channel\(s\) of 16 bits"),
        ({"width": 1}, r"8000 Hz, 1 channel\(s\) of 8 bits"),
    ],
)
def test_another_kind_of_recording_is_refused(root: Path, kind: dict[str, int], said: str) -> None:
    write_recording(root / "fsdd/recordings/7_ada_3.wav", 300 if "width" in kind else 3000, **kind)
    with pytest.raises(ValueError, match=rf"7_ada_3.wav: {said}"):
        fsdd(root)


@pytest.mark.parametrize(
    ("length", "said"),
    [(0, "cannot be read"), (3, "cannot be read"), (30, "cannot be read"), (44, "truncated: 0 of 3000 samples"),
     (4001, "truncated: 1978 of 3000 samples"), (6043, "truncated: 2999 of 3000 samples")],
)  # fmt: skip
def test_a_truncated_recording_is_named(root: Path, length: int, said: str) -> None:
    path = root / "fsdd/recordings/7_ada_3.wav"
    write_recording(path, 3000)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"7_ada_3.wav .*{said}"):
        fsdd(root)


def test_what_is_no_recording_is_named(root: Path) -> None:
    path = root / "fsdd/recordings/7_ada_3.wav"
    path.write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=r"7_ada_3.wav cannot be read .*get it anew"):
        fsdd(root)
    write_recording(path, 359)
    with pytest.raises(ValueError, match=r"7_ada_3.wav: 359 samples; at least 360 are needed for 3 frames"):
        fsdd(root)


@pytest.mark.data
def test_the_whole_data_set_is_read() -> None:
    train, test = fsdd(os.environ["LANDSCAPE_DATA_ROOT"])
    assert (len(train.ends), len(test.ends)) == (2700, 300)
    assert (train.num_frames, test.num_frames) == (112_911, 12_326)
    assert (len(train), len(test)) == (6_650, 731)
    for data in (train, test):
        every = torch.arange(data.num_frames)
        features = (data.source.gather(every).double() - data.mean) / data.std
        assert torch.isfinite(features).all()
        shares = torch.bincount(data.source.gather_states(every), minlength=30) / data.num_frames
        assert 0.02 < float(shares.min()) <= float(shares.max()) < 0.05
        inputs, targets = data.rows(slice(0, len(data)))
        assert torch.isfinite(inputs).all()
        assert torch.equal(targets.unique(), torch.arange(30))
        assert float(features.abs().max()) < 15
        deviation = 1e-9 if data is train else 0.2
        assert float(features.mean(0).abs().max()) < deviation
        assert float((features.square().mean(0) - 1).abs().max()) < 3 * deviation
