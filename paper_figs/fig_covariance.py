"""Noise covariance and curvature: whether noise is large where the Hessian is (theory.md sec. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from landscape.plotting.alignment import NOISES, noise_law, step_noise_spectra
from landscape.plotting.style import DOTTED, legend_above, log_scale, new_figure, over_steps, style
from landscape.plotting.view import RunView
from landscape.statistics import Estimate
from landscape.theory.scorecard import EXPONENT_RANGE
from paper_figs import digits
from paper_figs.claims import Bearing, Headline, above, headline
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = (
    "Noise is large where the landscape is curved: the sharpest directions of the Hessian hold far more of the minibatch noise, of DPSGD's "
    "landscape noise and of the learners' spread than chance, and minibatch noise follows λ^γ with γ between 1 and 2."
)
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute
MANY = 10.0
"""Times chance that counts as far more."""
WORDS = {"gradient": "minibatch noise", "landscape": "landscape noise", "consensus": "the learners' spread"}


def headlines(data: Recorded) -> dict[str, Headline]:
    """Energy over chance in the top eigenspace for DPSGD's last checkpoint, and the exponents; errors over probes (and draws)."""
    last = data.group("dpsgd", "alignment").isel(step=-1)
    size = int(last["subspace_size"][-1])
    found = {}
    for name, words in WORDS.items():
        part = last.sel(noise=name).isel(subspace_size=-1)
        over = Estimate(float(part["energy_over_chance"]), float(part["energy_over_chance_stderr"]))
        if np.isfinite(over.value):
            text = f"share of {words} in the top {size}, over chance"
            found[f"energy_{name}"] = headline(over, text, above(over, MANY))
    for label in ("dpsgd", "ssgd"):
        at = data.group(label, "alignment").isel(step=-1).sel(noise="gradient")
        exponent = Estimate(float(at["exponent"]), float(at["exponent_stderr"]))
        if np.isfinite(exponent.value):
            ends = float(at["exponent_low"]), float(at["exponent_high"])
            measured = str(at["exponent_verdict"].values) == "measured"
            text = f"γ at step {int(at['step'])}, {label.upper()} (95% {ends[0]:.2f} to {ends[1]:.2f}{'' if measured else ', inconclusive'})"
            found[f"exponent_{label}"] = headline(exponent, text, _within(ends, measured), tolerance=1.0)
    return found


def _within(ends: tuple[float, float], measured: bool) -> Bearing:
    low, high = EXPONENT_RANGE
    if measured and low <= ends[0] and ends[1] <= high:
        return "supports"
    return "contradicts" if measured and (ends[1] < low or ends[0] > high) else "undecided"


def draw(data: Recorded) -> Figure:
    """Noise along eigenvectors for DPSGD and SSGD, spectra of a step's noise, and the share in the top eigenspace along training."""
    dpsgd, ssgd = data.some("dpsgd", "ssgd")
    with style():
        figure = new_figure("two-column", rows=2, height=3.1)
        (a, b), (c, d) = figure.subplots(2, 2)
        noise_law(dpsgd, a)
        noise_law(ssgd, b)
        step_noise_spectra(dpsgd, c)
        _top_share(dpsgd, list(WORDS), d)
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)


@style()
def _top_share(view: RunView, names: Sequence[str], ax: Axes) -> None:
    found = view.group("alignment").isel(subspace_size=-1)
    for name in names:
        text, look = NOISES[name]
        share = found["energy_share"].sel(noise=name).values
        if np.isfinite(share).any():
            ax.plot(found["step"].values, share, label=text, **look.line_options())
    size, chance = int(found["subspace_size"]), float(np.ravel(found["chance"].values)[0])
    ax.axhline(chance, color="#777777", linewidth=0.8, linestyle=DOTTED, label=f"chance, {chance:.1g}", zorder=0)
    log_scale(ax)
    over_steps(ax, f"share in the {size} sharpest directions")
    legend_above(ax, 2, "DPSGD")
