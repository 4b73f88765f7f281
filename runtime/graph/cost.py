"""What a graph costs by its shapes: nodes, FLOPs and bytes of every operator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.passes.edit import argument, operator, traced

# Operators that move nothing: their results are their inputs' memory.
VIEWS = {
    "aten.view", "aten._unsafe_view", "aten.permute", "aten.transpose", "aten.unsqueeze",
    "aten.squeeze", "aten.slice", "aten.select", "aten.expand", "aten.chunk", "aten.split",
    "aten.split_with_sizes", "aten.sym_size", "aten.alias", "aten.detach", "aten.t",
    "aten.unflatten",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Of one or more operations.

    Attributes:
        nodes: how many.
        flops: multiplications and additions of matrix products, convolutions and attention; what
            other operators compute is not counted.
        bytes: of their inputs and outputs, each counted once a node; 0 for views. What a port reads
            of a bank, and what it multiplies, depends on the rows' adapters: neither is counted.
    """

    nodes: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nodes + other.nodes, self.flops + other.flops, self.bytes + other.bytes)


def costs(graph: Graph, rows: int) -> dict[str, Cost]:
    """The cost of each operator of a graph for a batch of `rows`, the dearest first."""
    each = NodeCosts(graph, rows)
    found: defaultdict[str, Cost] = defaultdict(Cost)
    for node in graph.nodes:
        if node.op == "call_function":
            found[operator(node) or _name(node)] += each.of(node)
    order = sorted(found, key=lambda name: (-found[name].flops, -found[name].bytes, name))
    return {name: found[name] for name in order}


def launches(graph: Graph) -> int:
    """Operations that are run: those that are no view, no size and no constant."""
    fixed: set[fx.Node] = set()
    count = 0
    for node in graph.nodes:
        if node.op == "placeholder" and WEIGHT_KEY in node.meta:
            fixed.add(node)
        if node.op != "call_function":
            continue
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if all(source in fixed for source in sources):
            fixed.add(node)
        elif operator(node) and operator(node) not in VIEWS:
            count += 1
    return count


class NodeCosts:
    """What single nodes of a graph cost for a batch of `rows`."""

    def __init__(self, graph: Graph, rows: int) -> None:
        self._sizes = _Sizes(graph, rows)

    def of(self, node: fx.Node) -> Cost:
        """The node's cost."""
        return _cost(node, self._sizes)

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node's tensor."""
        value = traced(node)
        if value is None:
            raise ValueError(f"node: expected one that gives a tensor, got {node}")
        return self._sizes.shape(value)


def total(by_operator: dict[str, Cost]) -> Cost:
    """The sum over all operators."""
    return sum(by_operator.values(), Cost())


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


class _Sizes:
    """Numbers for symbolic sizes."""

    def __init__(self, graph: Graph, rows: int) -> None:
        # The batch is the only symbol there is.
        self._values = dict.fromkeys(graph.ranges, rows)

    def shape(self, value: Tensor) -> list[int]:
        return [self.number(size) for size in value.shape]

    def number(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        return int(size.node.expr.xreplace(self._values))

    def bytes(self, value: Any) -> int:
        if isinstance(value, Tensor):
            return math.prod(self.shape(value)) * value.element_size()
        every = value if isinstance(value, list | tuple) else ()
        return sum(self.bytes(each) for each in every)


def _cost(node: fx.Node, sizes: _Sizes) -> Cost:
    name = operator(node)
    # What is no operator of PyTorch's takes a piece of a tuple, or a number.
    if not name or name in VIEWS:
        return Cost(nodes=1)
    counted = _FLOPS.get(name)
    flops = 0 if counted is None else counted(node, sizes)
    read = [argument(node, each) for each in _READ[name]] if name in _READ else node.all_input_nodes
    inputs = sum(sizes.bytes(each.meta.get("val")) for each in read if isinstance(each, fx.Node))
    return Cost(1, flops, inputs + sizes.bytes(node.meta.get("val")))


def _weighted(node: fx.Node, sizes: _Sizes) -> int:
    """Of a product with a weight: every row of it meets every place of the output."""
    weight, out = traced(argument(node, "weight")), traced(node)
    assert weight is not None
    assert out is not None
    channels = sizes.shape(weight)
    places = math.prod(sizes.shape(out))
    if argument(node, "activation") == "geglu":
        places *= 2
    return 2 * places * math.prod(channels[1:])


def _attention(node: fx.Node, sizes: _Sizes) -> int:
    """Two products of queries with keys and of weights with values; a causal mask saves none."""
    first, second = (traced(value) for value in node.args[:2])
    assert first is not None
    assert second is not None
    tokens = 2 if operator(node) == "aten.scaled_dot_product_attention" else 1
    return 4 * math.prod(sizes.shape(first)) * sizes.shape(second)[tokens]


def _matmul(node: fx.Node, sizes: _Sizes) -> int:
    left, out = traced(node.args[0]), traced(node)
    assert left is not None
    assert out is not None
    return 2 * math.prod(sizes.shape(out)) * sizes.shape(left)[-1]


# Of ports, without the bank.
_READ = {
    "heatsink.row_port": ("y", "x"),
    "heatsink.port_linear": ("x", "weight", "bias", "residual", "sample_add"),
}
_FLOPS: dict[str, Callable[[fx.Node, _Sizes], int]] = {
    "aten.linear": _weighted,
    "aten.conv1d": _weighted,
    "aten.conv2d": _weighted,
    "aten.conv3d": _weighted,
    "heatsink.linear": _weighted,
    "heatsink.port_linear": _weighted,
    "heatsink.conv2d": _weighted,
    "aten.scaled_dot_product_attention": _attention,
    "heatsink.attention": _attention,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.bmm": _matmul,
}
