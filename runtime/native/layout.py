"""A graph at one batch size: every value's shape, which values share memory, and until when."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import BATCH, WEIGHT_KEY, Graph, input_name
from heatsink.runtime.memory import Lifetime

_ITEM = "{}:{}"
# Operators whose result may lie where their first argument did.
_IN_PLACE = {"heatsink.row_port.default"}
_CONV2D = "heatsink.conv2d.default"
# Beside it, these read an input of any strides.
_ANY_STRIDES = {"aten.sym_size.int", "heatsink.row_port.default"}
_CONVERSION = "aten._to_copy.default"


@dataclass
class Layout:
    """What a program is built from.

    Attributes:
        values: meta tensors (or tuples of them, or numbers) of every node.
        roots: for a tensor's `(node, place)`, the one whose memory it lies in; place 0 for a node
            that gives one tensor.
        in_place: nodes that change their first argument's memory, which nothing else reads.
        constant: nodes that depend on weights and literals alone.
        held: inputs that lie in memory of the caller's.
        lifetimes: of the roots that the program must hold; constants, weights and what is held are
            left out.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    roots: dict[tuple[fx.Node, int], tuple[fx.Node, int]] = field(default_factory=dict)
    in_place: set[fx.Node] = field(default_factory=set)
    constant: set[fx.Node] = field(default_factory=set)
    held: set[fx.Node] = field(default_factory=set)
    lifetimes: list[Lifetime] = field(default_factory=list)


def name_of(root: tuple[fx.Node, int]) -> str:
    """A root's name in the memory plan."""
    return _ITEM.format(root[0].name, root[1])


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a node's value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [item for item in value if isinstance(item, Tensor)]
    return []


def span(value: Tensor) -> int:
    """Elements from the first to the last that a dense or strided tensor touches."""
    if value.numel() == 0:
        return 0
    pairs = zip(value.shape, value.stride(), strict=True)
    return 1 + sum((size - 1) * step for size, step in pairs)


def lay_out(graph: Graph, batch: int, held: Collection[str] = ()) -> Layout:
    """Work out shapes, sharing and lifetimes for one batch size; reads no weight.

    Args:
        graph: valid.
        batch: rows.
        held: inputs that lie in memory of the caller's, and so have no place in the plan.
    """
    layout = Layout()
    _Shapes(graph, batch, layout).run_all()
    nodes = list(graph.nodes)
    layout.held = {node for node in graph.input_nodes() if input_name(node) in held}
    _find_roots(nodes, layout)
    _find_constants(nodes, layout)
    layout.lifetimes = _lifetimes(nodes, layout)
    return layout


def _read_as_image(node: fx.Node) -> bool:
    """Whether only convolutions of this package read an input: they want channels innermost.

    A conversion keeps the layout of what it converts, so its readers count.
    """
    readers = _readers(node)
    return bool(readers) and readers == {_CONV2D}


def _readers(node: fx.Node) -> set[str]:
    found: set[str] = set()
    for user in node.users:
        name = str(user.target)
        found |= _readers(user) if name == _CONVERSION else {name}
    return found - _ANY_STRIDES


def _image(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last)


class _Shapes(fx.Interpreter):
    """Runs the graph on meta tensors of the batch's size."""

    def __init__(self, graph: Graph, batch: int, layout: Layout) -> None:
        super().__init__(graph.module)
        self._captured, self._batch, self._layout = graph, batch, layout

    def run_all(self) -> None:
        given = []
        for node in self._captured.nodes:
            if node.op != "placeholder":
                continue
            held = node.meta.get(WEIGHT_KEY)
            spec: Any = (
                self._captured.inputs[input_name(node)]
                if held is None
                else self._captured.weights[held]
            )
            shape = [self._batch if size == BATCH else size for size in spec.shape]
            value = torch.empty(shape, dtype=spec.dtype, device="meta")
            image = held is None and value.dim() == 4 and _read_as_image(node)
            given.append(_image(value) if image else value)
        with torch.inference_mode():
            self.run(*given)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._layout.values[n] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = (
            fx.node.map_aggregate(
                part, lambda v: torch.device("meta") if isinstance(v, torch.device) else v
            )
            for part in (args, kwargs)
        )
        return super().call_function(target, args, kwargs)


def _find_roots(nodes: Sequence[fx.Node], layout: Layout) -> None:
    """A tensor on meta shares a storage object with what it is a view of."""
    owners: dict[int, tuple[fx.Node, int]] = {}
    for node in nodes:
        if node.op == "output":
            continue
        for place, value in enumerate(tensors(layout.values[node])):
            storage = value.untyped_storage()._cdata
            if _may_change(node, value, layout):
                layout.in_place.add(node)
                owners[storage] = layout.roots[node.args[0], 0]  # type: ignore[index]
            layout.roots[node, place] = owners.setdefault(storage, (node, place))


def _may_change(node: fx.Node, value: Tensor, layout: Layout) -> bool:
    """Whether a node's result can lie in its first argument, which nothing reads later."""
    if str(node.target) not in _IN_PLACE:
        return False
    given: Any = node.args[0]
    if given.op != "call_function" or list(given.users) != [node]:
        return False
    before = layout.values[given]
    owned = layout.roots[given, 0] == (given, 0) or given in layout.in_place
    return owned and before.dtype == value.dtype and before.stride() == value.stride()


def _find_constants(nodes: Sequence[fx.Node], layout: Layout) -> None:
    for node in nodes:
        if node.op == "placeholder":
            if WEIGHT_KEY in node.meta:
                layout.constant.add(node)
        elif node.op == "call_function" and all(
            source in layout.constant or not tensors(layout.values[source])
            for source in node.all_input_nodes
        ):
            layout.constant.add(node)


def _lifetimes(nodes: Sequence[fx.Node], layout: Layout) -> list[Lifetime]:
    first: dict[tuple[fx.Node, int], int] = {}
    last: dict[tuple[fx.Node, int], int] = {}
    size: dict[tuple[fx.Node, int], int] = {}
    for step, node in enumerate(nodes):
        # A view is no work: what reads it reads its root.
        read: Mapping[fx.Node, None] = dict.fromkeys(node.all_input_nodes)
        for source in read:
            for place in range(len(tensors(layout.values[source]))):
                root = layout.roots[source, place]
                if root[0] not in layout.constant | layout.held:
                    last[root] = max(last[root], step)
        if node.op == "output" or node in layout.constant:
            continue
        for place, value in enumerate(tensors(layout.values[node])):
            root = layout.roots[node, place]
            if root[0] in layout.constant | layout.held:
                continue
            # Inputs are written before the first step, and stay for the next replay.
            given = node.op == "placeholder"
            first.setdefault(root, 0 if given else step)
            last[root] = max(last.get(root, 0), len(nodes) if given else step)
            end = (value.storage_offset() + span(value)) * value.element_size()
            size[root] = max(size.get(root, 0), int(end))
    return [Lifetime(name_of(root), size[root], first[root], last[root]) for root in first]
