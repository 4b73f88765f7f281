"""The manifest: read back as it was written, and refused where it does not fit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from heatsink.export.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    Artefact,
    KnownAnswer,
    Manifest,
    read_manifest,
)
from heatsink.runtime.errors import EngineMismatch

ZEROS = "0" * 64


def fields() -> dict[str, Any]:
    """A small manifest as JSON values."""
    part = {
        "artefacts": [
            {"path": "unet.onnx", "sha256": ZEROS, "bytes": 3},
            {"path": "unet.origins.json", "sha256": ZEROS, "bytes": 2},
        ],
        "graph": "unet.onnx",
        "inputs": [{"name": "sample", "dtype": "float32", "shape": ["batch", 4]}],
        "outputs": [{"name": "out", "dtype": "float32", "shape": ["batch", 4]}],
        "precision": "fp32",
        "parameters": 5,
        "origins": "unet.origins.json",
        "source_digest": ZEROS,
        "build_key": ZEROS,
        "parity": {"max_abs": 0.0, "reference_max_abs": 1.0, "relative": 0.0, "allowed": 1e-6},
    }
    source = {
        "name": "tiny", "kind": "sd1", "digests": {"unet": ZEROS}, "scheduler": {},
        "text_encoders": [], "tokenizers": [], "latent_channels": 4, "vae_factor": 8,
        "default_size": [64, 64],
    }  # fmt: skip
    known = {"buckets": [1, 2], "probe_seed": 1, "answers": ["0" * 16, "f" * 16]}
    extent = {"min": 1, "opt": 1, "max": 2}
    return {
        "schema_version": SCHEMA_VERSION, "heatsink_version": "0.1.0", "backend": "onnxruntime",
        "libraries": {}, "device": "a processor", "source": source,
        "shapes": {"batch": extent, "height": extent, "width": extent},
        "components": {"unet": part}, "precisions": {"unet": "fp32"},
        "files": [{"path": "tokenizer/vocab.json", "sha256": ZEROS, "bytes": 1}],
        "exactness": {"mode": "strict", "components": {"unet": known}},
    }  # fmt: skip


def store(folder: Path, value: Any) -> Path:
    if isinstance(value, dict):
        value = {**value, "digest": "0" * 64}
        with contextlib.suppress(ValidationError):
            value["digest"] = Manifest.model_validate(
                {k: v for k, v in value.items() if k != "digest"}
            ).digest
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / FILE_NAME).write_text(text, encoding="utf-8")
    return folder


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    manifest = Manifest.model_validate(fields())
    manifest.write(tmp_path)
    again = read_manifest(tmp_path)
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.source.default_size == (64, 64)
    paths = [artefact.path for artefact in again.artefacts()]
    assert paths == ["tokenizer/vocab.json", "unet.onnx", "unet.origins.json"]


def test_digest_is_of_the_values_not_of_the_text(tmp_path: Path) -> None:
    manifest = Manifest.model_validate(fields())
    backwards = dict(reversed(fields().items()))
    assert read_manifest(store(tmp_path, backwards)).digest == manifest.digest
    changed = fields()
    changed["exactness"]["components"]["unet"]["answers"][1] = "e" * 16
    assert Manifest.model_validate(changed).digest != manifest.digest


def set_at(*path: str | int) -> Callable[[dict[str, Any], Any], None]:
    def change(raw: dict[str, Any], value: Any) -> None:
        *parents, last = path
        for key in parents:
            raw = raw[key]  # type: ignore[index]
        raw[last] = value  # type: ignore[index]

    return change


KNOWN = ("exactness", "components", "unet")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("surprise",), 1, "surprise: Extra inputs"),
        (("backend",), "abacus", "backend: Input should be"),
        (("files", 0, "path"), "../../etc/passwd", "inside the engine folder"),
        (("files", 0, "path"), "/etc/passwd", "inside the engine folder"),
        (("files", 0, "sha256"), "0" * 63, r"files\.0\.sha256"),
        (("files", 0, "bytes"), -1, r"files\.0\.bytes"),
        (("components", "unet", "graph"), "other.onnx", "'other.onnx' is not among"),
        (("components", "unet", "origins"), "other.json", "'other.json' is not among"),
        (("precisions",), {}, r"precisions: expected \['unet'\], got \[\]"),
        (("exactness", "components"), {}, r"exactness: expected \['unet'\]"),
        ((*KNOWN, "buckets"), [], "at least 1 item"),
        ((*KNOWN, "buckets"), [2, 1], "ascending positive numbers"),
        ((*KNOWN, "buckets"), [0, 2], "ascending positive numbers"),
        ((*KNOWN, "buckets"), [1, 4], "one for each of 4 rows, got 2"),
        ((*KNOWN, "answers"), ["0" * 16, "x" * 16], r"answers\.1"),
        ((*KNOWN, "answers"), [], r"a strict engine needs known answers, \['unet'\]"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    raw = fields()
    set_at(*path)(raw, value)
    with pytest.raises(EngineMismatch, match=message) as caught:
        read_manifest(store(tmp_path, raw))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_fast_engine_needs_no_answers(tmp_path: Path) -> None:
    raw = fields()
    raw["exactness"]["mode"] = "fast"
    raw["exactness"]["components"]["unet"]["answers"] = []
    assert read_manifest(store(tmp_path, raw)).exactness.components["unet"].buckets == [1, 2]


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "1", None])
def test_another_schema_version_is_refused(tmp_path: Path, version: Any) -> None:
    raw = {**fields(), "schema_version": version}
    with pytest.raises(EngineMismatch, match=r"schema version .* this Heatsink reads 1.*heatsink"):
        read_manifest(store(tmp_path, raw))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "[" * 100_000])
def test_damaged_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(EngineMismatch, match=r"manifest\.json (is damaged|has schema version)"):
        read_manifest(store(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EngineMismatch, match="is damaged"):
        read_manifest(tmp_path)


def test_what_is_no_engine_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(EngineMismatch, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(EngineMismatch, match="is not a folder"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(EngineMismatch, match="is not a folder"):
        read_manifest(tmp_path / "file")
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(EngineMismatch, match="can't be read"):
        read_manifest(tmp_path)


def test_sections_are_frozen() -> None:
    known = KnownAnswer(buckets=[1], probe_seed=0, answers=["0" * 16])
    with pytest.raises(ValidationError, match="frozen"):
        known.buckets = [2]
    with pytest.raises(ValidationError, match="inside the engine folder"):
        Artefact(path="", sha256=ZEROS, bytes=0)


# Adapter ports


def with_ports() -> dict[str, Any]:
    """The manifest of an engine whose UNet has ports."""
    raw = fields()
    part = raw["components"]["unet"]
    part["artefacts"].append({"path": "unet_ports.onnx", "sha256": ZEROS, "bytes": 4})
    raw["files"].append({"path": "adapters.json", "sha256": ZEROS, "bytes": 5})
    ported = {
        "graph": "unet_ports.onnx", "inputs": part["inputs"], "counts": [1, 2], "twin": True,
        "parity": part["parity"], "known": raw["exactness"]["components"]["unet"],
    }  # fmt: skip
    raw["ports"] = {
        "adapter_slots": 4, "adapter_rank": 8, "which": "all", "table": "adapters.json",
        "components": {"unet": ported},
    }  # fmt: skip
    return raw


def test_ports_are_read_back(tmp_path: Path) -> None:
    manifest = Manifest.model_validate(with_ports())
    manifest.write(tmp_path)
    again = read_manifest(tmp_path)
    assert again == manifest
    assert again.ports.components["unet"].counts == [1, 2]
    assert manifest.digest != Manifest.model_validate(fields()).digest


def test_fields_that_came_later_do_not_change_an_older_digest() -> None:
    # As it was written before there were any.
    older = {"adapter_slots": 0, "adapter_rank": 0, "controlnet": False}
    assert Manifest.model_validate(fields()).model_dump(mode="json")["ports"] == older


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw["ports"]["components"]["unet"].update(graph="other.onnx"),
            "'other.onnx' is no artefact of unet",
        ),
        (lambda raw: raw["ports"].update(table="x.json"), "'x.json' is not among the files"),
        (
            lambda raw: raw["ports"]["components"].update(
                vae_decoder=raw["ports"]["components"]["unet"]
            ),
            "no artefact of vae_decoder",
        ),
        (
            lambda raw: raw["ports"]["components"]["unet"].update(
                known={"buckets": [1], "probe_seed": 1, "answers": []}
            ),
            "a strict engine needs known answers, unet has none",
        ),
        (lambda raw: raw["ports"]["components"]["unet"].update(counts=[]), "counts"),
    ],
)
def test_ports_that_contradict_the_rest_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    raw = with_ports()
    raw["ports"]["components"]["unet"] = dict(raw["ports"]["components"]["unet"])
    change(raw)
    with pytest.raises(EngineMismatch, match=message):
        read_manifest(store(tmp_path, raw))
