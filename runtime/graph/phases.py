"""Splits a component's graph by what its values depend on, so that each is computed as rarely as
it changes.

A node's phase follows from the inputs that its *data* depends on, found along the graph's edges:

    request   prompt, sizes, adapters, a ControlNet's picture: once a request
    schedule  timesteps: once a schedule
    both      once a request, batched over its steps
    step      latents: every step

Edges that carry a size are no data: the batch's size comes from the latents in every reshape, and
would taint everything. A phase graph asks an input of its own for it.

A value that another phase needs is an output of its phase's graph and an input of the other's. Only
values whose first dimension is the batch can be handed over, since they are kept by row; what has
none is computed again where it is needed (it depends on no row).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.denoisers import SCALE
from heatsink.runtime.graph.graph import (
    BATCH,
    INPUT_KEY,
    PATH_KEY,
    WEIGHT_KEY,
    Graph,
    TensorSpec,
    input_name,
)
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.port_layout import SCALES_INPUT, SLOTS_INPUT


class Phase(StrEnum):
    """When something is computed."""

    REQUEST = "request"
    SCHEDULE = "schedule"
    BOTH = "both"
    STEP = "step"


ORDER = (Phase.REQUEST, Phase.SCHEDULE, Phase.BOTH, Phase.STEP)
_REQUEST_INPUTS = {
    "encoder_hidden_states",
    "text_embeds",
    "time_ids",
    "controlnet_cond",
    SCALE,
    SLOTS_INPUT,
    SCALES_INPUT,
}
_BANK_PREFIX = "bank."


def phase_of_input(name: str) -> Phase:
    """When an input of a UNet changes; what is not known changes every step."""
    if name in _REQUEST_INPUTS or name.startswith(_BANK_PREFIX):
        return Phase.REQUEST
    return Phase.SCHEDULE if name == "timestep" else Phase.STEP


@dataclass(frozen=True)
class Phases:
    """The graphs of a component's phases.

    Attributes:
        graphs: of the phases that compute something, in `ORDER`; the last is the step's.
        sources: phase -> input -> the phase whose output it is, for inputs that are handed over.
    """

    graphs: dict[Phase, Graph]
    sources: dict[Phase, dict[str, Phase]]

    def run(self, inputs: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """All phases one after the other, as the whole graph would run; for parity."""
        made: dict[Phase, dict[str, Tensor]] = {}
        for phase, graph in self.graphs.items():
            handed = self.sources[phase]
            given = {
                name: made[handed[name]][name] if name in handed else inputs[name]
                for name in graph.inputs
            }
            made[phase] = graph.run(given, **options)
        return made[Phase.STEP]

    def dependences(self) -> dict[Phase, dict[str, set[str]]]:
        """By phase and output, the inputs of the whole graph that its data depends on."""
        found: dict[Phase, dict[str, set[str]]] = {}
        # In order: what is handed over was found before.
        for phase, graph in self.graphs.items():
            handed = self.sources[phase]
            found[phase] = {
                output: set().union(
                    *(found[handed[n]][n] if n in handed else {n} for n in sorted(names))
                )
                for output, names in _data_inputs(graph).items()
            }
        return found


def split(graph: Graph) -> Phases:
    """The component's graphs by phase; together they compute what `graph` does.

    Args:
        graph: valid; it is not changed.
    """
    phases = _node_phases(graph)
    crossing = _crossing(graph, phases)
    graphs: dict[Phase, Graph] = {}
    sources: dict[Phase, dict[str, Phase]] = {}
    for phase in ORDER:
        outputs = [node for node, (home, _) in crossing.items() if home == phase]
        if phase == Phase.STEP or outputs:
            graphs[phase], sources[phase] = _extract(graph, phase, phases, crossing, outputs)
    return Phases(graphs, sources)


def _node_phases(graph: Graph) -> dict[fx.Node, Phase | None]:
    """The phase of every node; None for what depends on no input."""
    phases: dict[fx.Node, Phase | None] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known = WEIGHT_KEY in node.meta
            phases[node] = None if known else phase_of_input(input_name(node))
        elif node.op == "call_function":
            phases[node] = _join(
                {phases[source] for source in node.all_input_nodes if _is_data(source)}
            )
            if not _is_data(node):
                phases[node] = None
    return phases


def _data_inputs(graph: Graph) -> dict[str, set[str]]:
    """The inputs that the data of every output depends on."""
    known: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = set() if WEIGHT_KEY in node.meta else {input_name(node)}
        elif node.op == "call_function":
            sources = [known[source] for source in node.all_input_nodes if _is_data(source)]
            known[node] = set().union(*sources) if _is_data(node) else set()
    return {n: known[node] for n, node in zip(graph.outputs, graph.output_nodes(), strict=True)}


def _join(found: set[Phase | None]) -> Phase | None:
    found = found - {None}
    if not found:
        return None
    if Phase.STEP in found:
        return Phase.STEP
    return found.pop() if len(found) == 1 else Phase.BOTH


def _is_data(node: fx.Node) -> bool:
    """Whether a node carries values, not a size."""
    value = node.meta.get("val")
    return not isinstance(value, torch.SymInt | int | float | bool)


def _batched(node: fx.Node) -> bool:
    """Whether a node's value is a tensor whose first dimension, and no other, is the batch."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    return isinstance(value.shape[0], torch.SymInt) and all(
        isinstance(size, int) for size in value.shape[1:]
    )


