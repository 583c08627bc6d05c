"""What a study will take, from a few timed steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from landscape.data.dataset import Examples
from landscape.experiments.recording import averaged_for_evaluation
from landscape.tasks import CONVERGENCE_WINDOW, Task
from landscape.training.evaluate import evaluate
from landscape.training.loop import Program
from landscape.training.topology import topology
from paper_figs.studies.along import TWENTIETHS
from paper_figs.studies.declared import EVERY, VARIANTS, Study
from paper_figs.studies.mapping import batch_config

TIMED_STEPS = 2
SPARE = 1.1
"""Loading, writing, imports."""
PRODUCT = 3.0
"""A Hessian product in gradients."""


@dataclass(frozen=True)
class Budget:
    """Seconds, with the machine as it is.

    Attributes:
        map_seconds: of stage 1, by total batch.
        along_seconds: of stage 2, if both of its places are found.
        num_runs: of stage 1.
        seconds_per_example: forward and backward, at the smallest batch.
    """

    map_seconds: dict[int, float]
    along_seconds: float
    num_runs: int
    seconds_per_example: float

    def __str__(self) -> str:
        parts = ", ".join(f"{total}: {seconds / 60:.1f}" for total, seconds in self.map_seconds.items())
        return (
            f"estimate: {self.num_runs} runs, {sum(self.map_seconds.values()) / 60:.1f} min (by total batch: {parts}); along training up to "
            f"{self.along_seconds / 60:.1f} min; {1e3 * self.seconds_per_example:.3g} ms an example; on {torch.get_num_threads()} thread(s). "
            "Runs of small networks that are stacked take less."
        )


def estimate(study: Study, task: Task, train_data: Examples) -> Budget:
    """Time DPSGD at every batch size for two steps and one evaluation, and count.

    Gradients and Hessian products of stage 2 are counted in examples and priced as training's; good to a factor of 2.
    """
    by_batch: dict[int, float] = {}
    evaluations, per_example = [], []
    each = len(VARIANTS) * len(study.learning_rates) * len(study.seeds)
    training = []
    for batch, total in enumerate(study.total_batches):
        step, evaluation = _timed(study, batch, task, train_data)
        steps = study.num_steps(batch, len(train_data))
        training.append(
            SPARE * (steps * step + _num_evaluations(steps, study.log_every(batch, len(train_data))) * evaluation)
        )
        by_batch[total] = each * training[-1]
        evaluations.append(evaluation)
        per_example.append(step / total)
    a = study.along
    found = 0.0
    rate: float
    for name in a.variants:
        own = {"ssgd": 1, "ssgd-star-matched": a.num_samples, "dpsgd": study.num_learners}[name]
        examples = len(train_data) if a.num_examples is None else max(a.num_examples, max(study.local_batch_sizes))
        rate = a.num_draws * max(study.total_batches) * (1 if name == "ssgd" else 2) + examples * (2 + own)
        rate += 0 if name == "ssgd" else examples * 2 * a.num_samples * 1.5
        few = (
            len(train_data) if a.curvature_examples is None else max(a.curvature_examples, max(study.local_batch_sizes))
        )
        curved = few * (a.max_matvecs * PRODUCT + own * (a.smoothing_matvecs * (PRODUCT + 2) + 7))
        run = len(a.marks) * (rate + curved) * per_example[-1] + max(training) + TWENTIETHS * evaluations[-1]
        found += 2 * a.num_seeds * run
    return Budget(by_batch, found, each * len(study.total_batches), per_example[0])


def _num_evaluations(steps: int, every: int) -> int:
    """Of one run of a map: at every `every` steps, and at every EVERY of the last 50."""
    return sum(
        step % every == 0 or (steps - step < CONVERGENCE_WINDOW and (steps - step) % EVERY == 0)
        for step in range(steps + 1)
    )


def _timed(study: Study, batch: int, task: Task, train_data: Examples) -> tuple[float, float]:
    """Seconds of a step and of an evaluation of w_a."""
    config = batch_config(study, batch, len(train_data))
    program = Program(task, config, topology(config.topology, config.num_learners), train_data)
    state, alive = program.initial_state(), torch.ones(1, dtype=torch.bool)
    state, _ = program.step(state, alive)  # what is compiled or read the first time is not counted
    begun = time.perf_counter()
    for _ in range(TIMED_STEPS):
        state, _ = program.step(state, alive)
    stepped = time.perf_counter()
    mean, buffers = averaged_for_evaluation(program, state)
    evaluate(program.evaluation_model, mean, buffers, program.evaluated)
    return (stepped - begun) / TIMED_STEPS, time.perf_counter() - stepped
