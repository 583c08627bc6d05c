"""Where one process's shard of a tensor belongs in the whole, from what its file notes of a DTensor or a ShardedTensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.device_mesh import LARGEST_MESH, Mesh, mesh_of
from landscape.checkpoints.importers.notes import Made, Named, attributes, whole_numbers
from landscape.checkpoints.importers.torch_archive import DTYPES, FROM_TYPE, TENSOR_NAMES, Archive, Place, place_of

SHARDED = "torch.distributed._shard.sharded_tensor"
_MODULES = (
    "torch.distributed.tensor",
    "torch.distributed.tensor._api",
    "torch.distributed._tensor",
    "torch.distributed._tensor.api",
)
_SPECS = (
    "torch.distributed.tensor._dtensor_spec",
    "torch.distributed._tensor._dtensor_spec",
    "torch.distributed._tensor.placement_types",
)
_PLACEMENTS = ("torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types")
DTENSORS = frozenset(f"{module}.DTensor" for module in _MODULES)
SHARDED_TENSOR = f"{SHARDED}.api.ShardedTensor"

NAMES = TENSOR_NAMES | frozenset(
    {
        FROM_TYPE, "torch._utils._rebuild_wrapper_subclass", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
        *DTENSORS, *(f"{m}.{n}" for m in _SPECS for n in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")),
        *(f"{m}.{n}" for m in _PLACEMENTS for n in ("Shard", "Replicate", "Partial", "_Partial", "_StridedShard", "_MaskPartial")),
        "torch.distributed.device_mesh.DeviceMesh", "torch.distributed._tensor.device_mesh.DeviceMesh",
        "torch.distributed._mesh_layout._MeshLayout", "torch.distributed._mesh_layout._FlatLayout",
        SHARDED_TENSOR, f"{SHARDED_TENSOR}.ProcessGroupState", f"{SHARDED}.shard.Shard", f"{SHARDED}.metadata.ShardedTensorMetadata",
        f"{SHARDED}.metadata.TensorProperties", f"{SHARDED}.metadata.MEM_FORMAT_ENCODING", "torch.distributed._shard.metadata.ShardMetadata",
        *(f"{SHARDED}.metadata.MEM_FORMAT_ENCODING.TORCH_{f}" for f in ("CONTIGUOUS_FORMAT", "CHANNELS_LAST", "PRESERVE_FORMAT")),
        "torch.distributed._shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec", "torch.distributed._shard.sharding_spec.api.EnumerableShardingSpec",
        "torch.distributed.remote_device._remote_device", "builtins.getattr",
    }
)  # fmt: skip
"""What the structure of a file of sharded tensors may name."""

LARGEST_FACTOR = 64
"""Pieces of a strided shard beyond which it is refused."""

LARGEST_COUNT = 1000
"""Meshes of one file beyond which it is refused."""

Runs = tuple[tuple[int, int], ...]
"""Indices along an axis, as the half-open intervals that they form."""


Meshes = dict[int, tuple[Made, Mesh]]
"""Those met in a file, by the identity of the note of each, which is kept beside so that it stays one."""


@dataclass(frozen=True)
class Local:
    """One process's share of a tensor.

    Attributes:
        shape: of the whole.
        dtype: its type.
        parts: (offsets in the whole, where it lies) of each part that this process holds.
        rank: of the process, where it is told.
        members: ranks among which the tensor is spread, where they are told.
        replica: coordinates along the axes of the mesh along which the tensor is replicated; empty where these are not told.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[tuple[int, ...], Place], ...]
    rank: int | None
    members: frozenset[int]
    replica: tuple[int, ...] = ()


def is_sharded(value: object) -> bool:
    """Whether a file notes a DTensor or a ShardedTensor there."""
    return _kind(value) in (*DTENSORS, SHARDED_TENSOR)


def _kind(value: object) -> str:
    known = isinstance(value, Made) and value.name == FROM_TYPE and len(value.arguments) == 4
    kind = value.arguments[1] if known and isinstance(value, Made) else None
    return kind.name if isinstance(kind, Named) else ""