def _crossing(
    graph: Graph, phases: Mapping[fx.Node, Phase | None]
) -> dict[fx.Node, tuple[Phase, str]]:
    """Nodes whose values are handed to later phases: their phase, and the name they get.

    Outputs of the whole graph that don't depend on the latents are handed to the step too.
    """
    crossing: dict[fx.Node, tuple[Phase, str]] = {}
    wanted: list[fx.Node] = list(graph.output_nodes())
    seen: set[tuple[fx.Node, Phase]] = set()
    todo = [(node, Phase.STEP) for node in wanted]
    while todo:
        node, by = todo.pop()
        if (node, by) in seen:
            continue
        seen.add((node, by))
        phase = phases.get(node)
        if not _computed(node) or phase is None or phase == by or not _batched(node):
            # Computed, or read, where it is needed.
            todo += [(source, by) for source in node.all_input_nodes if _is_data(source)]
            continue
        crossing[node] = phase, f"from_{phase}_{node.name}"
        todo.append((node, phase))
    order = {node: place for place, node in enumerate(graph.nodes)}
    return dict(sorted(crossing.items(), key=lambda item: order[item[0]]))


def _foreign(node: fx.Node, phase: Phase, crossing: Mapping[fx.Node, tuple[Phase, str]]) -> bool:
    """Whether a node's value is handed to this phase by another."""
    return crossing.get(node, (phase, ""))[0] != phase


def _computed(node: fx.Node) -> bool:
    return node.op == "call_function"


def _extract(
    graph: Graph,
    phase: Phase,
    phases: Mapping[fx.Node, Phase | None],
    crossing: Mapping[fx.Node, tuple[Phase, str]],
    outputs: list[fx.Node],
) -> tuple[Graph, dict[str, Phase]]:
    """The graph of one phase, and where its handed-over inputs come from."""
    module = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    handed: dict[str, Phase] = {}
    inputs: dict[str, TensorSpec] = {}
    returned = list(graph.output_nodes()) if phase == Phase.STEP else outputs
    needed = _needed(returned, phase, crossing)
    kept = [node for node in graph.nodes if node in needed and node.op != "output"]
    # All placeholders first.
    for node in sorted(
        kept, key=lambda node: _computed(node) and not _foreign(node, phase, crossing)
    ):
        home, name = crossing.get(node, (phase, ""))
        if home != phase:
            made[node] = _placeholder(module, node, name)
            handed[name] = home
            inputs[name] = _spec(node)
        elif node.op == "placeholder" and WEIGHT_KEY not in node.meta:
            name = input_name(node)
            made[node] = _placeholder(module, node, name)
            inputs[name] = graph.inputs[name]
        else:
            made[node] = module.node_copy(node, lambda source: made[source])
    result = module.output(tuple(made[node] for node in returned))
    result.meta = {}
    specs = (
        dict(graph.outputs)
        if phase == Phase.STEP
        else {crossing[node][1]: _spec(node) for node in returned}
    )
    new = Graph(
        graph.component,
        fx.GraphModule(torch.nn.Module(), module),
        dict(graph.weights),
        {name: list(origins) for name, origins in graph.origins.items()},
        inputs,
        specs,
        graph.dtype,
        graph.ranges,
    )
    _own_batch(new)
    _drop_unused(new)
    new.module.recompile()
    new.validate()
    return new, {name: home for name, home in handed.items() if name in new.inputs}


def _needed(
    returned: list[fx.Node], phase: Phase, crossing: Mapping[fx.Node, tuple[Phase, str]]
) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    todo = list(returned)
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        if not _foreign(node, phase, crossing):
            todo += node.all_input_nodes
    return needed


def _placeholder(module: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    # Its own name must be an identifier.
    new = module.placeholder(name.replace(".", "_"))
    new.meta = {k: v for k, v in copy.copy(node.meta).items() if k not in (PATH_KEY, WEIGHT_KEY)}
    new.meta[INPUT_KEY] = name
    return new


def _spec(node: fx.Node) -> TensorSpec:
    value: Tensor = node.meta["val"]
    return TensorSpec((BATCH, *(int(size) for size in value.shape[1:])), value.dtype)


def _own_batch(graph: Graph) -> None:
    """Let sizes be asked of an input that has data in this phase, not of the latents."""
    users = {
        node: [user for user in node.users if str(user.target) != "aten.sym_size.int"]
        for node in graph.input_nodes()
    }
    holder = next(
        (
            n
            for n, others in users.items()
            if others and graph.inputs[input_name(n)].shape[0] == BATCH
        ),
        None,
    )
    if holder is None:
        return
    for node in graph.input_nodes():
        for user in list(node.users):
            if str(user.target) == "aten.sym_size.int" and user.args[1] == 0 and node is not holder:
                # The new holder may come later than the user did.
                with graph.module.graph.inserting_after(graph.input_nodes()[-1]):
                    size = torch.ops.aten.sym_size.int
                    new = graph.module.graph.call_function(size, (holder, 0))
                new.meta = dict(user.meta)
                user.replace_all_uses_with(new)
                graph.module.graph.erase_node(user)


def _drop_unused(graph: Graph) -> None:
    remove_dead_code(graph)
    for node in graph.input_nodes():
        if not node.users:
            del graph.inputs[input_name(node)]
            graph.module.graph.erase_node(node)
    held = set(graph.weight_nodes())
    for name in set(graph.weights) - held:
        del graph.weights[name]
    for name in set(graph.origins) - held:
        del graph.origins[name]
