"""Stage 2: effective learning rate, noise and smoothness along training, at a rate where all converge and one where the algorithms differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xarray as xr
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from landscape.checkpoints import Run
from landscape.checkpoints.format import RUN_FILE
from landscape.curvature.lanczos import top_eigenpairs
from landscape.data.dataset import Examples
from landscape.experiments.checkpoint import Checkpoint, MeasureConfig
from landscape.experiments.measure import run_objective
from landscape.experiments.train import train
from landscape.experiments.variants import replica_config, replica_key
from landscape.results import load_groups, save_dataset
from landscape.tasks import Task
from landscape.theory.smoothed_loss import smoothed_loss
from landscape.theory.smoothing import smoothed_curvature
from paper_figs.studies.declared import Study
from paper_figs.studies.mapping import batch_config, variant_of

MEASURED_FILE = "along.nc"
TWENTIETHS = 20


@dataclass(frozen=True)
class Place:
    """Where on the grid stage 2 looks.

    Attributes:
        kind: "both" (every seed of SSGD and of DPSGD converges) or "differ".
        batch: index of the batch size.
        rate: index of the learning rate.
    """

    kind: str
    batch: int
    rate: int


def places(found: xr.Dataset) -> list[Place]:
    """Which cells of a map to look at, by a rule and not by eye.

    "differ": where the numbers of converged seeds of SSGD and DPSGD differ most, in either direction; of several such cells that of the largest
    batch, and there of the smallest rate. "both": the largest rate at which every seed of both converges, at that batch size if there is one
    there, else at the largest batch that has one. Either may be missing.
    """
    hits = (found["outcome"] == "converged").sum("seed").transpose("variant", "total_batch", "rate")
    ssgd, dpsgd = (hits.sel(variant=name).values.astype(int) for name in ("ssgd", "dpsgd"))
    gap = np.abs(dpsgd - ssgd)
    chosen: list[Place] = []
    batches = list(range(gap.shape[0]))[::-1]
    if gap.max() > 0:
        batch = next(b for b in batches if gap[b].max() == gap.max())
        chosen.append(Place("differ", batch, int(np.argmax(gap[batch]))))
        batches = [batch, *(b for b in batches if b != batch)]
    every = (ssgd == found.sizes["seed"]) & (dpsgd == found.sizes["seed"])
    for batch in batches:
        if every[batch].any():
            chosen.insert(0, Place("both", batch, int(np.flatnonzero(every[batch])[-1])))
            break
    return chosen


def run_along(
    study: Study, found: xr.Dataset, task: Task, train_data: Examples, work: Path, *, quiet: bool = False
) -> xr.Dataset | None:
    """Train with checkpoints and measure; what `work` holds already is not done again.

    Returns:
        (run, point): see `_measured`; or None where there is nothing to look at. batch_norm in the attributes tells whether the network has
        BatchNorm: all is then measured with its statistics frozen at w_a (theory.md sec. 1), also at the learners' weights, where training
        takes each minibatch's own; learners far from w_a then see another, steeper function than they train on.
    """
    parts = []
    for place in places(found):
        for seed in study.seeds[: study.along.num_seeds]:
            runs: dict[str, Run] = {}
            for name in sorted(study.along.variants, key=lambda v: v != "dpsgd"):  # SSGD* is matched to DPSGD's run
                runs[name] = _run(study, place, name, seed, task, train_data, work / "along")
                part = _measured(study, runs[name], task, quiet=quiet)
                labels = {"kind": place.kind, "variant": name, "seed": seed, "total_batch": study.total_batches[place.batch],
                          "learning_rate": study.rates_at(place.batch)[place.rate]}  # fmt: skip
                parts.append(part.assign({key: ((), value) for key, value in labels.items()}))
    if not parts:
        return None
    modules = task.initial_model(study.seeds[0]).modules()
    return together(parts).assign_attrs(batch_norm=int(any(isinstance(m, _BatchNorm) for m in modules)))


def together(parts: list[xr.Dataset]) -> xr.Dataset:
    """Runs beside each other; nan where one has fewer checkpoints, fewer losses, or (diverged early) nothing measured."""
    numbered = [
        part.assign_coords({name: np.arange(part.sizes[name]) for name in ("point", "logged") if name in part.dims})
        for part in parts
    ]
    made = xr.concat(
        numbered,
        "run",
        join="outer",
        combine_attrs="drop_conflicts",
        data_vars="all",
        coords="minimal",
        compat="override",
    )
    return made.drop_vars(["point", "logged"]).set_coords(
        ["kind", "variant", "seed", "total_batch", "learning_rate", "step"]
    )


def marks(study: Study, num_steps: int) -> tuple[int, list[int]]:
    """Steps between checkpoints, and the checkpoints that are measured."""
    every = max(1, num_steps // TWENTIETHS)
    wanted = (every * round(mark / TWENTIETHS * num_steps / every) for mark in study.along.marks)
    return every, sorted({min(max(step, every), num_steps) for step in wanted})


def _run(study: Study, place: Place, name: str, seed: int, task: Task, train_data: Examples, out: Path) -> Run:
    """The map's run once more, with checkpoints."""
    config = batch_config(study, place.batch, len(train_data))
    rate = study.rates_at(place.batch)[place.rate]
    every, _ = marks(study, config.num_steps)

    variant = variant_of(name)
    config = replace(replica_config(config, variant, rate, seed), checkpoint_every=every)
    path = out / f"{name}-a{rate:g}-s{seed}-{replica_key(task, config, variant, train_data.fingerprint())}"
    if name == "ssgd-star-matched":
        config = replace(config, sigma0=str(_run(study, place, "dpsgd", seed, task, train_data, out).path))
    return train(task, config, path, resume=(path / RUN_FILE).exists(), quiet=True)


