"""Who mixes with whom: doubly stochastic matrices M, fixed or varying with the step (theory.md sec. 2).

Undirected graphs get Metropolis-Hastings weights, M_jk = 1/(1 + max(deg_j, deg_k)), which is 1/(deg + 1) on regular
graphs. Exponential graphs are directed; random pairing and the one-peer exponential graph vary with the step. Any of them
can be damped to (1 - gamma) I + gamma M(t), controlled disagreement (arXiv 2602.02899).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import numpy as np

from landscape import streams

TOLERANCE = 1e-6
Kind = Literal["static", "periodic", "random-pairing"]


@dataclass(frozen=True)
class Topology:
    """A sequence of mixing matrices M(t).

    Attributes:
        name: as given by the user.
        num_learners: n.
        kind: "static" (one matrix), "periodic" (cycled through), or "random-pairing" (a fresh uniform matching a step).
        matrices: the matrices (period, n, n); for random pairing the mean matrix, for reference.
        gamma: of controlled disagreement, see `damped`; `matrices` are damped already.
    """

    name: str
    num_learners: int
    kind: Kind
    matrices: np.ndarray
    gamma: float = 1.0

    def damped(self, gamma: float | int) -> Topology:
        """The same with (1 - gamma) I + gamma M(t) in place of M(t): controlled disagreement (arXiv 2602.02899).

        Every graph mode mu becomes 1 - gamma (1 - mu); damping twice multiplies the gammas.

        >>> topology("complete", 2).damped(0.5).matrix(0, 0).tolist()
        [[0.75, 0.25], [0.25, 0.75]]
        """
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], not {gamma}")
        return replace(self, matrices=controlled_disagreement(self.matrices, gamma), gamma=self.gamma * gamma)

    def matrix(self, seed: int, step: int) -> np.ndarray:
        """M at a step, (n, n) float64: a pure function of (seed, step)."""
        if self.kind == "random-pairing":
            return controlled_disagreement(_pairing(self.num_learners, seed, step), self.gamma)
        return np.asarray(self.matrices[step % len(self.matrices)])

    @property
    def is_static(self) -> bool:
        """Whether one matrix serves every step."""
        return self.kind == "static"

    @property
    def mean_matrix(self) -> np.ndarray:
        """M averaged over time, (n, n)."""
        return np.asarray(self.matrices.mean(0))

    @property
    def is_symmetric(self) -> bool:
        """Whether every M(t) is symmetric."""
        return self.kind == "random-pairing" or bool(
            np.allclose(self.matrices, self.matrices.transpose(0, 2, 1), atol=1e-12)
        )

    def spectrum(self) -> np.ndarray:
        """Eigenvalues (n,) of the mean matrix, by falling modulus: real for symmetric M, else complex."""
        values = np.linalg.eigvalsh(self.mean_matrix) if self.is_symmetric else np.linalg.eigvals(self.mean_matrix)
        return np.asarray(values[np.argsort(-np.abs(values), kind="stable")])

    def gap(self) -> float:
        """Spectral gap 1 - |mu_2| of the mean matrix; 1 for a single learner."""
        return 1.0 if self.num_learners == 1 else float(1 - abs(self.spectrum()[1]))

    def summary(self) -> dict[str, Any]:
        """Name, spectrum of the mean matrix and its gap, as stored with a run."""
        spectrum = self.spectrum()
        smallest = float(spectrum.real.min())
        return {
            "name": self.name,
            "kind": self.kind,
            "num_learners": self.num_learners,
            "spectrum": [float(v) for v in spectrum.real]
            if self.is_symmetric
            else [[float(v.real), float(v.imag)] for v in spectrum],
            "spectral_gap": self.gap(),
            "mu_min": smallest,
        }


def controlled_disagreement(matrix: np.ndarray, gamma: float | int) -> np.ndarray:
    """(1 - gamma) I + gamma M, for one matrix or a stack of them."""
    return (1 - gamma) * np.eye(matrix.shape[-1]) + gamma * matrix if gamma != 1 else matrix


def check_doubly_stochastic(matrix: np.ndarray, name: str) -> np.ndarray:
    """The matrix as float64 (n, n), or a ValueError that says which row or column is wrong, and by how much."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"mixing matrix {name}: its shape is {matrix.shape}, not square")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"mixing matrix {name}: entry ({row}, {column}) is {matrix[row, column]}")
    if matrix.min() < -TOLERANCE:
        row, column = np.unravel_index(int(matrix.argmin()), matrix.shape)
        raise ValueError(
            f"mixing matrix {name}: entry ({row}, {column}) is {matrix[row, column]:.6g}, but weights must not be negative"
        )
    for axis, word in ((1, "row"), (0, "column")):
        excess = matrix.sum(axis) - 1
        worst = int(np.abs(excess).argmax())
        if abs(excess[worst]) > TOLERANCE:
            raise ValueError(
                f"mixing matrix {name} is not doubly stochastic: {word} {worst} sums to {excess[worst] + 1:.6g}, off by {excess[worst]:+.3g} "
                f"(allowed {TOLERANCE:g})"
            )
    return matrix


