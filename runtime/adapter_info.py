"""What a bank says of itself and of its adapters."""

from __future__ import annotations

from dataclasses import dataclass

from heatsink.runtime.adapter_receipt import AdapterReceipt


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a bank.

    Attributes:
        name: of the adapter.
        digest: of its content; two names with one digest share a slot.
        modules: what it changes, `component.module_path`.
        slot: where it is loaded, or None.
        pinned: whether it stays there.
        receipt: where it came from a file, what became of each key.
    """

    name: str
    digest: str
    modules: tuple[str, ...]
    slot: int | None = None
    pinned: bool = False
    receipt: AdapterReceipt | None = None


@dataclass(frozen=True)
class BankStats:
    """A bank in figures.

    Attributes:
        device_bytes: of the slots, whatever is in them.
        host_bytes: of the adapters in the registry.
        slots: how many there are.
        used: how many hold an adapter.
        leased: how many are held by requests under way.
        pinned: how many stay as they are.
        hits: how often an adapter was asked for and in its slot (or on its way).
        loads: how often one was copied into a slot.
        evictions: how often another one had to go for it.
    """

    device_bytes: int
    host_bytes: int
    slots: int
    used: int
    leased: int
    pinned: int
    hits: int
    loads: int
    evictions: int
