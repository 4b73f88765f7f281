"""Capture of a component with `torch.export` on meta tensors: no weight is read."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.components import (
    TextLayer,
    input_dtype,
    input_names,
    output_names,
    wrap,
)
from heatsink.runtime.graph.graph import BATCH, Graph, TensorSpec
from heatsink.runtime.graph.naming import checkpoint_names, set_paths, set_weights

MAX_BATCH = 4096
# Two, so that nothing is specialised on a batch of one.
EXAMPLE_BATCH = 2


def capture(
    component: str,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] | None = None,
    *,
    example_shapes: Mapping[str, Sequence[int | str]],
    dtype: torch.dtype = torch.float32,
    text_layer: TextLayer | None = None,
) -> Graph:
    """Capture a component of a diffusion pipeline.

    Args:
        component: one of `components.INTERFACES`, or a ControlNet's; its contract is documented
            with its wrapper.
        module: the library's module, on meta (its parameters are never read); it is not changed.
        weights: the checkpoint by name; a tensor is asked for when the graph's weight is loaded.
        buffers: values of what is no checkpoint parameter.
        example_shapes: of every input, with "batch" for the symbolic batch;
            `components.input_shapes` makes them.
        dtype: what to compute in; weights are cast when loaded, inputs are of this dtype (except
            `input_ids` int64, `timestep` and `time_ids` float32).
        text_layer: see `components.wrap`.

    Returns:
        The validated graph. Weights have the checkpoint's names and only those in use are there.

    Raises:
        ModelError: a parameter that the module uses is not in the checkpoint.
        NotBuilt: an unknown component, or a module that can't be captured.
        ValueError: the example shapes don't fit the component.
    """
    names = input_names(component, example_shapes)
    # A copy on meta costs no memory and leaves the caller's module as it is.
    inner = nn.Module.to(copy.deepcopy(module), device="meta", dtype=dtype)
    wrapper = wrap(component, inner, text_layer, names)
    own = {name: value for name, value in module.named_buffers() if not value.is_meta}
    buffers = {**own, **(buffers or {})}
    specs = {
        name: TensorSpec(tuple(example_shapes[name]), input_dtype(name, dtype)) for name in names
    }
    outputs = output_names(component, inner)
    return capture_module(component, wrapper, weights, buffers, specs, outputs, dtype=dtype)


def capture_module(
    component: str,
    wrapper: nn.Module,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] | None,
    inputs: Mapping[str, TensorSpec],
    outputs: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
) -> Graph:
    """Capture any module on meta that takes tensors in order and returns a tuple of tensors.

    Args:
        component: the graph's name.
        wrapper: the module; if it has an attribute `model`, names and paths begin below that. Its
            upsampling modules are changed.
        weights: as in `capture`.
        buffers: as in `capture`.
        inputs: by name, in the order of `forward`'s arguments.
        outputs: names of what is returned.
        dtype: as in `capture`.

    Raises:
        ModelError, NotBuilt: as in `capture`.
    """
    _unguard_upsampling(wrapper)
    program = _export(component, wrapper.eval(), inputs)
    root = "model." if hasattr(wrapper, "model") else ""
    # `ExportedProgram` shares its graph: passes edit a copy.
    module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph_module.graph))
    renamed = checkpoint_names(program, root, weights)
    graph = Graph(component, module, {}, {}, dict(inputs), {}, dtype, program.range_constraints)
    set_paths(graph, root, renamed)
    set_weights(graph, program, root, renamed, weights, buffers or {})
    _name_inputs(graph)
    _use_cpu_literals(graph)
    values = zip(outputs, graph.output_nodes(), strict=True)
    graph.outputs = {name: _spec_of(node.meta["val"], graph) for name, node in values}
    graph.module.recompile()
    graph.validate()
    return graph


def _export(component: str, wrapper: nn.Module, inputs: Mapping[str, TensorSpec]) -> Any:
    batch = Dim(BATCH, min=1, max=MAX_BATCH)
    shapes, examples = [], []
    for name, spec in inputs.items():
        if unknown := [s for s in spec.shape if isinstance(s, str) and s != BATCH]:
            raise NotBuilt(
                f"{component}: input {name!r} has the symbolic dimensions {unknown}; "
                f"only {BATCH!r} can be symbolic yet"
            )
        size = [EXAMPLE_BATCH if s == BATCH else int(s) for s in spec.shape]
        examples.append(torch.empty(size, dtype=spec.dtype, device="meta"))
        shapes.append({i: batch for i, s in enumerate(spec.shape) if s == BATCH})
    try:
        with torch.no_grad():
            program = torch.export.export(
                wrapper, tuple(examples), dynamic_shapes=_as_bound(wrapper, shapes), strict=False
            )
            if _mutates(program.graph):
                program = program.run_decompositions({})
    except Exception as error:
        # torch.export raises whatever the module raised, and errors of its own.
        raise NotBuilt(
            f"{component}: torch.export can't capture {type(wrapper).__name__}: {error}"
        ) from error
    return program


def _as_bound(wrapper: nn.Module, shapes: list[Any]) -> tuple[Any, ...]:
    """One entry an argument; `*values` are one argument."""
    kinds = [p.kind for p in inspect.signature(wrapper.forward).parameters.values()]
    return (tuple(shapes),) if kinds == [inspect.Parameter.VAR_POSITIONAL] else tuple(shapes)


def _mutates(graph: fx.Graph) -> bool:
    targets = (n.target for n in graph.nodes if n.op == "call_function")
    return any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)


def _unguard_upsampling(wrapper: nn.Module) -> None:
    """Replace `forward` of diffusers' upsampling by one that does not ask for the batch.

    The library makes its input contiguous from 64 rows or 2^31 elements on, which changes no value
    but restricts the captured graph to fewer.
    """
    from diffusers.models.upsampling import Upsample2D

    for module in wrapper.modules():
        if type(module) is Upsample2D and module.norm is None and not module.use_conv_transpose:
            module.forward = types.MethodType(_upsample, module)


def _upsample(self: Any, hidden_states: Tensor, output_size: Any = None, *_: Any) -> Tensor:
    if self.interpolate:
        factor = None if output_size is not None else 2.0
        hidden_states = nn.functional.interpolate(
            hidden_states, size=output_size, scale_factor=factor, mode="nearest"
        )
    if self.use_conv:
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        hidden_states = conv(hidden_states)
    return hidden_states


def _name_inputs(graph: Graph) -> None:
    for name, node in zip(graph.inputs, graph.input_nodes(), strict=True):
        if node.target != name:
            node.target = name
            node._rename(name)


def _use_cpu_literals(graph: Graph) -> None:
    """Devices written into the graph were meta's; a run puts its own in place of any."""

    def cpu(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, cpu)
        node.kwargs = fx.node.map_aggregate(node.kwargs, cpu)


def _spec_of(value: Tensor, graph: Graph) -> TensorSpec:
    symbols = {str(symbol): BATCH for symbol in graph.ranges}
    shape = tuple(s if isinstance(s, int) else symbols.get(str(s), str(s)) for s in value.shape)
    return TensorSpec(shape, value.dtype)
