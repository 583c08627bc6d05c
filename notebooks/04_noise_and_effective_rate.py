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
# # Noise and effective rate
#
# A step of decentralised SGD has two kinds of noise: that of the minibatches, and that of the learners standing at different places. How
# strong they are is one question (the first notebook); which way they point, what keeps the learners apart, and whether theory foresees
# it are the questions here. The library is called directly, so everything below works on tensors of your own just as well.

# %%
import os
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import landscape as ls
from landscape.noise import draw_gradients
from landscape.plotting import alignment, dynamics
from landscape.plotting.view import load_view
from landscape.tasks import get_task
from landscape.theory.smoothed_loss import second_order_rate_ratio, second_order_rate_ratio_autodiff

torch.set_num_threads(min(2, torch.get_num_threads()))
folder, before = tempfile.TemporaryDirectory(), Path.cwd()
os.chdir(folder.name)
config = ls.TrainConfig("dpsgd", learning_rate=1.0, local_batch_size=200, num_steps=60, checkpoint_every=20, seed=1)
runs = {
    name: ls.train(f"mnist-mlp{suffix}", config, "runs/" + name, quiet=True)
    for name, suffix in (("relu", ""), ("gelu", "-gelu"))
}
run = runs["relu"]
run

# %% [markdown]
# ## From tensors
# An objective is a module, a loss and data. Learners are a stack of weight vectors $(n, d)$. That is all `measure_noise` needs: here the
# full gradient $g$ is itself estimated from 1,000 of the 4,000 examples, and every number is debiased for that.

# %%
task = get_task(run.task)
train_data, _ = task.load_data(None)
objective = ls.Objective(task.initial_model(1), task.loss_fn, train_data)
stored = run.learners(60)
learners = ls.Learners(0, stored.weights, stored.layout)  # tensors alone: nothing of how they were trained
exact = ls.measure_noise(objective, learners, learning_rate=1.0, local_batch_size=200, num_draws=16)
some = ls.measure_noise(
    objective, learners, learning_rate=1.0, local_batch_size=200, num_draws=16, num_gradient_examples=1000
)
for name, found in (("all examples", exact), ("1,000 examples", some)):
    value, error = float(found["alpha_e_ratio_mean"]), float(found["alpha_e_ratio_stderr"])
    print(f"alpha_e/alpha from {name}: {value:.3f} ± {error:.3f}")

# %% [markdown]
# All of it as a table. Three things would show an error of the estimator and not of a theory: the exact prediction off by several standard errors, the
# identities of the decomposition violated beyond rounding, and the estimates above, from all and from some examples, far apart.

# %%
ls.estimates(exact)

# %%
gap = float(exact["alpha_e_ratio_mean"]) - float(exact["alpha_e_ratio_exact"])
print(
    f"measured less exact: {gap / float(exact['alpha_e_ratio_stderr']):+.1f} standard errors; identities hold to {float(exact['identity_error']):.1e}"
)

# %% [markdown]
# The same, layer by layer: each layer has its own gradient, and its own effective rate.

# %%
for layer in exact["layer"].values:
    part = exact.sel(layer=layer)
    print(
        f"layer {layer}: {float(part['alpha_e_ratio_by_layer_mean']):.3f} ± {float(part['alpha_e_ratio_by_layer_stderr']):.3f}"
    )

# %% [markdown]
# A distribution, not only a mean: the effective rate of each fresh draw of minibatches. The paper says that its mean is below 1 where the landscape is
# rough (dashed: 1, which is what synchronous SGD has). A mean at 1, or above, would say the contrary.

# %%
_, ax = plt.subplots(figsize=(4.5, 2.6), layout="constrained")
ax.hist(exact["alpha_e_ratio"], bins=8, color="#0072B2")
ax.axvline(1, color="#D55E00", linestyle="--")
ax.set(xlabel=r"$\alpha_e/\alpha$ of a draw", ylabel="draws")
plt.show()

# %% [markdown]
# ## Is it second order?
# To second order in the deviations the change of the effective rate is the gradient of $\frac12\mathrm{Tr}(H\Sigma_w)$. Finite differences
# of the gradient see the kinks of a ReLU; automatic differentiation does not. With GELU, which has none, the two differ only as far as
# higher orders matter at the step of the differences. A prediction further from the measurement than its error says that the deviations are too large for
# second order: then the picture of the rate as a gradient of sharpness fails at this checkpoint.

# %%
for name, made in runs.items():
    at, its_task = made.learners(60), get_task(made.task)
    its = ls.Objective(its_task.initial_model(1), its_task.loss_fn, train_data)
    g = its.gradient(at.mean)
    measured = ls.measure_noise(its, at, num_draws=16)
    print(
        f"{name}: measured {float(measured['alpha_e_ratio_mean']):.3f} ± {float(measured['alpha_e_ratio_stderr']):.3f}, "
        f"differences {second_order_rate_ratio(its, at, g):.3f}, autodiff {second_order_rate_ratio_autodiff(its, at, g):.3f}"
    )

# %% [markdown]
# ## How much of it is drift?
# The landscape-dependent noise $\xi_D$ has a mean, the same at every draw, and a part that averages away. The angle between draws shows
# it: the cosines of all pairs.

# %%
draws = draw_gradients(
    objective, learners.mean, learners.weights, num_learners=6, local_batch_size=200, num_draws=16
).landscape_rows.tensor()
unit = torch.nn.functional.normalize(draws, dim=1)
cosines = (unit @ unit.T)[torch.triu_indices(16, 16, 1).unbind()]
_, ax = plt.subplots(figsize=(4.5, 2.6), layout="constrained")
ax.hist(cosines, bins=20, color="#009E73")
ax.set(xlabel=r"cosine between two draws of $\xi_D$", ylabel="pairs")
plt.show()

# %% [markdown]
# ## Noise against curvature
# `measure` does the rest at a checkpoint, and keeps it with the run. Isotropic noise would put a share $1/d$ on each eigenvector of the
# Hessian. A power law is only claimed where its points carry one.

# %%
settings = ls.MeasureConfig(num_draws=16, num_smoothing_samples=4, num_eigenpairs=10, max_matvecs=50, num_probes=4)
wanted = ("effective-learning-rate", "alignment", "alignment-by-layer", "disagreement")
groups = ls.measure(run, wanted, steps=[20, 60], settings=settings, quiet=True)
view = load_view(run.path)
_ = alignment.noise_law(view)

# %%
_ = alignment.layer_exponents(view)

# %% [markdown]
# ## What keeps the learners apart?
# Their deviations, resolved along the eigenvectors of the Hessian, against what minibatch noise alone would sustain on the local quadratic. One
# checkpoint is one sample of each mode, hence the wide intervals.

# %%
_ = alignment.disagreement_modes(view)

# %%
_ = dynamics.effective_learning_rate(view)

# %% [markdown]
# ## The scorecard
# Every prediction beside its measurement, with errors and a verdict, as a table; `ls.scorecard_dataset` gives the same as labelled data.

# %%
ls.scorecard(groups)

# %%
os.chdir(before)
folder.cleanup()
