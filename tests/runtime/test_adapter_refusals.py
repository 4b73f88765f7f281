"""Adapter files and deltas that don't fit are refused, each with its own reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
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
from heatsink.runtime.errors import AdapterError, DamagedFile, UnsafeFile
from heatsink.runtime.model import Model

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def lora(model: Model, component: str, path: str, rank: int, scale: float = 1.0) -> AdapterDelta:
    shape = model.weights(component).shape(f"{path}.weight")
    a, b = torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank) / 8
    return AdapterDelta(component, path, a, b, scale)


K = f"unet.{BLOCK}.attn2.to_k"
A, B = f"{K}.lora_A.weight", f"{K}.lora_B.weight"
M, D, MID = f"{K}.lora_magnitude_vector", f"{K}.dora_scale", f"{K}.lora_mid.weight"


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
    "integers": (lambda t: {A: t[A].int()}, {A, B}, "unsupported: the down tensor is torch.int32"),
    "magnitude of inputs": (
        lambda t: {M: torch.ones(1, 32)}, {A, B, M}, "unsupported: the magnitude (1, 32) is over",
    ),
    "dora_scale of inputs": (
        lambda t: {D: torch.ones(1, 32)}, {A, B, D}, "unsupported: the magnitude (1, 32) is over",
    ),
    "magnitude of another": (
        lambda t: {M: torch.ones(33)}, {A, B, M}, "wrong shape: the magnitude is (33,) for 32",
    ),
    "two magnitudes": (
        lambda t: {M: torch.ones(32), D: torch.ones(32, 1)}, {A, B, M, D},
        "contradiction: both lora_magnitude_vector and dora_scale",
    ),
    "magnitude nan": (
        lambda t: {M: torch.full((32,), float("nan"))}, {A, B, M}, "non-finite: the magnitude",
    ),
    "magnitude alone": (
        lambda t: {A: None, B: None, M: torch.ones(32)}, {M}, "incomplete: no down matrix",
    ),
    "mid of another rank": (
        lambda t: {MID: torch.ones(3, 3, 1, 1)}, {A, B, MID}, "rank mismatch: down has rank 4",
    ),
    "flat mid": (lambda t: {MID: torch.ones(4, 4)}, {A, B, MID}, "wrong shape: the mid tensor"),
    "mid nan": (
        lambda t: {MID: torch.full((4, 4, 1, 1), float("nan"))}, {A, B, MID}, "non-finite: the",
    ),
    "lokr": (lambda t: {f"{K}.lokr_w1": t[A]}, {f"{K}.lokr_w1"}, "unsupported: LoKr"),
    "embedding of peft": (
        lambda t: {f"{K}.lora_embedding_A": t[A]}, {f"{K}.lora_embedding_A"},
        "unsupported: adapters of embeddings",
    ),
    "difference": (lambda t: {f"{K}.diff": t[A]}, {f"{K}.diff"}, "unsupported: whole differences"),
    "norm": (lambda t: {f"{K}.w_norm": t[A]}, {f"{K}.w_norm"}, "unsupported: adapters of norms"),
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
        (
            {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_dora": True},
            "incomplete: the configuration asks for DoRA",
        ),
        ({"unet.r": 4, "unet.lora_alpha": 10**400}, "non-finite: the configuration's alpha"),
        ({"unet.rank_pattern": [1]}, "patterns are [1], no table"),
        ({"unet.r": 4, "unet.peft_type": "LOHA"}, "unsupported: the configuration is of LOHA"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, "moves the base weights too"),
        ({"unet.lora_bias": True}, "unsupported: the configuration asks for lora_bias"),
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


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", r"is empty \(0 bytes\)"),
    "a few bytes": (lambda data: data[:5], "truncated within its header: 5 bytes"),
    "half a header": (lambda data: data[:40], "truncated within its header: 40 bytes"),
    "a part": (lambda data: data[:-8], r"is truncated: \d+ of \d+ bytes"),
    "too long": (lambda data: data + b"1234", "damaged: 4 bytes follow the last tensor"),
    "a picture": (lambda data: b"\x89PNG\r\n\x1a\n" + data, "no safetensors file"),
    "no JSON": (lambda data: data.replace(b'{"', b"{;", 1), "its header is not JSON"),
    "deep": (
        lambda data: (99_999).to_bytes(8, "little") + b"[" * 99_999,
        "its header is not JSON",
    ),
    "a list": (lambda data: (4).to_bytes(8, "little") + b"[12]", "header is no table of tensors"),
    "odd places": (
        lambda data: (25).to_bytes(8, "little") + b'{"a":{"data_offsets":"x"}}'[:25] + b"}",
        "header is no table of tensors|not JSON",
    ),
    "metadata": (
        lambda data: (24).to_bytes(8, "little") + b'{"__metadata__":{"a":1}}',
        "its metadata is no JSON object of texts",
    ),
    "a dtype of its own": (lambda data: data.replace(b"F32", b"X32"), "damaged or no safetensors"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_says_how(case: str, tiny_sd1: Path, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    targets, path = Targets.of(Model.open(tiny_sd1)), tmp_path / "a.safetensors"
    write_adapter(path, [lora(Model.open(tiny_sd1), "unet", f"{BLOCK}.attn2.to_k", 4)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile, match=message):
        read_adapter(path, targets)


def test_missing_and_unsafe_files(tiny_sd1: Path, tmp_path: Path) -> None:
    targets, path = Targets.of(Model.open(tiny_sd1)), tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps({"a": [1] * 50}))
    with pytest.raises(UnsafeFile, match="named as safetensors but holds a pickle"):
        read_adapter(path, targets)
    path.rename(tmp_path / "a.pt")
    with pytest.raises(UnsafeFile, match="is a pickle"):
        read_adapter(tmp_path / "a.pt", targets)
    with pytest.raises(AdapterError, match="missing or not a file"):
        read_adapter(path, targets)
    save_file({}, path)
    with pytest.raises(AdapterError, match="holds no tensors"):
        read_adapter(path, targets)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", ["dora_scale", "lora_magnitude_vector"])
def test_a_row_of_magnitudes_of_a_convolution(
    square: bool, name: str, tiny_sd1: Path, tmp_path: Path
) -> None:
    """Of a square one, a `dora_scale` may be LyCORIS's over the inputs, or PEFT's, renamed."""
    model = Model.open(tiny_sd1)
    path = "down_blocks.0.resnets.0.conv1" if square else "down_blocks.1.resnets.0.conv1"
    delta = lora(model, "unet", path, 2)
    outputs, inputs = delta.weight_shape[:2]
    assert (outputs == inputs) == square
    write_adapter(tmp_path / "a", [delta])
    file, values = load_file(tmp_path / "a"), torch.rand(1, outputs, 1, 1)
    save_file({**file, f"unet.{path}.{name}": values}, tmp_path / "b")
    if square and name == "dora_scale":
        with pytest.raises(AdapterError, match="nothing tells which"):
            read_adapter(tmp_path / "b", model)
    else:
        magnitude = read_adapter(tmp_path / "b", model)[0].magnitude
        assert magnitude is not None
        assert torch.equal(magnitude, values.flatten())
    inputs_wise = torch.rand(1, inputs, 1, 1)
    save_file({**file, f"unet.{path}.{name}": inputs_wise}, tmp_path / "b")
    if not square:
        with pytest.raises(AdapterError, match="is over the inputs, not the outputs"):
            read_adapter(tmp_path / "b", model)


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
    with pytest.raises(AdapterError, match=r"wrong shape: the magnitude is \(1, 32\)"):
        fuse(weights, [replace(good, magnitude=torch.ones(1, 32))])
    with pytest.raises(AdapterError, match="the scale is nan"):
        fuse(weights, [good], float("nan"))
