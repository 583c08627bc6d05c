"""Stage 1: every algorithm at every batch size, rate and seed; who converges, and to what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import xarray as xr

from landscape.data.dataset import Examples
from landscape.experiments.sweep import stability_map
from landscape.experiments.train import outcome
from landscape.experiments.variants import Variant, variant_named
from landscape.tasks import Task, get_task
from landscape.training.config import TrainConfig
from paper_figs.studies.declared import VARIANTS, Study

JUDGED_SHARE, LEAST_JUDGED = 0.2, 3
"""Of a run: the losses logged in its last fifth are what it is judged by, and those before it where these are fewer than three."""


def load_task(study: Study, data_root: str | Path | None) -> tuple[Task, Examples]:
    """The study's task, whose data are read once, and its training examples."""
    task = get_task(study.task)
    parts = task.load_data(data_root)
    return replace(task, load_data=lambda root: parts), parts[0]


def variant_of(name: str) -> Variant:
    """One of VARIANTS as the map knows it."""
    return variant_named(name.removesuffix("-matched"))


def batch_config(study: Study, batch: int, num_examples: int) -> TrainConfig:
    """What all runs at the batch of this index share."""
    steps = study.num_steps(batch, num_examples)
    return TrainConfig(
        algorithm="dpsgd", learning_rate=study.rates_at(batch)[0], num_learners=study.num_learners,
        local_batch_size=study.local_batch_sizes[batch], num_steps=steps, topology="ring", momentum=study.momentum,
        weight_decay=study.weight_decay, schedule=study.schedule(batch, num_examples), log_every=study.log_every(batch, num_examples),
        evaluation_examples=study.evaluation_examples,
    )  # fmt: skip


def run_map(study: Study, task: Task, train_data: Examples, work: Path, *, quiet: bool = False) -> xr.Dataset:
    """Train the whole grid; what `work` holds of it already is not run again.

    Returns:
        (total_batch, variant, rate, seed[, point]): see `joined`.
    """
    maps = []
    for batch, total in enumerate(study.total_batches):
        config = batch_config(study, batch, len(train_data))
        variants = [variant_of(name) for name in VARIANTS]
        out = work / "map" / f"batch-{total}"
        maps.append(stability_map(task, config, variants, study.rates_at(batch), study.seeds, out, quiet=quiet))
    return joined(study, task, maps)


def joined(study: Study, task: Task, maps: list[xr.Dataset]) -> xr.Dataset:
    """The maps of all batch sizes on one grid.

    Args:
        study: whose.
        task: its constant_loss sets the level of convergence.
        maps: of `stability_map`, one a batch size.

    Returns:
        learning_rate (total_batch, rate), base_rate (rate), step (total_batch, point), train_loss and sigma_w (..., point; nan beyond a
        shorter run's end), final_loss (median over the last fifth of the run, three losses or more; inf where it diverged), outcome, diverged_at, test_accuracy.
    """
    parts = []
    level = study.converged_share * task.constant_loss
    points = max(m.sizes["step"] for m in maps)
    for batch, found in enumerate(maps):
        found = found.transpose("variant", "learning_rate", "seed", "step").sel(
            learning_rate=list(study.rates_at(batch))
        )
        steps = found["step"].values
        alive = found["diverged_at"].values < 0
        last = max(LEAST_JUDGED, int((steps >= (1 - JUDGED_SHARE) * steps[-1]).sum()))
        judged = found["train_loss"].values[..., -last:]
        final = np.where(alive, np.median(judged, -1), np.inf)
        ended = outcome(judged.reshape(-1, judged.shape[-1]).T, level, task.constant_loss, alive.ravel())
        grid = ("variant", "rate", "seed")
        room = (0, points - len(steps))
        series = {
            name: ((*grid, "point"), np.pad(found[name].values, ((0, 0),) * 3 + (room,), constant_values=np.nan).astype("float32"), found[name].attrs)
            for name in ("train_loss", "sigma_w")
        }  # fmt: skip
        parts.append(
            xr.Dataset(
                {
                    **series,
                    "final_loss": (
                        grid,
                        final,
                        {
                            "long_name": "median training loss of w_a in the last fifth, of three or more",
                            "units": "nats",
                        },
                    ),
                    "outcome": (grid, np.asarray(ended, dtype=object).reshape(alive.shape)),
                    "diverged_at": (grid, found["diverged_at"].values.astype("int32"), found["diverged_at"].attrs),
                    "test_accuracy": (
                        grid,
                        found["test_accuracy"].values.astype("float32"),
                        found["test_accuracy"].attrs,
                    ),
                    "num_steps": ((), int(steps[-1])),
                },
                coords={
                    "variant": list(VARIANTS),
                    "seed": list(study.seeds),
                    "base_rate": ("rate", list(study.learning_rates)),
                    "learning_rate": ("rate", list(study.rates_at(batch))),
                    "step": ("point", np.pad(steps.astype(float), room, constant_values=np.nan)),
                },
            )
        )
    made = xr.concat(
        parts,
        "total_batch",
        data_vars="all",
        coords=["learning_rate", "step"],
        compat="equals",
        join="exact",
        combine_attrs="drop_conflicts",
    )
    made = made.assign_coords(total_batch=list(study.total_batches))
    return made.assign_attrs(threshold=level, constant_loss=task.constant_loss, data_fingerprint=maps[0].attrs["data_fingerprint"],
                             num_examples=maps[0].attrs["num_examples"])  # fmt: skip


def outcome_lines(found: xr.Dataset) -> list[str]:
    """The map as text: at every batch and rate, seeds that converged and the median final loss, by algorithm."""
    lines = [
        f"converged below {found.attrs['threshold']:.3g} nats (constant output: {found.attrs['constant_loss']:.3g})"
    ]
    for total in found["total_batch"].values:
        at = found.sel(total_batch=total)
        lines.append(f"total batch {total}, {int(at['num_steps'])} steps")
        for name in at["variant"].values:
            row = at.sel(variant=name)
            cells = []
            for i in range(at.sizes["rate"]):
                here = row.isel(rate=i)
                hits = int((here["outcome"] == "converged").sum())
                cells.append(
                    f"{float(here['learning_rate']):g}: {hits}/{at.sizes['seed']} {float(here['final_loss'].median()):.2f}"
                )
            lines.append(f"  {name:18} " + "  ".join(cells))
    return lines
