"""SSGD*'s noise calibrated on a DPSGD run: profiles from its checkpoints (theory.md sec. 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landscape.checkpoints import Learners, Run, open_run
from landscape.functional import ParameterLayout
from landscape.noise.decomposition import smoothed_by_points
from landscape.noise.draws import draw_gradients
from landscape.objective import Objective
from landscape.tasks import Task, get_task
from landscape.training.algorithms import gradient_points
from landscape.training.noise import (
    DRIFTS,
    PLACES,
    SHAPES,
    NoiseDrift,
    NoisePlace,
    NoiseProfile,
    NoiseShape,
    drift_apart,
    noise_factors,
)
from landscape.training.topology import Topology

NUM_DRAWS = 16
"""Fresh minibatch assignments at each checkpoint, from which noise on the gradient is matched."""

Kind = tuple[NoiseShape, NoiseDrift]


def calibrate_noise(
    run: Run | str | Path,
    *,
    place: NoisePlace = "weights",
    shape: NoiseShape = "isotropic",
    drift: NoiseDrift = "as-noise",
    every: int | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    data_root: str | Path | None = None,
    device: str | None = None,
    task: Task | None = None,
) -> NoiseProfile:
    """The noise of a DPSGD run, as far as a shape keeps it, at each of its checkpoints.

    On the weights it is matched to the deviations x_j - w_a of the points where the run took its gradients (w_j; under CTA (M w)_j):
    covariance (1/n) sum_j (x_j - w_a)(x_j - w_a)^T, exactly. On the gradient it is matched to K fresh draws of the landscape noise
    xi_D = (1/n) sum_j [grad L^{mu_j}(x_j) - grad L^{mu_j}(w_a)]; its drift E xi_D = (1/n) sum_j g(x_j) - g(w_a) is computed from full
    gradients, without sampling error.

    What a profile measured holds until the next: it lags behind a run whose noise grows, and at step 0, where the learners are still
    equal, it is zero. Checkpoints every few steps keep that lag small.

    Args:
        run: a DPSGD run or its directory.
        place: "weights" or "gradient".
        shape: "isotropic", "layer", "diagonal" or "low-rank"; a layer is a module that owns parameters.
        drift: what becomes of E xi_D, for noise on the gradient; see `landscape.training.noise`.
        every: steps between refreshes, at which the run must have checkpoints; all of its checkpoints by default.
        num_draws: K.
        seed: of the draws.
        data_root: for tasks that read from disk.
        device: where to compute; the run's own by default.
        task: the run's task, where it cannot be found by the name in run.json.

    Returns:
        a profile over the run's checkpoints; of a run that diverged, over those at which its gradients are still finite.

    Raises:
        ValueError: for a run without disagreement (one learner, SSGD, or checkpoints before it began), for checkpoints that are not
            there or hold weights that are not finite, and for unknown places and shapes.

    Cost: on the weights none; on the gradient, at each checkpoint, 2 n K minibatch gradients and n + 1 full gradients.
    """
    return calibrate_shapes(
        run, place, [(shape, drift)], every=every, num_draws=num_draws, seed=seed, data_root=data_root, device=device, task=task
    )[shape, drift]  # fmt: skip


def calibrate_shapes(
    run: Run | str | Path,
    place: NoisePlace,
    kinds: Sequence[Kind],
    *,
    every: int | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    data_root: str | Path | None = None,
    device: str | None = None,
    task: Task | None = None,
) -> dict[Kind, NoiseProfile]:
    """Several (shape, drift) of the same place from the same measurements; see `calibrate_noise`."""
    run = open_run(run) if isinstance(run, str | Path) else run
    _check(run, place, kinds)
    steps = _steps(run, every)
    objective: Objective | None = None
    if place == "gradient":
        objective = _objective(run, task, data_root, device)
    found: dict[Kind, list[tuple[Tensor, Tensor | None]]] = {kind: [] for kind in kinds}
    kept: list[int] = []
    layers: tuple[int, ...] = ()
    strength = 0.0
    for step in steps:
        learners = run.learners(step)
        layers = layer_sizes(learners.layout)
        measured = _rows(run, learners, objective, num_draws, seed)
        if measured is None:
            break
        rows, mean = measured
        kept.append(step)
        strength = max(strength, float(rows.double().square().sum()))
        for shape, mode in kinds:
            parted, drift = (rows, None) if mean is None else drift_apart(rows, mean, mode)
            found[shape, mode].append((noise_factors(parted, shape, layers), drift))
    if not strength > 0:
        raise ValueError(
            f"{run.path}: the learners are equal at every checkpoint used (steps {', '.join(map(str, kept[:6])) or 'none'}"
            f"{', ...' if len(kept) > 6 else ''}), so there is no disagreement to match; use later or more frequent checkpoints"
        )
    facts = {"source": run.path.name, "order": run.config.order, "place": place, "seed": seed}
    facts |= {"num_draws": num_draws} if place == "gradient" else {}
    return {
        (shape, mode): NoiseProfile(
            steps=tuple(kept), place=place, shape=shape, factors=torch.stack([f for f, _ in parts]), layers=layers,
            drift=None if parts[0][1] is None else torch.stack([d for _, d in parts if d is not None]), drift_mode=mode, facts=facts,
        )
        for (shape, mode), parts in found.items()
    }  # fmt: skip


def _check(run: Run, place: str, kinds: Sequence[tuple[str, str]]) -> None:
    config = run.config
    if place not in PLACES:
        raise ValueError(f"no such place for noise: {place}; there are {', '.join(PLACES)}")
    for shape, drift in kinds:
        if shape not in SHAPES:
            raise ValueError(f"no such noise shape: {shape}; there are {', '.join(SHAPES)}")
        if drift not in DRIFTS:
            raise ValueError(f"no such treatment of the drift: {drift}; there are {', '.join(DRIFTS)}")
        if drift != "as-noise" and place == "weights":
            raise ValueError(f"drift {drift} is for noise on the gradient; deviations of the weights have no mean")
    if config.algorithm != "dpsgd" or config.num_learners < 2:
        raise ValueError(
            f"{run.path} is a run of {config.algorithm} with {config.num_learners} learner(s), which has no disagreement to match; "
            "name a DPSGD run of several learners"
        )


def _steps(run: Run, every: int | None) -> list[int]:
    """Checkpoints to match."""
    if not run.steps:
        raise ValueError(f"{run.path} has no checkpoints")
    if not every:
        return run.steps
    wanted = list(range(0, run.steps[-1] + 1, every))
    missing = [s for s in wanted if s >= run.steps[0] and s not in run.steps]
    if missing:
        raise ValueError(
            f"{run.path} has no checkpoint of step {missing[0]}, so its noise cannot be refreshed every {every} steps; there are "
            f"{', '.join(map(str, run.steps[:8]))}{', ...' if len(run.steps) > 8 else ''}"
        )
    return [s for s in wanted if s in run.steps]


def _objective(run: Run, task: Task | None, data_root: str | Path | None, device: str | None) -> Objective:
    """L over the data that the run was trained on."""
    task, config = task or get_task(run.task), run.config
    train_data, _ = task.load_data(data_root)
    recorded = run.record["data"]["fingerprint"]["train"]
    if recorded is not None and train_data.fingerprint() != recorded:
        raise ValueError(
            f"{run.path} was trained on other data (fingerprint {recorded}, here {train_data.fingerprint()})"
        )
    where = torch.device(device) if device else config.torch_device()
    return Objective(task.initial_model(config.seed), task.loss_fn, train_data, device=where, dtype=config.torch_dtype)


def _rows(
    run: Run, learners: Learners, objective: Objective | None, num_draws: int, seed: int
) -> tuple[Tensor, Tensor | None] | None:
    """Rows (K, d) of the noise at a checkpoint and their known mean: deviations over sqrt(n) without one, or draws of xi_D.

    None where a run that diverged has no finite gradients any more.
    """
    if not learners.is_finite:
        raise ValueError(f"{run.path}: the checkpoint of step {learners.step} holds weights that are not finite")
    points, mean = run_points(run, learners), learners.mean
    if objective is None:
        found, drift = (points - mean) / len(points) ** 0.5, None
    else:
        mean, points = mean.to(objective.device, objective.dtype), points.to(objective.device, objective.dtype)
        objective = objective.recalibrated(mean)
        draws = draw_gradients(
            objective, mean, points, num_learners=len(points), local_batch_size=run.config.local_batch_size, num_draws=num_draws,
            seed=seed,
        )  # fmt: skip
        found = draws.at_points - draws.at_mean
        gradient = objective.gradient(mean)
        drift = smoothed_by_points(objective, points, mean, gradient) - gradient
        found, drift = found.cpu(), drift.cpu()
    finite = bool(torch.isfinite(found).all()) and (drift is None or bool(torch.isfinite(drift).all()))
    if finite:
        return found, drift
    if run.status == "diverged":
        return None
    raise ValueError(f"{run.path}: the noise at step {learners.step} is not finite; its weights are too far apart")


def run_points(run: Run, learners: Learners) -> Tensor:
    """Where a DPSGD run takes the gradients of the step after a checkpoint: w_j, or (M w)_j under CTA, (n, d)."""
    config, record = run.config, run.record["topology"]
    topology = Topology(record["name"], record["num_learners"], record["kind"], np.asarray(record["matrices"]))
    matrix = topology.damped(config.gamma_at(learners.step)).matrix(config.seed, learners.step)
    return gradient_points(config.algorithm, config.order, learners.weights, torch.as_tensor(matrix))


def layer_sizes(layout: ParameterLayout) -> tuple[int, ...]:
    """Coordinates of each layer in order: consecutive parameters that the same module owns.

    >>> names, shapes = ("0.weight", "0.bias", "2.weight"), (torch.Size([2, 3]), torch.Size([2]), torch.Size([4]))
    >>> layer_sizes(ParameterLayout(names, shapes))
    (8, 4)
    """
    sizes: list[int] = []
    previous = None
    for name, size in zip(layout.names, layout.sizes, strict=True):
        owner = name.rpartition(".")[0]
        if owner == previous:
            sizes[-1] += size
        else:
            sizes.append(size)
        previous = owner
    return tuple(sizes)
