"""Digests: published vectors, and what counts and what does not."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatsink.runtime.digest import (
    array_digest,
    canonical_json,
    image_digest,
    sha256_bytes,
    sha256_file,
)


def test_sha256_of_the_standard_vector() -> None:
    # FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_bytes(b"abc") == expected


def test_file_digest_reports_every_piece(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    pieces: list[int] = []
    assert sha256_file(path, pieces.append) == hashlib.sha256(data).hexdigest()
    assert sum(pieces) == len(data)
    assert len(pieces) > 1


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty") == sha256_bytes(b"")
    with pytest.raises(FileNotFoundError, match="absent"):
        sha256_file(tmp_path / "absent")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None, "é"]}, b'{"a":[true,null,"\\u00e9"],"b":1}'),
        ((1, 2), b"[1,2]"),
        (-0.0, b"0.0"),
        (7.0, b"7.0"),
        (7, b"7"),
        (1e-5, b"1e-05"),
        (0.1 + 0.2, b"0.30000000000000004"),
        (np.float64(0.5), b"0.5"),
        (2**64 - 1, b"18446744073709551615"),
        ({}, b"{}"),
    ],
)
def test_canonical_json(value: Any, text: bytes) -> None:
    assert canonical_json(value) == text


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ({"a": [0.0, float("nan")]}, ValueError, r"\$\.a\[1\]: expected a finite number, got nan"),
        (float("-inf"), ValueError, r"\$: expected a finite number"),
        ({"a": {1: 2}}, TypeError, r"\$\.a: expected a string key, got 1"),
        ({"a": b"x"}, TypeError, r"\$\.a: expected a JSON value, got bytes"),
        ({"a": {1, 2}}, TypeError, "got set"),
    ],
)
def test_canonical_json_refuses(value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        canonical_json(value)


def test_image_digest_is_over_decoded_pixels() -> None:
    image = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    header = b'{"image":1,"mode":"RGB","size":[7,5]}\n'
    assert image_digest(image) == sha256_bytes(header + bytes(range(105)))
    for level in (0, 9):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=level)
        assert image_digest(Image.open(buffer)) == image_digest(image)


def test_image_digest_sees_pixel_mode_and_size() -> None:
    image = Image.new("RGB", (4, 6), (1, 2, 3))
    changed = image.copy()
    changed.putpixel((3, 5), (1, 2, 4))
    variants = [image, changed, image.transpose(Image.Transpose.ROTATE_90), image.convert("RGBA")]
    assert len({image_digest(variant) for variant in variants}) == len(variants)


def test_image_digest_of_palettes_is_of_what_they_show() -> None:
    colours = Image.new("RGB", (4, 4), (10, 20, 30))
    colours.putpixel((0, 0), (200, 0, 0))
    palette = colours.convert("P", palette=Image.Palette.ADAPTIVE)
    assert image_digest(palette) == image_digest(palette.convert("RGB"))
    recoloured = palette.copy()
    recoloured.putpalette([9] * 768)
    assert recoloured.tobytes() == palette.tobytes()
    assert image_digest(recoloured) != image_digest(palette)
    bits = Image.new("1", (9, 2), 1)
    assert image_digest(bits) == image_digest(bits.convert("L"))


def test_array_digest_ignores_layout_and_sees_content() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    same = [array.copy(order="F"), array.astype(">f4"), np.repeat(array, 2, axis=1)[:, ::2]]
    assert {array_digest(a) for a in same} == {array_digest(array)}
    others: list[Any] = [
        array.reshape(6, 4),
        array.astype(np.float64),
        array.view(np.int32),
        -array,
    ]
    assert array_digest(array) not in {array_digest(a) for a in others}
    assert array_digest(np.float32(0.0)) != array_digest(np.float32(-0.0))
    assert array_digest(np.empty((0, 3))) != array_digest(np.empty((3, 0)))
    with pytest.raises(TypeError, match="array: expected numbers or booleans, got dtype object"):
        array_digest(np.array([{}]))
