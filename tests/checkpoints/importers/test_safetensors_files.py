from __future__ import annotations

import json
import os
import random
import shutil
import struct
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.found import Found
from landscape.checkpoints.importers.safetensors_files import find
from landscape.checkpoints.importers.safetensors_header import DTYPES, read_header
from tests.checkpoints.importers.fixtures_c import Hostile, assert_same, expected, network, written
from tests.checkpoints.mutation import edit_json


def found_in(path: Path) -> Found:
    found = find(path)
    assert found is not None
    return found


def save(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, metadata or None)
    return path


def parts(count: int = 3) -> list[dict[str, torch.Tensor]]:
    state = network().state_dict()
    return [{name: state[name] for name in list(state)[i::count]} for i in range(count)]


def shards(folder: Path, *, first: int = 1, index: bool = True, stem: str = "model") -> dict[str, torch.Tensor]:
    where = {}
    for i, part in enumerate(parts(), first):
        name = f"{stem}-{i:05d}-of-00003.safetensors"
        save(folder / name, part)
        where |= dict.fromkeys(part, name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return dict(network().state_dict())


# What the libraries write ------------------------------------------------------------------------------------------------


def test_every_type_and_shape_of_one_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    odd = {"byte": torch.arange(3, dtype=torch.uint8)}  # after which nothing is aligned
    saved = odd | {
        f"{kind}.{len(shape)}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for kind, dtype in DTYPES.items()
        for shape in ((), (5,), (2, 3), (0, 4), (3, 1, 2))
    }
    path = save(tmp_path / "weights.safetensors", saved, step="7", epoch="2", comment="x")
    found = found_in(path)
    assert_same(found.models[0].tensors, saved)
    assert (found.format, found.kind, found.step, found.facts) == ("safetensors", "one model", 7, {"epoch": 2})
    renamed = path.rename(tmp_path / "weights")
    assert_same(found_in(renamed).models[0].tensors, saved)


def test_types_that_torch_lacks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"w": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}, 2)
    assert safetensors.safe_open(path, "pt").keys() == ["w"]  # which torch could not hold
    with pytest.raises(CheckpointError, match="'w' is of type F4, which is not read: quantised"):
        find(tmp_path)


