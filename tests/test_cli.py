import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from landscape.cli import main

TRAIN = ["train", "--task", "mnist-mlp", "--algorithm", "dpsgd", "--learning-rate", "0.5"]
SHORT = [*TRAIN, "--num-steps", "4", "--num-learners", "4", "--local-batch-size", "20", "--checkpoint-every", "2"]


def run(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # the parser's own
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "nan"], "learning_rate must be a positive number, not nan"),
        (["--learning-rate", "0"], "learning_rate must be a positive number, not 0.0"),
        (["--num-learners", "0"], "num_learners must be at least 1, not 0"),
        (["--topology", "moebius"], "no such topology: moebius"),
        (["--topology", "hypercube"], "power of two, not 6"),
        (["--task", "mnist-lmp"], "no such task: mnist-lmp"),
        (["--local-batch-size", "4001"], "local_batch_size 4001 is larger than the data (4000 training examples)"),
        (["--schedule", "cosinus"], "schedule 'cosinus' cannot be read"),
        (["--task", "mnist-full-mlp", "--data-root", "nowhere"], "train-images-idx3-ubyte"),
        (["--device", "abacus"], "no such device: abacus"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_with_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "mnist-full-mlp" in arguments and importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision, which reads the full MNIST")
    assert run([*TRAIN, "--out", str(tmp_path / "run"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("landscape: error: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_unknown_flag_or_command_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TRAIN, "--out", str(tmp_path / "run"), "--warp", "9"]) == 2
    assert "--warp" in capsys.readouterr().err
    assert run(["trian"]) == 2


def test_a_matrix_that_is_not_doubly_stochastic_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savetxt(tmp_path / "m.csv", [[0.5, 0.5], [0.4, 0.5]], delimiter=",")
    assert (
        run([*TRAIN, "--num-learners", "2", "--topology", str(tmp_path / "m.csv"), "--out", str(tmp_path / "run")]) == 2
    )
    assert "row 1 sums to 0.9, off by -0.1" in capsys.readouterr().err


def test_train_measure_report_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "run")
    assert run([*SHORT, "--out", path]) == 0
    captured = capsys.readouterr()
    assert (
        "stable while alpha lambda_max < 2 (mean), 0.667 (disagreement)" in captured.err
        or "(disagreement)" in captured.err
    )
    assert "complete, too short to judge, median training loss of w_a over the last 4 steps" in captured.out
    assert run([*SHORT, "--out", path]) == 2
    assert "already holds a run; continue it with --resume, or replace it with --overwrite" in capsys.readouterr().err
    assert run([*SHORT, "--out", path, "--resume"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run([*SHORT, "--out", path, "--resume", "--seed", "3"]) == 2
    assert "seed: 0 in the run, 3 now" in capsys.readouterr().err
    assert run(["report", path]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "run" / "report.html"
    assert "DPSGD was not measured" in (tmp_path / "run" / "report.html").read_text()
    assert (
        run(
            [
                "measure",
                path,
                "--measures",
                "noise",
                "effective-learning-rate",
                "--steps",
                "4",
                "--num-draws",
                "4",
                "--num-smoothing-samples",
                "2",
            ]
        )
        == 0
    )
    assert "E alpha_e / alpha" in capsys.readouterr().out
    assert run(["report", path, "--out", str(tmp_path / "report.html")]) == 0
    assert "Effective over nominal learning rate" in (tmp_path / "report.html").read_text()
    assert run(["report", path, "--out", str(tmp_path / "words.md")]) == 0
    assert (tmp_path / "words.md").read_text().startswith("# Landscape report: mnist-mlp")
    assert (tmp_path / "words-figures" / "rate-1.svg").is_file()
    capsys.readouterr()
    assert run(["inspect", path]) == 0
    assert "4 learners x 20" in capsys.readouterr().out
    assert run(["inspect", f"{path}/checkpoints/step-00000004"]) == 0
    assert "1.weight  float32[50, 784]" in capsys.readouterr().out
    assert run(["inspect", str(tmp_path)]) == 2


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks"]) == 0
    listed = capsys.readouterr().out
    for name in ("mnist-mlp", "mnist-mlp-gelu", "mnist-mlp-tanh", "mnist-full-mlp"):
        assert name in listed


def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SHORT, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_module_runs_and_debug_shows_where(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "landscape", *TRAIN, "--num-learners", "0", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LANDSCAPE_DEBUG": "1"}, check=False
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_run_json_tells_the_spectrum(tmp_path: Path) -> None:
    assert run([*SHORT, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    np.testing.assert_allclose(sorted(record["topology"]["spectrum"]), [-1 / 3, 1 / 3, 1 / 3, 1], atol=1e-12)
    assert record["topology"]["thresholds"]["disagreement"] == pytest.approx(2 / 3)
    assert record["provenance"]["torch"]


def test_replay_changes_what_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(tmp_path / "run"), str(tmp_path / "replay")
    assert run([*SHORT, "--out", path, "--quiet"]) == 0
    assert run(["replay", path, "--step", "2", "--out", out, "--algorithm", "ssgd"]) == 0
    captured = capsys.readouterr()
    assert "every learner starts at w_a" in captured.err
    assert "run at 2" in captured.out
    assert run(["replay", path, "--step", "2", "--out", out, "--algorithm", "ssgd", "--resume", "--quiet"]) == 0
    assert json.loads((tmp_path / "replay" / "run.json").read_text())["replayed"]["changes"] == {
        "algorithm": ["dpsgd", "ssgd"]
    }
    capsys.readouterr()
    for arguments, message in (
        (["--step", "3"], "has no checkpoint of step 3"),
        (["--step", "2", "--topology", "hypercube", "--sigma0", "0.1"], "sigma0 is for ssgd-star only"),
        (["--step", "4"], "nothing is left to replay"),
    ):
        assert run(["replay", path, "--out", str(tmp_path / "other"), *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.strip().splitlines()) == 1


def test_ssgd_star_takes_its_noise_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(tmp_path / "run"), str(tmp_path / "star")
    assert run([*SHORT, "--out", path, "--quiet"]) == 0
    star = ["--algorithm", "ssgd-star", "--sigma0", path, "--quiet", "--out"]
    assert run([*SHORT, *star, str(tmp_path / "matched")]) == 0
    kept = [
        *SHORT,
        *star,
        out,
        "--noise-place",
        "gradient",
        "--noise-shape",
        "low-rank",
        "--noise-drift",
        "added",
        "--noise-every",
        "2",
    ]
    assert run(kept) == 0
    assert (tmp_path / "star" / "noise.safetensors").is_file()
    assert not (tmp_path / "matched" / "noise.safetensors").exists()
    capsys.readouterr()
    assert run([*SHORT, *star, str(tmp_path / "other"), "--noise-shape", "layer", "--noise-every", "3"]) == 2
    assert "so its noise cannot be refreshed every 3 steps" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["edge", "rescue"])
def test_edge_and_rescue(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--num-learners",
        "2",
        "--local-batch-size",
        "10",
        "--num-steps",
        "4",
        "--num-seeds",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    if command == "edge":
        arguments = [
            "--low",
            "0.1",
            "--high",
            "0.2",
            "--num-rates",
            "2",
            "--lambda-max",
            "10",
            "--algorithm",
            "dpsgd-atc",
        ]
        assert run(["edge", *small, *arguments]) == 0
        told = capsys.readouterr().out
        assert "95% interval 0 to inf" in told
        assert "disagreement threshold / lambda_max" in told
        assert run(["edge", *small, "--low", "0.2", "--high", "0.1"]) == 2
        assert "low < high" in capsys.readouterr().err
    else:
        assert (
            run(
                [
                    "rescue",
                    *small,
                    "--learning-rates",
                    "0.1",
                    "--places",
                    "weights",
                    "--shapes",
                    "layer",
                    "--noise-every",
                    "2",
                ]
            )
            == 0
        )
        assert "noise matched in every layer on the weights rescued 0 of 1" in capsys.readouterr().out


def test_a_recipe_is_printed_as_flags_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["recipe", "imagenet-resnet50", "--num-learners", "8", "--local-batch-size", "64", "--num-examples"]
    assert run([*command, "1281167"]) == 0
    flags = capsys.readouterr().out.split()
    assert flags[flags.index("--learning-rate") + 1] == "0.2"
    assert flags[flags.index("--num-steps") + 1] == str(90 * 2503)
    assert flags[flags.index("--schedule") + 1].startswith("warmup:12515:0.5+step:75090,150180,200240:")
    assert run([*command, "0"]) == 2
    assert "at least one example" in capsys.readouterr().err


def test_a_report_is_shown_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import webbrowser

    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(shown.append(address)) or len(shown) == 1)
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    for path, seed in ((one, "1"), (other, "2")):
        assert run([*SHORT, "--seed", seed, "--out", path, "--quiet"]) == 0
    assert run(["report", one]) == 0
    assert shown == []
    monkeypatch.chdir(tmp_path)
    assert run(["report", one, other, "--open"]) == 0
    assert shown == [(tmp_path / "report.html").as_uri()]
    assert "no browser" not in capsys.readouterr().err
    text = (tmp_path / "report.html").read_text()
    assert "DPSGD, one" in text
    assert "DPSGD, other" in text
    assert run(["report", one, "--format", "md", "--open"]) == 0
    assert shown[1] == (tmp_path / "one" / "report.md").as_uri()
    assert "no browser was found" in capsys.readouterr().err


def test_the_help_of_report_says_where_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "By default RUN/report.html for one run and ./report.html for several" in told
