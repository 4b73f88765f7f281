"""The folder of compiled kernels: what it holds, and every way in which it is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heatsink import kernels
from heatsink.kernels import _cache, _cache_index, _sources, aot
from heatsink.kernels._cache import Cache, write_cache
from heatsink.kernels._compile import Binary, Job
from heatsink.kernels._config import lookup, target_of
from heatsink.kernels._launch import Launch, run
from heatsink.kernels._workers import compile_jobs
from heatsink.kernels.errors import CacheMismatch, KernelError
from heatsink.kernels.silu_mul import KERNEL, OP, silu_mul

COMMAND = "heatsink kernels compile --arch sm_80,sm_90 -o X"


def compiled(folder: Path) -> list[tuple[Job, Binary]]:
    """Every case of one op, for two architectures."""
    jobs = [job for job, _ in aot.jobs([OP], [80, 90], lambda op: op.cases).values()]
    results = compile_jobs(jobs, folder)
    binaries = [result for result in results if isinstance(result, Binary)]
    return list(zip(jobs, binaries, strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache; don't change it."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    assert write_cache(folder, compiled, COMMAND, "0.1.0") == 6
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "cache"))


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache is in use before and after a test, and none was asked for."""
    monkeypatch.setattr(_cache._State, "cache", None)
    monkeypatch.delenv(_cache.VARIABLE, raising=False)


def launch_of(case: int, device: str = "meta", **config: int) -> Launch:
    """The launch of one of the op's cases."""
    inputs = OP.cases[case].make(torch.device(device))
    found = lookup(OP.name, OP.key(**inputs), target_of(torch.device("cpu")))
    (launch,) = OP.plan({**found, **config}, **inputs)[1]
    return launch


def resign(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index and its digest, as one of another version would be."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps({**index, "digest": _cache_index.digest(index)}))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", range(3))
def test_every_case_has_its_binary(written: Path, case: int, arch: int) -> None:
    cache = Cache(written)
    entry = cache.find(launch_of(case), arch)
    assert entry is not None
    assert (entry.arch, entry.kernel, entry.binary.symbol) == (arch, "silu_mul", "_silu_mul_kernel")
    assert cache.image(entry).startswith(b"\x7fELF")
    # The name of the device's code, as the driver looks it up.
    assert b"_silu_mul_kernel" in cache.image(entry)


def test_a_real_tensor_asks_for_the_same_as_one_without_memory(written: Path) -> None:
    entry = Cache(written).find(launch_of(2, device="cpu"), 90)
    assert entry == Cache(written).find(launch_of(2), 90)


def test_binaries_run_on_their_own_architecture_alone(written: Path) -> None:
    cache = Cache(written)
    for arch in (80, 90):
        entry = cache.find(launch_of(0), arch)
        assert entry is not None
        assert entry.arch == arch
    # 8.6 loads a binary for 8.0, but has less shared memory, and looks up other configurations.
    for arch in (75, 86, 87, 89, 100, 103, 120):
        told = rf"expected binaries for sm_{arch} \(this device\), got sm_80, sm_90"
        with pytest.raises(CacheMismatch, match=told):
            cache.find(launch_of(0), arch)


def test_a_missing_kernel_is_refused_or_compiled_as_asked(written: Path) -> None:
    other = launch_of(0, BLOCK_W=512)
    with pytest.raises(CacheMismatch, match=rf"for sm_90 of silu_mul.*BLOCK_W=512.*: {COMMAND}"):
        Cache(written).find(other, 90)
    with pytest.warns(UserWarning, match=r"BLOCK_W=512.* it is compiled now"):
        assert Cache(written, "compile").find(other, 90) is None


def test_any_flipped_byte_is_found(copied: Path) -> None:
    for path in sorted(copied.iterdir()):
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 2):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(
                CacheMismatch, match=rf"{path.name}.*again: heatsink kernels compile"
            ):
                Cache(copied)
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(CacheMismatch, match="is damaged"):
            Cache(copied)
        path.write_bytes(data)
    Cache(copied)


def test_an_index_that_was_changed_by_hand_is_refused(copied: Path) -> None:
    path = copied / "index.json"
    text = path.read_text()
    assert '"warps": 4' in text
    path.write_text(text.replace('"warps": 4', '"warps": 8'))
    with pytest.raises(CacheMismatch, match=r"index.json is damaged: its digest is not its cont"):
        Cache(copied)


