"""Calls of `heatsink::<op>_out` kept in C++ and made again: no Python, no dispatcher, no boxing.

A call that is recorded is not made. It holds its tensors, so that they live as long as the
recorder, and works on what lies in them when it is replayed. `csrc/recorder.h` has the rest.

Replays let go of Python's lock. They don't lock the tensors: two at once need tensors of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels import _native

torch.library.define("heatsink::program_new", "() -> int")
torch.library.define("heatsink::program_record", "(int program, str label) -> ()")
torch.library.define("heatsink::program_close", "() -> int")
torch.library.define("heatsink::program_replay", "(int program, int first, int last) -> ()")
torch.library.define("heatsink::program_free", "(int program) -> ()")
torch.library.define("heatsink::program_memory", "(Tensor memory) -> ()")
_native.load()


def static_memory(size: int) -> Tensor:
    """Bytes on the CPU for calls to work on, in pages of 2 MB where the system has them."""
    memory = torch.empty(size, dtype=torch.uint8)
    if _native.available():
        torch.ops.heatsink.program_memory.default(memory)
    return memory


class Recorder:
    """A growing list of calls.

    Attributes:
        calls: how many it holds.
    """

    def __init__(self) -> None:
        """An empty list.

        Raises:
            RuntimeError: if the C++ extension is not in use.
        """
        if not _native.available():
            raise RuntimeError(f"calls can't be recorded: {_native.describe()}")
        ops = torch.ops.heatsink
        self._program: int = ops.program_new.default()
        weakref.finalize(self, ops.program_free.default, self._program)
        self.calls = 0

    def record(self, call: Callable[[], Any], label: str) -> bool:
        """Keep the op's call that `call` makes.

        Args:
            call: calls one op of this package on CPU tensors, and does nothing else.
            label: how an error names it.

        Returns:
            Whether it was kept. If not, because the op is none that can be, it has been made.
        """
        ops = torch.ops.heatsink
        ops.program_record.default(self._program, label)
        before = self.calls
        try:
            call()
        finally:
            self.calls = ops.program_close.default()
        return self.calls == before + 1

    def replay(self, first: int = 0, last: int | None = None) -> None:
        """Make calls `first` to `last` (exclusive) in order.

        Raises:
            RuntimeError: a call's error, behind its label.
        """
        self.replayer(first, self.calls if last is None else last)()

    def replayer(self, first: int, last: int) -> Callable[[], None]:
        """`replay` of these calls with nothing left to look up; it keeps the recorder."""
        replay: Any = torch.ops.heatsink.program_replay.default._op

        def run() -> None:
            replay(self._program, first, last)

        return run
