"""Where adapter ports belong: the linears and convolutions that use the weights of given modules.

A weight is known by its origins. One that several modules share rows of, or that was multiplied by
a number, is taken apart into blocks; whatever else was done to it is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, operator
from heatsink.runtime.graph.weight import IDENTITY, Origin

OPERATORS = ("aten.linear", "aten.conv2d")
CONVOLUTIONS = ("aten.conv2d", "heatsink.conv2d")
# A weight in more pieces than a packed projection has is interleaved row by row.
MAX_BLOCKS = 16
_FACTOR = re.compile(r"(scale|divide) by (\S+)")
_SUFFIX = ".weight"


@dataclass(frozen=True)
class Block:
    """Rows `start:stop` of a weight: `factor` times rows of one module's weight, from `first` on.

    `path` is None where the module has no port.
    """

    start: int
    stop: int
    path: str | None
    first: int
    factor: float

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.stop - self.start


@dataclass(frozen=True)
class Place:
    """An operation that gets ports, and the blocks of its weight's rows in order."""

    node: fx.Node
    blocks: tuple[Block, ...]


def find_places(
    graph: Graph,
    outputs: Mapping[str, int],
    unused: Collection[str] = (),
    operators: Collection[str] = OPERATORS,
) -> list[Place]:
    """The operations that use the weights of modules, in the graph's order.

    Args:
        graph: as captured, or after other passes.
        outputs: the rows of a module's weight, by its path.
        unused: those of them that the graph does not use.
        operators: what may use a weight.

    Raises:
        NotBuilt: a weight is used or was changed in a way that no port can follow, or a module's
            weight is not (or not wholly) there.
    """
    holders = graph.weight_nodes()
    blocks: dict[fx.Node, tuple[Block, ...]] = {}
    for name, origins in graph.origins.items():
        named = {_module(origin) for origin in origins} & set(outputs)
        if not named:
            continue
        own = _blocks(graph, name, origins, outputs)
        for user in holders[name].users:
            _check_use(graph, name, holders[name], user, operators)
            blocks[user] = own
    _check_covered(graph, blocks, outputs, unused)
    return [Place(node, blocks[node]) for node in graph.nodes if node in blocks]


def _module(origin: Origin) -> str | None:
    name = origin.parameter
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None


def _blocks(
    graph: Graph, name: str, origins: list[Origin], paths: Collection[str]
) -> tuple[Block, ...]:
    total = graph.weights[name].shape[0]
    if len(origins) > MAX_BLOCKS:
        raise _refusal(graph, name, f"its rows are mixed from {len(origins)} pieces")
    found: list[Block] = []
    at = 0
    for origin in origins:
        if origin.slice is not None and len(origin.slice) > 1:
            raise _refusal(graph, name, f"it holds a part of the columns of {origin.parameter}")
        first, last = (0, total - at) if origin.slice is None else origin.slice[0]
        path = _module(origin)
        ported = path if path in paths else None
        factor = _factor(graph, name, origin) if ported else 1.0
        found.append(Block(at, at + last - first, ported, first, factor))
        at += last - first
    return tuple(found)


def _factor(graph: Graph, name: str, origin: Origin) -> float:
    """The number that an origin was multiplied by."""
    factor = 1.0
    for step in origin.transform.split(", "):
        match = _FACTOR.fullmatch(step)
        if match is not None:
            number = float(match[2])
            factor = factor * number if match[1] == "scale" else factor / number
        elif step != IDENTITY:
            raise _refusal(graph, name, f"{origin.parameter} was changed by {step!r}")
    return factor


def _check_use(
    graph: Graph, name: str, holder: fx.Node, user: fx.Node, operators: Collection[str]
) -> None:
    if operator(user) not in operators or user.all_input_nodes.count(holder) != 1:
        raise _refusal(graph, name, f"it is used by {user.target}")
    if argument(user, "weight") is not holder:
        raise _refusal(graph, name, f"it is no weight of {user.target}")
    if operator(user) in CONVOLUTIONS:
        if argument(user, "groups", 1) != 1:
            raise _refusal(graph, name, f"its convolution has {argument(user, 'groups')} groups")
        if isinstance(argument(user, "padding"), str):
            raise _refusal(graph, name, "its convolution's padding is given by name")


def _check_covered(
    graph: Graph,
    blocks: dict[fx.Node, tuple[Block, ...]],
    outputs: Mapping[str, int],
    unused: Collection[str],
) -> None:
    """See that every module that should have ports has them, on all of its rows."""
    seen: dict[str, set[int]] = {}
    for block in {block for own in blocks.values() for block in own if block.path}:
        assert block.path is not None
        seen.setdefault(block.path, set()).update(range(block.first, block.first + block.rows))
    if absent := sorted(set(outputs) - set(unused) - set(seen)):
        raise NotBuilt(f"{graph.component}: no operation uses the weights of {absent[:5]}")
    if there := sorted(set(unused) & set(seen)):
        raise NotBuilt(f"{graph.component}: operations do use the weights of {there[:5]}")
    if holes := sorted(path for path, rows in seen.items() if len(rows) != outputs[path]):
        raise NotBuilt(f"{graph.component}: only some rows are there of {holes[:5]}")


def _refusal(graph: Graph, name: str, why: str) -> NotBuilt:
    return NotBuilt(f"{graph.component}: weight {name!r} can't have adapter ports: {why}")
