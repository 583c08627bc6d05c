# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Extending: a task and a topology of one's own
#
# A task is a network, a loss and data; a topology is a graph or a doubly stochastic matrix. Neither has to be registered anywhere. The example
# is chosen so that theory has no excuse: linear regression, where the landscape is a quadratic, the noise is known, and the spread that the
# learners keep can be predicted within a few per cent before anything is trained.

# %%
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from matplotlib import pyplot as plt

import landscape as ls
from landscape.tasks import get_task
from landscape.theory.modes import LocalRule
from landscape.theory.stationary import predicted_consensus
from landscape.training.topology import from_graph, topology

torch.set_num_threads(1)  # a network of ten weights
folder, before = tempfile.TemporaryDirectory(), Path.cwd()
os.chdir(folder.name)

# %% [markdown]
# ## A task
# A function that returns a `Task`, in a module that Python finds. By the name `regression:task` every command knows it too:
# `landscape train --task regression:task`. Ten weights, 500 examples, inputs of unequal variances, noisy targets.

# %%
Path("regression.py").write_text("""
from functools import partial

import torch
from torch import nn

import landscape as ls

def half_square(outputs, targets):
    return 0.5 * (outputs[:, 0] - targets) ** 2  # one number an example

def data(num_examples, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_examples, 10, generator=generator) * torch.linspace(0.3, 1.5, 10)
    targets = inputs @ torch.linspace(-1, 1, 10) + 0.5 * torch.randn(num_examples, generator=generator)
    return ls.TensorData(inputs, targets, "regression")

def task():
    return ls.Task(
        name="regression", description="linear regression, ten weights", build_model=partial(nn.Linear, 10, 1, bias=False),
        loss_fn=half_square, load_data=lambda root: (data(500, 0), data(100, 1)), threshold=0.15, constant_loss=2.0,
    )
""")
sys.path.insert(0, folder.name)
task = get_task("regression:task")
train_data, _ = task.load_data(None)
objective = ls.Objective(task.initial_model(0), task.loss_fn, train_data)
H = ls.hessian(objective, torch.zeros(10))
pairs = ls.top_eigenpairs(H, k=10)
pairs

# %% [markdown]
# ## A topology
# Two triangles held together by one bridge: information has to pass through it. Any networkx graph does, or a matrix; here beside a ring and a
# complete graph of the same six learners.

# %%
bridged = nx.barbell_graph(3, 0)
graphs = {"ring": topology("ring", 6), "complete": topology("complete", 6), "bridge": from_graph(bridged, "bridge")}
_, axes = plt.subplots(1, 2, figsize=(6.2, 2.5), layout="constrained")
nx.draw_networkx(bridged, pos=nx.spring_layout(bridged, seed=1), ax=axes[0], node_color="#56B4E9", font_size=8)
axes[0].set_axis_off()
for marker, (name, graph) in zip("os^", graphs.items(), strict=True):
    axes[1].plot(np.sort(graph.spectrum())[::-1], marker + "-", markersize=4, label=f"{name}, gap {graph.gap():.2f}")
axes[1].set(xlabel="graph mode", ylabel=r"eigenvalue $\mu$ of $M$")
axes[1].legend(frameon=False, fontsize=7, loc="lower left")
plt.show()

# %% [markdown]
# ## What theory says, before training
# Minibatch noise pushes the learners apart, mixing and the landscape pull them together. On a quadratic with fixed noise the stationary spread
# $\mathrm{Tr}\,\Sigma_w$ is a sum over graph modes and Hessian modes. The noise is that at the optimum. Learners that fluctuate about it have larger
# residuals and so a little more noise; the measurement should lie somewhat above, and by how much is checked below.

# %%
alpha, batch = 0.1, 8
X, y = train_data.inputs.double(), train_data.targets.double()
optimum = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
C = ls.gradient_covariance(objective, optimum.float()).to_dense().double()
vectors = pairs.vectors.double()
along = torch.einsum("di,de,ei->i", vectors, C, vectors).numpy() / batch
variants = {
    "complete": ("complete", "awc"), "ring": ("ring", "awc"), "bridge": ("bridge", "awc"), "bridge, ATC": ("bridge", "atc"),
}  # fmt: skip
predicted = {
    name: predicted_consensus(graphs[graph], LocalRule(order), alpha, pairs.values, along, float(C.trace()) / batch)
    for name, (graph, order) in variants.items()
}
for name, value in predicted.items():
    print(f"{name:12s} Tr Σ_w = {value:.4g}")

# %% [markdown]
# ## Train
# The graph is given to `train` as it is. All train alike: the lines of the loss lie on one another.

# %%
config = ls.TrainConfig(
    "dpsgd", alpha, num_learners=6, local_batch_size=batch, num_steps=2000, log_every=5, checkpoint_every=200
)
runs = {
    name: ls.train("regression:task", replace(config, order=order), f"runs/{i}", topology=graphs[graph], quiet=True)
    for i, (name, (graph, order)) in enumerate(variants.items())
}
runs["bridge"]

