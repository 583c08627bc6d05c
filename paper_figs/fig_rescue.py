"""The calibrated-noise counterfactual: what of DPSGD's noise, given to SSGD, rescues training (theory.md sec. 2, 3 and 8)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.experiments.rescue import count_rescues
from landscape.experiments.sweep import stability_map
from landscape.experiments.variants import Variant
from landscape.plotting.style import DOTTED, display_name, looks, new_figure, over_steps, style
from landscape.results import load_groups, save_groups, stamp
from landscape.tasks import get_task
from landscape.training.config import TrainConfig
from landscape.training.noise import NoisePlace
from paper_figs import digits
from paper_figs.claims import Bearing, Headline
from paper_figs.panels import finish
from paper_figs.scales import Scale

CLAIM = (
    "It is the shape of DPSGD's noise that rescues training, not its strength: SSGD with noise of the covariance of DPSGD's converges where "
    "SSGD fails, and SSGD with isotropic noise of the same strength does not."
)
INPUTS = ("recorded/rescue.nc",)
NAMES = {
    "ssgd-star-gradient-drift-alone": "SSGD + drift of the gradient alone",
    "ssgd-star-gradient-low-rank-drift-added": "SSGD + drift and covariance, gradient",
}
CEILING = 1.3
"""Times the loss of constant output: losses above are drawn at the top."""


@dataclass(frozen=True)
class Rescue:
    """What was recorded.

    Attributes:
        scale: in words.
        counts: of `landscape.experiments.rescue.count_rescues`.
        map: of `landscape.experiments.sweep.stability_map`.
    """

    scale: str
    counts: xr.Dataset
    map: xr.Dataset


def compute(work: Path, scale: Scale, folder: Path) -> Path:
    """SSGD, DPSGD and SSGD with every noise, over seeds that chose no rate; runs that were made before are found again."""
    out = digits.reproduction(work, scale)
    rate = digits.separation(work, scale).learning_rate if scale.rescue_rate is None else scale.rescue_rate
    config = TrainConfig("dpsgd", rate, num_learners=6, local_batch_size=1000, num_steps=500, device=scale.device)
    mapped = stability_map(get_task(scale.task), config, variants(scale), [rate], scale.rescue_seeds, out / "map")
    words = scale.words.partition(";")[0]
    told = {
        "scale": f"{words}; noise measured every {scale.noise_every} steps on DPSGD of the same seed; seeds {', '.join(map(str, scale.rescue_seeds))}",
        "made_by": f"python -m paper_figs --recompute --scale {scale.name}",
    }
    path = folder / INPUTS[0]
    save_groups({"/": stamp(count_rescues(mapped), **told), "map": mapped}, path)
    return path


def variants(scale: Scale) -> list[Variant]:
    """SSGD, DPSGD, SSGD with noise of each shape in each place; and, if asked for, with the drift of the landscape noise alone, and with both."""

    def star(place: NoisePlace, **noise: str) -> Variant:
        return Variant("ssgd-star", sigma0="calibrated", noise_place=place, noise_every=scale.noise_every, **noise)  # type: ignore[arg-type]

    shaped = [star(place, noise_shape=shape) for place in scale.rescue_places for shape in scale.rescue_shapes]
    drifts = [star("gradient", noise_drift="alone"), star("gradient", noise_shape="low-rank", noise_drift="added")]
    return [Variant("ssgd"), Variant("dpsgd"), *shaped, *(drifts if scale.rescue_drifts else [])]


def read(folder: Path) -> Rescue:
    """What `compute` wrote.

    Raises:
        ValueError: if it is not there, or something else.
    """
    path = folder / INPUTS[0]
    groups = load_groups(path)
    if not groups:
        raise ValueError(f"there is no {path}; make it with: python -m paper_figs --recompute --only fig_rescue")
    if "map" not in groups or "num_rescued" not in groups["/"]:
        raise ValueError(f"{path} holds no counterfactual")
    return Rescue(groups["/"].attrs["scale"], groups["/"], groups["map"])


def headlines(data: Rescue) -> dict[str, Headline]:
    """How many seeds converge with each noise, and the 95% interval of the difference to SSGD (Newcombe)."""
    found = {}
    at = data.counts.isel(learning_rate=0)
    for name in (str(v) for v in at["variant"].values):
        part = at.sel(variant=name)
        seeds = int(part["num_seeds"])
        low, high = float(part["difference_ssgd_low"]), float(part["difference_ssgd_high"])
        beside = "" if name == "ssgd" else f" (share less SSGD's, 95% {low:+.2f} to {high:+.2f})"
        text = f"{words(name)}: seeds of {seeds} that converge{beside}"
        found[name.replace("-", "_")] = Headline(
            float(part["num_converged"]), np.nan, float(max(1, seeds // 4)), text, _bearing(name, part)
        )
    return found


def words(name: str) -> str:
    """A variant's name as readers know it."""
    return NAMES.get(name, display_name(name))