def metropolis(graph: nx.Graph) -> np.ndarray:
    """Metropolis-Hastings weights of an undirected graph, (n, n), nodes in the graph's own order.

    >>> metropolis(nx.path_graph(3)).round(3).tolist()
    [[0.667, 0.333, 0.0], [0.333, 0.333, 0.333], [0.0, 0.333, 0.667]]
    """
    nodes = {node: i for i, node in enumerate(graph.nodes)}
    degree = {node: len(set(graph.neighbors(node)) - {node}) for node in graph.nodes}
    matrix = np.zeros((len(nodes), len(nodes)))
    for a, b in graph.edges():
        if a != b:
            matrix[nodes[a], nodes[b]] = matrix[nodes[b], nodes[a]] = 1 / (1 + max(degree[a], degree[b]))
    np.fill_diagonal(matrix, 1 - matrix.sum(1))
    return matrix


def from_graph(graph: nx.Graph, name: str = "graph") -> Topology:
    """A static topology from any connected undirected networkx graph.

    Learner j is the node j where nodes are numbered 0 to n-1 (as numbers or text), else the j-th in the graph's own order.
    """
    if graph.is_directed():
        raise ValueError(f"topology {name}: the graph is directed; give its doubly stochastic matrix instead")
    if graph.number_of_nodes() == 0 or not nx.is_connected(graph):
        raise ValueError(f"topology {name}: the graph is not connected, so learners would never agree")
    nodes = list(graph.nodes)
    if {str(node) for node in nodes} == {str(j) for j in range(len(nodes))}:
        nodes.sort(key=lambda node: int(str(node)))
    ordered = nx.Graph()
    ordered.add_nodes_from(nodes)
    ordered.add_edges_from(graph.edges())
    return Topology(name, len(nodes), "static", metropolis(ordered)[None])


def from_matrix(matrix: np.ndarray, name: str = "matrix") -> Topology:
    """A static topology from a doubly stochastic matrix (n, n)."""
    matrix = check_doubly_stochastic(matrix, name)
    return Topology(name, len(matrix), "static", matrix[None])


def _shift(n: int, offset: int) -> np.ndarray:
    return np.roll(np.eye(n), offset, axis=1)


def _exponential_offsets(n: int) -> list[int]:
    return [2**k for k in range(max(1, math.ceil(math.log2(n))))] if n > 1 else []


def _static_exponential(n: int) -> np.ndarray:
    offsets = _exponential_offsets(n)
    return (np.eye(n) + sum((_shift(n, k) for k in offsets), np.zeros((n, n))))[None] / (len(offsets) + 1)


def _one_peer_exponential(n: int) -> np.ndarray:
    return np.stack([(np.eye(n) + _shift(n, k)) / 2 for k in _exponential_offsets(n)] or [np.eye(1)])


