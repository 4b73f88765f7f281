"""The gate: no merge among requests, no request among merges, nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from heatsink.runtime.errors import MergeTimeout, WaitsForItself
from heatsink.runtime.merge_gate import MergeGate

LONG = 20.0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def hold(
    enter: Callable[[], object], entered: list[str], name: str, leave: threading.Event
) -> None:
    with enter():  # type: ignore[attr-defined]
        entered.append(name)
        assert leave.wait(LONG)


def test_requests_run_together_and_merges_alone() -> None:
    gate, state = MergeGate(), [0, 0]
    lock, most, merges = threading.Lock(), [0], [0]
    values = [0, 0]

    def request(_: int) -> None:
        with gate.request():
            with lock:
                state[0] += 1
                most[0] = max(most[0], state[0])
            seen = values[0]
            time.sleep(0.002)
            # A merge would show: it writes one value, waits, writes the other.
            assert values == [seen, seen]
            assert state[1] == 0
            with lock:
                state[0] -= 1

    def merge(_: int) -> None:
        with gate.merge():
            assert state == [0, 0]
            state[1] = 1
            values[0] += 1
            time.sleep(0.001)
            values[1] += 1
            merges[0] += 1
            state[1] = 0

    with ThreadPoolExecutor(12) as pool:
        done = [pool.submit(merge if i % 5 == 0 else request, i) for i in range(200)]
        for task in done:
            task.result(LONG)
    assert merges[0] == 40
    assert most[0] > 1
    assert (gate.requests, gate.waiting) == (0, 0)


def test_a_merge_keeps_later_requests_out_but_not_for_ever() -> None:
    gate, entered = MergeGate(), list[str]()
    leave = {name: threading.Event() for name in ("first", "merge", "second", "third", "last")}

    def start(pool: ThreadPoolExecutor, name: str) -> Future[None]:
        enter = gate.merge if name in ("merge", "last") else gate.request
        return pool.submit(hold, enter, entered, name, leave[name])

    with ThreadPoolExecutor(5) as pool:
        tasks = [start(pool, "first")]
        until(lambda: entered == ["first"])
        for waiting, name in enumerate(("merge", "second", "third", "last"), 1):
            tasks.append(start(pool, name))
            until(lambda waiting=waiting: gate.waiting == waiting)  # type: ignore[misc]
        assert entered == ["first"]
        leave["first"].set()
        until(lambda: len(entered) == 2)
        # No starvation: later requests did not pass the merge, and the later merge not them.
        assert entered == ["first", "merge"]
        leave["merge"].set()
        until(lambda: len(entered) == 4)
        assert set(entered[2:]) == {"second", "third"}
        assert gate.requests == 2
        leave["second"].set()
        leave["third"].set()
        until(lambda: entered[-1] == "last")
        leave["last"].set()
        for task in tasks:
            task.result(LONG)


def test_a_merge_that_times_out_lets_requests_in_again() -> None:
    gate, entered, leave = MergeGate(), list[str](), threading.Event()

    def merge() -> None:
        with gate.merge(timeout=0.05):
            entered.append("merge")

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(hold, gate.request, entered, "first", leave)
        until(lambda: entered == ["first"])
        merging = pool.submit(merge)
        until(lambda: gate.waiting == 1)
        second = pool.submit(hold, gate.request, entered, "second", leave)
        with pytest.raises(MergeTimeout, match=r"a merge waited 0\.05 s: 1 requests are under way"):
            merging.result(LONG)
        until(lambda: entered == ["first", "second"])
        leave.set()
        first.result(LONG)
        second.result(LONG)
    with gate.merge(timeout=0.0):
        assert gate.requests == 0


def test_a_request_times_out_behind_a_merge() -> None:
    gate, entered, leave = MergeGate(), list[str](), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(hold, gate.merge, entered, "merge", leave)
        until(lambda: entered == ["merge"])
        with (
            pytest.raises(MergeTimeout, match=r"a request waited .* a merge are under way"),
            gate.request(timeout=0.02),
        ):
            entered.append("request")
        leave.set()
        merging.result(LONG)
    assert entered == ["merge"]


def test_a_thread_does_not_wait_for_itself() -> None:
    gate, entered = MergeGate(), list[str]()

    def merge() -> None:
        with gate.merge():
            entered.append("merge")

    with ThreadPoolExecutor(1) as pool:
        with gate.request():
            merging = pool.submit(merge)
            until(lambda: gate.waiting == 1)
            # Behind the merge that waits for this thread: it would never end.
            with gate.request(timeout=1.0):
                assert gate.requests == 2
            with pytest.raises(WaitsForItself, match="inside a request or merge"), gate.merge():
                entered.append("never")
        merging.result(LONG)
    with gate.merge():
        with pytest.raises(WaitsForItself, match="would wait for itself"), gate.request():
            entered.append("never")
        with pytest.raises(WaitsForItself, match="inside a request or merge"), gate.merge():
            entered.append("never")
    assert entered == ["merge"]


def test_errors_inside_open_the_gate_again() -> None:
    gate = MergeGate()
    for enter in (gate.request, gate.merge, gate.request):
        with pytest.raises(ZeroDivisionError), enter():
            _ = 1 / 0
    assert (gate.requests, gate.waiting) == (0, 0)
