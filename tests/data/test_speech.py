from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import landscape.data.speech
from landscape.data.frames import FrameData, MemoryFrames, moments, pooled
from landscape.data.kaldi import Table
from landscape.data.selection import choose
from landscape.data.shards import check_shards, convert, open_shards
from landscape.data.speech import speech
from landscape.losses import as_example_loss
from tests.data.test_kaldi import write_corpus, write_table

LENGTHS = [42, 21, 50, 5, 1, 22, 63]


def make_data(lengths: list[int] = LENGTHS, *, size: int = 3, window: int = 21, dtype: torch.dtype = torch.float32) -> FrameData:  # fmt: skip
    """Frames whose first feature and whose state are their numbers."""
    count = sum(lengths)
    frames = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    frames[:, 0] = torch.arange(count)
    source = MemoryFrames(frames.to(dtype), torch.arange(count, dtype=torch.int32))
    return FrameData(source, torch.tensor(lengths).cumsum(0), torch.zeros(size).double(), torch.ones(size).double(), "made", window)  # fmt: skip


def windows_of(lengths: list[int], window: int) -> list[list[int]]:
    """Numbers of the frames of each window, in words: cut, shift the last one back, fill up the short ones."""
    found, begin = [], 0
    for length in lengths:
        frames = list(range(begin, begin + length))
        for start in range(0, length, window):
            piece = frames[start : start + window]
            if len(piece) < window:
                piece = frames[-window:] if length >= window else piece + [frames[-1]] * (window - length)
            found.append(piece)
        begin += length
    return found