def local_of(value: Any, within: Archive, source: str, meshes: Meshes) -> Local:
    """What one process holds of a sharded tensor.

    Args:
        value: what a file notes of it.
        within: the file.
        source: names the tensor in messages.
        meshes: of the file, extended by those that are met first here.

    Raises:
        CheckpointError: it is damaged, or sharded in a way that is not read.
    """
    arguments, state = value.arguments[2], value.arguments[3]
    given = arguments if isinstance(arguments, tuple) and len(arguments) >= 3 else (None, None, None)
    dtype = DTYPES.get(given[1].name) if isinstance(given[1], Named) else None
    shape = whole_numbers(given[2])
    if shape is None or dtype is None:
        raise CheckpointError(f"{source} is damaged, or of a type that is not read")
    if _kind(value) == SHARDED_TENSOR:
        return _sharded_tensor(shape, dtype, state, within, source)
    return _dtensor(shape, dtype, attributes(state), within, source, meshes)


def _dtensor(
    shape: tuple[int, ...], dtype: torch.dtype, state: dict[str, Any], within: Archive, source: str, meshes: Meshes
) -> Local:
    spec = state["_spec"].attributes() if isinstance(state.get("_spec"), Made) else {}
    place = place_of(state.get("_local_tensor"), within, source)
    placements, noted = spec.get("placements"), spec.get("mesh")
    if (
        place is None
        or not isinstance(noted, Made)
        or not isinstance(placements, tuple | list)
        or not len(placements) <= 16
        or not all(isinstance(placement, Made) for placement in placements)
    ):
        raise CheckpointError(
            f"{source} is a DTensor of a make that is not read; gather it with full_tensor() before saving"
        )
    if id(noted) not in meshes:
        if len(meshes) == LARGEST_COUNT:
            raise CheckpointError(
                f"{source}: the file has more than {LARGEST_COUNT} meshes of processes; it is not read"
            )
        meshes[id(noted)] = noted, mesh_of(noted.attributes(), within, source)
    mesh = meshes[id(noted)][1]
    if len(placements) != len(mesh.extent):
        raise CheckpointError(f"{source} is damaged: {len(placements)} placements on a mesh of {len(mesh.extent)} axes")
    _check_order(spec.get("shard_order"), source)
    cuts = [_placement(placement, len(shape), source) for placement in placements]
    offsets, sizes = box(shape, mesh.extent, mesh.coordinate, cuts, source)
    if place.shape != sizes or place.dtype != dtype:
        raise CheckpointError(
            f"{source} holds {list(place.shape)} of {place.dtype}, but its placements announce {list(sizes)} of {dtype}"
        )
    replica = tuple(at for at, cut in zip(mesh.coordinate, cuts, strict=True) if cut is None)
    return Local(shape, dtype, ((offsets, place),), mesh.rank, mesh.members, replica)


def _placement(placement: Made, axes: int, source: str) -> tuple[int, int] | None:
    """(axis, split factor) of a shard; None of a replica."""
    kind = placement.name.rpartition(".")[2]
    if kind == "Replicate":
        return None
    if kind not in ("Shard", "_StridedShard"):
        raise CheckpointError(
            f"{source} is a partial result ({kind[:50]}), whose value is the sum of all processes'; gather it with full_tensor()"
        )
    said = placement.attributes()
    axis = said.get("dim", placement.arguments[0] if placement.arguments else None)
    factor = (
        said.get("split_factor", placement.arguments[1] if len(placement.arguments) > 1 else 1)
        if kind == "_StridedShard"
        else 1
    )
    if type(axis) is not int or not 0 <= axis < axes or type(factor) is not int or not 1 <= factor <= LARGEST_FACTOR:
        raise CheckpointError(f"{source} is damaged: it is sharded along axis {axis!r:.20} with factor {factor!r:.20}")
    return axis, factor


def _check_order(order: object, source: str) -> None:
    """Axes that several axes of the mesh cut are cut in their order, unless it is said otherwise."""
    entries = order if isinstance(order, tuple | list) and len(order) <= 64 else ()
    for entry in entries:
        dims = whole_numbers(entry.arguments[1]) if isinstance(entry, Made) and len(entry.arguments) == 2 else None
        if dims is not None and list(dims) != sorted(dims):
            raise CheckpointError(
                f"{source} is sharded over axes of its mesh in the order {list(dims)}; gather it with full_tensor() before saving"
            )


