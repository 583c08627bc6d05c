from __future__ import annotations

import base64
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from landscape.data.kaldi import Corpus, Table

RNG = np.random.default_rng(0)

EXAMPLE = np.array([[-1.5, 2, 0.25], [3, -4, 1], [0.5, 8, -2], [1, 1, 1], [2, -7, 9], [6, 5, -4]], np.float32)
COMPRESSED = {
    "CM": (
        "AEJDTSAAACjBAADAQQwAAAADAAAAAFgAeP+f/88AAFVF/7//7wAwqlr/f///EI07SWvV/41aQMAAg0DHeCKkwAB9/yyOkq5ArucgAP/AMMCX",
        [[-1.4998627, 2.0194726, 0.24202919], [3.0058451, -4.0000229, 1.0076389], [0.51579309, 7.9999161, -2.0001144],
         [1.0138218, 1.0311971, 1.0076389], [2.0098333, -7.0468874, 8.9285021], [5.9998856, 4.9842987, -4.0000229],
         [8.9999313, 7.4999084, -5.9999313], [3.0058451, -10.5, 13.5], [1.5118277, 1.480413, 1.4998169],
         [0.75017166, 11.999977, -3.0000687], [4.4998627, -6.0312657, 1.4998169], [-2.2498741, 3.0077477, 0.37874508]],
    ),
    "CM2": (
        "AEJDTTIgAADgwAAAgEEGAAAAAwAAAABY/48AdP+fADD/fwB4/+8AUP9//3//f/+PAAD////P/78AMA==",
        [[-1.4999161, 1.9998932, 0.25011063], [2.9999084, -3.9999542, 0.99987793], [0.50011444, 7.9999847, -1.9999237],
         [0.99987793, 0.99987793, 0.99987793], [1.9998932, -7.0, 9.0], [5.9999542, 4.9999390, -3.9999542]],
    ),
    "CM3": (
        "AEJDTTMgAADgwAAAgEEGAAAAAwAAAFiPdJ8wf3jvUH9/f48A/8+/MA==",
        [[-1.4784312, 1.9725494, 0.27843189], [2.9764709, -3.988235, 0.96862793], [0.52941227, 7.9960794, -1.9803919],
         [0.96862793, 0.96862793, 0.96862793], [1.9725494, -7.0, 9.0], [5.9882364, 4.9843140, -3.988235]],
    ),
}  # fmt: skip
"""What Kaldi's own code (kaldi_native_io 1.23) wrote of EXAMPLE (for CM, with 1.5 times its rows in reverse below), and read of that."""


def binary(array: np.ndarray) -> bytes:
    """Kaldi's binary form of a matrix, a vector or integers."""
    if array.dtype.kind == "i":
        return b"\0B\4" + struct.pack("<i", len(array)) + b"".join(b"\4" + struct.pack("<i", i) for i in array)
    kind = {4: b"F", 8: b"D"}[array.itemsize] + (b"M" if array.ndim == 2 else b"V")
    return b"\0B" + kind + b" " + b"".join(b"\4" + struct.pack("<i", n) for n in array.shape) + array.tobytes()


def write_table(scp: Path, objects: Mapping[str, np.ndarray | bytes], ark: str | None = None) -> Path:
    """An archive and its scp file."""
    file = scp.with_suffix(".ark") if ark is None else Path(ark)
    content, lines = b"", ""
    for name, thing in objects.items():
        content += f"{name} ".encode()
        lines += f"{name} {file}:{len(content)}\n"
        content += thing if isinstance(thing, bytes) else binary(thing)
    file.write_bytes(content)
    scp.write_text(lines)
    return scp


