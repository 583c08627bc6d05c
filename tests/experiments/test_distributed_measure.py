"""A run measured by several processes: every number as by one, and mistakes told once."""

import dataclasses
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import xarray as xr

from landscape.checkpoints.format import MEASUREMENTS_FILE
from landscape.data.dataset import TensorData
from landscape.experiments.checkpoint import MeasureConfig
from landscape.experiments.measure import measure
from landscape.experiments.measures import MEASURES
from landscape.experiments.train import train
from landscape.experiments.trajectory import run_flatness
from landscape.models import mlp
from landscape.results import load_groups
from landscape.tasks import Task
from landscape.training.config import TrainConfig

LIGHT = MeasureConfig(num_draws=6, num_smoothing_samples=4, num_eigenpairs=4, max_matvecs=20, smoothing_matvecs=4)
SPILLED = dataclasses.replace(LIGHT, memory_gb=1e-6, num_gradient_examples=32, num_covariance_examples=30)
RATES = ("effective-learning-rate", "noise", "covariance", "alignment", "alignment-by-layer")
BASE = TrainConfig("dpsgd", 0.3, num_learners=4, local_batch_size=8, num_steps=24, checkpoint_every=1, dtype="float64")
CTA = dataclasses.replace(BASE, order="cta", momentum=0.9, checkpoint_every=24)
FEW = dataclasses.replace(BASE, local_batch_size=2, num_learners=2, checkpoint_every=24)
STAR = dataclasses.replace(BASE, algorithm="ssgd-star", sigma0=0.05, checkpoint_every=24)


