"""A probe, no op: how many exponentials a second a GPU computes, its values kept in registers.

Each element is replaced by `exp2(-x)` again and again; the iteration stays in [1/2, 1], so nothing
overflows, and nothing can be left out. Attention with small head dims is bounded by this rate.
"""

from __future__ import annotations

import torch

from heatsink.kernels._launch import Kernel, Launch

KERNEL = Kernel("exp_rate", module="exp_rate")
BLOCK = 4096
REPEATS = 512
WARPS = 4
# Several programs for each multiprocessor of any GPU, and several rounds of them.
PROGRAMS = 8192


def plan(
    device: torch.device, programs: int = PROGRAMS, repeats: int = REPEATS
) -> tuple[list[Launch], int]:
    """The launch, and how many exponentials it computes."""
    out = torch.empty(programs * BLOCK, dtype=torch.float32, device=device)
    launch = Launch(
        KERNEL,
        grid=(programs, 1, 1),
        args={"out_ptr": out},
        constants={"REPEATS": repeats, "BLOCK": BLOCK},
        warps=WARPS,
        stages=1,
    )
    return [launch], programs * BLOCK * repeats
