"""The figure at the top of the README, from the data kept with the code: python -m paper_figs.overview writes paper_figs/overview.png."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from landscape.plotting.dynamics import effective_learning_rate, training_loss
from landscape.plotting.slices import loss_contours
from landscape.plotting.style import save, style
from paper_figs import digits, fig_slices
from paper_figs.studies.stored import DATA

OUT = Path(__file__).with_suffix("")


def draw(folder: Path = DATA) -> Figure:
    """Who converges; DPSGD's effective rate beside its predictions; the landscape between its learners while it is low."""
    recorded, early = digits.read(folder), fig_slices.read(folder).at[fig_slices.STEPS[0]]
    with style():
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        loss, rate, plane = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
        training_loss(recorded.some("ssgd", "ssgd-star", "dpsgd"), loss)
        effective_learning_rate(recorded.some("dpsgd")[0], rate)
        loss_contours(early.plane, plane, learners=early.learners, model=early.model)
        for ax in (loss, rate, plane):
            legend = ax.get_legend()
            assert legend is not None
            for text in legend.get_texts():
                text.set_fontsize(7)
    return figure


if __name__ == "__main__":
    print(*save(draw(), OUT, ("png",)), sep="\n")
