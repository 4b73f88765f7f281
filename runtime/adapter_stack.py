"""An adapter in host memory as the bank stacks it, so that a load is three copies a group of ports.

The scale of a module (alpha / rank) goes into its `b`: the product is taken in float64 and rounded
once to the bank's dtype (`a` is converted to it), so a row's scale is its request's weight alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from heatsink.runtime.adapter_delta import AdapterDelta, digest_deltas
from heatsink.runtime.components import lasting_name
from heatsink.runtime.errors import AdapterError
from heatsink.runtime.port_layout import PortGroup, PortLayout

_SHOWN = 5


@dataclass(frozen=True, eq=False)
class StackedAdapter:
    """One adapter, ready to be copied into a slot.

    Attributes:
        digest: of its content, `digest_deltas`.
        modules: what it changes, `component.module_path`, sorted.
        parts: component -> name of a bank tensor -> `(ports, r, ...)`, the slot's part with only
            the ranks that the adapter uses. What is not there is zero.
        ranks: component -> name of the bank's ranks -> int32 `(ports,)`, each port's own rank. What
            is not there is zero too.
    """

    digest: str
    modules: tuple[str, ...]
    parts: dict[str, dict[str, Tensor]]
    ranks: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that it changes, sorted."""
        return tuple(sorted(self.parts))

    @property
    def bytes(self) -> int:
        """Host memory that it takes."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts.values())


def stack(
    deltas: Iterable[AdapterDelta],
    layouts: Mapping[str, PortLayout],
    *,
    dtype: torch.dtype = torch.float32,
    pinned: bool = False,
) -> StackedAdapter:
    """Bring an adapter into the layouts' form, or refuse it whole.

    Args:
        deltas: one for each module.
        layouts: by component.
        dtype: of the bank.
        pinned: keep it in page-locked memory, from which a GPU copies by itself.

    Raises:
        AdapterError: it holds nothing, or `refused` maps `component.module_path` to the reason: no
            port, another shape, a rank above the bank's, DoRA, a value that is not finite.
    """
    deltas = [replace(d, a=d.a.detach().cpu(), b=d.b.detach().cpu()) for d in deltas]
    if not deltas:
        raise AdapterError("the adapter changes no module")
    ports = {
        (component, lasting_name(component, path)): place
        for component, layout in layouts.items()
        for path, place in layout.places().items()
    }
    refused: dict[str, str] = {}
    grouped: dict[str, dict[int, dict[int, AdapterDelta]]] = {}
    for delta in deltas:
        place = ports.get((delta.component, lasting_name(delta.component, delta.module_path)))
        reason = _misfit(delta, layouts.get(delta.component), place)
        if reason is None and place is not None:
            group = grouped.setdefault(delta.component, {}).setdefault(place[0], {})
            if group.setdefault(place[1], delta) is not delta:
                reason = "it is there twice"
        if reason is not None:
            refused[_called(delta)] = reason
    _refuse(refused, len(deltas))
    parts: dict[str, dict[str, Tensor]] = {}
    ranks: dict[str, dict[str, Tensor]] = {}
    for component, groups in sorted(grouped.items()):
        own, counted = parts.setdefault(component, {}), ranks.setdefault(component, {})
        for index, members in sorted(groups.items()):
            a, b = _stack_group(layouts[component].groups[index], members, dtype, pinned, refused)
            own |= {f"bank.{index}.a": a, f"bank.{index}.b": b}
            every = torch.zeros(a.shape[0], dtype=torch.int32, pin_memory=pinned)
            for port, delta in members.items():
                every[port] = delta.rank
            counted[f"bank.{index}.ranks"] = every
    _refuse(refused, len(deltas))
    return StackedAdapter(digest_deltas(deltas), tuple(sorted(map(_called, deltas))), parts, ranks)


def _called(delta: AdapterDelta) -> str:
    return f"{delta.component}.{delta.module_path}"


def _refuse(refused: Mapping[str, str], total: int) -> None:
    if refused:
        told = "; ".join(f"{key}: {why}" for key, why in list(refused.items())[:_SHOWN])
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise AdapterError(
            f"{len(refused)} of {total} modules can't be taken, so none is: {told}{more}",
            dict(refused),
        )


def _misfit(
    delta: AdapterDelta, layout: PortLayout | None, place: tuple[int, int] | None
) -> str | None:
    """Why a delta can't go into a port, or None."""
    if layout is None:
        return f"this engine has no adapter ports in its {delta.component}"
    if place is None:
        return "this engine has no port there"
    group = layout.groups[place[0]]
    inputs = tuple(delta.a.shape[1:])
    fits = inputs in (group.inputs, (*group.inputs, 1, 1))
    if not fits or tuple(delta.b.shape) != (group.outputs, delta.rank):
        return (
            f"wrong shape: a {tuple(delta.a.shape)} and b {tuple(delta.b.shape)} for a port "
            f"{group.inputs} -> {group.outputs}"
        )
    if delta.magnitude is not None:
        return (
            "DoRA rescales the whole weight: a merge can do that (`heatsink lora merge`), no port"
        )
    if delta.rank > layout.rank:
        return (
            f"rank {delta.rank}, this engine's ports take {layout.rank} at most (build one with "
            f"--adapters {layout.slots}x{delta.rank})"
        )
    if not math.isfinite(delta.scale):
        return f"the scale is {delta.scale}"
    return None


def _stack_group(
    group: PortGroup,
    members: Mapping[int, AdapterDelta],
    dtype: torch.dtype,
    pinned: bool,
    refused: dict[str, str],
) -> tuple[Tensor, Tensor]:
    """A group's a and b, `(ports, r, ...)`; adds to `refused` what is not finite in them."""
    rank = max(delta.rank for delta in members.values())
    shape = (len(group.members), rank)
    a = torch.zeros((*shape, *group.stored_inputs), dtype=dtype, pin_memory=pinned)
    b = torch.zeros((*shape, group.outputs), dtype=dtype, pin_memory=pinned)
    for port, delta in members.items():
        a[port, : delta.rank] = group.stored(delta.a)
        b[port, : delta.rank] = (delta.b.float().double() * delta.scale).t()
        for name, part in (("a", a), ("scale x b", b)):
            if not bool(torch.isfinite(part[port]).all()):
                refused[_called(delta)] = f"non-finite: {name} holds NaN or infinity in {dtype}"
    return a, b