def tiny(count: int = 40, *, broken: bool = False) -> Task:
    """The task of conftest's `tiny_task`, so that other processes can build it too."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    targets = torch.randint(0, 3, (count,), generator=generator)
    inputs = centres[targets] + torch.randn(count, 6, generator=generator, dtype=torch.float64)
    if broken:
        inputs[-1] = math.nan
    data = TensorData(inputs, targets, "tiny")
    return Task(
        name="tiny", description="random examples", build_model=partial(mlp, (6, 5, 3), "tanh"),
        loss_fn=torch.nn.functional.cross_entropy, load_data=lambda root: (data, data), threshold=0.7, constant_loss=math.log(3),
    )  # fmt: skip


def measured(folder: Path, out: str) -> dict[str, dict[str, xr.Dataset]]:
    """Everything that is compared; each result goes to a run directory of its own."""
    named: dict[str, tuple[str, int, dict[str, Any]]] = {
        "all": ("run", 40, {"measures": tuple(MEASURES), "steps": (24,), "settings": LIGHT}),
        "spilled": ("run", 40, {"measures": RATES, "steps": (12,), "settings": SPILLED}),
        "cta": (
            "cta",
            40,
            {"measures": ("effective-learning-rate", "stability", "ledger"), "steps": (24,), "settings": LIGHT},
        ),
        "star": (
            "star",
            40,
            {
                "measures": ("noise", "smoothing", "covariance"),
                "steps": (24,),
                "settings": dataclasses.replace(LIGHT, num_draws=2),
            },
        ),
        "few": ("few", 2, {"measures": RATES, "steps": (24,), "settings": dataclasses.replace(LIGHT, num_draws=2)}),
    }
    found = {}
    for name, (run, count, options) in named.items():
        found[name] = measure(folder / out / name / run, task=tiny(count), quiet=True, **options)
    return found


def copied(folder: Path, out: str) -> None:
    """A run directory for each of the above."""
    for name, run in (("all", "run"), ("spilled", "run"), ("cta", "cta"), ("star", "star"), ("few", "few")):
        subprocess.run(["cp", "-r", "--parents", run, str(folder / out / name)], cwd=folder, check=True)


def mistakes(folder: Path) -> list[str]:
    run = folder / "run"
    said = []
    for where, options in (
        (folder / "nowhere", {}),
        (run, {"steps": (7, 99)}),
        (run, {"measures": ("sharpness",)}),
        (run, {"task": tiny(39)}),
        (run, {"task": tiny(broken=True), "allow_other_data": True, "steps": (24,)}),
        (run, {"settings": dataclasses.replace(LIGHT, num_draws=1), "steps": (24,)}),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            measure(where, **{"task": tiny(), "quiet": True, **options})
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    return said


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    found = {
        "measured": measured(Path(folder), f"{size}-ranks"),
        "mistakes": mistakes(Path(folder)),
        "flatness": run_flatness(Path(folder) / "run", num_directions=3, task=tiny()).variance,
        "started": torch.distributed.is_initialized(),
    }
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def compare(found: xr.Dataset, expected: xr.Dataset, where: str, *, exactly: bool) -> None:
    assert set(found.variables) == set(expected.variables), where
    for name, b in expected.variables.items():
        a = found.variables[name]
        assert a.dims == b.dims, (where, name)
        if exactly or b.dtype.kind not in "f":
            np.testing.assert_array_equal(a.values, b.values, err_msg=f"{where}, {name}")
            continue
        finite = np.abs(b.values[np.isfinite(b.values)])
        scale = finite.max() if finite.size else 0.0
        np.testing.assert_allclose(a.values, b.values, rtol=1e-9, atol=1e-9 * scale + ROUNDING.get(str(name), 0.0), err_msg=f"{where}, {name}")  # fmt: skip


ROUNDING = {"identity_error": 1e-12, "lambda_max_residual": 1e-12, "residual": 1e-12}
"""What is zero but for rounding, and how large that may be."""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_measure_what_one_process_measures(size: int, tmp_path: Path) -> None:
    for name, count, config in (("run", 40, BASE), ("cta", 40, CTA), ("star", 40, STAR), ("few", 2, FEW)):
        train(tiny(count), config, tmp_path / name, quiet=True)
    for out in ("alone", f"{size}-ranks"):
        (tmp_path / out).mkdir()
        for name in ("all", "spilled", "cta", "star", "few"):
            (tmp_path / out / name).mkdir()
        copied(tmp_path, out)
    expected = measured(tmp_path, "alone")
    torch.multiprocessing.spawn(work, (size, str(tmp_path)), nprocs=size)
    ranks = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(size)]
    for setting, groups in expected.items():
        path = next((tmp_path / f"{size}-ranks" / setting).iterdir()) / MEASUREMENTS_FILE
        on_disk = load_groups(path)
        assert on_disk.keys() - {"/"} == groups.keys()
        assert not list(path.parent.glob(".writing*"))
        for name, group in groups.items():
            where = f"{setting}, {name}"
            compare(on_disk[name], group, where, exactly=False)
            for found in ranks:
                compare(found["measured"][setting][name], ranks[0]["measured"][setting][name], where, exactly=True)
    no_run, no_step, no_measure, other_data, bad_data, few_draws = ranks[0]["mistakes"]
    assert all(found["mistakes"] == ranks[0]["mistakes"] for found in ranks)
    assert all(text.startswith("AgreedError: ") for text in ranks[0]["mistakes"][:-1])
    assert "nowhere" in no_run
    assert "no checkpoint of step 99" in no_step
    assert "no such measure: sharpness" in no_measure
    assert "trained on other data" in other_data
    assert f"the first of them example 39 (rank {size - 1} of {size})" in bad_data
    assert "num_draws must be at least 2" in few_draws
    alone = run_flatness(tmp_path / "run", num_directions=3, task=tiny()).variance
    np.testing.assert_allclose(ranks[0]["flatness"], alone, rtol=1e-9)
    assert all(found["started"] for found in ranks)  # a group that was there is left


def torchrun(folder: Path, *arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "landscape",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*command, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], timeout: float = 240.0) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        raise
    return process.returncode, out, err


FLAGS = ("--num-draws", "4", "--max-matvecs", "6", "--num-eigenpairs", "2", "--num-smoothing-samples", "2", "--smoothing-matvecs", "2",
         "--num-covariance-examples", "60", "--num-probes", "2")  # fmt: skip


@pytest.mark.slow
def test_torchrun_measures_a_run_of_real_digits(tmp_path: Path) -> None:
    config = TrainConfig(
        "dpsgd", 0.5, num_learners=3, local_batch_size=50, num_steps=4, checkpoint_every=1, dtype="float64"
    )
    path = train("mnist-mlp", config, tmp_path / "run", quiet=True).path
    subprocess.run(["cp", "-r", "run", "again"], cwd=tmp_path, check=True)
    names = ("effective-learning-rate", "noise", "curvature", "covariance", "ledger", "disagreement")
    status, out, err = ended(torchrun(tmp_path, "measure", "run", "--steps", "4", "--measures", *names, *FLAGS))
    assert status == 0, err
    assert out.count("Tr Sigma_w") == 1  # one table
    settings = MeasureConfig(num_draws=4, max_matvecs=6, num_eigenpairs=2, num_smoothing_samples=2, smoothing_matvecs=2,
                             num_covariance_examples=60, num_probes=2)  # fmt: skip
    alone = measure(tmp_path / "again", names, [4], settings=settings, quiet=True)
    for name, group in load_groups(path / MEASUREMENTS_FILE).items():
        if name != "/":
            compare(group, alone[name], name, exactly=False)

    status, out, err = ended(torchrun(tmp_path, "measure", "run", "--steps", "7"))
    assert status != 0
    assert len(re.findall("no checkpoint of step 7; there are 0, 1, 2, 3, 4", err)) == 1

    shorter = ("measure", "run", "--measures", "noise", "ledger", *FLAGS)
    process = torchrun(tmp_path, *shorter)
    deadline = time.monotonic() + 120
    while len(load_steps(path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # after the second of five steps
    status, out, err = ended(process)
    assert status != 0
    assert load_steps(path)  # whole
    status, out, err = ended(torchrun(tmp_path, *shorter))  # the rest
    assert status == 0, err
    assert load_steps(path) == [0, 1, 2, 3, 4]


def load_steps(path: Path) -> list[int]:
    """Steps at which a run's noise has been measured."""
    groups = load_groups(path / MEASUREMENTS_FILE)
    return groups["noise"]["step"].values.tolist() if "noise" in groups else []
