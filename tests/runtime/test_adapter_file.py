"""LoRA files: one normal form for every format; fusing equals diffusers' within a rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heatsink.runtime.adapter_file import (
    AdapterDelta,
    digest_deltas,
    fuse,
    fuse_model,
    read_adapter,
    scaled,
    write_adapter,
)
from heatsink.runtime.model import Model
from heatsink.runtime.weights import Weights

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
SCALE = 0.7


def lora(model: Model, component: str, path: str, rank: int, scale: float = 1.0) -> AdapterDelta:
    shape = model.weights(component).shape(f"{path}.weight")
    a, b = torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank) / 8
    return AdapterDelta(component, path, a, b, scale)


def some_deltas(model: Model, dtype: torch.dtype = torch.float32) -> list[AdapterDelta]:
    """A linear, a 1x1 and a 3x3 convolution of the UNet and linears of each text encoder."""
    encoders = [name for name in model.components if name.startswith("text_encoder")]
    blocks = {"sd1": (BLOCK, "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1")}
    mid = "mid_block.attentions.0"
    blocks["sdxl"] = (f"{mid}.transformer_blocks.1", f"{mid}.proj_in", "mid_block.resnets.1.conv1")
    block, projection, convolution = blocks[model.kind]
    found = [
        lora(model, "unet", f"{block}.attn2.to_k", 4, 0.5),
        lora(model, "unet", projection, 3, 2.0),
        lora(model, "unet", convolution, 2, 0.5),
    ]
    for encoder in encoders:
        names = model.weights(encoder)
        ends = ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.fc1.weight")
        paths = [name.removesuffix(".weight") for name in names if name.endswith(ends)]
        found += [lora(model, encoder, path, 4, 0.5) for path in sorted(paths)]
    found.sort(key=lambda delta: (delta.component, delta.module_path))
    return [
        AdapterDelta(d.component, d.module_path, d.a.to(dtype), d.b.to(dtype), d.scale)
        for d in found
    ]


def assert_same(first: list[AdapterDelta], second: list[AdapterDelta]) -> None:
    assert [(d.component, d.module_path) for d in first] == [
        (d.component, d.module_path) for d in second
    ]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.a, b.a)
        assert torch.equal(a.b, b.b)
        assert a.scale == b.scale


def exact(base: Tensor, deltas: list[AdapterDelta], scale: float) -> Tensor:
    total = base.double()
    for d in deltas:
        product = d.b.double() @ d.a.double().flatten(1)
        total = total + scale * d.scale * product.reshape(base.shape)
    return total


def magnitude(d: AdapterDelta) -> AdapterDelta:
    return AdapterDelta(d.component, d.module_path, d.a.abs(), d.b.abs(), abs(d.scale))


def assert_fused(
    pristine: Weights,
    fused: Weights,
    theirs: dict[str, Tensor],
    deltas: list[AdapterDelta],
    scale: float,
) -> int:
    """`fused` is as near the float64 result as diffusers' weights are; returns how many changed."""
    changed = 0
    for name, base in pristine.items():
        own = [d for d in deltas if (d.component, d.weight_name) == (pristine.component, name)]
        if not own:
            assert torch.equal(fused[name], base)
            assert torch.equal(theirs[name], base)
            continue
        reference = exact(base, own, scale)
        ours = (fused[name].double() - reference).abs().max()
        plain = (theirs[name].double() - reference).abs().max()
        eps = torch.finfo(base.dtype).eps
        # A sum of `rank` products, a scaling and an addition, each rounded once.
        size = exact(base.abs(), [magnitude(d) for d in own], abs(scale)).max()
        assert plain <= (own[0].rank + 3) * eps * size, name
        assert ours <= 2 * (plain + eps * reference.abs().max()), name
        assert (fused[name].double() - base.double()).abs().max() > 1e-3
        changed += 1
    return changed


def bare(state: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """A state dict after fusing, without what PEFT leaves around: adapters and `base_layer`."""
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items()}
    return {name: value for name, value in plain.items() if name in weights}


def diffusers_fused(folder: Path, file: Path, scale: float) -> dict[str, dict[str, Tensor]]:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    names = [n for n in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, n)]
    pipe.fuse_lora(components=names, lora_scale=scale)
    return {name: dict(getattr(pipe, name).state_dict()) for name in names}


