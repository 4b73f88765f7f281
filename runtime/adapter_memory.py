"""The bank's own memory: allocated once, so that graphs may keep its addresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from heatsink.runtime.adapter_stack import StackedAdapter
from heatsink.runtime.port_layout import PortLayout
from heatsink.runtime.weights import hash_tensor, sha256_of


class SlotMemory:
    """The stacked tensors of every component, and how one slot of them is written.

    Args:
        layouts: by component; all with the same number of slots.
        device: where the tensors are.
        dtype: of the tensors.

    Attributes:
        tensors: component -> name -> values, as `PortLayout.shapes`.
        ranks: component -> name -> how many ranks of a row count, as `PortLayout.rank_shapes`.
    """

    def __init__(
        self, layouts: Mapping[str, PortLayout], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._slots = {component: layout.slots for component, layout in layouts.items()}
        self.tensors = {
            component: {
                name: torch.zeros(shape, device=device, dtype=dtype)
                for name, shape in layout.shapes().items()
            }
            for component, layout in layouts.items()
        }
        self.ranks = {
            component: {
                name: torch.zeros(shape, device=device, dtype=torch.int32)
                for name, shape in layout.rank_shapes().items()
            }
            for component, layout in layouts.items()
        }

    def all(self) -> list[Tensor]:
        """Every tensor that it holds."""
        both = (*self.tensors.values(), *self.ranks.values())
        return [tensor for tensors in both for tensor in tensors.values()]

    @property
    def bytes(self) -> int:
        """Device memory that it takes."""
        return sum(tensor.nbytes for tensor in self.all())

    def parts(self, slot: int) -> Iterator[tuple[str, str, Tensor]]:
        """Component, tensor's name and the slot's rows of it, a view `(ports, rank, ...)`."""
        for component, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                yield component, name, tensor.unflatten(0, (-1, self._slots[component]))[:, slot]

    def _rank_parts(self, slot: int) -> Iterator[tuple[str, str, Tensor]]:
        for component, tensors in self.ranks.items():
            for name, tensor in tensors.items():
                yield component, name, tensor.view(-1, self._slots[component])[:, slot]

    def write(self, slot: int, adapter: StackedAdapter) -> None:
        """Copy an adapter into a slot; on a GPU only queued, on the current stream."""
        for component, name, part in self.parts(slot):
            values = adapter.parts.get(component, {}).get(name)
            rank = 0 if values is None else values.shape[1]
            if values is not None:
                part[:, :rank].copy_(values, non_blocking=True)
            part[:, rank:].zero_()
        for component, name, column in self._rank_parts(slot):
            ranks = adapter.ranks.get(component, {}).get(name)
            if ranks is None:
                column.zero_()
            else:
                column.copy_(ranks, non_blocking=True)

    def digest(self, slot: int) -> str:
        """SHA-256 (hex) of what the slot's bytes are now."""
        every = (*self.parts(slot), *self._rank_parts(slot))
        # A copy is dense where there is one port, too.
        dense = torch.contiguous_format
        return _digest((c, n, part.cpu().clone(memory_format=dense)) for c, n, part in every)

    def expected(self, adapter: StackedAdapter) -> str:
        """The digest of a slot that holds this adapter."""
        values = [
            (component, name, _padded(part, adapter.parts.get(component, {}).get(name)))
            for component, name, part in self.parts(0)
        ]
        ranks = [
            (component, name, _padded(part, adapter.ranks.get(component, {}).get(name)))
            for component, name, part in self._rank_parts(0)
        ]
        return _digest((*values, *ranks))


def _padded(part: Tensor, values: Tensor | None) -> Tensor:
    whole = torch.zeros(part.shape, dtype=part.dtype)
    if values is not None and values.dim() > 1:
        whole[:, : values.shape[1]] = values
    elif values is not None:
        whole.copy_(values)
    return whole


def _digest(parts: Iterable[tuple[str, str, Tensor]]) -> str:
    digest = sha256_of("slot\0")
    for component, name, part in parts:
        shape = "x".join(map(str, part.shape))
        digest.update(f"{component}\0{name}\0{part.dtype}\0{shape}\0".encode())
        hash_tensor(digest, part)
    return str(digest.hexdigest())
