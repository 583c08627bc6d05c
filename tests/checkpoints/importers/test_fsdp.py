from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers import fsdp
from landscape.checkpoints.importers.dtensor import box
from landscape.checkpoints.importers.found import Found
from landscape.checkpoints.importers.notes import Made, Named, Table
from landscape.checkpoints.importers.torch_archive import Place
from tests.checkpoints.importers.fixtures_sharded import (
    STEPS,
    Hostile,
    assert_same,
    contents,
    damaged,
    expected,
    four,
    network,
    rewritten,
    two,
)

pytestmark = pytest.mark.slow


def of_ranks(pattern: str, folder: Path | None = None, ranks: Sequence[int] = (0, 1)) -> list[Path]:
    return [(folder or two()) / pattern.format(rank) for rank in ranks]


def found_in(paths: Sequence[Path]) -> Found:
    found = fsdp.find(paths)
    assert found is not None
    return found


WEIGHTS = list(network(0).state_dict())


@pytest.mark.parametrize(
    ("pattern", "of"),
    [
        ("fsdp2_rank{}.pt", "fsdp2"),
        ("ranks/{}/model.pt", "fsdp2"),
        ("fsdp1_rank{}.pt", "fsdp1"),
        ("accelerate_ranks/pytorch_model_fsdp_0_rank{}.bin", "accelerate"),
        ("shapes-0000{}-of-00002.pt", "shapes"),
    ],
)
@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_reads_to_the_bit(pattern: str, of: str, ranks: tuple[int, int]) -> None:
    """What torch gathers among the processes, put together without them; in the order of ranks, whatever the order of files."""
    found = found_in(of_ranks(pattern, ranks=ranks))
    assert found.kind == "shards of one model"
    assert "2 processes' files" in found.reasons[0]
    for stored in found.models[0].tensors.values():
        read = stored.read()
        assert (read.shape, read.dtype) == (stored.shape, stored.dtype)
    assert_same(contents(found.models[0]), {n: t for n, t in expected(two(), of).items() if "/" not in n})


def test_model_and_optimizer_in_one_file() -> None:
    """The optimizer's own state_dict numbers the parameters; in the order of the network these are the moments that torch names."""
    found = found_in(of_ranks("whole_rank_{}.pt"))
    (model,) = found.models
    wanted = expected(two(), "fsdp2")
    assert_same({n: s.read() for n, s in model.tensors.items()}, {n: t for n, t in wanted.items() if "/" not in n})
    assert (found.step, found.facts["epoch"]) == (STEPS, 1)
    assert model.optimizer is not None
    assert model.optimizer.facts == {
        "learning_rate": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "optimizer_step": STEPS,
    }  # fmt: skip
    names = [name for name in WEIGHTS if "running" not in name and "num_batches" not in name]
    for slot in ("exp_avg", "exp_avg_sq"):
        held = model.optimizer.slots[slot]
        assert list(held) == list(range(len(names)))
        for i, name in enumerate(names):
            assert torch.equal(held[i].read(), wanted[f"{slot}/{name}"])


def test_learners_stacked_along_the_axis_that_is_cut() -> None:
    found = found_in(of_ranks("stack_rank{}.pt"))
    assert (found.kind, len(found.models)) == ("learners", 2)
    for rank, model in enumerate(found.models):
        wanted = load_file(two() / f"learners.{rank}.expected.safetensors")
        assert_same(contents(model), {n: t for n, t in wanted.items() if "/" not in n})


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (3, 1, 2, 0), (0, 1), (2, 3), (0, 3), (1, 2)])
def test_replicas_of_shards(ranks: tuple[int, ...]) -> None:
    """HSDP, replicas 0-1 and 2-3: any files that hold each shard once do, but those of two replicas may be of weights that had come apart."""
    found = found_in(of_ranks("hsdp_rank{}.pt", four(), ranks))
    assert_same(contents(found.models[0]), expected(four(), "hsdp.0"))
    mixed = ranks in ((0, 3), (1, 2))
    assert found.kind == ("possibly mixed" if mixed else "shards of one model")
    assert any("replicas" in reason for reason in found.reasons) == (len(ranks) == 4 or mixed)


@pytest.mark.parametrize(("ranks", "replica"), [((0, 1, 2, 3), 0), ((2, 3), 1), ((1, 2, 3), 1), ((0, 1, 3), 0)])
def test_replicas_that_came_apart_are_not_mixed(ranks: tuple[int, ...], replica: int) -> None:
    """The first replica of which all parts are there."""
    found = found_in(of_ranks("hsdp_apart_rank{}.pt", four(), ranks))
    assert found.kind == "shards of one model"
    assert_same(contents(found.models[0]), expected(four(), f"hsdp_apart.{replica}"))


