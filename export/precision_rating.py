"""How much each module's low precision alone costs the outputs of a component."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from heatsink.runtime.backends.session import Array
from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph, module_path
from heatsink.runtime.graph.interpreter import GraphInterpreter
from heatsink.runtime.graph.passes.edit import operator
from heatsink.runtime.graph.passes.pipeline import HALVES
from heatsink.runtime.graph.passes.quantise import SCALED, round_operands

# Of a component's runs, spread over the schedule; of each, the rows of one picture.
PROBES = 3
PROBE_ROWS = 2


def rates(
    graph: Graph,
    precision: str,
    inputs: Mapping[str, Tensor],
    report: Callable[[str, int, int], None],
) -> dict[str, float]:
    """The squared error of a component's outputs by the module that alone is low.

    Args:
        graph: float32, before fusion.
        precision: `bf16`, `fp16` or `fp8`.
        inputs: of the component.
        report: called with (what is being done, done, total).
    """
    names, what = candidates(graph, precision), f"rating modules of {graph.component}"
    exact = graph.run(inputs)
    found = {}
    for done, name in enumerate(names):
        report(what, done, len(names))
        result = _OneLow(graph, name, precision).execute(inputs)
        errors = (float((result[n] - value).square().sum()) for n, value in exact.items())
        found[name] = sum(errors)
    report(what, len(names), len(names))
    return found


def candidates(graph: Graph, precision: str) -> list[str]:
    """The modules that may stay high: those with weights, in order; of fp8 those with products."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        weighs = any(WEIGHT_KEY in source.meta for source in node.all_input_nodes)
        if node.op != "call_function" or not weighs:
            continue
        if precision != "fp8" or operator(node) in SCALED:
            found[module_path(node)] = None
    # What the component does itself has no name that would stand for it alone.
    return [name for name in found if name]


def probes(calls: Sequence[Mapping[str, Array]]) -> dict[str, Tensor]:
    """Rows of a component's inputs from runs spread over all, as one batch."""
    places = np.unique(np.linspace(0, len(calls) - 1, PROBES).round().astype(int))
    chosen = [calls[place] for place in places]
    return {
        name: torch.from_numpy(np.concatenate([call[name][:PROBE_ROWS] for call in chosen]))
        for name in chosen[0]
    }


class _OneLow(GraphInterpreter):
    """Runs a float32 graph with one module's operations in low precision."""

    def __init__(self, graph: Graph, module: str, precision: str) -> None:
        super().__init__(graph, None, torch.device("cpu"))
        self._module, self._precision = module, precision
        self._low = False

    def run_node(self, n: fx.Node) -> Any:
        """Note whether the operation is the module's."""
        self._low = n.op == "call_function" and module_path(n) == self._module
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The module's operations round what they read, and what they give."""
        if not self._low:
            return super().call_function(target, args, kwargs)
        args, kwargs = (fx.node.map_aggregate(v, self._materialise) for v in (args, kwargs))
        if self._precision == "fp8":
            if str(target.overloadpacket) in SCALED:
                args = (*round_operands(str(target.overloadpacket), *args[:2]), *args[2:])
            return super().call_function(target, args, kwargs)
        dtype = HALVES[self._precision]

        def cast(value: Any, wanted: torch.dtype) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(wanted) if floats else value

        args, kwargs = (fx.node.map_aggregate(v, lambda x: cast(x, dtype)) for v in (args, kwargs))
        result = super().call_function(target, args, kwargs)
        return fx.node.map_aggregate(result, lambda x: cast(x, torch.float32))
