"""Fold multiplication and division by a number into the convolution or linear product next to it.

With f(v) = v * c or v / c:

Rules:
1. `op(f(x), W, b)` becomes `op(x, f(W), b)`: both are linear in x, and a convolution pads with
   zeros, which f leaves as they are. The bias stays.
2. `f(op(x, W, b))` becomes `op(x, f(W), f(b))`.
3. `f(part)`, with `part` one piece of `op(x, W, b)` cut along the channels (`chunk`, `split`),
   becomes `part` of an op whose rows of W and b that make the piece are scaled, no others. This is
   how an encoder's scaling factor gets past the cut into mean and variance.

Each holds only where c is a finite number other than zero, dtype and shape stay, and what lies
between has no other user; weights must have this one use. New weights are computed in float64 and
rounded once; their origins say `scale by c` or `divide by c`.
"""

from __future__ import annotations

import math
import operator as python_operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import (
    argument,
    bypass,
    only_user,
    operator,
    own_weight,
    same_sizes,
    traced,
)
from heatsink.runtime.graph.weight import transform_rows

# Operator -> the dimension of its output that the weight's rows make.
_PRODUCTS = {"aten.conv1d": 1, "aten.conv2d": 1, "aten.conv3d": 1, "aten.linear": -1}
_CUTS = {"aten.chunk", "aten.split", "aten.split_with_sizes"}


@dataclass(frozen=True)
class _Scale:
    """v -> v * factor, or v / factor."""

    factor: float
    divides: bool

    def __call__(self, values: Tensor) -> Tensor:
        return values / self.factor if self.divides else values * self.factor

    @property
    def text(self) -> str:
        return f"{'divide' if self.divides else 'scale'} by {self.factor!r}"


def fold_scales(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in list(graph.nodes):
        match = _match_scale(node)
        if match is None:
            continue
        source, scale = match
        if _fold_before(graph, node, source, scale) or _fold_after(graph, node, source, scale):
            modified = True
    return graph, modified


def _match_scale(node: fx.Node) -> tuple[fx.Node, _Scale] | None:
    name = operator(node)
    if name not in {"aten.mul", "aten.div"} or node.kwargs.get("rounding_mode") is not None:
        return None
    left, right = node.args[:2]
    if name == "aten.mul" and isinstance(right, fx.Node):
        left, right = right, left
    if not isinstance(left, fx.Node) or isinstance(right, bool | fx.Node):
        return None
    if not isinstance(right, int | float) or right == 0 or not math.isfinite(right):
        return None
    before, after = traced(left), traced(node)
    if before is None or after is None or not after.is_floating_point():
        return None
    if before.dtype != after.dtype or not same_sizes(before.shape, after.shape):
        return None
    return left, _Scale(float(right), divides=name == "aten.div")


def _fold_before(graph: Graph, node: fx.Node, source: fx.Node, scale: _Scale) -> bool:
    product = only_user(node)
    if product is None or operator(product) not in _PRODUCTS or product.args[0] is not node:
        return False
    name = own_weight(graph, product.args[1])
    if name is None:
        return False
    _scale_weight(graph, name, scale, None)
    bypass(node, source)
    return True


def _fold_after(graph: Graph, node: fx.Node, source: fx.Node, scale: _Scale) -> bool:
    product, rows = _producer(source)
    if product is None:
        return False
    bias = argument(product, "bias")
    names = [own_weight(graph, holder) for holder in (product.args[1], bias) if holder is not None]
    if None in names:
        return False
    for name in names:
        assert name is not None
        _scale_weight(graph, name, scale, rows)
    bypass(node, source)
    return True


def _producer(source: fx.Node) -> tuple[fx.Node | None, tuple[int, int] | None]:
    """The product that `source` is all (None) or some rows of, if nothing else uses it."""
    if only_user(source) is None:
        return None, None
    if operator(source) in _PRODUCTS:
        return source, None
    if source.target is not python_operator.getitem:
        return None, None
    cut, index = source.args
    if operator(cut) not in _CUTS or not isinstance(index, int):
        return None, None
    assert isinstance(cut, fx.Node)
    product = cut.args[0]
    if operator(product) not in _PRODUCTS:
        return None, None
    assert isinstance(product, fx.Node)
    if only_user(product) is None or not _cuts_rows(cut, product):
        return None, None
    if [u.args[1] for u in cut.users].count(index) != 1:
        return None, None
    return product, _rows_of_piece(cut, index, _PRODUCTS[operator(product)])


def _cuts_rows(cut: fx.Node, product: fx.Node) -> bool:
    value = traced(product)
    if value is None:
        return False
    wanted = _PRODUCTS[operator(product)] % value.dim()
    return bool(argument(cut, "dim") % value.dim() == wanted)


def _rows_of_piece(cut: fx.Node, index: int, dim: int) -> tuple[int, int]:
    pieces: Any = cut.meta["val"]
    sizes = [int(piece.shape[dim]) for piece in pieces]
    index %= len(sizes)
    start = sum(sizes[:index])
    return start, start + sizes[index]


def _scale_weight(graph: Graph, name: str, scale: _Scale, rows: tuple[int, int] | None) -> None:
    weight = graph.weights[name]
    start, stop = rows or (0, weight.shape[0])
    graph.weights[name] = weight.scale_rows(scale, start, stop)
    graph.origins[name] = transform_rows(
        graph.origins[name], weight.shape[0], start, stop, scale.text
    )
