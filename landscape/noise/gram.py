r"""Inner products of all pairs of per-example gradients, exact and layer by layer, without holding the gradients (theory.md sec. 4).

The m x m matrix of the inner products $g_i \cdot g_k$ has the nonzero spectrum of the d x d second moment. It is a sum over parameters, and for
each of them over blocks of columns:

    outer product     a linear layer on one row an example: g_i = delta_i a_i^T, so (A A^T) * (D D^T) elementwise: m^2 (in + out), no gradient formed
    pairs             a layer with T positions an example: the same over pairs of positions, m^2 T^2 (in + out)
    explicit          gradients rebuilt from inputs and slopes in blocks of the weight's rows, m^2 in out
    vmap              every other parameter, in blocks of columns

The first three come from ordinary batched passes (`landscape.noise.capture`); the cheapest by arithmetic is taken. Blocks are as wide as the memory
budget allows, and as many of them as fit are filled in one pass over the data.

Ranks that share the data share each sum: of explicit and vmap, every rank fills and multiplies its columns alone; of outer products and pairs, all
fill the few numbers an example that these take, and each multiplies its rows of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from landscape.functional import FunctionalModel, chunks
from landscape.noise.capture import (
    NUM_TRIALS,
    Flow,
    Layer,
    capture,
    formed,
    leaves,
    num_positions,
    trusted_layers,
    vector_gradients,
    weight_gradients,
    weight_projections,
)
from landscape.noise.examples import Examples
from landscape.noise.products import PRODUCT_WIDTH, add_pairs, add_products, band_of, cut, mirror
from landscape.objective import Objective, Weights

Grouping = Literal["layer", "parameter", "whole"] | int
"""What one Gram matrix is of: the parameters of a module, one parameter, all, or those whose names agree in so many first parts."""

ELEMENTWISE = 16
"""What multiplying and summing two numbers in memory costs, in multiplications inside a matrix product."""


@dataclass(frozen=True)
class ExampleGram:
    """Inner products of the per-example gradients of some parameters.

    Attributes:
        name: of the layer or parameter; "all" for all.
        num_parameters: over which the inner products run.
        gram: (m, m) g_i . g_k, float64.
        along: (m, k) g_i . v of the directions asked for, float64.
    """

    name: str
    num_parameters: int
    gram: Tensor
    along: Tensor


def example_gram(
    objective: Objective,
    weights: Weights,
    indices: Int64[Tensor, " m"] | None = None,
    *,
    by: Grouping = "layer",
    directions: Float[Tensor, "d k"] | None = None,
    memory_budget: int | None = None,
    method: Literal["captured", "vmap"] = "captured",
) -> Iterator[ExampleGram]:
    """The Gram matrix of per-example gradients at one weight vector, one layer after another; the whole is their sum.

    g_i is the gradient of example i's contribution, times N/sum m for a mean-reduced loss and N for a sum-reduced one, so that the mean of g_i over
    all N examples is g(w), whatever the weights of the examples.

    Args:
        objective: L; its loss must give one number per example.
        weights: w.
        indices: which examples; None for all N, which is all that a list of batches can give.
        by: what to make one matrix of, see `Grouping`.
        directions: (d, k) to project the gradients on as well, e.g. g to centre at.
        memory_budget: bytes for gradients, inputs and slopes, graphs and temporaries, beside weights and three (m, m) matrices; by default 512 MiB on a CPU
            and half of what is free on a GPU. It is exceeded only where one example's gradient of one parameter, or one row of a weight for all m
            examples, is larger.
        method: "captured" takes inputs and slopes of linear and convolution layers where that is right (tried on a few examples); "vmap" never
            does, and is the slow reference.

    Yields:
        `ExampleGram`, in the order of the parameters.

    Raises:
        ValueError: examples that cannot be drawn or have no gradient of their own; gradients that are not finite.

    Cost: a forward and a backward pass over the m examples for every (memory_budget/2)/(m itemsize) numbers kept per example; then the products above. Accuracy:
    entries are off by the type's precision times |g_i| |g_k|, so that a covariance far below |g|^2 asks for Objective(..., dtype=torch.float64).
    """
    flat = objective.flat(weights)
    columns = flat.new_zeros(len(flat), 0) if directions is None else directions.to(flat)
    if columns.shape[0] != len(flat):
        raise ValueError(f"directions of shape {tuple(directions.shape) if directions is not None else ()}, for {len(flat)} parameters")  # fmt: skip
    examples = Examples(objective, indices)
    groups = {"all": list(objective.model.layout.names)} if by == "whole" else objective.blocks(by)
    return _Gram(objective, flat, examples, columns, memory_budget, method == "captured").by_group(groups)


def example_scale(objective: Objective) -> float:
    """What a contribution's gradient is multiplied by, so that its mean over all N examples (of all ranks) is the objective's gradient."""
    return objective.num_examples / objective.norm


def default_budget(device: torch.device) -> int:
    """Bytes to work in: 512 MiB on a CPU, half of what is free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 512 << 20


