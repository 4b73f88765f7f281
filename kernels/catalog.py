"""Every op that has Triton kernels, for the tools; importing it imports them all."""

from __future__ import annotations

import importlib

from heatsink.kernels._op import Op

# Modules of this package, each with an `OP`.
MODULES = (
    "attention",
    "attention_fp8",
    "fingerprint",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "layer_norm",
    "lora_merge",
    "lora_rows",
    "noise",
    "rms_norm",
    "rotary",
    "silu_mul",
)


def ops() -> dict[str, Op]:
    """The ops by name."""
    found = [importlib.import_module(f"heatsink.kernels.{name}").OP for name in MODULES]
    return {op.name: op for op in found}
