"""From `aot_autograd`'s graphs to this package's: names, paths, and sizes that are numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import PATH_KEY, WEIGHT_KEY, Graph, TensorSpec
from heatsink.runtime.graph.passes.edit import argument
from heatsink.runtime.graph.weight import COMPUTED, IDENTITY, Origin, Weight

# What torch.compile writes between the names of modules.
_SCAFFOLD = frozenset({"L", "G", "__dict__", "_modules", "_parameters", "_buffers"})
_UNKNOWN_SIZES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass(frozen=True)
class Argument:
    """An argument of the lowered function: the name of a weight, or of an input."""

    name: str
    weight: bool


@dataclass(frozen=True)
class Converted:
    """A graph whose sizes are numbers, and what of it the caller wants.

    Attributes:
        graph: its inputs are the arguments that are tensors and no weights.
        results: for each result the output's name, or the value that it is.
        strides: of the outputs by name, as they were traced.
    """

    graph: Graph
    results: list[Any]
    strides: dict[str, tuple[int, ...]]


def arguments(gm: fx.GraphModule, count: int) -> list[Argument]:
    """What the lowered function's arguments are.

    Args:
        gm: as torch.compile gives it to a backend.
        count: arguments of the lowered function: parameters and buffers of `gm` itself come first.
    """
    own = [*dict(gm.named_parameters(remove_duplicate=False))]
    own += dict(gm.named_buffers(remove_duplicate=False))
    found = [Argument(name, True) for name in own]
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node, "_dynamo_source", None)
            text = getattr(source, "name", "")
            text = text() if callable(text) else text
            held = "_parameters[" in text or "_buffers[" in text
            found.append(Argument(dotted(text) if held else node.name, held))
    if len(found) != count:
        # Another order than is known: nothing is taken for a weight.
        return [Argument(f"argument_{index}", False) for index in range(count)]
    names = [one.name for one in found]
    return [
        Argument(f"{one.name}#{index}" if names.count(one.name) > 1 else one.name, one.weight)
        for index, one in enumerate(found)
    ]


def dotted(source: str) -> str:
    """`L['self']._modules['conv']._parameters['weight']` -> `conv.weight`."""
    words = re.findall(r"\w+", re.sub(r"@\d+", "", source))
    # After `L` comes the variable that holds the module.
    words = words[2:] if words[:1] in (["L"], ["G"]) else words
    return ".".join(word for word in words if word not in _SCAFFOLD)


def obstacle(gm: fx.GraphModule) -> str:
    """Why the graph can't be a program; "" if it can."""
    devices = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            devices.add(value.device)
        if node.op == "get_attr" and not isinstance(getattr(gm, str(node.target), None), Tensor):
            return f"{node.target} is control flow, no tensor"
        if node.op in ("call_module", "call_method"):
            return f"{node.target} is no operator"
        if node.op == "call_function" and (why := _unfit(node)):
            return f"{node.target} {why}"
    if len(devices) > 1:
        return f"tensors on {', '.join(sorted(str(device) for device in devices))}"
    return "" if any(_is_work(node) for node in gm.graph.nodes) else "nothing to compute"


