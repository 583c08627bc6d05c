"""The mesh of processes among which a DTensor is spread, from what a file notes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from landscape.checkpoints.format import CheckpointError
from landscape.checkpoints.importers.notes import Made, whole_numbers
from landscape.checkpoints.importers.torch_archive import Archive, place_of

LARGEST_MESH = 1 << 16
"""Processes of a mesh beyond which it is refused."""


@dataclass(frozen=True)
class Mesh:
    """A mesh of processes, as one of them noted it.

    Attributes:
        extent: how many there are along each of its axes.
        members: their ranks, where they are told.
        coordinate: where in it the process that wrote the file is.
        rank: of that process, where it is told.
    """

    extent: tuple[int, ...]
    members: frozenset[int]
    coordinate: tuple[int, ...]
    rank: int | None


def mesh_of(said: dict[str, Any], within: Archive, source: str) -> Mesh:
    """A mesh as torch 2.11 and later note it (a layout and the ranks that it lays out), or as earlier ones did (a tensor of ranks)."""
    old = place_of(said.get("mesh"), within, source)
    extent = old.shape if old is not None else _extent(said.get("_layout"))
    if extent is None or len(extent) > 16 or math.prod(extent) > LARGEST_MESH:
        raise CheckpointError(
            f"{source} has a mesh of processes of a make that is not read; gather it with full_tensor() before saving"
        )
    ranks = said.get("_flatten_rank_map")
    if old is not None and not old.dtype.is_floating_point and not old.dtype.is_complex:
        tensor = torch.empty(old.shape, dtype=old.dtype)
        old.fill(tensor)
        ranks = tuple(tensor.flatten().tolist())
    members: tuple[int, ...] = ()
    if isinstance(ranks, tuple) and len(ranks) <= LARGEST_MESH and all(_is_rank(rank) for rank in ranks):
        members = ranks
    rank = said["_rank"] if _is_rank(said.get("_rank")) else None
    if rank is not None and members and rank not in members:
        raise CheckpointError(f"{source} is damaged: it is of rank {rank}, which is not in its mesh of processes")
    coordinate = whole_numbers(said.get("_coordinate_on_dim"))
    if coordinate is None or len(coordinate) != len(extent):
        raise CheckpointError(
            f"{source} does not say where in its mesh of processes it is; gather it with full_tensor() before saving"
        )
    if any(at >= size for at, size in zip(coordinate, extent, strict=True)):
        raise CheckpointError(f"{source} is damaged: it is at {list(coordinate)} of a mesh of {list(extent)} processes")
    if rank is None and old is not None and math.prod(extent) == len(members):
        rank = members[sum(at * math.prod(extent[axis + 1 :]) for axis, at in enumerate(coordinate))]
    return Mesh(extent, frozenset(members), coordinate, rank)


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 <= value < LARGEST_MESH


def _extent(layout: object) -> tuple[int, ...] | None:
    """How many processes a layout has along each axis; an axis may be several that were flattened."""
    said = layout.attributes() if isinstance(layout, Made) else {}
    axes = said.get("axes")
    if isinstance(axes, tuple | list):
        shapes = [axis.attributes().get("shape") if isinstance(axis, Made) else None for axis in axes[:17]]
    else:
        shape = said.get("shape")
        shapes = (
            [size if isinstance(size, tuple) else (size,) for size in shape[:17]]
            if isinstance(shape, tuple)
            else [None]
        )
    found = [whole_numbers(shape, LARGEST_MESH) for shape in shapes]
    sizes = [math.prod(shape) for shape in found if shape is not None]
    return tuple(sizes) if len(sizes) == len(found) else None
