"""Results on disk come back as they were, and may be joined and written again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from landscape.results import load_dataset, load_groups, save_dataset, save_groups


def test_texts_of_joined_files_are_not_cut(tmp_path: Path) -> None:
    """The first file's texts are shorter than the second's: written again, none is cut to the first's length."""
    for name in ("slow", "converged"):
        save_dataset(xr.Dataset({"outcome": ("replica", np.array([name]))}), tmp_path / f"{name}.nc")
    parts = [load_dataset(tmp_path / f"{name}.nc") for name in ("slow", "converged")]
    save_dataset(xr.concat(parts, "replica"), tmp_path / "joined.nc")
    assert load_dataset(tmp_path / "joined.nc")["outcome"].values.tolist() == ["slow", "converged"]


def test_groups_that_share_a_coordinate_keep_it_each(tmp_path: Path) -> None:
    """A file keeps the coordinate of a group's dimension with the root alone where both have the same; read again, each has its own."""
    rates = [0.1, 0.2]
    root = xr.Dataset({"count": ("rate", [1, 2])}, coords={"rate": rates, "name": ("name", ["a"])})
    child = xr.Dataset({"loss": (("rate", "step"), np.zeros((2, 3)))}, coords={"rate": rates})
    save_groups(
        {"/": root, "map": child, "map/part": child.isel(step=0), "bare": xr.Dataset({"x": ((), 1.0)})},
        tmp_path / "all.nc",
    )
    kept = load_groups(tmp_path / "all.nc")
    for name, group in (("/", root), ("map", child), ("map/part", child.isel(step=0))):
        xr.testing.assert_identical(kept[name], group)
    assert list(kept["bare"].coords) == []
