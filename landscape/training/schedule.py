"""Learning-rate schedules: a factor on the base rate, a pure function of the step.

Written as `[warmup:K[:START]+]constant | step:S1,S2,...[:FACTOR] | cosine[:FLOOR]`:

    constant                     alpha throughout
    step:300,400:0.1             times 0.1 at step 300 and again at 400 (the factor defaults to 0.1)
    cosine:0.01                  half a cosine from 1 to 0.01 (default 0) over the run
    warmup:50:0.1+cosine         from 0.1 (default 0) linearly to 1 over the first 50 steps, then cosine over the rest
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

USAGE = "use [warmup:K[:START]+]constant | step:S1,S2,...[:FACTOR] | cosine[:FLOOR]"


@dataclass(frozen=True)
class Schedule:
    """A parsed schedule; call it with a step for the factor."""

    spec: str
    warmup_steps: int
    warmup_start: float
    shape: Callable[[int, int], float]
    num_steps: int

    def __call__(self, step: int) -> float:
        """The factor on the base rate for the step that is about to be taken, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup_start + (1 - self.warmup_start) * (step + 1) / self.warmup_steps
        return self.shape(step - self.warmup_steps, max(1, self.num_steps - self.warmup_steps))


def parse_schedule(spec: str, num_steps: int) -> Schedule:
    """Read a schedule.

    >>> [round(parse_schedule("warmup:2+step:3:0.5", 5)(t), 3) for t in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.5]
    """
    try:
        warmup, _, main = spec.rpartition("+")
        warmup_steps, start = 0, 0.0
        if warmup:
            kind, *rest = warmup.split(":")
            if kind != "warmup" or not 1 <= len(rest) <= 2:
                raise ValueError
            warmup_steps, start = int(rest[0]), float(rest[1]) if len(rest) > 1 else 0.0
        shape = _shape(main, warmup_steps)
    except (ValueError, IndexError):
        raise ValueError(f"schedule {spec!r} cannot be read; {USAGE}") from None
    if warmup_steps < 0 or not 0 <= start <= 1:
        raise ValueError(f"schedule {spec!r}: warm-up needs a positive number of steps and a start between 0 and 1")
    return Schedule(spec, warmup_steps, start, shape, num_steps)


def _shape(spec: str, offset: int) -> Callable[[int, int], float]:
    kind, *rest = spec.split(":")
    if kind == "constant" and not rest:
        return lambda step, total: 1.0
    if kind == "step" and 1 <= len(rest) <= 2:
        milestones = [int(m) - offset for m in rest[0].split(",")]  # milestones count from the start of the run
        factor = float(rest[1]) if len(rest) == 2 else 0.1
        if not 0 <= factor < math.inf:
            raise ValueError
        return lambda step, total: factor ** sum(step >= m for m in milestones)
    if kind == "cosine" and len(rest) <= 1:
        floor = float(rest[0]) if rest else 0.0
        if not 0 <= floor <= 1:
            raise ValueError
        return lambda step, total: floor + (1 - floor) * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2
    raise ValueError