@pytest.mark.parametrize("window", [1, 2, 7, 21, 100])
def test_utterances_are_cut_into_windows(window: int) -> None:
    data = make_data(window=window)
    expected = windows_of(LENGTHS, window)
    assert len(data) == len(expected)
    inputs, targets = data.rows(slice(0, len(data)))
    assert targets.tolist() == expected
    assert torch.equal(inputs[..., 0], targets.float())
    assert set(targets.flatten().tolist()) == set(range(sum(LENGTHS)))  # every frame is in an example
    counted_again = targets.numel() - data.num_frames
    assert counted_again == sum(-(-t // window) * window - t for t in LENGTHS)
    whose = np.repeat(np.arange(len(LENGTHS)), [-(-t // window) for t in LENGTHS])
    assert data.utterances_at(torch.arange(len(data))).tolist() == whose.tolist()


def test_batches_have_the_shape_of_their_indices_and_draw_what_they_are() -> None:
    data = make_data()
    every, states = data.rows(slice(0, len(data)))
    for indices in (torch.tensor([3, 0, 3]), torch.tensor([[5, 1], [1, 9]]), torch.empty(2, 0, dtype=torch.int64)):
        inputs, targets = data.batch(indices)
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert torch.equal(inputs, every[indices])
        assert torch.equal(targets, states[indices])
        assert torch.equal(data.targets_at(indices), targets)
        assert torch.equal(data.draw(indices, torch.empty(*indices.shape, 0, dtype=torch.float64))[0], inputs)
    assert data.num_random == 0
    with pytest.raises(IndexError):
        data.batch(torch.tensor([len(data)]))


def test_all_examples_weigh_alike_in_a_loss() -> None:
    data = make_data()
    loss = as_example_loss(nn.functional.cross_entropy)
    _, targets = data.rows(slice(0, len(data)))
    contributions, weights = loss(torch.zeros(len(data), 21, 300), targets)
    assert weights.tolist() == [21.0] * len(data)
    torch.testing.assert_close(contributions.sum() / weights.sum(), torch.tensor(300.0).log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_features_are_normalised_in_the_type_of_the_computation(dtype: torch.dtype) -> None:
    plain = make_data([30, 40], dtype=torch.float16)
    found = moments(plain.source.gather(torch.arange(70)))
    data = FrameData(plain.source, plain.ends, found.mean, found.std).to("cpu", dtype)
    inputs, _ = data.batch(torch.tensor([0, 2]))
    assert data.dtype == inputs.dtype == dtype
    raw = plain.source.gather(plain.rows_at(torch.tensor([0, 2])).flatten()).double().unflatten(0, (2, 21))
    expected = (raw - found.mean) / found.std
    tolerance = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(inputs.double(), expected, atol=3 * tolerance, rtol=tolerance)
    assert data.to("cpu").dtype == dtype
    assert plain.dtype == torch.float32
    assert data.fingerprint() == FrameData(plain.source, plain.ends, found.mean, found.std, "other").fingerprint()


def test_moments_of_parts_pool_to_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 1e4 + torch.randn(1000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frames[:, 3] = 0.1  # constant: its deviation is set to 1
    whole = moments(frames)
    torch.testing.assert_close(whole.mean, frames.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.std[:3], frames.std(0, correction=0)[:3], rtol=1e-10, atol=0)
    assert float(whole.std[3]) == 1
    monkeypatch.setattr("landscape.data.frames.CHUNK", 7)
    for found in (moments(frames), pooled([moments(p) for p in frames.split([1, 300, 699])])):
        assert found.count == 1000
        torch.testing.assert_close(found.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(found.squares[:3], whole.squares[:3], rtol=1e-10, atol=0)
        assert float(found.std[3]) == 1


def test_the_fingerprint_is_of_frames_states_ends_normalisation_and_window() -> None:
    data = make_data()
    assert isinstance(data.source, MemoryFrames)
    frames, states, (mean, std) = data.source.frames, data.source.states, (data.mean, data.std)
    changed = [
        FrameData(MemoryFrames(frames + 1, states), data.ends, mean, std),
        FrameData(MemoryFrames(frames, states + 1), data.ends, mean, std),
        FrameData(data.source, torch.tensor([41, *data.ends[1:].tolist()]), mean, std),
        FrameData(data.source, data.ends, mean + 1, std),
        FrameData(data.source, data.ends, mean, 2 * std),
        make_data(window=20),
    ]
    assert data.fingerprint() == make_data().fingerprint()
    assert len({data.fingerprint(), *(c.fingerprint() for c in changed)}) == 7


@pytest.mark.parametrize(
    ("ends", "size", "window", "said"),
    [
        ([], 3, 21, "made: no utterance"),
        ([4, 11], 3, 21, "2 utterances, each of a frame or more, do not make 10 frames"),
        ([4, 4, 10], 3, 21, "3 utterances, each of a frame or more"),
        ([0, 10], 3, 21, "2 utterances, each of a frame or more"),
        ([10], 2, 21, r"3 features, but a mean of \(2,\)"),
        ([10], 3, 0, "a window must have at least 1 frame, not 0"),
    ],
)
def test_frames_that_do_not_fit_are_refused(ends: list[int], size: int, window: int, said: str) -> None:
    source = MemoryFrames(torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))
    one = torch.ones(size).double()
    with pytest.raises(ValueError, match=said):
        FrameData(source, torch.tensor(ends, dtype=torch.int64), one, one, "made", window)


def test_some_examples_can_be_chosen() -> None:
    data = make_data()
    few = choose(data, 4)
    assert len(few) == 4
    assert torch.equal(few.batch(torch.arange(4))[1], data.batch(few.numbers)[1])


TRAIN = {"b": 30, "a": 64, "c": 5, "e": 21, "d": 12}
HELDOUT = {"y": 40, "x": 9}
STREAMS = {"feats-1.scp": 4, "feats-2.scp": 2}


@pytest.fixture
def kaldi(tmp_path: Path) -> Path:
    """A corpus of 6 features and 7 states as Kaldi's tables."""
    write_corpus(tmp_path / "swb" / "train", TRAIN, STREAMS, 7)
    write_corpus(tmp_path / "swb" / "heldout", HELDOUT, STREAMS, 7, seed=1)
    return tmp_path / "swb"


def as_shards(kaldi: Path, out: Path, dtype: torch.dtype, frames_per_shard: int = 40) -> Path:
    for part in ("train", "heldout"):
        convert(kaldi / part, out / part, features=6, states=7, dtype=dtype, frames_per_shard=frames_per_shard)
    return out


def everything(data: FrameData) -> tuple[Tensor, Tensor]:
    return data.rows(slice(0, len(data)))


def test_a_corpus_is_read_and_normalised_over_its_training_frames(kaldi: Path) -> None:
    train, heldout = speech(kaldi, features=6, states=7)
    assert (train.num_frames, heldout.num_frames) == (132, 49)
    assert (len(train), len(heldout)) == (2 + 4 + 1 + 1 + 1, 2 + 1)
    assert train.ends.tolist() == np.cumsum(list(TRAIN.values())).tolist()
    raw = train.source.gather(torch.arange(132)).double()
    normalised = (raw - train.mean) / train.std
    torch.testing.assert_close(normalised.mean(0), torch.zeros(6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(normalised.square().mean(0), torch.ones(6).double(), atol=1e-12, rtol=0)
    assert torch.equal(heldout.mean, train.mean)
    a = slice(30, 94)
    np.testing.assert_array_equal(raw[a, :4].float(), Table(kaldi / "train" / "feats-1.scp").read("a"))
    np.testing.assert_array_equal(raw[a, 4:].float(), Table(kaldi / "train" / "feats-2.scp").read("a"))
    found = train.source.gather_states(torch.arange(132)[a])
    np.testing.assert_array_equal(found, Table(kaldi / "train" / "ali.scp").read("a"))


@pytest.mark.parametrize("frames_per_shard", [1, 40, 1000])
def test_shards_hold_what_the_tables_do(kaldi: Path, tmp_path: Path, frames_per_shard: int) -> None:
    folder = as_shards(kaldi, tmp_path / "shards", torch.float32, frames_per_shard)
    assert len(list((folder / "train").iterdir())) == {1: 5, 40: 3, 1000: 1}[frames_per_shard]
    for ours, theirs in zip(speech(folder, features=6, states=7), speech(kaldi, features=6, states=7), strict=True):
        assert len(ours) == len(theirs)
        assert torch.equal(ours.ends, theirs.ends)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-13)
        torch.testing.assert_close(ours.std, theirs.std, rtol=1e-13, atol=0)
        for found, expected in zip(everything(ours), everything(theirs), strict=True):
            torch.testing.assert_close(found, expected)
        indices = torch.tensor([[len(ours) - 1, 0], [1, 1]])
        for found, expected in zip(ours.batch(indices), theirs.batch(indices), strict=True):
            torch.testing.assert_close(found, expected)
        assert torch.equal(ours.targets_at(indices), theirs.targets_at(indices))
        assert ours.batch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 21, 6)


def test_half_precision_takes_half_the_space_and_rounds(kaldi: Path, tmp_path: Path) -> None:
    half, single = (as_shards(kaldi, tmp_path / str(d), d, 1000) for d in (torch.float16, torch.float32))
    sizes = []
    for folder in (half, single):
        with safe_open(folder / "train" / "features-00000-of-00001.safetensors", "pt") as file:
            sizes.append(file.get_tensor("features").nbytes)
    assert sizes[0] * 2 == sizes[1]
    data = speech(half, features=6, states=7)[0]
    inputs, targets = everything(data)
    expected, states = everything(speech(single, features=6, states=7)[0])
    assert inputs.dtype == torch.float32
    assert torch.equal(targets, states)
    assert 0 < float((inputs - expected).abs().max()) < 4 * 2**-11
    raw = data.source.gather(torch.arange(132)).double()
    torch.testing.assert_close(data.mean, raw.mean(0))  # of what is stored
    assert data.to("cpu", torch.float64).batch(torch.tensor([0]))[0].dtype == torch.float64


def test_shards_are_mapped_not_read(kaldi: Path, tmp_path: Path) -> None:
    folder = as_shards(kaldi, tmp_path / "shards", torch.float32)
    path = folder / "train" / "features-00001-of-00003.safetensors"
    data = speech(folder, features=6, states=7)[0]
    with path.open("r+b") as file:  # what is written into the file now is seen, so nothing was read before
        content = file.read()
        position = content.index(load_file(path)["features"].numpy().tobytes())
        file.seek(position)
        file.write(np.float32(123).tobytes())
    assert float(data.source.gather(torch.tensor([30]))[0, 0]) == 123


def test_the_fingerprint_of_shards_is_of_their_contents(kaldi: Path, tmp_path: Path) -> None:
    folders = [as_shards(kaldi, tmp_path / name, torch.float32) for name in ("1", "2")]
    prints = [speech(f, features=6, states=7)[0].fingerprint() for f in folders]
    assert prints[0] == prints[1]
    table = Table(kaldi / "train" / "feats-2.scp")
    changed = {name: table.read(name).copy() for name in table}
    changed["c"][4, 1] += 1e-3
    write_table(kaldi / "train" / "feats-2.scp", changed)
    prints.append(speech(as_shards(kaldi, tmp_path / "4", torch.float32), features=6, states=7)[0].fingerprint())
    assert len(set(prints)) == 2


def test_states_without_a_frame_are_counted_in_a_warning(kaldi: Path, tmp_path: Path) -> None:
    for folder in (kaldi, as_shards(kaldi, tmp_path / "shards", torch.float16)):
        with pytest.warns(UserWarning, match=r"train: 993 of 1000 states have no frame"):
            speech(folder, features=6, states=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            speech(folder, features=6, states=7)


def test_missing_data_are_told_with_their_source(tmp_path: Path, kaldi: Path) -> None:
    for folder, said in ((tmp_path / "none", "none/train does not exist"), (kaldi, "heldout is empty of them")):
        if folder == kaldi:
            for file in (kaldi / "heldout").iterdir():
                file.unlink()
        with pytest.raises(ValueError, match=rf"{said}: put features-.*convert.*feats.scp and ali.scp.*LDC97S62.*LDC2004S13"):  # fmt: skip
            speech(folder, features=6, states=7)
    (kaldi / "train" / "features-00000-of-00001.safetensors").touch()
    with pytest.raises(ValueError, match=r"train holds both shards .* and Kaldi's tables .*Move one away"):
        speech(kaldi, features=6, states=7)


def test_another_number_of_features_or_states_is_told(kaldi: Path, tmp_path: Path) -> None:
    shards = as_shards(kaldi, tmp_path / "shards", torch.float16)
    with pytest.raises(ValueError, match=r"train, utterance b: 6 features \(4 of feats-1.scp, 2 of feats-2.scp\) instead of 260"):  # fmt: skip
        speech(kaldi, states=7)
    with pytest.raises(ValueError, match=r"features-00000-of-00003.safetensors: 6 features instead of 260"):
        speech(shards, states=7)
    states = Table(kaldi / "train" / "ali.scp")
    first = next(name for name in TRAIN if states.read(name).max() == 6)
    with pytest.raises(ValueError, match=rf"utterance {first}: states \d to 6, but there are 6 \(0 to 5\)"):
        speech(kaldi, features=6, states=6)
    with pytest.raises(ValueError, match=rf"utterance {first}: state 6, but there are 6 \(0 to 5\)"):
        speech(shards, features=6, states=6)


def test_tables_larger_than_memory_are_told_before_they_are_read(kaldi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landscape.data.speech, "LARGEST_IN_MEMORY", 4 * 6 * 132 - 1)
    with pytest.raises(ValueError, match=r"train: 0 GiB of features do not go into memory; make shards"):
        speech(kaldi, features=6, states=7)


def test_missing_mixed_and_damaged_shards_are_named(kaldi: Path, tmp_path: Path) -> None:
    folder = as_shards(kaldi, tmp_path / "shards", torch.float16) / "train"
    path = folder / "features-00002-of-00003.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"features-00002-of-00003.safetensors is truncated or damaged"):
            open_shards(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"2 of 3 shards; missing: features-00002-of-00003.safetensors"):
        open_shards(folder)
    path.write_bytes(whole)
    (folder / "features-00000-of-00001.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"or of several sets: features-00000-of-00001.safetensors, "):
        open_shards(folder)
    (folder / "features-00000-of-00001.safetensors").unlink()
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"is no shard of frames: its metadata has format None"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("states", 9, r"features-00000-of-0000\d.safetensors, utterance b: state 9, but there are 7 \(0 to 6\); the file is damaged"),
        ("states", -1, "utterance b: state -1, but there are 7"),
        ("features", math.nan, "utterance b: features that are nan or infinite"),
        ("features", math.inf, "utterance b: features that are nan or infinite"),
        ("mean", math.nan, "do not fit together"),
        ("squares", math.inf, "do not fit together"),
        ("counts", -1, "do not fit together"),
    ],
)  # fmt: skip
def test_damage_within_a_shard_is_told_when_it_is_read(kaldi: Path, tmp_path: Path, name: str, value: float, said: str) -> None:  # fmt: skip
    shards = as_shards(kaldi, tmp_path / "shards", torch.float16)
    folder = shards / "train"
    assert check_shards(folder) == 3
    path = sorted(folder.iterdir())[0]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=said):
        speech(shards, features=6, states=7)[0].batch(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"do not fit together|1 of 3 shards do not hold what was written"):
        check_shards(folder)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("states", None, "tensor states is missing"),
        ("states", torch.zeros(3, dtype=torch.int32), "do not fit together"),
        ("states", torch.zeros(30, dtype=torch.int64), "tensor states is torch.int64 of .* needed are 1 dimension"),
        ("features", torch.zeros(30, 6, 1), "tensor features is torch.float32"),
        ("features", torch.zeros(0, 6), "do not fit together"),
        ("features", torch.zeros(30, 5), "do not fit together"),
        ("features", torch.zeros(30, 6), "6 features of torch.float16, but 6 features of torch.float32 in"),
        ("ends", torch.tensor([20, 10, 30]), "do not fit together"),
        ("ends", torch.tensor([20]), "do not fit together"),
    ],
)
def test_a_shard_with_other_tensors_is_told(kaldi: Path, tmp_path: Path, name: str, value: Tensor | None, said: str) -> None:  # fmt: skip
    folder = as_shards(kaldi, tmp_path / "shards", torch.float16, 31) / "train"
    path = folder / sorted(p.name for p in folder.iterdir())[0]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {k: t.clone() for k, t in load_file(path).items() if k != name}
    save_file(tensors | ({} if value is None else {name: value}), path, metadata)
    with pytest.raises(ValueError, match=said):
        open_shards(folder)


def test_converting_checks_what_it_reads_and_overwrites_nothing(kaldi: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"stored as torch.float16 or torch.float32, not torch.bfloat16"):
        convert(kaldi / "train", out, features=6, states=7, dtype=torch.bfloat16)
    table = Table(kaldi / "train" / "feats-1.scp")
    loud = {name: table.read(name).copy() for name in table}
    loud["e"][3, 2] = 7e4
    write_table(kaldi / "train" / "feats-1.scp", loud)
    with pytest.raises(ValueError, match=r"utterance e: features beyond the range of torch.float16; convert with dtype=torch.float32"):  # fmt: skip
        convert(kaldi / "train", out, features=6, states=7)
    paths = convert(kaldi / "train", tmp_path / "loud", features=6, states=7, dtype=torch.float32)
    assert [p.name for p in paths] == ["features-00000-of-00001.safetensors"]
    with pytest.raises(ValueError, match=r"loud holds features-\* files already"):
        convert(kaldi / "train", tmp_path / "loud", features=6, states=7)
    (kaldi / "train" / "ali.scp").write_text("b touch made |\n")
    with pytest.raises(ValueError, match=r"ali.scp, line 1: .* is not run"):
        convert(kaldi / "train", tmp_path / "more", features=6, states=7)
    assert not (tmp_path / "more").exists()
