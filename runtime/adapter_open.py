"""Opens an adapter's file: what is damaged is told apart before anything of it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heatsink.runtime.errors import AdapterError, DamagedFile
from heatsink.runtime.weights import Entry, open_safetensors, refuse_pickle

_LENGTH_BYTES = 8
# What the safetensors library takes at most for a header.
_LARGEST_HEADER = 100_000_000


def open_adapter(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Map an adapter's file: its entries by key, and its metadata.

    Raises:
        UnsafeFile: it is a pickle, by name or content.
        DamagedFile: it is empty, truncated, or no safetensors.
        AdapterError: it is missing or holds no tensors.
    """
    if not path.is_file():
        raise AdapterError(f"{path} is missing or not a file")
    refuse_pickle(path)
    _check_whole(path, path.stat().st_size)
    entries, metadata = open_safetensors(path, DamagedFile)
    if not entries:
        raise AdapterError(f"{path} holds no tensors")
    return entries, metadata


def _check_whole(path: Path, size: int) -> None:
    """Compare the file's size with what its header says."""
    if not size:
        raise DamagedFile(f"{path} is empty (0 bytes)")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size >= _LENGTH_BYTES and length > _LARGEST_HEADER:
            raise DamagedFile(f"{path} is no safetensors file: it doesn't start with a header")
        if size < _LENGTH_BYTES + length:
            raise DamagedFile(f"{path} is truncated within its header: {size} bytes are left")
        header = _header(path, file.read(length))
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedFile(f"{path}: its metadata is no JSON object of texts")
    ends = [tensor["data_offsets"][1] for tensor in header.values() if "data_offsets" in tensor]
    whole = _LENGTH_BYTES + length + max(ends, default=0)
    if size < whole:
        raise DamagedFile(f"{path} is truncated: {size} of {whole} bytes")
    if size > whole:
        raise DamagedFile(f"{path} is damaged: {size - whole} bytes follow the last tensor")


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise DamagedFile(f"{path} is damaged: its header is not JSON: {cause}") from cause
    tensors = list(header.values()) if isinstance(header, dict) else [None]
    if not all(isinstance(tensor, dict) and _has_place(tensor) for tensor in tensors):
        raise DamagedFile(f"{path} is damaged: its header is no table of tensors")
    return dict(header)


def _has_place(tensor: dict[str, Any]) -> bool:
    offsets = tensor.get("data_offsets", [0, 0])
    return isinstance(offsets, list) and [type(end) for end in offsets] == [int, int]
