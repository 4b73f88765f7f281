"""Loads the C++ extension `heatsink._C`, if there is one, and says which implementation is in use.

Importing the extension gives this package's ops their C++ implementation on the CPU. Without it, or
with `HEATSINK_NO_EXT=1` in the environment, the same ops run their PyTorch implementation. It gives
the same bits, but for attention, lora_merge, linear and conv2d, whose products then are PyTorch's
own, and lora_rows: within the same error, in other bits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch  # noqa: F401 - the extension's own libraries, which must be there first

INTERFACE = 5


@functools.cache
def load() -> str:
    """Load the extension once.

    Returns:
        An empty string if it is in use, otherwise the reason why it is not.

    Raises:
        ImportError: if the extension was built from another version of the sources; its ops would
            already have replaced this version's, so going on would be wrong.
    """
    if os.environ.get("HEATSINK_NO_EXT") == "1":
        return "HEATSINK_NO_EXT=1 is set"
    if importlib.util.find_spec("heatsink._C") is None:
        return "it was not built (no compiler, or no PyTorch headers, at install)"
    try:
        module = importlib.import_module("heatsink._C")
    except (ImportError, OSError) as error:
        reason = f"it can't be loaded: {error}"
        warnings.warn(f"heatsink's C++ extension is not used: {reason}", stacklevel=2)
        return reason
    found = getattr(module, "INTERFACE", None)
    if found != INTERFACE:
        raise ImportError(
            f"heatsink._C: expected interface {INTERFACE}, got {found}: it was built from other "
            "sources; install again (pip install --no-build-isolation -e .) or delete it"
        )
    return ""


def available() -> bool:
    """True if the C++ implementations are in use on the CPU."""
    return load() == ""


def describe() -> str:
    """One line for logs and reports: which implementation the CPU ops run."""
    reason = load()
    return f"PyTorch ({reason})" if reason else "C++ (heatsink._C)"


def instruction_set() -> str:
    """What the products (linear, conv2d) and attention run on this processor.

    Returns:
        `amx` (for bfloat16; what has no AMX of its own runs as with avx512), `avx512`, `avx2` or
        `portable`, or `pytorch` without the extension. Within C++ all give the same bits.
        `HEATSINK_CPU` in the environment chooses another than the fastest.

    Raises:
        ValueError: if `HEATSINK_CPU` names none that this processor has.
    """
    if not available():
        return "pytorch"
    name: str = importlib.import_module("heatsink._C").instruction_set()
    return name