def test_tied_weights_are_known_by_their_storage(tmp_path: Path) -> None:
    def tie(notes: Table) -> None:
        notes.pairs.append(("tied.weight", notes.by_name()["0.weight"]))
        notes.pairs.append(("tied.mean", notes.by_name()["1.running_mean"]))

    paths = [rewritten(p, tmp_path / p.name, tie) for p in of_ranks("fsdp2_rank{}.pt")]
    tensors = found_in(paths).models[0].tensors
    assert tensors["tied.weight"].alias == tensors["0.weight"].alias is not None
    assert tensors["tied.mean"].alias == tensors["1.running_mean"].alias is not None
    assert len({stored.alias for stored in tensors.values()}) == len(tensors) - 2


def test_tensor_parallelism_under_fsdp() -> None:
    """Cut by both along one axis (a strided shard), along two, and by one alone."""
    found = found_in(of_ranks("parallel_rank{}.pt", four(), range(4)))
    assert_same(contents(found.models[0]), expected(four(), "parallel"))
    parts = {name: len(fsdp.parts_of(stored)) for name, stored in found.models[0].tensors.items()}
    assert parts == {"0.weight": 4, "0.bias": 4, "2.weight": 4, "2.bias": 2}


def test_missing_ranks_are_named() -> None:
    for pattern in ("fsdp2_rank{}.pt", "fsdp1_rank{}.pt"):
        for rank in range(2):
            with pytest.raises(
                CheckpointError, match=rf"0\.weight.*is missing; the file of rank {1 - rank} is not among those given"
            ):
                fsdp.find(of_ranks(pattern, ranks=[rank]))
    with pytest.raises(CheckpointError, match=r"file of rank 1, 3 is not"):
        fsdp.find(of_ranks("hsdp_rank{}.pt", four(), (0, 2)))


def test_ranks_are_told_by_the_files_themselves(tmp_path: Path) -> None:
    for pattern, of in (("fsdp2_rank{}.pt", "fsdp2"), ("fsdp1_rank{}.pt", "fsdp1")):
        paths = [tmp_path / name for name in ("a.pt", "b.pt")]
        for rank, path in enumerate(paths):
            shutil.copy(two() / pattern.format(1 - rank), path)
        found = found_in(paths)
        assert_same(contents(found.models[0]), {n: t for n, t in expected(two(), of).items() if "/" not in n})
    with pytest.raises(CheckpointError, match="are both of rank 0"):
        fsdp.find([two() / "fsdp2_rank0.pt", two() / "ranks/0/model.pt"])


def test_flat_parameters_are_explained() -> None:
    with pytest.raises(CheckpointError, match=r"flat parameters.*FULL_STATE_DICT"):
        fsdp.find(of_ranks("flat_rank{}.pt"))


