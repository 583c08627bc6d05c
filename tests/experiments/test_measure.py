import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from landscape.checkpoints import Run
from landscape.checkpoints.format import MEASUREMENTS_FILE
from landscape.data.dataset import TensorData
from landscape.data.selection import choose
from landscape.experiments.checkpoint import MeasureConfig
from landscape.experiments.measure import measure
from landscape.experiments.measures import DEFAULT_MEASURES, MEASURES
from landscape.experiments.train import train
from landscape.objective import Objective
from landscape.results import load_groups
from landscape.tasks import Task
from landscape.theory.scorecard import scorecard
from landscape.theory.smoothed_loss import second_order_rate_ratio
from landscape.training.config import TrainConfig

LIGHT = MeasureConfig(num_draws=6, num_smoothing_samples=4, num_eigenpairs=4, max_matvecs=20, smoothing_matvecs=4)
BASE = TrainConfig("dpsgd", 0.3, num_learners=4, local_batch_size=8, num_steps=12, checkpoint_every=6, dtype="float64")


def run_of(task: Task, path: Path, **changes: object) -> Run:
    return train(task, dataclasses.replace(BASE, **changes), path, quiet=True)  # type: ignore[arg-type]


def test_every_measure_at_every_checkpoint(tiny_task: Task, tmp_path: Path) -> None:
    run = run_of(tiny_task, tmp_path / "run")
    groups = measure(run, task=tiny_task, settings=LIGHT, quiet=True)
    assert set(groups) == set(DEFAULT_MEASURES)
    for name, group in groups.items():
        assert group["step"].values.tolist() == [0, 6, 12], name
        assert group.attrs["provenance_torch"] == str(torch.__version__)
        assert group.attrs["algorithm"] == "dpsgd"
    on_disk = load_groups(run.path / MEASUREMENTS_FILE)
    np.testing.assert_array_equal(on_disk["noise"]["Delta_2"], groups["noise"]["Delta_2"])
    assert float(groups["effective-learning-rate"]["identity_error"].max()) < 1e-10
    assert {
        "E alpha_e / alpha",
        "Delta_S",
        "Tr Sigma_w",
        "exponent of minibatch noise on curvature",
        "smoothness of L~",
        "growth of disagreement",
        "one-step change of L",
    } <= set(scorecard(groups)["quantity"])


def test_numbers_are_those_of_the_library_calls(tiny_task: Task, tmp_path: Path) -> None:
    run = run_of(tiny_task, tmp_path / "run")
    groups = measure(
        run, ("effective-learning-rate", "curvature", "stability"), [12], task=tiny_task, settings=LIGHT, quiet=True
    )
    data, _ = tiny_task.load_data(None)
    objective = Objective(tiny_task.build_model().double(), tiny_task.loss_fn, data)
    learners = run.learners(12)
    g = objective.gradient(learners.mean)
    exact = float(objective.stacked_gradients(learners.weights).mean(0) @ g / (g @ g))
    found = groups["effective-learning-rate"].sel(step=12, prediction="exact")
    assert float(found["alpha_e_ratio_predicted"]) == pytest.approx(exact, rel=1e-10)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(objective.model.module, objective.model.layout.split(flat), (data.inputs,))
        return torch.nn.functional.cross_entropy(outputs, data.targets)

    top = [float(torch.linalg.eigvalsh(torch.func.hessian(loss)(w))[-1]) for w in (learners.mean, *learners.weights)]
    assert float(groups["curvature"]["lambda_max"].sel(step=12)) == pytest.approx(top[0], rel=1e-3)
    np.testing.assert_allclose(groups["curvature"]["learner_lambda_max"].sel(step=12), top[1:], rtol=1e-2)
    covariance = measure(run, ("covariance", "noise"), [12], task=tiny_task, settings=LIGHT, quiet=True)
    trace = covariance["covariance"]["gradient_trace"].sel(step=12)  # all 40 examples: exact
    assert float(trace.sel(block="all")) == pytest.approx(
        covariance["noise"]["gradient_covariance_trace"].item(), rel=1e-9
    )
    assert float(trace[1:].sum()) == pytest.approx(float(trace[0]), rel=1e-9)
    spread = covariance["covariance"].sel(step=12, step_noise="landscape")
    xi_d = covariance["noise"].sel(step=12)
    systematic = float(xi_d["systematic_share"] * xi_d["Delta_2_mean"])
    assert float(spread["step_trace"]) == pytest.approx(float(xi_d["Delta_2_mean"]) - systematic, rel=1e-6)
    half = groups["stability"]["alpha_lambda_half"].sel(step=12)
    assert float(half.sel(function="w_a")) == pytest.approx(0.15 * top[0], rel=1e-3)
    assert float(half.sel(function="sharpest-learner")) == pytest.approx(0.15 * max(top[1:]), rel=1e-2)


