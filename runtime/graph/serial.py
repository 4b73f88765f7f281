"""A graph as JSON, and back: what an engine folder holds of a component that runs natively.

Weights are not part of it: they lie beside it in a safetensors file, by name. Only operators of
ATen and of this package, and Python's integer arithmetic on sizes, can be named in a file; anything
else is refused, for a file may come from a stranger.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import heatsink.runtime.graph.row_port_op  # noqa: F401 - a graph may name its ops
from heatsink.runtime.errors import EngineMismatch, HeatsinkError, NotBuilt
from heatsink.runtime.graph.graph import (
    BATCH,
    INPUT_KEY,
    PATH_KEY,
    WEIGHT_KEY,
    Graph,
    TensorSpec,
    input_name,
    module_path,
)
from heatsink.runtime.graph.symbols import symbolic_inputs
from heatsink.runtime.graph.weight import Origin, Weight

VERSION = 1
_NAMESPACES = ("aten", "heatsink")
_SIZES = {
    name: getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
# Opens any file, to write too.
_REFUSED = ("aten.from_file",)
# What reading a damaged graph raises: Python's own, FX's, and those of tracing it.
_FAULTS = (
    LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError,
    ArithmeticError, HeatsinkError,
)  # fmt: skip
_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def graph_to_json(graph: Graph) -> str:
    """The graph as JSON; equal graphs give equal text.

    Raises:
        NotBuilt: a node that can't be written, with its name and module path.
    """
    nodes = [_node(node, graph) for node in graph.nodes]
    value = {
        "version": VERSION,
        "component": graph.component,
        "dtype": _short(graph.dtype),
        "inputs": _specs(graph.inputs),
        "outputs": _specs(graph.outputs),
        "weights": {n: [list(w.shape), _short(w.dtype)] for n, w in graph.weights.items()},
        "origins": {
            name: [o.as_list() for o in origins] for name, origins in graph.origins.items()
        },
        "nodes": nodes,
    }
    return json.dumps(value, indent=0, allow_nan=False) + "\n"


def graph_from_json(text: str, weights: Mapping[str, Tensor]) -> Graph:
    """The graph that `graph_to_json` wrote, validated.

    Args:
        text: the JSON.
        weights: by name, read when they are used.

    Raises:
        EngineMismatch: it is damaged, of another version, names an operator that may not be named,
            or a weight is missing or another than the graph says.
    """
    try:
        value = json.loads(text)
        version = value["version"]
        if version != VERSION:
            raise EngineMismatch(f"a graph of version {version!r}, this Heatsink reads {VERSION}")
        return _Reader(value, weights).graph()
    except EngineMismatch:
        raise
    except _FAULTS as error:
        raise EngineMismatch(f"the graph is damaged: {type(error).__name__}: {error}") from error


def _specs(specs: Mapping[str, TensorSpec]) -> list[list[Any]]:
    return [[name, list(spec.shape), _short(spec.dtype)] for name, spec in specs.items()]


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _node(node: fx.Node, graph: Graph) -> list[Any]:
    """`[name, op, target, args, kwargs, path]`."""
    if node.op == "placeholder":
        weight = node.meta.get(WEIGHT_KEY)
        kind = "input" if weight is None else "weight"
        return [node.name, kind, input_name(node) if weight is None else weight]
    try:
        args, kwargs = _encode(node.args), {k: _encode(v) for k, v in node.kwargs.items()}
        if node.op == "output":
            return [node.name, "output", args]
        return [node.name, "call", _target_name(node), args, kwargs, module_path(node)]
    except ValueError as error:
        raise NotBuilt(
            f"{graph.component}: node {node.name} ({node.target}, "
            f"{node.meta.get(PATH_KEY, '')}) can't be written: {error}"
        ) from None


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    for name, function in _SIZES.items():
        if target is function:
            return f"operator.{name}"
    raise ValueError("no operator of ATen or of this package")


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _NAMED.items():
        if isinstance(value, type_):
            return {kind: _short(value)}
    raise ValueError(f"an argument of type {type(value).__name__}")


class _Reader:
    def __init__(self, value: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self._value = value
        self._weights = weights
        self._nodes: dict[str, fx.Node] = {}
        self._fx = fx.Graph()

    def graph(self) -> Graph:
        """The whole graph, with the traced values that passes look at."""
        value = self._value
        inputs, outputs = (_read_specs(value[key]) for key in ("inputs", "outputs"))
        held = {
            name: Weight(tuple(shape), _dtype(dtype), self._source(name, shape, dtype), name)
            for name, (shape, dtype) in value["weights"].items()
        }
        for fields in value["nodes"]:
            self._add(*fields)
        module = fx.GraphModule(torch.nn.Module(), self._fx)
        origins = {
            name: [_origin(*part) for part in parts] for name, parts in value["origins"].items()
        }
        dtype = _dtype(value["dtype"])
        graph = Graph(value["component"], module, held, origins, inputs, outputs, dtype, {})
        graph.ranges = symbolic_inputs(graph)
        graph.validate()
        return graph

    def _source(self, name: str, shape: list[int], dtype: str) -> Callable[[], Tensor]:
        if name not in self._weights:
            raise EngineMismatch(f"the weight {name!r} of the graph is missing")
        found = self._weights[name]
        if (list(found.shape), found.dtype) != (shape, _dtype(dtype)):
            raise EngineMismatch(
                f"the weight {name!r} of the graph is {shape} {dtype}, the file holds "
                f"{list(found.shape)} {_short(found.dtype)}"
            )
        return lambda: self._weights[name]

    def _add(self, name: str, kind: str, target: Any, *rest: Any) -> None:
        if kind in ("input", "weight"):
            # A placeholder's target must be an identifier, an input's name need not be.
            called = name if kind == "weight" else target.replace(".", "_")
            node = self._fx.create_node("placeholder", called, name=name)
            node.meta[WEIGHT_KEY if kind == "weight" else INPUT_KEY] = target
        elif kind == "output":
            (result,) = self._decode(target)
            node = self._fx.create_node("output", "output", (result,), name=name)
        else:
            args, kwargs, path = rest
            given = {key: self._decode(item) for key, item in kwargs.items()}
            # Named later, it would keep a name that another node has.
            node = self._fx.create_node(
                "call_function", _target(target), self._decode(args), given, name=name
            )
            node.meta[PATH_KEY] = path
        self._nodes[name] = node

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, item),) = value.items()
        if kind == "node":
            return self._nodes[item]
        if kind == "tuple":
            return tuple(self._decode(part) for part in item)
        if kind == "float":
            return float(item)
        if kind == "device":
            return torch.device(item)
        found = getattr(torch, item)
        if not isinstance(found, _NAMED[kind]):
            raise ValueError(f"{item!r} is no {kind}")
        return found


def _read_specs(values: list[Any]) -> dict[str, TensorSpec]:
    specs = {name: TensorSpec(tuple(shape), _dtype(dtype)) for name, shape, dtype in values}
    unknown = {s for spec in specs.values() for s in spec.shape if isinstance(s, str)} - {BATCH}
    if unknown:
        raise ValueError(f"symbolic dimensions {sorted(unknown)}")
    return specs


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _slice(value: Any) -> Any:
    return None if value is None else tuple((int(start), int(stop)) for start, stop in value)


def _origin(parameter: str, rows: Any, transform: str, at: Any = None) -> Origin:
    place = None if at is None else (int(at[0]), int(at[1]))
    return Origin(parameter, _slice(rows), transform, place)


def _target(name: str) -> Callable[..., Any]:
    namespace, _, rest = name.partition(".")
    if namespace == "operator" and rest in _SIZES:
        return _SIZES[rest]  # type: ignore[no-any-return]
    packet, _, overload = rest.rpartition(".")
    if namespace not in _NAMESPACES or not packet:
        raise ValueError(f"{name!r} may not be named in a graph")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if found._schema.is_mutable:
        raise ValueError(f"{name!r} writes into its arguments")
    given = {str(each.type) for each in found._schema.returns}
    # What gives no tensor is called for what it does besides: the recorder's ops of this package
    # reach other engines' programs.
    own = namespace != "heatsink" or given
    kinds = {"Tensor", "List[Tensor]", *(["int"] if namespace == "aten" else [])}
    if not own or given - kinds or f"{namespace}.{packet}" in _REFUSED:
        raise ValueError(f"{name!r} does more than compute tensors")
    return found  # type: ignore[no-any-return]
