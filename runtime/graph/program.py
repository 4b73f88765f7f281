"""A graph as an ExportedProgram again, for exporters that take one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph, module_path


def to_program(graph: Graph) -> ExportedProgram:
    """An ExportedProgram of the graph on meta tensors; it holds shapes, no values.

    Every weight is a buffer of its own name. Each node's module stack holds just its module's path,
    so that an exporter that looks there finds it.

    Args:
        graph: a valid graph; it is not changed.
    """
    graph = graph.copy()
    for node in graph.nodes:
        if node.op == "call_function":
            path = module_path(node)
            node.meta["nn_module_stack"] = {path: (path, "torch.nn.Module")}
            node.meta["custom"] = {"heatsink_path": path}
        # The traced values are meta tensors, so what the graph creates itself must be one too.
        node.args = fx.node.map_aggregate(node.args, _meta)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _meta)
    state = {
        name: torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        for name, weight in graph.weights.items()
    }
    return ExportedProgram(
        root=graph.module,
        graph=graph.module.graph,
        graph_signature=_signature(graph),
        state_dict=state,
        range_constraints=dict(graph.ranges),
        module_call_graph=[_call_entry(graph)],
        constants={},
    )


def _meta(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) else value


def _signature(graph: Graph) -> ExportGraphSignature:
    inputs = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.meta.get(WEIGHT_KEY)
        kind = InputKind.USER_INPUT if name is None else InputKind.BUFFER
        persistent = None if name is None else True
        inputs.append(InputSpec(kind, TensorArgument(name=node.name), name, persistent))
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), None)
        for node in graph.output_nodes()
    ]
    return ExportGraphSignature(inputs, outputs)


def _call_entry(graph: Graph) -> ModuleCallEntry:
    arguments: tuple[tuple[int, ...], dict[str, int]] = (tuple(0 for _ in graph.inputs), {})
    signature = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure(arguments),
        out_spec=pytree.tree_structure(tuple(0 for _ in graph.outputs)),
        forward_arg_names=[str(node.target) for node in graph.input_nodes()],
    )
    return ModuleCallEntry(fqn="", signature=signature)
