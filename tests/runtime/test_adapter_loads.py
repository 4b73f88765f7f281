"""Loading beside the work: nothing that runs is changed, whoever comes in between."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_loads import Load, Mark, ThreadLoader, Write
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.errors import CapacityError, ResourceError
from heatsink.runtime.port_layout import PortLayout

SLOTS = 2
LAYOUT = PortLayout.of("unet", SLOTS, 2, {"to_q": (3, 4), "to_k": (3, 4)})


class Held(ThreadLoader):
    """A worker thread that copies nothing before it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)
        self.fault: Exception | None = None
        self.submitted = 0

    def submit(self, write: Write, after: Iterable[Mark]) -> Load:
        self.submitted += 1

        def run() -> None:
            assert self.allowed.acquire(timeout=30)
            if self.fault is not None:
                raise self.fault
            write()

        return super().submit(run, after)

    def allow(self, count: int = 1) -> None:
        self.allowed.release(count)


def style(number: int) -> list[AdapterDelta]:
    """Every value of the adapter is its number, so that a torn copy shows."""
    a, b = torch.full((2, 4), float(number)), torch.full((3, 2), float(number))
    return [AdapterDelta("unet", path, a, b) for path in ("to_k", "to_q")]


@pytest.fixture
def loader() -> Held:
    return Held()


@pytest.fixture
def bank(loader: Held) -> AdapterBank:
    made = AdapterBank([LAYOUT], loader=loader)
    for number in range(1, 6):
        made.add(f"s{number}", style(number))
    return made


def values(bank: AdapterBank, slot: int) -> set[float]:
    """All numbers in a slot."""
    return {
        float(value)
        for tensor in bank.tensors("unet").values()
        for value in tensor.unflatten(0, (-1, bank.slots))[:, slot].unique()
    }


def test_acquiring_does_not_wait_and_waiting_does(bank: AdapterBank, loader: Held) -> None:
    lease = bank.acquire({"s1": 1.0})
    ((slot, _),) = lease.entries(0, "unet")
    assert values(bank, slot) == {0.0}
    arrived = threading.Event()

    def wait() -> None:
        lease.wait()
        arrived.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not arrived.wait(0.05)
    loader.allow()
    waiting.join(30)
    assert arrived.is_set()
    assert values(bank, slot) == {1.0}
    lease.release()


def test_what_is_there_need_not_wait_for_what_comes(bank: AdapterBank, loader: Held) -> None:
    loader.allow()
    bank.prefetch("s1")
    bank.prefetch("s2")
    with bank.acquire({"s1": 1.0}) as lease:
        # s2's copy is still held back.
        lease.wait()
        assert bank.info("s2").slot is not None
        assert values(bank, lease.entries(0, "unet")[0][0]) == {1.0}
    loader.allow()


def test_a_second_request_waits_for_the_same_copy(bank: AdapterBank, loader: Held) -> None:
    first, second = bank.acquire({"s1": 1.0}), bank.acquire({"s1": 0.5})
    assert loader.submitted == 1
    assert first.entries(0, "unet")[0][0] == second.entries(0, "unet")[0][0]
    first.release()
    # The second still holds it: there is room for one more, not for two.
    with pytest.raises(CapacityError, match="s1, 1 running"):
        bank.acquire({"s2": 1.0, "s3": 1.0})
    loader.allow()
    second.wait()
    second.release()
    assert bank.stats().hits == 1


def test_a_slot_that_changes_hands_before_its_copy_ends_with_the_last(
    bank: AdapterBank, loader: Held
) -> None:
    for name in ("s1", "s2", "s3", "s4"):
        bank.prefetch(name)
    lease = bank.acquire({"s4": 1.0})
    ((slot, _),) = lease.entries(0, "unet")
    assert slot == 1
    loader.allow(4)
    lease.wait()
    assert values(bank, 1) == {4.0}
    assert bank.verify(0)
    assert values(bank, 0) == {3.0}
    lease.release()
    assert bank.stats().evictions == 2


def test_an_adapter_that_is_removed_on_its_way_does_no_harm(
    bank: AdapterBank, loader: Held
) -> None:
    bank.prefetch("s1")
    bank.remove("s1")
    assert bank.stats().used == 0
    lease = bank.acquire({"s2": 1.0})
    loader.allow(2)
    lease.wait()
    assert values(bank, lease.entries(0, "unet")[0][0]) == {2.0}
    lease.release()


def test_a_copy_that_fails_is_told_and_done_again(bank: AdapterBank, loader: Held) -> None:
    loader.fault = RuntimeError("out of memory")
    loader.allow()
    with (
        bank.acquire({"s1": 1.0}) as lease,
        pytest.raises(ResourceError, match="could not be copied into its slot: out of memory"),
    ):
        lease.wait()
    assert bank.stats().leased == 0
    loader.fault = None
    loader.allow()
    with bank.acquire({"s1": 1.0}) as lease:
        lease.wait()
        ((slot, _),) = lease.entries(0, "unet")
        assert values(bank, slot) == {1.0}
        assert bank.verify(slot)
    assert (bank.stats().loads, bank.stats().hits, bank.stats().evictions) == (2, 0, 0)


