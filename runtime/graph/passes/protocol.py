"""What a pass is and how passes are run.

A pass takes a graph and returns a graph and whether it changed anything. It may edit the graph it
is given: `run_passes` gives it a copy. Whatever it adds has the module path of what it replaces
(`passes.edit.inherit`), and a weight it changes says so in its origins. A pass finds what it looks
for by operations and data flow, never by names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.graph.graph import PATH_KEY, Graph
from heatsink.runtime.graph.weight import COMPUTED

Pass = Callable[[Graph], tuple[Graph, bool]]

MAX_ROUNDS = 64


def run_passes(graph: Graph, passes: Sequence[Pass]) -> Graph:
    """Run passes in order on a copy of the graph, checking provenance after each.

    Args:
        graph: a valid graph; it is not changed.
        passes: `to_fixpoint` makes one pass of several that are repeated.

    Raises:
        HeatsinkError: naming the pass that broke the graph, lost a path or origin, or made one up.
    """
    graph = graph.copy()
    for one in passes:
        graph, _ = _run_checked(one, graph)
    graph.module.recompile()
    return graph


def to_fixpoint(*passes: Pass) -> Pass:
    """A pass that runs `passes` in order, again and again until none of them changes anything."""

    def fixpoint(graph: Graph) -> tuple[Graph, bool]:
        changed = False
        for _ in range(MAX_ROUNDS):
            again = False
            for one in passes:
                graph, modified = _run_checked(one, graph)
                again |= modified
            if not again:
                return graph, changed
            changed = True
        names = ", ".join(_name(one) for one in passes)
        raise HeatsinkError(f"the passes {names} still change the graph after {MAX_ROUNDS} rounds")

    return fixpoint


def _name(one: Pass) -> str:
    return getattr(one, "__name__", repr(one))


def _run_checked(one: Pass, graph: Graph) -> tuple[Graph, bool]:
    paths, parameters = _paths(graph), _parameters(graph)
    graph, modified = one(graph)
    try:
        graph.validate()
    except HeatsinkError as error:
        raise HeatsinkError(f"pass {_name(one)}: {error}") from error
    if invented := _paths(graph) - paths:
        raise HeatsinkError(f"pass {_name(one)}: no module has the paths {sorted(invented)}")
    if invented := _parameters(graph) - parameters:
        raise HeatsinkError(f"pass {_name(one)}: origins name the unknown {sorted(invented)}")
    return graph, modified


def _paths(graph: Graph) -> set[str]:
    return {node.meta[PATH_KEY] for node in graph.nodes if PATH_KEY in node.meta}


def _parameters(graph: Graph) -> set[str]:
    """The checkpoint's parameters; what is computed names none."""
    every = (origin for origins in graph.origins.values() for origin in origins)
    return {origin.parameter for origin in every if origin.transform != COMPUTED}
