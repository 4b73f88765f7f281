"""Adapter files and deltas that don't fit are refused, each with its own reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heatsink.runtime.adapter_file import (
    AdapterDelta,
    Targets,
    fuse,
    read_adapter,
    write_adapter,
)
from heatsink.runtime.errors import AdapterError, UnsafeFile
from heatsink.runtime.model import Model

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def lora(model: Model, component: str, path: str, rank: int, scale: float = 1.0) -> AdapterDelta:
    shape = model.weights(component).shape(f"{path}.weight")
    a, b = torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank) / 8
    return AdapterDelta(component, path, a, b, scale)


K = f"unet.{BLOCK}.attn2.to_k"
A, B = f"{K}.lora_A.weight", f"{K}.lora_B.weight"


def one(value: Tensor, index: tuple[int, ...], number: float) -> Tensor:
    copy = value.clone()
    copy[index] = number
    return copy


Change = Callable[[dict[str, Tensor]], dict[str, Any]]
BAD: dict[str, tuple[Change, set[str], str]] = {
    "unknown module": (
        lambda t: {"unet.nowhere.to_k.lora_A.weight": t[A]},
        {"unet.nowhere.to_k.lora_A.weight"}, "unknown target: unet has no linear or conv",
    ),
    "unknown component": (
        lambda t: {"transformer.to_k.lora_A.weight": t[A]},
        {"transformer.to_k.lora_A.weight"}, "unknown target: no component's prefix",
    ),
    "another model's encoder": (
        lambda t: {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": t[A]},
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"},
        "unknown target: the model has no text_encoder_2",
    ),
    "unknown kohya module": (
        lambda t: {"lora_unet_up_9.lora_up.weight": t[B]},
        {"lora_unet_up_9.lora_up.weight"}, "unknown target: unet has no linear or convolution up_9",
    ),
    "embedding": (
        lambda t: {"text_encoder.embeddings.token_embedding.lora_A.weight": t[A]},
        {"text_encoder.embeddings.token_embedding.lora_A.weight"}, "unknown target",
    ),
    "narrow": (lambda t: {A: t[A][:, :-1]}, {A, B}, "wrong shape: down"),
    "short": (lambda t: {B: t[B][:-1]}, {A, B}, "wrong shape: down"),
    "vector": (lambda t: {A: t[A][0]}, {A, B}, "wrong shape: the down matrix"),
    "spatial up": (
        lambda t: {B: t[B][:, :, None, None].expand(-1, -1, 3, 3)}, {A, B}, "a (3, 3) convolution",
    ),
    "ranks": (lambda t: {A: t[A][:-1]}, {A, B}, "rank mismatch: down has rank 3, up has rank 4"),
    "empty rank": (lambda t: {A: t[A][:0], B: t[B][:, :0]}, {A, B}, "rank mismatch"),
    "nan": (lambda t: {A: one(t[A], (0, 1), float("nan"))}, {A, B}, "non-finite: the down matrix"),
    "inf": (lambda t: {B: one(t[B], (0, 1), float("inf"))}, {A, B}, "non-finite: the up matrix"),
    "alone": (lambda t: {A: None}, {B}, "incomplete: no down matrix"),
    "alpha": (
        lambda t: {f"{K}.alpha": torch.tensor(float("nan"))},
        {A, B, f"{K}.alpha"}, "alpha is [nan]",
    ),
    "twice": (
        lambda t: {f"{K}.lora.down.weight": t[A] + 1},
        {A, f"{K}.lora.down.weight"}, "the same target as",
    ),
    "dora": (
        lambda t: {f"{K}.lora_magnitude_vector": t[B][:, 0]},
        {f"{K}.lora_magnitude_vector"}, "DoRA is not supported",
    ),
    "loha": (lambda t: {f"{K}.hada_w1_a": t[A]}, {f"{K}.hada_w1_a"}, "LoHa is not supported"),
    "bias": (
        lambda t: {f"{K}.lora_B.bias": t[B][:, 0]},
        {f"{K}.lora_B.bias"}, "biases are not supported",
    ),
    "stranger": (lambda t: {"step": torch.ones(1)}, {"step"}, "no tensor of a LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_key_refuses_the_file(case: str, tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    change, keys, reason = BAD[case]
    model = Model.open(tiny_sd1)
    delta = lora(model, "unet", f"{BLOCK}.attn2.to_k", 4)
    write_adapter(tmp_path / "a.safetensors", [delta])
    tensors = load_file(tmp_path / "a.safetensors")
    changed = {**tensors, **change(tensors)}
    kept = {key: value.clone().contiguous() for key, value in changed.items() if value is not None}
    save_file(kept, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match=r"keys can't be applied, so none is") as caught:
        read_adapter(tmp_path / "b.safetensors", model)
    bad = {key for key, why in caught.value.refused.items() if reason in why}
    assert bad == keys
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"unet.r": 8, "unet.lora_alpha": 8}, "the configuration says 8, the matrices have 4"),
        ({"unet.r": 4, "unet.lora_alpha": "x"}, "alpha is 'x'"),
        ({"unet.r": 4, "unet.lora_alpha": 4, "unet.use_dora": True}, "asks for DoRA"),
        ({"unet.r": 4, "unet.alpha_pattern": {"(a+)+$": 3}}, "is no module path"),
    ],
)
def test_bad_metadata(fields: dict[str, Any], reason: str, tiny_sd1: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_sd1)
    delta = lora(model, "unet", f"{BLOCK}.attn2.to_k", 4)
    header = {"lora_adapter_metadata": json.dumps(fields)}
    write_adapter(tmp_path / "a", [delta], metadata=header)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path / "a", model)
    assert reason in str(caught.value)
    alpha = {f"{K}.alpha": torch.tensor(4.0), **load_file(tmp_path / "a")}
    save_file(alpha, tmp_path / "b", metadata={"lora_adapter_metadata": '{"unet.r": 4}'})
    with pytest.raises(AdapterError, match="alpha is given twice"):
        read_adapter(tmp_path / "b", model)
    write_adapter(tmp_path / "c", [delta], metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(AdapterError, match="is not JSON"):
        read_adapter(tmp_path / "c", model)


def test_damaged_and_unsafe_files(tiny_sd1: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_sd1)
    targets = Targets.of(model)
    path = tmp_path / "a.safetensors"
    write_adapter(path, [lora(model, "unet", f"{BLOCK}.attn2.to_k", 4)])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="truncated, damaged or no safetensors"):
        read_adapter(path, targets)
    path.write_bytes(pickle.dumps({"a": [1] * 50}))
    with pytest.raises(UnsafeFile, match="pickle"):
        read_adapter(path, targets)
    path.rename(tmp_path / "a.pt")
    with pytest.raises(UnsafeFile, match="is a pickle"):
        read_adapter(tmp_path / "a.pt", targets)
    with pytest.raises(AdapterError, match="missing or not a file"):
        read_adapter(path, targets)
    save_file({}, path)
    with pytest.raises(AdapterError, match="holds no tensors"):
        read_adapter(path, targets)


def test_fusing_what_does_not_fit_is_refused(tiny_sd1: Path, tiny_sdxl: Path, seed: int) -> None:
    torch.manual_seed(seed)
    small, large = Model.open(tiny_sd1), Model.open(tiny_sdxl)
    weights = small.weights("unet")
    other = lora(large, "unet", "mid_block.attentions.0.transformer_blocks.1.attn2.to_k", 2)
    with pytest.raises(AdapterError, match=r"1 deltas don't fit unet: .*unknown target"):
        fuse(weights, [other])
    misfit = AdapterDelta("unet", "conv_in", torch.ones(2, 3), torch.ones(4, 2))
    with pytest.raises(AdapterError, match=r"wrong shape: \(4, 3\) onto \(32, 4, 3, 3\)"):
        fuse(weights, [misfit])
    good = lora(small, "unet", "conv_in", 2)
    with pytest.raises(AdapterError, match="the scale is nan"):
        fuse(weights, [good], float("nan"))
