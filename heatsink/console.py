"""Progress bars and messages of the command line."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def console() -> Console:
    """The console of messages: standard error, so that standard output holds results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class Bars:
    """One progress bar for each thing being done, made when it is first reported."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of `what` are done."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


@contextlib.contextmanager
def bars(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars with elapsed and remaining time; what they report is left on the screen."""
    if quiet:
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console(),
    ) as progress:  # fmt: skip
        yield Bars(progress)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back what the model libraries write about themselves; our own warnings stay."""
    from transformers.utils import logging as transformers_logging

    import diffusers.utils.logging as diffusers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        for module in ("torch", "transformers", "diffusers", "onnxscript"):
            warnings.filterwarnings("ignore", module=rf"{module}($|\.)")
        yield
