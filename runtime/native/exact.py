"""Which operators give a row the same bits in every batch size, at every place."""

from __future__ import annotations

from heatsink.runtime.graph.cost import VIEWS
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import operator

# Besides this package's own: what works on each element alone, and what moves elements. A library's
# products, convolutions and sums choose their order of summation by the whole problem.
_EXACT = {
    *VIEWS,
    "aten._to_copy", "aten.add", "aten.arange", "aten.cat", "aten.clone", "aten.contiguous",
    "aten.cos", "aten.div", "aten.embedding", "aten.eq", "aten.exp", "aten.gelu", "aten.index",
    "aten.le", "aten.mul", "aten.reshape", "aten.sigmoid", "aten.silu", "aten.sin", "aten.stack",
    "aten.sub", "aten.to", "aten.upsample_nearest2d",
}  # fmt: skip


def inexact(graph: Graph) -> list[str]:
    """The operators of a graph whose results for a row may depend on the batch."""
    found = {
        operator(node)
        for node in graph.nodes
        if node.op == "call_function" and not _exact(operator(node))
    }
    return sorted(found)


def _exact(name: str) -> bool:
    # What has no name takes a piece of a tuple, or a number.
    return not name or name in _EXACT or name.startswith("heatsink.")
