"""A module's programs, one graph for each set of shapes, kept up to date with its weights.

Programs hold weights in other forms than the module does (packed, scaled, cast), so before every
run they look whether one was written, moved or replaced; what is made of it is read again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heatsink.integrations.captured import Wrapper, capture_original
from heatsink.integrations.watch import Watch
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.phased import PhasedComponent
from heatsink.runtime.native.shared_weights import SharedWeights
from heatsink.runtime.native.workspace import Workspace

PHASED = frozenset({"unet", "controlnet"})
"""Kinds of graphs that run in a loop: what the prompt and the times decide is computed once."""

KEEP_BYTES = 1 << 26
"""What a graph keeps of such values for prompts and times that come again."""

MAX_GRAPHS = 8
"""Captured graphs that a module keeps, one for each set of shapes; the oldest in use goes."""


class Spaces:
    """The workspaces of a pipeline's modules, one a device."""

    def __init__(self) -> None:
        self._held: dict[torch.device, Workspace] = {}
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Workspace:
        """The workspace of a device."""
        with self._lock:
            return self._held.setdefault(device, Workspace(device))


class Programs:
    """Runs networks made of one module of a library.

    Args:
        original: the module; its submodules and weights may change between runs.
        spaces: where the programs work.
    """

    def __init__(self, original: Any, spaces: Spaces) -> None:
        self._original, self._spaces = original, spaces
        self._watch = Watch(original)
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._components: dict[Any, NativeComponent | PhasedComponent] = {}
        self._weights = SharedWeights(self.device)
        self._guard = threading.RLock()
        self._foreign = _has_peft(original)

    @property
    def device(self) -> torch.device:
        """Where the module lies; the libraries' own property walks through all of it."""
        return self._watch.weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's weights."""
        return self._watch.weight().dtype

    @property
    def graphs(self) -> list[Graph]:
        """The graphs captured until now, after the passes; the last used at the end."""
        with self._guard:
            return list(self._graphs.values())

    @property
    def components(self) -> list[NativeComponent | PhasedComponent]:
        """What runs them, where they ran since the module was moved or changed."""
        with self._guard:
            return list(self._components.values())

    def look(self) -> bool:
        """Drop what was made of weights that are not what they were.

        Returns:
            Whether the module is one to be captured: it has no adapters of PEFT's in it.
        """
        with self._guard:
            if self._watch.rebuilt():
                self._graphs.clear()
                self._components.clear()
                self._weights = SharedWeights(self.device)
                self._foreign = _has_peft(self._original)
            elif changed := self._watch.changed():
                self._reload(changed)
            return not self._foreign

    def refresh(self) -> None:
        """Read every weight again before the next run."""
        with self._guard:
            self.look()
            parameters = self._original.named_parameters(remove_duplicate=False)
            self._reload({name for name, _ in [*parameters, *self._original.named_buffers()]})

    def _reload(self, changed: set[str]) -> None:
        if self._weights.device != self.device:
            self._components.clear()
            self._weights = SharedWeights(self.device)
        if any(name in changed for name, _ in self._original.named_buffers()):
            # What is computed of them may be in a graph under any name.
            self._graphs.clear()
            self._components.clear()
        self._weights.forget(changed)
        for component in self._components.values():
            component.reload(changed)

    def run(
        self,
        kind: str,
        wrapper: Wrapper,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """Run the network that `wrapper` makes of the module, captured once for these shapes.

        Args:
            kind: the graph's name; one for each wrapper.
            wrapper: see `captured.capture_original`.
            inputs: by name; the first dimension of each is the row.
            outputs: names of what is returned.
            dtype: what to compute in.
        """
        shapes = tuple((name, tuple(value.shape[1:])) for name, value in inputs.items())
        key = (kind, dtype, shapes)
        with self._guard:
            if key not in self._graphs:
                captured = self._capture(kind, wrapper, dict(shapes), outputs, dtype)
                self._graphs[key] = run_passes(captured, PASSES_NATIVE)
            self._graphs.move_to_end(key)
            while len(self._graphs) > MAX_GRAPHS:
                self._components.pop(self._graphs.popitem(last=False)[0], None)
            if key not in self._components:
                self._components[key] = self._component(kind, self._graphs[key])
            component = self._components[key]
        return component.run(inputs)

    def _capture(self, *given: Any) -> Graph:
        return capture_original(self._original, *given)

    def _component(self, kind: str, graph: Graph) -> NativeComponent | PhasedComponent:
        device = self.device
        given: Any = {"workspace": self._spaces.on(device), "weights": self._weights}
        # Elsewhere, comparing a step's inputs with the last one's would wait for the device.
        if kind in PHASED and device.type == "cpu":
            return PhasedComponent(graph, device=device, keep_bytes=KEEP_BYTES, **given)
        return NativeComponent(graph, device=device, **given)


def _has_peft(module: Any) -> bool:
    kinds = {base for part in module.modules() for base in type(part).__mro__}
    return any(base.__module__.split(".")[0] == "peft" for base in kinds)