def write_corpus(
    folder: Path, lengths: Mapping[str, int], sizes: Mapping[str, int], states: int, seed: int = 0
) -> None:
    """Utterances of random features and states, as feats*.scp and ali.scp."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for file, size in sizes.items():
        write_table(folder / file, {u: rng.standard_normal((t, size)).astype(np.float32) for u, t in lengths.items()})
    write_table(folder / "ali.scp", {u: rng.integers(0, states, t).astype(np.int32) for u, t in lengths.items()})


THINGS = {
    "matrix": RNG.standard_normal((5, 3)).astype(np.float32),
    "double": RNG.standard_normal((2, 7)),
    "vector": RNG.standard_normal(4).astype(np.float32),
    "double-vector": RNG.standard_normal(3),
    "integers": np.array([0, 5, 31999, -7], np.int32),
    "none": np.empty((0, 3), np.float32),
    "no-integers": np.empty(0, np.int32),
}


def test_every_binary_object_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = Table(write_table(tmp_path / "a.scp", THINGS))
    assert list(table) == list(THINGS)
    assert len(table) == len(THINGS)
    for name in reversed(list(THINGS)):
        found = table.read(name)
        assert found.dtype == THINGS[name].dtype
        np.testing.assert_array_equal(found, THINGS[name])
    assert table.count("integers") == 4


@pytest.mark.parametrize("kind", list(COMPRESSED))
def test_compressed_matrices_are_read_as_kaldi_does(tmp_path: Path, kind: str) -> None:
    content, expected = COMPRESSED[kind]
    table = Table(write_table(tmp_path / "c.scp", {"u": base64.b64decode(content)}))
    found = table.read("u")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(expected, np.float32), rtol=3e-7, atol=1e-7)
    original = np.concatenate([EXAMPLE, 1.5 * EXAMPLE[::-1]]) if kind == "CM" else EXAMPLE
    assert np.abs(found - original).max() < 16 / {"CM": 64, "CM2": 65535, "CM3": 255}[kind]


def test_paths_are_from_the_scp_file_first_and_then_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "a.scp", {"u": THINGS["vector"]}, ark=str(tmp_path / "data" / "a.ark"))
    for place in ("a.ark", "data/a.ark"):
        (tmp_path / "data" / "a.scp").write_text(f"u {place}:2\n")
        monkeypatch.chdir(tmp_path)
        np.testing.assert_array_equal(Table("data/a.scp").read("u"), THINGS["vector"])
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(ValueError, match=r"a.scp, line 1: there is no file data/a.ark, neither from the scp file's folder nor"):  # fmt: skip
        Table("a.scp")


@pytest.mark.parametrize(
    "entry",
    ["touch {0} |", "touch {0}; cat a.ark |", "| touch {0}", "a.ark:2 | touch {0}", "a.ark |:2", "touch {0}|", "gunzip -c a.ark.gz |", "-"],
)  # fmt: skip
def test_commands_are_refused_and_not_run(tmp_path: Path, entry: str) -> None:
    made = tmp_path / "made"
    write_table(tmp_path / "a.scp", {"u": THINGS["matrix"]})
    with (tmp_path / "a.scp").open("a") as file:
        file.write(f"hostile {entry.format(made)}\n")
    with pytest.raises(ValueError, match=r"a.scp, line 2: .* is a command or a stream, which is not run"):
        Table(tmp_path / "a.scp")
    with pytest.raises(ValueError, match="line 2"):
        corpus_of(tmp_path)
    assert not made.exists()


def corpus_of(folder: Path) -> Corpus:
    (folder / "feats.scp").write_text((folder / "a.scp").read_text())
    write_table(folder / "ali.scp", {"u": THINGS["integers"]})
    return Corpus(folder, features=3, states=32_000)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("prefix", [b"PKL", b"", b"NPY", b"AUDIO", b"RIFF", b"fLaC"])
def test_pickles_in_an_archive_are_not_unpickled(tmp_path: Path, prefix: bytes) -> None:
    made = tmp_path / "made"
    table = Table(write_table(tmp_path / "a.scp", {"u": prefix + pickle.dumps(Hostile(made))}))
    with pytest.raises(ValueError, match=r"a.ark, utterance u: no binary Kaldi object at byte 2"):
        table.read("u")
    assert not made.exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "is empty: it names no utterance"),
        ("\n  \n", "is empty: it names no utterance"),
        ("u\n", "line 1: 'u' is not of the form UTTERANCE FILE:OFFSET"),
        ("u a.ark\n", "line 1: 'u a.ark' is not of the form"),
        ("u a.ark:x\n", "is not of the form"),
        ("u a.ark:-3\n", "is not of the form"),
        ("u a.ark:2\n\nu a.ark:2\n", "line 3: utterance u comes a second time"),
        ("u a.ark:2[0:3]\n", "line 1: 'a.ark:2.0:3.' is a range of rows, which is not read"),
        ("u b.ark:2\n", "line 1: there is no file b.ark"),
        ("u .:2\n", "line 1: there is no file ."),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: str, said: str) -> None:
    write_table(tmp_path / "a.scp", THINGS)
    (tmp_path / "a.scp").write_text(lines)
    with pytest.raises(ValueError, match=rf"a\.scp.*{said}"):
        Table(tmp_path / "a.scp")


def test_an_scp_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b.scp cannot be read as a Kaldi scp file"):
        Table(tmp_path / "b.scp")
    (tmp_path / "b.scp").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match=r"b.scp cannot be read as a Kaldi scp file"):
        Table(tmp_path / "b.scp")


def test_a_truncated_archive_is_told_wherever_it_ends(tmp_path: Path) -> None:
    things: dict[str, np.ndarray | bytes] = {k: v for k, v in THINGS.items() if v.size}
    things |= {kind: base64.b64decode(content) for kind, (content, _) in COMPRESSED.items()}
    for name, thing in things.items():
        content = thing if isinstance(thing, bytes) else binary(thing)
        for length in range(0, len(content), 1 if len(content) < 60 else 7):
            table = Table(write_table(tmp_path / "a.scp", {"u": content[:length]}))
            with pytest.raises(ValueError, match=r"a.ark, utterance u: "):
                table.read("u")
        assert len(Table(write_table(tmp_path / "a.scp", {name: content})).read(name))


@pytest.mark.parametrize(
    "content",
    [
        b"FM \4" + struct.pack("<i", 2**31 - 1) + b"\4" + struct.pack("<i", 2**31 - 1) + b"aaaa",
        b"FM \4" + struct.pack("<i", -5) + b"\4" + struct.pack("<i", -3) + b"a" * 60,
        b"FM \4" + struct.pack("<i", -5) + b"\4" + struct.pack("<i", 3) + b"a" * 60,
        b"FV \4" + struct.pack("<i", -1) + b"aaaa",
        b"FM \x08" + struct.pack("<i", 1) + b"\4" + struct.pack("<i", 1) + b"aaaa",
        b"\4" + struct.pack("<i", 2**31 - 1) + b"aaaa",
        b"\4" + struct.pack("<i", -1) + b"aaaa",
        b"\4" + struct.pack("<i", 1) + b"\1aaaa",
        b"CM " + struct.pack("<ffii", 0, 1, 2**31 - 1, 2**31 - 1) + b"aaaa",
        b"CM2 " + struct.pack("<ffii", 0, 1, -2, -2) + b"a" * 60,
        b"CM " + struct.pack("<ffii", 0, float("inf"), 1, 1) + b"a" * 60,
        b"CM3 " + struct.pack("<ffii", float("nan"), 1, 1, 1) + b"a" * 60,
        b"XM \4" + struct.pack("<i", 1) + b"\4" + struct.pack("<i", 1) + b"aaaa",
        b"T",
    ],
)
def test_a_damaged_object_is_told_before_anything_large_is_made(tmp_path: Path, content: bytes) -> None:
    table = Table(write_table(tmp_path / "a.scp", {"u": b"\0B" + content}))
    with pytest.raises(ValueError, match=r"a.ark, utterance u: .*(damaged|no matrix or vector of Kaldi's)"):
        table.read("u")


def test_text_archives_and_wrong_offsets_are_told(tmp_path: Path) -> None:
    table = Table(write_table(tmp_path / "a.scp", {"u": b" [\n  1 2 3\n  4 5 6 ]\n"}))
    with pytest.raises(ValueError, match=r"either the offset in the scp file is wrong, or the archive is text, which copy-feats"):  # fmt: skip
        table.read("u")
    (tmp_path / "a.scp").write_text("u a.ark:99999\n")
    with pytest.raises(ValueError, match="truncated or damaged"):
        Table(tmp_path / "a.scp").read("u")


def test_streams_are_put_side_by_side(tmp_path: Path) -> None:
    lengths = {"a": 23, "b": 10, "c": 1, "d": 40}
    write_corpus(tmp_path, lengths, {"feats-1-fmllr.scp": 4, "feats-4-mel.scp": 3}, states=9)
    online = {u: RNG.standard_normal((-(-t // 10), 2)).astype(np.float32) for u, t in lengths.items()}
    fixed = {u: RNG.standard_normal(5) for u in lengths}
    write_table(tmp_path / "feats-2-ivector.scp", online)
    write_table(tmp_path / "feats-3-speaker.scp", fixed)
    corpus = Corpus(tmp_path, features=14, states=9)
    assert corpus.names == list(lengths)
    for name, count in lengths.items():
        found, states = corpus.read(name)
        assert (found.shape, found.dtype, states.shape, states.dtype) == ((count, 14), np.float32, (count,), np.int32)
        np.testing.assert_array_equal(found[:, :4], Table(tmp_path / "feats-1-fmllr.scp").read(name))
        np.testing.assert_array_equal(found[:, 4:6], online[name][np.arange(count) // 10])
        np.testing.assert_array_equal(found[:, 6:11], np.tile(fixed[name].astype(np.float32), (count, 1)))
        np.testing.assert_array_equal(found[:, 11:], Table(tmp_path / "feats-4-mel.scp").read(name))
        assert corpus.count(name) == count


def test_tables_that_name_other_utterances_are_told_with_the_way_out(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"a": 9, "b": 8, "c": 7}, {"feats.scp": 3}, states=5)
    write_table(tmp_path / "ali.scp", {"b": np.zeros(8, np.int32)})
    with pytest.raises(ValueError, match=r"2 utterance\(s\) of \S*feats.scp are not in \S*ali.scp, the first a; leave them out with: utils/filter_scp.pl"):  # fmt: skip
        Corpus(tmp_path, features=3, states=5)
    write_table(tmp_path / "ali.scp", {u: np.zeros(8, np.int32) for u in "abcd"})
    with pytest.raises(ValueError, match=r"1 utterance\(s\) of \S*ali.scp are not in \S*feats.scp, the first d"):
        Corpus(tmp_path, features=3, states=5)
    (tmp_path / "ali.scp").unlink()
    with pytest.raises(ValueError, match=r"no ali.scp; Kaldi's recipe egs/swbd/s5c .*LDC97S62; .*LDC2004S13 .* ali-to-pdf"):  # fmt: skip
        Corpus(tmp_path, features=3, states=5)


@pytest.mark.parametrize(
    ("table", "thing", "said"),
    [
        ("feats.scp", np.zeros((8, 3), np.float32), r"feats.scp, utterance b: 8 frames, but 9 states in ali.scp"),
        ("feats.scp", np.zeros((10, 3), np.float32), r"feats.scp, utterance b: 10 frames, but 9 states"),
        ("feats.scp", np.zeros((9, 4), np.float32), r"utterance b: 4 features \(4 of feats.scp\) instead of 3"),
        ("feats.scp", np.zeros(9, np.int32), r"feats.scp, utterance b: integers instead of features"),
        ("feats.scp", np.full((9, 3), np.nan, np.float32), r"feats.scp, utterance b: features that are nan or infinite"),
        ("feats.scp", np.full((9, 3), -np.inf, np.float32), r"feats.scp, utterance b: features that are nan or infinite"),
        ("feats.scp", np.full((9, 3), 1e300), r"feats.scp, utterance b: features that are nan or infinite"),
        ("ali.scp", np.array([0] * 8 + [5], np.int32), r"ali.scp, utterance b: states 0 to 5, but there are 5 \(0 to 4\); .*ali-to-pdf"),
        ("ali.scp", np.array([-1] * 9, np.int32), r"ali.scp, utterance b: states -1 to -1, but there are 5"),
        ("ali.scp", np.zeros(9, np.float32), r"ali.scp, utterance b: a matrix or vector of float32, not the integers"),
        ("ali.scp", np.zeros(0, np.int32), r"ali.scp, utterance b: an alignment of no frame"),
    ],
)  # fmt: skip
def test_an_utterance_that_does_not_fit_is_named(tmp_path: Path, table: str, thing: np.ndarray, said: str) -> None:
    write_corpus(tmp_path, {"a": 9, "b": 9}, {"feats.scp": 3}, states=5)
    old = Table(tmp_path / table).read("a").copy()
    write_table(tmp_path / table, {"a": old, "b": thing})
    corpus = Corpus(tmp_path, features=3, states=5)
    corpus.read("a")
    with pytest.raises(ValueError, match=said):
        corpus.read("b")
