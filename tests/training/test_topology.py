from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st

from landscape.training.topology import (
    TOPOLOGIES,
    Topology,
    check_doubly_stochastic,
    from_graph,
    from_matrix,
    metropolis,
    topology,
)

RING_5 = topology("ring", 5).matrices[0]


def allowed(name: str, n: int) -> bool:
    return name != "hypercube" or n & (n - 1) == 0


def assert_doubly_stochastic(matrix: np.ndarray) -> None:
    assert matrix.dtype == np.float64
    assert matrix.min() >= 0
    for axis in (0, 1):
        np.testing.assert_allclose(matrix.sum(axis), 1, rtol=0, atol=1e-12)


def assert_same_values(found: np.ndarray, expected: np.ndarray, atol: float = 1e-10) -> None:
    """Equal as multisets of complex numbers."""
    left = list(np.asarray(expected, dtype=complex))
    assert len(found) == len(left)
    for value in found:
        nearest = int(np.abs(np.array(left) - value).argmin())
        assert abs(left.pop(nearest) - value) < atol


# Every topology ------------------------------------------------------------------------------------------------------


@run(max_examples=150)
@given(
    case=st.tuples(st.sampled_from(sorted(TOPOLOGIES)), st.integers(1, 33)).filter(lambda c: allowed(*c)),
    seed=st.integers(0, 2**31),
    steps=st.lists(st.integers(0, 10**6), min_size=3, max_size=5),
)
def test_every_matrix_is_doubly_stochastic_and_a_pure_function_of_seed_and_step(
    case: tuple[str, int], seed: int, steps: list[int]
) -> None:
    name, n = case
    found = topology(name, n)
    for step in steps:
        matrix = found.matrix(seed, step)
        assert matrix.shape == (n, n)
        assert_doubly_stochastic(matrix)
        assert np.array_equal(matrix, topology(name, n).matrix(seed, step))
        if found.is_symmetric:
            np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-12)
    assert_doubly_stochastic(found.mean_matrix)
    assert found.is_symmetric == np.allclose(
        [found.matrix(seed, s) for s in range(8)], [found.matrix(seed, s).T for s in range(8)]
    )
    if found.is_static:
        assert np.array_equal(found.matrix(seed, steps[0]), found.matrix(seed + 1, steps[1]))


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_every_size_reaches_consensus(name: str) -> None:
    """All modes but the mean one shrink; one learner, and two, are handled too."""
    for n in (n for n in range(1, 34) if allowed(name, n)):
        found = topology(name, n)
        spectrum = found.spectrum()
        assert spectrum.shape == (n,)
        assert abs(spectrum[0] - 1) < 1e-10
        assert (np.diff(np.abs(spectrum)) <= 1e-10).all()
        assert n == 1 or abs(spectrum[1]) < 1 - 1e-4
        assert found.gap() == pytest.approx(1 - abs(spectrum[1]) if n > 1 else 1)


def ring_spectrum(n: int) -> np.ndarray:
    return (1 + 2 * np.cos(2 * np.pi * np.arange(n) / n)) / 3


def torus_spectrum(rows: int, columns: int) -> np.ndarray:
    angles = [2 * np.cos(2 * np.pi * np.arange(k) / k) for k in (rows, columns)]
    return (1 + angles[0][:, None] + angles[1][None, :]).ravel() / 5


def hypercube_spectrum(dimension: int) -> np.ndarray:
    return np.repeat([(dimension + 1 - 2 * k) / (dimension + 1) for k in range(dimension + 1)],
                     [math.comb(dimension, k) for k in range(dimension + 1)])  # fmt: skip


def exponential_spectrum(n: int) -> np.ndarray:
    offsets = [2**k for k in range(math.ceil(math.log2(n)))]
    roots = np.exp(2j * np.pi * np.arange(n) / n)
    return (1 + sum(roots**k for k in offsets)) / (1 + len(offsets))


