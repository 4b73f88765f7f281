"""Building: whole or not at all, the same bytes every time, and nothing twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import heatsink
from heatsink.export import environment
from heatsink.export.build import Options, Report, build
from heatsink.export.manifest import read_manifest
from heatsink.runtime import noise
from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapter_write import write_adapter
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.errors import (
    AdapterError,
    CallerError,
    InvalidRequest,
    ModelError,
    NonFiniteWeights,
    NotBuilt,
    NumericError,
    UnsafeFile,
)
from heatsink.runtime.model import Model

# As the shared engine was built, so that its components may be taken over.
BATCH = (1, 2, 4)
PARTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
FUSE_SCALE = 0.8

CopyModel = Callable[[Path], Path]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def change_weight(path: Path, value: float) -> str:
    """Set the first element of the first floating-point tensor; returns the tensor's name."""
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    return name


def test_the_manifest_tells_what_was_built(sd1_onnx_folder: Path, tiny_sd1: Path) -> None:
    manifest = read_manifest(sd1_onnx_folder)
    model = Model.open(tiny_sd1)
    assert list(manifest.components) == PARTS
    assert manifest.source.kind == "sd1"
    assert manifest.source.digests == {name: model.digest(name) for name in PARTS}
    assert manifest.source.scheduler == model.scheduler_config
    assert manifest.backend == "onnxruntime"
    for name, part in manifest.components.items():
        assert part.parity.max_abs <= part.parity.allowed
        origins = json.loads((sd1_onnx_folder / part.origins).read_text())
        # Every parameter of the module is in the file once, with where it came from.
        assert {origin[0] for parts in origins.values() for origin in parts} <= set(
            model.weights(name)
        )
        assert all(parts for parts in origins.values())
    known = manifest.exactness.components
    assert [max(known[name].buckets + known[name].refused) for name in PARTS] == [4, 4, 2, 2]


def test_sdxl_is_described_too(sdxl_onnx_folder: Path) -> None:
    manifest = read_manifest(sdxl_onnx_folder)
    assert list(manifest.components) == ["text_encoder", "text_encoder_2", *PARTS[1:]]
    assert manifest.source.text_encoders == ["text_encoder", "text_encoder_2"]
    assert manifest.source.tokenizers == ["tokenizer", "tokenizer_2"]
    assert manifest.source.added_conditions == ["text_embeds", "time_ids"]
    inputs = [spec.name for spec in manifest.components["unet"].inputs]
    assert inputs == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]


@pytest.mark.usefixtures("no_building")
def test_building_again_changes_nothing(tiny_sd1: Path, old: Path) -> None:
    before = contents(old)
    report = build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))
    assert report.built == []
    assert report.reused == PARTS
    assert contents(old) == before
    assert os.listdir(old.parent) == ["engine"]
    assert old.stat().st_mode & 0o777 == 0o755


def test_what_is_damaged_is_built_again_to_the_same_bytes(
    tiny_sd1: Path, sd1_onnx_folder: Path, old: Path
) -> None:
    path = old / "text_encoder.onnx.data"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    report = build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))
    assert report.built == ["text_encoder"]
    assert report.reused == PARTS[1:]
    assert contents(old) == contents(sd1_onnx_folder)
    assert report.manifest.digest == read_manifest(sd1_onnx_folder).digest


@pytest.mark.parametrize(
    ("file", "built"),
    [
        ("text_encoder/model.safetensors", "text_encoder"),
        ("unet/diffusion_pytorch_model.safetensors", "unet"),
        # Its first tensor in the order of names is the decoder's.
        ("vae/diffusion_pytorch_model.safetensors", "vae_decoder"),
    ],
)
@pytest.mark.usefixtures("no_building")
def test_changed_weights_rebuild_their_component_alone(
    tiny_sd1: Path, copy_model: CopyModel, sd1_onnx_folder: Path, place: Path, file: str, built: str
) -> None:
    model = copy_model(tiny_sd1)
    change_weight(model / file, 0.25)
    # The order is that of PARTS: what comes before was taken over.
    with pytest.raises(AssertionError, match=f"^{built}$"):
        build(
            model,
            place / "engine",
            Options(backend="onnxruntime", batch=BATCH),
            reuse=[sd1_onnx_folder],
        )
    plans = {
        name: Model.open(model).digest(name) == Model.open(tiny_sd1).digest(name) for name in PARTS
    }
    assert [name for name, same in plans.items() if not same] == [built]
    assert contents(place) == {}


