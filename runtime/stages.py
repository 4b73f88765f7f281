"""The stages of a call: how long each takes, and what is reported of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


class Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time the block."""
        begun = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begun


@contextmanager
def staged(clock: Clock, report: Progress, name: str, total: int) -> Iterator[None]:
    """Time a stage and report its beginning and end; nothing is reported where nothing is done."""
    if total:
        report(name, 0, total)
    with clock.measure(name):
        yield
    if total:
        report(name, total, total)
