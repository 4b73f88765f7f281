"""A pipeline's calls, each inside of something from its beginning to its end.

Python looks `__call__` up on the class and never on the object, so the object gets a class of its
own: the same name, the same everything, but for a `__call__` around the one that it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from heatsink.runtime.errors import AdapterError


class PipelineCalls:
    """Puts every call of one pipeline inside of a context, from `start` to `stop`.

    Args:
        pipe: the pipeline.
        around: makes the context of a call. What it raises on entering, the call raises.
    """

    def __init__(self, pipe: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._pipe = pipe
        self._around: Callable[[], AbstractContextManager[None]] | None = around
        self._plain: Any = type(pipe)
        self._own: Any = None

    def start(self) -> None:
        """Begin.

        Raises:
            AdapterError: the object can't be given another class.
        """
        plain = self._plain.__call__

        @functools.wraps(plain)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            # Someone may have made this class another one's base: it outlives `stop` then.
            if self._around is None or pipe is not self._pipe:
                return plain(pipe, *args, **kwargs)
            with self._around():
                return plain(pipe, *args, **kwargs)

        names = ("__module__", "__qualname__", "__doc__")
        body = {"__call__": call, **{name: getattr(self._plain, name) for name in names}}
        try:
            self._own = type(self._plain)(self._plain.__name__, (self._plain,), body)
            object.__setattr__(self._pipe, "__class__", self._own)
        except TypeError as cause:
            raise AdapterError(
                f"a {self._plain.__name__} can't be watched while it runs, so weights might change"
                f" in the middle of an image: {cause}"
            ) from cause

    def stop(self) -> None:
        """Give the pipeline its class back."""
        self._around = None
        if type(self._pipe) is self._own:
            object.__setattr__(self._pipe, "__class__", self._plain)