def _measured(study: Study, run: Run, task: Task, *, quiet: bool) -> xr.Dataset:
    """What was measured of one run, over `point`, with its losses over `logged`; kept in the run's directory step by step.

    alpha_e_ratio, Delta and their parts: means over draws with errors, and predictions of E alpha_e/alpha; lambda_max: see `_look`. A part of
    `landscape measure`, whose other measures would cost many times as much.
    """
    a, config = study.along, run.config
    wanted = [s for s in marks(study, config.num_steps)[1] if s in run.steps and run.learners(s).is_finite]

    def settings(count: int | None) -> MeasureConfig:
        known = int(run.record["data"]["num_train"])
        chosen = None if count is None else min(max(count, config.local_batch_size), known)
        return MeasureConfig(num_draws=a.num_draws, num_smoothing_samples=a.num_samples, num_eigenpairs=1, max_matvecs=a.max_matvecs,
                             smoothing_matvecs=a.smoothing_matvecs, num_examples=chosen)  # fmt: skip

    rough, curved = settings(a.num_examples), settings(a.curvature_examples)
    path, key = run.path / MEASURED_FILE, repr((rough, curved))
    kept = load_groups(path).get("/")
    kept = kept if kept is not None and kept.attrs.get("settings") == key else None
    missing = [s for s in wanted if kept is None or s not in kept["step"].values]
    if missing:
        objectives = [run_objective(run, task, None, None, False, s)[0] for s in (rough, curved)]
    for step in tqdm(missing, unit="checkpoint", desc=run.path.name, disable=quiet or None, leave=False):
        at = [Checkpoint(run, step, task, o, s) for o, s in zip(objectives, (rough, curved), strict=True)]
        here = _look(*at).expand_dims(step=[step])
        kept = here if kept is None else xr.concat([kept, here], "step", combine_attrs="drop").sortby("step")
        kept = kept.assign_attrs(settings=key)
        save_dataset(kept, path)
    made = xr.Dataset({"step": ("point", np.asarray(wanted, dtype=float))})
    if kept is not None and wanted:
        made = made.merge(kept.sel(step=wanted).rename(step="point").drop_vars("point").drop_attrs(deep=False))
    known = run.metrics
    losses = (
        known.dropna(subset=["train_loss"]) if "train_loss" in known else known.iloc[:0].assign(step=[], train_loss=[])
    )
    made["logged_step"] = ("logged", losses["step"].to_numpy(dtype=float))
    made["train_loss"] = ("logged", losses["train_loss"].to_numpy(dtype=float), {"units": "nats"})
    return made.assign(status=((), run.status), diverged_at=((), int(run.record.get("diverged_at", -1))))


