"""A captured component: its operations, its weights by name, and where each of them came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.errors import HeatsinkError, InvalidRequest
from heatsink.runtime.graph.weight import Origin, Weight

BATCH = "batch"
PATH_KEY = "heatsink_path"
WEIGHT_KEY = "heatsink_weight"
INPUT_KEY = "heatsink_input"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an input or output; a symbolic dimension is a string, `batch` say."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


def module_path(node: fx.Node) -> str:
    """The dotted path of the module a node came from; "" for what the component itself does.

    Raises:
        KeyError: the node was given no path.
    """
    path = node.meta[PATH_KEY]
    assert isinstance(path, str)
    return path


def input_name(node: fx.Node) -> str:
    """The name of an input by its placeholder, whose own target must be an identifier."""
    return str(node.meta.get(INPUT_KEY, node.target))


@dataclass
class Graph:
    """A component as captured by `torch.export`, with a symbolic batch.

    Weights and inputs are placeholders of `module`; a weight's placeholder carries its name in
    `node.meta[WEIGHT_KEY]`, and every operation the path of its module in `node.meta[PATH_KEY]`.

    Attributes:
        component: its name, `unet` say.
        module: the operations; it holds no parameters of its own.
        weights: by the checkpoint's name, read when used.
        origins: for each weight the parameters it is made of.
        inputs: by name, in order.
        outputs: by name, in order.
        dtype: what the component computes in.
        ranges: the range of every symbolic dimension, as `torch.export` keeps it.
    """

    component: str
    module: fx.GraphModule
    weights: dict[str, Weight]
    origins: dict[str, list[Origin]]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    dtype: torch.dtype
    ranges: Mapping[Any, Any]

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """All nodes in order."""
        return iter(self.module.graph.nodes)

    def weight_nodes(self) -> dict[str, fx.Node]:
        """The placeholder of each weight, by the weight's name."""
        holders = (n for n in self.nodes if n.op == "placeholder" and WEIGHT_KEY in n.meta)
        return {node.meta[WEIGHT_KEY]: node for node in holders}

    def input_nodes(self) -> list[fx.Node]:
        """The placeholders of the inputs, in order."""
        return [n for n in self.nodes if n.op == "placeholder" and WEIGHT_KEY not in n.meta]

    def output_nodes(self) -> list[fx.Node]:
        """The nodes that are returned, in order."""
        (output,) = (node for node in self.nodes if node.op == "output")
        return list(output.args[0])  # type: ignore[arg-type]

    def copy(self) -> Graph:
        """A graph that can be edited without changing this one; weights are shared."""
        module = fx.GraphModule(self.module, copy.deepcopy(self.module.graph))
        origins = {name: list(origins) for name, origins in self.origins.items()}
        return replace(
            self,
            module=module,
            weights=dict(self.weights),
            origins=origins,
            inputs=dict(self.inputs),
            ranges=dict(self.ranges),
        )

    def validate(self) -> None:
        """Check that the graph is well formed and that nothing lost its provenance.

        Raises:
            HeatsinkError: naming the node or weight.
        """
        try:
            self.module.graph.lint()
        except RuntimeError as error:
            raise HeatsinkError(f"{self.component}: the graph is malformed: {error}") from error
        for node in self.nodes:
            if node.op == "call_function" and not isinstance(node.meta.get(PATH_KEY), str):
                raise HeatsinkError(
                    f"{self.component}: node {node.name} ({node.target}) has no module path"
                )
        self._validate_weights()
        names = [input_name(node) for node in self.input_nodes()]
        if names != list(self.inputs):
            raise HeatsinkError(
                f"{self.component}: the graph takes {names}, "
                f"its specification says {list(self.inputs)}"
            )
        if len(self.output_nodes()) != len(self.outputs):
            raise HeatsinkError(
                f"{self.component}: the graph returns {len(self.output_nodes())} values, "
                f"its specification names {list(self.outputs)}"
            )

    def _validate_weights(self) -> None:
        named = [n.meta[WEIGHT_KEY] for n in self.nodes if WEIGHT_KEY in n.meta]
        if len(set(named)) != len(named):
            twice = sorted({name for name in named if named.count(name) > 1})
            raise HeatsinkError(f"{self.component}: several placeholders hold the weights {twice}")
        if unknown := sorted(set(named) ^ set(self.weights)):
            raise HeatsinkError(
                f"{self.component}: the graph and its weights disagree about {unknown}"
            )
        for name in named:
            if not self.origins.get(name):
                raise HeatsinkError(f"{self.component}: weight {name!r} has no origin")
        if orphans := sorted(set(self.origins) - set(named)):
            raise HeatsinkError(f"{self.component}: origins of absent weights {orphans}")

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Execute the graph node by node in PyTorch, loading each weight where it is used.

        For parity, not for speed.

        Args:
            inputs: a tensor for every input, of the specified shape.
            dtype: compute in another float dtype than the graph's: float64 gives a reference. Every
                float dtype in the graph becomes this one.
            device: where to compute.

        Returns:
            The outputs by name.

        Raises:
            InvalidRequest: an input is missing, unknown or of another shape.
        """
        from heatsink.runtime.graph.interpreter import GraphInterpreter

        self.check_inputs(inputs)
        return GraphInterpreter(self, dtype, torch.device(device)).execute(inputs)

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Check names and shapes of inputs, the symbolic dimensions against each other too.

        Raises:
            InvalidRequest: naming the input, what was expected and what came.
        """
        if set(inputs) != set(self.inputs):
            raise InvalidRequest(
                f"{self.component} takes the inputs {list(self.inputs)}, got {sorted(inputs)}"
            )
        symbols: dict[str, int] = {}
        for name, spec in self.inputs.items():
            shape = tuple(inputs[name].shape)
            sizes = zip(spec.shape, shape, strict=False)
            fits = len(shape) == len(spec.shape) and all(
                size == (symbols.setdefault(want, size) if isinstance(want, str) else want)
                for want, size in sizes
            )
            if not fits:
                known = f" with {symbols}" if symbols else ""
                raise InvalidRequest(
                    f"{self.component}: input {name!r} wants shape {list(spec.shape)}{known}, "
                    f"got {list(shape)}"
                )
