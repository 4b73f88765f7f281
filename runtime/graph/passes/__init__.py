"""Passes over captured graphs: the protocol, how they are run, and one file for each."""

from heatsink.runtime.graph.passes.protocol import Pass, run_passes, to_fixpoint

__all__ = ["Pass", "run_passes", "to_fixpoint"]
