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
# # Your own checkpoints
#
# Nothing has to be trained by this library. Below, a loop in plain torch trains four learners on a ring (DPSGD, adapt while communicate)
# under `torchrun` and saves what such loops commonly save: one file a process with `torch.save`, and a folder of
# `torch.distributed.checkpoint`. Both are looked at, read, imported as a run and measured. One of them turns out to hold a network that
# nobody trained.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

import landscape as ls
from landscape.checkpoints.inspect import describe
from landscape.data.digits import digits
from landscape.plotting import dynamics, noise
from landscape.plotting.view import load_view
from landscape.tasks import get_task

torch.set_num_threads(min(2, torch.get_num_threads()))
folder, before = tempfile.TemporaryDirectory(), Path.cwd()
os.chdir(folder.name)

# %% [markdown]
# ## A loop that knows nothing of us
# Four processes, gloo, 4,000 real digits that come with the library, saved once so that the loop needs torch alone. Its network is wrapped,
# as networks often are, so its weights are called `body.1.weight` and not `1.weight`.

# %%
train_data, _ = digits()
torch.save({"x": train_data.inputs, "y": train_data.targets}, "digits.pt")
Path("loop.py").write_text("""
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))
    def forward(self, x):
        return self.body(x)

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
data = torch.load("digits.pt")
torch.manual_seed(0)  # the same initial weights everywhere
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
chooser = torch.Generator().manual_seed(rank)  # other minibatches on each
for step in range(61):
    if step % 20 == 0:
        torch.save({"step": step, "model": net.state_dict(), "optimizer": optimizer.state_dict()}, f"theirs/step_{step}/rank{rank}.pt")
        dcp.save({"model": net.state_dict()}, checkpoint_id=f"shared/step_{step}")
    chosen = torch.randint(len(data["y"]), (200,), generator=chooser)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(data["x"][chosen]), data["y"][chosen]).backward()  # at this learner's own weights
    for weight in net.parameters():  # mix with both neighbours ...
        everyone = [torch.empty_like(weight.data) for _ in range(size)]
        dist.all_gather(everyone, weight.data)
        weight.data = (everyone[rank - 1] + weight.data + everyone[(rank + 1) % size]) / 3
    optimizer.step()  # ... and step
dist.destroy_process_group()
""")
for step in range(0, 61, 20):
    Path(f"theirs/step_{step}").mkdir(parents=True)
command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "loop.py"]
done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
assert done.returncode == 0, done.stderr[-2000:]
print(*sorted(str(p) for p in Path("theirs").glob("*/*")), sep="\n")

# %% [markdown]
# ## What is there?
# `landscape inspect` on the command line, `describe` here. Nothing in the files is run, and no tensor is read. One file a rank with weights
# of the same names and shapes is taken for learners, and it says why.

# %%
print(describe("theirs/step_60"))

# %% [markdown]
# The folder of `torch.distributed.checkpoint` was written by the same four processes, each with its own weights, under the same keys. That
# format believes that equal keys hold equal tensors and keeps each of them once.

# %%
print(describe("shared/step_60"))

# %% [markdown]
# ## Read them
# `read_checkpoint` gives the learners: weights $(n, d)$, their mean $w_a$ and how far they stand from it. The task's module tells which
# tensors are parameters, and in which order; `rename` bridges the names.

# %%
task = get_task("mnist-mlp")
network, rename = task.initial_model(0), ["body.*=*"]
learners = ls.read_checkpoint("theirs/step_60", model=network, rename=rename)
learners

# %%
deduplicated = ls.read_checkpoint("shared/step_60", model=network, rename=["model.body.*=*"])
deduplicated

# %% [markdown]
# ## A network that nobody trained
# Each row is a tensor of the deduplicated checkpoint, each column a process. Zero (dark) means: these are that process's numbers, to the bit.
# Were the checkpoint any learner's, one column would be dark from top to bottom; were it $w_a$, none would be, and the values would be smaller
# than those around them.