def box(
    shape: Sequence[int],
    extent: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[tuple[int, int] | None],
    source: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the shard that the process at a coordinate of the mesh has.

    Each axis of the mesh in turn cuts what the ones before left, into as many pieces as it has processes, of equal length but for the
    last ones (torch.chunk). A strided shard first cuts into `factor` pieces and takes its share of each, which axes of the mesh after it
    then part again (FSDP2 over tensor parallelism); shards that are no box in the end are refused.

    >>> box((5, 6), (2,), (1,), [(0, 1)], "w"), box((8,), (2, 2), (1, 0), [(0, 2), (0, 1)], "w")
    (((3, 0), (2, 6)), ((2,), (2,)))
    """
    runs: list[Runs] = [((0, size),) if size else () for size in shape]
    for placement, count, at in zip(placements, extent, coordinate, strict=True):
        if placement is not None:
            axis, factor = placement
            if factor > 1 and len(runs[axis]) > 1:
                raise CheckpointError(
                    f"{source} is a strided shard of a strided shard; gather it with full_tensor() before saving"
                )
            pieces = [_piece(runs[axis], factor, j) for j in range(factor)] if factor > 1 else [runs[axis]]
            runs[axis] = _merged([run for piece in pieces for run in _piece(piece, count, at)])
    if any(len(along) > 1 for along in runs):
        raise CheckpointError(
            f"{source} is a strided shard, whose numbers are not next to each other; gather it with full_tensor() before saving"
        )
    begin = tuple(along[0][0] if along else 0 for along in runs)
    return begin, tuple(along[0][1] - along[0][0] if along else 0 for along in runs)


def _piece(runs: Runs, count: int, at: int) -> Runs:
    """The at-th of `count` pieces, as torch.chunk cuts."""
    length = -(-sum(end - begin for begin, end in runs) // count)
    first, last = at * length, (at + 1) * length
    found, passed = [], 0
    for begin, end in runs:
        low, high = max(begin, begin + first - passed), min(end, begin + last - passed)
        if low < high:
            found.append((low, high))
        passed += end - begin
    return tuple(found)


def _merged(runs: Sequence[tuple[int, int]]) -> Runs:
    merged: list[tuple[int, int]] = []
    for begin, end in runs:
        if merged and merged[-1][1] == begin:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((begin, end))
    return tuple(merged)


def _sharded_tensor(shape: tuple[int, ...], dtype: torch.dtype, state: Any, within: Archive, source: str) -> Local:
    """FSDP1's: each shard says its offsets itself."""
    shards = state[0] if isinstance(state, tuple) and len(state) >= 3 else None
    if not isinstance(shards, list) or len(shards) > LARGEST_MESH:
        raise CheckpointError(f"{source} is a ShardedTensor of a make that is not read")
    parts = []
    for shard in shards:
        said = shard.attributes() if isinstance(shard, Made) else {}
        where = said["metadata"].attributes() if isinstance(said.get("metadata"), Made) else {}
        offsets, sizes = whole_numbers(where.get("shard_offsets")), whole_numbers(where.get("shard_sizes"))
        place = place_of(said.get("tensor"), within, source)
        if place is None or offsets is None or sizes is None or place.shape != sizes or place.dtype != dtype:
            raise CheckpointError(
                f"{source} is damaged: a shard does not say where it belongs, or is of another shape than it says"
            )
        parts.append((offsets, place))
    group = state[2]
    said = group.attributes() if isinstance(group, Made) else {}
    numbers = (
        whole_numbers(group.arguments, LARGEST_MESH) if isinstance(group, Made) and len(group.arguments) == 4 else None
    )
    rank = said.get("global_rank", numbers[1] if numbers else None)
    size = said.get("global_world_size", numbers[3] if numbers else None)
    if not isinstance(rank, int) or not isinstance(size, int) or not 0 <= rank < size <= LARGEST_MESH:
        return Local(shape, dtype, tuple(parts), None, frozenset())
    return Local(shape, dtype, tuple(parts), rank, frozenset(range(size)))
