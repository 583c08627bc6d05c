"""The commands of a report make the same run again: they are read by the program itself, and give the configuration back."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import tyro

from landscape.cli.runs import MeasureName
from landscape.plotting.commands import WIDTH, measure_commands, reproduce_commands, train_command
from landscape.training.config import TrainConfig
from tests.plotting.made import made_view, rates, steepness


def read(command: str, kind: type) -> Any:
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("landscape", kind.__name__.lower())
    return tyro.cli(kind, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"algorithm": "ssgd", "learning_rate": 0.1, "num_learners": 4, "local_batch_size": 32, "seed": 7},
        {"order": "atc", "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "schedule": "warmup:5+step:30,60:0.1"},
        {"algorithm": "ssgd-star", "sigma0": 0.05, "noise_zero_sum": True},
        {"topology": "one-peer-exponential", "num_learners": 8, "gamma": 0.5, "dtype": "float64", "evaluation_examples": 0},
        {"algorithm": "local-sgd", "local_steps": 4, "log_every": 1, "checkpoint_every": 0},
    ],
)  # fmt: skip
def test_the_command_to_train_gives_the_configuration_back(tmp_path: Path, config: dict[str, Any]) -> None:
    from landscape.cli.runs import Train

    view = made_view(tmp_path, **config)
    found = read(train_command(view), Train)
    assert TrainConfig(**asdict(found.config)) == view.run.config
    assert (found.task, found.out) == ("tiny", Path(view.run.path.name))


def test_the_commands_to_measure_give_measures_steps_and_settings_back(tmp_path: Path) -> None:
    from landscape.cli.runs import Measure

    other = rates([1.0], first=20)
    other.attrs["settings"] = json.dumps(
        {"data": "0123abcd", "num_draws": 8, "memory_gb": 0.5, "num_examples": 100, "seed": 3}
    )
    groups = {"effective-learning-rate": rates([1.0, 1.0]), "stability": steepness([1, 1], [1, 1]), "noise": other}
    first, second = (read(c, Measure) for c in measure_commands(made_view(tmp_path, "a run", groups=groups)))
    assert first.measures == ("effective-learning-rate", "stability")
    assert first.steps == (0, 10)
    assert (first.config.num_draws, first.config.seed, first.config.num_examples) == (24, 0, None)
    assert first.run_directory == Path("a run")
    assert (second.measures, second.steps) == (("noise",), (20,))
    assert (second.config.num_draws, second.config.seed, second.config.num_examples, second.config.memory_gb) == (
        8,
        3,
        100,
        0.5,
    )


def test_lines_are_short_and_mean_the_same(tmp_path: Path) -> None:
    from landscape.cli.runs import Measure

    names = get_args(MeasureName)
    at = rates([1.0] * 40)
    view = made_view(tmp_path, "a run", groups=dict.fromkeys(names, at))
    text = reproduce_commands([view, *(made_view(tmp_path, f"another long name {i}") for i in range(8))])
    assert max(map(len, text.splitlines())) <= WIDTH
    whole = text.replace(" \\\n    ", " ").splitlines()
    found = read(next(line for line in whole if line.startswith("landscape measure")), Measure)
    assert found.measures == names
    assert found.steps == tuple(at["step"].values)


def test_runs_that_others_match_come_first_and_versions_once(tmp_path: Path) -> None:
    star = made_view(tmp_path, "star", algorithm="ssgd-star", sigma0="/home/someone/runs/dpsgd")
    plain = made_view(tmp_path, "dpsgd")
    text = reproduce_commands([star, plain], "my report.html")
    assert text.index("--out dpsgd") < text.index("--sigma0 dpsgd") < text.index("--out star")
    assert text.count("landscape 9.9, git c0ffee, torch 2.99, Python 3.12.1") == 1
    assert text.endswith("landscape report star dpsgd --out 'my report.html'")
    assert "/home" not in text


def test_what_others_trained_is_imported_or_recorded_again(tmp_path: Path) -> None:
    origin = {"imported": {"from": ["/home/someone/theirs", "/home/someone/more"], "format": "DDP"}}
    text = reproduce_commands([made_view(tmp_path, "mine", status="imported", outcome=None, record=origin)])
    assert "landscape import theirs more --task tiny --out mine" in text
    assert "landscape train" not in text
    assert "run that program again" in reproduce_commands([made_view(tmp_path, status="recorded", outcome=None)])
