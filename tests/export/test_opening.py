"""An engine folder is opened whole and as it was built, or refused with the file's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import heatsink
from heatsink.export.manifest import FILE_NAME, Manifest, read_manifest
from heatsink.export.opening import check_files
from heatsink.runtime.errors import EngineMismatch, HeatsinkError, NotBuilt

UNET_WEIGHTS = "unet.onnx.data"


@pytest.fixture
def folder(sd1_onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sd1_onnx_folder, tmp_path / "engine"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and, where it still fits the schema, its digest with it."""
    raw = json.loads((folder / FILE_NAME).read_text())
    change(raw)
    del raw["digest"]
    try:
        raw["digest"] = Manifest.model_validate(raw).digest
    except ValidationError:
        raw["digest"] = "0" * 64
    (folder / FILE_NAME).write_text(json.dumps(raw))


def load(folder: Path, **options: Any) -> Any:
    return heatsink.load(folder, threads=1, **options)


def test_a_device_it_was_not_built_for_is_refused(tmp_path: Path) -> None:
    # Before the folder is looked at.
    with pytest.raises(NotBuilt, match=r"'cuda': engines for it are not built yet; .* on 'cpu'"):
        heatsink.load(tmp_path / "engine", device="cuda")


def test_opens_as_built(sd1_onnx_folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    engine = load(sd1_onnx_folder, progress=lambda *args: seen.append(args))
    names = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    opened = [(what, done, total) for what, done, total in seen if what == "opening"]
    assert opened == [("opening", done + 1, 4) for done in range(len(names))]
    size = sum(artefact.bytes for artefact in read_manifest(sd1_onnx_folder).artefacts())
    checked = [(done, total) for what, done, total in seen if what == "checking files"]
    assert checked[-1] == (size, size)
    manifest = read_manifest(sd1_onnx_folder)
    assert engine.spec.digest == manifest.digest
    assert engine.spec.default_size == (64, 64)
    assert engine.spec.vae_factor == 8
    assert manifest.digest[:12] in repr(engine)


def artefacts() -> list[str]:
    parts = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    ends = [".onnx", ".onnx.data", ".origins.json"]
    return [part + end for part in parts for end in ends] + ["tokenizer/tokenizer_config.json"]


def test_every_file_of_the_folder_is_vouched_for(sd1_onnx_folder: Path) -> None:
    files = {
        path.relative_to(sd1_onnx_folder).as_posix()
        for path in sd1_onnx_folder.rglob("*")
        if path.is_file()
    }
    assert files == {FILE_NAME, *(a.path for a in read_manifest(sd1_onnx_folder).artefacts())}
    assert files >= set(artefacts())


@pytest.mark.parametrize("name", artefacts())
@pytest.mark.parametrize("where", [0, -1])
def test_a_flipped_bit_is_found(folder: Path, name: str, where: int) -> None:
    path = folder / name
    flip(path, where)
    with pytest.raises(EngineMismatch, match=f"is damaged: {name} has another SHA-256") as caught:
        load(folder)
    assert caught.value.exit_code == 2
    assert "heatsink build" in str(caught.value)


def test_a_cut_and_a_missing_file_are_found(folder: Path) -> None:
    path = folder / UNET_WEIGHTS
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineMismatch, match=f"{UNET_WEIGHTS} has {size - 1} bytes.* {size}"):
        load(folder)
    path.unlink()
    with pytest.raises(EngineMismatch, match=f"incomplete: {UNET_WEIGHTS} is missing"):
        load(folder)


def test_a_damaged_manifest_is_found(folder: Path) -> None:
    path = folder / FILE_NAME
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(EngineMismatch, match=r"manifest\.json is damaged"):
        load(folder)
    path.unlink()
    with pytest.raises(EngineMismatch, match="is not an engine folder"):
        load(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"beta_end": 0.012', '"beta_end": 0.013'),
        ('"force_zeros_for_empty_prompt": false', '"force_zeros_for_empty_prompt": true'),
        ('"vae_factor": 8', '"vae_factor": 9'),
        ('"probe_seed": 2', '"probe_seed": 3'),
    ],
)
def test_a_flipped_digit_in_the_manifest_is_found(folder: Path, before: str, after: str) -> None:
    path = folder / FILE_NAME
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(EngineMismatch, match=r"manifest\.json is damaged: its contents have"):
        load(folder)


def test_a_flipped_bit_in_a_checksum_is_found(folder: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        artefact = raw["components"]["unet"]["artefacts"][0]
        artefact["sha256"] = artefact["sha256"].translate(str.maketrans("0123", "1032"))

    edit(folder, change)
    with pytest.raises(EngineMismatch, match="another SHA-256"):
        load(folder)


def test_another_version_is_refused(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(schema_version=2))
    with pytest.raises(EngineMismatch, match="schema version 2, this Heatsink reads 1"):
        load(folder)


def test_another_backend_is_refused(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(backend="tensorrt"))
    with pytest.raises(NotBuilt, match="'tensorrt'"):
        load(folder)


def test_another_answer_refuses_the_engine_when_it_is_opened(folder: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        answers = raw["exactness"]["components"]["unet"]["answers"]
        answers[0] = f"{int(answers[0], 16) ^ 1:016x}"

    edit(folder, change)
    with pytest.raises(EngineMismatch, match="unet: batch 1 does not give the known answer"):
        load(folder)


def test_another_answer_refuses_a_bucket_at_its_first_use(folder: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        known = raw["exactness"]["components"]["unet"]
        assert known["buckets"] == [1, 2, 4]
        known["answers"][3] = "0" * 16

    edit(folder, change)
    engine = load(folder)
    assert len(engine.generate("a cat", steps=1).images) == 1
    with pytest.raises(EngineMismatch, match=r"unet: batch 4 does not .*rows \[3\]"):
        engine.generate(["a cat", "a dog"], steps=1)


def test_without_verification_changed_weights_still_give_another_answer(folder: Path) -> None:
    path = folder / UNET_WEIGHTS
    # The low bit of one weight's mantissa, in the middle of the file.
    flip(path, path.stat().st_size // 8 * 4)
    with pytest.raises(EngineMismatch, match="unet: batch 1 does not give the known answer"):
        load(folder, verify=False)


def test_a_graph_that_can_t_be_read_is_refused(folder: Path) -> None:
    (folder / "unet.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineMismatch, match=r"ONNX Runtime can't open unet\.onnx"):
        load(folder, verify=False)


def test_check_files_passes_over_nothing(sd1_onnx_folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(sd1_onnx_folder)
    check_files(sd1_onnx_folder, manifest)
    for artefact in manifest.artefacts():
        (tmp_path / artefact.path).parent.mkdir(exist_ok=True)
    with pytest.raises(HeatsinkError, match="incomplete"):
        check_files(tmp_path, manifest)
