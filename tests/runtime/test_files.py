"""Files are there whole or not at all, and pictures are named by their seeds."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from heatsink.runtime.errors import CallerError, HeatsinkError, ResourceError
from heatsink.runtime.files import make_folder, write_error, write_whole
from heatsink.runtime.request import Request
from heatsink.runtime.result import Receipt, Result


def fails_with(error: BaseException) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (OSError(errno.EIO, "Input/output error"), ResourceError),
        (PermissionError(errno.EACCES, "Permission denied"), CallerError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("no picture"), ValueError),
    ],
)
def test_a_fault_keeps_the_older_file(
    tmp_path: Path, raised: BaseException, expected: type[BaseException]
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"older")
    with pytest.raises(expected):
        write_whole(path, fails_with(raised))
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["picture.png"]


def test_a_file_is_replaced_and_follows_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "receipts.json"
    path.write_bytes(b"older and longer")
    old = os.umask(0o027)
    try:
        write_whole(path, lambda file: file.write(b"newer"))
    finally:
        os.umask(old)
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["receipts.json"]


def test_a_path_that_can_t_be_written_is_the_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    attempts: tuple[Callable[[], None], ...] = (
        lambda: write_whole(tmp_path / "nowhere" / "x", lambda file: file.write(b"")),
        lambda: write_whole(tmp_path / "file" / "x", lambda file: file.write(b"")),
        lambda: make_folder(tmp_path / "file"),
        lambda: make_folder(tmp_path / "file" / "deep"),
    )
    for attempt in attempts:
        with pytest.raises(CallerError, match="can't be written"):
            attempt()


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, ResourceError, 1),
        (errno.EDQUOT, ResourceError, 1),
        (errno.EROFS, CallerError, 2),
    ],
)
def test_faults_have_exit_codes(number: int, kind: type[HeatsinkError], code: int) -> None:
    error = write_error(Path("x"), OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert error.exit_code == code
    assert os.strerror(number) in str(error)


def result(seeds: list[int]) -> Result:
    images = [Image.new("RGB", (2, 2), (seed, place, 0)) for place, seed in enumerate(seeds)]
    requests = [Request.parse(prompt="a", seed=seed) for seed in seeds]
    return Result(images, requests, [Receipt(r.digest, "", "", 1, 1) for r in requests])


def test_pictures_are_named_by_seed(tmp_path: Path) -> None:
    made = result([7, 8, 7, 7])
    paths = made.save(tmp_path / "a" / "b")
    names = ["image-7.png", "image-8.png", "image-7-2.png", "image-7-3.png"]
    assert paths == [tmp_path / "a" / "b" / name for name in names]
    for path, image in zip(paths, made, strict=True):
        with Image.open(path) as again:
            assert again.tobytes() == image.tobytes()
    assert sorted(os.listdir(tmp_path / "a" / "b")) == sorted(names)


def test_a_full_disk_leaves_no_half_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: Any, file: Any, format: str) -> None:
        fails_with(OSError(errno.ENOSPC, "No space left on device"))(file)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(ResourceError, match=r"no space is left for .*image-7\.png"):
        result([7]).save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_picture_that_the_system_cuts_off_is_not_left(tmp_path: Path) -> None:
    """The system's own refusal, after half of it is written: a file may hold 4,096 bytes here."""
    made = result([7])
    made.images[0] = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ResourceError, match=r"no space is left for .*image-7\.png") as caught:
            made.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == []
