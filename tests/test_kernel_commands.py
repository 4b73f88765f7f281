"""`heatsink kernels`: what it prints and writes, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import heatsink
from heatsink import cli
from heatsink.kernels._cache import Cache
from heatsink.kernels._compile import triton_version
from heatsink.kernels._resources import Row, Table
from heatsink.kernels.catalog import ops
from heatsink.kernels.errors import CacheMismatch, MissingTriton
from heatsink.runtime.errors import HeatsinkError, InvalidRequest

CASES = [case.name for case in ops()["silu_mul"].cases]


def run(*arguments: object, code: int = 0) -> str:
    """Run `heatsink kernels`; what it printed."""
    # Wide enough that nothing is wrapped.
    runner = CliRunner(env={"COLUMNS": "300"})
    done = runner.invoke(cli.app, ["kernels", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def test_list_shows_every_op_case_and_kernel() -> None:
    text = run("list")
    for op in ops().values():
        assert op.name in text
        assert all(case.name in text for case in op.cases)
        assert all(kernel.name in text for kernel in op.kernels)
    text = run("list", "--arch", "sm_90", "--op", "silu_mul")
    assert "sm_90" in text
    assert "sm_80" not in text


def test_compile_writes_a_cache_that_opens(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "cache"
    text = run(
        "compile", "--arch", "sm_90", "-o", out, "--op", "silu_mul", "--case", CASES[1], "-q"
    )
    assert text.splitlines()[-1] == f"{out}  1 binaries for sm_90"
    cache = Cache(out)
    assert [entry.arch for entry in cache.entries] == [90]
    index = json.loads((out / "index.json").read_text())
    assert index["heatsink"] == heatsink.__version__
    # The command in it writes the same bytes again.
    assert index["command"] == (
        f"heatsink kernels compile --arch sm_90 -o {out} --op silu_mul --case {CASES[1]}"
    )
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run(*index["command"].split()[2:], "-q")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (["--arch", "sm_70"], InvalidRequest, "--arch: arch: expected one of sm_80.* got 'sm_70'"),
        (["--arch", "sm_90", "--op", "sum"], InvalidRequest, "--op: expected one of .* got 'sum'"),
        (["--arch", "sm_90", "--case", "x"], InvalidRequest, "--case: expected one of .* got 'x'"),
    ],
)
def test_wrong_flags(
    tmp_path: Path, arguments: list[str], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        run("compile", *arguments, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    with pytest.raises(CacheMismatch, match="expected no file, an empty folder or a cache") as told:
        run("compile", "--arch", "sm_90", "-o", tmp_path, "--op", "silu_mul")
    assert told.value.exit_code == 2


def test_check_tells_problems_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("check", "--op", "silu_mul", "--arch", "sm_90")
    text = run(*flags)
    assert f"silu_mul/{CASES[0]}/silu_mul" in text
    assert "1 binaries, 1 of them compiled now" in text
    tight = Table(triton_version(), dict.fromkeys(Table.read().rows, Row(1, 0, 0)))
    monkeypatch.setattr(Table, "read", lambda: tight)
    with pytest.raises(HeatsinkError, match=rf"{CASES[0]}/silu_mul sm_90: registers: at m") as told:
        run(*flags, "-q")
    assert told.value.exit_code == 1


def test_without_triton_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingTriton, match=r"expected Triton, .* pip install 'heatsink\[k"):
        run("compile", "--arch", "sm_90", "-o", tmp_path / "out")


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["heatsink", "kernels", "compile", "--help"]
from heatsink.cli import main
try:
    main()
finally:
    print([name for name in ("torch", "triton", "numpy") if name in sys.modules])
"""
    environment = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "--arch" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
