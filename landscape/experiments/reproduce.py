"""The main job: train, measure, compare with theory, report. Every part that is done is kept, and a second call resumes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from landscape.checkpoints import Run, open_run
from landscape.checkpoints.format import MEASUREMENTS_FILE, RUN_FILE, write_atomically
from landscape.experiments.checkpoint import MeasureConfig
from landscape.experiments.measure import measure
from landscape.experiments.measures import DEFAULT_MEASURES
from landscape.experiments.sweep import MAP_FILE, Variant, stability_map
from landscape.experiments.train import train
from landscape.provenance import code_version
from landscape.results import load_groups, save_dataset
from landscape.statistics import wilson_interval
from landscape.tasks import get_task
from landscape.theory.conclusions import Separation, choose_rate, conclusions
from landscape.theory.edges import convergence, stability_edge
from landscape.theory.scorecard import run_scorecard, scorecard
from landscape.training.config import TrainConfig

PresetName = Literal["full", "demo", "quick"]
PLAN_FILE = "reproduce.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Preset:
    """How much to do.

    Attributes:
        num_seeds: seeds of the map.
        num_choice_seeds: of these, how many choose the separating rate; the others carry the claim.
        learning_rates: of the map at the base batch size.
        num_steps: steps a run.
        star_levels: SSGD* noise levels at the separating rate, beside the matched one.
        other_batches: {local batch size: learning rates} of further maps.
        with_atc: whether DPSGD under ATC is mapped at the separating rate.
        measured_steps: checkpoints measured.
        measures: what is measured there.
        settings: how thoroughly to measure.
    """

    num_seeds: int
    num_choice_seeds: int
    learning_rates: tuple[float, ...]
    num_steps: int
    star_levels: tuple[float, ...]
    other_batches: dict[int, tuple[float, ...]]
    with_atc: bool
    measured_steps: tuple[int, ...]
    measures: tuple[str, ...]
    settings: MeasureConfig = field(default_factory=MeasureConfig)


_BRIEF = ("effective-learning-rate", "noise", "curvature", "smoothing", "stability", "ledger")
_LIGHT = MeasureConfig(
    num_draws=24, num_smoothing_samples=8, smoothing_matvecs=5, max_matvecs=40, num_eigenpairs=10, num_probes=6
)

PRESETS: dict[str, Preset] = {
    "quick": Preset(2, 1, (1.2,), 120, (), {}, False, (120,), _BRIEF, replace(_LIGHT, num_draws=12, num_smoothing_samples=4, smoothing_matvecs=4, max_matvecs=15)),
    "demo": Preset(3, 1, (1.0, 1.2, 1.4), 500, (), {}, False, (20, 60, 200, 500), (*_BRIEF, "alignment", "disagreement"), _LIGHT),
    "full": Preset(
        10, 4, (0.5, 0.8, 1.0, 1.2, 1.5, 2.0), 500, (0.003, 0.01), {500: (0.5, 0.6, 0.75), 250: (0.25, 0.3, 0.375)}, True,
        (20, 40, 60, 100, 150, 200, 300, 400, 500), DEFAULT_MEASURES, MeasureConfig(),
    ),
}  # fmt: skip
"""quick: about a minute and a half; demo: about 10 minutes; full: about three quarters of an hour, on two cores."""

RECORDED: dict[str, dict[str, Any]] = {
    "ssgd": {"algorithm": "ssgd"},
    "dpsgd": {"algorithm": "dpsgd"},
    "dpsgd-atc": {"algorithm": "dpsgd", "order": "atc"},
    "ssgd-star": {"algorithm": "ssgd-star"},
}
"""Runs recorded with checkpoints at the separating rate."""


def reproduce(
    out: str | Path = "landscape-reproduce",
    preset: PresetName = "demo",
    *,
    num_seeds: int | None = None,
    task: str = "mnist-mlp",
    topology: str = "ring",
    num_learners: int = 6,
    local_batch_size: int = 1000,
    device: str = "cpu",
    data_root: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """Reproduce the paper's finding on a task, measure why, and write OUT/report.html.

    Args:
        out: directory of everything; parts that are there are kept.
        preset: "quick", "demo" or "full"; see PRESETS.
        num_seeds: another number of seeds than the preset's; at least 2, one to choose the rate and one to claim on.
        task: what is trained.
        topology: of DPSGD.
        num_learners: n.
        local_batch_size: B.
        device: cpu or cuda.
        data_root: for tasks that read from disk.
        quiet: no progress bars and no messages.

    Returns:
        the report.
    """
    if preset not in PRESETS:
        raise ValueError(f"no such preset: {preset}; there are {', '.join(PRESETS)}")
    plan = PRESETS[preset]
    if num_seeds is not None:
        if num_seeds < 2:
            raise ValueError(
                f"--num-seeds must be at least 2 (one chooses the rate, the others carry the claim), not {num_seeds}"
            )
        plan = replace(plan, num_seeds=num_seeds, num_choice_seeds=min(plan.num_choice_seeds, num_seeds - 1))
    out = Path(out)
    base = TrainConfig(
        "dpsgd", plan.learning_rates[0], num_learners=num_learners, local_batch_size=local_batch_size, num_steps=plan.num_steps,
        topology=topology, device=device, checkpoint_every=0,
    )  # fmt: skip
    identity = {
        "preset": preset,
        "plan": _plain(asdict(plan)),
        "task": task,
        "config": base.to_json(),
        "version": code_version()["landscape"],
    }
    if _is_complete(out, identity):
        _say(quiet, f"{out} is complete; remove it, or choose another --out, to run again")
        _say(quiet, _summary(out))
        return out / REPORT_FILE
    _claim(out, identity)
    started = time.perf_counter()
    mapped, separation, others = _maps(out, plan, base, task, data_root, quiet)
    runs = _recorded_runs(out, plan, base, separation, mapped, task, data_root, quiet)
    for label, run in runs.items():
        _say(quiet, f"measuring {label} at steps {', '.join(map(str, _finite_steps(run, plan)))}")
        measure(
            run,
            plan.measures,
            _finite_steps(run, plan),
            settings=plan.settings,
            data_root=data_root,
            device=device,
            quiet=quiet,
        )
    report = write_reproduction_report(out, runs, mapped, separation, others, preset)
    _write_plan(
        out,
        {
            **identity,
            "complete": True,
            "learning_rate": separation.learning_rate,
            "seconds": time.perf_counter() - started,
        },
    )
    _say(quiet, _summary(out))
    return report


def _maps(
    out: Path, plan: Preset, base: TrainConfig, task_name: str, data_root: str | Path | None, quiet: bool
) -> tuple[xr.Dataset, Separation, dict[int, xr.Dataset]]:
    """The map at the base batch size, the separating rate, and maps at other batch sizes."""
    task, seeds = get_task(task_name), range(plan.num_seeds)
    parts = out / "map"
    both = [Variant("ssgd"), Variant("dpsgd")]
    _say(
        quiet,
        f"stability map: SSGD and DPSGD, rates {', '.join(f'{r:g}' for r in plan.learning_rates)}, {plan.num_seeds} seeds",
    )
    mapped = stability_map(task, base, both, plan.learning_rates, seeds, parts, data_root=data_root, quiet=quiet)
    separation = choose_rate(mapped, plan.num_choice_seeds)
    rate = separation.learning_rate
    beside = [
        *both,
        Variant("ssgd-star", sigma0="matched"),
        *(Variant("ssgd-star", sigma0=s) for s in plan.star_levels),
    ]
    if plan.with_atc:
        beside.append(Variant("dpsgd", "atc"))
    _say(quiet, f"at rate {rate:g}: {', '.join(v.name for v in beside[2:])}")
    # DPSGD is asked for again, since matched noise needs it; replicas are grouped by rate and seed, so only new groups run
    extra = stability_map(task, base, beside, [rate], seeds, parts, data_root=data_root, quiet=quiet)
    mapped = xr.concat(
        [mapped, extra.drop_sel(variant=["ssgd", "dpsgd"])],
        "variant",
        join="outer",
        fill_value={"outcome": "", "diverged_at": -1},
        combine_attrs="override",
    )
    save_dataset(mapped, out / MAP_FILE)
    others = {}
    for batch, rates in plan.other_batches.items():
        _say(quiet, f"stability map at local batch {batch}: rates {', '.join(f'{r:g}' for r in rates)}")
        others[batch] = stability_map(
            task, replace(base, local_batch_size=batch), both, rates, seeds, parts, data_root=data_root, quiet=quiet
        )
        save_dataset(others[batch], out / f"stability-map-batch-{batch}.nc")
    return mapped, separation, others


def _recorded_runs(
    out: Path,
    plan: Preset,
    base: TrainConfig,
    separation: Separation,
    mapped: xr.Dataset,
    task: str,
    data_root: str | Path | None,
    quiet: bool,
) -> dict[str, Run]:
    """One run each with checkpoints, at the separating rate, on the first seed that the rate was not chosen on."""
    every = int(np.gcd.reduce(plan.measured_steps))
    shared = replace(
        base, learning_rate=separation.learning_rate, seed=separation.claim_seeds[0], checkpoint_every=every
    )
    runs = {}
    for label, changes in RECORDED.items():
        config = replace(shared, **changes)
        if label == "ssgd-star":
            config = replace(config, sigma0=str(out / "runs" / "dpsgd"))
        path = out / "runs" / label
        runs[label] = train(task, config, path, data_root=data_root, resume=(path / RUN_FILE).exists(), quiet=quiet)
    return runs


def _finite_steps(run: Run, plan: Preset) -> list[int]:
    """Planned steps that the run reached."""
    return [s for s in plan.measured_steps if s in run.steps]


def write_reproduction_report(
    out: Path,
    runs: dict[str, Run],
    mapped: xr.Dataset,
    separation: Separation,
    others: dict[int, xr.Dataset],
    preset: str,
) -> Path:
    """Conclusions, figures and tables of a finished reproduction, in OUT/report.html; the scorecard in OUT/scorecard.csv."""
    from landscape.plotting.report import write_report
    from landscape.plotting.view import RunView

    views = [RunView(label, run, _groups(run)) for label, run in runs.items()]
    groups = {v.label: v.groups for v in views}
    outcomes = {
        label: (run.record["outcome"]["outcome"], float(run.record["outcome"].get("median_last_train_loss", np.nan)))
        for label, run in runs.items()
    }
    said = conclusions(mapped, separation, groups, outcomes)
    for batch, other in others.items():
        table = convergence(other)
        counts = "; ".join(
            f"rate {rate:g}: SSGD {int(table['num_converged'].sel(variant='ssgd', learning_rate=rate))}, DPSGD {int(table['num_converged'].sel(variant='dpsgd', learning_rate=rate))}"
            for rate in other["learning_rate"].values
        )
        said.append(f"Local batch {batch}, rates scaled with it, runs converged of {other.sizes['seed']}: {counts}.")
    pd.concat([scorecard(v.groups).assign(run=v.label) for v in views]).to_csv(out / "scorecard.csv", index=False)
    maps = {f"local batch {b}": m for b, m in {runs["dpsgd"].config.local_batch_size: mapped, **others}.items()}
    return write_report(
        out / REPORT_FILE, views, maps if others else mapped, title="Does decentralised SGD tolerate larger learning rates, and why?", conclusions=said,
        how_to_reproduce=f"landscape reproduce --preset {preset} --out DIR",
    )  # fmt: skip


def _groups(run: Run) -> dict[str, xr.Dataset]:
    return {k: v for k, v in load_groups(run.path / MEASUREMENTS_FILE).items() if k != "/"}


def summary_table(out: Path) -> str:
    """The map's counts and the recorded runs' headline numbers, as text."""
    mapped = load_groups(out / MAP_FILE)["/"]
    table = convergence(mapped)
    lines = [
        f"{'algorithm':22s}"
        + "".join(f"{f'rate {r:g}':>18s}" for r in table["learning_rate"].values)
        + f"{'edge':>10s}"
    ]
    for variant in table["variant"].values:
        cells = []
        for rate in table["learning_rate"].values:
            losses = mapped["median_last_loss"].sel(variant=variant, learning_rate=rate).values
            trials = int((~np.isnan(losses)).sum())
            hits = int((losses < mapped.attrs["threshold"]).sum())
            low, high = wilson_interval(hits, trials)
            cells.append(f"{f'{hits}/{trials} [{low:.2f} {high:.2f}]' if trials else '-':>18s}")
        edge = stability_edge(table, str(variant))[0] if variant in ("ssgd", "dpsgd") else np.nan
        shown = "" if np.isnan(edge) else f"{edge:.2f}" if np.isfinite(edge) else ("> max" if edge > 0 else "< min")
        lines.append(f"{variant!s:22s}" + "".join(cells) + f"{shown:>10s}")
    return "\n".join(["converged runs of all seeds, with the Wilson 95% interval:", *lines])


def _summary(out: Path) -> str:
    text = [summary_table(out)]
    for label in RECORDED:
        path = out / "runs" / label
        if not (path / RUN_FILE).exists():
            continue
        run, counts = open_run(path), run_scorecard(scorecard(_groups(open_run(path))))
        agree = int(counts.get("agrees", pd.Series(dtype=int)).sum())
        text.append(f"{label:10s} {run.record['outcome']['outcome']:12s} predictions: {agree} agree, {int(counts.get('disagrees', pd.Series(dtype=int)).sum())} disagree, "
                    f"{int(counts.get('inconclusive', pd.Series(dtype=int)).sum())} inconclusive")  # fmt: skip
    text.append(f"report: {out / REPORT_FILE}")
    return "\n".join(text)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _is_complete(out: Path, identity: dict[str, Any]) -> bool:
    stored = _read_plan(out)
    return (
        stored is not None
        and bool(stored.get("complete"))
        and (out / REPORT_FILE).exists()
        and not _differences(stored, identity)
    )


def _claim(out: Path, identity: dict[str, Any]) -> None:
    stored = _read_plan(out)
    if stored is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and holds no reproduction; choose another --out")
    changed = _differences(stored, identity) if stored is not None else []
    if changed:
        raise ValueError(
            f"{out} holds a reproduction with other settings ({', '.join(changed)} differ); choose another --out, or the same settings to resume"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_plan(out, {**identity, "complete": False})


def _differences(stored: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    return [k for k, v in identity.items() if stored.get(k) != v]


def _read_plan(out: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((out / PLAN_FILE).read_text()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{out / PLAN_FILE} is damaged: {error}") from error


def _write_plan(out: Path, content: dict[str, Any]) -> None:
    write_atomically(out / PLAN_FILE, json.dumps(content, indent=1).encode())


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text, file=sys.stderr if not text.startswith("converged") else sys.stdout, flush=True)
