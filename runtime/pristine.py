"""Where the weights as they were before any adapter come from, and what each way costs.

A merge starts from pristine weights, never from what the last adapter left. Only weights that
adapters touch need it, so each is kept when it is touched first:

- `"device"`: a copy beside the live weight. The fastest; costs device memory.
- `"host"`: a copy in host memory, pinned where the live weights are on a CUDA device; it crosses
  the bus at every merge.
- `"mapped"`: nothing is kept; the weight is read again from the mapped checkpoint, which was once
  compared with the live weight bit by bit. Its pages cost memory only while the system has some to
  spare, and come from the disk otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from heatsink.runtime.errors import AdapterError, CallerError

Keep = Literal["device", "host", "mapped"]
KEEPS: tuple[Keep, ...] = get_args(Keep)
STAGING = 256 << 20
"""Bytes of pristine weights that are on the device at a time where they are kept elsewhere."""


@dataclass(frozen=True)
class Cost:
    """What keeping pristine weights takes, in bytes.

    Attributes:
        device: memory beside the live weights, as long as the copies are kept.
        host: memory of the host (pinned, where the live weights are on a CUDA device).
        disk: read again from the checkpoint at each merge, at the most.
        transfer: moved from host to device at each merge, at the most.
        staging: memory beside the live weights during a merge.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    transfer: int = 0
    staging: int = 0

    def __add__(self, other: Cost) -> Cost:
        sums = {name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        # Weights are staged one group after the other.
        return Cost(**{**sums, "staging": max(self.staging, other.staging)})


def costs(
    live: Mapping[str, Tensor], touched: Iterable[str] | None = None, staging: int = STAGING
) -> dict[Keep, Cost]:
    """What each way to keep pristine weights would cost, before one is chosen.

    Args:
        live: the weights.
        touched: which of them adapters change; None: all.
        staging: as of `Merger`.
    """
    names = sorted(set(live if touched is None else touched))
    return {keep: cost_of(keep, {name: live[name] for name in names}, staging) for keep in KEEPS}


def cost_of(keep: Keep, weights: Mapping[str, Tensor], staging: int = STAGING) -> Cost:
    """What keeping these weights one way costs."""
    on_host = sum(w.nbytes for w in weights.values() if w.device.type == "cpu")
    on_device = sum(w.nbytes for w in weights.values()) - on_host
    if keep == "device":
        return Cost(device=on_device, host=on_host)
    largest = max((w.nbytes for w in weights.values() if w.device.type != "cpu"), default=0)
    moved = Cost(transfer=on_device, staging=min(on_device, max(staging, largest)))
    kept = Cost(host=on_host + on_device) if keep == "host" else Cost(disk=on_host + on_device)
    return kept + moved


class Pristine:
    """The pristine values of live weights, each kept when it is first touched."""

    def __init__(self, keep: Keep, source: Mapping[str, Tensor] | None = None) -> None:
        if keep not in KEEPS:
            raise CallerError(f"keep is {keep!r}, expected one of {', '.join(KEEPS)}")
        if (keep == "mapped") != (source is not None):
            raise CallerError(f"keep={keep!r}: source= is given with 'mapped', and only with it")
        self.keep = keep
        self._source = source or {}
        self._copies: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """The live weights whose pristine values are known."""
        return self._kept

    def copy(self, live: Mapping[str, Tensor]) -> None:
        """Keep weights that are still pristine; all of them or, if one fails, none.

        Raises:
            AdapterError: the checkpoint's weight is missing or another than the live one; `refused`
                has the reason for each.
        """
        new = {key: weight for key, weight in live.items() if key not in self._kept}
        if self.keep == "mapped":
            self._verify(new)
        else:
            self._copies.update({key: self._copied(weight) for key, weight in new.items()})
        self._dtypes.update({key: weight.dtype for key, weight in new.items()})
        # Last: what is named here can be read.
        self._kept.update(new)

    def read(self, key: str) -> Tensor:
        """The pristine values, on the device where they are kept."""
        if self.keep != "mapped":
            return self._copies[key]
        return self._source[key].to(self._dtypes[key])

    def drop(self, keys: Iterable[str]) -> None:
        """Forget weights whose live values are pristine again."""
        for key in list(keys):
            self._kept.pop(key, None)
            self._dtypes.pop(key, None)
            self._copies.pop(key, None)

    def cost(self, staging: int = STAGING) -> Cost:
        """What is kept now."""
        return cost_of(self.keep, self._kept, staging)

    def _copied(self, weight: Tensor) -> Tensor:
        if self.keep == "device" or weight.device.type == "cpu":
            return weight.detach().clone()
        pinned = weight.device.type == "cuda"
        copy = torch.empty_like(weight, device="cpu", pin_memory=pinned)
        return copy.copy_(weight.detach())

    def _verify(self, live: Mapping[str, Tensor]) -> None:
        refused = {}
        for key, weight in live.items():
            if key not in self._source:
                refused[key] = "not in the checkpoint"
                continue
            values = self._source[key]
            if _same_memory(values, weight):
                # Writing into it would change what is read again.
                refused[key] = "the live weight is the mapping itself"
            elif values.shape != weight.shape or not _equal(values.to(weight.dtype), weight):
                refused[key] = "the checkpoint's weight is another than the live one"
        if refused:
            told = "; ".join(f"{key}: {reason}" for key, reason in list(refused.items())[:5])
            raise AdapterError(
                f"{len(refused)} of {len(live)} weights can't be read again from the checkpoint"
                f" (keep='mapped'): {told}",
                refused,
            )


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _equal(values: Tensor, weight: Tensor) -> bool:
    """Bit by bit: 0 and -0 differ, a NaN equals itself."""
    mine, live = values.contiguous(), weight.detach().cpu().contiguous()
    return torch.equal(mine.view(torch.uint8), live.view(torch.uint8))


class ComponentSource(Mapping[str, Tensor]):
    """Weights of several components by the keys that live weights have, read when used."""

    def __init__(self, components: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._components = components

    def __getitem__(self, key: str) -> Tensor:
        component, _, name = key.partition(".")
        return self._components[component][name]

    def __contains__(self, key: object) -> bool:
        component, _, name = str(key).partition(".")
        return name in self._components.get(component, {})

    def __iter__(self) -> Iterator[str]:
        for component, weights in self._components.items():
            for name in weights:
                yield f"{component}.{name}"

    def __len__(self) -> int:
        return sum(len(weights) for weights in self._components.values())