def test_a_request_under_way_never_sees_another_adapter() -> None:
    # More adapters than slots and more threads than both; copies take a while.
    class Slow(ThreadLoader):
        def submit(self, write: Write, after: Iterable[Mark]) -> Load:
            def run() -> None:
                time.sleep(0.0005)
                write()

            return super().submit(run, after)

    bank = AdapterBank([PortLayout.of("unet", 3, 2, {"to_q": (3, 4)})], loader=Slow())
    for number in range(1, 7):
        bank.add(f"s{number}", style(number)[1:])
    served = []

    def work(worker: int) -> int:
        chance, done = random.Random(worker), 0
        while done < 40:
            names = chance.sample(range(1, 7), chance.choice((1, 2)))
            try:
                lease = bank.acquire({f"s{number}": 1.0 for number in names})
            except CapacityError:
                time.sleep(0)
                continue
            with lease:
                lease.wait()
                use = {u.digest: u.name for u in lease.mixes[0].uses}
                slots = [slot for slot, _ in lease.entries(0, "unet")]
                for _ in range(2):
                    found = [values(bank, slot) for slot in slots]
                    expected = [{float(use[d][1:])} for d in lease.mixes[0].weights]
                    assert found == expected
                    time.sleep(0)
            if chance.random() < 0.2:
                # Names come and go meanwhile.
                bank.add(f"s{names[0]}", style(names[0])[1:])
                bank.add(f"more {worker}", style(names[0])[1:])
                bank.remove(f"more {worker}")
            served.append(worker)
            done += 1
        return done

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [40] * 4
    stats = bank.stats()
    assert stats.leased == 0
    assert stats.evictions > 3
    assert stats.hits > 3
    assert all(bank.verify(slot) for slot in range(3))


# On a GPU


@pytest.mark.gpu
def test_a_stream_of_its_own_loads_between_uses() -> None:
    device = torch.device("cuda")
    layout = PortLayout.of("unet", 1, 64, {f"m{i}": (512, 512) for i in range(8)})
    bank = AdapterBank([layout], device=device)
    pointer = bank.tensors("unet")["bank.0.a"].data_ptr()
    for number in (1, 2):
        deltas = [
            AdapterDelta("unet", path, torch.full((64, 512), float(number)), torch.ones(512, 64))
            for path in layout.groups[0].members
        ]
        bank.add(f"s{number}", deltas)
    seen = []
    for turn in range(20):
        with bank.acquire({f"s{turn % 2 + 1}": 1.0}) as lease:
            lease.wait()
            # Work that is still queued when the lease is given back.
            torch.cuda._sleep(2_000_000)
            seen.append(bank.tensors("unet")["bank.0.a"].amax().clone())
            seen.append(bank.tensors("unet")["bank.0.a"].amin().clone())
    torch.cuda.synchronize()
    assert [float(value) for value in seen] == [float(turn // 2 % 2 + 1) for turn in range(40)]
    assert bank.verify(0)
    assert bank.stats().evictions == 19
    assert bank.tensors("unet")["bank.0.a"].data_ptr() == pointer


@pytest.mark.gpu
def test_acquiring_does_not_wait_for_a_busy_gpu() -> None:
    bank = AdapterBank([LAYOUT], device="cuda")
    bank.add("s1", style(1))
    bank.add("s2", style(2))
    torch.cuda.synchronize()
    with bank.acquire({"s1": 1.0}) as lease:
        lease.wait()
        torch.cuda._sleep(500_000_000)
        busy = torch.cuda.Event()
        busy.record()
        # The other slot is loaded while the first is in use.
        with bank.acquire({"s2": 1.0}) as other:
            for load in other._loads:
                load.finish()
            assert not busy.query()
    torch.cuda.synchronize()
    assert all(bank.verify(slot) for slot in range(SLOTS))


@pytest.mark.gpu
def test_several_streams_may_use_one_slot() -> None:
    bank = AdapterBank([PortLayout.of("unet", 1, 2, {"to_q": (3, 4)})], device="cuda")
    bank.add("s1", style(1)[1:])
    bank.add("s2", style(2)[1:])
    torch.cuda.synchronize()
    seen = []
    for _ in range(10):
        for name in ("s1", "s1", "s2"):
            with torch.cuda.stream(torch.cuda.Stream()), bank.acquire({name: 1.0}) as lease:
                lease.wait()
                torch.cuda._sleep(1_000_000)
                seen.append(bank.tensors("unet")["bank.0.b"].amax().clone())
    torch.cuda.synchronize()
    assert [float(value) for value in seen] == [1.0, 1.0, 2.0] * 10
