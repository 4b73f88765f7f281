"""Weights on a device, held once for all the graphs that have the same ones."""

from __future__ import annotations

from collections.abc import Container
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.weight import COMPUTED


class SharedWeights:
    """Tensors of graphs that are captured from one module for several shapes.

    What a weight is made of, as its origins say it, tells whether two graphs have the same one. A
    tensor goes when the last component that uses it does.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._held: WeakValueDictionary[object, Tensor] = WeakValueDictionary()

    def load(self, graph: Graph, name: str) -> Tensor:
        """A weight of the graph: where it lies, if it has the dtype and the device already."""
        weight, origins = graph.weights[name], graph.origins[name]
        key = (tuple(origins), weight.shape, weight.dtype)
        # What is computed has a name of the graph's own.
        shared = all(origin.transform != COMPUTED for origin in origins)
        found = self._held.get(key) if shared else None
        if found is None:
            with torch.no_grad():
                found = _plain(weight.load(), self.device)
            if shared:
                self._held[key] = found
        return found

    def forget(self, parameters: Container[str]) -> None:
        """Read what is made of these parameters again when it is next asked for."""
        for key in list(self._held):
            if made_of(key[0], parameters):  # type: ignore[index]  # a key begins with origins
                self._held.pop(key, None)


def made_of(origins: object, parameters: Container[str]) -> bool:
    """Whether a weight of these origins holds something of these parameters."""
    return any(origin.parameter in parameters for origin in origins)  # type: ignore[attr-defined]


def _plain(value: Tensor, device: torch.device) -> Tensor:
    """As it is where it can be: components share what is packed of one tensor."""
    if value.device == device and not value.requires_grad:
        return value
    return value.detach().to(device)
