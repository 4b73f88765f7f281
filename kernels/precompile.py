"""Compiles what launches will need, several kernels at a time, so that the tuner need not wait.

Through Triton's own asynchronous mode, where the installed version has it; what was compiled is
found when the launch comes. What fails here is left for the launch to tell.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from heatsink.kernels._launch import Launch
from heatsink.kernels.tuning_gate import failures


def threads() -> int:
    """How many kernels are compiled at a time: one a processor of this process, 16 at most."""
    return min(16, len(os.sched_getaffinity(0)))


def precompile(launches: Sequence[Launch]) -> None:
    """Compile for launches on the current CUDA device; tensors may lie on the meta device."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return
    # Without `ignore_errors` some versions stay in this mode after an error, for good.
    with ThreadPoolExecutor(threads()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            with contextlib.suppress(*failures()):
                _warm_up(launch)


def _warm_up(launch: Launch) -> None:
    launch.kernel.function().warmup(
        **launch.args,
        **launch.constants,
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=launch.kernel.fusion,
    )
