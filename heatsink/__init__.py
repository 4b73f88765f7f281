"""Heatsink: engines for diffusion image models that give the same bytes for the same request.

    import heatsink
    heatsink.build("models/emoji", "out/engine")
    result = heatsink.load("out/engine").generate("a red apple", seed=7)
    result.images[0].save("apple.png")

Nothing heavy is imported before one of these is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from heatsink.export.build import Report
    from heatsink.integrations.diffusers import Adapters
    from heatsink.runtime.engine import Engine
    from heatsink.runtime.model import Model
    from heatsink.runtime.pristine import Keep

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "Request",
    "__version__",
    "adapters",
    "build",
    "load",
    "optimize",
    "refresh",
    "restore",
]

_LAZY = {
    "Engine": "heatsink.runtime.engine",
    "EngineSpec": "heatsink.runtime.spec",
    "Manifest": "heatsink.export.manifest",
    "Model": "heatsink.runtime.model",
    "Options": "heatsink.export.build",
    "Receipt": "heatsink.runtime.result",
    "Request": "heatsink.runtime.request",
    "Result": "heatsink.runtime.result",
    "optimize": "heatsink.integrations.optimize",
    "refresh": "heatsink.integrations.optimize",
    "restore": "heatsink.integrations.optimize",
}


def load(
    engine: str | Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    verify: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Engine:
    """Open an engine folder; see `heatsink.export.opening.open_engine` for arguments and errors."""
    from heatsink.export.opening import open_engine

    return open_engine(engine, device=device, threads=threads, verify=verify, progress=progress)


def build(
    model: str | Path,
    out: str | Path,
    *,
    reuse: Sequence[str | Path] = (),
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Report:
    """Build an engine folder; `options` are the fields of `heatsink.export.build.Options`."""
    from heatsink.export.build import Options, build

    return build(model, out, Options(**options), reuse=reuse, progress=progress)


def adapters(pipe: Any, *, keep: Keep | None = None, model: Model | None = None) -> Adapters:
    """Adapters for a diffusers pipeline; see `heatsink.integrations.diffusers.adapters`."""
    from heatsink.integrations.diffusers import adapters

    return adapters(pipe, keep=keep, model=model)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'heatsink' has no attribute {name!r}")
