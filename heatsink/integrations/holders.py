"""Whose adapters networks have that several pipelines may share."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from heatsink.runtime.errors import AdapterError
from heatsink.runtime.merge import Merger


@dataclass(eq=False)
class Holder:
    """Whose adapters some networks have.

    Attributes:
        adapters: they.
        merger: what takes them off the weights, while some are merged: it outlives a pipeline that
            is gone without closing them.
    """

    adapters: weakref.ref[Any]
    merger: Merger | None = None


# Networks may be shared by pipelines: the adapters of one are nobody else's pristine weights.
HOLDERS: weakref.WeakKeyDictionary[nn.Module, Holder] = weakref.WeakKeyDictionary()


def restore(modules: Mapping[str, nn.Module]) -> None:
    """Put back what a pipeline left in these networks that is gone without closing its adapters.

    Raises:
        AdapterError: a pipeline that is not gone has adapters in them, or weights were written
            since: what is pristine is unknown then.
    """
    left: dict[Holder, str] = {}
    for component, module in modules.items():
        holder = HOLDERS.get(module)
        if holder is None:
            continue
        if holder.adapters() is not None:
            raise AdapterError(
                f"the {component} has adapters from another pipeline: close() them first"
            )
        left.setdefault(holder, component)
    for holder, component in left.items():
        if holder.merger is None:
            continue
        if changed := holder.merger.changed:
            raise AdapterError(
                f"the {component} has adapters from a pipeline that is gone, and {changed[0]} was"
                " moved, cast or written since: load the network anew"
            )
        holder.merger.release()
        holder.merger = None
