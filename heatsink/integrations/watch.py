"""Which weights of a module are not what they were, found without reading them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from heatsink.runtime.writes import writes


class Seen:
    """A tensor as it was: the object, its memory, and how often it was written to.

    Attributes:
        tensor: the object, as it is now.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        # Memory is known by its object: freed memory's address may come again. A weak reference
        # keeps the object's name, and lets the memory go.
        self._memory = StorageWeakRef(tensor.untyped_storage())
        self._address = tensor.data_ptr()
        self._writes = writes(tensor)

    @property
    def changed(self) -> bool:
        """Whether it lies elsewhere, or was written to."""
        tensor = self.tensor
        return (
            tensor.data_ptr() != self._address
            or tensor.untyped_storage()._cdata != self._memory.cdata
            or writes(tensor) != self._writes
        )


@dataclass
class _Place:
    """Where a module has a tensor, and what was seen there."""

    name: str
    table: dict[str, Any]
    key: str
    seen: Seen

    @property
    def now(self) -> Tensor | None:
        found: Tensor | None = self.table.get(self.key)
        return found


class Watch:
    """A module's submodules, parameters and buffers, compared at each look with the one before.

    What PyTorch doesn't count (`runtime.writes`) is not seen.

    Args:
        module: what is watched. Its submodules may be replaced.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._scan()

    def _scan(self) -> None:
        self._children: list[tuple[dict[str, Any], str, Any]] = []
        self._holders: list[tuple[dict[str, Any], int]] = []
        self._places: list[_Place] = []
        for path, part in self._module.named_modules(remove_duplicate=False):
            children: Any = part._modules
            self._children += [(children, key, child) for key, child in children.items()]
            self._holders.append((children, len(children)))
            tables: tuple[Any, Any] = part._parameters, part._buffers
            for table in tables:
                self._holders.append((table, len(table)))
                for key, value in table.items():
                    if value is None:
                        self._children.append((table, key, None))
                    else:
                        name = f"{path}.{key}" if path else key
                        self._places.append(_Place(name, table, key, Seen(value)))

    def weight(self) -> Tensor:
        """One of the module's weights: they share dtype and device."""
        tensors = (place.now for place in self._places)
        return next(one for one in tensors if one is not None and one.is_floating_point())

    def rebuilt(self) -> bool:
        """Whether the module has other submodules, or other names of tensors, than at last."""
        same = (
            all(table.get(key) is child for table, key, child in self._children)
            and all(len(table) == count for table, count in self._holders)
            and all(place.now is not None for place in self._places)
        )
        if not same:
            self._scan()
        return not same

    def changed(self) -> set[str]:
        """Names of the tensors that are not what they were at the last look; after `rebuilt`."""
        found = set()
        for place in self._places:
            now: Any = place.table.get(place.key)
            if now is not place.seen.tensor or place.seen.changed:
                place.seen = Seen(now)
                found.add(place.name)
        return found