def test_a_binary_damaged_after_opening_is_not_loaded(copied: Path) -> None:
    cache = Cache(copied)
    entry = cache.find(launch_of(0), 90)
    assert entry is not None
    (copied / entry.binary.file).unlink()
    with pytest.raises(CacheMismatch, match=f"{entry.binary.file} can't be read"):
        cache.image(entry)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda index: index.update(schema=2),
            r"expected schema 1 in index.json, got 2; .*compile",
        ),
        (
            lambda index: index["kernels"]["silu_mul"].update(digest="0" * 64),
            rf"kernel silu_mul: expected sources [0-9a-f]+ \(this version's\), got 0+; .*{COMMAND}",
        ),
        (
            lambda index: index["kernels"]["silu_mul"].update(fusion=False),
            "kernel silu_mul: expected sources",
        ),
        (
            lambda index: index["kernels"]["silu_mul"].update(module="silu_mul_2"),
            "kernel silu_mul: this version has no such kernel",
        ),
    ],
)
def test_another_version_is_refused(copied: Path, change: Any, match: str) -> None:
    resign(copied, change)
    with pytest.raises(CacheMismatch, match=match):
        Cache(copied)


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    """Drop the field of the last name."""

    def change(index: Any) -> None:
        for name in names[:-1]:
            index = index[0] if name == "0" else index[name]
        del index[names[-1]]

    return change


def with_binary(**fields: object) -> Callable[[dict[str, Any]], object]:
    """Change what is said of the first binary's file."""
    return lambda index: index["binaries"][0]["binary"].update(fields)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("command"), "command: expected a value of str, got none"),
        (without("kernels"), "kernels: expected a value of dict, got none"),
        (without("binaries"), "binaries: expected a value of list, got none"),
        (
            without("kernels", "silu_mul", "digest"),
            r"kernels\['silu_mul'\].digest: expected a value of str, got none",
        ),
        (
            lambda index: index["kernels"].update(silu_mul=3),
            r"kernels\['silu_mul'\]: expected an object, got 3",
        ),
        (
            without("binaries", "0", "arch"),
            r"binaries\[0\].arch: expected a value of int, got none",
        ),
        (
            lambda index: index["binaries"][0].update(arch="90"),
            r"binaries\[0\].arch: expected a value of int, got '90'",
        ),
        (
            lambda index: index["binaries"].append([]),
            r"binaries\[6\]: expected an object, got \[\]",
        ),
        (
            lambda index: index["binaries"][2].update(kernel="other"),
            r"binaries\[2\].kernel: expected one of kernels, got 'other'",
        ),
        (
            without("binaries", "0", "binary", "shared"),
            r"binaries\[0\].binary.shared: expected a value of int, got none",
        ),
        (
            with_binary(warps=True),
            r"binaries\[0\].binary.warps: expected a value of int, got True",
        ),
        (
            with_binary(scratch=[0]),
            r"binaries\[0\].binary.scratch: expected two values of int, got \[0\]",
        ),
        (
            with_binary(scratch="none"),
            r"binaries\[0\].binary.scratch: expected a value of list, got 'none'",
        ),
    ],
)
def test_an_index_of_another_form_is_refused_by_the_fields_name(
    copied: Path, change: Any, match: str
) -> None:
    resign(copied, change)
    with pytest.raises(CacheMismatch, match=rf"cache: index.json: {match}; build it again: "):
        Cache(copied)


@pytest.mark.parametrize("name", ["../x.cubin", "a/x.cubin", "..", ".", "", ".x", "x\0", "x\n"])
def test_a_binary_lies_in_the_folder_itself(copied: Path, name: str) -> None:
    file = Cache(copied).entries[0].binary.file
    for path in (copied.parent / "x.cubin", copied / "a" / "x.cubin"):
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(copied / file, path)
    told = r"binaries\[0\].binary.file: expected a file's name in the folder, got "
    for given in (name, str(copied / file)):
        resign(copied, with_binary(file=given))
        with pytest.raises(CacheMismatch, match=told):
            Cache(copied)


def test_a_link_in_a_binarys_place_is_refused(copied: Path) -> None:
    file = copied / Cache(copied).entries[0].binary.file
    file.rename(copied.parent / "elsewhere")
    file.symlink_to(copied.parent / "elsewhere")
    with pytest.raises(CacheMismatch, match=f"{file.name}: expected a file, got a link"):
        Cache(copied)


@pytest.mark.parametrize(("text", "match"), [("[]", "got 'list'"), ("{}", "got None"), ("{", "is")])
def test_what_is_no_index_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(CacheMismatch, match="expected a cache of compiled kernels"):
        Cache(tmp_path / "none")
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CacheMismatch, match=match):
        Cache(tmp_path)


