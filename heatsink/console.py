"""Progress bars and messages of the command line."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LIBRARIES = ("diffusers", "onnxscript", "torch", "transformers")
# Read when the library is imported, which may be later than now.
_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def console() -> Console:
    """The console of messages: standard error, so that standard output holds results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Tell the user something worth knowing."""
    # A prompt may hold square brackets, which are the library's markup.
    console().print(f"note: {text}", markup=False)


class Bars:
    """One progress bar for each thing being done, shown when it is first reported."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of `what` are done."""
        # Idempotent; started here, since a display without bars would still print a blank line.
        self._progress.start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


@contextlib.contextmanager
def bars(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars with elapsed and remaining time; what they report is left on the screen."""
    if quiet:
        yield lambda what, done, total: None
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.percentage:>3.0f}%"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    progress = rich.Progress(*columns, console=console())
    try:
        yield Bars(progress)
    finally:
        if progress.live.is_started:
            progress.stop()


@contextlib.contextmanager
def quiet_libraries(*, diffusers: bool = True) -> Iterator[None]:
    """Hold back what the model libraries write about themselves; our own warnings stay.

    Args:
        diffusers: whether the block uses it; importing it takes seconds.
    """
    with mock.patch.dict(os.environ, _QUIET), warnings.catch_warnings():
        for name in _LIBRARIES:
            warnings.filterwarnings("ignore", module=rf"{name}($|\.)")
        levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
        for name in _LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
        _hide_bars(diffusers)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _hide_bars(diffusers: bool) -> None:
    """Turn off the libraries' own progress bars."""
    if diffusers:
        import_module("diffusers.utils.logging")
    for name in ("diffusers.utils.logging", "transformers.utils.logging"):
        if name in sys.modules:
            sys.modules[name].disable_progress_bar()