@pytest.mark.usefixtures("no_building")
def test_other_options_reuse_nothing(tiny_sd1: Path, sd1_onnx_folder: Path, place: Path) -> None:
    for options in (
        Options(backend="onnxruntime", batch=(1, 2, 3)),
        Options(batch=BATCH, strict=False),
    ):
        with pytest.raises(AssertionError, match="text_encoder"):
            build(tiny_sd1, place / "engine", options, reuse=[sd1_onnx_folder])


@pytest.mark.parametrize("name", ["instruction_set", "threads", "ops"])
@pytest.mark.usefixtures("no_building")
def test_known_answers_of_other_instructions_are_not_taken_over(
    tiny_sd1: Path, old: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = environment.identity()
    monkeypatch.setattr(environment, "identity", lambda: {**here, name: "another"})
    with pytest.raises(AssertionError, match="text_encoder"):
        build(tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH))


@pytest.mark.usefixtures("no_building")
def test_a_folder_to_reuse_that_is_no_engine_is_told(
    tiny_sd1: Path, old: Path, tmp_path: Path
) -> None:
    report = build(
        tiny_sd1, old, Options(backend="onnxruntime", batch=BATCH), reuse=[tmp_path / "nothing"]
    )
    assert any("nothing is reused from" in note for note in report.notes)


