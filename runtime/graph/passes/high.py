"""Which operations of a graph stay in a higher precision."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import Graph, module_path
from heatsink.runtime.graph.passes.edit import operator


@dataclass(frozen=True)
class High:
    """A set of operations, by the modules that they came from.

    Attributes:
        entries: a module's path, which stands for all below it, or `path:operator` for its
            operations of that name alone: `conv_out`, `mid_block.attentions.0:softmax`.
    """

    entries: Collection[str]

    def __contains__(self, node: fx.Node) -> bool:
        return any(_holds(entry, node) for entry in self.entries)

    def check(self, graph: Graph) -> None:
        """Refuse an entry that no operation of the graph fits.

        Raises:
            InvalidRequest: names it.
        """
        calls = [node for node in graph.nodes if node.op == "call_function"]
        for entry in self.entries:
            if not any(_holds(entry, node) for node in calls):
                raise InvalidRequest(
                    f"high: expected modules of {graph.component}, got {entry!r}, "
                    "of which it has no operation"
                )


def _holds(entry: str, node: fx.Node) -> bool:
    wanted, _, kind = entry.partition(":")
    path = module_path(node)
    inside = path == wanted or path.startswith(f"{wanted}.")
    return inside and kind in ("", operator(node).partition(".")[2])
