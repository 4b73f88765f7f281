"""Files that are there whole or not at all, and what an operating system's refusal means."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from heatsink.runtime.errors import CallerError, HeatsinkError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A path that can't hold what is to be written, whatever the state of the machine.
_REFUSED = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip


def write_error(path: Path, error: OSError) -> HeatsinkError:
    """The error of this package for one that the operating system gave while `path` was written."""
    if error.errno in _FULL:
        return ResourceError(f"no space is left for {path}; nothing of it was kept ({error})")
    if error.errno in _REFUSED:
        return CallerError(f"{path} can't be written: {error}")
    return ResourceError(f"{path} can't be written: {error}")


def make_folder(path: Path) -> None:
    """Make `path` and its parents where they are missing.

    Raises:
        CallerError: the path is a file's, or may not be written.
        ResourceError: no space is left.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, then rename it; an older one stays until then.

    Args:
        path: of the file; its folder exists.
        write: called with the open file.

    Raises:
        CallerError: the path may not be written.
        ResourceError: no space is left, or the device failed.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
        # mkstemp makes it for its owner alone; a plain file follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
