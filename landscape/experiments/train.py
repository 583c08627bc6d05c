"""One training run on one process or many, recorded in a run directory; resumes bit-identically on the CPU."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from tqdm import tqdm

from landscape.checkpoints import CheckpointError, Learners, Run, open_run
from landscape.checkpoints.format import CHECKPOINTS, METRICS_FILE, digest, step_name, write_atomically
from landscape.checkpoints.reader import restore_state
from landscape.checkpoints.writer import RunWriter
from landscape.data.dataset import Examples
from landscape.experiments.interrupt import Interruptible
from landscape.experiments.profiles import load_profile, profile_for, save_profile
from landscape.experiments.recording import announce, checkpoint, is_judged, judged_losses, metrics
from landscape.experiments.run_directory import (
    LAUNCH,
    NOISE_FILE,
    check_alike,
    check_same,
    check_shared,
    claim,
    is_restarted,
    launch_record,
)
from landscape.provenance import provenance
from landscape.ranks import DEFAULT_TIMEOUT, current, started
from landscape.tasks import Task, get_task
from landscape.theory.stability import learning_rate_thresholds
from landscape.training.config import TrainConfig
from landscape.training.diagnostics import Diagnostics
from landscape.training.distributed import DistributedCommunicator
from landscape.training.loop import Program
from landscape.training.noise import NoiseProfile
from landscape.training.state import LearnerState
from landscape.training.topology import Topology
from landscape.training.topology import topology as make_topology


@dataclass(frozen=True)
class Origin:
    """Where a run begins that does not begin at its initial weights.

    Attributes:
        learners: at that step.
        history: lines of metrics.jsonl before it.
        facts: what run.json tells of it, under "replayed".
        fingerprint: of the data that the run it comes from was trained on.
        profile: SSGD*'s matched noise, if it is to be that of the run it comes from.
    """

    learners: Learners
    history: Sequence[str]
    facts: dict[str, Any]
    fingerprint: dict[str, str]
    profile: NoiseProfile | None = None


def train(
    task: str | Task,
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    data_root: str | Path | None = None,
    topology: nx.Graph | np.ndarray | Topology | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    timeout: float | int = DEFAULT_TIMEOUT,
) -> Run:
    """Train, and record a run directory.

    Under torchrun, or in a process group that is set up already, the learners are spread over the processes, and every one of them makes
    this call. When torchrun restarts them, the run goes on from its last whole checkpoint, which any number of processes can also do
    later with `resume`. Processes on several machines need `out` on a file system that all of them share, as every one writes its own
    learners there; data and code may lie anywhere, if they are the same.

    Args:
        task: a name (`landscape tasks`), "module:function", or a Task.
        config: the configuration.
        out: the run directory; by default runs/TASK-ALGORITHM-aRATE-sSEED.
        data_root: where data sets lie, for tasks that read them from disk.
        topology: a graph or matrix of your own, instead of the config's name.
        resume: continue from the last checkpoint in `out`, with the same configuration; a complete run is returned as it is.
        overwrite: delete a run that is in `out`.
        quiet: no progress bar and no messages.
        timeout: seconds that a process waits for the others before it gives up; more than any of them needs to load the data or to
            write a checkpoint.

    Raises:
        ValueError: for anything wrong with the arguments, or a run in `out` and neither `resume` nor `overwrite`.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when a checkpoint has been written.
        ConnectionError: another process did not come, or was lost.
    """
    with started(config.device, timeout) as ranks:
        with ranks.agree():
            task = get_task(task)
            graph = make_topology(config.topology if topology is None else topology, config.num_learners)
        out = Path(out or f"runs/{task.name}-{config.algorithm}-a{config.learning_rate:g}-s{config.seed}")
        return record_run(
            task, config, graph, out, data_root=data_root, resume=resume, overwrite=overwrite, quiet=quiet, origin=None
        )


def record_run(
    task: Task, config: TrainConfig, graph: Topology, out: Path, *, data_root: str | Path | None, resume: bool, overwrite: bool,
    quiet: bool, origin: Origin | None,
) -> Run:  # fmt: skip
    """Train from the initial weights or from `origin`, and record it. See `train`, and `landscape.experiments.replay`."""
    ranks = current()
    quiet = quiet or not ranks.leads
    check_alike(
        ranks,
        version_of_torch=torch.__version__,
        task=task.name,
        configuration={k: v for k, v in config.to_json().items() if k != "device"},
        topology=digest(graph.matrices.tobytes()),
    )
    launched = launch_record(ranks)
    with ranks.agree():
        device = config.torch_device()
        _check_request(config, graph, out, resume=resume)
        communicator = (
            DistributedCommunicator(ranks, config.num_learners, ordered=config.reproducible) if ranks.size > 1 else None
        )
        found = None
        if ranks.leads:
            restarted = is_restarted(out, launched)
            if claim(out, resume=resume or restarted, overwrite=overwrite and not restarted):
                found = open_run(out)
    # the first process's view of the directory is everybody's
    run, steps = ranks.collect((found, found.steps if found else []))[0]
    with ranks.agree():
        train_data, test_data = task.load_data(data_root)
        fingerprint = {"train": train_data.fingerprint(), "test": test_data.fingerprint()}
        if origin is not None and origin.fingerprint != fingerprint:
            raise ValueError("the data are not the examples that the run was trained on (fingerprints differ)")
        if run is not None:
            check_same(run, task, config, graph, fingerprint)
            if run.record.get("replayed") != (None if origin is None else origin.facts):
                raise ValueError(
                    f"{out} holds a run that begins elsewhere; continue a replay by the call or command that began it"
                )
    check_alike(ranks, data=fingerprint)
    if run is not None and run.status in ("complete", "diverged"):
        if not quiet:
            print(f"{out} is {run.status} ({steps[-1]} steps); nothing to do")
        return run
    sigma0, profile = _matched_noise(task, config, out, origin, resuming=run is not None, data_root=data_root)
    with ranks.agree():
        profiles = None if profile is None else [profile]
        program = Program(task, config, graph, train_data, sigma0=sigma0, profiles=profiles, communicator=communicator)
        held, state = program.communicator.held, program.initial_state()
    check_alike(ranks, initial_model=digest(state.params[0].cpu().numpy().tobytes()))
    with ranks.agree():
        if run is not None and steps:
            state = restore_state(_last_learners(run, steps, held), state)
        elif origin is not None:
            state = restore_state(origin.learners.select(held), state)
    record = (
        {name: entry for name, entry in run.record.items() if name != LAUNCH}
        if run is not None
        else _record(task, config, graph, train_data, test_data, fingerprint, program, origin)
    )
    writer = RunWriter(out, record)
    writer.write_record(status="running", num_processes=ranks.size, **({} if launched is None else {LAUNCH: launched}))
    check_shared(out, ranks)
    if origin is not None and ranks.leads and not steps:
        write_atomically(out / METRICS_FILE, "".join(f"{line}\n" for line in origin.history).encode())
    writer.keep_metrics_until(state.step)
    ranks.barrier()  # until the metrics can be read
    if not quiet:
        announce(task, config, writer.record, resumed_at=None if run is None else state.step)
    try:
        _loop(program, state, program.part(test_data).to(device, config.torch_dtype), writer, quiet=quiet)
    finally:
        writer.close()
    ranks.barrier()  # until the record is written
    return open_run(out)


def _last_learners(run: Run, steps: Sequence[int], held: range) -> Learners:
    try:
        return run.learners(steps[-1], held)
    except CheckpointError as error:
        before = f", and --resume goes on from step {steps[-2]}" if len(steps) > 1 else ""
        raise CheckpointError(f"{error}; delete {run.path / CHECKPOINTS / step_name(steps[-1])}{before}") from error


def _check_request(config: TrainConfig, graph: Topology, out: Path, *, resume: bool) -> None:
    if graph.gamma != 1:
        raise ValueError(
            f"topology {graph.name} is damped by gamma {graph.gamma:g}; give gamma in the configuration instead"
        )
    if isinstance(config.sigma0, str) and not resume and Path(config.sigma0).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"the run in {out} cannot have its noise matched to itself; choose another directory")


def _record(
    task: Task, config: TrainConfig, graph: Topology, train_data: Examples, test_data: Examples, fingerprint: dict[str, str],
    program: Program, origin: Origin | None,
) -> dict[str, Any]:  # fmt: skip
    """What run.json says of a run that begins."""
    c = config
    thresholds = learning_rate_thresholds(
        graph, c.algorithm, c.order, c.momentum, c.dampening, nesterov=c.nesterov, gammas=c.gamma_range
    )
    return {
        "task": task.name,
        "config": config.to_json(),
        "topology": {**graph.summary(), "thresholds": thresholds, "matrices": graph.matrices.tolist()},
        "data": {
            "name": train_data.name,
            "num_train": len(train_data),
            "num_test": len(test_data),
            "fingerprint": fingerprint,
        },
        **({} if program.evaluation_examples is None else {"evaluation_examples": program.evaluation_examples}),
        "threshold": task.threshold,
        "constant_loss": task.constant_loss,
        "num_parameters": program.model.layout.num_parameters,
        "provenance": provenance(program.device),
        **({} if origin is None else {"replayed": origin.facts}),
    }


def _loop(program: Program, state: LearnerState, test: Examples, writer: RunWriter, *, quiet: bool) -> None:
    config = program.config
    alive = torch.ones(1, dtype=torch.bool, device=program.device)
    judged = judged_losses(program, writer.path)
    last_loss = math.nan
    diagnostics = Diagnostics(program) if config.diagnose_every else None
    diagnosing = 0.0
    begun = time.perf_counter()
    bar = tqdm(
        total=config.num_steps,
        initial=state.step,
        unit="step",
        disable=quiet or None,
        delay=2,
        leave=False,
        desc=config.algorithm,
    )
    with Interruptible() as interrupt, bar:
        checkpoint(program, state, writer)
        while state.step < config.num_steps:
            step = state.step
            logged = step % config.log_every == 0 or is_judged(program, step)
            entry = metrics(program, state, test, full=step % config.log_every == 0) if logged else None
            diagnosed = diagnostics is not None and step % config.diagnose_every == 0
            new, record = program.step(state, alive, stop=interrupt.requested, keep_gradient=diagnosed)
            last_loss = float(record.losses[0])
            if not bool(record.alive[0]):
                writer.append_metrics({"step": step, "minibatch_loss": last_loss, "finite": False})
                checkpoint(program, state, writer)
                writer.write_record(
                    status="diverged", diverged_at=step, outcome={"outcome": "non-finite", "step": step}
                )
                if not quiet:
                    tqdm.write(f"step {step}: the loss or a gradient is not finite; the run ends here", file=sys.stderr)
                return
            if diagnosed:
                assert diagnostics is not None
                assert record.mean_gradient is not None
                before = time.perf_counter()
                entry = {**(entry or {"step": step}), **diagnostics.measure(state, record.mean_gradient[0])}
                diagnosing += time.perf_counter() - before
            state = new
            if entry is not None:
                if "train_loss" in entry:
                    if is_judged(program, step):
                        judged.append(entry["train_loss"])
                    bar.set_postfix(loss=f"{entry['train_loss']:.3f}", refresh=False)
                rate = config.learning_rate * program.schedule(step)
                elapsed = time.perf_counter() - begun
                writer.append_metrics({**entry, "minibatch_loss": last_loss, "learning_rate": rate, "elapsed": elapsed})
            bar.update()
            done = state.step == config.num_steps
            if done or record.stop or (config.checkpoint_every and state.step % config.checkpoint_every == 0):
                checkpoint(program, state, writer)
            if record.stop and not done:
                writer.write_record(status="interrupted")
                raise interrupt.stopped(f"stopped at step {state.step}; continue with --resume")
    spent = {}
    if diagnostics is not None:
        spent = {"seconds": {"diagnostics": diagnosing, "all": time.perf_counter() - begun}}
        if not quiet:
            share = diagnosing / (spent["seconds"]["all"] - diagnosing)
            print(f"diagnostics: {diagnosing:.2f} s, {share:.1%} beside the rest of the run", file=sys.stderr)
    entry = metrics(program, state, test, full=True)
    writer.append_metrics(entry)
    judged.append(entry["train_loss"])
    verdict = outcome(np.asarray(judged)[:, None], program.task.threshold, program.task.constant_loss)[0]
    writer.write_record(
        status="complete", outcome={"outcome": verdict, "median_last_train_loss": statistics.median(judged)}, **spent
    )


def outcome(losses: np.ndarray, threshold: float, constant_loss: float, alive: np.ndarray | None = None) -> list[str]:
    """How runs ended (theory.md sec. 8), from their training losses at w_a over the last 50 steps.

    Args:
        losses: (steps, R).
        threshold: the task's.
        constant_loss: loss of the best constant output.
        alive: (R,) whether each stayed finite.

    Returns:
        for each run "converged" (median below the threshold), "non-finite", "stuck" (median within 2% of constant output,
        or above it), or "slow".
    """
    medians = np.median(losses, axis=0)
    finite = np.isfinite(medians) if alive is None else alive & np.isfinite(medians)
    return [
        "non-finite" if not ok else "converged" if m < threshold else "stuck" if m > 0.98 * constant_loss else "slow"
        for m, ok in zip(medians, finite, strict=True)
    ]


def _matched_noise(
    task: Task, config: TrainConfig, out: Path, origin: Origin | None, *, resuming: bool, data_root: str | Path | None
) -> tuple[np.ndarray | None, NoiseProfile | None]:
    """SSGD*'s noise where it follows a run: its level over the steps, or a profile, which is kept in the run's own directory."""
    if not isinstance(config.sigma0, str):
        return None, None
    if not config.is_calibrated:
        with current().agree():
            return matched_sigma0(config.sigma0, config.num_steps + 1), None  # the last for the checkpoint at the end
    if resuming:
        with current().agree():
            return None, load_profile(out / NOISE_FILE)
    inherited, ranks = None if origin is None else origin.profile, current()
    with ranks.agree():
        if ranks.leads:  # one calibrates: the noise must be alike on all, to the bit
            profile = profile_for(config, task=task, data_root=data_root) if inherited is None else inherited
            out.mkdir(parents=True, exist_ok=True)
            save_profile(profile, out / NOISE_FILE)
    with ranks.agree():
        return None, load_profile(out / NOISE_FILE)


def matched_sigma0(run_path: str, num_steps: int) -> np.ndarray:
    """SSGD*'s noise level (T,) matched to the sigma_w(t) that a DPSGD run recorded, interpolated between its logged steps."""
    source = open_run(run_path)
    if source.config.algorithm != "dpsgd" or source.config.num_learners < 2:
        raise ValueError(
            f"{run_path} is no DPSGD run of several learners, so its learners do not differ; noise cannot be matched to it"
        )
    if source.config.order == "cta":
        raise ValueError(
            f"{run_path} ran under CTA, whose gradients are taken at M w and not at the w whose spread it recorded; match its checkpoints "
            "with noise_every"
        )
    metrics = source.metrics
    if "sigma_w" not in metrics or metrics["sigma_w"].dropna().empty:
        raise ValueError(f"{run_path} recorded no sigma_w, so SSGD*'s noise cannot be matched to it")
    known = metrics.dropna(subset=["sigma_w"])
    return np.interp(np.arange(num_steps), known["step"], known["sigma_w"])
