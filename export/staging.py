"""An engine folder appears whole or not at all, and replaces nothing but an engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from heatsink.export.manifest import FILE_NAME, read_manifest
from heatsink.runtime.errors import CallerError, EngineMismatch, ResourceError
from heatsink.runtime.files import make_folder, write_error


def check_target(out: Path) -> None:
    """Refuse a place that holds anything but an engine, since what is there will be replaced.

    Raises:
        CallerError: a file, a folder that is no engine, or an engine with other files in it.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise CallerError(f"{out} exists and is not a folder; it is left as it is")
    if not any(out.iterdir()):
        return
    try:
        manifest = read_manifest(out)
    except EngineMismatch:
        if _was_engine(out):
            return
        raise CallerError(
            f"{out} exists and is not an engine folder; it is left as it is"
        ) from None
    own = {FILE_NAME, *(artefact.path for artefact in manifest.artefacts())}
    found = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    others = sorted(set(found) - own)
    if others:
        raise CallerError(
            f"{out} holds {len(others)} files that are no part of the engine there, such as "
            f"{others[0]}; move them elsewhere before it is replaced"
        )


def _was_engine(folder: Path) -> bool:
    """Whether the manifest, of another version or damaged, is one of ours."""
    path = folder / FILE_NAME
    return path.is_file() and b'"heatsink_version"' in path.read_bytes()


@contextlib.contextmanager
def staging(out: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well.

    Args:
        out: the engine's place, checked by `check_target`.
        needed: bytes that will be written, about.

    Raises:
        CallerError: the place may not be written.
        ResourceError: too little space is left, or it ran out. As after any other exception,
            nothing is left and an engine that stood at `out` is untouched.
    """
    folder = _temporary(out, needed)
    old = folder.with_suffix(".replaced")
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            out.rename(old)
        folder.rename(out)
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        # An interruption between the two renames leaves the old engine under its other name.
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (folder, old):
            if os.path.lexists(left):
                shutil.rmtree(left, ignore_errors=True)


def _temporary(out: Path, needed: int) -> Path:
    make_folder(out.parent)
    try:
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise ResourceError(
                f"{out.parent} has {free / 1e6:.0f} MB free; this engine needs about "
                f"{needed / 1e6:.0f} MB"
            )
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise write_error(out, error) from error