def test_tied_weights_that_were_dropped_are_there_again(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    safetensors.torch.save_model(module, str(tmp_path / "model.safetensors"))
    tensors = found_in(tmp_path).models[0].tensors
    assert_same(tensors, module.state_dict())
    assert tensors["0.weight"].alias == tensors["1.weight"].alias is not None
    assert tensors["0.bias"].alias is None


def test_a_pretrained_model_of_transformers() -> None:
    weights = expected("trainer")["weights"]
    del weights["lm_head.weight"]  # tied to the embedding, and not saved
    for name in ("pretrained", "pretrained-shards"):
        found = found_in(written() / name)
        assert_same(found.models[0].tensors, weights)
        assert found.facts == {
            "model_type": "gpt2",
            "architecture": "GPT2LMHeadModel",
            "writer_version": f"transformers {version('transformers')}",
        }
        assert (found.kind, found.step) == ("one model", None)
        assert not found.models[0].ordered
    index = written() / "pretrained-shards" / "model.safetensors.index.json"
    assert_same(found_in(index).models[0].tensors, weights)


def test_a_checkpoint_of_transformers_trainer() -> None:
    found = found_in(written() / "trainer" / "checkpoint-3")
    weights = expected("trainer")["weights"]
    del weights["lm_head.weight"]
    assert_same(found.models[0].tensors, weights)
    assert found.step == 3
    assert found.facts["num_learners"] == 2
    assert found.facts["local_batch_size"] == 4
    assert found.facts["epoch"] == 0.75
    assert any("2 processes trained it" in reason for reason in found.reasons)
    assert any("training_args.bin was not read" in note for note in found.notes)
    assert found.models[0].optimizer is not None
    assert found.models[0].optimizer.facts["betas"] == [0.9, 0.999]


@pytest.mark.parametrize("name", ["writer", "writer-files"])
def test_parts_of_tensors_that_two_processes_wrote(name: str) -> None:
    found = found_in(written() / name)
    saved = expected("writer")
    by_rank_1 = saved["statistics"][1]
    assert_same(found.models[0].tensors, saved["weights"] | by_rank_1)
    assert found.kind == "shards of one model"
    assert "how many wrote is not recorded" in found.reasons[0]
    assert any("BatchNorm" in reason for reason in found.reasons)


def test_joined_files_are_read_from_what_they_were_joined_from() -> None:
    folder = written() / "writer-joined"
    joined = safetensors.torch.load_file(folder / "model-00001-of-00001.safetensors")
    assert joined["scale"] == 0  # saved as 2
    found = found_in(folder)
    assert found.models[0].tensors["scale"].read() == 2
    assert any("zeros" in note for note in found.notes)
    weights = expected("writer")["weights"]
    tensors = {n: t for n, t in found.models[0].tensors.items() if n in weights and not n.startswith("1.running")}
    assert_same(tensors, {n: weights[n] for n in tensors})
    assert len(tensors) == 8


def test_replicas_under_the_same_names_may_be_mixed() -> None:
    found = found_in(written() / "writer-replicas")
    assert found.kind == "possibly mixed"
    own = [network(rank).state_dict() for rank in range(2)]
    whose = [{rank for rank in range(2) if torch.equal(stored.read(), own[rank][name])} for name, stored in found.models[0].tensors.items()]  # fmt: skip
    assert {0} in whose
    assert {1} in whose  # and they are


def test_learners_under_names_of_their_own() -> None:
    found = found_in(written() / "writer-learners")
    assert found.kind == "learners"
    for rank, model in enumerate(found.models):
        assert_same(model.tensors, network(rank).state_dict())


def test_a_whole_model_of_rank_0_by_the_same_writer() -> None:
    found = found_in(written() / "writer-whole")
    assert_same(found.models[0].tensors, expected("writer")["weights"])
    assert found.kind == "one model"
    alone = found_in(written() / "writer-whole" / "model-00001-of-00001.safetensors")
    assert_same(alone.models[0].tensors, expected("writer")["weights"])


def test_a_missing_part_is_named_and_a_missing_last_one_cannot_be(tmp_path: Path) -> None:
    shutil.copytree(written() / "writer", tmp_path / "writer")
    (tmp_path / "writer" / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not whole.*there is no shard-00001-\*.safetensors"):
        find(tmp_path / "writer")
    shutil.copytree(written() / "writer", tmp_path / "other")
    (tmp_path / "other" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    found = found_in(tmp_path / "other")
    assert found.models[0].tensors["0.weight"].shape == (4, 3)  # of 7 rows
    assert "a last one lacks would show in shapes only" in found.reasons[0]
    shutil.copytree(written() / "writer-files", tmp_path / "files")
    for file in (tmp_path / "files").glob("*-00002-of-*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing"):
        find(tmp_path / "files")
    with pytest.raises(CheckpointError, match="holds a part of a network; give the folder"):
        find(next((tmp_path / "files").iterdir()))


def test_the_writer_s_own_unreadable_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="puts what is no tensor, such as a step, before the header"):
        find(tmp_path)


# Layouts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "index"), [(1, True), (1, False), (0, False)])
@pytest.mark.parametrize("stem", ["model", "pytorch_model", "diffusion_pytorch_model", "model.fp16"])
def test_shards_with_and_without_an_index(tmp_path: Path, first: int, index: bool, stem: str) -> None:
    saved = shards(tmp_path, first=first, index=index, stem=stem)
    found = found_in(tmp_path)
    assert_same(found.models[0].tensors, saved)
    assert (found.format, found.kind) == ("safetensors, sharded", "one model")
    with pytest.raises(CheckpointError, match="a part of a network; give the folder"):
        find(tmp_path / f"{stem}-{first:05d}-of-00003.safetensors")


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    shards(tmp_path, index=index)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors.* is missing"):
        find(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a part of a network"):
        find(tmp_path / "model-00003-of-00003.safetensors")


def test_files_with_the_same_names_are_learners_and_left_to_others(tmp_path: Path) -> None:
    for rank in range(3):
        save(tmp_path / "ours" / f"learner-{rank:05d}-of-00003.safetensors", network(rank).state_dict())
        save(tmp_path / "theirs" / f"model-{rank + 1:05d}-of-00003.safetensors", network(rank).state_dict())
    for folder in ("ours", "theirs"):
        assert find(tmp_path / folder) is None
        for rank, file in enumerate(sorted((tmp_path / folder).iterdir())):
            assert_same(found_in(file).models[0].tensors, network(rank).state_dict())


def test_shards_with_some_names_in_common_are_neither(tmp_path: Path) -> None:
    shards(tmp_path, index=False)
    extra = parts()[1] | {"0.weight": torch.zeros(7, 3)}
    save(tmp_path / "model-00002-of-00003.safetensors", extra)
    with pytest.raises(CheckpointError, match=r"0\.weight is in .* too; which of them holds cannot be known"):
        find(tmp_path)
    shards(tmp_path, index=True)
    save(tmp_path / "model-00002-of-00003.safetensors", extra)  # here the index tells which holds
    found = found_in(tmp_path)
    assert_same(found.models[0].tensors, network().state_dict())
    assert any("1 tensors that model.safetensors.index.json does not list" in note for note in found.notes)


def test_weights_of_torch_save_in_the_same_layouts(tmp_path: Path) -> None:
    saved = network().state_dict()
    (tmp_path / "one").mkdir()
    torch.save(saved, tmp_path / "one" / "pytorch_model.bin")
    (tmp_path / "one" / "config.json").write_text('{"model_type": "mine"}')
    found = found_in(tmp_path / "one")
    assert_same(found.models[0].tensors, saved)
    assert found.models[0].ordered
    assert found.facts["model_type"] == "mine"
    (tmp_path / "many").mkdir()
    where = {}
    for i, part in enumerate(parts(), 1):
        torch.save(part, tmp_path / "many" / f"pytorch_model-{i:05d}-of-00003.bin")
        where |= dict.fromkeys(part, f"pytorch_model-{i:05d}-of-00003.bin")
    assert_same(found_in(tmp_path / "many").models[0].tensors, saved)
    index = tmp_path / "many" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_same(found_in(tmp_path / "many").models[0].tensors, saved)
    assert_same(found_in(index).models[0].tensors, saved)
    with pytest.raises(CheckpointError, match="a part of a network"):
        find(tmp_path / "many" / "pytorch_model-00001-of-00003.bin")
    torch.save({"x": Hostile(tmp_path / "marker")}, tmp_path / "many" / "pytorch_model-00002-of-00003.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin holds more than .*system"):
        find(tmp_path / "many")
    assert not (tmp_path / "marker").exists()


def test_the_one_that_hugging_face_would_read_is_read_and_the_others_noted(tmp_path: Path) -> None:
    shards(tmp_path)
    saved = save(tmp_path / "model.safetensors", network(5).state_dict())
    torch.save({}, tmp_path / "pytorch_model.bin")
    found = found_in(tmp_path)
    assert_same(found.models[0].tensors, network(5).state_dict())
    (note,) = found.notes
    assert "other weights beside them were not read: model-00001-of-00003.safetensors" in note
    assert note.endswith("and 1 more")
    saved.unlink()
    assert_same(found_in(tmp_path).models[0].tensors, network().state_dict())


def test_the_links_of_the_hub_s_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shards(blobs)
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"hash{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{i}")
    assert_same(found_in(snapshot).models[0].tensors, network().state_dict())


def test_folders_of_something_else_are_left_to_others(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    save(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    assert found_in(tmp_path).models[0].tensors.keys() == {"x"}
    save(tmp_path / "b.safetensors", {"y": torch.ones(2)})
    assert find(tmp_path) is None
    torch.save({"x": torch.ones(2)}, tmp_path / "model.pt")
    assert find(tmp_path / "model.pt") is None


# What is beside --------------------------------------------------------------------------------------------------------


def test_damaged_settings_beside_are_noted_and_hostile_ones_named(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", network().state_dict())
    (tmp_path / "config.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "trainer_state.json")
    torch.save(Hostile(tmp_path / "marker"), tmp_path / "optimizer.pt")
    torch.save(Hostile(tmp_path / "marker"), tmp_path / "training_args.bin")
    torch.save(Hostile(tmp_path / "marker"), tmp_path / "rng_state.pth")
    found = found_in(tmp_path)
    assert_same(found.models[0].tensors, network().state_dict())
    said = "\n".join(found.notes)
    assert "config.json was not read" in said
    assert "nested too deeply" in said
    assert "trainer_state.json is not a regular file" in said
    assert "the optimizer's state was not read" in said
    assert "system" in said
    assert not (tmp_path / "marker").exists()
    assert found.models[0].optimizer is None


@pytest.mark.parametrize("value", [-1, 1.5, "7", None, True, 10**30, [], {}])
def test_settings_that_cannot_be_are_left_out(tmp_path: Path, value: Any) -> None:
    save(tmp_path / "model.safetensors", network().state_dict())
    state = {
        "global_step": value,
        "epoch": value if value != 1.5 else -2,
        "train_batch_size": value,
        "log_history": value,
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": value, "architectures": value, "quantization_config": value})
    )
    found = found_in(tmp_path)
    assert found.step is None
    assert found.facts.keys() <= {"model_type"}


def test_quantised_and_adapted_networks_are_said_to_be(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors", {"lora": torch.ones(2)})
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    said = "\n".join(found_in(tmp_path).notes)
    assert "quantised (gptq)" in said
    assert "an adapter's weights" in said


# Damaged and hostile ---------------------------------------------------------------------------------------------------


def write(path: Path, header: dict[str, Any] | str | bytes, size: int, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(size))
    return path


def entry(start: int, stop: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


BAD: dict[str, tuple[Any, int, str]] = {
    "no table": ("[]", 0, "no safetensors file"),
    "no JSON": ('{"a"', 0, "damaged"),
    "nested": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", 0, "nested too deeply"),
    "no UTF-8": (b'{"\xff": 1}', 0, "damaged"),
    "twice": (json.dumps({"a": entry(0, 4), "b": entry(4, 8)}).replace('"b"', '"a"'), 8, "lists 'a' twice"),
    "NaN": ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, NaN]}}', 4, "NaN"),
    "fractions": ({"a": entry(0, 4, [1.0])}, 4, "does not say type, shape and place"),
    "negative": ({"a": entry(0, 4, [-1])}, 4, "does not say"),
    "a bool": ({"a": entry(0, 4, [True])}, 4, "does not say"),
    "beyond all": ({"a": entry(0, 10**30, [1])}, 4, "does not say"),
    "backwards": ({"a": entry(4, 0, [1])}, 4, "needs 4 bytes"),
    "too short": ({"a": entry(0, 4, [2])}, 4, "needs 8 bytes"),
    "overflowing": ({"a": entry(0, 0, [0, 2**47, 2**47])}, 0, "damaged"),
    "unknown type": ({"a": entry(0, 4, dtype="I128")}, 4, "type I128"),
    "no type": ({"a": entry(0, 4, dtype=7)}, 4, "does not say"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps another"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "'b' leaves a gap of 4 bytes"),
    "cut": ({"a": entry(0, 8)}, 4, "is cut short"),
    "overlong": ({"a": entry(0, 8)}, 9, "overlong"),
    "a list": ({"a": [1]}, 0, "does not say"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "no table of strings"),
    "no places": ({"__metadata__": {"DCP_SHARDING_INFO": "{}"}, "a": entry(0, 4)}, 4, "where 'a' belongs"),
    "bad places": ({"__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [1, 2]}}'}, "a": entry(0, 4)}, 4, "where 'a' belongs"),
    "far places": ({"__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [140737488355328]}}'}, "a": entry(0, 4)}, 4, "not whole"),
    "empty": ("{}", 0, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_headers_are_refused(tmp_path: Path, name: str) -> None:
    header, size, message = BAD[name]
    path = write(tmp_path / "model.safetensors", header, size)
    for place in (path, tmp_path):
        with pytest.raises(CheckpointError, match=message) as raised:
            find(place)
        assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize("length", [0, 1, 7, 10**6, 2**31, 2**63, 2**64 - 1])
def test_lengths_of_headers_that_cannot_be(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "model.safetensors", {"a": entry(0, 4)}, 4, length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        find(path)


def test_a_long_header_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 33) + b"{")
    os.truncate(path, 1 << 34)
    with pytest.raises(CheckpointError, match="more than"):
        find(path)


@pytest.mark.parametrize("size", range(0, 12))
def test_files_cut_to_nothing(tmp_path: Path, size: int) -> None:
    path = save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        find(path)


def test_tensors_larger_than_memory_are_found_without_being_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.safetensors", {"large": entry(0, 1 << 36), "small": entry(1 << 36, (1 << 36) + 4)}, 0
    )
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.truncate(file.tell() + (1 << 36) + 4)
    tensors = found_in(path).models[0].tensors
    assert tensors["large"].num_bytes == 1 << 36
    assert tensors["small"].read().tolist() == [0.0]


def test_a_file_that_is_cut_after_it_was_found_ends_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"a": torch.ones(100_000)})
    stored = found_in(path).models[0].tensors["a"]
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="cut short"):
        stored.read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        stored.read()


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            find(place)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        find(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        find(tmp_path)


WRONG: dict[str, tuple[Any, str]] = {
    "no map": ({}, "no weight_map"),
    "an empty map": ({"weight_map": {}}, "no weight_map"),
    "a list": ([], "no object"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "twice": ('{"weight_map": {"a": "b", "a": "c"}}', "twice"),
    "a number": ({"weight_map": {"0.weight": 7}}, "does not say in which file"),
    "parent": ({"weight_map": {"0.weight": "../secret.safetensors"}}, "outside its folder"),
    "absolute": ({"weight_map": {"0.weight": "SECRET"}}, "outside its folder"),
    "link": ({"weight_map": {"0.weight": "link.safetensors"}}, "outside its folder"),
    "null": ({"weight_map": {"0.weight": "a\0b"}}, "names a file by"),
    "nothing": ({"weight_map": {"0.weight": ""}}, "names a file by|not a regular file"),
    "long": ({"weight_map": {"0.weight": "x" * 5000}}, "missing|cannot be read"),
    "device": ({"weight_map": {"0.weight": "/dev/zero"}}, "outside its folder"),
    "folder": ({"weight_map": {"0.weight": "."}}, "not a regular file|outside"),
    "other file": ({"weight_map": {"0.weight": "model-00002-of-00003.safetensors"}}, "lacks '0.weight'"),
    "unknown name": ({"weight_map": {"x": "model-00001-of-00003.safetensors"}}, "lacks 'x'"),
    "missing": ({"weight_map": {"0.weight": "gone.safetensors"}}, "gone.safetensors.* is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_indices_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    secret = save(tmp_path / "secret.safetensors", {"0.weight": torch.zeros(7, 3)})
    folder = tmp_path / "folder"
    shards(folder)
    (folder / "link.safetensors").symlink_to(secret)
    text = content if isinstance(content, str) else json.dumps(content).replace("SECRET", str(secret))
    (folder / "model.safetensors.index.json").write_text(text)
    for place in (folder, folder / "model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=message):
            find(place)


def test_counts_of_shards_that_cannot_be(tmp_path: Path) -> None:
    save(tmp_path / "model-00001-of-999999999.safetensors", parts()[0])
    with pytest.raises(CheckpointError, match=r"model-00002-of-999999999\.safetensors is missing"):
        find(tmp_path)
    (tmp_path / "model-00001-of-999999999.safetensors").unlink()
    save(tmp_path / "model-00001-of-00002.safetensors", parts()[0])
    save(tmp_path / "model-00002-of-00003.safetensors", parts()[1])
    with pytest.raises(CheckpointError, match="several networks"):
        find(tmp_path)


def changed(text: str, rng: random.Random) -> str:
    """A header with tensors that have got each other's places, other shapes or types: for the most part whole still."""
    header = json.loads(text)
    names = [name for name in header if name != "__metadata__"]
    places = rng.sample(names, len(names))
    made = {name: dict(header[place]) for name, place in zip(names, places, strict=True)}
    one = made[rng.choice(names)]
    one["shape"] = rng.choice([one["shape"][::-1], [*one["shape"], 1], one["shape"][1:]])
    one["dtype"] = rng.choice(["F32", "I32", "U32", "I64", "BF16"])
    return json.dumps(made)


def test_what_is_accepted_is_what_the_library_reads(tmp_path: Path) -> None:
    """Headers with values changed, moved or doubled: both refuse, or both read the same."""
    whole = safetensors.torch.save(network().state_dict(), {"format": "pt"})
    length = struct.unpack("<Q", whole[:8])[0]
    accepted = refused = 0
    for number in range(600):
        rng = random.Random(f"header {number}")
        text = rng.choice([edit_json, changed])(whole[8 : 8 + length].decode(), rng).encode(errors="replace")
        path = write(tmp_path / "model.safetensors", text + whole[8 + length :], 0, len(text))
        try:
            theirs = safetensors.torch.load_file(path)
        except safetensors.SafetensorError:
            theirs = None
        try:
            ours = read_header(path)
        except CheckpointError as error:
            refused += 1
            if theirs is not None and "twice" not in str(error):
                pytest.fail(f"refused what the library reads: {error}")
            continue
        accepted += 1
        assert theirs is not None
        tensors = found_in(path).models[0].tensors
        assert_same({name: tensors[name] for name in ours.places}, theirs)
    assert min(accepted, refused) > 100
