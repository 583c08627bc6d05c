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
# # A first look at a run
#
# Six learners train one network on handwritten digits. In *decentralised* SGD (DPSGD) each learner steps with the gradient at its own
# weights $w_j$ and then averages with its neighbours on a ring, so the learners never quite agree. The paper's claim is that this
# disagreement helps: where the landscape is rough it lowers the rate at which the average $w_a$ effectively learns, and gives it back
# where the landscape is smooth.
#
# This notebook opens one such run, measures it and looks. By default it trains a short one of its own in a temporary folder (about half
# a minute); to look at yours instead, set the environment variable `LANDSCAPE_RUN` to its directory before starting.

# %%
import os
import tempfile
from pathlib import Path

import torch

import landscape as ls
from landscape.plotting import dynamics, noise, stability
from landscape.plotting.tables import verdict_table
from landscape.plotting.view import load_view

torch.set_num_threads(min(2, torch.get_num_threads()))
folder = tempfile.TemporaryDirectory()

# %% [markdown]
# ## Open a run
# A run is a directory: `run.json` says what was trained and with which code, `metrics.jsonl` holds one line a logged step, and
# `checkpoints/` the weights of every learner.

# %%
path = os.environ.get("LANDSCAPE_RUN")
if path:
    run = ls.open_run(path)
else:
    config = ls.TrainConfig("dpsgd", learning_rate=1.0, local_batch_size=200, num_steps=60, checkpoint_every=20, seed=1)
    run = ls.train("mnist-mlp", config, Path(folder.name) / "dpsgd", quiet=True)
c = run.config
print(
    f"{run.task}: {c.algorithm}, {c.num_learners} learners of batch {c.local_batch_size}, learning rate {c.learning_rate:g}"
)
print(f"status {run.status}; checkpoints at steps {run.steps}")

# %% [markdown]
# The learners of a checkpoint are $n$ weight vectors. Their mean is $w_a$, and the consensus distance $\sqrt{\mathrm{Tr}\,\Sigma_w}$
# says how far they stand from it.

# %%
learners = run.learners(run.steps[-1])
print(learners)

# %% [markdown]
# ## Measure it
# At a checkpoint we hold the learners where they are and draw fresh minibatches many times: every number below is a mean over such
# draws, with its error. A handful of draws will do here; `landscape measure` takes more, and also measures the curvature of
# smoothed landscapes. What a run of yours has been measured for already is taken as it is.

# %%
steps = [s for s in run.steps if s > 0][:: max(1, len(run.steps) // 5)]
settings = ls.MeasureConfig(num_draws=8, num_smoothing_samples=4, num_eigenpairs=3, max_matvecs=8)
wanted = ("effective-learning-rate", "noise", "ledger")
view = load_view(run.path)
lacking = tuple(name for name in wanted if name not in view.groups)
if lacking:
    ls.measure(run, measures=lacking, steps=steps, settings=settings, quiet=True)
    view = load_view(run.path)
print("measured:", ", ".join(view.groups))

# %% [markdown]
# ## Did it train?
# The loss is that of the average $w_a$ over all training data. A run counts as converged when its median over the last 50 steps is
# below the dotted line.

# %%
_ = dynamics.training_loss([view])

# %% [markdown]
# ## The effective learning rate
# $\alpha_e/\alpha = g_a\cdot g/|g|^2$ compares the averaged gradient $g_a$ with the exact one $g$ at $w_a$. Synchronous SGD has 1 on
# average. Below 1, the average moves less far downhill than its nominal rate says.
#
# The open markers are predictions: each smooths the landscape with another cloud of weights around $w_a$. The learners' own cloud is
# exact, so it must agree within the error bars; whether the isotropic cloud of the paper also does is a question about the theory.

# %%
_ = dynamics.effective_learning_rate(view)

# %% [markdown]
# ## The two parts of the noise
# Minibatch noise $\Delta_S$ is all that synchronous SGD has. The landscape-dependent part $\Delta_2$ comes from the learners standing at
# different places; how large it is depends on how rough the landscape is there.

# %%
_ = noise.noise_split(view)

# %% [markdown]
# ## Where does the disagreement come from?
# The line is the variance of the weights across learners. Open markers say what minibatch noise alone would sustain if the landscape
# were the local quadratic; an arrow means that this quadratic is unstable for the disagreement, so no such value exists and the spread
# must come from the instability itself.

# %%
_ = dynamics.weight_variance([view])

# %% [markdown]
# ## What a step gains and pays
# The green bar is what the step gains by going along the gradient, the others are what curvature costs. The open diamond is their sum, a
# prediction to second order; the dot is what really happened to the loss.

# %%
_ = dynamics.one_step_ledger(view)

# %% [markdown]
# ## Predictions against measurements
# Each prediction gets a verdict at each checkpoint. Wide errors never agree: with so few draws expect some to be inconclusive.

# %%
table = verdict_table(view)
for quantity, _, prediction, verdicts, ratio in table.rows:
    said = ", ".join(f"{word} {count}x" for word, count in verdicts)
    print(f"{quantity:20s} {prediction:34s} {said:32s} ratio {ratio}")

# %% [markdown]
# ## Where next
# `landscape reproduce` runs the whole comparison, SSGD against DPSGD over learning rates and seeds, and writes a report. With
# `landscape measure RUN` your own run also gets its curvature, and `stability.stability_margin(view)` then shows whether the landscape
# is too steep for the rate.

# %%
if "stability" in view.groups:
    stability.stability_margin(view)
folder.cleanup()
