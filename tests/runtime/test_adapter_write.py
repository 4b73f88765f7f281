"""LoRA files written here: every format gives back every bit, and PEFT opens its own."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heatsink.runtime.adapter_config import METADATA_KEY
from heatsink.runtime.adapter_file import (
    AdapterDelta,
    digest_deltas,
    inspect_adapter,
    read_adapter,
    write_adapter,
)
from heatsink.runtime.errors import AdapterError
from heatsink.runtime.model import Model

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_K, CONV = f"{BLOCK}.attn2.to_k", "down_blocks.0.resnets.0.conv1"
POINT = "down_blocks.0.attentions.0.proj_in"
Q_PROJ = "encoder.layers.0.self_attn.q_proj"


def lora(model: Model, component: str, path: str, rank: int, **fields: Any) -> AdapterDelta:
    names = model.weights(component)
    path = next(name for name in names if name.endswith(f"{path}.weight")).removesuffix(".weight")
    shape = names.shape(f"{path}.weight")
    a, b = torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank) / 8
    return AdapterDelta(component, path, a, b, **fields)


def dora(delta: AdapterDelta) -> AdapterDelta:
    return replace(delta, magnitude=torch.rand(delta.b.shape[0]) + 0.5)


def assert_same(first: list[AdapterDelta], second: list[AdapterDelta]) -> None:
    """Equal bit by bit, dtypes and scales too."""
    keys = [[(d.component, d.module_path) for d in each] for each in (first, second)]
    assert keys[0] == keys[1]
    for one, other in zip(first, second, strict=True):
        for mine, theirs in (
            (one.a, other.a),
            (one.b, other.b),
            (one.magnitude, other.magnitude),
        ):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.dtype == theirs.dtype
                assert torch.equal(mine, theirs)
        assert one.scale == other.scale


def unet_of(folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet")


def test_the_controlnet_in_a_models_folder(
    tiny_sd1: Path, copy_model: Callable[[Path], Path], tmp_path: Path, seed: int
) -> None:
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    folder = copy_model(tiny_sd1)
    ControlNetModel.from_unet(unet_of(folder)).save_pretrained(folder / "controlnet")
    model = Model.open(folder)
    assert model.extras == ("controlnet",)
    assert "controlnet" not in model.components
    deltas = [lora(model, "controlnet", "controlnet_cond_embedding.conv_in", 2, scale=0.5)]
    deltas += [lora(model, "controlnet", TO_K, 4)]
    # A path that another one ends with: PEFT's patterns must not confuse the two.
    shape = model.weights("controlnet").shape("conv_in.weight")
    deltas += [
        AdapterDelta("controlnet", "conv_in", torch.randn(3, *shape[1:]), torch.randn(32, 3))
    ]
    deltas.sort(key=lambda d: d.module_path)
    for format in ("diffusers", "kohya", "peft"):
        write_adapter(tmp_path / f"{format}.safetensors", deltas, format)
        assert_same(read_adapter(tmp_path / f"{format}.safetensors", model), deltas)
    assert f"controlnet.{TO_K}.lora_A.weight" in load_file(tmp_path / "diffusers.safetensors")
    flat = f"lora_controlnet_{TO_K.replace('.', '_')}.lora_down.weight"
    assert flat in load_file(tmp_path / "kohya.safetensors")
    with pytest.raises(AdapterError, match="the model has no controlnet"):
        read_adapter(tmp_path / "kohya.safetensors", Model.open(tiny_sd1))


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def whole_adapter(model: Model, dtype: torch.dtype, *, text: bool, with_dora: bool) -> Any:
    # alpha / rank: exact in binary for rank 4 alone.
    found = [
        lora(model, "unet", TO_K, 3, scale=0.1 / 3),
        lora(model, "unet", POINT, 4, scale=0.7 / 4),
        lora(model, "unet", CONV, 6, scale=1.1 / 6),
    ]
    found += [lora(model, "text_encoder", Q_PROJ, 5, scale=3 / 5)] if text else []
    found = [dora(d) for d in found] if with_dora else found
    found.sort(key=lambda d: (d.component, d.module_path))
    return [
        replace(
            d,
            a=d.a.to(dtype),
            b=d.b.to(dtype),
            magnitude=None if d.magnitude is None else d.magnitude.to(dtype),
        )
        for d in found
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_dora", [False, True])
def test_every_pair_of_formats_keeps_every_bit(
    dtype: str, with_dora: bool, tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    deltas = whole_adapter(model, DTYPES[dtype], text=False, with_dora=with_dora)
    digest = digest_deltas(deltas)
    formats = ("diffusers", "peft", "kohya")
    for first, second in itertools.product(formats, formats):
        folder = tmp_path / f"{first}-{second}"
        (folder / "again").mkdir(parents=True)
        write_adapter(folder / "a.safetensors", deltas, first)
        read = read_adapter(folder / "a.safetensors", model)
        assert_same(read, deltas)
        write_adapter(folder / "again/b.safetensors", read, second)
        receipt, again = inspect_adapter(folder / "again/b.safetensors", model)
        assert receipt.format == second
        assert receipt.digest == digest
        assert receipt.dtypes == (str(DTYPES[dtype]).removeprefix("torch."),)
        assert_same(again, deltas)
    assert with_dora == any(
        ".dora_scale" in k for k in load_file(tmp_path / "kohya-kohya/again/b.safetensors")
    )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_opens_what_is_written_here(
    use_rslora: bool, tiny_sd1: Path, tmp_path: Path, seed: int
) -> None:
    from peft import PeftModel

    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    deltas = whole_adapter(model, torch.float32, text=False, with_dora=True)
    if use_rslora:
        # Scales that are no alpha over the rank.
        found = [n / 3**0.5 for n in range(1, 99) if not reached(n / 3**0.5, 3)]
        deltas = [replace(d, scale=found[0]) for d in deltas if d.rank == 3]
    write_adapter(tmp_path / "adapter_model.safetensors", deltas, "peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.get("use_rslora", False) == use_rslora
    assert_same(read_adapter(tmp_path / "adapter_model.safetensors", model), deltas)
    wrapped = PeftModel.from_pretrained(unet_of(tiny_sd1), tmp_path)
    for delta in deltas:
        layer = wrapped.get_submodule(f"base_model.model.{delta.module_path}")
        assert torch.equal(layer.lora_A["default"].weight, delta.a)
        assert torch.equal(layer.lora_B["default"].weight.flatten(1), delta.b)
        assert torch.equal(layer.lora_magnitude_vector["default"].weight.flatten(), delta.magnitude)
        assert layer.scaling["default"] == delta.scale


def test_what_a_format_cannot_hold_is_refused(tiny_sd1: Path, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model.open(tiny_sd1)
    deltas = whole_adapter(model, torch.float32, text=True, with_dora=False)
    with pytest.raises(AdapterError, match="a PEFT adapter is of one component; this one has"):
        write_adapter(tmp_path / "a", deltas, "peft")
    mixed = [dora(deltas[-1]), *deltas[:-1]]
    with pytest.raises(AdapterError, match="a component is DoRA whole or not at all"):
        write_adapter(tmp_path / "a", mixed)
    write_adapter(tmp_path / "a", mixed, "kohya")
    assert_same(read_adapter(tmp_path / "a", model), [*deltas[:-1], mixed[0]])
    # Between neighbouring alphas over rank 3 there are floats that no quotient is.
    scale = next(s for s in neighbours(1.6, 400) if not reached(s, 3) and not reached(s, 3**0.5))
    odd = replace(next(d for d in deltas if d.rank == 3), scale=scale)
    for format in ("diffusers", "peft", "kohya"):
        with pytest.raises(AdapterError, match=f"{format}: no alpha over rank 3 is exactly"):
            write_adapter(tmp_path / "b", [odd], format)
    clash = [replace(deltas[-1], module_path=path) for path in ("a.b_c", "a_b.c")]
    with pytest.raises(AdapterError, match="two modules of unet would be named a_b_c"):
        write_adapter(tmp_path / "b", clash, "kohya")
    assert not (tmp_path / "b").exists()


def neighbours(start: float, count: int) -> list[float]:
    """The next floats after `start`."""
    found = [start]
    while len(found) < count:
        found.append(math.nextafter(found[-1], math.inf))
    return found


def reached(scale: float, divisor: float) -> bool:
    """Whether any alpha gives exactly this scale."""
    near = neighbours(scale * divisor * (1 - 1e-15), 32)
    return any(alpha / divisor == scale for alpha in near)


def test_the_header_keeps_its_texts(tiny_sd1: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_sd1)
    write_adapter(tmp_path / "a", [lora(model, "unet", TO_K, 2)], metadata={"ss_note": "x"})
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", "ss_note": "x"}


@pytest.mark.parametrize(
    ("prefix", "fields"),
    [
        ("unet.", {"r": 16, "lora_alpha": 8}),
        ("unet.", {"transformer.r": 16, "transformer.lora_alpha": 8}),
        ("unet.", {"text_encoder.r": 16, "text_encoder.lora_alpha": 8}),
        ("", {"unet.r": 16, "lora_alpha": 8}),
    ],
)
def test_metadata_of_nobody_in_the_file_is_refused(
    prefix: str, fields: dict[str, Any], tiny_sd1: Path, tmp_path: Path
) -> None:
    path = _with_metadata(tmp_path, tiny_sd1, prefix, fields)
    with pytest.raises(AdapterError, match=r"name no component|gives the scales of"):
        read_adapter(path, Model.open(tiny_sd1))


@pytest.mark.parametrize(
    ("prefix", "fields"),
    [
        ("", {"unet.r": 16, "unet.lora_alpha": 8}),
        ("", {"r": 16, "lora_alpha": 8}),
        ("unet.", {"unet.r": 16, "unet.lora_alpha": 8}),
    ],
)
def test_metadata_counts_with_and_without_a_prefix(
    prefix: str, fields: dict[str, Any], tiny_sd1: Path, tmp_path: Path
) -> None:
    path = _with_metadata(tmp_path, tiny_sd1, prefix, fields)
    (delta,) = read_adapter(path, Model.open(tiny_sd1))
    assert delta.scale == 0.5


def _with_metadata(folder: Path, model: Path, prefix: str, fields: dict[str, Any]) -> Path:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    outputs, inputs = Model.open(model).weights("unet").shape(f"{module}.weight")
    tensors = {
        f"{prefix}{module}.lora_A.weight": torch.ones(16, inputs),
        f"{prefix}{module}.lora_B.weight": torch.ones(outputs, 16),
    }
    path = folder / "a.safetensors"
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(fields)})
    return path


def test_a_peft_adapter_takes_no_other_ones_configuration(tiny_sd1: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_sd1)
    (delta,) = read_adapter(_with_metadata(tmp_path, tiny_sd1, "", {"r": 16}), model)
    folder = tmp_path / "peft"
    folder.mkdir()
    write_adapter(folder / "adapter_model.safetensors", [delta], "peft")
    with pytest.raises(AdapterError, match="a folder of its own"):
        write_adapter(folder / "second.safetensors", [replace(delta, scale=0.5)], "peft")
    (kept,) = read_adapter(folder / "adapter_model.safetensors", model)
    assert kept.scale == delta.scale
    # Its own place may be written again.
    write_adapter(folder / "adapter_model.safetensors", [replace(delta, scale=0.5)], "peft")
    (again,) = read_adapter(folder / "adapter_model.safetensors", model)
    assert again.scale == 0.5
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_peft_adapter_that_is_cut_off_is_none(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.open(tiny_sd1)
    (delta,) = read_adapter(_with_metadata(tmp_path, tiny_sd1, "", {"r": 16}), model)
    folder = tmp_path / "peft"
    folder.mkdir()
    path = folder / "adapter_model.safetensors"
    write_adapter(path, [delta], "peft")
    monkeypatch.setattr(Path, "replace", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(path, [replace(delta, scale=0.5)], "peft")
    monkeypatch.undo()
    if path.exists():
        (kept,) = read_adapter(path, model)
        assert kept.scale == delta.scale


def _interrupted(self: Path, target: Path) -> Path:
    if Path(target).name == "adapter_config.json":
        raise KeyboardInterrupt
    os.rename(self, target)
    return Path(target)