SPECTRA = [
    *[("ring", n, ring_spectrum(n)) for n in (3, 4, 5, 6, 16, 33)],
    *[("complete", n, np.eye(1, n)[0]) for n in (2, 5, 12)],
    *[("torus", r * c, torus_spectrum(r, c)) for r, c in ((3, 3), (3, 4), (4, 4), (5, 6))],
    *[("torus", n, ring_spectrum(n)) for n in (5, 7)],  # a prime number of learners makes a ring
    *[("hypercube", 2**m, hypercube_spectrum(m)) for m in (1, 2, 3, 5)],
    *[("star", n, np.array([1, *[1 - 1 / n] * (n - 2), 0])) for n in (2, 3, 6, 20)],
    *[("exponential", n, exponential_spectrum(n)) for n in (3, 5, 8, 16, 33)],
    *[("random-pairing", n, np.array([1, *[(n - 2) / (2 * (n - 1))] * (n - 1)])) for n in (2, 4, 6, 10)],
]


@pytest.mark.parametrize(("name", "n", "expected"), SPECTRA, ids=[f"{name}-{n}" for name, n, _ in SPECTRA])
def test_known_spectra(name: str, n: int, expected: np.ndarray) -> None:
    assert_same_values(topology(name, n).spectrum(), expected)


