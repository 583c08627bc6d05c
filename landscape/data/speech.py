"""Corpora of speech for hybrid acoustic models, which tell the state of a hidden Markov model from the frames around."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape.data.frames import FrameData, Frames, MemoryFrames, Moments, moments, pooled
from landscape.data.kaldi import RECIPE, Corpus
from landscape.data.shards import ShardFrames, open_shards

LARGEST_IN_MEMORY = 8 << 30
"""Bytes of features that Kaldi's tables are read for; larger ones are converted to shards."""
PARTS = {"train": "training", "heldout": "held-out"}
"""Folders of a corpus, and what is in them."""


def speech(root: str | Path, *, features: int = 260, states: int = 32_000) -> tuple[FrameData, FrameData]:
    """The training and the held-out frames of a corpus, such as Switchboard's 300 hours.

        ROOT/train/      features-00000-of-0000N.safetensors ...   (see `landscape.data.shards`), for any size;
        ROOT/heldout/    or Kaldi's feats*.scp and ali.scp         (see `landscape.data.kaldi`), for what fits in memory

    Both are normalised by mean and deviation of each feature over the training frames. (Normalisation by speaker, such as fMLLR features have,
    is Kaldi's: apply-cmvn.) The data are the Linguistic Data Consortium's and come with no program: Switchboard-1 is LDC97S62, Fisher, for
    2,000 hours, LDC2004S13 and LDC2005S13; Kaldi's recipe egs/swbd/s5c makes features and alignments of them.

    Args:
        root: the corpus' folder.
        features: of a frame; 40 fMLLR, 100 i-vector and 120 log-mel with deltas are 260.
        states: number of states of the alignment (Kaldi's pdf ids).

    Returns:
        training and held-out data. States without a training example are told by a warning, since most subsets lack some.

    Raises:
        ValueError: for files that are missing, incomplete or damaged, another number of features, states out of range, and nan or infinity; in
            shards, such frames are found when they are read (`landscape.data.shards.check_shards` reads all).
    """
    folder = Path(root).expanduser()
    parts = [_read(folder / name, features, states) for name in PARTS]
    train = parts[0]
    empty = int((train.counts == 0).sum())
    if empty:
        warnings.warn(f"{folder / 'train'}: {empty} of {states} states have no frame", stacklevel=2)
    made = [
        FrameData(p.source, p.ends, train.moments.mean, train.moments.std, f"{folder.name}, {name}")
        for p, name in zip(parts, PARTS.values(), strict=True)
    ]
    return made[0], made[1]


@dataclass(frozen=True, eq=False)
class _Part:
    """Frames, where utterances end, moments of the features, and how often each state occurs."""

    source: Frames
    ends: Tensor
    moments: Moments
    counts: Tensor


def _read(folder: Path, features: int, states: int) -> _Part:
    shards, tables = list(folder.glob("features-*.safetensors")), list(folder.glob("*.scp"))
    if shards and tables:
        raise ValueError(f"{folder} holds both shards ({shards[0].name}) and Kaldi's tables ({tables[0].name}); which of them? Move one away")  # fmt: skip
    if not shards and not tables:
        there = "is empty of them" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {there}: put features-*.safetensors there, which landscape.data.shards.convert makes of Kaldi's tables, or feats.scp and ali.scp themselves. {RECIPE}")  # fmt: skip
    return _of_shards(folder, features, states) if shards else _of_tables(folder, features, states)


def _of_shards(folder: Path, features: int, states: int) -> _Part:
    source = ShardFrames(open_shards(folder))
    if source.shape[1] != features:
        raise ValueError(f"{source.shards[0].path}: {source.shape[1]} features instead of {features}")
    counts = torch.zeros(states, dtype=torch.int64)
    for shard in source.shards:
        found = shard.tensors["counts"]
        if found[states:].any():
            number = int((shard.tensors["states"] >= states).nonzero()[0])
            raise ValueError(f"{shard.path}, utterance {shard.utterance_of(number)}: state {int(shard.tensors['states'][number])}, but there are {states} (0 to {states - 1})")  # fmt: skip
        counts[: len(found)] += found[:states]
    return _Part(source, source.ends, pooled([s.moments for s in source.shards]), counts)


def _of_tables(folder: Path, features: int, states: int) -> _Part:
    corpus = Corpus(folder, features=features, states=states)
    needed = 4 * features * sum(corpus.count(name) for name in corpus.names)
    if needed > LARGEST_IN_MEMORY:
        raise ValueError(f"{folder}: {needed / 2**30:.0f} GiB of features do not go into memory; make shards of them, with landscape.data.shards.convert(SOURCE, OUT)")  # fmt: skip
    read = [corpus.read(name) for name in corpus.names]
    frames = torch.from_numpy(np.concatenate([x for x, _ in read]))
    labels = torch.from_numpy(np.concatenate([y for _, y in read]))
    ends = torch.tensor([len(y) for _, y in read]).cumsum(0)
    return _Part(MemoryFrames(frames, labels), ends, moments(frames), torch.bincount(labels, minlength=states))