def _is_work(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _unfit(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "is a higher-order operator"
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    if target._schema.is_mutable:
        return "writes to its arguments"
    # Attention draws for its dropout only.
    if torch.Tag.nondeterministic_seeded in target.tags and argument(node, "dropout_p", 1.0) != 0:
        return "draws random numbers"
    return "gives sizes that depend on data" if set(_UNKNOWN_SIZES) & set(target.tags) else ""


def convert(
    gm: fx.GraphModule,
    given: Sequence[Argument],
    values: Sequence[Any],
    weight: Callable[[int], Tensor],
) -> Converted:
    """Make a graph for arguments of these sizes.

    Args:
        gm: what `aot_autograd` lowered, without obstacle; it is not changed.
        given: its arguments.
        values: of the arguments; the numbers among them are sizes.
        weight: the tensor of an argument that is a weight, asked for when it is loaded.
    """
    module = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    _lift_constants(gm, module)
    symbols = _bind(module, values)
    _settle_sizes(module, symbols)
    graph = Graph("compiled", module, {}, {}, {}, {}, _dtype(gm), {})
    tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    lifted = [node for node in holders if WEIGHT_KEY in node.meta]
    for node in lifted:
        _hold(graph, node, node.meta[WEIGHT_KEY], _constant(gm, node.meta[WEIGHT_KEY]), COMPUTED)
    for index, node in zip(tensors, [n for n in holders if n not in lifted], strict=True):
        if given[index].weight:
            _hold(graph, node, given[index].name, _reader(weight, index), IDENTITY)
        else:
            name = node.target = f"input_{index}"
            node._rename(name)
            graph.inputs[name] = TensorSpec(_sizes(node, symbols), node.meta["val"].dtype)
    results, strides = _take_outputs(graph, symbols)
    for node in graph.nodes:
        if node.op == "call_function":
            stack = node.meta.get("nn_module_stack") or {}
            node.meta[PATH_KEY] = dotted(next(reversed(stack.values()))[0]) if stack else ""
    module.graph.eliminate_dead_code()
    _drop_unused(graph)
    module.recompile()
    graph.validate()
    return Converted(graph, results, strides)


def _reader(weight: Callable[[int], Tensor], index: int) -> Callable[[], Tensor]:
    return lambda: weight(index)


def _constant(gm: fx.GraphModule, name: str) -> Callable[[], Tensor]:
    value: Tensor = getattr(gm, name)
    return lambda: value


def _hold(
    graph: Graph, node: fx.Node, name: str, source: Callable[[], Tensor], transform: str
) -> None:
    value = node.meta["val"]
    node.meta[WEIGHT_KEY] = name
    graph.weights[name] = Weight(tuple(int(s) for s in value.shape), value.dtype, source, name)
    graph.origins[name] = [Origin(name, None, transform)]


def _drop_unused(graph: Graph) -> None:
    for name, node in graph.weight_nodes().items():
        if not node.users:
            graph.module.graph.erase_node(node)
            del graph.weights[name], graph.origins[name]


def _lift_constants(gm: fx.GraphModule, module: fx.GraphModule) -> None:
    """Tensors that the graph holds itself become placeholders of weights."""
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            holder = module.graph.placeholder(node.name)
        holder.meta = {"val": getattr(gm, name).to("meta"), WEIGHT_KEY: name}
        node.replace_all_uses_with(holder)
        module.graph.erase_node(node)


def _bind(module: fx.GraphModule, values: Sequence[Any]) -> dict[Any, int]:
    """The numbers behind the symbols, read from the arguments that are sizes."""
    nodes = [n for n in module.graph.nodes if n.op == "placeholder" and WEIGHT_KEY not in n.meta]
    symbols = {}
    for node, value in zip(nodes, values, strict=True):
        traced = node.meta.get("val")
        if isinstance(traced, torch.SymInt):
            symbols[traced.node.expr] = int(value)
    return symbols


def _settle_sizes(module: fx.GraphModule, symbols: Mapping[Any, int]) -> None:
    """Put numbers in the place of every size."""
    numbers: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        node.args = fx.node.map_arg(node.args, lambda n: numbers.get(n, n))
        node.kwargs = fx.node.map_arg(node.kwargs, lambda n: numbers.get(n, n))
        value = node.meta.get("val")
        if node.op != "output" and not isinstance(value, Tensor | list | tuple):
            numbers[node] = number(value, symbols)
    for node in reversed(list(numbers)):
        module.graph.erase_node(node)


def number(value: Any, symbols: Mapping[Any, int]) -> Any:
    """The number that a traced size stands for.

    Raises:
        ValueError: it depends on data.
    """
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value
    settled = value.node.expr.xreplace(dict(symbols))
    if getattr(settled, "free_symbols", ()):
        raise ValueError(f"the size {value} depends on data")
    kinds: dict[type, Any] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return kinds[type(value)](settled)


def _sizes(node: fx.Node, symbols: Mapping[Any, int]) -> tuple[int, ...]:
    return tuple(number(size, symbols) for size in node.meta["val"].shape)


def _take_outputs(
    graph: Graph, symbols: Mapping[Any, int]
) -> tuple[list[Any], dict[str, tuple[int, ...]]]:
    """Let the graph return its tensors only; what is returned besides, and the strides."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    results: list[Any] = []
    strides: dict[str, tuple[int, ...]] = {}
    kept: list[fx.Node] = []
    returned: Any = output.args[0]
    for value in returned:
        if not isinstance(value, fx.Node):
            results.append(value)
            continue
        name = f"output_{len(kept)}"
        traced = value.meta["val"]
        graph.outputs[name] = TensorSpec(_sizes(value, symbols), traced.dtype)
        strides[name] = tuple(number(step, symbols) for step in traced.stride())
        kept.append(value)
        results.append(Result(name))
    output.args = (tuple(kept),)
    return results, strides


@dataclass(frozen=True)
class Result:
    """A result that is the output of this name."""

    name: str


def _dtype(gm: fx.GraphModule) -> torch.dtype:
    values = [node.meta.get("val") for node in gm.graph.nodes]
    floats = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return floats[0] if floats else torch.float32