def test_a_second_call_measures_only_what_is_missing(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tiny_task, tmp_path / "run")
    measure(run, ("ledger",), [6], task=tiny_task, settings=LIGHT, quiet=True)
    calls: list[int] = []
    original = MEASURES["ledger"]
    monkeypatch.setitem(MEASURES, "ledger", lambda at: calls.append(at.step) or original(at))
    groups = measure(run, ("ledger",), [6, 12], task=tiny_task, settings=LIGHT, quiet=True)
    assert calls == [12]
    assert groups["ledger"]["step"].values.tolist() == [6, 12]
    measure(run, ("ledger",), [6, 12], task=tiny_task, settings=dataclasses.replace(LIGHT, num_draws=7), quiet=True)
    assert calls == [12, 6, 12]  # other settings: measured again


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "ssgd"}, {"algorithm": "ssgd-star", "sigma0": 0.05}, {"order": "atc"}, {"order": "cta"}, {"momentum": 0.9},
        {"topology": "random-pairing"}, {"topology": "exponential"}, {"num_learners": 1}, {"gamma": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_run_can_be_measured(tiny_task: Task, tmp_path: Path, changes: dict[str, object]) -> None:
    run = run_of(tiny_task, tmp_path / "run", **changes)
    groups = measure(run, steps=[12], task=tiny_task, settings=LIGHT, quiet=True)
    assert math.isfinite(groups["effective-learning-rate"]["alpha_e_ratio_mean"].item())
    if changes.get("algorithm") == "ssgd" or changes.get("num_learners") == 1:
        assert groups["noise"]["consensus_trace"].item() == 0
        assert groups["noise"]["Delta_2_mean"].item() == 0
        assert np.isnan(groups["covariance"]["step_trace"].sel(step_noise="dpsgd")).all()
        assert "coupled_disagreement" not in groups["stability"]
        assert groups["disagreement"]["consensus_trace"].item() == 0
        assert np.isnan(groups["alignment"]["trace_alignment"].sel(noise="consensus")).all()
    elif changes.get("algorithm") == "ssgd-star":
        assert groups["noise"]["Delta_2_mean"].item() > 0
    else:
        assert groups["stability"]["coupled_disagreement"].item() > 0


def test_a_diverged_checkpoint_is_left_out_and_named(tiny_task: Task, tmp_path: Path) -> None:
    from landscape.checkpoints.writer import RunWriter
    from landscape.functional import FunctionalModel
    from landscape.training.state import LearnerState

    run = run_of(tiny_task, tmp_path / "run")
    writer, model = (
        RunWriter(run.path, dict(run.record)),
        FunctionalModel(tiny_task.build_model().double(), tiny_task.loss_fn),
    )
    broken = LearnerState(torch.full((4, model.layout.num_parameters), math.nan, dtype=torch.float64), {}, None, 13)
    writer.save_checkpoint(broken, model, run.learners(12).facts)
    groups = measure(run, ("noise",), [12, 13], task=tiny_task, settings=LIGHT, quiet=True)
    assert groups["noise"]["step"].values.tolist() == [12]
    on_disk = load_groups(run.path / MEASUREMENTS_FILE)["noise"]
    for group in (groups["noise"], on_disk):
        assert (group.attrs["skipped_steps"], group.attrs["num_skipped"]) == ("13", 1)
    writer.save_checkpoint(
        dataclasses.replace(broken, params=torch.ones_like(broken.params), step=14), model, {"algorithm": "dpsgd"}
    )
    with pytest.raises(
        ValueError,
        match="does not record its learning_rate and local_batch_size; give --learning-rate and --local-batch-size",
    ):
        measure(run, ("noise",), [14], task=tiny_task, settings=LIGHT, quiet=True)
    with pytest.raises(ValueError, match="step 14 does not record its local_batch_size; give --local-batch-size"):
        measure(
            run, ("noise",), [14], task=tiny_task, settings=dataclasses.replace(LIGHT, learning_rate=0.1), quiet=True
        )


def test_mistakes_are_explained(tiny_task: Task, tmp_path: Path) -> None:
    run = run_of(tiny_task, tmp_path / "run")
    with pytest.raises(ValueError, match="no such measure: sharpness"):
        measure(run, ("sharpness",), task=tiny_task, quiet=True)
    with pytest.raises(ValueError, match="no checkpoint of step 7; there are 0, 6, 12"):
        measure(run, ("noise",), [7], task=tiny_task, quiet=True)
    train_data, test_data = tiny_task.load_data(None)
    shifted = dataclasses.replace(train_data, inputs=train_data.inputs + 1)
    other = dataclasses.replace(tiny_task, load_data=lambda root: (shifted, test_data))
    with pytest.raises(ValueError, match="trained on other data"):
        measure(run, ("noise",), [12], task=other, settings=LIGHT, quiet=True)
    found = measure(run, ("noise",), [12], task=other, settings=LIGHT, allow_other_data=True, quiet=True)
    first = found["noise"].attrs["settings"]  # holds the fingerprint: what other data gave is not taken for the run's
    assert (
        measure(run, ("noise",), [12], task=tiny_task, settings=LIGHT, quiet=True)["noise"].attrs["settings"] != first
    )


def test_the_length_of_smoothing_on_request(tiny_task: Task, tmp_path: Path) -> None:
    run = run_of(tiny_task, tmp_path / "run")
    steps = [0, 6, 12]  # nothing is smoothed at the first, so its curve has another length
    found = measure(run, ("smoothing-length",), steps, task=tiny_task, settings=LIGHT, quiet=True)["smoothing-length"]
    assert found["status"].sel(step=0, kernel="learners").item() == "no deviations"
    assert set(found["status"].sel(step=[6, 12]).values.ravel()) <= {"found", "already below", "not reached"}
    assert float(found["target"].sel(step=6, kernel="learners")) == pytest.approx(2 / 0.3)


def test_a_part_of_the_examples_can_stand_for_all(tiny_task: Task, tmp_path: Path) -> None:
    """Everything is then measured as if the run's data were the choice."""
    run = run_of(tiny_task, tmp_path / "run")
    settings = dataclasses.replace(LIGHT, num_examples=12)
    names = ["effective-learning-rate", "curvature"]
    found = measure(run, names, [6], settings=settings, task=tiny_task, quiet=True)
    train_data, test_data = tiny_task.load_data(None)
    few = dataclasses.replace(tiny_task, load_data=lambda root: (choose(train_data, 12), test_data))
    (run.path / MEASUREMENTS_FILE).unlink()
    alone = measure(run, names, [6], settings=LIGHT, task=few, allow_other_data=True, quiet=True)
    for name in names:
        assert found[name].attrs["num_examples"] == 12
        xr.testing.assert_equal(found[name].drop_attrs(), alone[name].drop_attrs())


def test_an_estimated_gradient_and_a_small_budget(tiny_task: Task, tmp_path: Path) -> None:
    run = run_of(tiny_task, tmp_path / "run")
    names = ("effective-learning-rate", "noise")
    exact = measure(run, names, [12], task=tiny_task, settings=LIGHT, quiet=True)["effective-learning-rate"].squeeze()
    small = dataclasses.replace(LIGHT, memory_gb=1e-5, num_gradient_examples=32)
    found = measure(run, names, [12], task=tiny_task, settings=small, quiet=True)["effective-learning-rate"].squeeze()
    assert "estimated from 32 of 40" in found.attrs["full_gradient"]
    gap = abs(float(found["alpha_e_ratio_mean"]) - float(exact["alpha_e_ratio_mean"]))
    assert gap < 4 * math.hypot(float(found["alpha_e_ratio_stderr"]), float(exact["alpha_e_ratio_stderr"]))


@pytest.mark.parametrize("place", ["weights", "gradient"])
def test_a_run_with_calibrated_noise_is_measured_where_it_takes_its_gradients(
    tiny_task: Task, tmp_path: Path, place: str
) -> None:
    source = run_of(tiny_task, tmp_path / "dpsgd", checkpoint_every=3)
    star = {"algorithm": "ssgd-star", "sigma0": str(source.path), "noise_place": place, "noise_shape": "low-rank"}
    run = run_of(tiny_task, tmp_path / "star", **star)
    groups = measure(run, ("effective-learning-rate", "noise", "smoothing", "covariance"), [6], task=tiny_task, settings=LIGHT, quiet=True)  # fmt: skip
    assert np.isnan(groups["smoothing"]["smoothness"]).all() == (
        place == "weights"
    )  # no kernel of these smooths like it
    strength = groups["noise"]["Delta_2_mean"].item()
    assert strength > 0 if place == "weights" else strength == 0


def test_a_schedule_of_gamma_is_what_the_theory_sees(tiny_task: Task, tmp_path: Path) -> None:
    run = run_of(tiny_task, tmp_path / "run", gamma=0.8, gamma_schedule="step:6:0.5")
    groups = measure(run, ("disagreement",), [0, 6, 12], task=tiny_task, settings=LIGHT, quiet=True)
    plain = np.sort(np.linalg.eigvalsh(np.asarray(run.record["topology"]["matrices"][0])))[:-1]
    for step, gamma in ((6, 0.4), (12, 0.4)):
        found = np.sort(groups["disagreement"]["graph_mode_real"].sel(step=step).values)
        np.testing.assert_allclose(found, 1 - gamma + gamma * plain, atol=1e-12)


def test_graph_modes_that_do_not_separate_leave_the_rest_measured(tiny_task: Task, tmp_path: Path) -> None:
    swap, cycle = np.eye(4)[[1, 0, 2, 3]], np.eye(4)[[0, 2, 3, 1]]
    matrix = (np.eye(4) + swap + cycle) / 3  # doubly stochastic, not normal
    run = train(tiny_task, BASE, tmp_path / "run", topology=matrix, quiet=True)
    found = measure(run, ("noise", "disagreement"), [12], task=tiny_task, settings=LIGHT, quiet=True)
    assert found["disagreement"]["consensus_trace"].item() == pytest.approx(found["noise"]["consensus_trace"].item())
    assert math.isnan(found["noise"]["consensus_trace_predicted"].item())


def test_under_cta_the_theory_takes_the_points_of_the_gradients(tiny_task: Task, tmp_path: Path) -> None:
    run = run_of(tiny_task, tmp_path / "run", order="cta")
    found = measure(run, ("effective-learning-rate", "smoothing"), [12], task=tiny_task, settings=LIGHT, quiet=True)
    learners = run.learners(12)
    points = torch.as_tensor(np.asarray(run.record["topology"]["matrices"][0])) @ learners.weights
    data, _ = tiny_task.load_data(None)
    objective = Objective(tiny_task.build_model().double(), tiny_task.loss_fn, data)
    g = objective.gradient(learners.mean)
    moved = dataclasses.replace(learners, weights=points)
    rates = found["effective-learning-rate"].sel(step=12)["alpha_e_ratio_predicted"]
    assert float(rates.sel(prediction="second-order")) == pytest.approx(
        second_order_rate_ratio(objective, moved, g), rel=1e-8
    )
    assert float(rates.sel(prediction="exact")) == pytest.approx(
        float(objective.stacked_gradients(points).mean(0) @ g / (g @ g)), rel=1e-8
    )
    change = float(objective.stacked_values(points).mean() - objective.value(learners.mean))
    assert float(found["smoothing"].sel(step=12, kernel="learners")["loss_change"]) == pytest.approx(change, rel=1e-6)


def test_noise_that_sums_to_zero_is_measured_as_it_is(tiny_task: Task, tmp_path: Path) -> None:
    star = {"algorithm": "ssgd-star", "sigma0": 0.05}
    runs = [run_of(tiny_task, tmp_path / f"{zero}", **star, noise_zero_sum=zero) for zero in (False, True)]
    often = dataclasses.replace(LIGHT, num_draws=40)
    strength = [
        measure(run, ("noise",), [0], task=tiny_task, settings=often, quiet=True)["noise"]["Delta_2_mean"].item()
        for run in runs
    ]
    assert 0 < strength[1] < 0.7 * strength[0]  # the same start and strength, without H times the mean noise


def test_batch_statistics_are_those_at_the_averaged_weights(tmp_path: Path) -> None:
    """theory.md sec. 1: one fixed function of w, its BatchNorm statistics measured at w_a; not those of the initial network."""
    generator = torch.Generator().manual_seed(0)
    data = TensorData(torch.randn(60, 6, generator=generator) + 2, torch.randint(0, 3, (60,), generator=generator), "n")

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    task = Task("normed", "a network with BatchNorm", network, nn.functional.cross_entropy, lambda root: (data, data), 0.7, math.log(3))  # fmt: skip
    config = TrainConfig("dpsgd", 0.3, num_learners=3, local_batch_size=20, num_steps=6, checkpoint_every=6, dtype="float64")  # fmt: skip
    run = train(task, config, tmp_path / "run", quiet=True)
    groups = measure(run, ["effective-learning-rate"], steps=[6], task=task, quiet=True)
    net = network().double()
    mean = run.learners(6).mean
    nn.utils.vector_to_parameters(mean, net.parameters())
    net.train()[1].momentum = 1.0  # type: ignore[union-attr,operator]
    net(data.inputs.double())
    net.eval()
    loss = nn.functional.cross_entropy(net(data.inputs.double()), data.targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    found = float(groups["effective-learning-rate"]["gradient_norm_squared"][0])
    assert found == pytest.approx(float(gradient.square().sum()), rel=1e-6)
