"""Stability maps: algorithms x learning rates x seeds, replicas stacked, and where each algorithm's edge lies."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from tqdm import tqdm

from landscape.data.dataset import Examples
from landscape.experiments.interrupt import Interruptible
from landscape.experiments.recording import averaged_for_evaluation, is_judged
from landscape.experiments.train import outcome
from landscape.experiments.variants import Variant as Variant
from landscape.experiments.variants import calibrated_profile, replica_config, replica_key, variant_named
from landscape.ranks import refuse_several
from landscape.results import load_dataset, save_dataset, stamp
from landscape.tasks import Task, get_task
from landscape.training.config import TrainConfig
from landscape.training.evaluate import evaluate
from landscape.training.loop import Program
from landscape.training.topology import topology as make_topology

MAP_FILE = "stability-map.nc"
REPLICAS_AT_ONCE = {"cpu": 12, "cuda": 96}
"""Replicas that advance together: what is lost to an interruption."""


def stability_map(
    task: Task,
    config: TrainConfig,
    variants: Sequence[Variant],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    *,
    data_root: str | Path | None = None,
    quiet: bool = False,
) -> xr.Dataset:
    """Train every variant at every rate with every seed; finished parts are kept in `out` and not run again.

    Args:
        task: what is trained.
        config: everything else; its algorithm, order, learning rate, sigma0 and seed are overridden.
        variants: the columns; "matched" noise needs plain DPSGD (AWC) among them. For "calibrated" noise a DPSGD run with checkpoints
            is recorded under OUT/runs for each rate and seed, and its profile kept under OUT/noise.
        learning_rates: base rates.
        seeds: seeds, each with its own initial weights and data order, shared by all variants and rates.
        out: where parts are kept, as netCDF.
        data_root: for tasks that read from disk.
        quiet: no progress bar.

    Returns:
        (variant, learning_rate, seed[, step]): train_loss of w_a and sigma_w along training, median_last_loss over the last
        50 steps, outcome, diverged_at (-1 if finite), test_accuracy of the final w_a.
    """
    refuse_several("a stability map")
    if any(v.sigma0 == "matched" for v in variants) and Variant("dpsgd") not in variants:
        raise ValueError("matched SSGD* noise needs DPSGD (AWC) in the same map")
    if any(v.sigma0 == "calibrated" and v.noise_every < 1 for v in variants):
        raise ValueError("calibrated SSGD* noise needs noise_every of at least 1")
    names = [v.name for v in variants]
    if len(set(names)) < len(names):
        raise ValueError(
            f"variants of one name cannot share a map: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
    train_data, test = task.load_data(data_root)
    pairs = [(float(rate), int(seed)) for rate in learning_rates for seed in seeds]
    total = len(variants) * len(pairs) * config.num_steps
    done: dict[str, xr.Dataset] = {}
    with tqdm(total=total, unit="step", desc="stability map", disable=quiet or None, delay=2, leave=False) as bar:
        for variant in sorted(variants, key=lambda v: v.sigma0 == "matched"):
            reference = done[Variant("dpsgd").name] if variant.sigma0 == "matched" else None
            done[variant.name] = _column(
                task, config, variant, variants, pairs, train_data, test, reference, out, bar, data_root
            )
    names = [v.name for v in variants]
    joined = xr.concat([done[name] for name in names], pd.Index(names, name="variant"), combine_attrs="drop")
    index = pd.MultiIndex.from_tuples(pairs, names=("learning_rate", "seed"))
    coords = xr.Coordinates.from_pandas_multiindex(index, "replica")
    unstacked = joined.drop_vars(["learning_rate", "seed"]).assign_coords(coords).unstack("replica")
    return stamp(unstacked, task=task.name, config=json.dumps(config.to_json()), threshold=task.threshold, constant_loss=task.constant_loss,
                 num_examples=len(train_data), data_fingerprint=train_data.fingerprint())  # fmt: skip


def _column(
    task: Task, config: TrainConfig, variant: Variant, variants: Sequence[Variant], pairs: list[tuple[float, int]],
    train_data: Examples, test: Examples, reference: xr.Dataset | None, out: Path, bar: tqdm, data_root: str | Path | None,
) -> xr.Dataset:  # fmt: skip
    """All replicas of a variant, in the order of the (rate, seed) pairs: those run before are read, the others run in groups."""
    configs = [replica_config(config, variant, *pair) for pair in pairs]
    fingerprint = train_data.fingerprint()
    paths = [out / f"{variant.name}-{replica_key(task, c, variant, fingerprint)}.nc" for c in configs]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    bar.update((len(pairs) - len(missing)) * config.num_steps)
    size = REPLICAS_AT_ONCE.get(torch.device(config.device).type, 12)
    graph = make_topology(config.topology, config.num_learners)
    for start in range(0, len(missing), size):
        group = missing[start : start + size]
        rates, seeds = [pairs[i][0] for i in group], [pairs[i][1] for i in group]
        levels = (
            None if reference is None else np.stack([_matched(reference, *pairs[i], config.num_steps) for i in group])
        )
        bar.set_postfix_str(variant.name)
        profiles = (
            [calibrated_profile(task, config, variant, variants, *pairs[i], out, data_root, fingerprint) for i in group]
            if variant.sigma0 == "calibrated"
            else None
        )
        program = Program(
            task, configs[group[0]], graph, train_data, seeds=seeds, learning_rates=rates, sigma0=levels, profiles=profiles
        )  # fmt: skip
        result = run_replicas(program, test, bar).assign_coords(
            learning_rate=("replica", rates), seed=("replica", seeds)
        )
        for position, i in enumerate(group):
            save_dataset(
                stamp(result.isel(replica=[position]), variant=variant.name, config=json.dumps(configs[i].to_json())),
                paths[i],
            )
    return xr.concat([load_dataset(path) for path in paths], "replica", combine_attrs="drop")


def _matched(reference: xr.Dataset, rate: float, seed: int, num_steps: int) -> np.ndarray:
    here = np.flatnonzero((reference["learning_rate"].values == rate) & (reference["seed"].values == seed))[0]
    recorded = reference["sigma_w"].values[here]
    known = np.isfinite(recorded)
    return np.interp(np.arange(num_steps), reference["step"].values[known], recorded[known])


def run_replicas(program: Program, test: Examples, bar: tqdm) -> xr.Dataset:
    """Run a program from its start to its end in memory; (replica[, step]), see `stability_map`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, between two steps.
    """
    config = program.config
    state = program.initial_state()
    alive = torch.ones(program.num_replicas, dtype=torch.bool, device=program.device)
    diverged_at = np.full(program.num_replicas, -1)
    logged, losses, spreads, last = [], [], [], []
    d = program.model.layout.num_parameters
    with Interruptible() as interrupt:
        while True:
            step = state.step
            regular = step % config.log_every == 0 or step == config.num_steps
            if regular or is_judged(program, step):
                mean, buffers = averaged_for_evaluation(program, state)
                loss = evaluate(program.evaluation_model, mean, buffers, program.evaluated)[0].cpu().numpy()
                if is_judged(program, step):
                    last.append(loss)
                if regular:
                    logged.append(step)
                    losses.append(loss)
                    spreads.append(program.consensus_distances(state).cpu().numpy() / math.sqrt(d))
            if step == config.num_steps:
                break
            state, record = program.step(state, alive)
            died = (alive & ~record.alive).cpu().numpy()
            diverged_at[died] = step
            alive = record.alive
            bar.update(program.num_replicas)
            if interrupt.requested:
                raise KeyboardInterrupt("stopped between two steps; finished parts are kept")
    finite = alive.cpu().numpy()
    mean, buffers = averaged_for_evaluation(program, state)
    accuracy = (
        evaluate(program.evaluation_model, mean, buffers, program.part(test).to(program.device, program.dtype))[1]
        .cpu()
        .numpy()
    )
    final = np.asarray(last)
    return xr.Dataset(
        {
            "train_loss": (
                ("replica", "step"),
                np.asarray(losses).T,
                {"long_name": "training loss of w_a", "units": "nats"},
            ),
            "sigma_w": (
                ("replica", "step"),
                np.asarray(spreads).T,
                {"long_name": "per-parameter weight spread sqrt(Tr Sigma_w / d)"},
            ),
            "median_last_loss": (
                "replica",
                np.where(finite, np.median(final, 0), np.inf),
                {"long_name": "median training loss of w_a, last 50 steps", "units": "nats"},
            ),
            "outcome": ("replica", outcome(final, program.task.threshold, program.task.constant_loss, finite)),
            "diverged_at": (
                "replica",
                diverged_at,
                {"long_name": "step of the first non-finite loss or gradient, -1 if none"},
            ),
            "test_accuracy": ("replica", accuracy, {"long_name": "held-out accuracy of the final w_a"}),
        },
        coords={"step": np.asarray(logged)},
    )


def run_sweep(
    task: str, config: TrainConfig, algorithms: Sequence[str], learning_rates: Sequence[float], seeds: Sequence[int], out: Path,
    *, data_root: str | Path | None = None, quiet: bool = False,
) -> xr.Dataset:  # fmt: skip
    """A stability map by names of algorithms ("dpsgd-atc", "ssgd-star" with matched noise), written to OUT/stability-map.nc."""
    variants = [variant_named(name) for name in algorithms]
    for rate in learning_rates:
        replace(config, learning_rate=rate)  # checked before anything runs
    result = stability_map(
        get_task(task), config, variants, learning_rates, seeds, out / "map", data_root=data_root, quiet=quiet
    )
    save_dataset(result, out / MAP_FILE)
    return result
