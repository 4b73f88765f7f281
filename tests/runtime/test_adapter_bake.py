"""Adapters baked into a copy of a model folder: the same weights as fused, and nothing else new."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heatsink.runtime.adapter_bake import bake
from heatsink.runtime.adapter_delta import AdapterDelta, fuse_model, scaled
from heatsink.runtime.digest import sha256_file
from heatsink.runtime.errors import ModelError, NonFiniteWeights
from heatsink.runtime.model import Model

PATHS = {
    "unet": ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "conv_in"),
    "text_encoder": ("encoder.layers.1.mlp.fc1",),
}
UNET = "unet/diffusion_pytorch_model.safetensors"


def some_deltas(model: Model, components: tuple[str, ...] = ("unet",)) -> list[AdapterDelta]:
    found = []
    for component in components:
        weights = model.weights(component)
        for end in PATHS[component]:
            path = next(n for n in weights if n.endswith(f"{end}.weight")).removesuffix(".weight")
            shape = weights.shape(f"{path}.weight")
            a, b = torch.randn(2, *shape[1:]) / 4, torch.randn(shape[0], 2) / 4
            magnitude = torch.rand(shape[0]) + 0.5 if end == "conv_in" else None
            found.append(AdapterDelta(component, path, a, b, 0.5, magnitude))
    return found


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_is_the_fused_model(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(seed)
    model, out = Model.open(tiny_sd1), tmp_path / "out"
    out.mkdir()
    deltas = some_deltas(model, ("unet", "text_encoder"))
    reports: list[tuple[str, int, int]] = []
    bake(model, deltas, out, lambda *report: reports.append(report))
    assert reports[-1] == ("merging", 3, 3)
    assert files(out) == files(tiny_sd1)
    changed = {
        name for name in files(out) if sha256_file(out / name) != sha256_file(tiny_sd1 / name)
    }
    assert changed == {UNET, "text_encoder/model.safetensors"}
    fused, baked = fuse_model(model, deltas), Model.open(out)
    for component in model.components:
        assert baked.digest(component) == fused.digest(component)
    pipe: Any = StableDiffusionPipeline.from_pretrained(out)
    for component in ("unet", "text_encoder"):
        state, weights = getattr(pipe, component).state_dict(), fused.weights(component)
        assert all(torch.equal(state[name], weights[name]) for name in weights)
    # The header, its metadata among it, is the old one.
    with safe_open(out / UNET, "pt") as new, safe_open(tiny_sd1 / UNET, "pt") as old:
        assert new.metadata() == old.metadata()


def test_weights_keep_their_dtype(
    tiny_sd1: Path, copy_model: Callable[[Path], Path], tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    folder, out = copy_model(tiny_sd1), tmp_path / "out"
    out.mkdir()
    halves = {name: value.half() for name, value in load_file(folder / UNET).items()}
    save_file(halves, folder / UNET, metadata={"format": "pt"})
    model = Model.open(folder)
    deltas = some_deltas(model)
    bake(model, [*scaled(deltas, 0.5), *scaled(deltas, 0.25)], out)
    baked = load_file(out / UNET)
    assert {value.dtype for value in baked.values()} == {torch.float16}
    fused = fuse_model(model, [*scaled(deltas, 0.5), *scaled(deltas, 0.25)]).weights("unet")
    assert all(torch.equal(baked[name], fused[name]) for name in fused)
    changed = {name for name in baked if not torch.equal(baked[name], halves[name])}
    assert changed == {delta.weight_name for delta in deltas}


def test_shards_stay_and_other_variants_of_changed_weights_go(
    tiny_sd1: Path, copy_model: Callable[[Path], Path], tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    folder, out = copy_model(tiny_sd1), tmp_path / "out"
    out.mkdir()
    whole = load_file(folder / UNET)
    names = sorted(whole)
    (folder / UNET).unlink()
    table = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, folder / "unet" / shard)
        table.update(dict.fromkeys(part, shard))
    index = json.dumps({"metadata": {}, "weight_map": table})
    (folder / f"{UNET}.index.json").write_text(index)
    # What would be the old weights under other names.
    save_file(whole, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    stale = json.dumps(
        {"weight_map": {"conv_in.weight": "diffusion_pytorch_model.fp16-1.safetensors"}}
    )
    (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(stale)
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"old")
    (folder / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"kept")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("hidden")
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("kept")
    model = Model.open(folder)
    deltas = some_deltas(model)
    bake(model, deltas, out)
    assert files(folder) - files(out) == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.bin",
        ".cache/x",
    }
    assert files(out) <= files(folder)
    assert Model.open(out).digest("unet") == fuse_model(model, deltas).digest("unet")


def test_what_links_point_to_is_copied(
    tiny_sd1: Path, copy_model: Callable[[Path], Path], tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    folder, out = copy_model(tiny_sd1), tmp_path / "out"
    out.mkdir()
    (folder / "vae").rename(tmp_path / "elsewhere")
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    blob = tmp_path / "blob"
    (folder / UNET).rename(blob)
    (folder / UNET).symlink_to(blob)
    before = sha256_file(blob)
    bake(Model.open(folder), some_deltas(Model.open(folder)), out)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "vae/config.json").is_file()
    assert sha256_file(blob) == before != sha256_file(out / UNET)


def test_what_cannot_be_baked(
    tiny_sd1: Path, copy_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder, out = copy_model(tiny_sd1), tmp_path / "out"
    out.mkdir()
    halves = {name: value.half() for name, value in load_file(folder / UNET).items()}
    save_file(halves, folder / UNET)
    model = Model.open(folder)
    shape = model.weights("unet").shape("conv_in.weight")
    huge = AdapterDelta("unet", "conv_in", torch.ones(1, *shape[1:]), torch.ones(shape[0], 1), 1e5)
    with pytest.raises(NonFiniteWeights, match=r"merged, the weight conv_in.weight would hold NaN"):
        bake(model, [huge], out)
    model.path = folder / UNET
    with pytest.raises(ModelError, match="is a single file; merging takes a model folder"):
        bake(model, [], out)
