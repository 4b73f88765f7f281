"""The index of a folder of compiled kernels: made from what was compiled, and read back.

Reading takes nothing on trust: what lacks a field, or has one of another type, is a `ValueError`
that names it.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from heatsink.kernels._compile import Binary, Job, binary_from
from heatsink.kernels._sources import digest_of

SCHEMA = 1
INDEX = "index.json"

# A name in the folder itself: no folders, no hidden files, and none of `.` and `..`.
_FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """What a kernel was compiled from: its module, whether contraction was on, the digest."""

    module: str
    fusion: bool
    digest: str


@dataclass(frozen=True)
class Entry:
    """A binary in the folder: for which launch, and for which architecture."""

    key: str
    kernel: str
    arch: int
    binary: Binary


@dataclass(frozen=True)
class Index:
    """What `index.json` says.

    Attributes:
        command: what writes the folder again.
        kernels: by name.
        entries: the binaries.
    """

    command: str
    kernels: Mapping[str, Source]
    entries: tuple[Entry, ...]


def digest(index: Mapping[str, Any]) -> str:
    """SHA-256 of all of an index but its digest."""
    rest = {name: value for name, value in index.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def dump(made: list[tuple[Job, Binary]], command: str, version: str) -> str:
    """The text of the index of what was compiled.

    Args:
        made: what was.
        command: what writes the folder again.
        version: of this package.
    """
    kernels = {job.kernel: job for job, _ in made}
    index = {
        "schema": SCHEMA,
        "command": command,
        "heatsink": version,
        "triton": sorted({binary.triton for _, binary in made}),
        "kernels": {
            name: {
                "module": job.module,
                "fusion": job.fusion,
                "digest": digest_of(name, job.module, job.fusion),
            }
            for name, job in sorted(kernels.items())
        },
        "binaries": [
            {"key": job.key, "kernel": job.kernel, "arch": job.arch, "binary": asdict(binary)}
            for job, binary in made
        ],
    }
    return json.dumps({**index, "digest": digest(index)}, indent=1) + "\n"


def load(text: str) -> Index:
    """An index from its text.

    Raises:
        ValueError: if it is damaged, of another schema, or not what `dump` writes.
    """
    try:
        index = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{INDEX} is damaged ({error})") from None
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        found = index.get("schema") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"expected schema {SCHEMA} in {INDEX}, got {found!r}")
    if index.get("digest") != digest(index):
        raise ValueError(f"{INDEX} is damaged: its digest is not its content's")
    kernels = {
        name: _source(fields, f"kernels[{name!r}]")
        for name, fields in _field(index, "", "kernels", dict).items()
    }
    binaries = _field(index, "", "binaries", list)
    entries = [_entry(fields, f"binaries[{place}]") for place, fields in enumerate(binaries)]
    for place, entry in enumerate(entries):
        # Its sources would be checked by nobody.
        if entry.kernel not in kernels:
            raise ValueError(
                f"{INDEX}: binaries[{place}].kernel: expected one of kernels, got {entry.kernel!r}"
            )
    return Index(_field(index, "", "command", str), kernels, tuple(entries))


def _field(fields: Any, path: str, name: str, kind: type[T]) -> T:
    """A field of an object at `path` in the index."""
    if type(fields) is not dict:
        raise ValueError(f"{INDEX}: {path}: expected an object, got {fields!r}")
    place = f"{path}.{name}" if path else name
    if name not in fields:
        raise ValueError(f"{INDEX}: {place}: expected a value of {kind.__name__}, got none")
    value = fields[name]
    # Exactly: `true` is no number.
    if type(value) is not kind:
        raise ValueError(f"{INDEX}: {place}: expected a value of {kind.__name__}, got {value!r}")
    return value


def _source(fields: Any, path: str) -> Source:
    return Source(
        module=_field(fields, path, "module", str),
        fusion=_field(fields, path, "fusion", bool),
        digest=_field(fields, path, "digest", str),
    )


def _entry(fields: Any, path: str) -> Entry:
    return Entry(
        key=_field(fields, path, "key", str),
        kernel=_field(fields, path, "kernel", str),
        arch=_field(fields, path, "arch", int),
        binary=_binary(_field(fields, path, "binary", dict), f"{path}.binary"),
    )


def _binary(fields: Mapping[str, Any], path: str) -> Binary:
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Binary).items():
        # A tuple is a list in JSON.
        wanted = list if typing.get_origin(kind) is tuple else kind
        found[name] = _field(fields, path, name, wanted)
    scratch = found["scratch"]
    if [type(value) for value in scratch] != [int, int]:
        raise ValueError(f"{INDEX}: {path}.scratch: expected two values of int, got {scratch!r}")
    if not _FILE_NAME.fullmatch(found["file"]):
        raise ValueError(
            f"{INDEX}: {path}.file: expected a file's name in the folder, got {found['file']!r}"
        )
    return binary_from(found)
