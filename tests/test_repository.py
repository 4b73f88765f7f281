"""House rules that no linter knows: what may lie in the repository, and how its commands fail."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".lock",
    ".cfg",
    ".yaml",
    ".yml",
    ".json",
    ".cpp",
    ".h",
    ".cu",
    ".in",
}
MIB = 1 << 20
# Put together from halves, so that this file doesn't hold what it looks for.
OPTIONS = "|".join(["--(extra-)?index" + "-url", "--find" + "-links", "index_url" + r"\s*="])
HOSTS = "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "download\\.py" + r"torch\.org"])
MACHINE_PATHS = r"(?<![\w.~}/-])/(work|root|home|Users)" + r"/\w"


@cache
def tracked() -> tuple[Path, ...]:
    """Every file that git tracks and that is here, links among them."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(reason=f"not a git checkout, so there is no list of its files: {error}")
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return tuple(path for path in paths if path.is_symlink() or path.is_file())


def texts() -> list[Path]:
    """The tracked files for people and interpreters."""
    named = {"Makefile", "run", ".gitignore", ".gitattributes"}
    return [path for path in tracked() if path.suffix in TEXT or path.name in named]


def test_no_file_is_larger_than_a_repository_should_carry() -> None:
    size = {p.relative_to(ROOT).as_posix(): p.lstat().st_size for p in tracked()}
    weights = sum(size[name] for name in size if name.endswith(".safetensors"))
    assert weights <= 60 * MIB, f"{weights / MIB:.1f} MiB of weights"
    limits = {".safetensors": 60 * MIB, ".png": 4 * MIB}
    large = {n: s for n, s in size.items() if s > limits.get(Path(n).suffix, MIB)}
    assert large == {}


@pytest.mark.parametrize(
    "pattern", [OPTIONS, HOSTS, MACHINE_PATHS], ids=["options", "hosts", "paths"]
)
def test_nothing_names_a_machine_or_where_packages_come_from(pattern: str) -> None:
    forbidden = re.compile(pattern)
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in texts()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if forbidden.search(line)
    ]
    assert len(texts()) > 10
    assert hits == []


@pytest.mark.parametrize(
    ("pattern", "bad", "good"),
    [
        (OPTIONS, "pip install --extra-index" + "-url X", "pip install --index"),
        (HOSTS, "https://pypi" + ".org/simple", "a package on PyPI"),
        (
            MACHINE_PATHS,
            "open('/ho" + "me/me/x')",
            "https://example.com/home/x, ./some/x, out/root/x",
        ),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: str, bad: str, good: str) -> None:
    assert re.search(pattern, bad)
    assert not re.search(pattern, good)


def test_only_safetensors_hold_weights() -> None:
    pickles = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz"}
    assert [p for p in tracked() if p.suffix in pickles] == []


def test_links_are_relative_and_stay_inside() -> None:
    links = {path.name: os.readlink(path) for path in tracked() if path.is_symlink()}
    assert set(links) >= {"kernels", "runtime", "export", "models"}
    for name, target in links.items():
        assert not target.startswith("/"), name
        assert (ROOT / "heatsink" / target).resolve().is_relative_to(ROOT), name


def test_no_source_file_is_longer_than_the_house_allows() -> None:
    code = {".py", ".cpp", ".cu", ".cuh", ".h"}
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in tracked()
        if path.suffix in code and not path.is_symlink()
    }
    assert {name: count for name, count in lines.items() if count > 400} == {}


def skips_without_reason(tree: ast.AST) -> list[int]:
    """The lines where a test is skipped or expected to fail and nothing says why."""
    marks = {"skip", "skipif", "xfail"}
    explained: set[ast.AST] = set()
    bare = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            explained.add(node.func)
            said = [k for k in node.keywords if k.arg in {"reason", "msg"}]
            # pytest.skip and pytest.xfail take the reason first; skipif takes a condition there.
            first = node.args and node.func.attr != "skipif"
            if node.func.attr in marks and not said and not first:
                bare.append(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr in marks and node not in explained:
            bare.append(node.lineno)
    return bare


def test_every_skip_says_why() -> None:
    sources = [p for p in tracked() if p.suffix == ".py" and p.is_relative_to(ROOT / "tests")]
    bare = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources
        for line in skips_without_reason(ast.parse(path.read_text("utf-8")))
    ]
    assert bare == []


def test_a_skip_without_a_reason_is_found() -> None:
    source = """
@pytest.mark.skip
@pytest.mark.skipif(True)
@pytest.mark.skipif(True, reason="why")
@pytest.mark.xfail("why")
def test(): pytest.skip()
"""
    assert sorted(skips_without_reason(ast.parse(source))) == [2, 3, 6]


def test_the_ci_command_can_be_run() -> None:
    mode = (ROOT / ".ci" / "run").stat().st_mode
    assert mode & stat.S_IXUSR


def fake_python(folder: Path, passes_version: bool) -> Path:
    """An interpreter that is too old, or one without venv."""
    path = folder / "python"
    old = "echo Python 3.9.2" if not passes_version else "echo Python 3.11.2"
    answer = "exit 1" if not passes_version else 'case "$2" in *ensurepip*) exit 1;; esac'
    path.write_text(f'#!/bin/sh\ncase "$1" in --version) {old};; *) {answer};; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("passes_version", "expected"),
    [(False, "needs Python 3.11 or newer"), (True, "apt install python3.11-venv")],
)
def test_make_says_what_to_install(tmp_path: Path, passes_version: bool, expected: str) -> None:
    python = fake_python(tmp_path, passes_version)
    command = ["make", "env", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    # Without what an outer make hands down, its PYTHON among it.
    env = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert expected in done.stdout
    assert not (tmp_path / "venv").exists()
