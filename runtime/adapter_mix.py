"""The adapters of one request by content, in an order that names don't decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from heatsink.runtime.errors import InvalidRequest

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class AdapterUse:
    """An adapter in a request: its name there, the digest of its content, its weight."""

    name: str
    digest: str
    weight: float

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Mix:
    """What one request uses.

    Attributes:
        uses: by (digest, name); weights that are 0 in float32 are left out.
        weights: digest -> weight, in the order of digests. Several names of one content are one
            adapter, whose weight is their sum, correctly rounded.
    """

    uses: tuple[AdapterUse, ...]
    weights: dict[str, float]

    @classmethod
    def of(cls, weights: Mapping[str, float], digest_of: Callable[[str], str]) -> Mix:
        """The mix of names and weights.

        Args:
            weights: name -> weight.
            digest_of: the digest of a name's content.

        Raises:
            InvalidRequest: a weight is not finite in float32.
        """
        named = [(digest_of(name), name, _checked(name, w)) for name, w in weights.items()]
        uses = [
            AdapterUse(name, digest, weight)
            for digest, name, weight in sorted(named)
            if np.float32(weight)
        ]
        summed = {}
        for digest in dict.fromkeys(use.digest for use in uses):
            own = [use for use in uses if use.digest == digest]
            together = _checked(
                " + ".join(use.name for use in own), math.fsum(u.weight for u in own)
            )
            if np.float32(together):
                summed[digest] = together
        return cls(tuple(use for use in uses if use.digest in summed), summed)


def _checked(name: str, weight: float) -> float:
    if not math.isfinite(weight) or abs(weight) > _LARGEST:
        raise InvalidRequest(
            f"adapters.{name}: expected a weight that is finite in float32, got {weight}"
        )
    return float(weight)
