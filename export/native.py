"""Writes a component as the native backend reads it: the graph as JSON, its weights beside it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from heatsink.runtime.errors import NonFiniteWeights
from heatsink.runtime.files import write_whole
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.serial import graph_to_json
from heatsink.runtime.graph.weight import COMPUTED, Origin

# As safetensors calls them.
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
# Of the header: the first weight then lies where vector loads want it.
_ALIGNMENT = 64


@dataclass(frozen=True)
class NativeFile:
    """What was written.

    Attributes:
        path: the graph.
        data: its weights.
        origins: weight -> what it was made from.
    """

    path: Path
    data: Path
    origins: dict[str, list[Origin]]


def data_of(path: Path, component: str) -> Path:
    """The file of the weights of all graphs of a component, beside a graph's own."""
    return path.with_name(f"{component}.safetensors")


def to_native(graph: Graph, path: Path, *, weights: bool = True) -> NativeFile:
    """Write `graph` as `path` and its weights as safetensors beside it.

    The weights are computed and read one after the other while they are written. The same graph and
    values give the same bytes.

    Args:
        graph: a valid graph, after the passes of the native engine.
        path: `<component>.graph.json`; its folder exists.
        weights: write them; not for a second graph of the same weights.

    Raises:
        NotBuilt: a node can't be written.
        NonFiniteWeights: a weight overflows in the dtype that the graph computes in.
        ResourceError: the files can't be written; none of them is left.
    """
    text = graph_to_json(graph)
    data = data_of(path, graph.component)
    if weights:
        write_whole(data, lambda file: _write_weights(graph, file))
    write_whole(path, lambda file: file.write(text.encode()))
    return NativeFile(path, data, {name: list(parts) for name, parts in graph.origins.items()})


def _write_weights(graph: Graph, file: BinaryIO) -> None:
    weights = graph.weights
    header: dict[str, object] = {}
    end = 0
    for name, weight in weights.items():
        size = math.prod(weight.shape) * weight.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The header's length comes first, in eight bytes; spaces may follow the header.
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name, weight in weights.items():
        value = weight.load().detach().contiguous()
        # What the module makes itself may be infinite: a mask.
        computed = any(COMPUTED in origin.transform for origin in graph.origins[name])
        if not (computed or bool(torch.isfinite(value).all())):
            raise NonFiniteWeights(
                f"the weight {name} is not finite in {str(weight.dtype).removeprefix('torch.')}"
            )
        file.write(value.reshape(-1).view(torch.uint8).numpy().data)
