from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from landscape.checkpoints import open_run
from landscape.experiments import calibrate, sweep
from landscape.experiments.profiles import load_profile
from landscape.experiments.rescue import count_rescues, rescue_experiment
from landscape.experiments.sweep import stability_map
from landscape.experiments.train import train
from landscape.experiments.variants import Variant, replica_key, variant_named
from landscape.results import load_dataset
from landscape.statistics import newcombe_interval
from landscape.tasks import Task
from landscape.training.config import TrainConfig

BASE = TrainConfig("dpsgd", 0.3, num_learners=3, local_batch_size=8, num_steps=12, log_every=6, dtype="float64")


def calibrated(place: Any, shape: Any, **more: Any) -> Variant:
    return Variant("ssgd-star", sigma0="calibrated", noise_place=place, noise_shape=shape, noise_every=4, **more)


# In a map ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["weights", "gradient"])
def test_replicas_with_calibrated_noise_are_the_runs_they_stand_for(
    tiny_task: Task, tmp_path: Path, place: str
) -> None:
    variants = [calibrated(place, "diagonal"), calibrated(place, "low-rank", noise_zero_sum=place == "weights")]
    found = stability_map(tiny_task, BASE, variants, [0.3, 0.8], [0, 1], tmp_path / "map", quiet=True)
    source = TrainConfig("dpsgd", 0.8, num_learners=3, local_batch_size=8, num_steps=12, log_every=6, dtype="float64", seed=1,
                         checkpoint_every=4)  # fmt: skip
    dpsgd = train(tiny_task, source, tmp_path / "dpsgd", quiet=True)
    recorded = [p for p in (tmp_path / "map" / "runs").iterdir() if "-a0.8-s1-" in p.name]
    assert [open_run(p).config for p in recorded] == [source]
    for variant in variants:
        held = next(
            (tmp_path / "map" / "noise").glob(f"dpsgd-a0.8-s1-*-{place}-{variant.noise_shape}-as-noise.safetensors")
        )
        assert load_profile(held).steps == (0, 4, 8, 12)
        star = TrainConfig("ssgd-star", 0.8, num_learners=3, local_batch_size=8, num_steps=12, log_every=6, dtype="float64", seed=1,
                           sigma0=str(held), noise_place=variant.noise_place, noise_shape=variant.noise_shape,
                           noise_zero_sum=variant.noise_zero_sum)  # fmt: skip
        run = train(tiny_task, star, tmp_path / variant.name, quiet=True)
        here = found.sel(variant=variant.name, learning_rate=0.8, seed=1)
        logged = run.metrics[run.metrics["step"] % 6 == 0]
        np.testing.assert_allclose(here["train_loss"], logged["train_loss"], rtol=1e-9)
    assert dpsgd.steps == [0, 4, 8, 12]


