"""ONNX export of a captured graph, weights streamed from where they are mapped."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatsink.export.onnx_ports import adapter_port
from heatsink.runtime.errors import NotBuilt, ResourceError
from heatsink.runtime.graph.graph import BATCH, Graph, TensorSpec
from heatsink.runtime.graph.port_op import ADAPTER_PORT
from heatsink.runtime.graph.program import to_program
from heatsink.runtime.graph.weight import Origin, Weight

PATH_PROPERTY = "heatsink.path"
DEFAULT_OPSET = 23
MIN_OPSET = 18
# Elements of a constant that is folded: masks and tables of positions, no more.
_FOLD_LIMIT = 1 << 16
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: the model.
        data: the file of its weights beside it, None if it has none.
        opset: of the default domain.
        inputs, outputs: by name.
        origins: initialiser -> what it was made from; the initialisers have the checkpoint's names.
        nodes: how many.
    """

    path: Path
    data: Path | None
    opset: int
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    origins: dict[str, list[Origin]]
    nodes: int


def to_onnx(
    graph: Graph,
    path: Path,
    *,
    opset: int | None = None,
    fused_group_norm: bool = False,
    weights_of: Path | None = None,
) -> OnnxFile:
    """Write `graph` as `path` and its weights as `<name>.onnx.data` beside it.

    The weights are read one after the other while they are written. The same graph and values give
    the same bytes. Every node carries the path of its module in the property `heatsink.path`.

    Args:
        graph: a valid graph.
        path: of the model file, `<component>.onnx`; its folder exists.
        opset: of the default domain, at least 18; `DEFAULT_OPSET` by default.
        fused_group_norm: write GroupNormalization (opset 21 and later) for a backend that has a
            kernel for it; ONNX Runtime's CPU provider has none and is faster with the default.
        weights_of: a model of the same folder, written of a graph with the same weights: its file
            of weights is used, and none is written.

    Raises:
        NotBuilt: the exporter can't translate the graph, or the opset is too old.
        ResourceError: the files can't be written; none of them is left.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    if opset < MIN_OPSET:
        raise NotBuilt(f"ONNX opset {opset} is too old: at least {MIN_OPSET} is needed")
    model = _translate(graph, opset, fused_group_norm)
    _keep_paths(model)
    _name_sizes(model, graph)
    _optimise(model)
    _literals_to_nodes(model, graph)
    _inherit_paths(model)
    owner = path if weights_of is None else weights_of
    used = _used_weights(model)
    if weights_of is None:
        _attach_weights(model, graph)
    else:
        _share_weights(model, weights_of)
    _save(model, path, data=bool(used) and weights_of is None)
    return OnnxFile(
        path=path,
        data=owner.with_name(owner.name + ".data") if used else None,
        opset=opset,
        inputs=dict(graph.inputs),
        outputs=dict(graph.outputs),
        origins={name: list(graph.origins[name]) for name in used},
        nodes=len(model.graph),
    )


def _translate(graph: Graph, opset: int, fused_group_norm: bool) -> Any:
    import torch

    table: dict[Callable[..., Any], Callable[..., Any]]
    table = {ADAPTER_PORT: adapter_port(opset)}
    if not fused_group_norm:
        table[torch.ops.aten.group_norm.default] = _group_norm(opset)
    program = to_program(graph)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                custom_translation_table=table,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            # The exporter's message is advice to its developers; what it was raised from says why.
            reason = error.__cause__ or error
            raise NotBuilt(f"{graph.component}: no translation to ONNX: {reason}") from error
    assert exported is not None
    return exported.model


def _group_norm(opset: int) -> Callable[..., Any]:
    """Translates `aten.group_norm` to InstanceNormalization: a group is an instance's channel."""
    import onnxscript

    # The operators used here have not changed since; newer opsets may not be there yet.
    op: Any = getattr(onnxscript, f"opset{min(opset, 23)}")

    def group_norm(
        input: Any,
        num_groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Any:
        channels, *sizes = (int(size) for size in input.shape[1:])
        grouped = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
        ones = op.CastLike(op.Constant(value_floats=[1.0] * num_groups), input)
        zeros = op.CastLike(op.Constant(value_floats=[0.0] * num_groups), input)
        normal = op.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        result = op.Reshape(normal, op.Constant(value_ints=[0, channels, *sizes]))
        # One value for each channel, next to the batch and before the positions.
        shape = op.Constant(value_ints=[channels] + [1] * len(sizes))
        if weight is not None:
            result = op.Mul(result, op.Reshape(weight, shape))
        return result if bias is None else op.Add(result, op.Reshape(bias, shape))

    return group_norm


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and its notes about optional libraries, not its errors."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _keep_paths(model: Any) -> None:
    """Keep only the module path of the exporter's notes: the rest names files of this machine."""
    for node in model.graph:
        # The scopes end with the node's own name; before it comes the module stack, here one path.
        scopes = ast.literal_eval(node.metadata_props.get(_NAME_SCOPES, "['', '']"))
        path = scopes[-2] if len(scopes) > 1 else ""
        if path.startswith("_empty_nn_module_stack"):
            path = ""
        node.metadata_props.clear()
        node.metadata_props[PATH_PROPERTY] = path
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = "graph"


def _name_sizes(model: Any, graph: Graph) -> None:
    """Rename torch's symbols to the inputs' names for them (`batch`), wherever a shape says one."""
    import onnx_ir as ir

    names = {str(symbol): BATCH for symbol in graph.ranges}
    for node, spec in zip(graph.input_nodes(), graph.inputs.values(), strict=True):
        sizes = zip(node.meta["val"].shape, spec.shape, strict=True)
        names |= {str(size): name for size, name in sizes if isinstance(name, str)}

    def renamed(size: Any) -> Any:
        return names.get(str(getattr(size, "value", size)), size)

    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


def _optimise(model: Any) -> None:
    """Fold constants and remove what is not used, weights left out: they keep names and values.

    Initialisers without values look like inputs to the passes.
    """
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants_ir

    for value in model.graph.initializers.values():
        value.const_value = None
    common.InlinePass()(model)
    # Before constants are folded into tensors of their own, which no longer compare as equal.
    common.CommonSubexpressionEliminationPass()(model)
    fold_constants_ir(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    steps: Sequence[Any] = (
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )
    for step in steps:
        step(model)


def _literals_to_nodes(model: Any, graph: Graph) -> None:
    """Make folded constants nodes, so that every initialiser is a weight with an origin."""
    import onnx_ir as ir
    from onnx_ir import convenience

    literals = [v for n, v in model.graph.initializers.items() if n not in graph.weights]
    for value in literals:
        assert value.const_value is not None
        attribute = ir.AttrTensor("value", value.const_value)
        node = ir.Node("", "Constant", [], [attribute], num_outputs=1, name=f"node_{value.name}")
        del model.graph.initializers[value.name]
        node.outputs[0].name = value.name
        node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
        convenience.replace_all_uses_with(value, node.outputs[0], replace_graph_outputs=True)
        model.graph.insert_before(model.graph[0], node)


def _inherit_paths(model: Any) -> None:
    """Give a node that a pass made the path of the first node that uses it, or the component's."""
    for node in reversed(list(model.graph)):
        if PATH_PROPERTY not in node.metadata_props:
            users = [user for value in node.outputs for user, _ in value.uses()]
            paths = [
                u.metadata_props[PATH_PROPERTY] for u in users if PATH_PROPERTY in u.metadata_props
            ]
            node.metadata_props[PATH_PROPERTY] = paths[0] if paths else ""


def _used_weights(model: Any) -> list[str]:
    """The names of the initialisers in order; those without use are removed."""
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return list(model.graph.initializers)


def _share_weights(model: Any, other: Path) -> None:
    """Let the initialisers be those of another model, by name: places in its file of weights."""
    import onnx_ir as ir

    stored = ir.load(other).graph.initializers
    for name, value in model.graph.initializers.items():
        tensor = stored[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype,
            name=name, shape=tensor.shape, base_dir=other.parent,
        )  # fmt: skip


def _attach_weights(model: Any, graph: Graph) -> None:
    """Give the initialisers their values, read when they are written."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        weight = graph.weights[name]
        value.const_value = ir.LazyTensor(
            functools.partial(_values, weight),
            dtype=value.dtype,
            shape=ir.Shape(list(weight.shape)),
            name=name,
        )


def _values(weight: Weight) -> Any:
    from onnx_ir import tensor_adapters

    return tensor_adapters.TorchTensor(weight.load().contiguous())


def _save(model: Any, path: Path, *, data: bool) -> None:
    import onnx_ir as ir

    beside = path.name + ".data"
    try:
        ir.save(model, path, external_data=beside if data else None, size_threshold_bytes=0)
    except OSError as error:
        for left in (path, path.with_name(beside)):
            left.unlink(missing_ok=True)
        raise ResourceError(f"can't write {path}: {error}") from error
