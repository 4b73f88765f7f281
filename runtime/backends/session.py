"""What a backend gives the runtime: a component that maps named arrays to named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

# Which dtype it has, a component's interface says.
Array = npt.NDArray[Any]


class Session(Protocol):
    """One opened component of an engine."""

    name: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the component once, on arrays that share their first dimension (the rows)."""
        ...
