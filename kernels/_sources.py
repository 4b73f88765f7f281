"""Digests of the kernels' sources: what a compiled kernel is checked against, without Triton."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heatsink.kernels._launch import Kernel

PACKAGE = "heatsink.kernels"
FOLDER = Path(__file__).parent


def _file(name: str, folder: Path) -> Path | None:
    """The source of a module of this package, if it is one."""
    if not name.startswith(PACKAGE + "."):
        return None
    path = folder.joinpath(*name.removeprefix(PACKAGE + ".").split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imported(name: str, text: str, folder: Path) -> Iterator[str]:
    """The names of this package's modules that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _file(alias.name, folder))
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(name.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (parent, node.module or "") if part)
            for alias in node.names:
                member = f"{source}.{alias.name}"
                if _file(member, folder):
                    yield member
                elif _file(source, folder):
                    yield source


def reachable(module: str, folder: Path = FOLDER) -> dict[str, str]:
    """The texts of a jit module and of all modules of this package that it can reach, by name.

    Args:
        module: its name under `heatsink.kernels.jit`.
        folder: the package's.

    Raises:
        FileNotFoundError: if there is no such module.
    """
    found: dict[str, str] = {}
    waiting = [f"{PACKAGE}.jit.{module}"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        file = _file(name, folder)
        if file is None:
            raise FileNotFoundError(f"{name}: expected a module in {folder}, got none")
        found[name] = file.read_text("utf-8")
        waiting += _imported(name, found[name], folder)
    return dict(sorted(found.items()))


def digest_of(name: str, module: str, fusion: bool, folder: Path = FOLDER) -> str:
    """SHA-256 of all that decides what a kernel computes, besides what its launches' keys say."""
    total = hashlib.sha256(f"{name} {module} {fusion}\n".encode())
    for source, text in reachable(module, folder).items():
        data = text.encode()
        total.update(f"{source} {len(data)}\n".encode() + data)
    return total.hexdigest()


@functools.cache
def digest(kernel: Kernel) -> str:
    """`digest_of` a kernel of this package."""
    return digest_of(kernel.name, kernel.module, kernel.fusion)