def test_one_peer_exponential_averages_exactly_within_a_period() -> None:
    """For a power of two, the product of one period is the complete average (Ying et al. 2021)."""
    for n in (2, 4, 8, 16):
        found = topology("one-peer-exponential", n)
        assert len(found.matrices) == math.log2(n)
        product = np.linalg.multi_dot([np.eye(n), *found.matrices, np.eye(n)])
        np.testing.assert_allclose(product, np.full((n, n), 1 / n), rtol=0, atol=1e-12)
        assert np.array_equal(found.matrix(0, 5 * len(found.matrices) + 1), found.matrices[1 % len(found.matrices)])


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_random_pairing_is_a_fresh_matching_each_step(n: int) -> None:
    found = topology("random-pairing", n)
    drawn = [found.matrix(7, t) for t in range(40)]
    for matrix in drawn:
        np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-15)  # a projection: pairs average
        assert sorted(np.diag(matrix)) == sorted([0.5] * (n // 2 * 2) + [1.0] * (n % 2))
    if n > 2:
        assert len({m.tobytes() for m in drawn}) > 1
        assert not all(np.array_equal(found.matrix(8, t), m) for t, m in enumerate(drawn))


@pytest.mark.parametrize("n", [4, 5, 6])
def test_random_pairing_averages_to_its_mean_matrix(n: int) -> None:
    found, draws = topology("random-pairing", n), 1500
    drawn = np.stack([found.matrix(0, t) for t in range(draws)])
    stderr = drawn.std(0, ddof=1) / math.sqrt(draws)
    assert (np.abs(drawn.mean(0) - found.mean_matrix) <= 4 * stderr + 1e-12).all()


# Metropolis-Hastings weights -----------------------------------------------------------------------------------------


@st.composite
def connected_graphs(draw: st.DrawFn) -> nx.Graph:
    """A random tree with some edges more, self-loops among them."""
    n = draw(st.integers(2, 12))
    graph = nx.Graph([(k, draw(st.integers(0, k - 1))) for k in range(1, n)])
    pairs = list(itertools.combinations_with_replacement(range(n), 2))
    graph.add_edges_from(draw(st.lists(st.sampled_from(pairs), max_size=15)))
    return graph


@run(max_examples=100)
@given(connected_graphs())
def test_metropolis_weights_of_any_connected_graph(graph: nx.Graph) -> None:
    found = from_graph(graph)
    matrix = found.matrix(0, 0)
    assert_doubly_stochastic(matrix)
    assert found.is_symmetric
    assert np.diag(matrix).min() > 0
    for a, b in itertools.combinations(range(len(graph)), 2):
        assert (matrix[a, b] > 0) == graph.has_edge(a, b)
        if graph.has_edge(a, b):
            degrees = [len(set(graph[v]) - {v}) for v in (a, b)]
            assert matrix[a, b] == pytest.approx(1 / (1 + max(degrees)), rel=1e-14)
    assert found.gap() > 0


@pytest.mark.parametrize("graph", [nx.cycle_graph(7), nx.petersen_graph(), nx.complete_graph(5), nx.hypercube_graph(3)])
def test_regular_graphs_get_one_over_degree_plus_one(graph: nx.Graph) -> None:
    degree = graph.degree(next(iter(graph)))
    expected = (nx.to_numpy_array(graph) + np.eye(len(graph))) / (degree + 1)
    np.testing.assert_allclose(metropolis(graph), expected, rtol=0, atol=1e-15)


def test_parallel_edges_count_once() -> None:
    assert np.array_equal(
        from_graph(nx.MultiGraph([(0, 1), (0, 1), (1, 2)])).matrices, from_graph(nx.path_graph(3)).matrices
    )


def test_learners_are_the_nodes_by_number_whatever_order_the_edges_name_them_in() -> None:
    shuffled = nx.Graph([(4, 3), (2, 3), (1, 0), (2, 1)])
    np.testing.assert_array_equal(from_graph(shuffled).matrices, from_graph(nx.path_graph(5)).matrices)
    named = nx.Graph([("b", "a"), ("a", "c")])  # not numbers: in the graph's own order
    np.testing.assert_allclose(from_graph(named).matrices[0][1], [1 / 3, 1 / 3, 1 / 3])


# What users hand over ------------------------------------------------------------------------------------------------


def test_every_kind_of_spec_gives_the_same_topology() -> None:
    named = topology("ring", 5)
    for spec in (nx.cycle_graph(5), RING_5, named, Topology("mine", 5, "static", RING_5[None])):
        np.testing.assert_allclose(topology(spec, 5).matrices, named.matrices, rtol=0, atol=1e-15)


def write(path: Path) -> Path:
    """A ring of five learners in the format of the file's suffix."""
    graph = nx.relabel_nodes(nx.cycle_graph(5), {0: 3, 3: 0, 1: 4, 4: 1})
    ring = nx.to_numpy_array(graph, nodelist=range(5))
    matrix = (ring + np.eye(5)) / 3
    match path.suffix:
        case ".npy":
            np.save(path, matrix)
        case ".csv":
            np.savetxt(path, matrix, delimiter=",", fmt="%.17g")
        case ".txt":
            np.savetxt(path, matrix, fmt="%.17g", header="a comment")
        case ".graphml":
            nx.write_graphml(graph, path)
        case ".edgelist":
            nx.write_edgelist(graph, path)
        case ".adjlist":
            nx.write_adjlist(graph, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".txt", ".graphml", ".edgelist", ".adjlist"])
def test_files_of_matrices_and_graphs(tmp_path: Path, suffix: str) -> None:
    found = topology(str(write(tmp_path / f"mine{suffix}")), 5)
    expected = topology(write(tmp_path / "reference.npy").as_posix(), 5)
    assert found.name == f"mine{suffix}"
    assert found.is_static
    np.testing.assert_allclose(found.matrices, expected.matrices, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.npy", b""), ("a.npy", b"garbage"), ("a.npy", b"\x93NUMPY"), ("a.csv", b""), ("a.csv", b"1,0\n0"), ("a.txt", b"hello"),
     ("a.txt", b"# only a comment\n"), ("a.graphml", b"<graph"), ("a.graphml", b""), ("a.edgelist", b"0 1 junk\n"),
     ("a.json", b"{}"), ("a.csv", b"\xff\xfe\x00")],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"topology file .*{name} holds no (matrix|graph) that can be read"):
        topology(str(path), 2)


def altered(row: int, column: int, amount: float, *, back: tuple[int, int] | None = None) -> np.ndarray:
    matrix = RING_5.copy()
    matrix[row, column] += amount
    if back:
        matrix[back] -= amount
    return matrix


