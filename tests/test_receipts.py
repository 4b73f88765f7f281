"""A folder keeps the pictures and receipts of earlier runs, unless their replacing is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from heatsink import receipts
from heatsink.runtime.errors import CallerError
from heatsink.runtime.request import Request
from heatsink.runtime.result import Receipt, Result, picture_paths


def result(seeds: list[int], prompt: str = "a", red: int = 0) -> Result:
    images = [Image.new("RGB", (2, 2), (red, place, 0)) for place in range(len(seeds))]
    requests = [Request.parse(prompt=prompt, seed=seed) for seed in seeds]
    return Result(images, requests, [Receipt(r.digest, "", "", 1, 1) for r in requests])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_in_the_way_are_kept(tmp_path: Path) -> None:
    result([7]).save(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CallerError, match=r"image-7\.png would be replaced: name another"):
        result([6, 7], red=9).save(tmp_path)
    # Not even the picture that had room.
    assert contents(tmp_path) == before
    (tmp_path / "image-8.png").touch()
    with pytest.raises(CallerError, match=r"image-7\.png and 1 more would be replaced"):
        picture_paths(tmp_path, result([6, 7, 8]).requests)
    result([6, 7], red=9).save(tmp_path, overwrite=True)
    with Image.open(tmp_path / "image-7.png") as image:
        assert image.getpixel((0, 0)) == (9, 1, 0)
    # The same seeds under another stem are in nobody's way.
    result([7]).save(tmp_path, "other")


def test_receipts_of_other_pictures_stay(tmp_path: Path) -> None:
    first, second = result([7, 8]), result([8, 9], prompt="b")
    receipts.write(tmp_path, receipts.read(tmp_path), first.save(tmp_path), first)
    paths = second.save(tmp_path, overwrite=True)
    receipts.write(tmp_path, receipts.read(tmp_path), paths, second)
    entries = receipts.read(tmp_path)
    assert [(e["file"], e["request"]["prompt"]) for e in entries] == [
        ("image-7.png", "a"),
        ("image-8.png", "b"),
        ("image-9.png", "b"),
    ]
    assert entries[1]["receipt"] == second.receipts[0].as_dict()


def test_a_folder_without_receipts_has_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert receipts.read(folder) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read"),
        ("{}", "something else than receipts"),
        ("[1]", "something else than receipts"),
        (json.dumps([{"name": "x"}]), "something else than receipts"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_a_file_that_holds_no_receipts_is_not_replaced(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    (tmp_path / "receipts.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CallerError, match=message):
        receipts.read(tmp_path)
