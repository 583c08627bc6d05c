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
# # Hessian spectra
#
# How curved is the loss, in how many directions, and does it matter to the step? First on a network so small that the whole Hessian can be
# written down, so that every estimate meets the truth; then on one where it cannot.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from torch import nn

import landscape as ls
from landscape.curvature import GradientDifferenceOperator
from landscape.data.digits import digits
from landscape.models import mlp
from landscape.plotting.spectra import spectral_density
from landscape.plotting.style import Look
from landscape.tasks import get_task

torch.set_num_threads(min(2, torch.get_num_threads()))
folder, before = tempfile.TemporaryDirectory(), Path.cwd()
os.chdir(folder.name)
train_data, _ = digits()
images, labels = train_data.inputs[:1000], train_data.targets[:1000]

# %% [markdown]
# ## Against the truth
# A 49-10-10 network with tanh on digits of 7 × 7 pixels: 610 weights. It is trained a little, by plain gradient descent, and its Hessian
# written down column by column.

# %%
small = nn.functional.avg_pool2d(images, 4).double()
with torch.random.fork_rng():
    torch.manual_seed(0)
    net = mlp((49, 10, 10), "tanh").double()
for _ in range(150):
    loss = nn.functional.cross_entropy(net(small), labels)
    for weight, slope in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
        weight.data -= 0.5 * slope
objective = ls.Objective(net, nn.functional.cross_entropy, (small, labels))
params = dict(net.named_parameters())
H = ls.hessian(objective, params)
exact = np.linalg.eigvalsh(H.to_dense().numpy())[::-1]
print(f"loss {loss.detach():.3f}; {len(exact)} eigenvalues from {exact[-1]:.3g} to {exact[0]:.3g}")

# %% [markdown]
# Eigenpairs come with their true residuals $|Hu - \lambda u|$: an exact eigenvalue lies within that of each. Trace and density come from
# random probes, with standard errors.

# %%
pairs = ls.top_eigenpairs(H, k=10)
pairs

# %%
trace = ls.trace(H, num_probes=20)
trace

# %%
density = ls.spectral_density(H, num_probes=5, num_steps=60, eigenpairs=pairs, axis="symlog", linear_threshold=1e-2)
density

# %% [markdown]
# Line: the estimate. Grey: all 610 eigenvalues. Below, what would show that something is wrong: an eigenvalue off by more than its residual,
# a trace off by many standard errors, a density far from the truth in the mean distance between sorted eigenvalues (Wasserstein).

# %%
_, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
heights, edges = np.histogram(np.arcsinh(exact / density.linear_threshold), bins=80, density=True)
ax.stairs(heights, density.linear_threshold * np.sinh(edges), fill=True, color="0.75", label="all eigenvalues")
spectral_density(density, ax, label="estimate")
plt.show()
error = np.abs(pairs.values - exact[:10])
print(f"largest error of the ten in their residuals: {np.max(error / pairs.residuals):.2g}")
print(
    f"trace: {exact.sum():.4g} exactly, found {trace.value:.4g} ± {trace.stderr:.2g}, off by {(trace.value - exact.sum()) / trace.stderr:+.1f} standard errors"
)
print(
    f"mean distance between sorted eigenvalues: {density.wasserstein_distance(exact):.2g}, of a mean modulus of {np.abs(exact).mean():.2g}"
)

# %% [markdown]
# ## Along training
# Now 42,310 weights and plain SGD of one learner, kept every 10 steps. The spectra are those of the loss over 1,000 of the 4,000 training images.

# %%
alpha = 0.4
config = ls.TrainConfig("ssgd", alpha, num_learners=1, local_batch_size=200, num_steps=150, checkpoint_every=10, seed=1)
run = ls.train("mnist-mlp", config, "runs/sgd", quiet=True)
run

# %%
task = get_task(run.task)
objective = ls.Objective(task.initial_model(1), task.loss_fn, (images, labels))
found = {}
for step in (0, 50, 100, 150):
    w = run.learners(step).mean
    H = ls.hessian(objective, w)
    top = ls.top_eigenpairs(H, k=15, tol=0.01, miss_probability=1.0)
    found[step] = (
        w,
        H,
        top,
        ls.spectral_density(H, num_probes=2, num_steps=30, eigenpairs=top, axis="symlog", linear_threshold=1e-2),
    )
colours = [to_hex(c) for c in plt.colormaps["viridis"](np.linspace(0, 0.6, len(found)))]

# %%
_, axes = plt.subplots(2, 2, figsize=(8, 6.4), layout="constrained")
for ax, colour, (step, (_, _, _, density)) in zip(axes.flat, colours, found.items(), strict=True):
    spectral_density(density, ax, label=f"step {step}", look=Look(colour, "-", "o"))
    ax.set_xlim(-1.5, 20)
plt.show()

# %% [markdown]
# On this axis the middle is linear and the sides are logarithmic. The single bumps are nodes of the quadrature (30 Lanczos steps from each of two random
# vectors), not bands: the truth above was smooth there. What can be read off is how much lies where.
#
# Nearly all directions are flat, and a handful stand out. For ten classes the Gauss-Newton part has nine or ten large directions, one a
# class up to their common mean, once training has told the classes apart. From step 50 on the picture would be wrong if the largest eigenvalues came down
# without a step after about the tenth, or if the step moved as the classes stay the same; at step 0 there is none yet.

