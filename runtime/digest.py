"""SHA-256 digests of files, values, images and arrays: how manifests and receipts name a thing.

All digests are lower-case hexadecimal SHA-256. Images and arrays are digested by content (decoded
pixels, elements), never by their encoded file, so re-saving a PNG does not change its digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

_CHUNK_BYTES = 1 << 20
# Modes whose bytes are packed or mean nothing without a palette: digested as what they show.
_PLAIN_MODE = {"1": "L", "PA": "RGBA"}


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """The SHA-256 of `data` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file's bytes, read in pieces of 1 MiB.

    Args:
        path: The file.
        progress: Called with the number of bytes of each piece, once it is digested.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        OSError: The file can't be read.
    """
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return state.hexdigest()


def canonical_json(value: Any) -> bytes:
    """One byte string for one value: JSON with sorted keys and no spaces, ASCII only.

    Floats are written as the shortest decimal that reads back as the same float64 (`7.0`, `1e-05`),
    and -0.0 as `0.0`. An integer and a float stay different (`7`, `7.0`): a schema decides which of
    the two a field is. Tuples are lists.

    Args:
        value: None, bool, int, float, str, and lists, tuples and string-keyed mappings of them.

    Returns:
        The ASCII bytes.

    Raises:
        ValueError: A float is NaN or infinite.
        TypeError: A value or a key is of another type.
    """
    plain = _plain(value, "$")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, got {value!r}")
        # Adding zero turns -0.0 into 0.0; float() sheds subclasses with a repr of their own.
        return float(value) + 0.0
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected a string key, got {key!r}")
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: expected a JSON value, got {type(value).__name__}")


def image_digest(image: Image.Image) -> str:
    """The digest of an image's decoded pixels, with its mode and size.

    SHA-256 over the line `{"image":1,"mode":MODE,"size":[WIDTH,HEIGHT]}` and a newline, then the
    pixels row by row, channels interleaved (Pillow's `tobytes()`). Palette images are digested as
    the RGB (RGBA with transparency) they show, 1-bit ones as 8-bit grey. The file format,
    compression, text chunks and EXIF (its orientation too) do not count.

    Args:
        image: Any Pillow image.

    Returns:
        64 lower-case hexadecimal digits.
    """
    mode = _PLAIN_MODE.get(image.mode, image.mode)
    if mode == "P":
        mode = "RGBA" if image.has_transparency_data else "RGB"
    pixels = image if mode == image.mode else image.convert(mode)
    header = canonical_json({"image": 1, "mode": mode, "size": list(pixels.size)})
    return sha256_bytes(header + b"\n" + pixels.tobytes())


def array_digest(array: npt.ArrayLike) -> str:
    """The digest of an array's elements, with its dtype and shape.

    SHA-256 over the line `{"array":1,"dtype":DTYPE,"shape":[...]}` and a newline, then the elements
    in C order, little-endian. Strides and byte order of the source do not count; bits do (0.0 and
    -0.0 differ).

    Args:
        array: Numbers or booleans; any shape.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        TypeError: The elements are Python objects or structures.
    """
    source = np.asarray(array)
    if source.dtype.kind not in "biufc":
        raise TypeError(f"array: expected numbers or booleans, got dtype {source.dtype}")
    little = np.ascontiguousarray(source, dtype=source.dtype.newbyteorder("<"))
    header = canonical_json(
        {"array": 1, "dtype": source.dtype.name, "shape": list(source.shape)},
    )
    return sha256_bytes(header + b"\n" + little.tobytes())
