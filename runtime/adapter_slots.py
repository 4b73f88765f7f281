"""Which adapter is in which slot: leases, pins, and who has to go when there is no room."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from heatsink.runtime.adapter_loads import Load, Loader, Mark
from heatsink.runtime.adapter_memory import SlotMemory
from heatsink.runtime.adapter_stack import StackedAdapter
from heatsink.runtime.errors import CapacityError


@dataclass
class Slot:
    """One place of the bank.

    Attributes:
        number: of the slot.
        adapter: whose bytes are here, or on their way; None where nothing counts.
        load: the copy that brought them.
        leases: how many hold it. While there is one, its bytes don't change.
        used: the table's clock when it was last claimed.
        marks: for each stream that used the slot, its last use; a copy comes after them all.
    """

    number: int
    adapter: StackedAdapter | None = None
    load: Load | None = None
    leases: int = 0
    used: int = 0
    marks: dict[int, Mark] = field(default_factory=dict)


@dataclass
class Counts:
    """How often an adapter was found in its slot, loaded, and pushed out by another."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class SlotTable:
    """The slots of a bank. Its owner locks; nothing here waits.

    Args:
        count: of slots.
        memory: what they are written in.
        loader: who writes.
        called: what people call the adapter of a digest.
    """

    def __init__(
        self, count: int, memory: SlotMemory, loader: Loader, called: Callable[[str], str]
    ) -> None:
        self.slots = [Slot(number) for number in range(count)]
        self.counts = Counts()
        self._memory, self._loader, self._called = memory, loader, called
        self._clock = 0

    def find(self, digest: str) -> Slot | None:
        """The slot that holds the adapter of this digest, or will when its copy is done."""
        for slot in self.slots:
            if slot.adapter is not None and slot.adapter.digest == digest:
                return slot
        return None

    def content(self, number: int) -> str:
        """The digest of what a slot holds, or will when its copy is done; "" of an empty one."""
        adapter = self.slots[number].adapter
        return "" if adapter is None else adapter.digest

    def claim(self, adapters: Sequence[StackedAdapter], pinned: Collection[str]) -> list[Slot]:
        """Lease a slot for each of several different adapters; those that are missing are loaded.

        Empty slots are taken first, then the least recently used of those that are neither leased
        nor pinned.

        Args:
            adapters: without repetition.
            pinned: digests that stay where they are.

        Raises:
            CapacityError: there is no room for all; nothing has changed then.
        """
        found = [self.find(adapter.digest) for adapter in adapters]
        kept = {adapter.digest for adapter in adapters}.union(pinned)
        free = [
            slot
            for slot in self.slots
            if slot.adapter is None or not (slot.leases or slot.adapter.digest in kept)
        ]
        missing = found.count(None)
        if missing > len(free):
            raise self._full(len(adapters), missing, len(free), pinned)
        places = iter(sorted(free, key=lambda s: (s.adapter is not None, s.used, s.number)))
        claimed = [slot or next(places) for slot in found]
        for adapter, slot in zip(adapters, claimed, strict=True):
            self._fill(slot, adapter)
        self._clock += 1
        for slot in claimed:
            slot.leases += 1
            slot.used = self._clock
        return claimed

    def _fill(self, slot: Slot, adapter: StackedAdapter) -> None:
        """Make sure that the adapter is in this slot, or on its way to it."""
        same = slot.adapter is not None and slot.adapter.digest == adapter.digest
        if same and slot.load is not None and not slot.load.failed:
            self.counts.hits += 1
            return
        # A copy that failed is done again where it was: the bytes are the same.
        number, marks = slot.number, list(slot.marks.values())
        load = self._loader.submit(lambda: self._memory.write(number, adapter), marks)
        self.counts.loads += 1
        self.counts.evictions += slot.adapter is not None and not same
        slot.adapter, slot.load, slot.marks = adapter, load, {}

    def release(self, slots: Sequence[Slot], known: Collection[str]) -> None:
        """Give claimed slots back; those of adapters that are no longer `known` become empty."""
        mark = self._loader.mark() if slots else None
        for slot in slots:
            if mark is not None:
                slot.marks[mark[0]] = mark
            slot.leases -= 1
        self.sweep(known)

    def sweep(self, known: Collection[str]) -> None:
        """Empty the slots that nobody holds and whose adapters are not `known`."""
        for slot in self.slots:
            if slot.adapter is not None and not slot.leases and slot.adapter.digest not in known:
                slot.adapter = slot.load = None

    def _full(self, wanted: int, missing: int, free: int, pinned: Collection[str]) -> CapacityError:
        holders = {
            slot.number: self._holder(slot, slot.adapter, pinned)
            for slot in self.slots
            if slot.adapter is not None
        }
        count = len(self.slots)
        told = "; ".join(f"slot {number}: {holder}" for number, holder in holders.items())
        if wanted > count:
            return CapacityError(
                f"adapters: {wanted} different ones are asked for at once, and this bank has "
                f"{count} slots: ask for {count} at most in one call, or build an engine with "
                f"--adapters {wanted}xRANK",
                holders,
            )
        return CapacityError(
            f"adapters: {missing} more of the bank's {count} slots are needed and {free} are free; "
            f"try again when others are done, or unpin ({told})",
            holders,
        )

    def _holder(self, slot: Slot, adapter: StackedAdapter, pinned: Collection[str]) -> str:
        state = []
        if slot.leases:
            state.append(f"{slot.leases} running")
        if adapter.digest in pinned:
            state.append("pinned")
        return f"{self._called(adapter.digest)}, {' and '.join(state) or 'idle'}"