# %%
COLOURS = dict(zip(variants, ("#009E73", "#0072B2", "#D55E00", "#CC79A7"), strict=True))
_, ax = plt.subplots(figsize=(5, 2.4), layout="constrained")
for name, run in runs.items():
    ax.semilogy(run.metrics["step"], run.metrics["train_loss"], color=COLOURS[name], linewidth=1, label=name)
ax.axhline(objective.value(optimum.float()), color="0.5", linestyle=":", label="optimum")
ax.set(xlabel="step", ylabel="training loss of $w_a$", xlim=(0, 300))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Measured against predicted
# The lines are predictions, not fits.

# %%
_, ax = plt.subplots(figsize=(5, 2.8), layout="constrained")
for name, run in runs.items():
    spread = run.metrics["consensus_distance"] ** 2
    ax.semilogy(run.metrics["step"], spread, color=COLOURS[name], linewidth=0.5, alpha=0.7)
    ax.axhline(predicted[name], color=COLOURS[name], linewidth=1.8, label=name)
ax.set(xlabel="step", ylabel=r"$\mathrm{Tr}\,\Sigma_w$")
ax.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7)
plt.show()

# %% [markdown]
# The mean over time, its error from the means of twenty consecutive stretches, so that the correlation between steps is in it.

# %%
measured, errors = {}, {}
for name, run in runs.items():
    settled = run.metrics[(run.metrics["step"] >= 200) & (run.metrics["step"] % 5 == 0)]
    blocks = np.array([part.mean() for part in np.array_split((settled["consensus_distance"] ** 2).to_numpy(), 20)])
    measured[name], errors[name] = blocks.mean(), blocks.std(ddof=1) / np.sqrt(len(blocks))


def noise_where(run: ls.Run) -> np.ndarray:
    """The noise along each eigenvector, averaged over the weights that the learners had."""
    stood = torch.cat([run.learners(step).weights for step in run.steps if step >= 200]).double()
    slopes = (X @ stood.T - y[:, None])[:, :, None] * (X @ vectors)[:, None, :]  # (example, weights, eigenvector)
    return slopes.var(0, correction=0).mean(0).numpy() / batch


closer = {
    name: predicted_consensus(graphs[graph], LocalRule(order), alpha, pairs.values, noise_where(runs[name]), 0.0)
    for name, (graph, order) in variants.items()
}
_, ax = plt.subplots(figsize=(5.6, 2.3), layout="constrained")
ax.axvline(1, color="0.6", linewidth=0.8)
for shift, theory, face, label in (
    (0.12, predicted, "white", "noise at the optimum"),
    (-0.12, closer, "#0072B2", "noise where they stood"),
):
    ratios = np.array([measured[n] / theory[n] for n in variants])
    bars = 1.96 * np.array([errors[n] / theory[n] for n in variants])
    ax.errorbar(
        ratios,
        np.arange(len(variants)) + shift,
        xerr=bars,
        fmt="o",
        color="#0072B2",
        markerfacecolor=face,
        capsize=2,
        label=label,
    )
ax.set_yticks(range(len(variants)), list(variants))
ax.set(
    xlabel=r"$\mathrm{Tr}\,\Sigma_w$ measured over predicted, 95% interval",
    xlim=(0.85, 1.2),
    ylim=(-0.5, len(variants) - 0.5),
)
ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7)
plt.show()
for name in variants:
    print(
        f"{name:12s} measured {measured[name]:.3e} ± {errors[name]:.1e}, over predicted {measured[name] / predicted[name]:.3f}, "
        f"with the noise where the learners stood {measured[name] / closer[name]:.3f} ± {errors[name] / closer[name]:.3f}"
    )

# %% [markdown]
# If the ratio were far from 1 on any graph, the mixing matrix, its order in the step or the noise would not be what was said; a network of
# ReLUs may do what it likes, this one may not. ATC mixes the fresh noise too and so keeps less of it: the difference between both orders on the
# same graph is predicted as well.
#
# ## And the rest works
# A task of one's own is measured as any other. At the optimum the gradient all but vanishes, so $\alpha_e/\alpha$ is measured with a large error and its
# verdicts are inconclusive, as they should be. And one checkpoint is one sample of a spread that fluctuates: a last row that is off says
# little by itself, which is why the average over time was taken above.

# %%
settings = ls.MeasureConfig(num_draws=16, num_smoothing_samples=4, num_eigenpairs=5, max_matvecs=20)
groups = ls.measure(runs["bridge"], ("effective-learning-rate", "noise"), steps=[2000], settings=settings, quiet=True)
ls.scorecard(groups)

# %%
sys.path.remove(folder.name)
os.chdir(before)
folder.cleanup()
