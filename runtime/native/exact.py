"""Which operators give a row the same bits in every batch size, at every place."""

from __future__ import annotations

import math

from torch import fx

from heatsink.kernels import _native
from heatsink.runtime.graph.cost import VIEWS
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import operator, traced

# Besides this package's own: what works on each element alone, and what moves elements. A library's
# products, convolutions and sums choose their order of summation by the whole problem.
_EXACT = {
    *VIEWS,
    "aten._to_copy", "aten.add", "aten.arange", "aten.cat", "aten.clone", "aten.contiguous",
    "aten.cos", "aten.div", "aten.embedding", "aten.eq", "aten.exp", "aten.gelu", "aten.index",
    "aten.le", "aten.mul", "aten.reshape", "aten.sigmoid", "aten.silu", "aten.sin", "aten.stack",
    "aten.sub", "aten.to", "aten.upsample_nearest2d",
}  # fmt: skip
# This package's that are PyTorch's own products where the C++ ops are missing.
_PRODUCTS = {
    f"heatsink.{name}"
    for name in ("attention", "conv2d", "linear", "lora_linear", "port_linear", "row_port")
}
# ATen computes these in vectors, and what is left at the end of all elements (and of each thread's
# share, from so many elements on) by another approximation.
_IN_VECTORS = {"aten.gelu", "aten.sigmoid", "aten.silu"}
_VECTORS = 64
_SHARED = 1 << 15


def inexact(graph: Graph) -> list[str]:
    """The operators of a graph whose results for a row may depend on the batch."""
    found = {
        operator(node)
        for node in graph.nodes
        if node.op == "call_function" and not _exact(operator(node))
    }
    return sorted(found)


def by_place(graph: Graph, rows: int) -> list[str]:
    """The operators whose results for a row may depend on its place among `rows`.

    A row on its own gets the same bits.
    """
    found = {
        operator(node)
        for node in graph.nodes
        if operator(node) in _IN_VECTORS and not _whole_vectors(node, rows)
    }
    return sorted(found)


def _whole_vectors(node: fx.Node, rows: int) -> bool:
    """Whether each row of a result ends where a vector does, and one thread computes them all."""
    value = traced(node)
    if value is None:
        return False
    size = math.prod(int(size) for size in value.shape if isinstance(size, int))
    return size % _VECTORS == 0 and rows * size < _SHARED


def _exact(name: str) -> bool:
    # What has no name takes a piece of a tuple, or a number.
    if not name or name in _EXACT:
        return True
    return name.startswith("heatsink.") and (name not in _PRODUCTS or _native.available())
