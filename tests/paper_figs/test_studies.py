"""Studies run end to end at a small size and go on where they stopped; their maps judge runs as they say; places follow the rule."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paper_figs.studies import STUDIES, Study, read_all, read_study, study_named
from paper_figs.studies import __main__ as command
from paper_figs.studies.along import marks, places, together
from paper_figs.studies.declared import EVERY, VARIANTS
from paper_figs.studies.mapping import batch_config, joined, load_task, outcome_lines

if TYPE_CHECKING:
    import xarray as xr

MakeUp = Callable[..., tuple[Study, "xr.Dataset"]]

TINY = Study(
    "tiny", "mnist-mlp@examples=120", (4, 8, 16), (0.05, 0.1, 40.0), num_epochs=3, converged_share=0.3, num_learners=3, seeds=(1, 2),
    evaluation_examples=40, weight_decay=1e-4, momentum=0.5, stands_for="cifar10-resnet18",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick form of the tiny study, run by the command."""
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "tiny", TINY)
        assert command.main(["tiny", "--quick", "--work", str(folder), "--quiet"]) == 0
    return folder / "tiny-quick.nc"


def test_a_quick_study_end_to_end(finished: Path) -> None:
    found = read_study(finished)
    assert finished.stat().st_size < 200_000
    assert found.map.sizes == {"total_batch": 2, "variant": 3, "rate": 2, "seed": 2, "point": found.map.sizes["point"]}
    assert found.map["variant"].values.tolist() == list(VARIANTS)
    np.testing.assert_allclose(found.map["learning_rate"], [[0.05, 40.0], [0.1, 80.0]])
    assert np.isfinite(found.map["train_loss"].isel(point=0)).all()
    assert (
        found.map["train_loss"].isel(point=0) == found.map["train_loss"].isel(point=0, variant=0)
    ).all()  # the same initial weights
    sigma = found.map["sigma_w"].isel(rate=0, point=1)
    assert (sigma.sel(variant="ssgd") == 0).all()
    assert (sigma.sel(variant="dpsgd") > 0).all()
    assert (found.map["test_accuracy"] >= 0).all()
    assert "not the paper's scale" in found.scale
    assert "120 training examples" in found.scale
    assert found.declared["stands_for"] == "cifar10-resnet18"


def test_what_was_measured_along_training(finished: Path) -> None:
    along = read_study(finished).along
    assert along is not None
    assert set(along["variant"].values) == set(VARIANTS)
    assert along.sizes["point"] == 2
    for name in ("alpha_e_ratio_mean", "alpha_e_ratio_stderr", "Delta_mean", "lambda_max", "lambda_max_smoothed"):
        assert np.isfinite(along[name]).all(), name
    by_variant = {str(v): along.isel(run=i) for i, v in enumerate(along["variant"].values)}
    assert (by_variant["ssgd"]["Delta_2_mean"] == 0).all()
    assert (by_variant["dpsgd"]["sigma_w"] > 0).all()
    assert (by_variant["ssgd-star-matched"]["sigma_w"] > 0).all()
    assert (
        by_variant["ssgd-star-matched"]["alpha_e_ratio_predicted"].sel(prediction="exact").isnull()
    ).all()  # its noise is fresh at every draw
    dpsgd = by_variant["dpsgd"]
    error = dpsgd["alpha_e_ratio_mean"] - dpsgd["alpha_e_ratio_predicted"].sel(prediction="exact")
    assert (abs(error) < 5 * dpsgd["alpha_e_ratio_stderr"]).all()


def test_provenance_is_stored(finished: Path) -> None:
    import xarray as xr

    with xr.open_datatree(finished, engine="h5netcdf") as tree:
        root, mapped = dict(tree.attrs), dict(tree["map"].attrs)
    assert {"provenance_git_commit", "provenance_torch", "provenance_time", "scale", "study", "declared"} <= set(root)
    assert json.loads(root["declared"])["momentum"] == 0.5
    assert mapped["data_fingerprint"]
    assert mapped["num_examples"] == 120