# %%
parts = deduplicated.parameters(0)
gap = np.array(
    [
        [float((tensor - learners.parameters(j)[name]).norm() / tensor.norm()) for j in range(len(learners))]
        for name, tensor in parts.items()
    ]
)
_, ax = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
shown = ax.imshow(gap, cmap="viridis", aspect="auto")
for (row, column), value in np.ndenumerate(gap):
    ax.text(
        column,
        row,
        f"{value:.2g}",
        ha="center",
        va="center",
        color="white" if value < 0.6 * gap.max() else "black",
        fontsize=7,
    )
ax.set(xticks=range(len(learners)), yticks=range(len(parts)), xlabel="process", ylabel="tensor of the checkpoint")
ax.set_yticklabels(parts)
plt.colorbar(shown, label="relative distance")
plt.show()
owners = (gap == 0).argmax(1)
print(f"its {len(parts)} tensors come from {len(set(owners))} of {len(learners)} processes: {owners.tolist()}")

# %% [markdown]
# Does the loss give it away? That of every learner, of $w_a$ and of the mixture. It need not: learners that are not far apart mix without harm. But
# nobody trained this network, and of how far the learners stood apart nothing is left in it.

# %%
objective = ls.Objective(network, task.loss_fn, train_data)
losses = {f"learner {j}": objective.value(w) for j, w in enumerate(learners.weights)}
losses |= {"w_a": objective.value(learners.mean), "mixture": objective.value(deduplicated.weights[0])}
_, ax = plt.subplots(figsize=(4.2, 2.4), layout="constrained")
ax.barh(list(losses), list(losses.values()), color=["#0072B2"] * len(learners) + ["#009E73", "#D55E00"])
ax.set(xlabel="training loss")
ax.invert_yaxis()
plt.show()

# %% [markdown]
# ## Import and measure
# All steps at once become a run. What the files do not tell (the batch size, the topology, the order) is told here; what neither tells is
# listed as assumed.

# %%
config = ls.ImportConfig(algorithm="dpsgd", order="awc", topology="ring", local_batch_size=200)
run = ls.import_run("theirs/step_*", "imported", task="mnist-mlp", config=config, rename=rename, quiet=True)
run

# %%
settings = ls.MeasureConfig(num_draws=16, num_smoothing_samples=4, num_eigenpairs=3, max_matvecs=8)
groups = ls.measure(run, ("effective-learning-rate", "noise"), steps=[20, 40, 60], settings=settings, quiet=True)
view = load_view(run.path)
_ = dynamics.effective_learning_rate(view)

# %% [markdown]
# The exact prediction needs no theory beyond the definition: at fixed learners the mean of $g_a$ is the average of their full gradients. If
# it missed the measurement by several standard errors, then the import would be at fault (learners in a wrong order of parameters, say, or
# another loss), and nothing else here could be believed.

# %%
card = ls.scorecard(groups)
exact = card[(card["quantity"] == "E alpha_e / alpha") & (card["prediction"] == "exact")]
print("standard errors between measurement and exact prediction:", ", ".join(f"{z:+.1f}" for z in exact["z"]))
card

# %%
_ = noise.noise_split(view)

# %% [markdown]
# ## One line instead
# What keeps every learner from now on is `ls.save_learner` in the loop itself: every process writes its own, nothing is sent, and a checkpoint
# appears when it is whole. Here the learners that were read above are saved so, one after another in the place of their processes.

# %%
for j in range(len(learners)):
    theirs = task.initial_model(0)
    theirs.load_state_dict(learners.parameters(j))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    ls.save_learner(
        "recorded",
        step=60,
        model=theirs,
        optimizer=optimizer,
        rank=j,
        world_size=4,
        task="mnist-mlp",
        local_batch_size=200,
    )
recorded = ls.open_run("recorded").learners(60)
print("the same to the bit:", torch.equal(recorded.weights, learners.weights))

# %%
os.chdir(before)
folder.cleanup()
