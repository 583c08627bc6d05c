"""Measurements on disk: labelled arrays in netCDF-4, written whole or not at all. The only writer of measurements."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from landscape.checkpoints.format import CheckpointError, sync_folder
from landscape.provenance import provenance


def stamp(dataset: xr.Dataset, **attributes: Any) -> xr.Dataset:
    """The data set with provenance and further attributes on it; None is left out."""
    extra = {k: v for k, v in attributes.items() if v is not None}
    return dataset.assign_attrs({**{f"provenance_{k}": v for k, v in provenance().items()}, **extra})


def save_dataset(dataset: xr.Dataset, path: Path) -> None:
    """Write one labelled data set."""
    save_groups({"/": dataset}, path)


def save_groups(groups: Mapping[str, xr.Dataset], path: Path) -> None:
    """Write named groups of one file, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        xr.DataTree.from_dict(dict(groups)).to_netcdf(beside, engine="h5netcdf")
        descriptor = os.open(beside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def load_groups(path: str | Path) -> dict[str, xr.Dataset]:
    """All groups of a file, read into memory: {name: data set}, "/" the root; {} where there is no file.

    How a file stored its variables is forgotten: data sets joined from several files would be written as the first file's were, and texts cut
    to the length of its longest.
    """
    path = Path(path)
    if not path.exists():
        return {}
    try:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            return {node.path.strip("/") or "/": _whole(node).load().drop_encoding() for node in tree.subtree}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _whole(node: xr.DataTree) -> xr.Dataset:
    """A group with the coordinates of its dimensions, of which a file keeps those that are the parent's with the parent alone."""
    own, inherited = node.to_dataset(inherit=False), node.to_dataset(inherit=True).coords
    shared = {
        name: c for name, c in inherited.items() if name not in own.coords and c.dims and set(c.dims) <= set(own.dims)
    }
    return own.assign_coords(shared)


def load_dataset(path: str | Path) -> xr.Dataset:
    """The root data set of a file."""
    return load_groups(path)["/"]
