"""Every family by the op's name; an op that is not in the catalog may have one all the same."""

from __future__ import annotations

from heatsink.benchmarks import adapters, attention, gates, merges, norms, steps
from heatsink.benchmarks.family import Family

FAMILIES: dict[str, Family] = {
    **adapters.FAMILIES,
    **attention.FAMILIES,
    **norms.FAMILIES,
    **gates.FAMILIES,
    **steps.FAMILIES,
    **merges.FAMILIES,
}
