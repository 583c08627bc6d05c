"""Train on several processes and record every learner: torchrun --nproc-per-node 2 recorder_example.py {ddp,gossip} OUT

ddp: all-reduced gradients, so that all learners have the same weights. gossip: DPSGD on a ring, so that each has its own.
The one line that records is ls.save_learner; `landscape measure OUT` then reads what it wrote.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import landscape as ls
from landscape.tasks import get_task


def mix(model: nn.Module) -> None:
    """Average the weights with those of both neighbours on a ring."""
    rank, size = dist.get_rank(), dist.get_world_size()
    near = {(rank - 1) % size, rank, (rank + 1) % size}
    for weight in model.parameters():
        everyone = [torch.empty_like(weight.data) for _ in range(size)]
        dist.all_gather(everyone, weight.data)
        weight.data = torch.stack([everyone[r] for r in near]).mean(0)


def train(kind: str, out: str, num_steps: int = 20) -> None:
    task = get_task("mnist-mlp")  # in your own loop: your network, your data
    train_data, _ = task.load_data(None)
    network = task.initial_model(0)  # the same on all processes
    model = DistributedDataParallel(network) if kind == "ddp" else network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    generator = torch.Generator().manual_seed(dist.get_rank())  # other minibatches on each
    told = {"algorithm": "ssgd"} if kind == "ddp" else {"algorithm": "dpsgd", "order": "awc", "topology": "ring"}
    for step in range(num_steps + 1):
        if step % 10 == 0:
            ls.save_learner(
                out, step=step, model=model, optimizer=optimizer, task="mnist-mlp", local_batch_size=50, **told
            )
        chosen = torch.randint(len(train_data), (50,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train_data.inputs[chosen]), train_data.targets[chosen]).backward()
        if kind == "gossip":
            mix(network)
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(*sys.argv[1:3])
    dist.destroy_process_group()
