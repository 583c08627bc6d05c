import json
import shutil
from pathlib import Path

import pytest

from landscape.experiments import reproduce as module
from landscape.experiments.checkpoint import MeasureConfig
from landscape.experiments.reproduce import PRESETS, Preset, reproduce

MEASURED = ("effective-learning-rate", "noise", "curvature", "smoothing", "stability", "ledger", "disagreement")
TINY = Preset(
    3, 1, (0.5, 1.0), 20, (0.01,), {16: (0.2,)}, True, (10, 20), MEASURED,
    MeasureConfig(num_draws=4, num_smoothing_samples=2, num_eigenpairs=3, max_matvecs=8, smoothing_matvecs=3),
)  # fmt: skip


@pytest.mark.slow
def test_the_main_job_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "quick", TINY)
    out = tmp_path / "out"
    options = {"num_learners": 4, "local_batch_size": 32}
    report = reproduce(out, "quick", **options)  # type: ignore[arg-type]
    html = report.read_text()
    printed = capsys.readouterr()
    assert "converged runs of all seeds" in printed.out
    assert "DPSGD converged (median training loss" in html
    assert "Local batch 16" in html
    assert {p.name for p in (out / "runs").iterdir()} == {"ssgd", "ssgd-star", "dpsgd", "dpsgd-atc"}
    plan = json.loads((out / "reproduce.json").read_text())
    assert plan["complete"]
    assert plan["learning_rate"] in TINY.learning_rates
    assert (out / "scorecard.csv").read_text().startswith("step,quantity,prediction")

    before = report.stat().st_mtime_ns
    reproduce(out, "quick", **options)  # type: ignore[arg-type]
    assert "is complete" in capsys.readouterr().err
    assert report.stat().st_mtime_ns == before

    shutil.rmtree(out / "runs" / "dpsgd-atc")  # as if interrupted there
    (out / "reproduce.json").write_text(json.dumps({**plan, "complete": False}))
    trained: list[str] = []
    original = module.train
    monkeypatch.setattr(
        module,
        "train",
        lambda task, config, path, **rest: trained.append(path.name) or original(task, config, path, **rest),
    )
    monkeypatch.setattr(
        "landscape.experiments.sweep.run_replicas", lambda *_: pytest.fail("a finished replica was run again")
    )
    reproduce(out, "quick", quiet=True, **options)  # type: ignore[arg-type]
    assert (out / "runs" / "dpsgd-atc" / "measurements.nc").exists()
    with pytest.raises(ValueError, match="other settings"):
        reproduce(out, "quick", num_learners=3, quiet=True)


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        reproduce(tmp_path / "a", "quick", num_seeds=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not empty"):
        reproduce(tmp_path / "full", "quick")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_choose_and_claim_on_different_seeds(name: str) -> None:
    plan = PRESETS[name]
    assert 1 <= plan.num_choice_seeds < plan.num_seeds
    assert plan.measured_steps[-1] == plan.num_steps