def _look(at: Checkpoint, curved: Checkpoint) -> xr.Dataset:
    """Rate and noise of a checkpoint, and curvatures from (maybe) fewer examples.

    lambda_max is that of L at w_a; lambda_max_smoothed that of the loss as the algorithm smooths it, by the learners' own deviations or SSGD*'s
    noise (SSGD: not at all, so that the two differ by what is at kinks). Their errors are those over deviations; residuals beside.
    """
    drawn = at.decomposition
    found = drawn.map(lambda v: v.astype(float) if v.dtype == bool else v, keep_attrs=True)[
        [name for name in SCALARS if name in drawn and drawn[name].ndim == 0]
    ].drop_vars(["layer", "draw"], errors="ignore")
    exact = float(drawn["alpha_e_ratio_exact"]) if "alpha_e_ratio_exact" in drawn else math.nan
    predicted = {"exact": (exact, 0.0 if math.isfinite(exact) else math.nan), "isotropic": (1.0, 0.0)}
    if at.sigma0 or at.standing.consensus_distance > 0:
        isotropic = smoothed_loss(at.objective, at.standing, at.gradient, "isotropic", num_samples=2 * at.settings.num_smoothing_samples,
                                  seed=at.seed, sigma=at.sigma0).rate_ratio  # fmt: skip
        predicted["isotropic"] = isotropic.value, isotropic.stderr
    s = curved.settings
    top = top_eigenpairs(
        curved.hessian, 1, "LA", tol=0.01, max_matvecs=s.max_matvecs, seed=curved.seed, miss_probability=1.0
    )
    smooth = smoothed_curvature(curved.objective, curved.standing, kernel="isotropic" if curved.sigma0 else "learners",
                                num_samples=s.num_smoothing_samples, max_matvecs=s.smoothing_matvecs, seed=curved.seed, sigma=curved.sigma0)  # fmt: skip
    numbers = {
        "sigma_w": (
            at.sigma0 or math.sqrt(at.learners.weight_variance),
            "per-parameter spread of the learners, or of SSGD*'s noise",
        ),
        "lambda_max": (float(top.values[0]), "largest eigenvalue of the Hessian of L at w_a"),
        "lambda_max_residual": (float(top.residuals[0]), "|H v - lambda v|"),
        "lambda_max_smoothed": (smooth.lambda_max, "largest curvature of the smoothed loss at w_a, kinks included"),
        "lambda_max_smoothed_stderr": (
            smooth.lambda_max_stderr,
            "over deviations; 0 for the learners' own, which are all of them",
        ),
        "lambda_max_smoothed_residual": (smooth.residual, "|F v - lambda v|"),
    }
    return found.assign({name: ((), value, {"long_name": text}) for name, (value, text) in numbers.items()}).assign(
        alpha_e_ratio_predicted=("prediction", [v for v, _ in predicted.values()], {"long_name": "E alpha_e/alpha as predicted"}),
        alpha_e_ratio_predicted_stderr=("prediction", [e for _, e in predicted.values()]),
    ).assign_coords(prediction=list(predicted))  # fmt: skip


SCALARS = (
    *(f"{name}_{end}" for name in ("alpha_e_ratio", "Delta", "Delta_S", "Delta_2", "cross", "gradient_norm_squared") for end in ("mean", "stderr")),
    "gradient_norm_squared", "gradient_is_significant", "systematic_share", "systematic_share_stderr",
)  # fmt: skip
"""What is kept of the decomposition."""
