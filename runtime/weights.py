"""Weights by name, mapped from safetensors files: nothing is read until a tensor is used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatsink.runtime.errors import HeatsinkError, ModelError, NumericError, UnsafeFile

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# How many elements are hashed or examined at a time: bounds the memory beside the mapping.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape and dtype now, its values by `read()`, and where they come from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def derive(
        self, transform: Callable[[Tensor], Tensor], shape: tuple[int, ...], how: str
    ) -> Entry:
        """The entry of `transform(values)`, of `shape` and the same dtype; `how` names it."""
        read = self.read
        return Entry(shape, self.dtype, f"{self.source} [{how}]", lambda: transform(read()))


class Weights(Mapping[str, Tensor]):
    """The tensors of one component, in name order; `weights[name]` maps (or derives) one anew.

    A tensor straight from a file is a private mapping of it: writing into one never reaches the
    file, but is seen by later readers of the same name, so don't.
    """

    def __init__(self, component: str, entries: Mapping[str, Entry]) -> None:
        self.component = component
        self.entries: dict[str, Entry] = dict(sorted(entries.items()))

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`, without reading it."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `name`, without reading it."""
        return self.entries[name].dtype

    def source(self, name: str) -> str:
        """The file and key `name` comes from, with what was done to it."""
        return self.entries[name].source

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def rename(
        self, new_name: Callable[[str], str | None], component: str | None = None
    ) -> Weights:
        """The same tensors under `new_name(name)`; those it gives None for are left out.

        Raises:
            ModelError: two tensors would get the same name.
        """
        renamed: dict[str, Entry] = {}
        for name, entry in self.entries.items():
            new = new_name(name)
            if new is None:
                continue
            if new in renamed:
                raise ModelError(
                    f"both {renamed[new].source} and {entry.source} stand for"
                    f" {self.component}'s {new}"
                )
            renamed[new] = entry
        return Weights(component or self.component, renamed)

    def check_finite(self, progress: Progress | None = None) -> None:
        """Look at every value once.

        Raises:
            NumericError: a tensor holds NaN or infinity; the message names it, its file and how
                many.
        """
        done, total = 0, self.nbytes
        for name, entry in self.entries.items():
            if entry.dtype.is_floating_point:
                _check_finite_entry(self.component, name, entry)
            done += entry.nbytes
            if progress is not None:
                progress(done, total)

    def update_digest(
        self, digest: Any, key: Callable[[str], str], progress: Progress | None = None
    ) -> None:
        """Feed every tensor's `key(name)`, dtype, shape and bytes into a hashlib object, by key."""
        done, total = 0, self.nbytes
        for label, name in sorted((key(name), name) for name in self.entries):
            entry = self.entries[name]
            dtype = str(entry.dtype).removeprefix("torch.")
            digest.update(f"{label}\0{dtype}\0{','.join(map(str, entry.shape))}\0".encode())
            hash_tensor(digest, entry.read())
            done += entry.nbytes
            if progress is not None:
                progress(done, total)


def _check_finite_entry(component: str, name: str, entry: Entry) -> None:
    bad = 0
    for part in entry.read().reshape(-1).split(_CHUNK):
        # float8 has no isfinite of its own on every device and version; widening is exact.
        values = part.float() if part.dtype.itemsize == 1 else part
        bad += int(part.numel() - torch.isfinite(values).sum())
    if bad:
        raise NumericError(
            f"{component}: the weight {name} holds {bad} values that are NaN or infinite"
            f" ({entry.source})"
        )


def hash_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed the tensor's bytes in row-major order into a hashlib object, a piece at a time."""
    for part in tensor.contiguous().reshape(-1).split(_CHUNK):
        digest.update(part.view(torch.uint8).numpy().data)


def sha256_of(text: str) -> Any:
    """A sha256 object already fed with `text`."""
    return hashlib.sha256(text.encode())


def open_safetensors(
    path: Path, error: type[HeatsinkError] = ModelError
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Map a safetensors file: its entries by key, and its metadata.

    Args:
        path: the file.
        error: the kind of error raised for a damaged file.

    Raises:
        UnsafeFile: the file is a pickle, by its name or, whatever it is called, by its first bytes.
        HeatsinkError: of the kind `error`; missing, truncated or damaged, or a dtype this package
            can't use.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise error(f"{path} is missing or not a file")
    refuse_pickle(path)
    try:
        handle = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as cause:
        size = path.stat().st_size
        raise error(
            f"{path} ({size} bytes) is truncated, damaged or no safetensors: {cause}"
        ) from cause
    entries = {}
    for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
        part = handle.get_slice(key)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise error(f"{path}: {key} has the dtype {part.get_dtype()}, which is not supported")
        entries[key] = Entry(
            tuple(part.get_shape()),
            dtype,
            f"{path.parent.name}/{path.name}:{key}",
            _reader(handle, key),
        )
    return entries, dict(handle.metadata() or {})


def _reader(handle: Any, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor: Tensor = handle.get_tensor(key)
        return tensor

    return read


def refuse_pickle(path: Path) -> None:
    """Raise `UnsafeFile` where `path` is a pickle by its name or by its first bytes.

    A zip (`PK`) is what torch.save writes, 0x80 starts a binary pickle. Both can also be the low
    bytes of a safetensors header's length; there the ninth byte opens the header's JSON.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeFile(
            f"{path.name} is a pickle, which can run code when it is loaded; only .safetensors"
            " is read (convert it in a place you trust)"
        )
    with path.open("rb") as handle:
        head = handle.read(9)
    if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise UnsafeFile(
            f"{path.name} is named as safetensors but holds a pickle or zip archive; it is"
            " not loaded"
        )
