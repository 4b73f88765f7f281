"""Which weights of a module are not what they were, found without reading them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from heatsink.runtime.writes import writes


class _Seen:
    """A tensor of a module as it was: the object, its memory, and how often it was written to."""

    def __init__(self, name: str, holder: dict[str, Any], key: str) -> None:
        self.name, self._holder, self._key = name, holder, key
        self.note()

    def note(self) -> None:
        """Take it for known as it is now."""
        self._tensor: Tensor = self._holder[self._key]
        # Memory is known by its object: freed memory's address may come again. A weak reference
        # keeps the object's name, and lets the memory go.
        self._memory = StorageWeakRef(self._tensor.untyped_storage())
        self._address = self._tensor.data_ptr()
        self._writes = writes(self._tensor)

    @property
    def now(self) -> Tensor | None:
        """The tensor in its place; None if there is none."""
        return self._holder.get(self._key)

    def changed(self) -> bool:
        """Whether it is another tensor, lies elsewhere, or was written to."""
        tensor: Any = self.now
        return (
            tensor is not self._tensor
            or tensor.data_ptr() != self._address
            or tensor.untyped_storage()._cdata != self._memory.cdata
            or writes(tensor) != self._writes
        )


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
        self._seen: list[_Seen] = []
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
                        self._seen.append(_Seen(f"{path}.{key}" if path else key, table, key))

    def weight(self) -> Tensor:
        """One of the module's weights: they share dtype and device."""
        tensors = (seen.now for seen in self._seen)
        return next(one for one in tensors if one is not None and one.is_floating_point())

    def rebuilt(self) -> bool:
        """Whether the module has other submodules, or other names of tensors, than at last."""
        same = (
            all(table.get(key) is child for table, key, child in self._children)
            and all(len(table) == count for table, count in self._holders)
            and all(seen.now is not None for seen in self._seen)
        )
        if not same:
            self._scan()
        return not same

    def changed(self) -> set[str]:
        """Names of the tensors that are not what they were at the last look; after `rebuilt`."""
        found = [seen for seen in self._seen if seen.changed()]
        for seen in found:
            seen.note()
        return {seen.name for seen in found}
