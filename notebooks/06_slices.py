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
# # Slices of the landscape
#
# A picture of a loss over millions of weights is a picture of a line or a plane through them, and which plane is chosen decides what is seen. This
# notebook cuts one run of DPSGD along five: a random line, the lines between learners, the plane of the learners' disagreement, the plane of
# the sharpest directions, and the plane of the trajectory, which is shown as a surface too. Each says how much of what it shows lies in
# the plane at all.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

import landscape as ls
from landscape.data.digits import digits
from landscape.plotting.slices import connectivity, loss_contours, loss_lines, loss_surface
from landscape.tasks import get_task
from landscape.theory.smoothing import kernel_deviations

torch.set_num_threads(min(2, torch.get_num_threads()))
folder, before = tempfile.TemporaryDirectory(), Path.cwd()
os.chdir(folder.name)

# %% [markdown]
# ## A run
# Six learners on a ring at a high rate, on handwritten digits; GELU in the place of ReLU, so that second derivatives tell all there is.
# The objective is the loss over 1,000 of the 4,000 training images. They are a random choice, which `population=4000` says below: every point of a slice then has
# an error over the choice, and since all points meet the same images, differences along a slice are known much better than its height.

# %%
config = ls.TrainConfig("dpsgd", 1.0, local_batch_size=200, num_steps=60, checkpoint_every=5, seed=1)
run = ls.train("mnist-mlp-gelu", config, "runs/dpsgd", quiet=True)
run

# %%
train_data, _ = digits()
chosen = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(0))[:1000]
task = get_task(run.task)
objective = ls.Objective(task.initial_model(1), task.loss_fn, (train_data.inputs[chosen], train_data.targets[chosen]))
learners = run.learners(20)
learners

# %% [markdown]
# ## Along random directions
# Filter-normalised (Li et al., arXiv 1712.09913): each filter of the direction has the length of the network's own, so that 1 on the axis is a
# change as large as the weights. The network has no BatchNorm; one that has needs `batch_norm="frozen"`, `"recalibrated"` or another
# policy, for the surface hangs on it, and a slice without one is refused.

# %%
line = ls.random_line(objective, learners.mean, seed=0)
random = ls.line_slice(objective, line, np.linspace(-1, 1, 41), population=4000)
_ = loss_lines(random, model=ls.quadratic_model(objective, line))

# %% [markdown]
# Smooth and nearly straight, as such pictures often are: a random direction has next to nothing of the few sharp ones, and tells little of where training
# can go. The band is the 95% interval over the choice of images.
#
# ## Between learners
# Averaging only makes sense if the average is no worse than what is averaged. On the straight line between two learners the loss may rise above the
# interpolation of its ends, a *barrier* (Frankle et al., arXiv 1912.05671). The two that stand farthest apart:

# %%
gaps = torch.cdist(learners.weights, learners.weights)
first, second = divmod(int(gaps.argmax()), len(learners))
between = ls.line_slice(
    objective,
    ls.line_between(learners.weights[first], learners.weights[second]),
    np.linspace(0, 1, 31),
    population=4000,
)
_ = connectivity(between, label=f"learners {first} and {second}, step {learners.step}")
print(between.barrier())
later = run.learners(60).weights
print(
    ls.line_slice(objective, ls.line_between(later[first], later[second]), between.positions, population=4000).barrier()
)

# %% [markdown]
# If one valley held all learners there would be no barrier. One beyond its error says that something rises between these two; whether they have parted for
# good the same picture of a later step tells (at the end of this run it is gone).
#
# ## The plane of the disagreement
# Through $w_a$ along the two principal axes of the deviations $w_j - w_a$. Dots are the learners' nearest points of it; the legend says what share of their distance
# to $w_a$ the plane leaves out. Dashed: the quadratic model of the measured gradient and curvature. `tolerance` evaluates only where
# interpolation would miss by more than so many nats.

# %%
plane = ls.disagreement_plane(learners)
seen = plane.project(learners.weights)
reach = 1.3 * np.abs(seen.coordinates).max()
grid = np.linspace(-reach, reach, 33)
surface = ls.plane_slice(objective, plane, grid, grid, population=4000, tolerance=0.05, relative_tolerance=0.02)
arrows = ls.gradient_field(objective, plane, grid[::5], grid[::5])
_ = loss_contours(surface, learners=seen, model=ls.quadratic_model(objective, plane), field=arrows)

# %% [markdown]
# Where the dashed contours leave the others the second-order theory ends. Learners outside of that region feel a landscape that no Hessian at $w_a$ knows.
#
# ## What the learners' cloud smooths
# The loss along the first of these axes, and averaged over three clouds: isotropic of the learners' size (the paper's), normal of their covariance,
# and the learners' own deviations, which are exact.

# %%
axis = ls.Line(plane.origin, plane.first, plane.kind, plane.names[0])
at = np.linspace(-reach, reach, 41)
kernels = [
    ls.SmoothingKernel(name, kernel_deviations(learners, name, 16), antithetic=name != "learners")
    for name in ("isotropic", "covariance", "learners")
]
lines = [ls.line_slice(objective, axis, at, kernel=kernel) for kernel in [None, *kernels]]
_ = loss_lines(lines, learners=axis.project(learners.weights), model=ls.quadratic_model(objective, axis))

# %% [markdown]
# If the learners smoothed as an isotropic cloud does, the curves of the two would lie on each other. Where the isotropic one lies on the loss itself, a cloud of that size in all
# directions alike is felt by none of the few directions in which the loss bends.
#
# ## The sharpest directions
# The plane of the two largest eigenvectors of the Hessian, with errors known from `top_eigenpairs`. The curvature that the plane meets is the two eigenvalues.

# %%
H = ls.hessian(objective, learners.mean)
top = ls.top_eigenpairs(H, k=2, tol=1e-3)
sharp = ls.Plane(
    learners.mean, top.vectors[:, 0], top.vectors[:, 1], "top Hessian eigenvectors", ("eigenvector 1", "eigenvector 2")
)
model = ls.quadratic_model(objective, sharp)
print("curvature in the plane", np.linalg.eigvalsh(model.lengths_curvature)[::-1], "eigenvalues", top.values)
around = np.linspace(-0.75, 0.75, 33)
_ = loss_contours(
    ls.plane_slice(objective, sharp, around, around),
    learners=sharp.project(learners.weights),
    model=model,
)

# %% [markdown]
# ## The way of the average
# The trajectory of $w_a$ over its own two principal axes about the last point. Beware of its grace: a random walk in many dimensions has 81% and 9% of its
# squared distance along these axes, so large shares by themselves say nothing of the landscape.

# %%
path = torch.stack([run.learners(step).mean for step in run.steps])
way = ls.trajectory_plane(path)
trace = way.project(path)
low, high = trace.coordinates.min(0), trace.coordinates.max(0)
margin = 0.25 * (high - low)
sides = [np.linspace(low[i] - margin[i], high[i] + margin[i], 33) for i in range(2)]
terrain = ls.plane_slice(objective, way, *sides, tolerance=0.05, relative_tolerance=0.02)
_ = loss_contours(terrain, trajectory=trace)

# %%
_ = loss_surface(terrain, trajectory=trace)

# %% [markdown]
# ## Keep a slice, draw it again
# Results turn into labelled arrays, and back, without the weights that they were taken from.

# %%
stored = terrain.to_xarray()
again = type(terrain).from_xarray(stored)
print(np.array_equal(again.loss, terrain.loss), f"{again.evaluated.mean():.0%} of the grid evaluated")
stored

# %%
os.chdir(before)
folder.cleanup()
