"""The Free Spoken Digit Dataset: 3,000 recordings of the digits 0 to 9 by six speakers at 8 kHz."""

from __future__ import annotations

import re
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscape.data.features import NUM_BANDS, SHIFT_SECONDS, WINDOW_SECONDS, log_mel, with_deltas
from landscape.data.frames import FrameData, MemoryFrames, moments
from landscape.data.vision import data_root

SOURCE = "github.com/Jakobovski/free-spoken-digit-dataset"
FILE_NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")
"""{digit}_{speaker}_{index}.wav"""
NUM_TEST = 5
"""Recordings of a digit by a speaker, index 0 to 4, that are the official test set."""
SAMPLE_RATE = 8000
PARTS = 3
"""States of a digit."""
RECORDINGS = 3000
"""Of the whole data set. Its earlier editions, and a user's choice of speakers, have fewer: the data's name then says how many."""


def fsdd(root: str | Path | None = None) -> tuple[FrameData, FrameData]:
    """Frames of 2,700 training and 300 test recordings, or of those of fewer speakers: 120 features, 30 states, as hybrid acoustic models are trained on.

    The features are 40 log-mel energies of 8 kHz speech, their deltas and double deltas (`landscape.data.features`), normalised by mean and
    deviation over the training frames of all speakers. The states are those of a flat start: a digit's model has three states in a row, and
    each recording's T frames are split among them evenly, state 3 * digit + floor(3 t / T) of frame t; no alignment is learnt. The split is
    the official one, by the index in a file's name, in which all speakers are in both parts. Examples are in the order of digit, speaker,
    index and time.

    Args:
        root: a folder that holds fsdd/recordings/{digit}_{speaker}_{index}.wav, from github.com/Jakobovski/free-spoken-digit-dataset; by
            default LANDSCAPE_DATA_ROOT.

    Raises:
        ValueError: for missing recordings, or such as are not what the data set holds.
    """
    folder = data_root(root) / "fsdd" / "recordings"
    files = _files(folder)
    train = [(path, digit) for path, digit, index in files if index >= NUM_TEST]
    test = [(path, digit) for path, digit, index in files if index < NUM_TEST]
    read = [_read(part) for part in (train, test)]
    over_training = moments(read[0][0].frames)
    whole = (
        "Free Spoken Digit Dataset"
        if len(files) == RECORDINGS
        else f"{len(files):,} of the {RECORDINGS:,} recordings of the Free Spoken Digit Dataset"
    )
    made = [
        FrameData(source, ends, over_training.mean, over_training.std, f"{whole}, {name}")
        for (source, ends), name in zip(read, ("train", "test"), strict=True)
    ]
    return made[0], made[1]


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """Recordings as (path, digit, index), in the order of digit, speaker and index."""
    paths = list(folder.glob("*.wav"))
    if not paths:
        raise ValueError(f"{folder} holds no recordings (*.wav); get the folder recordings/ from {SOURCE}")
    found = []
    for path in paths:
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path}: not named as {{digit}}_{{speaker}}_{{index}}.wav; is it of {SOURCE}?")
        found.append((int(match[1]), match[2], int(match[3]), path))
    _check_complete(folder, {(digit, speaker, index) for digit, speaker, index, _ in found})
    return [(path, digit, index) for digit, _, index, path in sorted(found)]


def _check_complete(folder: Path, found: set[tuple[int, str, int]]) -> None:
    """Raise unless each speaker spoke each digit equally often, at least once for each part, from index 0 on."""
    last = max(NUM_TEST, *(index for *_, index in found))
    speakers = sorted({speaker for _, speaker, _ in found})
    names = [f"{digit}_{speaker}_{index}.wav" for digit in range(10) for speaker in speakers for index in range(last + 1)
             if (digit, speaker, index) not in found]  # fmt: skip
    if names:
        raise ValueError(
            f"{folder}: {len(names):,} of {10 * len(speakers) * (last + 1):,} recordings are missing, 0 to {last} of each digit by "
            f"{', '.join(speakers)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}; get all from {SOURCE}"
        )


def _read(files: Sequence[tuple[Path, int]]) -> tuple[MemoryFrames, Tensor]:
    """Frames with their states, and where recordings end."""
    features, states = [], []
    for path, digit in files:
        frames = with_deltas(log_mel(read_recording(path), SAMPLE_RATE, NUM_BANDS))
        features.append(frames)
        states.append(PARTS * digit + torch.arange(len(frames)) * PARTS // len(frames))
    ends = torch.tensor([len(s) for s in states]).cumsum(0)
    return MemoryFrames(torch.cat(features), torch.cat(states)), ends


def read_recording(path: Path) -> Float[Tensor, " samples"]:
    """Samples in [-1, 1), float32, of a wav file of 8 kHz, 16 bits and one channel, long enough for a frame of each of three states."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width, count = file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()  # fmt: skip
            data = file.readframes(count)
    except (wave.Error, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error or 'it ends early'}); get it anew from {SOURCE}") from error
    if (rate, channels, width) != (SAMPLE_RATE, 1, 2):
        raise ValueError(f"{path}: {rate} Hz, {channels} channel(s) of {8 * width} bits; needed are {SAMPLE_RATE} Hz, 1 channel, 16 bits")  # fmt: skip
    if len(data) != 2 * count:
        raise ValueError(f"{path} is truncated: {len(data) // 2} of {count} samples; get it anew from {SOURCE}")
    shortest = round((WINDOW_SECONDS + (PARTS - 1) * SHIFT_SECONDS) * SAMPLE_RATE)
    if count < shortest:
        raise ValueError(f"{path}: {count} samples; at least {shortest} are needed for {PARTS} frames")
    return torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768)
