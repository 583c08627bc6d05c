"""A plane of mnist-mlp on 5,000 digits against the arithmetic of its forward passes, and what refinement saves of it.

The arithmetic is the network called on all digits and its losses summed, once a grid point, with nothing to make weights, keep moments or
find errors. The goal is 1.2 times its time. Both sides take rows of the grid in turn, so that a change of the machine's speed meets
both; the whole plane follows, timed once.

    python -m tests.benchmarks.bench_slices [--repeats K]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import nn

import landscape as ls
from landscape.models import mlp
from landscape.slices import PlaneSlice
from tests.benchmarks.networks import digits
from tests.benchmarks.timing import paired, seconds, store

GOAL = 1.2
SIDE = 51
ROWS = 3


def problem() -> tuple[nn.Module, ls.Objective, ls.Plane]:
    """The network, its loss over all digits, and a random plane through its weights after 30 steps of gradient descent."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = mlp()
    objective = ls.Objective(net, nn.functional.cross_entropy, digits())
    weights = objective.flat(dict(net.named_parameters()))
    for _ in range(30):
        weights = weights - 0.5 * objective.gradient(weights)
    return net, objective, ls.random_plane(objective, weights)


def rows(net: nn.Module, objective: ls.Objective, plane: ls.Plane, repeats: int) -> dict[str, Any]:
    """Three rows of 51 points, with errors over examples, over as many bare forward passes."""
    inputs, targets = digits()
    grid = np.linspace(-1, 1, SIDE)

    def whole() -> None:
        ls.plane_slice(objective, plane, grid[:ROWS], grid, population=60_000)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(ROWS * SIDE):
                nn.functional.cross_entropy(net(inputs), targets, reduction="none").sum(dtype=torch.float64)

    return {
        "num_points": ROWS * SIDE,
        "num_examples": len(inputs),
        "goal": GOAL,
        **paired(whole, bare, repeats=repeats, warmup=1),
    }


def whole_plane(objective: ls.Objective, plane: ls.Plane) -> dict[str, Any]:
    """All 2,601 points, and the same plane refined."""
    grid = np.linspace(-1, 1, SIDE)

    def plane_of(**options: float) -> PlaneSlice:
        return ls.plane_slice(objective, plane, grid, grid, population=60_000, **options)

    took, full = seconds(plane_of)
    refined_took, refined = seconds(lambda: plane_of(tolerance=0.02, relative_tolerance=0.02))
    missed = np.abs(refined.loss - full.loss) / (0.02 + 0.02 * full.loss)
    return {
        "seconds": took,
        "lowest_loss": float(full.loss.min()),
        "highest_loss": float(full.loss.max()),
        "refined_seconds": refined_took,
        "refined_evaluated": float(refined.evaluated.mean()),
        "refined_largest_error_over_tolerance": float(missed.max()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of three rows")
    parser.add_argument("--rows-only", action="store_true", help="leave out the whole plane")
    options = parser.parse_args(arguments)
    net, objective, plane = problem()
    table = rows(net, objective, plane, options.repeats)
    print(
        f"{table['num_points']} points: {table['first_ms']:.0f} ms over {table['second_ms']:.0f} ms, ratio {table['ratio']:.2f} (goal {GOAL})"
    )
    found = {"rows": table}
    if not options.rows_only:
        found["plane"] = full = whole_plane(objective, plane)
        print(f"{SIDE} x {SIDE}: {full['seconds']:.1f} s; refined {full['refined_seconds']:.1f} s, {full['refined_evaluated']:.0%} evaluated, "
              f"largest error {full['refined_largest_error_over_tolerance']:.2f} of the tolerance")  # fmt: skip
    print(f"stored {store('slices_cpu', found).name}")


if __name__ == "__main__":
    main()
