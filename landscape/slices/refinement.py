"""Adaptive refinement of a rectangular grid: what bilinear interpolation does well enough is not evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np

Cell = tuple[int, int, int, int]
"""First and last index along each axis."""


def refine(
    first: np.ndarray,
    second: np.ndarray,
    evaluate: Callable[[np.ndarray], np.ndarray],
    *,
    tolerance: float | int,
    relative_tolerance: float | int = 0.0,
    coarse: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Values of a function on a grid, evaluated where bilinear interpolation falls short.

    The corners of cells of `coarse` steps a side are evaluated, then in each cell its centre and the middles of its sides. Where bilinear
    interpolation of the corners misses one of these five by more than tolerance + relative_tolerance |value|, or some of the nine values are
    finite and others not, the four quarters are cells in their turn; elsewhere what is left in the quarters is interpolated between
    their own corners. A feature that none of the nine meets goes unseen. Cells of one refinement are evaluated together.

    Args:
        first: (p,) rising coordinates.
        second: (q,) likewise.
        evaluate: grid indices (m, 2) -> values (m,).
        tolerance: in units of the values, positive.
        relative_tolerance: share of the value.
        coarse: grid steps of a side of the first cells.

    Returns:
        values (p, q), and whether each was evaluated.

    >>> grid = np.arange(9.0)
    >>> values, evaluated = refine(grid, grid, lambda at: grid[at[:, 0]] * grid[at[:, 1]], tolerance=1e-9)
    >>> int(evaluated.sum()), bool((values == np.outer(grid, grid)).all())  # bilinear, so corners, middles and centre are enough
    (9, True)
    """
    if not tolerance > 0 or not relative_tolerance >= 0 or coarse < 1:
        raise ValueError(
            "refinement needs a positive tolerance, a relative_tolerance of at least 0 and coarse of at least 1"
        )
    values = np.full((len(first), len(second)), np.nan)
    known = np.zeros(values.shape, dtype=bool)
    rows, columns = _edges(len(first), coarse), _edges(len(second), coarse)
    _evaluate({(i, j) for i in rows for j in columns}, values, known, evaluate)
    cells: list[Cell] = [(*r, *c) for r in _intervals(rows) for c in _intervals(columns)]
    done: list[Cell] = []
    while cells:
        tested = [(cell, _halves(*cell[:2]), _halves(*cell[2:])) for cell in cells]
        _evaluate({(i, j) for _, rows, columns in tested for i in rows for j in columns}, values, known, evaluate)
        cells = []
        for cell, rows, columns in tested:
            quarters: list[Cell] = [(*r, *c) for r in _intervals(rows) for c in _intervals(columns)]
            inner = values[np.ix_(rows, columns)]
            guess = _bilinear(cell, rows, columns, values, first, second)
            finite = np.isfinite(inner)
            with np.errstate(invalid="ignore"):
                short = (np.abs(inner - guess) > tolerance + relative_tolerance * np.abs(inner))[finite].any()
            if short or (finite.any() and not finite.all()):
                cells += [q for q in quarters if q[1] - q[0] > 1 or q[3] - q[2] > 1]
            else:
                done += quarters
    for cell in done:
        rows, columns = list(range(cell[0], cell[1] + 1)), list(range(cell[2], cell[3] + 1))
        room = np.ix_(rows, columns)
        values[room] = np.where(known[room], values[room], _bilinear(cell, rows, columns, values, first, second))
    return values, known


def _evaluate(
    wanted: Iterable[tuple[int, int]],
    values: np.ndarray,
    known: np.ndarray,
    evaluate: Callable[[np.ndarray], np.ndarray],
) -> None:
    missing = np.array(sorted(at for at in wanted if not known[at]), dtype=int).reshape(-1, 2)
    if len(missing):
        values[missing[:, 0], missing[:, 1]] = evaluate(missing)
        known[missing[:, 0], missing[:, 1]] = True


def _bilinear(
    cell: Cell, rows: list[int], columns: list[int], values: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Interpolation of a cell's corners at the crossings of rows and columns; a corner's value where some corner is not finite."""
    i, k, j, l = cell
    corners = values[np.ix_([i, k], [j, l])]
    if not np.isfinite(corners).all():
        return np.full((len(rows), len(columns)), corners[~np.isfinite(corners)][0])
    s = (first[rows] - first[i]) / (first[k] - first[i]) if k > i else np.zeros(len(rows))
    t = (second[columns] - second[j]) / (second[l] - second[j]) if l > j else np.zeros(len(columns))
    return np.asarray(np.stack([1 - s, s], 1) @ corners @ np.stack([1 - t, t]))


def _edges(count: int, step: int) -> list[int]:
    return sorted({*range(0, count, step), count - 1})


def _halves(low: int, high: int) -> list[int]:
    return sorted({low, (low + high) // 2, high})


def _intervals(edges: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(edges)) or [(edges[0], edges[0])]
