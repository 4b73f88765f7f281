"""A folder of compiled kernels, and running from it: no compiler, no Triton, nothing in silence.

The folder holds cubins and an `index.json` that says what each is for, and from which sources.
Opening checks every byte of it; docs/kernels_aot.md has the format.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from heatsink.kernels._cache_index import INDEX, Entry, Index, Source, dump, load
from heatsink.kernels._compile import Binary, Job
from heatsink.kernels._sources import digest_of
from heatsink.kernels.errors import CacheMismatch

if TYPE_CHECKING:
    from heatsink.kernels._driver import Function
    from heatsink.kernels._launch import Launch

VARIABLE = "HEATSINK_KERNEL_CACHE"
COMMAND = "heatsink kernels compile"

Missing = Literal["error", "compile"]


def write_cache(
    folder: Path, make: Callable[[Path], Iterable[tuple[Job, Binary]]], command: str, version: str
) -> int:
    """Write a cache whole: under a temporary name, then renamed; an older one is replaced.

    Args:
        folder: what to write; another folder's content is never replaced.
        make: compiles into the folder that it is given.
        command: what writes it again.
        version: of this package.

    Returns:
        How many binaries it holds.

    Raises:
        CacheMismatch: if `folder` is something else than a cache.
    """
    if (
        folder.exists()
        and not (folder / INDEX).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise CacheMismatch(
            f"{folder}: expected no file, an empty folder or a cache of kernels there"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        whole = temporary / "new"
        whole.mkdir()
        made = list(make(whole))
        (whole / INDEX).write_text(dump(made, command, version), "utf-8")
        _replace(folder, whole, temporary.with_name(f"{temporary.name}.old"))
    finally:
        shutil.rmtree(temporary)
    return len(made)


def _replace(folder: Path, whole: Path, aside: Path) -> None:
    """Rename `whole` to `folder`; what was there is kept `aside` until that is done."""
    if not folder.exists():
        whole.rename(folder)
        return
    folder.rename(aside)
    try:
        whole.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside)


class Cache:
    """An opened folder of compiled kernels.

    Attributes:
        folder: where it lies.
        command: what writes it again.
        entries: its binaries.
    """

    def __init__(self, folder: Path, missing: Missing = "error") -> None:
        """Open a folder and check all of it.

        Raises:
            CacheMismatch: if it is no cache, damaged, or of another version or other sources.
        """
        self.folder = folder
        self.command = f"{COMMAND} --arch ARCH -o {folder}"
        self._missing = missing
        index = self._read_index()
        self.command = index.command
        self._check_sources(index.kernels)
        self.entries = index.entries
        for entry in self.entries:
            self.image(entry)
        self._places = {(entry.key, entry.arch): entry for entry in self.entries}
        self._lock = threading.Lock()
        self._functions: dict[tuple[int, str], Function | None] = {}

    def _mismatch(self, what: str) -> CacheMismatch:
        return CacheMismatch(f"{self.folder}: {what}; build it again: {self.command}")

    def _read_index(self) -> Index:
        try:
            return load((self.folder / INDEX).read_text("utf-8"))
        except OSError as error:
            raise self._mismatch(f"expected a cache of compiled kernels ({error})") from None
        except UnicodeDecodeError as error:
            raise self._mismatch(f"{INDEX} is damaged ({error})") from None
        except ValueError as error:
            raise self._mismatch(str(error)) from None

    def _check_sources(self, kernels: Mapping[str, Source]) -> None:
        for name, known in kernels.items():
            try:
                present = digest_of(name, known.module, known.fusion)
            except FileNotFoundError:
                raise self._mismatch(f"kernel {name}: this version has no such kernel") from None
            if present != known.digest:
                raise self._mismatch(
                    f"kernel {name}: expected sources {present[:16]} (this version's), got "
                    f"{known.digest[:16]}"
                )

    def image(self, entry: Entry) -> bytes:
        """A binary's bytes.

        Raises:
            CacheMismatch: if they are not those that were written.
        """
        binary = entry.binary
        path = self.folder / binary.file
        if path.is_symlink():
            raise self._mismatch(f"{binary.file}: expected a file, got a link to another")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise self._mismatch(f"{binary.file} can't be read ({error})") from None
        found = hashlib.sha256(data).hexdigest()
        if found != binary.sha256:
            raise self._mismatch(
                f"{binary.file} is damaged: expected SHA-256 {binary.sha256[:16]}, got {found[:16]}"
            )
        return data

    def find(self, launch: Launch, arch: int) -> Entry | None:
        """The binary of a launch on an architecture.

        Returns:
            None if there is none and missing ones are to be compiled.

        Raises:
            CacheMismatch: if there is none.
        """
        key = launch.key()
        found = self._places.get((key, arch))
        if found is not None:
            return found
        archs = sorted({entry.arch for entry in self.entries})
        held = ", ".join(f"sm_{value}" for value in archs) or "nothing"
        if arch not in archs:
            told = f"expected binaries for sm_{arch} (this device), got {held}"
        else:
            told = f"expected a binary for sm_{arch} of {key}, got none"
        if self._missing == "error":
            raise self._mismatch(told)
        warnings.warn(f"{self.folder}: {told}; it is compiled now", stacklevel=4)
        return None

    def run(self, launch: Launch) -> bool:
        """Queue a launch on its device; False if it is to be compiled or is not for a GPU.

        Raises:
            CacheMismatch: if its binary is missing or damaged.
            KernelError: if it can't be loaded or launched.
        """
        from heatsink.kernels import _driver

        device = _driver.device_of(launch)
        if device is None:
            return False
        place = device, launch.key()
        if place not in self._functions:
            with self._lock:
                if place not in self._functions:
                    self._functions[place] = self._load(launch, device)
        function = self._functions[place]
        if function is None:
            return False
        function(launch)
        return True

    def _load(self, launch: Launch, device: int) -> Function | None:
        from heatsink.kernels import _driver

        entry = self.find(launch, _driver.arch_of(device))
        if entry is None:
            return None
        return _driver.Function(entry.binary, self.image(entry), launch, device)


class _State:
    """The cache in use; None before the environment was asked, False if there is none."""

    cache: Cache | Literal[False] | None = None


def use_cache(folder: str | os.PathLike[str] | None, *, missing: Missing = "error") -> None:
    """Run CUDA kernels from a folder that `heatsink kernels compile` wrote.

    Without a call, the environment's HEATSINK_KERNEL_CACHE names the folder, if it is set.

    Args:
        folder: the folder; None: compile with Triton, as if there were no cache.
        missing: what to do for a kernel that it lacks: `error`, or `compile` with Triton, with a
            warning that says so.

    Raises:
        ValueError: if `missing` is something else.
        CacheMismatch: if the folder is no cache, damaged, or of another version or other sources.
    """
    if missing not in ("error", "compile"):
        raise ValueError(f"missing: expected error or compile, got {missing!r}")
    _State.cache = False if folder is None else Cache(Path(folder), missing)


def in_use() -> Cache | None:
    """The cache in use, if any."""
    if _State.cache is None:
        use_cache(os.environ.get(VARIABLE) or None)
    return _State.cache or None
