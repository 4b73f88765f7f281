"""Give a native graph inputs for adapters: low-rank terms that each row picks from a bank.

    y[r] += sum_i scales[r, i] * B[slots[r, i]] (A[slots[r, i]] x[r])

for the i whose slot is not -1. This pass comes last: the graph stays, node by node, what it is
without ports (its twin), and only ports are put in. So a row without adapters gets the twin's bits,
whatever the passes before have fused, in any dtype.

Rules:
1. A linear layer or convolution without an activation is followed by a port
   (`heatsink.runtime.graph.row_port_op`): terms are added to what it gives, bias, residual and all.
   Which rows of a packed weight are whose, its origins say (`port_places`).
2. A linear layer with an activation becomes `heatsink::port_linear`, whose terms come before the
   activation; its weight must be one module's.
3. A convolution of two images has a port for each, with the channels of A that are its own; one of
   an image that it upsamples itself has a port that reads the upsampled image.
4. The new inputs are `adapter_slots` int64 and `adapter_scales` float32 `(batch, room)`, -1 where a
   row has no adapter; and the bank's tensors `bank.G.a`, `bank.G.b` of the graph's dtype and
   `bank.G.ranks` int32, which a program reads where they are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.graph import BATCH, WEIGHT_KEY, Graph, TensorSpec
from heatsink.runtime.graph.passes.edit import argument, operator, traced
from heatsink.runtime.graph.passes.port_places import CONVOLUTIONS, Block, Place, find_places
from heatsink.runtime.graph.passes.ports import check_place, pair, placeholder
from heatsink.runtime.graph.passes.protocol import Pass
from heatsink.runtime.graph.passes.trace import fake_mode, insert, replace
from heatsink.runtime.graph.row_port_op import PORT_LINEAR, ROW_PORT
from heatsink.runtime.port_layout import SCALES_INPUT, SLOTS_INPUT, PortLayout

ROOM = 4
_OPERATORS = ("aten.linear", "aten.conv2d", "heatsink.linear", "heatsink.conv2d")
_UPSAMPLE = torch.ops.aten.upsample_nearest2d.vec


def add_row_ports(layout: PortLayout, unused: Collection[str] = (), *, room: int = ROOM) -> Pass:
    """The pass that gives a graph of the native engine the ports of `layout`.

    Args:
        layout: of the graph's component.
        unused: modules of the layout that this graph does not use, so that they need no port.
        room: adapters of a row, at most.

    Returns:
        A pass that raises NotBuilt, naming weight and reason, where a port can't be.
    """

    def row_ports(graph: Graph) -> tuple[Graph, bool]:
        if SLOTS_INPUT in graph.inputs:
            return graph, False
        outputs = {path: group.outputs for group in layout.groups for path in group.members}
        places = find_places(graph, outputs, unused, _OPERATORS)
        if not places:
            return graph, False
        for place in places:
            check_place(graph, layout, place)
            _check_activation(graph, place)
        writer = _Writer(layout, _add_inputs(graph, layout, room))
        for place in places:
            writer.write(place)
        return graph, True

    return row_ports


def _activation(node: fx.Node) -> str:
    return str(argument(node, "activation", "") or "")


def _check_activation(graph: Graph, place: Place) -> None:
    """See that terms can be added before an activation."""
    node = place.node
    activation = _activation(node)
    weight = argument(node, "weight").meta[WEIGHT_KEY]
    refusal = f"{graph.component}: weight {weight!r} can't have adapter ports: {activation} is "
    if activation and operator(node) in CONVOLUTIONS:
        raise NotBuilt(f"{refusal}part of its convolution")
    if activation and (len(place.blocks) != 1 or place.blocks[0].first):
        raise NotBuilt(f"{refusal}part of a product of several modules")


def _add_inputs(graph: Graph, layout: PortLayout, room: int) -> dict[str, fx.Node]:
    """The new placeholders by name."""
    specs = {
        SLOTS_INPUT: TensorSpec((BATCH, room), torch.int64),
        SCALES_INPUT: TensorSpec((BATCH, room), torch.float32),
    }
    for name, shape in layout.shapes().items():
        specs[name] = TensorSpec(shape, graph.dtype)
    for name, shape in layout.rank_shapes().items():
        specs[name] = TensorSpec(shape, torch.int32)
    batch = _batch(graph)
    found = {}
    for name, spec in specs.items():
        sizes: list[Any] = [batch if size == BATCH else size for size in spec.shape]
        with fake_mode(graph):
            value = torch.empty(sizes, dtype=spec.dtype, device="meta")
        found[name] = placeholder(graph, name, value)
        graph.inputs[name] = spec
    return found


def _batch(graph: Graph) -> Any:
    """The symbol of the batch."""
    named = zip(graph.input_nodes(), graph.inputs.values(), strict=True)
    return next(
        node.meta["val"].shape[spec.shape.index(BATCH)]
        for node, spec in named
        if BATCH in spec.shape
    )


class _Writer:
    """Puts ports into a graph.

    Args:
        layout: of the component.
        inputs: the new placeholders by name.
    """

    def __init__(self, layout: PortLayout, inputs: dict[str, fx.Node]) -> None:
        self._layout, self._inputs = layout, inputs
        self._places = layout.places()
        # Of weights that were multiplied by a number: the scales times that.
        self._scales = {1.0: inputs[SCALES_INPUT]}

    def write(self, place: Place) -> None:
        """Give an operation its ports."""
        if _activation(place.node):
            self._before_activation(place)
        else:
            self._behind(place)

    def _behind(self, place: Place) -> None:
        node, users = place.node, list(place.node.users)
        before = node.next
        last = self._ports(before, node, place)
        for user in users:
            user.replace_input_with(node, last)

    def _before_activation(self, place: Place) -> None:
        node, (block,) = place.node, place.blocks
        assert block.path is not None
        group, port = self._places[block.path]
        names = ("x", "weight", "bias", "residual", "sample_add", "activation")
        product = (argument(node, name) for name in names)
        adapters = self._adapters(block, group, node)
        replace(node, PORT_LINEAR, (*product, *adapters, port, self._layout.slots))

    def _ports(self, before: fx.Node, y: fx.Node, place: Place) -> fx.Node:
        """The last of the ports that add to `y`, in front of `before`."""
        sources = list(_sources(place.node, before))
        for block in place.blocks:
            for x, channel in sources if block.path else []:
                args = (y, x, *self._arguments(place.node, block), channel)
                y = insert(before, ROW_PORT, args, place.node)
        return y

    def _arguments(self, node: fx.Node, block: Block) -> tuple[Any, ...]:
        assert block.path is not None
        group, port = self._places[block.path]
        kernel: list[int] = []
        steps: list[list[int]] = [[], [], []]
        if operator(node) in CONVOLUTIONS:
            kernel = [int(size) for size in _traced(argument(node, "weight")).shape[2:]]
            steps = [pair(argument(node, name, 1)) for name in ("stride", "padding", "dilation")]
        return (
            *self._adapters(block, group, node), port, self._layout.slots, kernel, *steps,
            block.start, block.first, block.rows,
        )  # fmt: skip

    def _adapters(self, block: Block, group: int, node: fx.Node) -> tuple[fx.Node, ...]:
        """Slots, scales and the bank's tensors."""
        bank = (self._inputs[f"bank.{group}.{name}"] for name in ("a", "b", "ranks"))
        return (self._inputs[SLOTS_INPUT], self._scaled(block.factor, node), *bank)

    def _scaled(self, factor: float, node: fx.Node) -> fx.Node:
        if factor not in self._scales:
            scales = self._inputs[SCALES_INPUT]
            first = next(n for n in node.graph.nodes if n.op == "call_function")
            product = torch.ops.aten.mul.Tensor
            self._scales[factor] = insert(first, product, (scales, factor), node)
        return self._scales[factor]


def _traced(value: Any) -> Tensor:
    found = traced(value)
    assert found is not None
    return found


def _sources(node: fx.Node, before: fx.Node) -> Any:
    """What a product reads, and the first of A's inputs that is meant for it."""
    x: Any = node.args[0]
    if operator(node) != "heatsink.conv2d":
        yield x, 0
        return
    channel = 0
    for image in (x, argument(node, "x2")):
        if image is None:
            continue
        read, channels = image, int(_traced(image).shape[1])
        if (scale := argument(node, "upsample")) != 1:
            read = insert(before, _UPSAMPLE, (image, None, [float(scale)] * 2), node)
        yield read, channel
        channel += channels
