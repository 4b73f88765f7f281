"""Names and module paths of a captured graph, as the checkpoint has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.export.graph_signature import InputKind

from heatsink.runtime.errors import ModelError
from heatsink.runtime.graph.graph import PATH_KEY, WEIGHT_KEY, Graph
from heatsink.runtime.graph.weight import COMPUTED, Origin, Weight

# CLIP's parameters have this before their names in some versions of the library, not in others.
_TEXT_PREFIX = "text_model."


def checkpoint_names(
    program: Any, root: str, weights: Mapping[str, Tensor]
) -> Callable[[str], str]:
    """How names in the module become the checkpoint's, found by trying.

    Args:
        program: the ExportedProgram.
        root: what the wrapper puts before the module's names.
        weights: the checkpoint by name.

    Returns:
        A function of a name without `root`.

    Raises:
        ModelError: the checkpoint lacks parameters that the graph uses.
    """
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    used = [
        specs[node.name].target.removeprefix(root)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.users and specs[node.name].kind == InputKind.PARAMETER
    ]
    ways: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: _TEXT_PREFIX + name,
        lambda name: name.removeprefix(_TEXT_PREFIX),
    ]
    for way in ways:
        if all(way(name) in weights for name in used):
            return way
    absent = [name for name in used if name not in weights]
    more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
    raise ModelError(f"the checkpoint lacks the parameters {absent[:3]}{more}")


def set_paths(graph: Graph, root: str, renamed: Callable[[str], str]) -> None:
    """Give every operation the path of the module that torch.export saw it in.

    Args:
        graph: edited.
        root: the wrapper's own prefix, "model." or "": what lies outside has the path "".
        renamed: from `checkpoint_names`.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(stack.values()))[0] if stack else ""
        # A module that is called again is `path@1`.
        path = re.sub(r"@\d+", "", path)
        inner = path.removeprefix(root) if path.startswith(root) else ""
        # The dot at the end makes the prefix's own module match it.
        node.meta[PATH_KEY] = renamed(inner + ".").rstrip(".") if inner else ""


def set_weights(
    graph: Graph,
    program: Any,
    root: str,
    renamed: Callable[[str], str],
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> None:
    """Name the placeholders of weights and record their origins; what is not used is erased.

    Args:
        graph: edited.
        program: the ExportedProgram it came from.
        root: as in `set_paths`.
        renamed: as in `set_paths`.
        weights: the checkpoint by name.
        buffers: values of what is no parameter.

    Raises:
        ModelError: a buffer that the graph uses has no value.
    """
    constants = {n: v for n, v in program.constants.items() if not getattr(v, "is_meta", True)}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in list(graph.nodes):
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind == InputKind.USER_INPUT:
            continue
        if not node.users:
            graph.module.graph.erase_node(node)
            continue
        plain = spec.target.removeprefix(root)
        name = renamed(plain)
        if name in weights:
            origin, source = Origin(name), _reader(weights, name)
        elif plain in buffers or spec.target in constants:
            name, held = (plain, buffers) if plain in buffers else (spec.target, constants)
            origin, source = Origin(name, None, COMPUTED), _reader(held, name)
        else:
            raise ModelError(f"{graph.component}: the buffer {plain!r} has no value")
        node.meta[WEIGHT_KEY] = name
        value = node.meta["val"]
        graph.weights[name] = Weight(tuple(value.shape), value.dtype, source, name)
        graph.origins[name] = [origin]


def _reader(tensors: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: tensors[name]
