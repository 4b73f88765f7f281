"""What a backend gives the runtime: a component that maps named arrays to named arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

# Which dtype it has, a component's interface says.
Array = npt.NDArray[Any]


class Session(Protocol):
    """One opened component of an engine."""

    name: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the component once, on arrays that share their first dimension (the rows)."""
        ...


@runtime_checkable
class Phased(Protocol):
    """A component that computes what depends on a request or a schedule once, and keeps it."""

    def prepare(self, inputs: Mapping[str, Array], timesteps: Sequence[Array]) -> None:
        """Compute ahead, batched, what rows will need at these times.

        Args:
            inputs: of the rows, without what changes every step.
            timesteps: for every row the times it will be run at, float32 `(steps,)`.
        """
        ...

    def forget(self) -> None:
        """Let go of everything that is kept."""
        ...
