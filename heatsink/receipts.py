"""`receipts.json`: what every picture in a folder answers, and by which engine.

A folder may hold the pictures of several runs, so a run adds its receipts to those that are there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatsink.runtime.errors import CallerError
from heatsink.runtime.files import write_whole

if TYPE_CHECKING:
    from heatsink.runtime.result import Result

NAME = "receipts.json"


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries in `folder`; none where there is no such file.

    Raises:
        CallerError: the file is not one that `write` wrote, so it must not be replaced.
    """
    path = folder / NAME
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise CallerError(f"{path} can't be read: {error}; name another folder") from None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("file"), str) for entry in entries
    ):
        raise CallerError(f"{path} holds something else than receipts; name another folder")
    return entries


def write(
    folder: Path, earlier: list[dict[str, Any]], paths: Sequence[Path], result: Result
) -> None:
    """Write the entries of a result's pictures, after the earlier ones of other pictures."""
    names = {path.name for path in paths}
    entries = [entry for entry in earlier if entry["file"] not in names]
    entries += [
        {
            "file": path.name,
            "request": request.model_dump(mode="json"),
            "receipt": receipt.as_dict(),
        }
        for path, request, receipt in zip(paths, result.requests, result.receipts, strict=True)
    ]
    text = json.dumps(entries, indent=2) + "\n"
    write_whole(folder / NAME, lambda file: file.write(text.encode()))
