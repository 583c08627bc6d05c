"""Results on disk come back as they were, and may be joined and written again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from landscape.results import load_dataset, save_dataset


def test_texts_of_joined_files_are_not_cut(tmp_path: Path) -> None:
    """The first file's texts are shorter than the second's: written again, none is cut to the first's length."""
    for name in ("slow", "converged"):
        save_dataset(xr.Dataset({"outcome": ("replica", np.array([name]))}), tmp_path / f"{name}.nc")
    parts = [load_dataset(tmp_path / f"{name}.nc") for name in ("slow", "converged")]
    save_dataset(xr.concat(parts, "replica"), tmp_path / "joined.nc")
    assert load_dataset(tmp_path / "joined.nc")["outcome"].values.tolist() == ["slow", "converged"]