def test_sources_are_followed_through_imports(tmp_path: Path) -> None:
    (tmp_path / "jit").mkdir()
    texts = {
        "jit/a.py": "import triton\nfrom heatsink.kernels.jit.b import x\n",
        "jit/b.py": "def f():\n    from heatsink.kernels.jit import c\n",
        "jit/c.py": "from . import d\nfrom .. import _e\nimport heatsink.kernels.jit.a\n",
        "jit/d.py": "",
        "_e.py": "",
        "jit/other.py": "",
        "jit/__init__.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    names = [name.removeprefix("heatsink.kernels.") for name in _sources.reachable("a", tmp_path)]
    assert names == ["_e", "jit.a", "jit.b", "jit.c", "jit.d"]
    before = _sources.digest_of("a", "a", True, tmp_path)
    assert _sources.digest_of("a", "a", False, tmp_path) != before
    (tmp_path / "jit" / "other.py").write_text("x = 1\n")
    assert _sources.digest_of("a", "a", True, tmp_path) == before
    (tmp_path / "jit" / "d.py").write_text("x = 1\n")
    assert _sources.digest_of("a", "a", True, tmp_path) != before
    with pytest.raises(FileNotFoundError, match=r"heatsink.kernels.jit.z: expected a module"):
        _sources.reachable("z", tmp_path)


def test_use_by_call_and_by_environment(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cache.in_use() is None
    kernels.use_cache(written)
    cache = _cache.in_use()
    assert cache is not None
    assert cache.folder == written
    kernels.use_cache(None)
    assert _cache.in_use() is None
    monkeypatch.setattr(_cache._State, "cache", None)
    monkeypatch.setenv(_cache.VARIABLE, str(written))
    cache = _cache.in_use()
    assert cache is not None
    assert len(cache.entries) == 6
    with pytest.raises(ValueError, match="missing: expected error or compile, got 'ignore'"):
        kernels.use_cache(written, missing="ignore")  # type: ignore[arg-type]


def test_a_refused_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_cache.VARIABLE, str(tmp_path))
    for _ in range(2):
        with pytest.raises(CacheMismatch, match="expected a cache of compiled kernels"):
            _cache.in_use()


def test_tensors_on_the_cpu_are_not_its_matter(written: Path) -> None:
    kernels.use_cache(written)
    gate, up = torch.randn(2, 4, 77)
    out, launches = OP.plan({"BLOCK_R": 1, "BLOCK_W": 64, "warps": 4}, gate=gate, up=up)
    (launch,) = launches
    assert launch.kernel is KERNEL
    cache = _cache.in_use()
    assert cache is not None
    assert not cache.run(launch)
    run(launches)
    assert torch.allclose(out, silu_mul(gate, up), rtol=1e-5, atol=1e-6)


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(KernelError, match=f"{name}: expected no file, an empty folder or a c"):
            write_cache(tmp_path / name, lambda folder: [], COMMAND, "0.1.0")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


def test_it_is_there_whole_or_not_at_all(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}

    def fails(folder: Path) -> list[tuple[Job, Binary]]:
        (folder / "half").write_text("half")
        raise KernelError("no luck")

    with pytest.raises(KernelError, match="no luck"):
        write_cache(copied, fails, COMMAND, "0.1.0")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    write_cache(copied, lambda folder: [], COMMAND, "0.1.0")
    assert [path.name for path in copied.iterdir()] == ["index.json"]
    assert Cache(copied).entries == ()
    assert [path.name for path in copied.parent.iterdir()] == ["cache"]


def failing_renames(monkeypatch: pytest.MonkeyPatch, *failing: int) -> None:
    """Let the renames of these numbers, from 1, fail."""
    rename, count = Path.rename, itertools.count(1)

    def sometimes(self: Path, target: Path) -> Path:
        if next(count) in failing:
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sometimes)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_cache(
    copied: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    failing_renames(monkeypatch, failing)
    with pytest.raises(OSError, match="no rename today"):
        write_cache(copied, lambda folder: [], COMMAND, "0.1.0")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == ["cache"]


def test_a_cache_that_cannot_be_put_back_is_kept_aside(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    failing_renames(monkeypatch, 2, 3)
    with pytest.raises(OSError, match="no rename today"):
        write_cache(copied, lambda folder: [], COMMAND, "0.1.0")
    (aside,) = copied.parent.iterdir()
    assert (aside.name.startswith(".cache."), aside.suffix) == (True, ".old")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
