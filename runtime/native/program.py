"""A graph at one batch size as a list of calls on static buffers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.kernels.recorder import static_memory
from heatsink.runtime.graph.graph import BATCH, WEIGHT_KEY, Graph, input_name, module_path
from heatsink.runtime.graph.passes.edit import argument
from heatsink.runtime.memory import Plan, plan
from heatsink.runtime.native.calls import Calls
from heatsink.runtime.native.cuda_graph import Graphs
from heatsink.runtime.native.layout import Layout, lay_out, name_of, tensors
from heatsink.runtime.native.outs import OUTS, PACKING, unplanned


class Arena:
    """Bytes that programs which never overlap share; it is made once, for the largest."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_cpu = device.type == "cpu"
        self.memory = (
            static_memory(size) if on_cpu else torch.empty(size, dtype=torch.uint8, device=device)
        )

    def at(self, offset: int, like: Tensor) -> Tensor:
        """A tensor of `like`'s dtype, shape and strides whose storage begins at `offset`."""
        flat = self.memory[offset:].view(torch.uint8)
        size = flat.numel() // like.element_size() * like.element_size()
        typed = flat[:size].view(like.dtype)
        return typed.as_strided(like.shape, like.stride(), typed.storage_offset())


def check_held(
    graph: Graph, batch: int | None, held: Mapping[str, Tensor], device: torch.device
) -> None:
    """See that held tensors are inputs of the graph as it takes them.

    Args:
        graph: valid.
        batch: rows; None where any number will do.
        held: by input.
        device: where the graph runs.

    Raises:
        ValueError: naming the tensor, what was expected and what came.
    """
    for name, value in held.items():
        spec = graph.inputs.get(name)
        if spec is None:
            raise ValueError(f"held: {graph.component} takes no {name!r}, but {list(graph.inputs)}")
        rows: Any = value.shape[0] if batch is None and value.dim() else batch
        shape = tuple(rows if size == BATCH else size for size in spec.shape)
        found = (tuple(value.shape), value.dtype, value.device.type)
        if found != (shape, spec.dtype, device.type):
            raise ValueError(
                f"held: expected {name!r} {shape} {spec.dtype} on {device}, got {found[0]} "
                f"{value.dtype} on {value.device}"
            )


def _check_strides(name: str, value: Tensor, planned: Tensor) -> None:
    """See that what is a view in the plan is one of the held tensor too, and no copy made once."""
    steps = [
        [step for size, step in zip(each.shape, each.stride(), strict=True) if size > 1]
        for each in (planned, value)
    ]
    if steps[0] != steps[1]:
        raise ValueError(
            f"held: expected {name!r} with strides {planned.stride()}, got {value.stride()}"
        )


