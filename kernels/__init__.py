"""Fused operators of diffusion models, one op a file. Knows nobody else in the package.

    import heatsink.kernels as hk
    out = hk.attention(q, k, v)

An op's module is imported when the op is first asked for, and PyTorch with it; `load` imports all,
for `torch.ops.heatsink.<op>` and for programs that were exported with ops of this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from heatsink.kernels._cache import use_cache

if TYPE_CHECKING:
    from heatsink.kernels.attention import attention
    from heatsink.kernels.attention_fp8 import attention_fp8
    from heatsink.kernels.conv2d import conv2d
    from heatsink.kernels.fingerprint import fingerprint
    from heatsink.kernels.geglu import geglu
    from heatsink.kernels.group_norm_silu import group_norm_silu
    from heatsink.kernels.guided_step import guided_step
    from heatsink.kernels.layer_norm import layer_norm
    from heatsink.kernels.linear import linear
    from heatsink.kernels.lora_linear import lora_linear
    from heatsink.kernels.lora_merge import lora_merge
    from heatsink.kernels.lora_rows import lora_rows
    from heatsink.kernels.noise import normal
    from heatsink.kernels.rms_norm import rms_norm
    from heatsink.kernels.rotary import rotary
    from heatsink.kernels.silu_mul import silu_mul

__all__ = [
    "attention",
    "attention_fp8",
    "conv2d",
    "fingerprint",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "layer_norm",
    "linear",
    "load",
    "lora_linear",
    "lora_merge",
    "lora_rows",
    "normal",
    "rms_norm",
    "rotary",
    "silu_mul",
    "use_cache",
]

# Op -> the module that has it.
_MODULES = {name: name for name in __all__ if name not in ("load", "use_cache")}
_MODULES["normal"] = "noise"


def load() -> None:
    """Registers every op with PyTorch, for torch.ops and exported programs.

    Needs neither Triton nor a GPU. An op that is called by its name here needs no `load`.
    """
    for module in _MODULES.values():
        import_module(f"{__name__}.{module}")


class _Package(ModuleType):
    """Gives an op's name to its function, where importing its module would give it the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _MODULES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{self.__name__}.{_MODULES[name]}"), name)


sys.modules[__name__].__class__ = _Package
