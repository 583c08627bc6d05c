"""Coupled stability, AWC against ATC: whether the disagreement of the learners grows by itself (theory.md sec. 5 and 6)."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from landscape.plotting.dynamics import training_loss, weight_variance
from landscape.plotting.stability import coupled_growth, stability_margin
from landscape.plotting.style import new_figure, style
from landscape.statistics import Estimate
from paper_figs import digits
from paper_figs.claims import Headline, count, headline, whether
from paper_figs.panels import finish
from paper_figs.recorded import Recorded

CLAIM = (
    "DPSGD's disagreement is driven by instability and not by minibatch noise in the paper's order (AWC), where the linearised step of all "
    "learners lets it grow at most checkpoints; in the other order (ATC) it is stable."
)
INPUTS = (digits.INPUT,)
read, compute = digits.read, digits.compute
ORDERS = {"dpsgd": "AWC", "dpsgd-atc": "ATC"}


def headlines(data: Recorded) -> dict[str, Headline]:
    """Checkpoints at which the disagreement grows, the largest growth and the final loss in each order; one run each."""
    found = {}
    for label, order in ORDERS.items():
        growth = data.group(label, "stability")["coupled_disagreement"].values
        growing = int((growth > 1).sum())
        holds = growing > len(growth) / 2 if order == "AWC" else growing == 0
        found[f"{order.lower()}_growing"] = count(
            growing, len(growth), f"{order}: checkpoints at which disagreement grows", whether(holds)
        )
        found[f"{order.lower()}_largest"] = headline(Estimate(float(np.nanmax(growth))), f"{order}: largest growth a step", tolerance=0.5 * float(np.nanmax(growth)))  # fmt: skip
        noise = data.group(label, "noise")
        infinite = int(np.isinf(noise["consensus_trace_predicted"].values).sum())
        text = f"{order}: checkpoints at which minibatch noise alone sustains no finite disagreement"
        found[f"{order.lower()}_unsustained"] = count(infinite, noise.sizes["step"], text)
        loss = data.some(label)[0].series("train_loss")
        found[f"{order.lower()}_loss"] = headline(Estimate(float(loss.iloc[-50:].median())), f"{order}: median loss of the last 50 logged steps (nats)", tolerance=1.0)  # fmt: skip
    return found


def draw(data: Recorded) -> Figure:
    """Growth of the disagreement, loss, and the margins of both orders."""
    awc, atc = data.some(*ORDERS)
    with style():
        figure = new_figure("two-column", rows=3, height=2.9)
        panels = figure.subplots(3, 2)
        coupled_growth([awc, atc], panels[0, 0])
        training_loss([awc, atc], panels[0, 1])
        stability_margin(awc, panels[1, 0])
        stability_margin(atc, panels[1, 1])
        weight_variance([awc], panels[2, 0])
        weight_variance([atc], panels[2, 1])
        return finish(figure, CLAIM, headlines(data), data.runs_in_words)
