"""What a native graph with adapter ports is given beside its component's own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.port_layout import SCALES_INPUT, SLOTS_INPUT

if TYPE_CHECKING:
    from heatsink.runtime.adapters import AdapterBank


def room_of(graph: Graph) -> int:
    """How many adapters a row of a graph with ports may have; 0 for one without."""
    spec = graph.inputs.get(SLOTS_INPUT)
    return 0 if spec is None else int(spec.shape[1])


def held_of(bank: AdapterBank, graph: Graph) -> dict[str, Tensor]:
    """The bank's tensors that a graph takes, for `NativeComponent(graph, held=...)`.

    Args:
        bank: of the graph's dtype.
        graph: of a component with ports, or of one of its phases.
    """
    every = {**bank.tensors(graph.component), **bank.ranks(graph.component)}
    return {name: tensor for name, tensor in every.items() if name in graph.inputs}


def row_inputs(
    slots: npt.NDArray[np.int64] | None,
    scales: npt.NDArray[np.float32] | None,
    rows: int,
    room: int,
) -> dict[str, Tensor]:
    """`adapter_slots` and `adapter_scales` of a graph with ports.

    Args:
        slots: `(rows, n)`, as `Lease` gives them: a row's unused places are -1 and at the end; None
            where no row has an adapter.
        scales: `(rows, n)`.
        rows: of the batch.
        room: as `room_of` says.

    Raises:
        NotBuilt: a row has more adapters than there is room for.
    """
    own_slots = torch.full((rows, room), -1, dtype=torch.int64)
    own_scales = torch.zeros((rows, room), dtype=torch.float32)
    if slots is not None and scales is not None:
        most = int((slots >= 0).sum(axis=1).max(initial=0))
        if most > room:
            raise NotBuilt(f"adapters: a row has {most} adapters, this graph has room for {room}")
        own_slots[:, :most] = torch.from_numpy(slots[:, :most])
        own_scales[:, :most] = torch.from_numpy(scales[:, :most])
    return {SLOTS_INPUT: own_slots, SCALES_INPUT: own_scales}
