"""A graph at one batch size as a list of calls on static buffers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.kernels.recorder import static_memory
from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph, module_path
from heatsink.runtime.memory import Plan, plan
from heatsink.runtime.native.calls import Calls
from heatsink.runtime.native.layout import Layout, lay_out, name_of, tensors
from heatsink.runtime.native.outs import OUTS, unplanned


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


class Program:
    """One batch size of a component: write `inputs`, `replay`, read `outputs`.

    Attributes:
        inputs: static tensors by name; a replay leaves them as they are.
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
            layout: as `lay_out` gives it.
            memory: the plan of the layout's lifetimes.
            arena: of at least the plan's peak; one of its own by default.
            device: where it runs.
        """
        self._device = device or torch.device("cpu")
        self._layout = layout or lay_out(graph, batch)
        self.memory = memory or plan(self._layout.lifetimes)
        self._arena = arena or Arena(self.memory.peak, self._device)
        self.batch = batch
        self.unplanned: list[tuple[str, str]] = []
        self._calls = Calls(self._device)
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
        """Copy the inputs in, replay, and return the outputs' static tensors."""
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
            self._calls.run()

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
            name = node.meta.get(WEIGHT_KEY)
            if name is not None:
                self._values[node] = constants[name]
            else:
                self._values[node] = self._place(node, 0)
                self.inputs[str(node.target)] = self._values[node]
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
        make = OUTS.get(target) if isinstance(meta, Tensor) else None
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

    def _is_view(self, node: fx.Node) -> bool:
        """Whether every tensor of the node lies in memory that another node made."""
        count = len(tensors(self._layout.values[node]))
        return all(self._layout.roots[node, place][0] is not node for place in range(count))

    def _place(self, node: fx.Node, place: int) -> Tensor:
        root = self._layout.roots[node, place]
        meta = tensors(self._layout.values[node])[place]
        return self._arena.at(self.memory.offsets[name_of(root)], meta)
