"""Fused weights against PEFT's and diffusers', DoRA and several adapters among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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
PATHS = (
    f"{BLOCK}.attn2.to_k",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
)
MODULES = ["to_k", "proj_in", "conv1"]


def some_deltas(weights: Weights, *, dora: bool = False) -> list[AdapterDelta]:
    found = []
    for path in PATHS:
        shape = weights.shape(f"{path}.weight")
        a, b = torch.randn(4, *shape[1:]) / 8, torch.randn(shape[0], 4) / 8
        lengths = weights[f"{path}.weight"].float().flatten(1).norm(dim=1)
        magnitude = lengths * (torch.rand(shape[0]) + 0.5) if dora else None
        found.append(AdapterDelta("unet", path, a, b, 0.5, magnitude))
    return sorted(found, key=lambda d: d.module_path)


def in_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    def cast(value: Tensor) -> Tensor:
        return value.to(dtype)

    entries = {
        name: replace(entry, dtype=dtype, read=entry.derive(cast, entry.shape, "").read)
        for name, entry in weights.entries.items()
    }
    return Weights("unet", entries)


def exact(base: Tensor, deltas: list[AdapterDelta]) -> Tensor:
    """The formula in float64."""
    w0 = base.double().flatten(1)
    total, factor = torch.zeros_like(w0), torch.ones(len(w0), 1, dtype=torch.float64)
    for d in deltas:
        product = d.scale * (d.b.double() @ d.a.double().flatten(1))
        if d.magnitude is None:
            total += product
            continue
        gain = (d.magnitude.double() / (w0 + product).norm(dim=1))[:, None]
        factor += gain - 1
        total += gain * product
    return (w0 * factor + total).reshape(base.shape)


def assert_near(ours: Tensor, theirs: Tensor, reference: Tensor) -> None:
    """As near the float64 result as theirs, by the house's budget."""
    eps = torch.finfo(ours.dtype).eps
    error, plain = ((each.double() - reference).abs().max() for each in (ours, theirs))
    size = reference.abs().max()
    # Theirs is right to a few roundings: the comparison means something.
    assert plain <= 8 * eps * size
    assert error <= 2 * (plain + eps * size)