def _bearing(name: str, part: xr.Dataset) -> Bearing:
    """Covariance-matched noise must beat SSGD, and speaks against the claim if it falls behind DPSGD; isotropic noise the other way round."""
    beats = float(part["difference_ssgd_low"]) > 0
    behind = float(part["difference_dpsgd_high"]) < 0
    if name.endswith("-low-rank") or name == "dpsgd":
        return "supports" if beats else "contradicts" if behind else "undecided"
    if name.endswith("-isotropic"):
        return "contradicts" if beats else "supports" if behind else "undecided"
    return "told"


def draw(data: Rescue) -> Figure:
    """Who converges, and the loss along training."""
    names = [str(v) for v in data.counts["variant"].values]
    with style():
        figure = new_figure("two-column", height=0.3 * len(names) + 2.6)
        left, right = figure.subplots(1, 2)
        _shares(data.counts.isel(learning_rate=0), names, left)
        _losses(data.map.isel(learning_rate=0), names, right)
        return finish(figure, CLAIM, headlines(data), data.scale)


@style()
def _shares(at: xr.Dataset, names: list[str], ax: Axes) -> None:
    for row, (name, look) in enumerate(zip(names, looks(names), strict=True)):
        part = at.sel(variant=name)
        share, low, high = (float(part[k]) for k in ("probability", "low", "high"))
        ax.errorbar(
            [share],
            [row],
            xerr=[[share - low], [high - share]],
            color=look.colour,
            marker=look.marker,
            linestyle="none",
            markersize=6,
        )
        ax.text(
            1.06,
            row,
            f"{int(part['num_converged'])}/{int(part['num_seeds'])}",
            va="center",
            fontsize=7,
            color=look.colour,
        )
    ax.set_yticks(range(len(names)), [words(name) for name in names])
    ax.set(xlim=(-0.04, 1.04), ylim=(len(names) - 0.5, -0.5))
    ax.set_xlabel(f"share of seeds that converge at α = {float(at['learning_rate']):g}")


@style()
def _losses(at: xr.Dataset, names: list[str], ax: Axes) -> None:
    """Median over seeds, a diverged seed counted as infinite; thin: seeds."""
    top = CEILING * float(at.attrs["constant_loss"])
    steps = at["step"].values
    for name, look in zip(names, looks(names), strict=True):
        loss = at["train_loss"].sel(variant=name).transpose("seed", "step").values
        loss = np.where(np.isfinite(loss), loss, np.inf)
        for row in loss:
            ax.plot(steps, np.minimum(row, top), color=look.colour, linewidth=0.4, alpha=0.4)
        ax.plot(
            steps,
            np.minimum(np.median(loss, axis=0), top),
            color=look.colour,
            linestyle=look.line,
            linewidth=1.5,
            label=words(name),
        )
    ax.axhline(float(at.attrs["threshold"]), color="#777777", linestyle=DOTTED, linewidth=0.8, zorder=0)
    over_steps(ax, r"training loss of $w_a$ (nats)")
    ax.set_ylim(0, top * 1.02)
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=1)