@pytest.mark.parametrize(
    ("spec", "n", "message"),
    [
        (altered(2, 1, 0.01), 5, r"matrix is not doubly stochastic: row 2 sums to 1\.01, off by \+0\.01"),
        (altered(2, 1, -0.02), 5, r"row 2 sums to 0\.98, off by -0\.02"),
        (altered(2, 1, 0.05, back=(2, 3)), 5, r"column [13] sums to (1\.05, off by \+0\.05|0\.95, off by -0\.05)"),
        (altered(1, 3, -0.25, back=(1, 2)), 5, r"entry \(1, 3\) is -0\.25, but weights must not be negative"),
        (altered(0, 4, math.nan), 5, r"entry \(0, 4\) is nan"),
        (altered(3, 3, math.inf), 5, r"entry \(3, 3\) is inf"),
        (np.ones((2, 3)), 2, r"shape is \(2, 3\), not square"),
        (np.ones(4), 4, r"shape is \(4,\), not square"),
        ("hypercube", 6, "hypercube needs a number of learners that is a power of two, not 6"),
        (nx.Graph([(0, 1), (2, 3)]), 4, "not connected, so learners would never agree"),
        (nx.Graph(), 1, "not connected"),
        (nx.DiGraph([(0, 1), (1, 0)]), 2, "the graph is directed; give its doubly stochastic matrix"),
        (RING_5, 4, "is for 5 learners, but there are 4"),
        (nx.cycle_graph(3), 4, "is for 3 learners, but there are 4"),
        (topology("ring", 6), 4, "topology ring is for 6 learners, but there are 4"),
        ("rings", 5, r"no such topology: rings; there are ring, complete, .*, or a file with a matrix or a graph"),
        ("ring", 0, "number of learners must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(spec: Any, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology(spec, n)


def test_deviations_within_the_tolerance_pass_and_beyond_it_do_not() -> None:
    assert np.array_equal(check_doubly_stochastic(altered(2, 1, 9e-7), "m"), altered(2, 1, 9e-7))
    with pytest.raises(ValueError, match="row 2"):
        check_doubly_stochastic(altered(2, 1, 1.1e-6), "m")


def test_a_directed_doubly_stochastic_matrix_is_taken_as_it_is() -> None:
    shift = (np.eye(4) + np.roll(np.eye(4), 1, axis=1)) / 2
    found = from_matrix(shift)
    assert not found.is_symmetric
    assert np.array_equal(found.matrix(0, 9), shift)


@pytest.mark.parametrize("name", ["ring", "exponential", "one-peer-exponential", "random-pairing"])
def test_damping_mixes_with_part_of_every_matrix(name: str) -> None:
    graph, eye = topology(name, 6), np.eye(6)
    damped = graph.damped(0.3)
    for step in range(4):
        expected = 0.7 * eye + 0.3 * graph.matrix(5, step)
        np.testing.assert_allclose(damped.matrix(5, step), expected, rtol=0, atol=1e-15)
        check_doubly_stochastic(damped.matrix(5, step), name)
    np.testing.assert_allclose(damped.mean_matrix, 0.7 * eye + 0.3 * graph.mean_matrix, rtol=0, atol=1e-15)
    np.testing.assert_allclose(
        np.sort_complex(damped.spectrum()), np.sort_complex(0.7 + 0.3 * graph.spectrum()), atol=1e-12
    )
    twice = damped.damped(0.5)
    assert twice.gamma == pytest.approx(0.15)
    np.testing.assert_allclose(twice.matrix(1, 3), graph.damped(0.15).matrix(1, 3), rtol=0, atol=1e-15)
    assert np.array_equal(graph.damped(1).matrices, graph.matrices)
    assert np.array_equal(graph.damped(0).matrix(0, 0), eye)
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], not"):
            graph.damped(gamma)


def test_the_summary_is_plain_json() -> None:
    import json

    for name, n in (("ring", 5), ("exponential", 8), ("random-pairing", 4), ("complete", 1)):
        summary = json.loads(json.dumps(topology(name, n).summary()))
        values = [complex(*v) if isinstance(v, list) else v for v in summary["spectrum"]]
        np.testing.assert_allclose(values, topology(name, n).spectrum(), atol=1e-15)
        assert (summary["name"], summary["num_learners"]) == (name, n)
        assert summary["spectral_gap"] == topology(name, n).gap()
        assert summary["mu_min"] == pytest.approx(min(np.real(values)))
