"""A stacked step of n learners against one gradient of a single network on a batch of n B: the same arithmetic.

Both sides draw their examples by index from the data set on the device. The goals are 1.15 for n = 6, B = 1000 and 1.4 for n = 64, B = 64
on a CPU; a loop over learners is measured beside them. The step has more to do than the gradient: it mixes and updates n weight vectors.
"""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor

from landscape.data.sampling import IndexSampler
from landscape.tasks import get_task
from landscape.training import Program, TrainConfig, topology
from tests.benchmarks.timing import paired, store

GOALS = {(6, 1000): 1.15, (64, 64): 1.4}


def single_gradient(program: Program, weights: Tensor, indices: Tensor) -> Tensor:
    """The gradient of one network on one batch, by plain autograd."""
    inputs, targets = program.train.batch(indices.flatten())
    parameters = {n: p.detach().requires_grad_() for n, p in program.model.layout.split(weights).items()}
    output = torch.func.functional_call(program.model.module, parameters, (inputs,))
    loss = torch.nn.functional.cross_entropy(output, targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])


def measure(algorithm: str, num_learners: int, batch_size: int, device: str) -> dict[str, Any]:
    """One row of the table."""
    task = get_task("mnist-mlp")
    train, _ = task.load_data(None)
    program, alone = (
        Program(
            task,
            TrainConfig(
                algorithm, 0.1, num_learners=num_learners, local_batch_size=batch_size, device=device, batching=batching
            ),  # type: ignore[arg-type]
            topology("ring", num_learners),
            train,
        )
        for batching in ("stacked", "interleaved")
    )
    state, alive = program.initial_state(), torch.ones(1, dtype=torch.bool, device=program.device)
    sampler = IndexSampler([0], 1, num_learners * batch_size, len(train))
    step = [0]

    def stacked() -> None:
        step[0] += 1
        state.step = step[0]
        program.step(state, alive)

    def looped() -> None:
        step[0] += 1
        state.step = step[0]
        alone.step(state, alive)

    def single() -> None:
        step[0] += 1
        single_gradient(program, state.params[0], sampler.indices(step[0]).to(program.device))

    found = paired(stacked, single)
    loop = paired(looped, single, repeats=15, warmup=3)
    goal = GOALS.get((num_learners, batch_size)) if device == "cpu" else None
    return {"algorithm": algorithm, "num_learners": num_learners, "local_batch_size": batch_size, "device": device, "goal": goal,
            "stacked_over_single": found, "loop_over_single": loop}  # fmt: skip


def main() -> None:
    """Print and store the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(a, n, b, device) for n, b in ((6, 1000), (64, 64)) for a in ("dpsgd", "ssgd")]
    print(
        f"{'algorithm':10s}{'n':>5s}{'B':>6s}{'step ms':>10s}{'single ms':>11s}{'ratio':>8s}{'quartiles':>16s}{'goal':>7s}{'loop':>7s}"
    )
    for row in rows:
        f = row["stacked_over_single"]
        quartiles = f"{f['ratio_lower_quartile']:.2f}-{f['ratio_upper_quartile']:.2f}"
        print(f"{row['algorithm']:10s}{row['num_learners']:5d}{row['local_batch_size']:6d}{f['first_ms']:10.2f}{f['second_ms']:11.2f}{f['ratio']:8.2f}"
              f"{quartiles:>16s}{row['goal'] or float('nan'):7.2f}{row['loop_over_single']['ratio']:7.2f}")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"peak memory {peak:.0f} MiB\nstored {store(f'stacked_step_{device}', {'rows': rows, 'peak_memory_mib': peak}, device).name}"
    )


if __name__ == "__main__":
    main()
