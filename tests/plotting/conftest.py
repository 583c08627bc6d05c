"""Real runs of a tiny task, measured, and a stability map of it: what the figures and the report are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import xarray as xr

    from landscape.plotting.view import RunView
    from landscape.tasks import Task

RUNS = {
    "ssgd": {"algorithm": "ssgd"},
    "ssgd-star": {"algorithm": "ssgd-star", "sigma0": 0.05},
    "dpsgd": {"algorithm": "dpsgd"},
    "dpsgd-atc": {"algorithm": "dpsgd", "order": "atc"},
}
RATE_AND_NOISE = ("effective-learning-rate", "noise")
SMALL = {"num_learners": 4, "local_batch_size": 8, "dtype": "float64", "log_every": 10}


@pytest.fixture(scope="session")
def known_task(tiny_task: Task) -> Iterator[Task]:
    """The tiny task under a name that runs can be measured by."""
    from landscape.tasks import TASKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, tiny_task.name, tiny_task)
        yield tiny_task


def make_views(task: Task, folder: Path, measures: dict[str, tuple[str, ...]]) -> list[RunView]:
    """Runs of 80 steps at a rate where AWC's local quadratic is unstable, each with some measures at steps 20, 40 and 60."""
    from landscape.experiments.checkpoint import MeasureConfig
    from landscape.experiments.measure import measure
    from landscape.experiments.train import train
    from landscape.plotting.view import load_view
    from landscape.training.config import TrainConfig

    settings = MeasureConfig(num_draws=6, num_smoothing_samples=4, num_eigenpairs=3)
    found = []
    for name, wanted in measures.items():
        config = TrainConfig(**{**SMALL, "learning_rate": 1.5, "num_steps": 80, "checkpoint_every": 20, "seed": 3, **RUNS[name]})  # fmt: skip
        run = train(task, config, folder / name, quiet=True)
        measure(run, wanted, [20, 40, 60], settings=settings, quiet=True)
        found.append(load_view(folder / name))
    return found


@pytest.fixture(scope="session")
def views(known_task: Task, tmp_path_factory: pytest.TempPathFactory) -> list[RunView]:
    """SSGD and DPSGD with every measure; SSGD* and DPSGD (ATC) with their rate and noise."""
    from landscape.experiments.measures import DEFAULT_MEASURES

    measures = {name: DEFAULT_MEASURES if name in ("ssgd", "dpsgd") else RATE_AND_NOISE for name in RUNS}
    return make_views(known_task, tmp_path_factory.mktemp("runs"), measures)


@pytest.fixture(scope="session")
def dpsgd(views: list[RunView]) -> RunView:
    """The DPSGD run."""
    return next(v for v in views if v.label == "dpsgd")


@pytest.fixture(scope="session")
def ssgd(views: list[RunView]) -> RunView:
    """The SSGD run."""
    return next(v for v in views if v.label == "ssgd")


@pytest.fixture(scope="session")
def mapped(known_task: Task, tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """A map of three variants at three rates over four seeds, SSGD* at one of the rates only; the largest rate overflows."""
    import xarray as xr

    from landscape.experiments.sweep import Variant, stability_map
    from landscape.training.config import TrainConfig

    config = TrainConfig(**{**SMALL, "algorithm": "dpsgd", "learning_rate": 0.1, "num_steps": 60, "dtype": "float32"})
    out = tmp_path_factory.mktemp("map")
    both = [Variant("ssgd"), Variant("dpsgd")]
    result = stability_map(known_task, config, both, [0.02, 0.5, 1e38], range(4), out, quiet=True)
    star = stability_map(known_task, config, [Variant("ssgd-star", sigma0=0.05)], [0.5], range(4), out, quiet=True)
    fill = {"outcome": "", "diverged_at": -1}
    return xr.concat([result, star], "variant", join="outer", fill_value=fill, combine_attrs="override")
