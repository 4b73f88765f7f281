"""The C++ extension is optional: with and without it the package installs, runs, and agrees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from heatsink.kernels import _native
from heatsink.kernels.fingerprint import fingerprint
from heatsink.runtime.noise import STEP, normal_rows

ROOT = Path(__file__).parents[1]

ANSWERS = """
import json, torch
from heatsink.kernels import _native
from heatsink.kernels.fingerprint import fingerprint
from heatsink.runtime.noise import STEP, normal_rows
noise = normal_rows([1, 2**64 - 1], STEP, 3, (4, 33))
digests = [fingerprint(noise.to(dtype)).hex() for dtype in (torch.float32, torch.bfloat16)]
print(json.dumps([_native.describe(), digests]))
"""


def _run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture
def fresh_load() -> object:
    """Lets a test call `_native.load` as if for the first time."""
    _native.load.cache_clear()
    yield
    _native.load.cache_clear()


@pytest.mark.parametrize("switch", ["0", "1"])
def test_same_answers_both_ways(switch: str) -> None:
    if switch == "0" and not _native.available() and os.environ.get("HEATSINK_NO_EXT") != "1":
        pytest.skip(f"no extension to compare with: {_native.load()}")
    described, digests = json.loads(_run(ANSWERS, HEATSINK_NO_EXT=switch).stdout)
    noise = normal_rows([1, 2**64 - 1], STEP, 3, (4, 33))
    assert digests == [fingerprint(noise.to(d)).hex() for d in (torch.float32, torch.bfloat16)]
    if switch == "1":
        assert described == "PyTorch (HEATSINK_NO_EXT=1 is set)"


def test_the_extension_takes_the_ops_over() -> None:
    if not _native.available():
        pytest.skip(f"no extension: {_native.load()}")
    for name in ("heatsink::fingerprint", "heatsink::normal"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


@pytest.mark.usefixtures("fresh_load")
def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEATSINK_NO_EXT", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not _native.available()
    assert _native.describe().startswith("PyTorch (it was not built")


@pytest.mark.usefixtures("fresh_load")
def test_damaged_file_is_reported_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("undefined symbol: one")

    monkeypatch.delenv("HEATSINK_NO_EXT", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.warns(UserWarning, match="not used: it can't be loaded: undefined symbol"):
        assert not _native.available()


@pytest.mark.usefixtures("fresh_load")
def test_extension_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = ModuleType("heatsink._C")
    stale.INTERFACE = -1  # type: ignore[attr-defined]
    monkeypatch.delenv("HEATSINK_NO_EXT", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", lambda name: stale)
    wanted = rf"expected interface {_native.INTERFACE}, got -1.*install again"
    with pytest.raises(ImportError, match=wanted):
        _native.load()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of a build alone."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "heatsink").mkdir()
    (tmp_path / "heatsink" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "heatsink"\nversion = "0"\n[tool.setuptools]\npackages = ["heatsink"]\n'
    )
    return tmp_path


def _build(checkout: Path, *, before: str = "", **environment: str) -> str:
    """Run setup.py as an editable install does; returns what it said on stderr."""
    script = (
        f"{before}\nimport os, runpy, sys\nos.chdir({str(checkout)!r})\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']\nrunpy.run_path('setup.py')"
    )
    said = _run(script, **environment).stderr
    assert not list(checkout.glob("heatsink/_C*"))
    return said


def test_build_without_a_compiler(checkout: Path) -> None:
    said = _build(checkout, CC="/nonexistent/cc", CXX="/nonexistent/c++", HEATSINK_NO_EXT="0")
    assert "heatsink: building without the C++ extension: the compiler failed" in said


def test_build_with_the_extension_switched_off(checkout: Path) -> None:
    said = _build(checkout, HEATSINK_NO_EXT="1")
    assert "building without the C++ extension: HEATSINK_NO_EXT=1 is set" in said


def test_build_without_torch(checkout: Path) -> None:
    hide = (
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)"
    )
    said = _build(checkout, before=hide, HEATSINK_NO_EXT="0")
    assert "PyTorch is not importable where the build runs" in said


def test_build_with_an_old_torch(checkout: Path) -> None:
    old = "import importlib.metadata\nimportlib.metadata.version = lambda name: '2.9.1+cpu'"
    assert "PyTorch 2.9.1+cpu is older than 2.11" in _build(
        checkout, before=old, HEATSINK_NO_EXT="0"
    )


def test_the_implementation_is_said() -> None:
    assert _native.describe().startswith("C++" if _native.available() else "PyTorch (")
