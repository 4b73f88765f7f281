"""Where an engine may be written, and what a fault half-way leaves there: nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from heatsink.export.build import Options, build
from heatsink.export.manifest import FILE_NAME
from heatsink.runtime.errors import (
    CallerError,
    ResourceError,
)

# As the shared engine was built, so that its components may be taken over.
BATCH = (1, 2, 4)
PARTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]

CopyModel = Callable[[Path], Path]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Where it may be written


def change_weight(path: Path, value: float) -> str:
    """Set the first element of the first floating-point tensor; returns the tensor's name."""
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    return name


def test_what_is_no_engine_is_left_alone(tiny_sd1: Path, place: Path) -> None:
    (place / "thesis.txt").write_text("years of work")
    (place / FILE_NAME).write_text('{"name": "a web page", "start_url": "/"}')
    before = contents(place)
    for out in (place, place / "thesis.txt"):
        with pytest.raises(CallerError, match="left as it is"):
            build(tiny_sd1, out)
    assert contents(place) == before


def test_an_engine_with_other_files_is_left_alone(tiny_sd1: Path, old: Path) -> None:
    (old / "pictures").mkdir()
    (old / "pictures" / "image-7.png").write_bytes(b"mine")
    before = contents(old)
    with pytest.raises(CallerError, match=r"1 files .*such as pictures/image-7\.png"):
        build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))
    assert contents(old) == before


@pytest.mark.usefixtures("no_building")
def test_a_damaged_engine_and_an_empty_folder_are_replaced(
    tiny_sd1: Path, sd1_onnx_folder: Path, old: Path
) -> None:
    (old / FILE_NAME).write_text((old / FILE_NAME).read_text()[:-100])
    (old.parent / "empty").mkdir()
    for out in (old, old.parent / "empty", old.parent / "new" / "deep"):
        report = build(
            tiny_sd1, out, Options(backend="onnxruntime", batch=BATCH), reuse=[sd1_onnx_folder]
        )
        assert report.reused == PARTS
        assert contents(out) == contents(sd1_onnx_folder)
    assert sorted(os.listdir(old.parent)) == ["empty", "engine", "new"]


@pytest.mark.usefixtures("no_building")
def test_a_link_stays_one(tiny_sd1: Path, sd1_onnx_folder: Path, old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to("engine")
    build(tiny_sd1, link, Options(backend="onnxruntime", batch=BATCH))
    assert link.is_symlink()
    assert contents(old) == contents(sd1_onnx_folder)
    assert sorted(os.listdir(old.parent)) == ["engine", "link"]


def test_a_path_through_a_file_is_refused(tiny_sd1: Path, place: Path) -> None:
    (place / "file").write_text("x")
    with pytest.raises(CallerError, match="can't be written"):
        build(tiny_sd1, place / "file" / "engine")


# When it goes wrong half-way


def test_a_disk_without_room_is_told_before_anything_is_written(
    tiny_sd1: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old.parent)
    usage = SimpleNamespace(total=10**9, used=10**9, free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"has 1 MB free; this engine needs about [0-9]+ MB"):
        build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))
    assert contents(old.parent) == before


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_copies(after: int, error: Callable[..., Any]) -> Callable[..., Any]:
    """shutil.copyfile that fails, leaving half a file, once it has copied `after` files."""
    copy, done = shutil.copyfile, []

    def copyfile(source: Path, target: Path, **options: Any) -> Any:
        done.append(target)
        if len(done) <= after:
            return copy(source, target, **options)
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        return error()

    return copyfile


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 4, 12])
def test_a_disk_that_fills_up_leaves_the_old_engine(
    tiny_sd1: Path, old: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    before = contents(old.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", failing_copies(after, no_space))
        with pytest.raises(ResourceError, match=r"no space is left for .*engine"):
            build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))
    assert contents(old.parent) == before


def test_a_disk_that_fills_up_while_weights_are_written(
    tiny_sd1: Path, copy_model: CopyModel, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    def half_a_file(model: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        no_space()

    model = copy_model(tiny_sd1)
    change_weight(model / "text_encoder" / "model.safetensors", 0.25)
    before = contents(old.parent)
    monkeypatch.setattr(onnx_ir, "save", half_a_file)
    with pytest.raises(ResourceError, match="No space left"):
        build(model, old, Options(backend="onnxruntime", batch=BATCH))
    assert contents(old.parent) == before


@pytest.mark.parametrize("after", [0, 4, 12])
def test_an_interruption_leaves_the_old_engine(
    tiny_sd1: Path, old: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    before = contents(old.parent)
    monkeypatch.setattr(shutil, "copyfile", failing_copies(after, interrupted))
    with pytest.raises(KeyboardInterrupt):
        build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))
    assert contents(old.parent) == before


@pytest.mark.parametrize("call", [1, 2])
def test_an_interruption_of_the_exchange_leaves_the_old_engine(
    tiny_sd1: Path, old: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    before, rename, calls = contents(old.parent), Path.rename, []

    def renaming(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renaming)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))
    assert contents(old.parent) == before


def test_a_fault_leaves_nothing_where_nothing_was(
    tiny_sd1: Path, sd1_onnx_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "copyfile", failing_copies(4, interrupted))
    with pytest.raises(KeyboardInterrupt):
        build(
            tiny_sd1,
            place / "engine",
            Options(backend="onnxruntime", batch=BATCH),
            reuse=[sd1_onnx_folder],
        )
    assert os.listdir(place) == []
