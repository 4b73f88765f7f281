"""Compute what depends on no input once, when it is loaded.

Rules:
1. The result of operations that depend on no input and on no weight but computed ones becomes a
   weight with the origin `computed`: positions, masks, frequencies of sinusoids.
2. `embedding(W, 0 .. n - 1)`, where rule 1 has computed the indices, becomes the first n rows of W.

Values are computed in float64 and rounded once. A result of more than `LIMIT` elements stays, and
so does what draws random numbers or writes into something.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.packing import cut
from heatsink.runtime.graph.passes.edit import bypass, operator, traced
from heatsink.runtime.graph.passes.trace import new_weight, replace
from heatsink.runtime.graph.weight import COMPUTED, Origin, Weight

LIMIT = 1 << 20


@dataclass(frozen=True)
class _Expression:
    """An operation on constants, apart from any graph; several may share an argument."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def value(self, known: dict[int, Any]) -> Any:
        """Its value; `known` holds those of what was computed before."""
        if id(self) not in known:

            def of(argument: Any) -> Any:
                if isinstance(argument, _Expression):
                    return argument.value(known)
                return _exact(argument)

            args, kwargs = fx.node.map_aggregate((self.args, self.kwargs), of)
            known[id(self)] = self.target(*args, **kwargs)
        return known[id(self)]


def _exact(argument: Any) -> Any:
    if isinstance(argument, Weight):
        values = argument.source()
        return values.double() if values.is_floating_point() else values
    wide = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if wide else argument


def fold_constants(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    found = _constants(graph)
    folded = [node for node in found if _ends(node, found) and _fits(node)]
    for node in folded:
        _fold(graph, node, found[node])
    tables = [node for node in graph.nodes if _rows_of_table(graph, node) is not None]
    for node in tables:
        _cut_table(graph, node)
    return graph, bool(folded or tables)


def computed(graph: Graph, node: Any) -> str | None:
    """The name of the weight that `node` holds, if every value of it is computed."""
    name = node.meta.get(WEIGHT_KEY) if isinstance(node, fx.Node) else None
    if name is None or any(o.transform != COMPUTED for o in graph.origins[name]):
        return None
    return str(name)


def _constants(graph: Graph) -> dict[fx.Node, _Expression]:
    found: dict[fx.Node, _Expression] = {}
    for node in graph.nodes:
        if node.op != "call_function" or _varies(node):
            continue
        if all(n in found or computed(graph, n) is not None for n in node.all_input_nodes):

            def of(argument: Any) -> Any:
                if not isinstance(argument, fx.Node):
                    return argument
                name = computed(graph, argument)
                return found[argument] if name is None else graph.weights[name]

            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), of)
            target: Any = node.target
            found[node] = _Expression(target, args, kwargs)
    return found


def _varies(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not callable(target)
    return (
        target._schema.is_mutable
        or not target._schema.returns
        or torch.Tag.nondeterministic_seeded in target.tags
    )


def _ends(node: fx.Node, found: dict[fx.Node, _Expression]) -> bool:
    return any(user not in found for user in node.users) and traced(node) is not None


def _fits(node: fx.Node) -> bool:
    value = traced(node)
    assert value is not None
    return all(isinstance(s, int) for s in value.shape) and math.prod(value.shape) <= LIMIT


def _fold(graph: Graph, node: fx.Node, expression: _Expression) -> None:
    value = traced(node)
    assert value is not None

    def source() -> Tensor:
        with torch.inference_mode():
            result: Tensor = expression.value({})
        # Not an inference tensor, and not a view of a larger one.
        return result.clone(memory_format=torch.contiguous_format)

    name = f"{COMPUTED}.{sum(n.startswith(COMPUTED) for n in graph.weights)}"
    first = next(iter(graph.nodes))
    weight = Weight(tuple(value.shape), value.dtype, source, name)
    holder = new_weight(graph, first, weight, [Origin(name, None, COMPUTED)])
    bypass(node, holder)


def _rows_of_table(graph: Graph, node: fx.Node) -> int | None:
    """How many of the table's first rows an embedding reads in order; None if it does not."""
    if operator(node) != "aten.embedding" or WEIGHT_KEY not in node.args[0].meta:  # type: ignore[union-attr]
        return None
    name = computed(graph, node.args[1])
    table = traced(node.args[0])
    if name is None or table is None or len(node.args[0].users) != 1:  # type: ignore[union-attr]
        return None
    indices = graph.weights[name].load().flatten()
    count = indices.numel()
    in_order = torch.equal(indices, torch.arange(count, dtype=indices.dtype))
    return count if in_order and count <= table.shape[0] else None


def _cut_table(graph: Graph, node: fx.Node) -> None:
    holder, indices = node.args[:2]
    assert isinstance(holder, fx.Node)
    assert isinstance(indices, fx.Node)
    rows = _rows_of_table(graph, node)
    assert rows is not None
    name = holder.meta[WEIGHT_KEY]
    value = traced(indices)
    assert value is not None
    weight, origins = graph.weights[name], graph.origins[name]
    if rows < weight.shape[0]:
        part, kept = cut(weight, origins, 0, rows)
        holder = new_weight(graph, holder, part, kept)
    replace(node, torch.ops.aten.view.default, (holder, [*value.shape, weight.shape[1]]))
