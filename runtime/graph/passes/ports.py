"""Give a graph inputs for adapters: low-rank terms that each row picks from a bank.

`y = W x + b` becomes, for the rows that have adapters,

    y[r] += sum_i scales[r, i] * B[slots[r, i]] (A[slots[r, i]] x[r])

with A and B from the bank's tensors (`heatsink.runtime.port_layout`), which are inputs.

Rules:
1. Every linear and two-dimensional convolution that uses the weight of a module of the layout is
   followed by a port (`heatsink.runtime.graph.port_op`), which its users use instead. A weight is
   known by its origins: rows of several modules get a port each, rows that were multiplied by a
   number get it too, and what can't be followed is refused (`port_places`).
2. The new inputs are `adapter_rows` `(adapted,)`, the rows with adapters; for these alone
   `adapter_slots` and `adapter_scales` `(adapted, n)`, whose first slot is one and later ones may
   be -1; and the bank's tensors. No other row is touched: a row without adapters keeps its bits.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils._sympy.value_ranges import ValueRanges

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.graph import BATCH, INPUT_KEY, Graph, TensorSpec
from heatsink.runtime.graph.passes.edit import argument, inherit, operator, traced
from heatsink.runtime.graph.passes.port_places import Block, Place, find_places
from heatsink.runtime.graph.passes.protocol import Pass
from heatsink.runtime.graph.port_op import ADAPTER_PORT
from heatsink.runtime.port_layout import ROWS_INPUT, SCALES_INPUT, SLOTS_INPUT, PortLayout

ADAPTED, ADAPTERS = "adapted", "n"
MAX_ADAPTED, MAX_ADAPTERS = 4096, 64
# Sizes that stand for those dimensions where shapes are worked out.
_EXAMPLE = (3, 5)


def add_ports(layout: PortLayout, unused: Collection[str] = ()) -> Pass:
    """The pass that gives a graph the ports of `layout`.

    Args:
        layout: of the graph's component.
        unused: modules of the layout that this graph does not use, so that they need no port.

    Returns:
        A pass that raises NotBuilt, naming weight and reason, where a port can't be.
    """

    def ports(graph: Graph) -> tuple[Graph, bool]:
        if SLOTS_INPUT in graph.inputs:
            return graph, False
        if graph.dtype != torch.float32:
            raise NotBuilt(f"{graph.component}: ports need a float32 graph, got {graph.dtype}")
        outputs = {path: group.outputs for group in layout.groups for path in group.members}
        places = find_places(graph, outputs, unused)
        if not places:
            return graph, False
        for place in places:
            check_place(graph, layout, place)
        inputs = _add_inputs(graph, layout)
        for place in places:
            _write(layout, inputs, place)
        return graph, True

    return ports


def check_place(graph: Graph, layout: PortLayout, place: Place) -> None:
    """See that an operation works on the batch's rows, with weights of the layout's shapes."""
    source, weight = traced(place.node.args[0]), traced(argument(place.node, "weight"))
    assert source is not None
    assert weight is not None
    if str(source.shape[0]) not in _batch_sizes(graph):
        raise NotBuilt(
            f"{graph.component}: {place.node.target} of {place.blocks[0].path} takes no rows of "
            f"the batch, but {list(source.shape)}"
        )
    taps = tuple(weight.shape[2:])
    found = (weight.shape[1], *taps) if taps not in ((), (1, 1)) else (weight.shape[1],)
    places = layout.places()
    for block in place.blocks:
        wanted = layout.groups[places[block.path][0]].inputs if block.path else found
        if found != wanted:
            raise NotBuilt(
                f"{graph.component}: the layout has inputs {wanted} for {block.path}, its weight "
                f"{found}"
            )


def _batch_sizes(graph: Graph) -> set[str]:
    named = zip(graph.input_nodes(), graph.inputs.values(), strict=True)
    return {
        str(size)
        for node, spec in named
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True)
        if name == BATCH
    }


def _add_inputs(graph: Graph, layout: PortLayout) -> dict[str, fx.Node]:
    """The new placeholders by name."""
    mode = graph.input_nodes()[0].meta["val"].fake_mode
    slots = mode.from_tensor(
        torch.empty(_EXAMPLE, dtype=torch.int64, device="meta"),
        source=ConstantSource(SLOTS_INPUT),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2),
    )
    adapted, count = slots.shape
    graph.ranges = {
        **graph.ranges,
        adapted.node.expr: ValueRanges(1, MAX_ADAPTED),
        count.node.expr: ValueRanges(1, MAX_ADAPTERS),
    }
    with mode:
        values: dict[str, Tensor] = {
            ROWS_INPUT: torch.empty((adapted,), dtype=torch.int64, device="meta"),
            SLOTS_INPUT: slots,
            SCALES_INPUT: torch.empty((adapted, count), dtype=torch.float32, device="meta"),
        }
        for name, shape in layout.shapes().items():
            values[name] = torch.empty(shape, dtype=torch.float32, device="meta")
    names = {str(adapted): ADAPTED, str(count): ADAPTERS}
    for name, value in values.items():
        sizes = tuple(s if isinstance(s, int) else names[str(s)] for s in value.shape)
        graph.inputs[name] = TensorSpec(sizes, value.dtype)
    return {name: placeholder(graph, name, value) for name, value in values.items()}


def placeholder(graph: Graph, name: str, value: Tensor) -> fx.Node:
    """An input behind the others; the graph's specification is the caller's to extend."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.module.graph.inserting_after(last):
        node = graph.module.graph.placeholder(name.replace(".", "_"))
    node.meta = {"val": value, INPUT_KEY: name}
    return node


def _write(layout: PortLayout, inputs: dict[str, fx.Node], place: Place) -> None:
    """Put an operation's ports behind it."""
    node, last = place.node, place.node
    users = list(node.users)
    for block in place.blocks:
        if block.path is not None:
            with node.graph.inserting_after(last):
                args = (last, node.args[0], *_arguments(layout, inputs, node, block))
                new = node.graph.call_function(ADAPTER_PORT, args)
            inherit(new, node)
            last = new
    for user in users:
        user.replace_input_with(node, last)


def _arguments(
    layout: PortLayout, inputs: dict[str, fx.Node], node: fx.Node, block: Block
) -> tuple[Any, ...]:
    assert block.path is not None
    group, port = layout.places()[block.path]
    bank = (inputs[f"bank.{group}.a"], inputs[f"bank.{group}.b"])
    rows = (inputs[ROWS_INPUT], inputs[SLOTS_INPUT], inputs[SCALES_INPUT])
    kernel: list[int] = []
    steps: list[list[int]] = [[], [], []]
    if operator(node) == "aten.conv2d":
        weight = traced(node.args[1])
        assert weight is not None
        kernel = [int(size) for size in weight.shape[2:]]
        steps = [pair(argument(node, name)) for name in ("stride", "padding", "dilation")]
    return (
        *rows, *bank, port, layout.slots, kernel, *steps,
        block.start, block.first, block.rows, block.factor,
    )  # fmt: skip


def pair(value: Any) -> list[int]:
    """One number or two, for height and width, as two."""
    sizes = [int(size) for size in value] if isinstance(value, list | tuple) else [int(value)]
    return sizes * 2 if len(sizes) == 1 else sizes