# What can't be built


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (Options(backend="tensorrt"), NotBuilt, "'tensorrt' is not built yet"),
        (Options(device="cuda"), NotBuilt, "'cuda': engines for it are not built yet"),
        (Options(precision="fp16"), NotBuilt, "'fp16' is not built yet"),
        (
            Options(backend="onnxruntime", batch=(0, 8, 4)),
            InvalidRequest,
            "1 <= min <= opt <= max <= 256, got 0:8:4",
        ),
        (Options(backend="onnxruntime", batch=(1, 8, 257)), InvalidRequest, "got 1:8:257"),
        (Options(size=(63, 64)), InvalidRequest, "height that is a positive multiple of 16.* 63"),
        (Options(size=(64, 72)), InvalidRequest, "width that is a positive multiple of 16.* 72"),
        (Options(size=(0, 64)), InvalidRequest, "height that is a positive multiple of 16.* 0"),
        (Options(fuse=((Path("x.safetensors"), float("nan")),)), InvalidRequest, "finite scale"),
        (Options(fuse=((Path("x.safetensors"), 1.0),)), AdapterError, r"x\.safetensors is missing"),
    ],
)
def test_options_that_can_t_be_built(
    tiny_sd1: Path, place: Path, options: Options, error: type[CallerError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        build(tiny_sd1, place / "engine", options)
    assert caught.value.exit_code == 2
    assert contents(place) == {}


def test_an_unknown_model_is_refused(place: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder or file"):
        build(place / "nowhere", place / "engine")
    assert os.listdir(place) == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(
    tiny_sd1: Path, copy_model: CopyModel, place: Path, part: str
) -> None:
    model = copy_model(tiny_sd1)
    shutil.rmtree(model / part)
    with pytest.raises(ModelError, match=part):
        build(model, place / "engine")
    assert os.listdir(place) == []


def test_pickles_are_refused(tiny_sd1: Path, copy_model: CopyModel, place: Path) -> None:
    model = copy_model(tiny_sd1)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({"x": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UnsafeFile, match=r"\.bin"):
        build(model, place / "engine")
    torch.save({"x": torch.zeros(1)}, weights)
    with pytest.raises(UnsafeFile, match="pickle"):
        build(model, place / "engine")
    assert os.listdir(place) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(
    tiny_sd1: Path, copy_model: CopyModel, place: Path, value: float
) -> None:
    model = copy_model(tiny_sd1)
    name = change_weight(model / "unet" / "diffusion_pytorch_model.safetensors", value)
    with pytest.raises(NonFiniteWeights, match=f"unet: the weight {name} holds 1 values") as caught:
        build(model, place / "engine")
    # The model is the caller's.
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, NumericError)
    assert os.listdir(place) == []


def test_weights_that_overflow_are_refused(
    tiny_sd1: Path, copy_model: CopyModel, sd1_onnx_folder: Path, place: Path
) -> None:
    model = copy_model(tiny_sd1)
    path = model / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    norm = next(name for name in tensors if name.endswith("layers.0.layer_norm1.weight"))
    tensors[norm] = torch.full_like(tensors[norm], 3e38)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFiniteWeights, match="text_encoder: output 'hidden' is not finite"):
        build(
            model,
            place / "engine",
            Options(backend="onnxruntime", batch=BATCH),
            reuse=[sd1_onnx_folder],
        )
    assert os.listdir(place) == []


# Fused adapters


@pytest.fixture(scope="module")
def adapter(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for a linear and a convolution of the UNet, strong enough to be seen."""
    model = Model.open(tiny_sd1)
    random = torch.Generator().manual_seed(5)
    deltas = []
    for module in ("down_blocks.0.attentions.0.proj_in", "mid_block.resnets.0.conv1"):
        shape = model.weights("unet").shape(f"{module}.weight")
        a = torch.randn(4, *shape[1:], generator=random) / 4
        b = torch.randn(shape[0], 4, generator=random) / 4
        deltas.append(AdapterDelta("unet", module, a, b, 0.5))
    path = tmp_path_factory.mktemp("adapters") / "brand.safetensors"
    write_adapter(path, deltas)
    return path


@pytest.fixture(scope="module")
def fused(
    tiny_sd1: Path, sd1_onnx_folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Report:
    out = tmp_path_factory.mktemp("fused") / "engine"
    options = Options(backend="onnxruntime", batch=BATCH, fuse=((adapter, FUSE_SCALE),))
    return build(tiny_sd1, out, options, reuse=[sd1_onnx_folder])


def test_fusing_rebuilds_what_it_changes_and_is_recorded(
    fused: Report, sd1_onnx_folder: Path, adapter: Path
) -> None:
    assert fused.built == ["unet"]
    assert fused.reused == ["text_encoder", "vae_decoder", "vae_encoder"]
    plain = read_manifest(sd1_onnx_folder)
    (entry,) = read_manifest(fused.folder).adapters
    assert (entry.name, entry.scale, entry.keys) == ("brand", FUSE_SCALE, 2)
    assert entry.sha256 == sha256_file(adapter)
    assert fused.manifest.digest != plain.digest
    assert fused.manifest.source.digests["unet"] != plain.source.digests["unet"]
    assert heatsink.load(fused.folder).spec.adapters == {"brand": FUSE_SCALE}


def test_fused_pictures_are_those_of_diffusers(
    fused: Report, tiny_sd1: Path, adapter: Path, sd1_onnx_engine: Any
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    asked: dict[str, Any] = {"seed": 3, "steps": 4, "guidance": 3.0, "scheduler": "ddim"}
    mine = heatsink.load(fused.folder, threads=1).generate("a red apple", **asked).images[0]
    plain = sd1_onnx_engine.generate("a red apple", **asked).images[0]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    pipeline.fuse_lora(lora_scale=FUSE_SCALE)
    latents = noise.normal_rows([3], noise.INITIAL, 0, (4, 8, 8))
    theirs = pipeline(
        "a red apple", num_inference_steps=4, guidance_scale=3.0, latents=latents
    ).images[0]
    assert psnr(mine, theirs) >= 60
    # The adapter is seen: the comparison could have failed.
    assert psnr(mine, plain) < 40


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal to noise ratio in dB of two 8-bit images."""
    a, b = (np.asarray(image, dtype=np.float64) for image in (first, second))
    assert a.shape == b.shape
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("fault", ["unknown key", "pickle", "truncated"])
def test_a_bad_adapter_leaves_nothing(
    tiny_sd1: Path, place: Path, tmp_path: Path, adapter: Path, fault: str
) -> None:
    path = tmp_path / "bad.safetensors"
    if fault == "unknown key":
        save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 4)}, path)
    elif fault == "pickle":
        torch.save({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(adapter.read_bytes()[:-1])
    with pytest.raises(CallerError, match=r"bad\.safetensors"):
        build(
            tiny_sd1,
            place / "engine",
            Options(backend="onnxruntime", batch=BATCH, fuse=((path, 1.0),)),
        )
    assert os.listdir(place) == []
