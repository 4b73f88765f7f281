"""Who copies adapters into the bank's slots beside the work: a thread, or a stream of its own.

Loads of one loader run one after the other, in the order in which they were submitted. A slot that
changes its owner twice before the first copy has begun still ends with the second owner's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from heatsink.runtime.errors import ResourceError

Write = Callable[[], None]
Mark = tuple[int, Any]
"""What was queued on a stream until now: the stream's handle, and an event."""


class Load(Protocol):
    """A copy under way, or done."""

    @property
    def failed(self) -> bool:
        """Whether it has ended without having copied everything."""

    def wait(self) -> None:
        """Whatever the caller queues from here on comes after the copy.

        On the CPU the caller waits; on a GPU its current stream does.

        Raises:
            ResourceError: the copy failed.
        """

    def finish(self) -> None:
        """Block until the bytes are there; raises as `wait`."""


class Loader(Protocol):
    """Runs copies beside the work."""

    def submit(self, write: Write, after: Iterable[Mark]) -> Load:
        """Queue `write` behind the earlier loads and behind the uses that `after` marks."""

    def mark(self) -> Mark | None:
        """Mark what the caller has queued until now; None where nothing outlives the call."""


class ThreadLoad:
    """A copy on the worker thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._future.done() and self._future.exception() is not None

    def wait(self) -> None:
        """Block until the bytes are there."""
        try:
            self._future.result()
        except (RuntimeError, MemoryError) as cause:
            raise _fault(cause) from cause

    finish = wait


class ThreadLoader:
    """Copies on one worker thread: for memory of the CPU, whose users are done when they return."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="heatsink-adapters")

    def submit(self, write: Write, after: Iterable[Mark]) -> Load:
        """See `Loader`."""
        return ThreadLoad(self._worker.submit(write))

    def mark(self) -> Mark | None:
        """See `Loader`."""
        return None


class StreamLoad:
    """A copy on the side stream."""

    def __init__(self, ready: torch.cuda.Event, device: torch.device, fault: Exception | None):
        self._ready, self._device, self._fault = ready, device, fault

    @property
    def failed(self) -> bool:
        """Whether it could not be queued."""
        return self._fault is not None

    def wait(self) -> None:
        """Make the current stream wait."""
        self._check()
        torch.cuda.current_stream(self._device).wait_event(self._ready)

    def finish(self) -> None:
        """Block until the bytes are there."""
        self._check()
        self._ready.synchronize()

    def _check(self) -> None:
        if self._fault is not None:
            raise _fault(self._fault) from self._fault


class StreamLoader:
    """Copies on a CUDA stream of its own, ordered by events against the streams that compute.

    Args:
        device: a CUDA device.
        tensors: what will be written; made on the current stream.
    """

    def __init__(self, device: torch.device, tensors: Iterable[Tensor]) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in tensors:
            # Their memory is not given to others before the last copy is done.
            tensor.record_stream(self._stream)

    def submit(self, write: Write, after: Iterable[Mark]) -> Load:
        """See `Loader`."""
        fault = None
        with torch.cuda.stream(self._stream):
            for _, event in after:
                self._stream.wait_event(event)
            try:
                write()
            except RuntimeError as error:
                fault = error
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return StreamLoad(ready, self._device, fault)

    def mark(self) -> Mark | None:
        """See `Loader`."""
        stream = torch.cuda.current_stream(self._device)
        event = torch.cuda.Event()
        event.record(stream)
        return stream.cuda_stream, event


def make_loader(device: torch.device, tensors: Iterable[Tensor]) -> Loader:
    """The loader for memory of this device."""
    return StreamLoader(device, tensors) if device.type == "cuda" else ThreadLoader()


def _fault(cause: BaseException) -> ResourceError:
    return ResourceError(f"an adapter could not be copied into its slot: {cause}")
