"""The gate between requests and merges: a weight changes only while no request reads it.

A request holds the gate for its whole life, from its first component to its last, so that no image
is made of two sets of weights. A merge waits until none is under way, and keeps later requests out
until it is done. Whoever comes first is served first: a stream of requests can't starve a merge,
nor merges a request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from heatsink.runtime.errors import MergeTimeout, WaitsForItself


class MergeGate:
    """Any number of requests, or one merge; in order of arrival."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Tickets of those who wait, oldest first; True is a merge's.
        self._waiting: deque[list[bool]] = deque()
        # How many requests each thread holds.
        self._requests: dict[int, int] = {}
        self._merging: int | None = None

    @property
    def requests(self) -> int:
        """How many requests are under way."""
        with self._changed:
            return sum(self._requests.values())

    @property
    def waiting(self) -> int:
        """How many requests and merges wait."""
        with self._changed:
            return len(self._waiting)

    @contextmanager
    def request(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the gate for a request's whole life; entered and left by one thread.

        A thread that holds a request enters again at once: waiting behind a merge that waits for
        this very thread would never end.

        Args:
            timeout: seconds to wait for merges before it; None waits for ever.

        Raises:
            MergeTimeout: merges took longer.
            WaitsForItself: this thread is merging.
        """
        me = threading.get_ident()
        with self._changed:
            if self._merging == me:
                raise WaitsForItself("a merge can't run a request: it would wait for itself")
            if me not in self._requests:
                self._wait(False, lambda: self._merging is None, timeout, "a request")
            self._requests[me] = self._requests.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._requests[me] -= 1
                if not self._requests[me]:
                    del self._requests[me]
                self._changed.notify_all()

    @contextmanager
    def merge(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the gate alone.

        Args:
            timeout: seconds to wait for the requests under way; None waits for ever. Meanwhile no
                later request begins.

        Raises:
            MergeTimeout: they took longer; nothing was changed, and requests begin again.
            WaitsForItself: this thread holds a request or merges already.
        """
        me = threading.get_ident()
        with self._changed:
            if me in self._requests or self._merging == me:
                raise WaitsForItself(
                    "this thread is inside a request or merge: it can't wait for it"
                )
            self._wait(
                True, lambda: self._merging is None and not self._requests, timeout, "a merge"
            )
            self._merging = me
        try:
            yield
        finally:
            with self._changed:
                self._merging = None
                self._changed.notify_all()

    def _wait(self, merge: bool, free: Callable[[], bool], timeout: float | None, who: str) -> None:
        """Queue until `free` and nobody before this one stands in its way."""
        ticket = [merge]
        self._waiting.append(ticket)
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while not (free() and self._in_turn(ticket)):
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise MergeTimeout(
                        f"{who} waited {timeout} s: {sum(self._requests.values())} requests"
                        f" {'and a merge ' if self._merging is not None else ''}are under way,"
                        f" {len(self._waiting) - 1} others wait"
                    )
                self._changed.wait(left)
        finally:
            # By identity: tickets of a kind are equal.
            self._waiting = deque(each for each in self._waiting if each is not ticket)
            self._changed.notify_all()

    def _in_turn(self, ticket: list[bool]) -> bool:
        """Whether nobody came before; requests pass together, so before a request only merges."""
        for other in self._waiting:
            if other is ticket:
                return True
            if ticket[0] or other[0]:
                return False
        return True