def test_shapes_of_a_place_share_their_measurements_and_finished_parts_need_none(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[int] = []
    original = calibrate.draw_gradients
    monkeypatch.setattr(calibrate, "draw_gradients", lambda *a, **k: draws.append(1) or original(*a, **k))
    variants = [calibrated("gradient", s) for s in ("isotropic", "layer", "low-rank")]
    first = stability_map(tiny_task, BASE, variants[:2], [0.3], [0, 1], tmp_path / "map", quiet=True)
    assert len(draws) == 2 * 4  # checkpoints of two runs, once for both shapes
    stability_map(tiny_task, BASE, variants[:2], [0.3], [0, 1], tmp_path / "map", quiet=True)
    assert len(draws) == 8
    monkeypatch.setattr("landscape.experiments.variants.train", sweep_runs_no_more(tmp_path))
    more = stability_map(tiny_task, BASE, variants, [0.3], [0, 1], tmp_path / "map", quiet=True)
    assert len(draws) == 16
    np.testing.assert_array_equal(more["train_loss"].isel(variant=[0, 1]), first["train_loss"])


def sweep_runs_no_more(tmp_path: Path) -> Any:
    """The recorded DPSGD runs are complete: asked for again they are returned as they are."""

    def again(task: Task, config: TrainConfig, path: Path, **options: Any) -> Any:
        assert options["resume"]
        before = open_run(path).record
        run = train(task, config, path, **options)
        assert run.record == before
        return run

    return again


def test_a_rate_at_which_nothing_disagrees_is_refused_and_named(tiny_task: Task, tmp_path: Path) -> None:
    config = TrainConfig(
        "dpsgd", 0.3, topology="complete", num_learners=3, local_batch_size=8, num_steps=12, dtype="float64"
    )
    variant = calibrated("weights", "layer", order="atc")
    with pytest.raises(ValueError, match=r"dpsgd-atc-a0\.3-s0-.*there is no disagreement to match"):
        stability_map(tiny_task, config, [variant], [0.3], [0], tmp_path / "map", quiet=True)
    with pytest.raises(ValueError, match="noise_every of at least 1"):
        stability_map(
            tiny_task,
            BASE,
            [Variant("ssgd-star", sigma0="calibrated", noise_every=0)],
            [0.3],
            [0],
            tmp_path,
            quiet=True,
        )


def test_names_of_variants() -> None:
    named = {
        "ssgd-star-weights-low-rank": calibrated("weights", "low-rank"),
        "ssgd-star-weights-layer-zero-sum": calibrated("weights", "layer", noise_zero_sum=True),
        "ssgd-star-gradient-diagonal-drift-added": calibrated("gradient", "diagonal", noise_drift="added"),
        "ssgd-star-gradient-drift-alone-cta": calibrated("gradient", "isotropic", noise_drift="alone", order="cta"),
        "ssgd-star-0.01": Variant("ssgd-star", sigma0=0.01),
        "ssgd-star-matched": Variant("ssgd-star", sigma0="matched"),
        "dpsgd-atc": Variant("dpsgd", "atc"),
    }
    assert [v.name for v in named.values()] == list(named)
    for name in ("ssgd-star-weights-low-rank", "ssgd-star-gradient-isotropic"):
        assert variant_named(name).name == name
    with pytest.raises(ValueError, match="no such variant: ssgd-star-weights-round"):
        variant_named("ssgd-star-weights-round")


def test_parts_of_maps_made_before_the_later_fields_are_found(tiny_task: Task) -> None:
    """The key of this configuration as it was before there were any."""
    config = TrainConfig("dpsgd", 0.3, num_learners=3, local_batch_size=8, num_steps=12, log_every=6, dtype="float64")
    assert replica_key(tiny_task, config, Variant("dpsgd"), "data") == "4b3dee870f7a"
    other = TrainConfig(
        "dpsgd",
        0.3,
        num_learners=3,
        local_batch_size=8,
        num_steps=12,
        log_every=6,
        dtype="float64",
        gamma_schedule="cosine",
    )
    assert replica_key(tiny_task, other, Variant("dpsgd"), "data") != "4b3dee870f7a"


# Counting ------------------------------------------------------------------------------------------------------------

NAMES = ["ssgd", "dpsgd", "ssgd-star-weights-isotropic", "ssgd-star-weights-low-rank", "ssgd-star-gradient-drift-alone"]


def made(hits: list[str]) -> xr.Dataset:
    """A map of one rate: for each variant in NAMES which of the seeds converged, as 1 and 0."""
    losses = np.asarray([[0.1 if c == "1" else 2.0 for c in row] for row in hits])[:, None]
    return xr.Dataset(
        {
            "median_last_loss": (("variant", "learning_rate", "seed"), losses),
            "outcome": (("variant", "learning_rate", "seed"), np.where(losses < 1, "converged", "stuck")),
        },
        coords={"variant": NAMES, "learning_rate": [1.2], "seed": np.arange(len(hits[0]))},
        attrs={"threshold": 0.7},
    )


def test_rescues_are_counted_among_the_seeds_that_failed() -> None:
    result = count_rescues(made(["1100000000", "1011111111", "0110000000", "1111111110", "0000000000"]))
    at = result.sel(learning_rate=1.2)
    assert int(at["num_failed"]) == 8
    assert at["num_converged"].values.tolist() == [2, 9, 2, 9, 0]
    assert at["num_rescued"].values.tolist() == [0, 8, 1, 7, 0]
    row = at.sel(variant="ssgd-star-weights-low-rank")
    assert float(row["difference_ssgd"]) == pytest.approx(0.7)
    assert (float(row["difference_ssgd_low"]), float(row["difference_ssgd_high"])) == newcombe_interval(9, 10, 2, 10)
    assert (float(row["difference_dpsgd_low"]), float(row["difference_dpsgd_high"])) == newcombe_interval(9, 10, 9, 10)
    words = result.attrs["conclusion"].split("\n")
    assert words[0].startswith(
        "At learning rate 1.2 SSGD converged with 2 (95% interval of the share 0.06 to 0.51) and DPSGD with 9"
    )
    assert words[1] == (
        "DPSGD rescued 8 of the 8 that failed; isotropic noise of the same strength on the weights rescued 1 of 8; covariance-matched "
        "noise on the weights rescued 7 of 8; the drift alone on the gradient rescued 0 of 8."
    )
    assert words[2] == (
        "More often than SSGD, and as often as DPSGD as far as these seeds tell, converged: covariance-matched noise on the weights."
    )
    assert words[3] == (
        "Not to be told from SSGD at this number of seeds: isotropic noise of the same strength on the weights, the drift alone on the "
        "gradient; of these, less often than DPSGD: isotropic noise of the same strength on the weights, the drift alone on the gradient."
    )


def test_words_follow_the_numbers() -> None:
    nothing = count_rescues(made(["1" * 10] * 5)).attrs["conclusion"]
    assert nothing.endswith("SSGD did not fail, so there was nothing to rescue.")
    worse = count_rescues(made(["1" * 8 + "00", "1" * 10, "0" * 10, "1" * 10, "1" * 9 + "0"])).attrs["conclusion"]
    assert "Less often than SSGD converged: isotropic noise of the same strength on the weights." in worse
    between = count_rescues(made(["0" * 20, "1" * 20, "1" * 10 + "0" * 10, "0" * 20, "1" * 20])).attrs["conclusion"]
    assert "More often than SSGD, but less often than DPSGD, converged: isotropic noise" in between


def test_the_whole_experiment_is_stored_and_resumes(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> xr.Dataset:
        return rescue_experiment(tiny_task, BASE, [0.3], [0, 1], tmp_path / "out", shapes=("isotropic", "low-rank"), noise_every=4,
                                 drifts=("as-noise", "alone"), quiet=True)  # fmt: skip

    result = call()
    assert result["variant"].values.tolist() == [
        "ssgd", "dpsgd", "ssgd-star-weights-isotropic", "ssgd-star-weights-low-rank", "ssgd-star-gradient-isotropic",
        "ssgd-star-gradient-low-rank", "ssgd-star-gradient-drift-alone",
    ]  # fmt: skip
    stored = load_dataset(tmp_path / "out" / "rescue.nc")
    assert stored.attrs["conclusion"] == result.attrs["conclusion"]
    np.testing.assert_array_equal(stored["num_rescued"], result["num_rescued"])
    monkeypatch.setattr(sweep, "run_replicas", None)  # nothing is run again
    xr.testing.assert_equal(call(), result)


def test_unknown_places_and_shapes_are_refused(tiny_task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such noise shape: \(none\); there are isotropic"):
        rescue_experiment(tiny_task, BASE, [0.3], [0], tmp_path, shapes=(), quiet=True)