def test_an_interrupted_study_goes_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_study(finished)
    kept = {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*.nc") if path != finished}
    lost = next(path for path in kept if path.name.startswith("dpsgd-") and path.parent.name.startswith("batch-"))
    lost.unlink()
    finished.unlink()
    monkeypatch.setitem(STUDIES, "tiny", TINY)
    assert command.main(["tiny", "--quick", "--work", str(finished.parent), "--quiet"]) == 0
    after = read_study(finished)
    assert {p for p, then in kept.items() if p.stat().st_mtime_ns != then} == {lost}
    np.testing.assert_allclose(after.map["train_loss"], before.map["train_loss"], rtol=1e-5)
    assert before.along is not None
    assert after.along is not None
    np.testing.assert_array_equal(after.along["alpha_e_ratio_mean"], before.along["alpha_e_ratio_mean"])
    assert "estimate:" in capsys.readouterr().out


def test_another_grid_uses_the_runs_there_are(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {path: path.stat().st_mtime_ns for path in finished.parent.rglob("batch-*/*.nc")}
    quick = TINY.quick(120)
    wider = replace(quick, learning_rates=(0.025, *quick.learning_rates))
    assert command.run_study(wider.pilot(), finished.parent, None, map_only=True, quiet=True) is None
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert "0.025: " in capsys.readouterr().out
    assert len(list(finished.parent.rglob("batch-*/*.nc"))) == len(kept) + 2 * 3  # one rate, one seed


def test_runs_are_judged_by_their_last_fifth(made_up: MakeUp) -> None:
    import xarray as xr

    task, _ = load_task(TINY, None)
    study = replace(TINY, local_batch_sizes=(4,), seeds=(1,))
    steps = np.arange(0, 55, 5)
    shape = (3, 3, 1, len(steps))
    losses = np.full(shape, 5.0)
    losses[0, 0, 0, steps >= 40] = [0.3, 0.6, 9.0]  # median of the last fifth below 0.3 log(10) = 0.69
    losses[0, 1, 0, steps >= 40] = [0.9, 0.8, 0.1]
    losses[0, 2, 0, steps >= 40] = [2.3, 2.3, 2.3]
    losses[1] = 0.1
    died = np.full(shape[:3], -1)
    died[1, 2, 0] = 30
    mapped = xr.Dataset(
        {
            "train_loss": (("variant", "learning_rate", "seed", "step"), losses), "sigma_w": (("variant", "learning_rate", "seed", "step"), losses),
            "diverged_at": (("variant", "learning_rate", "seed"), died), "test_accuracy": (("variant", "learning_rate", "seed"), np.ones(shape[:3])),
        },
        coords={"variant": list(VARIANTS), "learning_rate": list(study.learning_rates), "seed": [1], "step": steps},
        attrs={"data_fingerprint": "0", "num_examples": 120},
    )  # fmt: skip
    found = joined(study, task, [mapped]).isel(total_batch=0, seed=0)
    assert found["outcome"].sel(variant="ssgd").values.tolist() == ["converged", "slow", "stuck"]
    np.testing.assert_allclose(found["final_loss"].sel(variant="ssgd"), [0.6, 0.8, 2.3])
    assert found["outcome"].sel(variant="ssgd-star-matched").values.tolist() == ["converged", "converged", "non-finite"]
    assert math.isinf(found["final_loss"].sel(variant="ssgd-star-matched").values[2])


def test_every_batch_size_sees_as_many_examples() -> None:
    for study in STUDIES.values():
        given = re.search(r"examples=(\d+)", study.task)
        examples = int(given[1]) if given else 4000
        seen = [study.num_steps(b, examples) * total for b, total in enumerate(study.total_batches)]
        assert max(seen) / min(seen) < 1.25, study.name  # but for whole multiples of EVERY steps
        scaled = [study.rates_at(b)[0] / total for b, total in enumerate(study.total_batches)]
        assert max(scaled) == pytest.approx(min(scaled))
        for b in range(len(study.total_batches)):
            config = batch_config(study, b, examples)
            assert config.num_steps % EVERY == config.log_every % EVERY == 0
            every, chosen = marks(study, config.num_steps)
            assert len(chosen) == len(study.along.marks)
            assert all(s % every == 0 and 0 < s <= config.num_steps for s in chosen)


def test_warm_up_starts_from_the_smallest_batch() -> None:
    study = replace(TINY, warmup_epochs=1.0, num_epochs=4)
    assert study.schedule(0, 120) == "constant"
    assert study.schedule(2, 240) == "warmup:5:0.25+constant"
    assert "(1 of warm-up)" in study.scale_label(120)


@pytest.mark.parametrize(
    ("ssgd", "dpsgd", "expected"),
    [
        ([["ccc", "ccc", "sss"], ["ccc", "css", "sss"]], [["ccc", "ccc", "sss"], ["ccc", "ccc", "sss"]], [("both", 1, 0), ("differ", 1, 1)]),
        ([["ccc", "ccc", "sss"], ["sss", "sss", "sss"]], [["ccc", "ccc", "ccs"], ["sss", "sss", "sss"]], [("both", 0, 1), ("differ", 0, 2)]),
        ([["ccc", "ccc", "ccc"], ["ccc", "ccc", "ccc"]], [["ccc", "ccc", "ccc"], ["ccc", "ccc", "ccc"]], [("both", 1, 2)]),
        ([["sss", "sss", "sss"], ["sss", "sss", "sss"]], [["sss", "sss", "sss"], ["sss", "sss", "sss"]], []),
        ([["ccc", "ccc", "sss"], ["ccc", "sss", "sss"]], [["ccc", "sss", "sss"], ["sss", "sss", "sss"]], [("both", 0, 0), ("differ", 1, 0)]),
    ],
)  # fmt: skip
def test_places_follow_the_rule(made_up: MakeUp, ssgd: Any, dpsgd: Any, expected: list[tuple[str, int, int]]) -> None:
    """Where most seeds differ, in either direction, at the largest batch; and the largest rate where all converge, there if possible."""
    _, found = made_up({"ssgd": ssgd, "ssgd-star-matched": ssgd, "dpsgd": dpsgd})
    assert [(p.kind, p.batch, p.rate) for p in places(found)] == expected
    assert any("3/3" in line or "0/3" in line for line in outcome_lines(found))


def test_runs_of_unequal_length_stand_beside_each_other(tmp_path: Path) -> None:
    import xarray as xr

    from landscape.results import load_dataset, save_dataset

    def run(variant: str, points: int, logged: int) -> xr.Dataset:
        made = xr.Dataset(
            {"step": ("point", np.arange(points, dtype=float)), "train_loss": ("logged", np.ones(logged))}
        )
        if points:
            made = made.assign(
                lambda_max=("point", np.ones(points)),
                alpha_e_ratio_predicted=(("point", "prediction"), np.ones((points, 2))),
            )
            made = made.assign_coords(prediction=["exact", "isotropic"])
        labels = {"kind": "differ", "variant": variant, "seed": 1, "total_batch": 32, "learning_rate": 0.1}
        return made.assign({k: ((), v) for k, v in labels.items()})

    found = together([run("dpsgd", 3, 9), run("ssgd", 0, 2), run("ssgd-star-matched", 2, 5)])
    save_dataset(found, tmp_path / "along.nc")
    found = load_dataset(tmp_path / "along.nc")
    assert dict(found.sizes) == {"run": 3, "point": 3, "logged": 9, "prediction": 2}
    assert found["lambda_max"].notnull().sum("point").values.tolist() == [3, 0, 2]
    assert found["train_loss"].notnull().sum("logged").values.tolist() == [9, 2, 5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"local_batch_sizes": (8, 4)}, "must rise"),
        ({"seeds": ()}, "must rise"),
        ({"num_learners": 1}, "at least 2 learners"),
        ({"converged_share": 1.5}, "between 0 and 1"),
        ({"num_epochs": 1.0, "warmup_epochs": 2.0}, "longer than the warm-up"),
        ({"along": replace(TINY.along, variants=("adam",))}, "must be among"),
        ({"along": replace(TINY.along, marks=(20,))}, "twentieths"),
    ],
)
def test_studies_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_mistakes_are_said_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LANDSCAPE_DATA_ROOT", raising=False)
    assert command.main(["nothing"]) == 2
    assert "no such study: nothing; there are mnist-mlp" in capsys.readouterr().err
    assert command.main([]) == 2
    assert "name a study" in capsys.readouterr().err
    assert command.main(["cifar10-resnet18", "--work", str(tmp_path)]) == 2
    assert "LANDSCAPE_DATA_ROOT" in capsys.readouterr().err
    assert command.main(["cifar10-resnet18", "--work", str(tmp_path), "--data-root", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    assert "cifar10-resnet18@width=" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such study"):
        study_named("nothing")
    assert not list(tmp_path.iterdir())


def test_files_that_are_none_of_a_study(tmp_path: Path) -> None:
    import xarray as xr

    from landscape.results import save_dataset

    with pytest.raises(ValueError, match=r"python -m paper_figs\.studies absent"):
        read_study(tmp_path / "absent.nc")
    with pytest.raises(ValueError, match="holds no study"):
        read_all(tmp_path)
    save_dataset(xr.Dataset({"x": ((), 1.0)}), tmp_path / "other.nc")
    with pytest.raises(ValueError, match="is no file of a study"):
        read_all(tmp_path)


def test_studies_stand_for_tasks_of_the_paper() -> None:
    from landscape.tasks.paper import PAPER

    assert {s.stands_for for s in STUDIES.values()} - {None} <= set(PAPER)