# Plan and passes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """What one pass of this rank keeps of every example for one parameter: `width` numbers.

    "columns" of the gradient by vmap; "rows" of a weight's gradient, or one number a feature ("vector"), rebuilt; "inputs" and "slopes" of an outer product; the whole "flow".
    """

    group: str
    parameter: str
    kind: Literal["columns", "rows", "vector", "inputs", "slopes", "flow"]
    part: slice
    width: int
    layer: Layer | None = None


class _Gram:
    """The plan of pieces and passes, and the sums that the pieces go into."""

    def __init__(
        self, objective: Objective, weights: Tensor, examples: Examples, directions: Tensor, budget: int | None, captured: bool
    ) -> None:  # fmt: skip
        self.objective, self.weights, self.examples = objective, weights, examples
        self.peers = objective.peers
        self.room = self.peers.least(default_budget(objective.device) if budget is None else budget) // 2
        self.count, self.itemsize = len(examples), objective.dtype.itemsize
        self.shapes = dict(zip(objective.model.layout.names, objective.model.layout.shapes, strict=True))
        self.directions = dict(
            zip(self.shapes, directions.split(objective.model.layout.sizes), strict=True)
        )  # (numel, k) each
        self.num_directions = directions.shape[1]
        with self.peers.agree():
            known = trusted_layers(objective, weights, *examples.few(NUM_TRIALS)) if captured else {}
        everywhere = set(known).intersection(*self.peers.collect(list(known)))  # one plan on all ranks
        self.known = {name: layer for name, layer in known.items() if name in everywhere}
        self.band, self.share = band_of(self.count, self.peers), self.peers.share(self.count)
        self.one_shape = examples.indices is not None  # batches of a list may differ in length
        self.batched = objective.model.batched
        self.along: dict[str, Tensor] = {}

    @property
    def most(self) -> int:
        """Numbers of every example that one pass may keep."""
        return max(1, self.room // (self.count * self.itemsize))

    def by_group(self, groups: dict[str, list[str]]) -> Iterator[ExampleGram]:
        pieces = {group: [p for name in names for p in self._pieces(group, name)] for group, names in groups.items()}
        scale = example_scale(self.objective)
        blocks = self._blocks([piece for some in pieces.values() for piece in some])
        self.along = {group: self._zeros(self.num_directions) for group in groups}
        sums: dict[str, Tensor] = {}
        for group, names in groups.items():
            sums["total"] = self._zeros(self.count)
            with self.peers.agree():
                for _ in pieces[group]:
                    piece, block = next(blocks)
                    self._consume(piece, block, sums)
                    del block
            gram = mirror(self.peers.sum(sums.pop("total"))).mul_(scale**2)
            along = self.peers.sum(self.along.pop(group)).mul_(scale)
            if not torch.isfinite(gram.diagonal()).all():
                with self.peers.agree():
                    self.objective.name_bad_data()
                raise ValueError(f"the gradients of {group} are not finite though the data are: these weights have diverged")  # fmt: skip
            yield ExampleGram(group, sum(self.shapes[name].numel() for name in names), gram, along)
            del gram, along

    def _blocks(self, pieces: list[_Piece]) -> Iterator[tuple[_Piece, Tensor]]:
        """Pieces in order with what they keep, (m, width)."""
        for some in _packed(pieces, self.most):
            found = self._filled(some)
            for piece in some:
                yield piece, found.pop(0)

    def _zeros(self, columns: int) -> Tensor:
        return torch.zeros(self.count, columns, dtype=torch.float64, device=self.weights.device)

    def _pieces(self, group: str, name: str) -> list[_Piece]:
        size = self.shapes[name].numel()
        if name not in self.known:
            own = cut(self.peers.share(size), self.most)
            return [_Piece(group, name, "columns", part, part.stop - part.start) for part in own]
        layer, a, delta = self.known[name]
        if not layer.has_matrix(name):
            own = cut(self.peers.share(size), size)
            return [_Piece(group, name, "vector", part, part.stop - part.start, layer) for part in own]
        if layer.is_linear and len(a) == 1:
            inputs = [_Piece(group, name, "inputs", p, p.stop - p.start, layer) for p in chunks(a[0], self.most)]
            return inputs + [_Piece(group, name, "slopes", p, p.stop - p.start, layer) for p in chunks(delta[0], self.most)]  # fmt: skip
        width = a.numel() + delta.numel()
        if self.one_shape and width <= self.most and (width < size or self._pairs_pay(layer, delta)):
            return [_Piece(group, name, "flow", slice(0, width), width, layer)]
        rows, fan_in = self.shapes[name][0], size // self.shapes[name][0]
        return [
            _Piece(group, name, "rows", part, (part.stop - part.start) * fan_in, layer)
            for part in cut(self.peers.share(rows), self.most // fan_in)
        ]

    def _pairs_pay(self, layer: Layer, delta: torch.Size) -> bool:
        length, weight = num_positions(layer, delta), layer.module.weight
        pairs = length**2 * (weight[0].numel() + weight.shape[0] + ELEMENTWISE)
        return layer.groups == 1 and pairs * self.count < weight.numel() * (self.count + 2 * length)

    def _at_once(self, pieces: list[_Piece]) -> int:
        """Examples in one pass through the network, with what is made of them."""
        each = self.objective.bytes_per_example
        for piece in pieces:
            if piece.kind == "rows":
                layer, _, delta = self.known[piece.parameter]
                length = num_positions(layer, delta)
                patches = length * (layer.module.weight[0].numel() * layer.groups + layer.module.weight.shape[0])
                each = max(each, self.objective.bytes_per_example + 2 * self.itemsize * (patches + piece.width))
        whole = sum(self.shapes[n].numel() for n in {p.parameter for p in pieces if p.kind == "columns"})
        return int(max(1, min(self.count, self.room // max(1.0, each + 4 * self.itemsize * whole))))

    def _filled(self, pieces: list[_Piece]) -> list[Tensor]:
        """One pass over the examples: (m, width) of every piece."""
        found = [torch.empty(self.count, p.width, dtype=self.objective.dtype, device=self.weights.device) for p in pieces]  # fmt: skip
        layers = list({p.layer.name: p.layer for p in pieces if p.layer is not None}.values())
        rest = self._rest(list(dict.fromkeys(p.parameter for p in pieces if p.kind == "columns")))
        held = leaves(self.objective, self.weights) if layers else {}
        for part, inputs, targets in self.examples.chunks(self._at_once(pieces)):
            gradients: dict[str, Tensor] = {}
            flows: dict[str, Flow] = {}
            if layers:
                flows, _ = capture(self.objective, held, layers, inputs, targets)
            if rest is not None:
                model, weights = rest
                gradients = formed(self.objective, model, weights, inputs, targets)
                self.batched = model.batched
            for piece, store in zip(pieces, found, strict=True):
                if piece.layer is None:
                    store[part] = gradients[piece.parameter].reshape(part.stop - part.start, -1)[:, piece.part]
                else:
                    store[part] = self._kept(piece, piece.layer, part, flows.get(piece.layer.name))
        return found

    def _rest(self, names: list[str]) -> tuple[FunctionalModel, Tensor] | None:
        """The network as a function of some parameters alone, and these."""
        if not names:
            return None
        model = self.objective.subset(names, self.weights).model
        model.batched = self.batched
        return model, model.initial_weights()[0]

    def _kept(self, piece: _Piece, layer: Layer, part: slice, flow: Flow | None) -> Tensor:
        if flow is None:
            raise ValueError(
                f"layer {layer.name or 'of the network'} was not called once with one row an example for some examples, as it was for others; use method='vmap'"
            )
        if piece.kind == "vector":
            return vector_gradients(layer, flow, piece.parameter)[:, piece.part]
        if piece.kind == "rows":
            return weight_gradients(layer, flow, piece.part)
        if piece.kind == "flow":
            return torch.cat([flow.inputs.flatten(1), flow.slopes.flatten(1)], dim=1)
        if piece.kind == "inputs" and piece.part.start == 0 and self.num_directions:
            start, stop = max(part.start, self.share.start), min(part.stop, self.share.stop)
            if start < stop:
                own = flow[start - part.start : stop - part.start]
                self.along[piece.group][start:stop] += self._projections(piece, layer, own)
        return (flow.inputs if piece.kind == "inputs" else flow.slopes)[:, piece.part]

    def _projections(self, piece: _Piece, layer: Layer, flow: Flow) -> Tensor:
        directions = self.directions[piece.parameter].T
        return weight_projections(layer, flow, directions.reshape(-1, *self.shapes[piece.parameter]))

    def _consume(self, piece: _Piece, block: Tensor, sums: dict[str, Tensor]) -> None:
        """Add what a piece holds to the sums: of the group, and of the outer product that is being made."""
        size = self.shapes[piece.parameter]
        if piece.kind in ("inputs", "slopes"):
            if piece.kind not in sums:
                sums[piece.kind] = self._zeros(self.count)
            add_products(sums[piece.kind], block, torch.float64, self.band)
            if piece.kind == "slopes" and piece.part.stop == size[0]:
                sums["total"].addcmul_(sums["inputs"], sums["slopes"])
                sums["inputs"].zero_()  # kept: to zero them is faster than to have them anew
                sums["slopes"].zero_()
        elif piece.kind == "flow":
            self._consume_flow(piece, block, sums["total"])
        else:
            self._add(piece, block, piece.part, sums["total"])

    def _consume_flow(self, piece: _Piece, block: Tensor, total: Tensor) -> None:
        assert piece.layer is not None
        _, a, delta = self.known[piece.parameter]
        inputs, slopes = block.split([a.numel(), delta.numel()], dim=1)
        flow = Flow(inputs.unflatten(1, a), slopes.unflatten(1, delta))
        length = num_positions(piece.layer, delta)
        rows, fan_in = self.shapes[piece.parameter][0], self.shapes[piece.parameter][1:].numel()
        patches = self.itemsize * length * (fan_in * piece.layer.groups + rows)
        if self._pairs_pay(piece.layer, delta):
            add_pairs(total, piece.layer, flow, self.room, self.band)
            for part in cut(self.share if self.num_directions else range(0), max(1, self.room // (2 * patches))):
                self.along[piece.group][part] += self._projections(piece, piece.layer, flow[part])  # fmt: skip
            return
        for some in cut(self.peers.share(rows), max(1, self.room // 2 // (self.count * fan_in * self.itemsize))):
            width = (some.stop - some.start) * fan_in
            rebuilt = block.new_empty(self.count, width)
            for part in chunks(self.count, max(1, self.room // (4 * (patches + self.itemsize * width)))):
                rebuilt[part] = weight_gradients(piece.layer, flow[part], some)
            self._add(piece, rebuilt, some, total)

    def _add(self, piece: _Piece, block: Tensor, part: slice, total: Tensor) -> None:
        add_products(total, block)
        if self.num_directions:
            fan_in = 1 if piece.kind in ("columns", "vector") else self.shapes[piece.parameter][1:].numel()
            directions = self.directions[piece.parameter][part.start * fan_in : part.stop * fan_in]
            for cols in chunks(block.shape[1], PRODUCT_WIDTH):
                self.along[piece.group] += block[:, cols].double() @ directions[cols].double()


def _packed(pieces: list[_Piece], most: int) -> Iterator[list[_Piece]]:
    """Pieces in order, as many at once as hold `most` numbers an example."""
    some: list[_Piece] = []
    for piece in pieces:
        if some and sum(p.width for p in some) + piece.width > most:
            yield some
            some = []
        some.append(piece)
    if some:
        yield some