class Program:
    """One batch size of a component: write `inputs`, `replay`, read `outputs`.

    Attributes:
        inputs: static tensors by name, the held ones too; a replay leaves them as they are.
        outputs: static tensors by name; the next replay of any program of the arena overwrites
            them.
        memory: the plan of the arena.
        unplanned: (operator, module path) of the nodes that allocate their result and copy it.
    """

    def __init__(
        self,
        graph: Graph,
        batch: int,
        constants: Mapping[str, Tensor],
        *,
        held: Mapping[str, Tensor] | None = None,
        layout: Layout | None = None,
        memory: Plan | None = None,
        arena: Arena | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Build the program.

        Args:
            graph: valid; it is not changed.
            batch: rows.
            constants: the graph's weights by name, on the device.
            held: inputs by name that are read where they are at every replay: memory of the
                caller's, of the specified shape and dtype and the layout's strides, on the device,
                that stays there.
            layout: as `lay_out` gives it, for these held inputs.
            memory: the plan of the layout's lifetimes.
            arena: of at least the plan's peak; one of its own by default.
            device: where it runs.

        Raises:
            ValueError: a held tensor is not what the graph takes.
        """
        self._device = device or torch.device("cpu")
        self._held = dict(held or {})
        check_held(graph, batch, self._held, self._device)
        self._layout = layout or lay_out(graph, batch, self._held)
        self.memory = memory or plan(self._layout.lifetimes)
        self._arena = arena or Arena(self.memory.peak, self._device)
        self.batch = batch
        self._component = graph.component
        self.unplanned: list[tuple[str, str]] = []
        self._calls = Calls(self._device)
        self._replay: Callable[[], None] = self._calls.run
        self._nodes: list[fx.Node] = []
        self._values: dict[fx.Node, Any] = {}
        self._storages: dict[tuple[fx.Node, int], Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        with torch.inference_mode():
            for node in graph.nodes:
                self._add(node, constants)
        returned = [self._values[node] for node in graph.output_nodes()]
        self.outputs: dict[str, Tensor] = dict(zip(graph.outputs, returned, strict=True))
        # What steps need, they hold.
        self._values.clear()

    @property
    def launches(self) -> int:
        """Calls of a replay."""
        return self._calls.count

    @property
    def recorded(self) -> int:
        """How many of them are made without Python."""
        return self._calls.recorded

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the inputs in, replay, and return the outputs' static tensors.

        Args:
            inputs: those that are not held, and of the held ones none.
        """
        with torch.inference_mode():
            for name, value in inputs.items():
                self.inputs[name].copy_(value)
        self.replay()
        return self.outputs

    def replay(self) -> None:
        """Compute the outputs from what lies in the inputs.

        Raises:
            RuntimeError: what an operator raised, behind its name and the path of its module.
        """
        with torch.inference_mode():
            self._replay()

    def capture(self, graphs: Graphs) -> None:
        """Replay one CUDA graph from now on, on the stream that is current then.

        The calls run a few times before, on zeros in all inputs that are not held.

        Raises:
            CaptureFailed: a call can't be part of a graph; the message names its operator.
        """
        with torch.inference_mode():
            for name in self.inputs.keys() - self._held.keys():
                # What lies there may be no index of anything.
                self.inputs[name].zero_()
            what = f"{self._component} of {self.batch} rows"
            self._replay = graphs.capture(self._calls.run, what)

    def profile(
        self, rounds: int = 3, clock: Callable[[], float] = time.perf_counter
    ) -> list[tuple[fx.Node, float]]:
        """The node of every call of a replay, in order, with its median seconds over the rounds."""
        with torch.inference_mode():
            return list(zip(self._nodes, self._calls.profile(rounds, clock), strict=True))

    def _add(self, node: fx.Node, constants: Mapping[str, Tensor]) -> None:
        if node.op == "output":
            return
        if node.op == "placeholder":
            weight = node.meta.get(WEIGHT_KEY)
            if weight is not None:
                self._values[node] = constants[weight]
                return
            name = input_name(node)
            given = self._held.get(name)
            if given is not None:
                _check_strides(name, given, self._layout.values[node])
            self._values[node] = self._place(node, 0) if given is None else given
            self.inputs[name] = self._values[node]
            return
        target: Any = node.target
        args: Any = fx.node.map_aggregate(node.args, self._value)
        kwargs: Any = fx.node.map_aggregate(node.kwargs, self._value)
        meta = self._layout.values[node]
        if node in self._layout.constant or not tensors(meta) or self._is_view(node):
            # Done once: static memory stays where it is, so a view of it stays right.
            self._values[node] = target(*args, **kwargs)
            return
        if isinstance(meta, Tensor):
            out: Any = self._place(node, 0)
        else:
            out = tuple(self._place(node, place) for place in range(len(tensors(meta))))
        self._values[node] = out
        make = OUTS.get(target) if isinstance(meta, Tensor) and self._may_pack(node) else None
        step = None if make is None else make(args, kwargs, out)
        if step is None:
            self.unplanned.append((str(target), module_path(node)))
            step = unplanned(target, args, kwargs, out)
        self._nodes.append(node)
        self._calls.add(step, f"{target} of {module_path(node) or 'the model'}")

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._values[value]
        return self._device if isinstance(value, torch.device) else value

    def _may_pack(self, node: fx.Node) -> bool:
        """Whether a product's weight is one that is there before the first replay."""
        return node.target not in PACKING or argument(node, "weight") in self._layout.constant

    def _is_view(self, node: fx.Node) -> bool:
        """Whether every tensor of the node is what another node made and left there."""
        if node in self._layout.in_place:
            return False
        count = len(tensors(self._layout.values[node]))
        return all(self._layout.roots[node, place][0] is not node for place in range(count))

    def _place(self, node: fx.Node, place: int) -> Tensor:
        root = self._layout.roots[node, place]
        meta = tensors(self._layout.values[node])[place]
        return self._arena.at(self.memory.offsets[name_of(root)], meta)
