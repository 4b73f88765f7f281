"""What the package says it needs, what the lock pins, and what the code imports agree."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where the module and the distribution that brings it have different names.
DISTRIBUTIONS = {"PIL": "pillow", "cuda": "cuda-bindings", "multipart": "python-multipart"}


def lock_lines() -> list[str]:
    """The lock without its comments."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, Version]:
    """The lock's versions by canonical name."""
    pairs = [line.split("==") for line in lock_lines()]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    """The base dependencies and those of `extras`, extras that name other extras followed."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == "heatsink":
                found += requirements(*requirement.extras)
            else:
                found.append(requirement)
    return found


def test_lock_holds_nothing_but_exact_versions() -> None:
    pinned = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*")
    assert [line for line in lock_lines() if not pinned.fullmatch(line)] == []
    assert len(pins()) == len(lock_lines())


def test_lock_pins_torch_and_names_no_gpu_package() -> None:
    assert pins()["torch"] == Version("2.13.0")
    gpu = re.compile(r"nvidia|cuda|cupy|tensorrt|xformers|onnxruntime-gpu")
    # Bindings to the driver, megabytes small, that import without one; and what they import.
    bindings = {"cuda-bindings", "cuda-pathfinder"}
    assert [name for name in pins() if gpu.search(name) and name not in bindings] == []


def test_lock_satisfies_what_development_needs() -> None:
    locked = pins()
    unmet = [
        str(requirement)
        for requirement in requirements("dev")
        if not requirement.specifier.contains(locked[canonicalize_name(requirement.name)])
    ]
    assert unmet == []


def test_lock_is_complete() -> None:
    locked, missing, visited = pins(), set(), set[str]()
    waiting = [canonicalize_name(requirement.name) for requirement in requirements("dev")]
    while waiting:
        name = waiting.pop()
        if name in visited:
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            # An environment other than the lock's; in the lock's own, everything is there.
            continue
        visited.add(name)
        for line in lines:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = canonicalize_name(requirement.name)
            # A CUDA build of torch asks for more than the CPU build that is locked.
            if name == "torch" and needed.startswith(("nvidia-", "cuda-", "triton")):
                continue
            waiting.append(needed)
            if needed not in locked:
                missing.add(f"{needed} (for {name})")
    assert missing == set()
    assert len(visited) > len(requirements())


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every absolute import's top name, and whether it runs when the module is imported."""
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if lazy:
            deferred.update(ast.walk(node))
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node not in deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node not in deferred


@pytest.mark.parametrize("folder", ["heatsink", "runtime", "export", "kernels", "models"])
def test_what_the_code_imports_is_declared(folder: str) -> None:
    base: set[str] = {canonicalize_name(requirement.name) for requirement in requirements()}
    optional: set[str] = {
        canonicalize_name(r.name) for r in requirements(*PROJECT["optional-dependencies"])
    }
    # Training and the Triton kernels are reached only through their extras.
    extra: dict[str, set[str]] = {"models": {*optional}, "kernels": {"triton", "cuda-bindings"}}
    at_once = base | extra.get(folder, set())
    undeclared = set()
    for path in (ROOT / folder).rglob("*.py"):
        for name, immediate in imports(ast.parse(path.read_text())):
            if name in sys.stdlib_module_names or name == "heatsink":
                continue
            needed = canonicalize_name(DISTRIBUTIONS.get(name, name))
            if needed not in (at_once if immediate else optional):
                undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert undeclared == set()
