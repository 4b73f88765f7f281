"""CUDA graphs of programs: captured after a warm-up, on one stream, in one pool of memory.

What operators allocate while they are captured comes from the pool, so a replay allocates nothing
and runs no Python. Graphs of one `Graphs` never run at the same time: nothing in the pool outlives
a replay, and all of them may share it. The pool grows to what the hungriest needs if that one is
captured first, and to more otherwise; so the largest batch comes first.

Written without a CUDA device at hand: unmeasured, never run on a GPU (docs/graph.md).

Source: "CUDA graphs" and "Graph memory management" (https://docs.pytorch.org/docs/stable/notes/
cuda.html).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from heatsink.runtime.errors import CaptureFailed

# The first compiles, loads and looks up; the second goes the way that is captured.
WARM_UPS = 2
# PyTorch allows one capture at a time in a process.
_CAPTURING = threading.Lock()


class Captured:
    """A graph that was captured, to be run on the current stream."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def __call__(self) -> None:
        """Queue it."""
        self._graph.replay()


class Graphs:
    """Captures graphs that share a stream and a pool.

    Attributes:
        device: where they run.
        stream: that they are captured on, and that their owner replays them on.
        library_bytes: what warm-ups left allocated, which libraries keep for the stream (cuBLAS's
            workspace). Other threads' allocations meanwhile count too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.library_bytes = 0
        self._live: weakref.WeakSet[Captured] = weakref.WeakSet()
        self._pool: Any = None
        self._caller: torch.cuda.Stream | None = None

    @property
    def pool_bytes(self) -> int:
        """Device memory that the pool holds."""
        segments = torch.cuda.memory_snapshot()
        return sum(
            int(segment["total_size"])
            for segment in segments
            if self._pool is not None and tuple(segment["segment_pool_id"]) == tuple(self._pool)
        )

    def capture(self, run: Callable[[], None], what: str) -> Captured:
        """Warm up, and capture one call.

        Args:
            run: queues work on the current stream; it raises RuntimeError naming the operator.
            what: is captured, for messages.

        Raises:
            CaptureFailed: an operator waits for the device, or does something else that a graph
                can't hold.
            torch.OutOfMemoryError: there is no memory for it.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with _CAPTURING, torch.cuda.stream(self.stream):
            self._warm_up(run)
            try:
                found = self._record(run)
            except RuntimeError as error:
                # What failed may have left the pool half used.
                self._pool = None
                for cause in (error, error.__cause__):
                    if isinstance(cause, torch.OutOfMemoryError):
                        raise cause from None
                raise CaptureFailed(f"{what} can't be a CUDA graph: {error}") from error
        current.wait_stream(self.stream)
        self._live.add(found)
        return found

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Make the stream current: behind the caller's, which then waits for it.

        One thread at a time may be in it; it may enter again.
        """
        caller = torch.cuda.current_stream(self.device)
        if caller == self.stream:
            yield
            return
        self.stream.wait_stream(caller)
        self._caller = caller
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            self._caller = None
            caller.wait_stream(self.stream)

    def lend(self, values: Iterable[Tensor]) -> None:
        """Keep the memory of what was made on the stream until the caller's is done with it."""
        if self._caller is not None:
            for value in values:
                value.record_stream(self._caller)

    def _warm_up(self, run: Callable[[], None]) -> None:
        before = torch.cuda.memory_allocated(self.device)
        for _ in range(WARM_UPS):
            run()
        self.stream.synchronize()
        # What was allocated for this comes from the pool from now on.
        torch.cuda.empty_cache()
        self.library_bytes += max(0, torch.cuda.memory_allocated(self.device) - before)

    def _record(self, run: Callable[[], None]) -> Captured:
        if self._pool is None or not self._live:
            # PyTorch lets go of a pool with its last graph, and takes no name of one again.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate, and wait for their own work.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            run()
        except BaseException:
            # It says of a capture that failed that it failed; the first error says why.
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return Captured(graph)
