"""The adapter bank: a registry of adapters in host memory, and fixed slots where rows find them.

Requests name adapters; the bank knows them by content. A request holds its adapters' slots by a
lease: while it does, they are not written. Loading goes on beside the work, and never changes what
runs.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_file import Targets
from heatsink.runtime.adapter_info import AdapterInfo, BankStats
from heatsink.runtime.adapter_lease import Lease
from heatsink.runtime.adapter_loads import Loader, make_loader
from heatsink.runtime.adapter_memory import SlotMemory
from heatsink.runtime.adapter_mix import Mix
from heatsink.runtime.adapter_receipt import AdapterReceipt
from heatsink.runtime.adapter_slots import Slot, SlotTable
from heatsink.runtime.adapter_stack import StackedAdapter, stack
from heatsink.runtime.errors import InvalidRequest, NotBuilt, UnknownAdapter
from heatsink.runtime.port_layout import PortLayout

_DIGEST = re.compile(r"[0-9a-f]{64}")


class AdapterBank:
    """Adapters of one engine; safe to use from several threads.

    Args:
        layouts: one for each component with ports; all with the same number of slots.
        targets: the modules of the model, for reading files; without them only deltas are taken.
        device: where the slots are.
        dtype: of the slots.
        loader: who copies into slots; a worker thread on the CPU, a side stream on a GPU.
        most: by component, how many adapters a row of it may have; any number where it is missing.

    Raises:
        ValueError: no layout, two for one component, or different numbers of slots.
    """

    def __init__(
        self,
        layouts: Sequence[PortLayout],
        *,
        targets: Targets | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        loader: Loader | None = None,
        most: Mapping[str, int] | None = None,
    ) -> None:
        self.layouts = {layout.component: layout for layout in layouts}
        counts = {layout.slots for layout in layouts}
        if len(counts) != 1 or len(self.layouts) != len(layouts):
            told = ", ".join(f"{each.component} with {each.slots} slots" for each in layouts)
            raise ValueError(
                f"layouts: expected one for each component, with one number of slots, got [{told}]"
            )
        self.slots = counts.pop()
        self.targets, self.dtype, self.most = targets, dtype, dict(most or {})
        self._pin_memory = torch.device(device).type == "cuda"
        self._memory = SlotMemory(self.layouts, torch.device(device), dtype)
        loader = loader or make_loader(torch.device(device), self._memory.all())
        self._table = SlotTable(self.slots, self._memory, loader, self._called)
        self._names: dict[str, str] = {}
        self._receipts: dict[str, AdapterReceipt | None] = {}
        self._adapters: dict[str, StackedAdapter] = {}
        self._pins: set[str] = set()
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<AdapterBank {self.slots} slots {sorted(self.layouts)} {sorted(self._names)}>"

    def tensors(self, component: str) -> dict[str, Tensor]:
        """The component's bank tensors by input name; never allocated anew."""
        return dict(self._memory.tensors[component])

    def ranks(self, component: str) -> dict[str, Tensor]:
        """How many ranks count of the rows of `tensors`, for the native engine; as lasting."""
        return dict(self._memory.ranks[component])

    def content(self, slot: int) -> str:
        """The digest of the adapter in a slot; "" of an empty one."""
        return self._table.content(slot)

    # The registry

    def add(
        self, name: str, deltas: Iterable[AdapterDelta], receipt: AdapterReceipt | None = None
    ) -> AdapterInfo:
        """Take an adapter into the registry; it is loaded when it is first needed.

        A name that is there already stands for the new content from now on, without its pin;
        requests under way go on with the old.

        Args:
            name: not empty, and no SHA-256.
            deltas: copied; what they are mapped from may go.
            receipt: of the file they came from, for `AdapterInfo`.

        Raises:
            InvalidRequest: the name is none.
            AdapterError: the adapter does not fit; see `stack`. The bank is as before.
        """
        name = _spelled(name)
        adapter = stack(deltas, self.layouts, dtype=self.dtype, pinned=self._pin_memory)
        with self._lock:
            if self._names.get(name) != adapter.digest:
                self._pins.discard(name)
            # Where the content is there under another name, its copy serves both.
            self._adapters.setdefault(adapter.digest, adapter)
            self._names[name] = adapter.digest
            self._receipts[name] = receipt
            self._forget_unnamed()
            return self.info(name)

    def remove(self, name: str) -> None:
        """Forget a name; its content too, unless another name stands for it.

        A digest stands for all names of its content. Requests under way keep what they hold.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        with self._lock:
            self.check([name])
            key = _key(name)
            gone = [each for each, digest in self._names.items() if key in (each, digest)]
            for each in gone:
                self._names.pop(each)
                self._pins.discard(each)
            self._forget_unnamed()

    def _forget_unnamed(self) -> None:
        named = set(self._names.values())
        self._adapters = {d: adapter for d, adapter in self._adapters.items() if d in named}
        self._receipts = {name: self._receipts[name] for name in self._names}
        self._pins = {name for name in self._pins if self._digest(name) in named}
        self._table.sweep(self._adapters)

    def check(self, names: Iterable[str]) -> None:
        """See that all names (or digests) are known.

        Raises:
            UnknownAdapter: lists those that are not, and those that are.
        """
        with self._lock:
            unknown = [name for name in names if self._digest(name) not in self._adapters]
            known = sorted(self._names)
        if unknown:
            told = ", ".join(known) or "there is none; add one first"
            raise UnknownAdapter(
                f"adapters: no {', '.join(map(repr, unknown))} here: {told}", known
            )

    def info(self, name: str) -> AdapterInfo:
        """What is known of a name.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        with self._lock:
            self.check([name])
            digest = self._digest(name)
            slot = self._table.find(digest)
            return AdapterInfo(
                _key(name),
                digest,
                self._adapters[digest].modules,
                slot.number if slot else None,
                digest in self._pinned(),
                self._receipts.get(_key(name)),
            )

    def infos(self) -> dict[str, AdapterInfo]:
        """All adapters by name."""
        with self._lock:
            return {name: self.info(name) for name in sorted(self._names)}

    # In use

    def mix(self, weights: Mapping[str, float]) -> Mix:
        """What a request with these adapters uses; nothing is loaded or held.

        Args:
            weights: by name (or digest).

        Raises:
            UnknownAdapter: a name is not known.
            InvalidRequest: a weight is not finite in float32.
            NotBuilt: a component has no room for so many in a row.
        """
        with self._lock:
            self.check(weights)
            found = Mix.of(weights, self._digest)
            for component, most in self.most.items():
                own = {d for d in found.weights if component in self._adapters[d].components}
                if len(own) > most:
                    names = ", ".join(use.name for use in found.uses if use.digest in own)
                    raise NotBuilt(
                        f"adapters: this engine takes {most} at once in its {component}, the "
                        f"request has {len(own)} ({names}); use fewer, or fuse some into an engine "
                        "at build time with `--fuse FILE:SCALE`"
                    )
            return found

    def acquire(self, *mixes: Mapping[str, float]) -> Lease:
        """Hold the slots of all adapters of several requests, all or none; loads what is missing.

        Args:
            *mixes: for each request the weights of its adapters by name (or digest).

        Raises:
            UnknownAdapter: a name is not known.
            InvalidRequest, NotBuilt: as `mix`.
            CapacityError: more different adapters than there is room for.
        """
        with self._lock:
            self.check(dict.fromkeys(name for mix in mixes for name in mix))
            resolved = [self.mix(mix) for mix in mixes]
            digests = sorted({digest for mix in resolved for digest in mix.weights})
            claimed = self._table.claim([self._adapters[d] for d in digests], self._pinned())
            return Lease(resolved, dict(zip(digests, claimed, strict=True)), self._release)

    def _release(self, slots: Iterable[Slot]) -> None:
        with self._lock:
            self._table.release(list(slots), self._adapters)

    def prefetch(self, name: str) -> None:
        """Begin to load an adapter if it is not there, without holding it.

        Raises:
            UnknownAdapter, CapacityError: as `acquire`.
        """
        self.acquire({name: 1.0}).release()

    def pin(self, name: str) -> None:
        """Load an adapter and keep it in its slot until `unpin`, or until the name goes.

        Raises:
            UnknownAdapter, CapacityError: as `acquire`.
        """
        with self._lock:
            self.prefetch(name)
            self._pins.add(_key(name))

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again; does nothing where it is not pinned."""
        with self._lock:
            self._pins.discard(_key(name))

    def _pinned(self) -> set[str]:
        return {self._digest(name) for name in self._pins}

    def _digest(self, name: str) -> str:
        """A digest stands for itself."""
        key = _key(name)
        return self._names.get(key, key)

    def _called(self, digest: str) -> str:
        names = [name for name, each in sorted(self._names.items()) if each == digest]
        return " = ".join(names) or f"{digest[:12]} (removed)"

    # For people

    def stats(self) -> BankStats:
        """The bank in figures."""
        with self._lock:
            pinned, slots = self._pinned(), self._table.slots
            held = [slot.adapter.digest for slot in slots if slot.adapter is not None]
            return BankStats(
                device_bytes=self._memory.bytes,
                host_bytes=sum(adapter.bytes for adapter in self._adapters.values()),
                slots=self.slots,
                used=len(held),
                leased=sum(slot.leases > 0 for slot in slots),
                pinned=sum(digest in pinned for digest in held),
                **self._table.counts.__dict__,
            )

    def slot_digest(self, name: str) -> str:
        """The digest that a slot must have while it holds this adapter.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        with self._lock:
            self.check([name])
            adapter = self._adapters[self._digest(name)]
        return self._memory.expected(adapter)

    def verify(self, slot: int) -> bool:
        """Read a slot's bytes back and compare their digest with its adapter's.

        Raises:
            ValueError: there is no such slot, or nothing is in it.
            ResourceError: its copy failed.
        """
        with self._lock:
            place = self._table.slots[slot] if 0 <= slot < self.slots else Slot(slot)
            adapter, load = place.adapter, place.load
            if adapter is None or load is None:
                raise ValueError(f"slot: expected one that holds an adapter, got {slot}")
            place.leases += 1
        try:
            load.finish()
            return self._memory.digest(slot) == self._memory.expected(adapter)
        finally:
            self._release([place])


def _spelled(name: str) -> str:
    if not isinstance(name, str) or not name or _DIGEST.fullmatch(name):
        raise InvalidRequest(f"name: expected a text that is no SHA-256, got {name!r}")
    return _key(name)


def _key(name: str) -> str:
    """The one spelling under which a name is kept and found."""
    return unicodedata.normalize("NFC", name)