# %%
_, ax = plt.subplots(figsize=(5, 2.8), layout="constrained")
for colour, (step, (_, _, top, _)) in zip(colours, found.items(), strict=True):
    ax.semilogy(
        np.arange(1, 16), np.maximum(top.values, 1e-4), "o-", markersize=3.5, color=colour, label=f"step {step}"
    )
ax.axvline(9.5, color="0.6", linewidth=0.8)
ax.set(xlabel="eigenvalue number", ylabel=r"$\lambda$")
ax.legend(frameon=False)
plt.show()
for step, (_, _, top, _) in found.items():
    ratios = top.values[:-1] / top.values[1:]
    print(
        f"step {step}: λ₁ = {top.values[0]:.3g}, λ₁₀ = {top.values[9]:.3g}, λ₁₅ = {top.values[14]:.3g}; largest fall after number {int(ratios.argmax()) + 1}"
    )

# %% [markdown]
# ## Does it matter to the step?
# A step of gradient descent along an eigenvector is stable while $\alpha\lambda < 2$: beyond, the distance along it is multiplied by
# $|1 - \alpha\lambda| > 1$ each step and the loss must rise. So a quadratic landscape forbids a sharpness that stays above the line while the loss falls.
# Here $\lambda_{\max}$ is that of all 4,000 images.

# %%
whole = ls.Objective(task.initial_model(1), task.loss_fn, train_data)
steps, start = np.array(run.steps), None
sharpness = np.zeros(len(steps))
for i, step in enumerate(steps):
    sharpest = ls.top_eigenpairs(
        ls.hessian(whole, run.learners(int(step)).mean), tol=0.01, start=start, miss_probability=1.0
    )
    sharpness[i], start = sharpest.values[0], sharpest.vectors[:, 0]
losses = run.metrics.set_index("step")["train_loss"].loc[steps].to_numpy()
_, ax = plt.subplots(figsize=(5, 2.5), layout="constrained")
ax.plot(steps, sharpness, "o-", color="#0072B2", label=r"$\lambda_{\max}(H)$")
ax.axhline(2 / alpha, color="#D55E00", linestyle="--", label=r"$2/\alpha$")
ax.set(xlabel="step", ylabel="curvature", ylim=(0, None))
ax.legend(frameon=False)
plt.show()
above = alpha * sharpness[:-1] > 2
falling = np.diff(losses) < 0
print(
    f"above the line at {above.sum()} of {len(above)} checkpoints, at most α λ_max = {alpha * sharpness.max():.2f}; "
    f"the loss fell over the ten steps that followed {np.sum(above & falling)} of these"
)

# %% [markdown]
# Whatever the count, read it so: checkpoints above the line that are followed by a lower loss are what the quadratic picture does not allow. There the
# curvature must have changed within the ten steps (self-stabilisation), or the parabola does not reach as far as the steps do, which is looked
# at next.

# %% [markdown]
# ## How far does the parabola reach?
# The loss along the top eigenvector at the last checkpoint, and what gradient and curvature at its middle make of it. Where they part, what
# is said of eigenvalues no longer concerns the step; a noisy step is about as long as the grey band.

# %%
w, H, top, _ = found[150]
u, lam = top.vectors[:, 0], float(top.values[0])
g = objective.gradient(w)
t = np.linspace(-0.8, 0.8, 41)
along = objective.stacked_values(w + torch.from_numpy(t).to(w)[:, None] * u).numpy()
here, slope = objective.value(w), float(g @ u)
batches = ls.measure_noise(
    objective, ls.Learners(0, w[None], run.learners(0).layout), learning_rate=alpha, local_batch_size=200, num_draws=8
)
reach = float(np.sqrt(batches["xi_squared_mean"]))
_, ax = plt.subplots(figsize=(5, 2.6), layout="constrained")
ax.axvspan(-reach, reach, color="0.9")
ax.plot(t, along, color="#0072B2", label="loss")
ax.plot(t, here + slope * t + lam * t**2 / 2, color="#D55E00", linestyle="--", label="parabola")
ax.set(xlabel=r"distance along $u_1$ (weights)", ylabel="loss", ylim=(0, 1.15 * along.max()))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Kinks
# A ReLU network has curvature that no second derivative sees: it sits at the kinks. Differences of exact gradients over a length $e$ see those
# that lie within it. If both agreed at every $e$, one could speak of *the* Hessian here.

# %%
lengths = np.geomspace(1e-3, 1.0, 7)
quotients = [float(GradientDifferenceOperator(objective, w[None], float(e)) @ u @ u) for e in lengths]
_, ax = plt.subplots(figsize=(5, 2.5), layout="constrained")
ax.semilogx(lengths, quotients, "o-", color="#0072B2", label="differences of gradients")
ax.axhline(lam, color="#D55E00", linestyle="--", label="autodiff")
ax.set(xlabel="$e$ (weights)", ylabel=r"$u_1^\top F u_1$")
ax.legend(frameon=False)
plt.show()
print(
    f"differences over autodiff: {quotients[0] / lam:.3f} at e = {lengths[0]:.2g}, {quotients[3] / lam:.3f} at e = {lengths[3]:.2g}"
)

# %%
os.chdir(before)
folder.cleanup()