def test_what_is_something_else(tmp_path: Path) -> None:
    torch.save(network(0).state_dict(), tmp_path / "plain.pt")
    torch.save(network(0).state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("DTensor")
    for name in ("plain.pt", "legacy.pt", "text.pt"):
        assert fsdp.find([tmp_path / name]) is None
    assert fsdp.find([]) is None
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        fsdp.find([tmp_path / "missing.pt"])


def test_finding_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    fill = Place.fill
    monkeypatch.setattr(Place, "fill", lambda place, into: (numbers.append(into.numel()), fill(place, into))[1])
    found = found_in(of_ranks("whole_rank_{}.pt"))
    assert set(numbers) == {1}  # the optimizer's count of steps
    found.models[0].tensors["3.weight"].read()
    assert numbers[-2:] == [10, 5]


# hostile and damaged


def test_hostile_file(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    state = torch.load(two() / "fsdp2_rank0.pt", weights_only=False)
    assert isinstance(state["0.weight"], DTensor)
    for name, value in (("inside", {"model": state, "x": Hostile(marker)}), ("instead", [Hostile(marker), "DTensor"])):
        torch.save(value, tmp_path / f"{name}_rank0.pt")
        shutil.copy(two() / "fsdp2_rank1.pt", tmp_path / f"{name}_rank1.pt")
        with pytest.raises(CheckpointError, match=rf"{name}_rank0.pt names 'posix.system'.*Nothing was run"):
            fsdp.find(of_ranks(f"{name}_rank{{}}.pt", tmp_path))
    assert not marker.exists()


def _tensor(notes: Table) -> Made:
    return notes.by_name()["0.weight"]


def _spec(notes: Table) -> Made:
    spec = _tensor(notes).arguments[3][1].by_name()["_spec"]
    assert isinstance(spec, Made)
    return spec


def _mesh(notes: Table) -> Made:
    mesh = _spec(notes).state.by_name()["mesh"]
    assert isinstance(mesh, Made)
    return mesh


def _set(note: Made, **values: object) -> None:
    note.state.pairs = [pair for pair in note.state.pairs if pair[0] not in values] + list(values.items())


def _rebuilt(notes: Table, position: int, value: object) -> None:
    tensor = _tensor(notes)
    arguments = list(tensor.arguments[2])
    arguments[position] = value
    tensor.arguments = (*tensor.arguments[:2], tuple(arguments), tensor.arguments[3])


PLACEMENTS = "torch.distributed.tensor.placement_types"


def _placed(kind: str, **values: object) -> Callable[[Table], None]:
    state = Table(list(values.items()))
    return lambda notes: _set(_spec(notes), placements=(Made(f"{PLACEMENTS}.{kind}", (), state),))


CHANGES: dict[str, tuple[Callable[[Table], object], str]] = {
    "a sum": (_placed("Partial", reduce_op="sum"), r"partial result \(Partial\)"),
    "no axis": (_placed("Shard"), "sharded along axis None"),
    "an axis beyond": (_placed("Shard", dim=2), "sharded along axis 2"),
    "an axis before": (_placed("Shard", dim=-1), "sharded along axis -1"),
    "another axis": (_placed("Shard", dim=1), r"holds \[3, 6\].*announce \[5, 3\]"),
    "a replica": (_placed("Replicate"), r"announce \[5, 6\]"),
    "strided": (_placed("_StridedShard", dim=0, split_factor=2), "not next to each other"),
    "strided without end": (_placed("_StridedShard", dim=0, split_factor=1 << 40), "sharded along axis 0 with factor"),
    "too many placements": (lambda n: _set(_spec(n), placements=_spec(n).attributes()["placements"] * 2), "2 placements on a mesh of 1"),
    "no placements": (lambda n: _set(_spec(n), placements=None), "of a make that is not read"),
    "no mesh": (lambda n: _set(_spec(n), mesh=None), "of a make that is not read"),
    "an order of its own": (
        lambda n: _set(_spec(n), shard_order=(Made("torch.distributed.tensor._dtensor_spec.ShardOrderEntry", (0, (1, 0))),)), r"order \[1, 0\]"),
    "no layout": (lambda n: _set(_mesh(n), _layout=None), "mesh of processes of a make"),
    "a giant mesh": (lambda n: _set(_mesh(n), _layout=_early((1 << 40,))), "mesh of processes of a make"),
    "a mesh of none": (lambda n: _set(_mesh(n), _layout=_early((0,))), r"at \[0\] of a mesh of \[0\]"),
    "a place beyond": (lambda n: _set(_mesh(n), _coordinate_on_dim=(2,)), r"at \[2\] of a mesh of \[2\]"),
    "no place": (lambda n: _set(_mesh(n), _coordinate_on_dim=None), "does not say where in its mesh"),
    "another place": (lambda n: _set(_mesh(n), _coordinate_on_dim=(1,)), r"announce \[2, 6\]"),
    "another rank": (lambda n: _set(_mesh(n), _rank=7), "of rank 7, which is not in its mesh"),
    "another shape": (lambda n: _rebuilt(n, 2, (6, 6)), r"of shape \[6, 6\] in .*rank0.pt, but \[5, 6\] in|is not whole"),
    "a giant shape": (lambda n: _rebuilt(n, 2, (1 << 40, 1 << 40)), "announce"),
    "another type": (lambda n: _rebuilt(n, 1, Named("torch.float64")), "of torch.float32, but"),
    "no type": (lambda n: _rebuilt(n, 1, None), "of a type that is not read"),
    "no shape": (lambda n: _rebuilt(n, 2, "56"), "damaged"),
    "no local tensor": (lambda n: _set_local(n, None), "of a make that is not read"),
    "nothing": (lambda n: Table([("DTensor", 1)]), "is not whole|hold no weights|sharded in another"),
    "no table": (lambda n: ["DTensor"], "holds no table"),
    "whole in one file": (lambda n: n.pairs.__setitem__(0, ("0.weight", 3)), "sharded in another process's file, but not in"),
}  # fmt: skip


def _set_local(notes: Table, value: object) -> None:
    table = _tensor(notes).arguments[3][1]
    table.pairs = [(key, value if key == "_local_tensor" else was) for key, was in table.pairs]


def _early(shape: tuple[int, ...]) -> Made:
    """The layout of a mesh as torch 2.9 and 2.10 noted it."""
    return Made(
        "torch.distributed._mesh_layout._MeshLayout", (), Table([("shape", shape), ("stride", (1,) * len(shape))])
    )


@pytest.mark.parametrize("change", CHANGES)
def test_shards_that_say_what_cannot_be(change: str, tmp_path: Path) -> None:
    edit, message = CHANGES[change]
    keep = change in ("nothing", "no table")
    rewritten(two() / "fsdp2_rank0.pt", tmp_path / "x_rank0.pt", edit if keep else lambda n: (edit(n), None)[1])
    shutil.copy(two() / "fsdp2_rank1.pt", tmp_path / "x_rank1.pt")
    with pytest.raises(CheckpointError, match=message):
        fsdp.find(of_ranks("x_rank{}.pt", tmp_path))


def test_rewriting_alone_changes_nothing(tmp_path: Path) -> None:
    paths = [rewritten(p, tmp_path / p.name, lambda n: None) for p in of_ranks("fsdp2_rank{}.pt")]
    assert_same(
        contents(found_in(paths).models[0]), {n: t for n, t in expected(two(), "fsdp2").items() if "/" not in n}
    )


EARLIER = {
    "torch.distributed.tensor.DTensor": "torch.distributed._tensor.api.DTensor",
    "torch.distributed.tensor._dtensor_spec.DTensorSpec": "torch.distributed._tensor.placement_types.DTensorSpec",
    f"{PLACEMENTS}.Shard": "torch.distributed._tensor.placement_types.Shard",
    "torch.distributed.tensor._dtensor_spec.TensorMeta": "torch.distributed._tensor.placement_types.TensorMeta",
}


def _as_earlier(note: Any, layout: bool, seen: set[int]) -> Any:
    """Notes as earlier versions wrote them: other modules, and of a mesh a tensor of ranks (torch 2.2 to 2.8) or a plain layout (2.9)."""
    if isinstance(note, Named):
        return Named(EARLIER.get(note.name, note.name))
    if isinstance(note, tuple | list):
        return type(note)(_as_earlier(one, layout, seen) for one in note)
    if isinstance(note, Table) and id(note) not in seen:
        seen.add(id(note))
        note.pairs = [(key, _as_earlier(value, layout, seen)) for key, value in note.pairs]
    if isinstance(note, Made) and id(note) not in seen:
        seen.add(id(note))
        note.name = EARLIER.get(note.name, note.name)
        if note.name.endswith("DeviceMesh"):
            said = note.attributes()
            if layout:
                _set(note, _layout=_early((2,)))
            else:
                kept = {"device_type": "cpu", "mesh": said["_rank_map"], "mesh_dim_names": None}
                note.state = Table([*kept.items(), ("_coordinate_on_dim", list(said["_coordinate_on_dim"]))])
        note.arguments = _as_earlier(note.arguments, layout, seen)
        note.state = _as_earlier(note.state, layout, seen)
    return note


@pytest.mark.parametrize("layout", [False, True])
def test_earlier_versions(layout: bool, tmp_path: Path) -> None:
    paths = [
        rewritten(p, tmp_path / f"{j}.pt", lambda n: _as_earlier(n, layout, set()))
        for j, p in enumerate(of_ranks("fsdp2_rank{}.pt"))
    ]
    found = found_in(paths[::-1])
    assert_same(contents(found.models[0]), {n: t for n, t in expected(two(), "fsdp2").items() if "/" not in n})
    with pytest.raises(CheckpointError, match="the file of rank 1 is not"):
        fsdp.find(paths[:1])


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second = of_ranks("whole_rank_{}.pt")

    def later(notes: Table) -> None:
        notes.pairs = [(key, 9 if key == "step" else value) for key, value in notes.pairs]

    def narrower(notes: Table) -> None:
        notes.by_name()["model"].pairs = [(k, v) for k, v in notes.by_name()["model"].pairs if "bias" not in k]

    with pytest.raises(CheckpointError, match=r"step is 3 in .*, but 9 in"):
        fsdp.find([first, rewritten(second, tmp_path / "later_rank1.pt", later)])
    with pytest.raises(CheckpointError, match=r"model\.0\.bias.*is not whole"):
        fsdp.find([first, rewritten(second, tmp_path / "narrower_rank1.pt", narrower)])
    with pytest.raises(CheckpointError, match=r"which rank wrote .*x\.pt is told neither in it nor by its name"):
        fsdp.find([rewritten(first, tmp_path / "x.pt", lambda n: Table([("DTensor", 1)])), second])


def test_dictionaries_without_end(tmp_path: Path) -> None:
    """One that holds itself, and one nested 40 times twice, whose 2^40 leaves are not walked to."""

    def own(notes: Table) -> None:
        notes.pairs.append(("self", notes))

    def deep(notes: Table) -> None:
        inner = Table()
        for _ in range(40):
            inner = Table([(str(j), inner) for j in range(30)])
        notes.pairs.append(("deep", inner))

    path = two() / "fsdp2_rank0.pt"
    archive = fsdp.archive(path, 0, path.stat().st_size, "x")
    for change, message in ((own, None), (deep, "more than 1000000 entries")):
        notes = archive.content(lambda name: True)
        change(notes)
        if message is None:
            assert "0.weight" in dict(fsdp._flattened(notes, path))
        else:
            with pytest.raises(CheckpointError, match=message):
                dict(fsdp._flattened(notes, path))


@pytest.mark.parametrize("pattern", ["whole_rank_{}.pt", "fsdp1_rank{}.pt"])
def test_any_damage_is_an_error_of_ours(pattern: str, tmp_path: Path) -> None:
    paths = [Path(shutil.copy(path, tmp_path / path.name)) for path in of_ranks(pattern)]
    content = paths[0].read_bytes()
    structure = content.index(b"data.pkl")
    generator = random.Random(0)
    messages = []
    for trial in range(80):
        middle = damaged(content[structure : structure + 6000], generator)
        bad = content[:structure] + middle + content[structure + 6000 :] if trial % 2 else damaged(content, generator)
        paths[0].write_bytes(bad)
        try:
            found = fsdp.find(paths)
            for model in found.models if found is not None else ():
                contents(model)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(tmp_path) in message for message in messages)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    paths = [Path(shutil.copy(path, tmp_path / path.name)) for path in of_ranks("fsdp2_rank{}.pt")]
    os.truncate(paths[1], paths[1].stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"fsdp2_rank1.pt is damaged, cut short"):
        fsdp.find(paths)


# where shards are


def _reference(size: int, cuts: list[tuple[int, int, int]]) -> list[int]:
    """Indices along an axis that (processes, coordinate, split factor) after one another leave, by torch.chunk."""

    def piece(index: torch.Tensor, count: int, at: int) -> torch.Tensor:
        pieces = index.chunk(count)
        return pieces[at] if at < len(pieces) else index[:0]

    index = torch.arange(size)
    for count, at, factor in cuts:
        index = torch.cat([piece(piece(index, factor, j), count, at) for j in range(factor)])
    return [int(i) for i in index]


@given(st.data())
def test_boxes_are_what_torch_cuts(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    extent = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    placement = st.none() | st.tuples(st.integers(0, len(shape) - 1), st.sampled_from([1, 1, 2, 3]))
    placements = [data.draw(placement) for _ in extent]
    for coordinate in itertools.product(*map(range, extent)):
        wanted = []
        for axis, size in enumerate(shape):
            cuts = [
                (n, at, p[1])
                for n, at, p in zip(extent, coordinate, placements, strict=True)
                if p is not None and p[0] == axis
            ]
            wanted.append(_reference(size, cuts))
        try:
            offsets, sizes = box(shape, extent, coordinate, placements, "w")
        except CheckpointError:
            strided = [p for p in placements if p is not None and p[1] > 1]
            assert strided
            continue
        assert list(sizes) == [len(along) for along in wanted]
        for begin, along in zip(offsets, wanted, strict=True):
            assert along == list(range(begin, begin + len(along))) or not along


def test_tensor_parallelism_then_fsdp_is_read_for_every_even_size() -> None:
    """A (dp, tp) mesh, tp first: rank (d, t) has piece d of piece t."""
    for dp, tp, rows in itertools.product((1, 2, 3), (1, 2, 4), (1, 2)):
        size = dp * tp * rows
        for d, t in itertools.product(range(dp), range(tp)):
            offsets, sizes = box((size,), (dp, tp), (d, t), [(0, tp), (0, 1)], "w")
            assert (offsets, sizes) == (((t * dp + d) * rows,), (rows,))