def _pairing(n: int, seed: int, step: int) -> np.ndarray:
    order = streams.permutation(streams.philox("random pairing", seed, counter=step), n)
    matrix = np.eye(n)
    for a, b in zip(order[0 : n - 1 : 2], order[1:n:2], strict=True):
        matrix[[a, a, b, b], [a, b, a, b]] = 0.5
    return matrix


def _mean_pairing(n: int) -> np.ndarray:
    if n == 1:
        return np.ones((1, 1, 1))
    paired = (n // 2 * 2) / n  # chance that a learner is paired in a step
    off = paired / 2 / (n - 1)
    return (np.full((n, n), off) + np.eye(n) * (1 - paired / 2 - off))[None]


def _torus(n: int) -> np.ndarray:
    rows = next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
    return metropolis(nx.grid_2d_graph(rows, n // rows, periodic=True))[None]


def _hypercube(n: int) -> np.ndarray:
    if n & (n - 1):
        raise ValueError(f"topology hypercube needs a number of learners that is a power of two, not {n}")
    return metropolis(nx.hypercube_graph(n.bit_length() - 1))[None] if n > 1 else np.ones((1, 1, 1))


def _ring(n: int) -> np.ndarray:
    return metropolis(nx.cycle_graph(n) if n > 2 else nx.path_graph(n))[None]


TOPOLOGIES: dict[str, tuple[Kind, Callable[[int], np.ndarray]]] = {
    "ring": ("static", _ring),
    "complete": ("static", lambda n: np.full((1, n, n), 1 / n)),
    "torus": ("static", _torus),
    "hypercube": ("static", _hypercube),
    "star": ("static", lambda n: metropolis(nx.star_graph(n - 1))[None]),
    "exponential": ("static", _static_exponential),
    "one-peer-exponential": ("periodic", _one_peer_exponential),
    "random-pairing": ("random-pairing", _mean_pairing),
}
"""Topologies by name: how they vary, and their matrices for n learners."""


def topology(spec: str | nx.Graph | np.ndarray | Topology, num_learners: int) -> Topology:
    """The topology that a user means.

    Args:
        spec: a name in TOPOLOGIES; a file with a matrix (.npy, .csv, .txt) or a graph (.graphml, .edgelist, .adjlist);
            a networkx graph; a matrix; or a Topology.
        num_learners: n, which must fit.
    """
    if num_learners < 1:
        raise ValueError(f"the number of learners must be at least 1, not {num_learners}")
    if isinstance(spec, Topology):
        found = spec
    elif isinstance(spec, nx.Graph):
        found = from_graph(spec)
    elif isinstance(spec, np.ndarray):
        found = from_matrix(spec)
    elif spec in TOPOLOGIES:
        kind, build = TOPOLOGIES[spec]
        found = Topology(spec, num_learners, kind, build(num_learners))
    elif Path(spec).is_file():
        found = _from_file(Path(spec))
    else:
        raise ValueError(
            f"no such topology: {spec}; there are {', '.join(TOPOLOGIES)}, or a file with a matrix or a graph"
        )
    if found.num_learners != num_learners:
        raise ValueError(f"topology {found.name} is for {found.num_learners} learners, but there are {num_learners}")
    return found


def _from_file(path: Path) -> Topology:
    graphs = {".graphml": nx.read_graphml, ".edgelist": nx.read_edgelist, ".adjlist": nx.read_adjlist}
    try:
        if path.suffix in graphs:
            graph = graphs[path.suffix](path)
        elif path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
        else:
            lines = [line for line in path.read_text().splitlines() if line.split("#")[0].strip()]
            if not lines:
                raise ValueError("it has no numbers")
            matrix = np.loadtxt(lines, delimiter="," if path.suffix == ".csv" else None, ndmin=2)
    except (ValueError, TypeError, LookupError, EOFError, SyntaxError, nx.NetworkXException) as error:
        kind = "graph" if path.suffix in graphs else "matrix"
        raise ValueError(f"topology file {path} holds no {kind} that can be read: {error}") from error
    return from_graph(graph, path.name) if path.suffix in graphs else from_matrix(matrix, path.name)