def write_with_diffusers(folder: Path, target: Path) -> None:
    """A LoRA of UNet and text encoder made by PEFT and saved by diffusers with its metadata."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    common = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian"}
    unet = LoraConfig(
        **common, target_modules=UNET_MODULES, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 3}
    )
    text = LoraConfig(**common, target_modules=["q_proj", "fc2"], use_rslora=True)
    layers, metadata = {}, {}
    for name, config in (("unet", unet), ("text_encoder", text)):
        module = getattr(pipe, name)
        module.add_adapter(config)
        for key, parameter in module.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
        metadata[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(target, **layers, **metadata)


def test_a_file_of_diffusers_fuses_as_diffusers_does(
    tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    write_with_diffusers(tiny_sd1, tmp_path)
    file, model = tmp_path / "pytorch_lora_weights.safetensors", Model.open(tiny_sd1)
    deltas = read_adapter(file, model)
    assert len(deltas) == len(load_file(file)) / 2
    by_path = {d.module_path: d for d in deltas}
    # alpha 6: over rank 4; over to_k's own rank 2; to_v's own alpha 3; over the root of the rank.
    assert by_path[f"{BLOCK}.attn1.to_q"].scale == 1.5
    assert by_path[f"{BLOCK}.attn1.to_k"].scale == 3.0
    assert by_path[f"{BLOCK}.attn1.to_v"].scale == 0.75
    assert {d.scale for d in deltas if d.component == "text_encoder"} == {3.0}
    theirs = diffusers_fused(tiny_sd1, file, SCALE)
    fused = fuse_model(model, deltas, SCALE)
    changed = 0
    for component in ("unet", "text_encoder"):
        weights = model.weights(component)
        state = bare(theirs[component], weights)
        changed += assert_fused(weights, fused.weights(component), state, deltas, SCALE)
    assert changed == len(deltas)
    assert fused.digest("unet") != model.digest("unet")
    assert fused.digest("vae_decoder") == model.digest("vae_decoder")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_diffusers_reads_what_is_written_here(
    format: str, tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    deltas, components = some_deltas(model), ["unet", "text_encoder"]
    if format == "kohya":
        # diffusers 0.42 misses alphas that differ between attention and other modules in this
        # format, and (with transformers 5) a text encoder's attention: it says so and goes on.
        deltas, components = [d for d in deltas if d.component == "unet"], ["unet"]
        deltas = [replace(delta, scale=2 / delta.rank) for delta in deltas]
    write_adapter(tmp_path / "a.safetensors", deltas, format)
    theirs = diffusers_fused(tiny_sd1, tmp_path / "a.safetensors", SCALE)
    for component in components:
        weights = model.weights(component)
        fused = fuse(weights, deltas, SCALE)
        state = bare(theirs[component], weights)
        changed = assert_fused(weights, fused, state, deltas, SCALE)
        assert changed == sum(delta.component == component for delta in deltas)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_formats_read_back_the_same(
    kind: str, dtype: torch.dtype, tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model.open({"sd1": tiny_sd1, "sdxl": tiny_sdxl}[kind])
    deltas = some_deltas(model, dtype)
    read = {}
    for format in ("diffusers", "kohya"):
        write_adapter(tmp_path / format, deltas, format, metadata={"made": "here"})
        read[format] = read_adapter(tmp_path / format, model)
        assert_same(read[format], deltas)
    digests = {digest_deltas(each) for each in (deltas, *read.values())}
    assert len(digests) == 1
    assert digest_deltas(scaled(deltas, 0.5)) not in digests
    prefix = "lora_te_" if kind == "sd1" else "lora_te2_"
    assert any(key.startswith(prefix) for key in load_file(tmp_path / "kohya"))
    # From one file into the other format, straight from the mapping.
    write_adapter(tmp_path / "again", read["kohya"], "diffusers")
    assert (tmp_path / "again").read_bytes()[-2000:] == (tmp_path / "diffusers").read_bytes()[
        -2000:
    ]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fusing_rounds_once(dtype: torch.dtype, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    pristine = model.weights("unet")

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype)

    entries = {
        name: replace(entry, dtype=dtype, read=entry.derive(cast, entry.shape, "").read)
        for name, entry in pristine.entries.items()
    }
    half, deltas = Weights("unet", entries), some_deltas(model, dtype)
    fused = fuse(half, deltas + scaled(deltas, -0.25), SCALE)
    for delta in (d for d in deltas if d.component == "unet"):
        name = delta.weight_name
        reference = exact(half[name], [delta, *scaled([delta], -0.25)], SCALE)
        assert fused[name].dtype == dtype == fused.dtype(name)
        # Half a unit of each value's last place for the one rounding, and fp32's own error.
        ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(reference.abs())))
        tiny = 2.0**-24 * 64 * reference.abs().max() + torch.finfo(dtype).smallest_normal
        assert bool(((fused[name].double() - reference).abs() <= 0.5 * ulp + tiny).all())
    assert fuse(half, deltas, 0.0).entries == half.entries
    assert fused.source(f"{BLOCK}.attn2.to_k.weight").endswith("[+ 2 adapters]")


def test_fusing_starts_from_the_pristine_base(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    before = {name: value.clone() for name, value in model.weights("unet").items()}
    first = fuse_model(model, some_deltas(model))
    digest = first.digest("unet")
    assert fuse_model(model, some_deltas(model)).digest("unet") != digest
    assert all(torch.equal(model.weights("unet")[name], before[name]) for name in before)
    assert fuse_model(model, []).digest("unet") == model.digest("unet")


def test_alpha_given_to_the_writer(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    deltas = some_deltas(model)
    for format in ("diffusers", "kohya"):
        write_adapter(tmp_path / format, deltas, format, alpha=8)
        read = read_adapter(tmp_path / format, model)
        assert [d.scale for d in read] == [8 / d.rank for d in deltas]
    with pytest.raises(ValueError, match="format is 'lycoris'"):
        write_adapter(tmp_path / "a", deltas, "lycoris")
    with pytest.raises(ValueError, match="expected one for each"):
        write_adapter(tmp_path / "a", [deltas[0], deltas[0]])
