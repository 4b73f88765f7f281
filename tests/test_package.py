"""The package as a user meets it: what importing it costs, what a wheel of it holds."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "runtime", "export", "models")
HEAVY = ("torch", "triton", "onnxruntime", "onnx", "tensorrt", "diffusers", "transformers", "numpy")


def run_python(code: str, cwd: Path, **env: str) -> str:
    """Run `code` in a fresh interpreter that sees no repository root and no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_leaves_heavy_libraries_alone(tmp_path: Path) -> None:
    code = f"""
import json, sys, time
started = time.process_time()
import heatsink
seconds = time.process_time() - started
print(json.dumps([seconds, [name for name in {HEAVY} if name in sys.modules]]))
"""
    # Processor time, the best of three: what the import costs, not what else the machine is doing.
    runs = [json.loads(run_python(code, tmp_path)) for _ in range(3)]
    assert [loaded for _, loaded in runs] == [[], [], []]
    assert min(seconds for seconds, _ in runs) < 1.0


def test_every_module_imports_without_a_gpu(tmp_path: Path) -> None:
    code = """
import importlib, json, pkgutil, sys
import heatsink
names, failed = [], {}
for found in pkgutil.walk_packages(heatsink.__path__, "heatsink.", onerror=lambda name: None):
    name = found.name
    source = found.module_finder.find_spec(name).origin.endswith(".py")
    # The compiled extension is loaded by the code that uses it; `__main__` would run.
    if not source or name.endswith("__main__"):
        continue
    names.append(name)
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = [type(error).__name__, getattr(error, "name", None), str(error)]
import torch
print(json.dumps([names, failed, torch.cuda.is_initialized(), sys.path]))
"""
    names, failed, initialised, path = json.loads(run_python(code, tmp_path).splitlines()[-1])
    expected = {f"heatsink.{folder}" for folder in LINKED} | {"heatsink.runtime.errors"}
    assert expected <= set(names)
    # Only a library that an extra brings may be missing, and the error names that library.
    unexplained = {
        name: text
        for name, (kind, missing, text) in failed.items()
        if kind != "ModuleNotFoundError" or distribution(missing) not in optional_distributions()
    }
    assert unexplained == {}
    assert not initialised
    assert str(ROOT) not in path


def optional_distributions() -> set[str]:
    """The distributions that the extras name, in lower case."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return {Requirement(line).name.lower() for lines in extras.values() for line in lines}


def distribution(module: str | None) -> str:
    """The distribution that a missing module would come from."""
    top = (module or "").split(".")[0].lower()
    return top.replace("_", "-")


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, links kept, with stand-ins for the trained weights."""
    tree = tmp_path_factory.mktemp("source") / "heatsink"
    tree.mkdir()
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "setup.py",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
    ):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for folder in ("heatsink", "csrc", *LINKED):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=skipped)
    for component in ("unet", "vae"):
        weights = tree / "models" / "emoji" / component
        weights.mkdir(parents=True, exist_ok=True)
        (weights / "config.json").write_text("{}")
        (weights / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    return tree


def build_wheel(tree: Path, out: Path) -> zipfile.ZipFile:
    """Build a wheel of `tree` without the C++ extension and open it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "-w", str(out), str(tree)],
        cwd=out,
        env={**os.environ, "HEATSINK_NO_EXT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("heatsink-*.whl")
    return zipfile.ZipFile(wheel)


def source_files(tree: Path) -> dict[str, bytes]:
    """Every file of the package that a wheel must hold, by its name there."""
    files = {"heatsink/py.typed": (tree / "heatsink" / "py.typed").read_bytes()}
    for folder in (*LINKED, "heatsink"):
        prefix = "heatsink" if folder == "heatsink" else f"heatsink/{folder}"
        # `rglob` follows no links: what is behind those of heatsink/ is met once.
        for path in [*(tree / folder).rglob("*.py"), *(tree / folder).rglob("configs/*.json")]:
            files[f"{prefix}/{path.relative_to(tree / folder).as_posix()}"] = path.read_bytes()
    return files


def test_wheel_holds_real_files_and_no_weights(source_tree: Path, tmp_path: Path) -> None:
    with build_wheel(source_tree, tmp_path) as wheel:
        packed = {info.filename: wheel.read(info) for info in wheel.infolist() if not info.is_dir()}
        links = [i.filename for i in wheel.infolist() if stat.S_ISLNK(i.external_attr >> 16)]
        entry_points = next(
            data for name, data in packed.items() if name.endswith("entry_points.txt")
        )
    assert links == []
    package = {name: data for name, data in packed.items() if ".dist-info/" not in name}
    assert package == source_files(source_tree)
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert b"heatsink = heatsink.cli:main" in entry_points
    assert b"heatsink = heatsink.integrations.dynamo:backend" in entry_points


def test_source_distribution_builds_the_same_wheel(source_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "sdist"
    out.mkdir()
    run_python(
        f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})",
        cwd=source_tree,
        HEATSINK_NO_EXT="1",
    )
    (archive,) = out.glob("heatsink-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert list(unpacked.rglob("*.safetensors")) == []
    compiled = {path.relative_to(source_tree) for path in (source_tree / "csrc").rglob("*.cpp")}
    assert compiled == {p.relative_to(unpacked) for p in (unpacked / "csrc").rglob("*.cpp")}
    with build_wheel(unpacked, tmp_path) as wheel:
        package = {n: wheel.read(n) for n in wheel.namelist() if ".dist-info/" not in n}
    assert package == source_files(source_tree)
