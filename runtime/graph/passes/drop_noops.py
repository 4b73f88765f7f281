"""Remove operations that change nothing.

Rules:
1. Dropout that is not training, or with probability 0.
2. A conversion to the dtype and layout that its input has (`to`, `_to_copy`, `type_as`).
3. `alias`, `detach`, `lift_fresh_copy`, and a `clone` or `contiguous` of what has its layout
   already: where nothing is written into, a copy is as good as its source.
4. Assertions about traced tensors and symbols: inputs are checked when the graph is given them.
5. A floating-point tensor multiplied or divided by one, when neither dtype nor shape changes.
6. `view`, `reshape`, `expand`, `permute`, `transpose`, `slice` and their kind, where the result has
   its input's shape and layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, bypass, operator, same_layout, traced

_CONVERSIONS = {"aten.to", "aten._to_copy", "aten.type_as"}
_COPIES = {"aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.clone", "aten.contiguous"}
_ASSERTIONS = {
    "aten._assert_tensor_metadata",
    "aten._assert_scalar",
    "aten._assert_async",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
# Each moves no element when the shape stays, except those of `_REORDERING`.
_RESHAPES = {
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.expand",
    "aten.slice",
    "aten.flatten",
    "aten.unflatten",
    "aten.squeeze",
}


def drop_noop_nodes(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    writes = any(_writes(node) for node in graph.nodes)
    for node in list(graph.nodes):
        if operator(node) in _ASSERTIONS and not node.users:
            graph.module.graph.erase_node(node)
            modified = True
        elif (value := _unchanged(node, writes)) is not None:
            bypass(node, value)
            modified = True
    return graph, modified


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def _unchanged(node: fx.Node, writes: bool) -> fx.Node | None:
    """The input that this node returns as it is, if it does."""
    name = operator(node)
    source = node.args[0] if node.args else None
    before, after = traced(source), traced(node)
    if not isinstance(source, fx.Node) or before is None or after is None:
        return None
    if not same_layout(before, after):
        return None
    if name == "aten.dropout":
        kept = not argument(node, "train") or argument(node, "p") == 0
        return source if kept else None
    if name in _CONVERSIONS | _COPIES:
        return source if not writes else None
    if name in {"aten.mul", "aten.div"}:
        return source if _is_one(node) and after.is_floating_point() else None
    if name in _RESHAPES:
        return source
    rule = _REORDERING.get(name)
    return source if rule is not None and rule(node) else None


def _is_one(node: fx.Node) -> bool:
    other = node.args[1]
    by_one = isinstance(other, int | float) and not isinstance(other, bool) and other == 1
    # Division that rounds is no division.
    return by_one and node.kwargs.get("rounding_mode") is None


def _permutes_nothing(node: fx.Node) -> bool:
    dims = argument(node, "dims")
    return all(dim in (index, index - len(dims)) for index, dim in enumerate(dims))


def _transposes_nothing(node: fx.Node) -> bool:
    value = traced(node)
    assert value is not None
    first, second = (argument(node, name) % value.dim() for name in ("dim0", "dim1"))
    return bool(first == second)


_REORDERING: dict[str, Callable[[fx.Node], bool]] = {
    "aten.permute": _permutes_nothing,
    "aten.transpose": _transposes_nothing,
}