def fresh_unet(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_one_adapter_is_what_peft_merges(
    dora: bool, dtype: torch.dtype, tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    from peft import PeftModel

    torch.manual_seed(seed)
    weights = in_dtype(Model.open(tiny_sd1).weights("unet"), dtype)
    deltas = some_deltas(weights, dora=dora)
    write_adapter(tmp_path / "adapter_model.safetensors", deltas, "peft")
    wrapped = PeftModel.from_pretrained(fresh_unet(tiny_sd1, dtype), tmp_path)
    theirs = wrapped.merge_and_unload().state_dict()
    fused = fuse(weights, deltas)
    for delta in deltas:
        name = delta.weight_name
        base = weights[name]
        assert fused[name].dtype == dtype == theirs[name].dtype
        assert_near(fused[name], theirs[name], exact(base, [delta]))
        assert (fused[name] - base).abs().max() > 1e-2
    others = set(weights) - {d.weight_name for d in deltas}
    assert all(torch.equal(fused[name], theirs[name]) for name in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_adapters_are_what_diffusers_fuses(
    dtype: torch.dtype, tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    weights = in_dtype(model.weights("unet"), dtype)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1, torch_dtype=dtype)
    shares = {"first": 0.75, "second": -0.5}
    merged = []
    for name, share in shares.items():
        write_adapter(tmp_path / f"{name}.safetensors", some_deltas(weights))
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
        merged += scaled(read_adapter(tmp_path / f"{name}.safetensors", model), share)
    pipe.set_adapters(list(shares), list(shares.values()))
    pipe.fuse_lora(components=["unet"], adapter_names=list(shares))
    theirs = {k.replace(".base_layer.", "."): v for k, v in pipe.unet.state_dict().items()}
    fused = fuse(weights, merged)
    for path in PATHS:
        name = f"{path}.weight"
        own = [d for d in merged if d.module_path == path]
        assert len(own) == 2
        assert fused[name].dtype == dtype == theirs[name].dtype
        assert_near(fused[name], theirs[name], exact(weights[name], own))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_diffusers_fuses_a_dora_that_is_written_here(
    scale: float, tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(seed)
    weights = Model.open(tiny_sd1).weights("unet")
    deltas = [replace(d, scale=scale) for d in some_deltas(weights, dora=True)]
    write_adapter(tmp_path / "a.safetensors", deltas)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd1)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet"])
    theirs = {k.replace(".base_layer.", "."): v for k, v in pipe.unet.state_dict().items()}
    fused = fuse(weights, deltas)
    for delta in deltas:
        name = delta.weight_name
        assert_near(fused[name], theirs[name], exact(weights[name], [delta]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_with_dora_round_once(dtype: torch.dtype, tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    weights = in_dtype(Model.open(tiny_sd1).weights("unet"), dtype)
    first, second = (some_deltas(weights, dora=True) for _ in range(2))
    merged = [*scaled(first, 0.75), *scaled(some_deltas(weights), 0.5), *scaled(second, -0.25)]
    fused = fuse(weights, merged)
    for path in PATHS:
        name = f"{path}.weight"
        reference = exact(weights[name], [d for d in merged if d.module_path == path])
        assert_near(fused[name], reference.to(dtype), reference)
    # The sum has no order beyond float32's: all three the other way round.
    again = fuse(weights, merged[::-1])
    for path in PATHS:
        name = f"{path}.weight"
        size = weights[name].abs().max().float()
        difference = (fused[name].float() - again[name].float()).abs().max()
        assert difference <= 4 * torch.finfo(dtype).eps * size


def test_an_adapter_at_weight_zero_is_left_out(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    deltas = some_deltas(model.weights("unet"), dora=True)
    assert scaled(deltas, 0.0) == []
    assert fuse(model.weights("unet"), deltas, 0.0).entries == model.weights("unet").entries
    assert fuse_model(model, scaled(deltas, 0)).digest("unet") == model.digest("unet")
    # A file's own alpha of 0 is no weight: a DoRA still sets the lengths.
    still = [replace(d, scale=0.0) for d in deltas]
    fused = fuse(model.weights("unet"), still)
    for delta in deltas:
        assert delta.magnitude is not None
        lengths = fused[delta.weight_name].double().flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, delta.magnitude.double(), rtol=1e-6, atol=0)
    plain = [replace(d, magnitude=None) for d in still]
    assert fuse(model.weights("unet"), plain).entries == model.weights("unet").entries


def test_the_digest_knows_the_magnitude(tiny_sd1: Path, seed: int) -> None:
    torch.manual_seed(seed)
    deltas = some_deltas(Model.open(tiny_sd1).weights("unet"), dora=True)
    other = [replace(d, magnitude=d.magnitude + 1) for d in deltas if d.magnitude is not None]
    plain = [replace(d, magnitude=None) for d in deltas]
    assert len({digest_deltas(each) for each in (deltas, other, plain)}) == 3
    wide = [replace(d, magnitude=d.magnitude.double()) for d in deltas if d.magnitude is not None]
    assert digest_deltas(wide) == digest_deltas(deltas)


def test_digests_of_plain_adapters_stay() -> None:
    """Receipts and engines hold them; computed by the version before DoRA."""
    a = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 4
    b = torch.arange(8, dtype=torch.float32).reshape(4, 2) / 8
    delta = AdapterDelta("unet", "mid_block.x", a, b, 0.75)
    known = "53d2d0e9888ffe3a5c128ea17f8a1bbb15d2f1e0a065c30f139f2a58834f6a8a"
    assert digest_deltas([delta]) == known
